//! DSA indexer: which positions attention may read. score(t, s) = Σ_h w[t, h] · relu(q[t, h] · k[s]) / sqrt(d), and the
//! `index_topk` best positions are read (DeepSeek-V3.2 §2.1).

use super::mla::Reader;
use crate::{
    Error, ModelConfig,
    checkpoint::Checkpoint,
    config,
    kernels::{Isa, dot, layer_norm},
    pages::Rows,
    rope::Rotary,
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
        q_resid: &[f32],
        readers: &[Reader<'_>],
        rotary: &Rotary,
    ) -> IndexQueries {
        let config::Indexer { index_n_heads, index_head_dim, .. } = self.sizes;
        let q_resid = Input::new(q_resid);
        let [mut q, mut weights] =
            Linear::apply_all([(&self.wq_b, &q_resid), (&self.weights_proj, normed)]);
        for (head, q) in q.chunks_exact_mut(index_head_dim).enumerate() {
            rotary.rotate_half_split(q, readers[head / index_n_heads].position);
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
        Reader { position, pages }: Reader<'_>,
        keys: &Rows,
    ) -> Option<Vec<usize>> {
        let config::Indexer { index_n_heads, index_head_dim, index_topk } = self.sizes;
        if position < index_topk {
            return None;
        }
        let isa = Isa::detect();
        let scale = (index_head_dim as f32).powf(-0.5);
        let q = &queries.q[row * index_n_heads * index_head_dim..][..index_n_heads * index_head_dim];
        let weights = &queries.weights[row * index_n_heads..][..index_n_heads];
        let mut scored: Vec<(f32, usize)> = (0..=position)
            .map(|s| {
                let key = keys.get(pages, s);
                let heads = q.chunks_exact(index_head_dim).zip(weights);
                let score = heads.map(|(q, weight)| weight * (dot(isa, q, key) * scale).max(0.0)).sum();
                (score, s)
            })
            .collect();
        // Among equals the earliest position: the order must not depend on the algorithm.
        let order = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        scored.select_nth_unstable_by(index_topk - 1, order);
        let mut selected: Vec<usize> = scored[..index_topk].iter().map(|(_, s)| *s).collect();
        selected.sort_unstable();
        Some(selected)
    }
}
