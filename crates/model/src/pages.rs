//! Layout of cached rows in pages; reads and writes, no ownership.

use std::ops::Range;

use ids::PageIndex;

use crate::{
    Backbone, Bits, ModelConfig, Weights,
    kernels::{
        Lines,
        packed::{self, OUTPUTS},
    },
};

/// The KV memory: pages of `page_positions` positions, each with every layer's latent row (and index key). Memory that
/// was never written takes no room: the system gives it out as it is touched.
pub struct Pages {
    page_positions: usize,
    latents: Vec<Rows>,
    index_keys: Vec<IndexKeys>,
}

/// One layer's keys of the indexer.
pub(crate) enum IndexKeys {
    /// Beside weights as they are stored.
    Rows(Rows),
    /// int8 beside quantized weights: a page is panels of sixteen positions, one output each.
    Panels { width: usize, page_positions: usize, bytes: Vec<u8> },
}

/// One layer's rows of one kind, `[pages × page_positions, width]`.
pub(crate) struct Rows {
    width: usize,
    page_positions: usize,
    values: Lines,
}

impl Pages {
    #[must_use]
    pub fn new(backbone: &Backbone, n_pages: usize, page_positions: usize) -> Self {
        let config = backbone.config();
        let rows = |width: usize| Rows {
            width,
            page_positions,
            values: Lines::zeros(n_pages * page_positions * width),
        };
        let index_keys = || {
            let width = config.indexer.map_or(0, |indexer| indexer.index_head_dim);
            match backbone.weights().of_backbone() {
                Some(_) if width > 0 => {
                    let bytes = vec![0; n_pages * Bits::Eight.matrix_bytes(page_positions, width)];
                    IndexKeys::Panels { width, page_positions, bytes }
                }
                Some(_) | None => IndexKeys::Rows(rows(width)),
            }
        };
        let layers = 0..config.num_hidden_layers;
        Self {
            page_positions,
            latents: layers.clone().map(|_| rows(config.latent_width())).collect(),
            index_keys: layers.map(|_| index_keys()).collect(),
        }
    }

    #[must_use]
    pub fn page_positions(&self) -> usize {
        self.page_positions
    }

    /// Bytes one page takes over all layers.
    #[must_use]
    pub fn page_bytes(config: &ModelConfig, weights: Weights, page_positions: usize) -> usize {
        let index_width = config.indexer.map_or(0, |indexer| indexer.index_head_dim);
        let index_bytes = match weights.of_backbone() {
            None => page_positions * index_width * size_of::<f32>(),
            Some(_) => Bits::Eight.matrix_bytes(page_positions, index_width),
        };
        config.num_hidden_layers * (page_positions * config.latent_width() * size_of::<f32>() + index_bytes)
    }

    /// One layer's latents and index keys.
    pub(crate) fn layer(&mut self, layer: usize) -> (&mut Rows, &mut IndexKeys) {
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

impl IndexKeys {
    pub(crate) fn set(&mut self, pages: &[PageIndex], position: usize, key: &[f32]) {
        match self {
            Self::Rows(rows) => rows.set(pages, position, key),
            Self::Panels { width, page_positions, bytes } => {
                let at = position % *page_positions;
                let panel_bytes = Bits::Eight.panel_bytes(*width);
                let page = pages[position / *page_positions].index() * page_positions.div_ceil(OUTPUTS);
                let panel = &mut bytes[(page + at / OUTPUTS) * panel_bytes..][..panel_bytes];
                packed::pack_output(Bits::Eight, key, panel, at % OUTPUTS);
            }
        }
    }

    /// Positions that a page has.
    pub(crate) const fn page_positions(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.page_positions,
            Self::Panels { page_positions, .. } => *page_positions,
        }
    }

    /// The panels of one page.
    pub(crate) fn panels(width: usize, page_positions: usize, bytes: &[u8], page: PageIndex) -> &[u8] {
        let n_bytes = Bits::Eight.matrix_bytes(page_positions, width);
        &bytes[page.index() * n_bytes..][..n_bytes]
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
