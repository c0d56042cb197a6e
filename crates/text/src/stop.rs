//! Stop strings across token borders. Text that could still be the beginning of a stop string is held back; on a match
//! everything from its beginning on is dropped.

/// What may be sent, and whether the answer ends here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutcome {
    pub text: String,
    pub stopped: bool,
}

#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty strings stop nothing.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    pub fn push(&mut self, text: &str) -> StopOutcome {
        self.held.push_str(text);
        // The leftmost match counts, however long a longer candidate keeps others waiting.
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            let earlier = self.undecided_from();
            if earlier >= at {
                self.held.truncate(at);
                return StopOutcome { text: std::mem::take(&mut self.held), stopped: true };
            }
            // A longer stop string may have begun before this one: the cut would be there.
            let rest = self.held.split_off(earlier);
            return StopOutcome { text: std::mem::replace(&mut self.held, rest), stopped: false };
        }
        let rest = self.held.split_off(self.undecided_from());
        StopOutcome { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The first place from which on the held text is the beginning of a stop string; its length if there is none.
    fn undecided_from(&self) -> usize {
        let open = |at: &usize| {
            let tail = &self.held[*at..];
            self.stops.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
        };
        self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len())
    }

    /// The held tail of an answer that ended by itself. A stop string in it that a longer candidate kept waiting still
    /// counts.
    pub fn finish(&mut self) -> StopOutcome {
        let held = std::mem::take(&mut self.held);
        match self.stops.iter().filter_map(|stop| held.find(stop.as_str())).min() {
            Some(at) => StopOutcome { text: held[..at].to_owned(), stopped: true },
            None => StopOutcome { text: held, stopped: false },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stops: &[&str], pieces: &[&str], expected: (&str, bool)) {
        let mut stop = StopStrings::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut text = String::new();
        let mut stopped = false;
        for piece in pieces {
            let outcome = stop.push(piece);
            text.push_str(&outcome.text);
            if outcome.stopped {
                stopped = true;
                break;
            }
        }
        if !stopped {
            let outcome = stop.finish();
            text.push_str(&outcome.text);
            stopped = outcome.stopped;
        }
        assert_eq!((text.as_str(), stopped), expected, "{stops:?} in {pieces:?}");
    }

    #[test]
    fn stops_are_found_across_pieces_and_nothing_is_lost() {
        let letters: Vec<&str> = "quick brown".split_inclusive(|_| true).collect();
        check(&["k b"], &letters, ("quic", true));
        check(&["wnX"], &letters, ("quick brown", false));
        check(&["ck brX", "k"], &letters, ("quic", true));
        check(&["é"], &["caf", "é", "s"], ("caf", true));
        check(&[], &["a", "b"], ("ab", false));
        check(&["", "b"], &["a", "b"], ("a", true));
        check(&["aab"], &["a", "a", "a", "b"], ("a", true));
    }

    #[test]
    fn a_stop_that_a_longer_candidate_delays_is_not_lost() {
        let letters: Vec<&str> = "xck bro".split_inclusive(|_| true).collect();
        check(&["ck brown", "k"], &letters, ("xc", true));
    }
}
