//! MLA over latents: project, cache, absorb, attend, expand.

use std::sync::Arc;

use ids::PageIndex;
use rayon::prelude::*;

use super::indexer::{IndexQueries, Indexer};
use crate::{
    Error, ModelConfig, Pages, Span,
    checkpoint::{
        Checkpoint, Mapped,
        packed::{Shape, Weights},
    },
    kernels::{Isa, axpy, dot, rms_norm, softmax},
    pages::Rows,
    rope::Rotary,
    storage::Linear,
};

/// Epsilon of the norms inside attention: the reference leaves it at its default, whatever `rms_norm_eps` says.
const INNER_NORM_EPS: f32 = 1e-6;

/// Numbers read by one head of one row from which a second thread pays.
const PARALLEL_FROM: usize = 1 << 18;

pub(crate) struct Attention {
    query: Query,
    kv_a_proj_with_mqa: Linear,
    kv_a_bias: Option<Vec<f32>>,
    kv_a_layernorm: Vec<f32>,
    kv_b_proj: KvB,
    o_proj: Linear,
    o_bias: Option<Vec<f32>>,
    indexer: Option<Indexer>,
    rotary: Arc<Rotary>,
    sizes: Sizes,
}

#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    nope: usize,
    rope: usize,
    v: usize,
    latent: usize,
    softmax_scale: f32,
}

/// `kv_b_proj`, from latents to each head's keys and values.
enum KvB {
    /// `[heads × (nope + v), kv_lora_rank]`: each head's key half, then its value half.
    Stored { matrix: Linear, nope: usize, v: usize },
    /// Of each head the key half transposed, `[kv_lora_rank, nope]`, and the value half, `[v, kv_lora_rank]`.
    Packed(Vec<Linear>),
}

/// How queries are made: through a low-rank bottleneck, or directly (V2-Lite).
enum Query {
    LowRank { q_a_proj: Linear, q_a_bias: Option<Vec<f32>>, q_a_layernorm: Vec<f32>, q_b_proj: Linear },
    Direct { q_proj: Linear },
}

impl Attention {
    pub(crate) fn load(checkpoint: &Checkpoint, prefix: &str, rotary: Arc<Rotary>) -> Result<Self, Error> {
        let config = checkpoint.config();
        let ModelConfig { hidden_size, num_attention_heads: heads, kv_lora_rank, attention_bias, .. } =
            *config;
        let (nope, rope, v) = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim);
        let matrix = |name: &str, shape| checkpoint.linear(&format!("{prefix}.{name}.weight"), shape);
        let bias = |name: &str, len| checkpoint.bias(&format!("{prefix}.{name}.bias"), len, attention_bias);
        let query = match config.q_lora_rank {
            Some(rank) => Query::LowRank {
                q_a_proj: matrix("q_a_proj", [rank, hidden_size])?,
                q_a_bias: bias("q_a_proj", rank)?,
                q_a_layernorm: checkpoint.vector(&format!("{prefix}.q_a_layernorm.weight"), rank)?,
                q_b_proj: matrix("q_b_proj", [heads * (nope + rope), rank])?,
            },
            None => Query::Direct { q_proj: matrix("q_proj", [heads * (nope + rope), hidden_size])? },
        };
        let indexer = match (config.indexer, config.q_lora_rank) {
            (Some(sizes), Some(rank)) => {
                Some(Indexer::load(checkpoint, &format!("{prefix}.indexer"), sizes, rank)?)
            }
            (Some(_) | None, _) => None,
        };
        let softmax_scale = config.rope.softmax_scale(nope + rope) as f32;
        Ok(Self {
            query,
            kv_a_proj_with_mqa: matrix("kv_a_proj_with_mqa", [kv_lora_rank + rope, hidden_size])?,
            kv_a_bias: bias("kv_a_proj_with_mqa", kv_lora_rank + rope)?,
            kv_a_layernorm: checkpoint.vector(&format!("{prefix}.kv_a_layernorm.weight"), kv_lora_rank)?,
            kv_b_proj: KvB::load(checkpoint, &format!("{prefix}.kv_b_proj"), [heads, nope, v, kv_lora_rank])?,
            o_proj: matrix("o_proj", [hidden_size, heads * v])?,
            o_bias: bias("o_proj", hidden_size)?,
            indexer,
            rotary,
            sizes: Sizes { heads, nope, rope, v, latent: kv_lora_rank, softmax_scale },
        })
    }

    /// Normed hidden `[rows, hidden]` → attention's output `[rows, hidden]`. Rows are cached before any is read.
    pub(crate) fn apply(
        &self,
        normed: &[f32],
        spans: &[Span<'_>],
        layer: usize,
        pages: &mut Pages,
    ) -> Vec<f32> {
        let positions: Vec<usize> =
            spans.iter().flat_map(|span| span.position..span.position + span.rows.len()).collect();
        let (latents, index_keys) = pages.layer(layer);
        self.cache(normed, spans, latents, index_keys);

        let (mut q, q_resid) = self.query.apply(normed); // [rows, heads, nope + rope]
        let qk = self.sizes.nope + self.sizes.rope;
        for (head, q) in q.chunks_exact_mut(qk).enumerate() {
            self.rotary.rotate_interleaved(&mut q[self.sizes.nope..], positions[head / self.sizes.heads]);
        }
        let index_queries =
            self.indexer.as_ref().map(|indexer| indexer.queries(normed, &q_resid, &positions, &self.rotary));

        let tasks: Vec<(usize, usize, &[PageIndex])> = spans
            .iter()
            .flat_map(|span| {
                span.rows.clone().zip(span.position..).map(|(row, position)| (row, position, span.pages))
            })
            .collect();
        let read: usize = tasks.iter().map(|(_, position, _)| position + 1).sum::<usize>()
            * self.sizes.heads
            * self.sizes.latent;
        let attend = |&(row, position, pages): &(usize, usize, &[PageIndex])| {
            let selected = self.select(index_queries.as_ref(), row, position, index_keys, pages);
            self.attend_row(
                &q[row * self.sizes.heads * qk..][..self.sizes.heads * qk],
                position,
                selected,
                latents,
                pages,
            )
        };
        let outputs: Vec<Vec<f32>> = if read < PARALLEL_FROM {
            tasks.iter().map(attend).collect()
        } else {
            tasks.par_iter().map(attend).collect()
        };
        self.o_proj.apply(&outputs.concat(), self.o_bias.as_deref())
    }

    fn cache(&self, normed: &[f32], spans: &[Span<'_>], latents: &mut Rows, index_keys: &mut Rows) {
        let Sizes { latent, rope, .. } = self.sizes;
        let mut kv = self.kv_a_proj_with_mqa.apply(normed, self.kv_a_bias.as_deref()); // [rows, latent + rope]
        let keys = self.indexer.as_ref().map(|indexer| (indexer.head_dim(), indexer.keys(normed)));
        for span in spans {
            for (row, position) in span.rows.clone().zip(span.position..) {
                let kv = &mut kv[row * (latent + rope)..][..latent + rope];
                let normed = rms_norm(&kv[..latent], &self.kv_a_layernorm, INNER_NORM_EPS);
                kv[..latent].copy_from_slice(&normed);
                self.rotary.rotate_interleaved(&mut kv[latent..], position);
                latents.set(span.pages, position, kv);
                if let Some((width, keys)) = &keys {
                    let mut key = keys[row * width..][..*width].to_vec();
                    self.rotary.rotate_half_split(&mut key, position);
                    index_keys.set(span.pages, position, &key);
                }
            }
        }
    }

    fn select(
        &self,
        queries: Option<&IndexQueries>,
        row: usize,
        position: usize,
        index_keys: &Rows,
        pages: &[PageIndex],
    ) -> Option<Vec<usize>> {
        self.indexer.as_ref()?.select(queries?, row, position, index_keys, pages)
    }

    /// All heads of one row: `q` `[heads, nope + rope]` → `[heads × v]`.
    fn attend_row(
        &self,
        q: &[f32],
        position: usize,
        selected: Option<Vec<usize>>,
        latents: &Rows,
        pages: &[PageIndex],
    ) -> Vec<f32> {
        let Sizes { heads, nope, v, latent, rope, softmax_scale } = self.sizes;
        let isa = Isa::detect();
        let read = selected.unwrap_or_else(|| (0..=position).collect());
        let rows: Vec<&[f32]> = read.into_iter().map(|s| latents.get(pages, s)).collect();
        let mut output = Vec::with_capacity(heads * v);
        let mut absorbed = vec![0.0; latent + rope];
        let mut scores = vec![0.0; rows.len()];
        let mut sum = vec![0.0; latent];
        for (head, q) in q.chunks_exact(nope + rope).enumerate() {
            self.kv_b_proj.absorb(head, &q[..nope], &mut absorbed[..latent]);
            absorbed[latent..].copy_from_slice(&q[nope..]);
            for (score, row) in scores.iter_mut().zip(&rows) {
                *score = dot(isa, &absorbed, row) * softmax_scale;
            }
            softmax(&mut scores);
            sum.fill(0.0);
            for (weight, row) in scores.iter().zip(&rows) {
                axpy(isa, *weight, &row[..latent], &mut sum);
            }
            output.extend(self.kv_b_proj.expand(head, &sum));
        }
        output
    }
}

impl KvB {
    fn load(
        checkpoint: &Checkpoint,
        name: &str,
        [heads, nope, v, latent]: [usize; 4],
    ) -> Result<Self, Error> {
        let name = format!("{name}.weight");
        let shape = [heads * (nope + v), latent];
        let Weights::Quantized(bits) = checkpoint.weights() else {
            return Ok(Self::Stored { matrix: checkpoint.stored(&name, shape)?, nope, v });
        };
        // A head's key half is used the other way round, and blocks lie along what is summed over.
        let (key, value) = (Shape { outputs: latent, width: nope }, Shape { outputs: v, width: latent });
        let shapes: Vec<Shape> = (0..heads).flat_map(|_| [key, value]).collect();
        let row = |mapped: &Mapped, matrix: usize, row: usize, out: &mut Vec<f32>| {
            let first = matrix / 2 * (nope + v);
            if matrix.is_multiple_of(2) {
                (first..first + nope)
                    .for_each(|output| mapped.extend_number(&name, latent, output, row, out));
            } else {
                mapped.extend_row(&name, latent, first + nope + row, out);
            }
        };
        let tensors = [(name.clone(), shape.to_vec())];
        let unit = checkpoint.packed(&name, bits, &tensors, &shapes, row)?;
        Ok(Self::Packed(unit.matrices))
    }

    /// A head's query `[nope]` → `absorbed` `[latent]`: what its scalar product with a latent is the score of.
    fn absorb(&self, head: usize, q: &[f32], absorbed: &mut [f32]) {
        match self {
            Self::Stored { matrix, nope, v } => {
                let first = head * (nope + v);
                absorbed.fill(0.0);
                matrix.add_rows(q, first..first + nope, absorbed);
            }
            Self::Packed(matrices) => absorbed.copy_from_slice(&matrices[2 * head].apply(q, None)),
        }
    }

    /// A head's sum of latents `[latent]` → its output `[v]`.
    fn expand(&self, head: usize, sum: &[f32]) -> Vec<f32> {
        match self {
            Self::Stored { matrix, nope, v } => {
                let first = head * (nope + v) + nope;
                matrix.apply_outputs(sum, first..first + v)
            }
            Self::Packed(matrices) => matrices[2 * head + 1].apply(sum, None),
        }
    }
}

impl Query {
    /// `[rows, hidden]` → queries `[rows, heads × (nope + rope)]` and the bottleneck's `[rows, q_lora_rank]` (empty
    /// where there is none).
    fn apply(&self, normed: &[f32]) -> (Vec<f32>, Vec<f32>) {
        match self {
            Self::Direct { q_proj } => (q_proj.apply(normed, None), Vec::new()),
            Self::LowRank { q_a_proj, q_a_bias, q_a_layernorm, q_b_proj } => {
                let q_resid =
                    rms_norm(&q_a_proj.apply(normed, q_a_bias.as_deref()), q_a_layernorm, INNER_NORM_EPS);
                (q_b_proj.apply(&q_resid, None), q_resid)
            }
        }
    }
}
