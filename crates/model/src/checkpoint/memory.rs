//! Memory for weights. A matrix is read from its beginning to its end: in pages of 4 KiB one address in 64 lines has to be
//! looked up anew, in huge pages (2 MiB) nearly none. On some machines that is a third of the time, on others nothing.

use std::{io, ops};

use memmap2::{MmapMut, MmapOptions};

const HUGE_BYTES: usize = 2 << 20;

/// The last page is a huge one too if no more than this part of the memory is lost behind its end: half of what a process
/// may take beyond its weights.
const UNUSED_PART: usize = 20;

/// Bytes of no file.
#[derive(Debug)]
pub(crate) struct Memory {
    map: MmapMut,
    bytes: ops::Range<usize>,
}

impl Memory {
    /// `n_bytes` zeros. With `huge`, in huge pages as far as they are worth it and the system gives them.
    pub(crate) fn new(n_bytes: usize, huge: bool) -> io::Result<Self> {
        let n_huge = if huge { n_huge(n_bytes) * HUGE_BYTES } else { 0 };
        let slack = if huge { HUGE_BYTES } else { 0 };
        // What is never touched takes no room: that is so for all that lies before and behind.
        let map = MmapOptions::new().len((n_bytes.max(n_huge) + slack).max(1)).map_anon()?;
        let start = if huge { map.as_ptr().align_offset(HUGE_BYTES).min(slack) } else { 0 };
        #[cfg(target_os = "linux")]
        if n_huge > 0 {
            // Without huge pages in this system it is memory all the same.
            let _unsupported = map.advise_range(memmap2::Advice::HugePage, start, n_huge);
        }
        Ok(Self { map, bytes: start..start + n_bytes })
    }
}

/// How many huge pages so many bytes are worth.
fn n_huge(n_bytes: usize) -> usize {
    let n_pages = n_bytes.div_ceil(HUGE_BYTES);
    let n_unused = n_pages * HUGE_BYTES - n_bytes;
    if n_unused <= n_bytes / UNUSED_PART { n_pages } else { n_bytes / HUGE_BYTES }
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
        // An expert of the bench model: 4.78 pages.
        assert_eq!(n_huge(10_031_104), 5);
        for (n_bytes, pages) in
            [(0, 0), (1, 0), (2 * HUGE_BYTES, 2), (2 * HUGE_BYTES + 1, 2), (20 * HUGE_BYTES + 1, 21)]
        {
            assert_eq!(n_huge(n_bytes), pages, "{n_bytes} bytes");
        }
    }

    #[test]
    fn memory_is_zero_and_as_long_as_asked_for() {
        for huge in [false, true] {
            for n in [0, 1, 4097, HUGE_BYTES, 3 * HUGE_BYTES + 5] {
                let mut memory = Memory::new(n, huge).unwrap();
                assert_eq!(memory.len(), n);
                assert!(memory.iter().all(|byte| *byte == 0));
                memory.fill(7);
                assert!(!huge || n == 0 || memory.as_ptr().align_offset(HUGE_BYTES) == 0);
            }
        }
    }
}
