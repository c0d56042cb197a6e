//! Layout of cached rows in pages; reads and writes, no ownership.
use std::ops::Range;
use ids::PageIndex;
use crate::ModelConfig;

/// The KV memory: `n_pages` pages of `page_positions` positions, each holding every layer's latent row (and index key).
pub struct Pages {}

impl Pages {
    pub fn new(_config: &ModelConfig, _n_pages: usize, _page_positions: usize) -> Self {
        unimplemented!()
    }
    pub fn page_positions(&self) -> usize {
        unimplemented!()
    }
    /// Bytes one page takes over all layers.
    pub fn page_bytes(_config: &ModelConfig, _page_positions: usize) -> usize {
        unimplemented!()
    }
}

/// Consecutive rows of a batch that belong to one sequence.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// Which rows of the batch.
    pub rows: Range<usize>,
    /// Position in the sequence of the first of them.
    pub position: usize,
    /// The sequence's pages, in order: position p lies in `pages[p / page_positions]`. Holds at least the last row's position.
    pub pages: &'a [PageIndex],
}
