//! DSA indexer: which positions attention may read. score(t, s) = Σ_h w[t, h] · relu(q[t, h] · k[s]) / sqrt(d), and the
//! `index_topk` best positions are read (DeepSeek-V3.2 §2.1).

use ids::PageIndex;

use super::mla::Reader;
use crate::{
    Error, ModelConfig,
    checkpoint::Checkpoint,
    config,
    kernels::{Isa, layer_norm, matmul, packed, threads},
    pages::IndexKeys,
    storage::{Input, Linear},
};

/// `nn.LayerNorm`'s epsilon in the reference.
const K_NORM_EPS: f32 = 1e-6;

pub(crate) struct Indexer {
    wq_b: Linear,
    wk: Linear,
    k_norm_weight: Vec<f32>,
    k_norm_bias: Vec<f32>,
    weights_proj: Linear,
    sizes: config::Indexer,
}

/// The indexer's own queries for a batch.
pub(crate) struct IndexQueries {
    /// `[rows, heads, head_dim]`, rotated
    q: Vec<f32>,
    /// `[rows, heads]`
    weights: Vec<f32>,
}

/// Pages that one thread scores at a time have so many positions.
const SCORED_POSITIONS: usize = 1024;

impl Indexer {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        prefix: &str,
        sizes: config::Indexer,
        q_lora_rank: usize,
    ) -> Result<Self, Error> {
        let ModelConfig { hidden_size, .. } = *checkpoint.config();
        let config::Indexer { index_n_heads, index_head_dim, .. } = sizes;
        Ok(Self {
            wq_b: checkpoint
                .linear(&format!("{prefix}.wq_b.weight"), [index_n_heads * index_head_dim, q_lora_rank])?,
            wk: checkpoint.linear(&format!("{prefix}.wk.weight"), [index_head_dim, hidden_size])?,
            k_norm_weight: checkpoint.vector(&format!("{prefix}.k_norm.weight"), index_head_dim)?,
            k_norm_bias: checkpoint.vector(&format!("{prefix}.k_norm.bias"), index_head_dim)?,
            weights_proj: checkpoint
                .stored(&format!("{prefix}.weights_proj.weight"), [index_n_heads, hidden_size])?,
            sizes,
        })
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.sizes.index_head_dim
    }

    /// Index keys `[rows, head_dim]`, not yet rotated.
    pub(crate) fn keys(&self, normed: &Input<'_>) -> Vec<f32> {
        let [keys] = Linear::apply_all([(&self.wk, normed)]);
        layer_norm(&keys, &self.k_norm_weight, &self.k_norm_bias, K_NORM_EPS)
    }

    /// `q_resid` is `q_a_layernorm(q_a_proj(x))` `[rows, q_lora_rank]`.
    pub(super) fn queries(
        &self,
        normed: &Input<'_>,
        q_resid: &Input<'_>,
        readers: &[Reader<'_>],
    ) -> IndexQueries {
        let config::Indexer { index_n_heads, index_head_dim, .. } = self.sizes;
        let [mut q, mut weights] = Linear::apply_all([(&self.wq_b, q_resid), (&self.weights_proj, normed)]);
        for (head, q) in q.chunks_exact_mut(index_head_dim).enumerate() {
            readers[head / index_n_heads].angles.rotate_half_split(q);
        }
        let scale = (index_n_heads as f32).powf(-0.5);
        weights.iter_mut().for_each(|weight| *weight *= scale);
        IndexQueries { q, weights }
    }

    /// The positions that `row` reads, ascending. None: all up to its own.
    pub(super) fn select(
        &self,
        queries: &IndexQueries,
        row: usize,
        reader: &Reader<'_>,
        keys: &IndexKeys,
    ) -> Option<Vec<usize>> {
        let config::Indexer { index_n_heads, index_head_dim, index_topk } = self.sizes;
        if reader.position < index_topk {
            return None;
        }
        let q = &queries.q[row * index_n_heads * index_head_dim..][..index_n_heads * index_head_dim];
        let weights = &queries.weights[row * index_n_heads..][..index_n_heads];
        let mut scores = vec![0.0; reader.position + 1];
        self.score(q, weights, reader.pages, keys, &mut scores);
        // In one number the score, in its total order, and the position: among equals the earliest is the largest.
        let key = |(position, score): (usize, f32)| {
            let bits = score.to_bits();
            let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            u64::from(ordered) << 32 | u64::from(u32::MAX - position as u32)
        };
        let mut keys: Vec<u64> = scores.into_iter().enumerate().map(key).collect();
        keys.select_nth_unstable_by(index_topk - 1, |a, b| b.cmp(a));
        let mut selected: Vec<usize> =
            keys[..index_topk].iter().map(|key| (u32::MAX - *key as u32) as usize).collect();
        selected.sort_unstable();
        Some(selected)
    }

    /// Of one row with each position's key.
    fn score(&self, q: &[f32], weights: &[f32], pages: &[PageIndex], keys: &IndexKeys, scores: &mut [f32]) {
        let head_dim = self.sizes.index_head_dim;
        let scale = (head_dim as f32).powf(-0.5);
        let page_positions = keys.page_positions();
        let share = SCORED_POSITIONS.div_ceil(page_positions) * page_positions;
        let parts = scores.chunks_mut(share).enumerate().collect();
        match keys {
            IndexKeys::Rows(keys) => {
                let isa = Isa::detect();
                threads::for_each(parts, |(part, scores): (usize, &mut [f32])| {
                    let mut products = vec![0.0; weights.len()];
                    for (score, position) in scores.iter_mut().zip(part * share..) {
                        let key = keys.get(pages, position);
                        // [heads]: one row, the key, and the heads are its outputs.
                        matmul(isa, key, q, head_dim, &mut products);
                        let heads = products.iter().zip(weights);
                        *score = heads.map(|(product, weight)| weight * (product * scale).max(0.0)).sum();
                    }
                });
            }
            IndexKeys::Panels { width, page_positions, bytes } => {
                let q = packed::Rows::quantize(q, head_dim);
                let weights: Vec<f32> = weights.iter().map(|weight| weight * scale).collect();
                threads::for_each(parts, |(part, scores): (usize, &mut [f32])| {
                    let pages = &pages[part * share / page_positions..];
                    for (scores, &page) in scores.chunks_mut(*page_positions).zip(pages) {
                        let panels = IndexKeys::panels(*width, *page_positions, bytes, page);
                        packed::sum_of_positive(&q, &weights, panels, *width, scores);
                    }
                });
            }
        }
    }
}
