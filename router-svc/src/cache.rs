//! Who owns which page of the KV cache. Pages are handed out and taken back whole; the numbers in them belong to
//! `model::Pages`.

use ids::PageIndex;

/// The free pages. A page is either here or in exactly one sequence.
#[derive(Debug)]
pub(crate) struct Cache {
    free: Vec<PageIndex>,
    n_pages: usize,
    page_positions: usize,
}

impl Cache {
    pub(crate) fn new(n_pages: usize, page_positions: usize) -> Self {
        // Popped from the end: low pages first, so that a mostly idle router touches little memory.
        let free = (0..n_pages as u32).rev().map(PageIndex).collect();
        Self { free, n_pages, page_positions }
    }

    pub(crate) fn in_use(&self) -> usize {
        self.n_pages - self.free.len()
    }

    /// Grows `owned` to hold `n_positions`; false and no change if there are not enough free pages.
    #[must_use]
    pub(crate) fn grow(&mut self, owned: &mut Vec<PageIndex>, n_positions: usize) -> bool {
        let wanted = n_positions.div_ceil(self.page_positions).saturating_sub(owned.len());
        if wanted > self.free.len() {
            return false;
        }
        owned.extend(self.free.drain(self.free.len() - wanted..).rev());
        true
    }

    pub(crate) fn release(&mut self, owned: &mut Vec<PageIndex>) {
        self.free.extend(owned.drain(..).rev());
        debug_assert!(self.free.len() <= self.n_pages, "a page was returned twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_and_come_back() {
        let mut cache = Cache::new(4, 16);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(cache.grow(&mut a, 17));
        assert_eq!(a, [PageIndex(0), PageIndex(1)]);
        assert!(cache.grow(&mut a, 32), "the second page has room");
        assert!(!cache.grow(&mut b, 33));
        assert!(b.is_empty(), "no part of a growth that does not fit");
        assert!(cache.grow(&mut b, 32));
        assert_eq!(cache.in_use(), 4);
        cache.release(&mut a);
        cache.release(&mut a);
        assert_eq!(cache.in_use(), 2);
    }
}
