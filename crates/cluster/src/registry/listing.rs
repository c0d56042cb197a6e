//! What a folder of keys is known to contain. Pure, so that what a registry may do wrong can be tried without one:
//! etcd 3.4 can serve stale reads and let watches go back in time, so a lower revision than the last is never taken.
//! Only when fresh lists say so again and again has the registry lost its data, and then those it has forgotten are kept
//! until they have had the time to register again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// So many lists in a row with a lower revision, and none lower than the one before, mean that the data is lost.
const LOWER_LISTS_MAX: u32 = 3;

/// The keys of one folder with their values.
#[derive(Debug)]
pub struct Listing {
    revision: i64,
    entries: BTreeMap<String, Entry>,
    /// Revision of the last list that was too low, and how many there were.
    lower: Option<(i64, u32)>,
    /// How long keys that lost data took with it are kept.
    grace: Duration,
}

#[derive(Debug)]
struct Entry {
    value: Vec<u8>,
    revision: i64,
    /// It is kept only until then.
    ends: Option<Instant>,
}

/// What a list meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    Changed,
    Same,
    /// Older than what is known: not taken.
    Stale,
    /// The registry has begun anew.
    DataLost,
}

/// A key as listed: name within the folder, value, revision of its last change.
pub type Listed = (String, Vec<u8>, i64);

impl Listing {
    #[must_use]
    pub const fn new(grace: Duration) -> Self {
        Self { revision: 0, entries: BTreeMap::new(), lower: None, grace }
    }

    /// Of the newest thing heard; a watch goes on after it.
    #[must_use]
    pub const fn revision(&self) -> i64 {
        self.revision
    }

    pub fn entries(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.entries.iter().map(|(key, entry)| (key.as_str(), entry.value.as_slice()))
    }

    /// Revision of the last change of `key`; 0 if it is not there.
    #[must_use]
    pub fn revision_of(&self, key: &str) -> i64 {
        self.entries.get(key).map_or(0, |entry| entry.revision)
    }

    /// Everything in the folder, as of `revision`.
    pub fn list(&mut self, revision: i64, listed: Vec<Listed>, now: Instant) -> Heard {
        let lost = revision < self.revision;
        if lost {
            let n = match self.lower {
                Some((before, n)) if before <= revision => n + 1,
                Some(_) | None => 1,
            };
            self.lower = Some((revision, n));
            if n < LOWER_LISTS_MAX {
                return Heard::Stale;
            }
        }
        self.lower = None;
        self.revision = revision;
        let mut before = std::mem::take(&mut self.entries);
        let mut changed = false;
        for (key, value, revision) in listed {
            changed |= before.remove(&key).is_none_or(|entry| entry.value != value);
            self.entries.insert(key, Entry { value, revision, ends: None });
        }
        for (key, entry) in before {
            let ends = if lost { Some(now + self.grace) } else { entry.ends.filter(|&ends| ends > now) };
            if ends.is_some() {
                self.entries.insert(key, Entry { revision: 0, ends, ..entry });
            } else {
                changed = true;
            }
        }
        match (lost, changed) {
            (true, _) => Heard::DataLost,
            (false, true) => Heard::Changed,
            (false, false) => Heard::Same,
        }
    }

    /// `key` was put, or deleted if `value` is None, at `revision`. True if that changes anything.
    pub fn event(&mut self, revision: i64, key: &str, value: Option<Vec<u8>>) -> bool {
        // One revision may hold several events: a lease takes all its keys at once.
        if revision < self.revision || revision <= self.revision_of(key) {
            return false;
        }
        self.revision = revision;
        match value {
            Some(value) => {
                let entry = Entry { value, revision, ends: None };
                let before = self.entries.insert(key.to_owned(), entry);
                before.map(|entry| entry.value).as_deref()
                    != self.entries.get(key).map(|entry| entry.value.as_slice())
            }
            None => self.entries.remove(key).is_some(),
        }
    }

    /// Drops what was kept for long enough. True if that changes anything.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.entries.len();
        self.entries.retain(|_, entry| entry.ends.is_none_or(|ends| ends > now));
        self.entries.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    struct Bench {
        listing: Listing,
        now: Instant,
    }

    #[expect(clippy::disallowed_methods, reason = "any instant will do")]
    fn bench() -> Bench {
        Bench { listing: Listing::new(GRACE), now: Instant::now() }
    }

    impl Bench {
        fn list(&mut self, revision: i64, keys: &[(&str, i64)]) -> Heard {
            let listed =
                keys.iter().map(|&(key, at)| (key.to_owned(), key.as_bytes().to_vec(), at)).collect();
            self.listing.list(revision, listed, self.now)
        }

        fn keys(&self) -> Vec<&str> {
            self.listing.entries().map(|(key, _)| key).collect()
        }
    }

    #[test]
    fn lists_and_events_add_up() {
        let mut bench = bench();
        assert_eq!(bench.list(5, &[("a", 3), ("b", 5)]), Heard::Changed);
        assert_eq!(bench.list(5, &[("a", 3), ("b", 5)]), Heard::Same);
        assert!(bench.listing.event(6, "c", Some(b"c".to_vec())));
        assert!(!bench.listing.event(6, "c", Some(b"c".to_vec())), "twice");
        assert!(!bench.listing.event(7, "c", Some(b"c".to_vec())), "the same value");
        // A lease that ends takes both at one revision.
        assert!(bench.listing.event(8, "a", None));
        assert!(bench.listing.event(8, "b", None));
        assert_eq!((bench.keys(), bench.listing.revision()), (vec!["c"], 8));
    }

    #[test]
    fn nothing_goes_back_in_time() {
        let mut bench = bench();
        bench.list(10, &[("a", 10)]);
        assert!(!bench.listing.event(9, "a", None));
        assert!(!bench.listing.event(10, "a", None), "what was listed at 10 contains it");
        assert_eq!(bench.list(9, &[]), Heard::Stale);
        assert_eq!(bench.list(10, &[("a", 10)]), Heard::Same);
        assert_eq!(bench.list(9, &[]), Heard::Stale);
        assert_eq!(bench.list(8, &[]), Heard::Stale, "lower still: counted anew");
        assert_eq!(bench.list(8, &[]), Heard::Stale);
        assert_eq!(bench.keys(), ["a"]);
    }

    #[test]
    fn lost_data_is_believed_in_the_end_and_the_forgotten_get_time_to_return() {
        let mut bench = bench();
        bench.list(100, &[("a", 90), ("b", 95)]);
        assert_eq!(bench.list(1, &[]), Heard::Stale);
        assert_eq!(bench.list(1, &[]), Heard::Stale);
        assert_eq!(bench.list(2, &[("a", 2)]), Heard::DataLost);
        assert_eq!((bench.keys(), bench.listing.revision()), (vec!["a", "b"], 2));
        bench.now += GRACE / 2;
        assert_eq!(bench.list(3, &[("a", 2)]), Heard::Same);
        assert!(!bench.listing.expire(bench.now));
        bench.now += GRACE / 2;
        assert!(bench.listing.expire(bench.now));
        assert_eq!(bench.keys(), ["a"]);
    }

    #[test]
    fn a_forgotten_key_that_returns_stays() {
        let mut bench = bench();
        bench.list(100, &[("a", 90)]);
        for _ in 0..3 {
            bench.list(1, &[]);
        }
        assert!(!bench.listing.event(2, "a", Some(b"a".to_vec())), "readers see no change");
        bench.now += GRACE * 2;
        assert!(!bench.listing.expire(bench.now));
        assert_eq!(bench.keys(), ["a"]);
    }
}
