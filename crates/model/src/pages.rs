//! Layout of cached rows in pages; reads and writes, no ownership.

use std::ops::Range;

use ids::PageIndex;

use crate::ModelConfig;

/// The KV memory: pages of `page_positions` positions, each with every layer's latent row (and index key). Memory that
/// was never written takes no room: the system gives it out as it is touched.
pub struct Pages {
    page_positions: usize,
    latents: Vec<Rows>,
    index_keys: Vec<Rows>,
}

/// One layer's rows of one kind, `[pages × page_positions, width]`.
pub(crate) struct Rows {
    width: usize,
    page_positions: usize,
    values: Vec<f32>,
}

impl Pages {
    #[must_use]
    pub fn new(config: &ModelConfig, n_pages: usize, page_positions: usize) -> Self {
        let rows = |width: usize| Rows {
            width,
            page_positions,
            values: vec![0.0; n_pages * page_positions * width],
        };
        let layers = 0..config.num_hidden_layers;
        Self {
            page_positions,
            latents: layers.clone().map(|_| rows(config.latent_width())).collect(),
            index_keys: layers
                .map(|_| rows(config.indexer.map_or(0, |indexer| indexer.index_head_dim)))
                .collect(),
        }
    }

    #[must_use]
    pub fn page_positions(&self) -> usize {
        self.page_positions
    }

    /// Bytes one page takes over all layers.
    #[must_use]
    pub fn page_bytes(config: &ModelConfig, page_positions: usize) -> usize {
        let width = config.latent_width() + config.indexer.map_or(0, |indexer| indexer.index_head_dim);
        config.num_hidden_layers * page_positions * width * size_of::<f32>()
    }

    /// One layer's latents and index keys.
    pub(crate) fn layer(&mut self, layer: usize) -> (&mut Rows, &mut Rows) {
        (&mut self.latents[layer], &mut self.index_keys[layer])
    }
}

impl Rows {
    fn at(&self, pages: &[PageIndex], position: usize) -> Range<usize> {
        let page = pages[position / self.page_positions].index();
        let start = (page * self.page_positions + position % self.page_positions) * self.width;
        start..start + self.width
    }

    pub(crate) fn get(&self, pages: &[PageIndex], position: usize) -> &[f32] {
        &self.values[self.at(pages, position)]
    }

    pub(crate) fn set(&mut self, pages: &[PageIndex], position: usize, row: &[f32]) {
        let at = self.at(pages, position);
        self.values[at].copy_from_slice(row);
    }
}

/// Consecutive rows of a batch that belong to one sequence.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// Which rows of the batch.
    pub rows: Range<usize>,
    /// Position in the sequence of the first of them.
    pub position: usize,
    /// The sequence's pages, in order: position p lies in `pages[p / page_positions]`. Holds at least the last row's
    /// position.
    pub pages: &'a [PageIndex],
}
