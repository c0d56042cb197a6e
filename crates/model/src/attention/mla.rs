//! MLA over latents: project, cache, absorb, attend, expand.

mod heads;

use std::sync::Arc;

use ids::PageIndex;

use super::indexer::Indexer;
use crate::{
    Error, ModelConfig, Pages, Span,
    checkpoint::{Checkpoint, Mapped, packed::Shape},
    kernels::{RmsNorm, packed::Bits, threads},
    pages::{IndexKeys, Rows},
    rope::{Angles, Rotary},
    storage::{Input, Linear, add_bias},
};

/// Epsilon of the norms inside attention: the reference leaves it at its default, whatever `rms_norm_eps` says.
const INNER_NORM_EPS: f32 = 1e-6;

/// Rows whose queries one thread rotates.
const ROTATED_ROWS: usize = 16;

pub(crate) struct Attention {
    query: Query,
    kv_a_proj_with_mqa: Linear,
    kv_a_bias: Option<Vec<f32>>,
    kv_a_layernorm: RmsNorm,
    /// One a head.
    kv_b_proj: Vec<KvHead>,
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

/// A head's halves of `kv_b_proj`, from latents to its keys and values.
struct KvHead {
    /// Transposed, `[kv_lora_rank, nope]`: a query times it is what its scalar product with a latent is the score of.
    key: Linear,
    /// `[v, kv_lora_rank]`: from a mean of latents to the head's output.
    value: Linear,
}

/// One row of the batch: it reads up to its own position.
pub(super) struct Reader<'a> {
    pub(super) position: usize,
    pub(super) pages: &'a [PageIndex],
    pub(super) angles: Angles,
}

/// How queries are made: through a low-rank bottleneck, or directly (V2-Lite).
enum Query {
    LowRank { q_a_proj: Linear, q_a_bias: Option<Vec<f32>>, q_a_layernorm: RmsNorm, q_b_proj: Linear },
    Direct { q_proj: Linear },
}

/// Attention's matrices as they come from a checkpoint.
struct Matrices {
    /// q_a_proj, or q_proj.
    q_first: Linear,
    /// q_b_proj where there is a q_a_proj.
    q_second: Option<Linear>,
    kv_a_proj_with_mqa: Linear,
    kv_b_proj: Vec<KvHead>,
    o_proj: Linear,
}

/// Where a packed matrix comes from.
enum Source {
    Tensor(usize),
    /// A head's half of `kv_b_proj`. The key half is used the other way round, and blocks lie along what is summed over.
    Key(usize),
    Value(usize),
}

impl Attention {
    pub(crate) fn load(checkpoint: &Checkpoint, prefix: &str, rotary: Arc<Rotary>) -> Result<Self, Error> {
        let config = checkpoint.config();
        let ModelConfig { hidden_size, num_attention_heads: heads, kv_lora_rank, attention_bias, .. } =
            *config;
        let (nope, rope, v) = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim);
        let softmax_scale = config.rope.softmax_scale(nope + rope) as f32;
        let sizes = Sizes { heads, nope, rope, v, latent: kv_lora_rank, softmax_scale };
        let norm = |name: &str, len| {
            let weight = checkpoint.vector(&format!("{prefix}.{name}.weight"), len)?;
            Ok::<_, Error>(RmsNorm::new(weight, INNER_NORM_EPS))
        };
        let bias = |name: &str, len| checkpoint.bias(&format!("{prefix}.{name}.bias"), len, attention_bias);
        let matrices = Matrices::load(checkpoint, prefix, sizes)?;
        let query = match (config.q_lora_rank, matrices.q_second) {
            (Some(rank), Some(q_b_proj)) => Query::LowRank {
                q_a_proj: matrices.q_first,
                q_a_bias: bias("q_a_proj", rank)?,
                q_a_layernorm: norm("q_a_layernorm", rank)?,
                q_b_proj,
            },
            (None, _) | (Some(_), None) => Query::Direct { q_proj: matrices.q_first },
        };
        let indexer = match (config.indexer, config.q_lora_rank) {
            (Some(sizes), Some(rank)) => {
                Some(Indexer::load(checkpoint, &format!("{prefix}.indexer"), sizes, rank)?)
            }
            (Some(_) | None, _) => None,
        };
        Ok(Self {
            query,
            kv_a_proj_with_mqa: matrices.kv_a_proj_with_mqa,
            kv_a_bias: bias("kv_a_proj_with_mqa", kv_lora_rank + rope)?,
            kv_a_layernorm: norm("kv_a_layernorm", kv_lora_rank)?,
            kv_b_proj: matrices.kv_b_proj,
            o_proj: matrices.o_proj,
            o_bias: bias("o_proj", hidden_size)?,
            indexer,
            rotary,
            sizes,
        })
    }

    /// The matrix that the hidden state is multiplied with first.
    pub(crate) fn first(&self) -> &Linear {
        self.query.first()
    }

    /// Normed hidden `[rows, hidden]` → attention's output `[rows, hidden]`. Rows are cached before any is read.
    pub(crate) fn apply(
        &self,
        normed: &Input<'_>,
        spans: &[Span<'_>],
        layer: usize,
        pages: &mut Pages,
    ) -> Vec<f32> {
        let Sizes { heads, nope, rope, .. } = self.sizes;
        let reader = |(position, pages)| Reader { position, pages, angles: self.rotary.angles(position) };
        let readers: Vec<Reader<'_>> = spans
            .iter()
            .flat_map(|span| (span.position..).take(span.rows.len()).map(|position| (position, span.pages)))
            .map(reader)
            .collect();
        let (latents, index_keys) = pages.layer(layer);
        let [compressed, kv] =
            Linear::apply_all([(self.first(), normed), (&self.kv_a_proj_with_mqa, normed)]);
        self.cache(normed, kv, &readers, latents, index_keys);

        let (mut q, q_resid) = self.query.finish(compressed); // [rows, heads, nope + rope]
        let parts = q.chunks_mut(ROTATED_ROWS * heads * (nope + rope)).zip(readers.chunks(ROTATED_ROWS));
        threads::for_each(parts.collect(), |(q, readers): (&mut [f32], &[Reader<'_>])| {
            let mut room = Vec::new();
            for (q, reader) in q.chunks_exact_mut(heads * (nope + rope)).zip(readers) {
                for q in q.chunks_exact_mut(nope + rope) {
                    reader.angles.rotate_interleaved(&mut q[nope..], &mut room);
                }
            }
        });
        let indexed = self.indexer.as_ref().zip(q_resid);
        let index_queries = indexed.map(|(indexer, q_resid)| indexer.queries(normed, &q_resid, &readers));
        let selected = threads::map(readers.len(), |row| {
            self.indexer.as_ref()?.select(index_queries.as_ref()?, row, &readers[row], index_keys)
        });
        let n_read = |row: usize| selected[row].as_ref().map_or(readers[row].position + 1, Vec::len);
        let n_read: Vec<usize> = (0..readers.len()).map(n_read).collect();
        let read = |row: usize| -> Vec<&[f32]> {
            let Reader { position, pages, .. } = &readers[row];
            match &selected[row] {
                Some(selected) => selected.iter().map(|&s| latents.get(pages, s)).collect(),
                None => (0..=*position).map(|s| latents.get(pages, s)).collect(),
            }
        };
        self.o_proj.apply(&Input::new(&self.attend(&q, &n_read, &read)), self.o_bias.as_deref())
    }

    fn cache(
        &self,
        normed: &Input<'_>,
        mut kv: Vec<f32>, // [rows, latent + rope]
        readers: &[Reader<'_>],
        latents: &mut Rows,
        index_keys: &mut IndexKeys,
    ) {
        let Sizes { latent, rope, .. } = self.sizes;
        add_bias(&mut kv, self.kv_a_bias.as_deref());
        let keys = self.indexer.as_ref().map(|indexer| (indexer.head_dim(), indexer.keys(normed)));
        let mut room = Vec::new();
        for (row, reader) in readers.iter().enumerate() {
            let kv = &mut kv[row * (latent + rope)..][..latent + rope];
            let normed = self.kv_a_layernorm.apply(&kv[..latent]);
            kv[..latent].copy_from_slice(&normed);
            reader.angles.rotate_interleaved(&mut kv[latent..], &mut room);
            latents.set(reader.pages, reader.position, kv);
            if let Some((width, keys)) = &keys {
                let mut key = keys[row * width..][..*width].to_vec();
                reader.angles.rotate_half_split(&mut key);
                index_keys.set(reader.pages, reader.position, &key);
            }
        }
    }
}

impl Matrices {
    fn load(checkpoint: &Checkpoint, prefix: &str, sizes: Sizes) -> Result<Self, Error> {
        let Sizes { heads, nope, rope, v, latent, .. } = sizes;
        let hidden = checkpoint.config().hidden_size;
        let name = |name: &str| format!("{prefix}.{name}.weight");
        let q = heads * (nope + rope);
        let queries = match checkpoint.config().q_lora_rank {
            Some(rank) => vec![(name("q_a_proj"), [rank, hidden]), (name("q_b_proj"), [q, rank])],
            None => vec![(name("q_proj"), [q, hidden])],
        };
        let kv_b = (name("kv_b_proj"), [heads * (nope + v), latent]);
        let others = vec![
            (name("kv_a_proj_with_mqa"), [latent + rope, hidden]),
            (name("o_proj"), [hidden, heads * v]),
        ];
        let plain = [others, queries].concat();
        let (mut matrices, kv_b_proj) = match checkpoint.weights().of_backbone() {
            None => {
                let load = |(name, shape): &(String, [usize; 2])| checkpoint.stored(name, *shape);
                let matrix = load(&kv_b)?;
                let head = |head: usize| {
                    let key = head * (nope + v);
                    let value = key + nope;
                    KvHead { key: matrix.transposed(key..value), value: matrix.rows(value..value + v) }
                };
                (plain.iter().map(load).collect::<Result<Vec<_>, _>>()?, (0..heads).map(head).collect())
            }
            Some(bits) => Self::quantized(checkpoint, prefix, sizes, bits, &plain, &kv_b)?,
        };
        let mut next = || matrices.pop().ok_or_else(|| Error::new(format!("{prefix} lacks a matrix")));
        let last = next()?;
        let (q_first, q_second) = if plain.len() == 4 { (next()?, Some(last)) } else { (last, None) };
        let (o_proj, kv_a_proj_with_mqa) = (next()?, next()?);
        Ok(Self { q_first, q_second, kv_a_proj_with_mqa, kv_b_proj, o_proj })
    }

    /// All of them packed as one unit: long enough for huge pages.
    fn quantized(
        checkpoint: &Checkpoint,
        prefix: &str,
        Sizes { heads, nope, v, latent, .. }: Sizes,
        bits: Bits,
        plain: &[(String, [usize; 2])],
        kv_b: &(String, [usize; 2]),
    ) -> Result<(Vec<Linear>, Vec<KvHead>), Error> {
        let halves = (0..heads).flat_map(|head| [Source::Key(head), Source::Value(head)]);
        let sources: Vec<Source> = (0..plain.len()).map(Source::Tensor).chain(halves).collect();
        let shape = |source: &Source| match *source {
            Source::Tensor(at) => Shape { outputs: plain[at].1[0], width: plain[at].1[1] },
            Source::Key(_) => Shape { outputs: latent, width: nope },
            Source::Value(_) => Shape { outputs: v, width: latent },
        };
        let row = |mapped: &Mapped, matrix: usize, row: usize, out: &mut Vec<f32>| match sources[matrix] {
            Source::Tensor(at) => mapped.extend_row(&plain[at].0, plain[at].1[1], row, out),
            Source::Key(head) => {
                let first = head * (nope + v);
                (first..first + nope)
                    .for_each(|output| mapped.extend_number(&kv_b.0, latent, output, row, out));
            }
            Source::Value(head) => {
                mapped.extend_row(&kv_b.0, latent, head * (nope + v) + nope + row, out);
            }
        };
        let tensors: Vec<_> =
            plain.iter().chain([kv_b]).map(|(name, shape)| (name.clone(), shape.to_vec())).collect();
        let shapes: Vec<Shape> = sources.iter().map(shape).collect();
        let unit = checkpoint.packed(prefix, bits, &tensors, &shapes, row)?;
        let mut matrices = unit.matrices;
        let halves = matrices.split_off(plain.len());
        let (pairs, _) = halves.as_chunks::<2>();
        let heads = pairs.iter().cloned().map(|[key, value]| KvHead { key, value });
        Ok((matrices, heads.collect()))
    }
}

impl Query {
    /// The matrix that the hidden state is multiplied with.
    fn first(&self) -> &Linear {
        match self {
            Self::Direct { q_proj } => q_proj,
            Self::LowRank { q_a_proj, .. } => q_a_proj,
        }
    }

    /// Its product → queries `[rows, heads × (nope + rope)]` and the bottleneck's `[rows, q_lora_rank]`, where there is one.
    fn finish(&self, mut product: Vec<f32>) -> (Vec<f32>, Option<Input<'static>>) {
        match self {
            Self::Direct { .. } => (product, None),
            Self::LowRank { q_a_bias, q_a_layernorm, q_b_proj, .. } => {
                add_bias(&mut product, q_a_bias.as_deref());
                let q_resid = Input::normed(q_a_layernorm, &product, Some(q_b_proj));
                (q_b_proj.apply(&q_resid, None), Some(q_resid))
            }
        }
    }
}
