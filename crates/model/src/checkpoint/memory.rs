//! Memory for weights. A matrix is read from its beginning to its end: in pages of 4 KiB one address in 64 lines has to be
//! looked up anew, in huge pages (2 MiB) nearly none. On some machines that is a third of the time, on others nothing.

use std::{fs, io, ops};

use memmap2::{MmapMut, MmapOptions};

const HUGE_BYTES: usize = 2 << 20;

/// The last page is a huge one too if no more than the twentieth part of the bytes is lost behind their end.
const UNUSED_PART: usize = 20;

/// Bytes of no file.
#[derive(Debug)]
pub(crate) struct Memory {
    map: MmapMut,
    bytes: ops::Range<usize>,
    taken: usize,
}

impl Memory {
    /// `n_bytes` zeros. With `huge`, in huge pages as far as they are worth it and the system gives them.
    pub(crate) fn new(n_bytes: usize, huge: bool) -> io::Result<Self> {
        let n_huge = if huge { n_huge(n_bytes) * HUGE_BYTES } else { 0 };
        let slack = if huge { HUGE_BYTES } else { 0 };
        // What is never touched takes no room: that is so for all that lies before and behind.
        let map = MmapOptions::new().len((taken(n_bytes, huge) + slack).max(1)).map_anon()?;
        let start = if huge { map.as_ptr().align_offset(HUGE_BYTES).min(slack) } else { 0 };
        #[cfg(target_os = "linux")]
        if n_huge > 0 {
            // Without huge pages in this system it is memory all the same.
            let _unsupported = map.advise_range(memmap2::Advice::HugePage, start, n_huge);
        }
        Ok(Self { map, bytes: start..start + n_bytes, taken: taken(n_bytes, huge) })
    }

    /// Where it is, with what its last page has beyond it.
    pub(crate) fn addresses(&self) -> ops::Range<usize> {
        let start = self.as_ptr() as usize;
        start..start + self.taken
    }
}

/// What so many bytes take: in huge pages, some of the last page as well.
pub(crate) fn taken(n_bytes: usize, huge: bool) -> usize {
    if huge { n_bytes.max(n_huge(n_bytes) * HUGE_BYTES) } else { n_bytes }
}

/// How many huge pages so many bytes are worth.
fn n_huge(n_bytes: usize) -> usize {
    let n_pages = n_bytes.div_ceil(HUGE_BYTES);
    let n_unused = n_pages * HUGE_BYTES - n_bytes;
    if n_unused <= n_bytes / UNUSED_PART { n_pages } else { n_bytes / HUGE_BYTES }
}

/// Bytes of this process in huge pages, of which the system gives fewer than it is asked for where its memory is full of page
/// cache. Nothing where it does not say.
#[must_use]
pub fn huge_bytes() -> Option<u64> {
    in_huge_pages(&fs::read_to_string("/proc/self/smaps_rollup").ok()?)
}

fn in_huge_pages(rollup: &str) -> Option<u64> {
    let n_kib =
        rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"))?.trim().strip_suffix(" kB")?;
    Some(n_kib.parse::<u64>().ok()? << 10)
}

impl ops::Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.bytes.clone()]
    }
}

impl ops::DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.bytes.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_page_is_huge_if_little_of_it_is_lost() {
        // 4.78 of them.
        assert_eq!(n_huge(10_031_104), 5);
        for (n_bytes, pages) in [
            (0, 0),
            (1, 0),
            (2 * HUGE_BYTES, 2),
            (2 * HUGE_BYTES + 1, 2),
            (20 * HUGE_BYTES + 1, 21),
            (HUGE_BYTES * 20 / 21, 0),
            (HUGE_BYTES * 20 / 21 + 1, 1),
        ] {
            assert_eq!(n_huge(n_bytes), pages, "{n_bytes} bytes");
        }
    }

    #[test]
    fn huge_pages_are_told_from_others() {
        let rollup = "5581-7ffd ---p 00000000 00:00 0    [rollup]\nRss:     5120 kB\nAnonHugePages:      4096 kB\nSwap: 0 kB\n";
        assert_eq!(in_huge_pages(rollup), Some(4 << 20));
        assert_eq!(in_huge_pages("Rss: 5120 kB\nAnonHugePages: many\n"), None);
        assert_eq!(in_huge_pages(""), None);
    }

    #[test]
    fn memory_is_zero_and_as_long_as_asked_for() {
        for huge in [false, true] {
            for n in [0, 1, 4097, HUGE_BYTES, 3 * HUGE_BYTES + 5, 20 * HUGE_BYTES - 4095] {
                let mut memory = Memory::new(n, huge).unwrap();
                assert_eq!(memory.len(), n);
                assert!(memory.iter().all(|byte| *byte == 0));
                memory.fill(7);
                let pages = if huge { n_huge(n) * HUGE_BYTES } else { 0 };
                assert_eq!(memory.addresses().len(), n.max(pages));
                assert!(memory.addresses().end <= memory.map.as_ptr() as usize + memory.map.len());
                assert!(!huge || n == 0 || memory.as_ptr().align_offset(HUGE_BYTES) == 0);
            }
        }
    }
}
