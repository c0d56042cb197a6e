//! One decoder layer: attend, gate, shared experts or dense FFN.

use std::sync::Arc;

use ids::{ExpertId, LayerId, RowIndex, WeightsHash};

use crate::{
    Assignments, Error, Pages, Span,
    attention::Attention,
    checkpoint::{Checkpoint, Mapped, packed::Shape},
    gate::Gate,
    kernels::{RmsNorm, add, gated_beside, packed::Bits, products_beside, silu_mul, threads},
    rope::Rotary,
    storage::{Input, Linear},
};

pub struct Layer {
    id: LayerId,
    input_layernorm: RmsNorm,
    attention: Attention,
    post_attention_layernorm: RmsNorm,
    feed_forward: FeedForward,
}

pub enum FeedForward {
    Dense(Mlp),
    Routed(Moe),
}

/// SwiGLU: down(silu(gate x) · up x).
pub struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// A MoE layer without its routed experts.
pub struct Moe {
    gate: Gate,
    shared_experts: Option<Mlp>,
}

impl Layer {
    pub(crate) fn load(checkpoint: &Checkpoint, id: LayerId, rotary: Arc<Rotary>) -> Result<Self, Error> {
        let config = checkpoint.config();
        let prefix = format!("model.layers.{id}");
        let norm = |name: &str| {
            let weight = checkpoint.vector(&format!("{prefix}.{name}.weight"), config.hidden_size)?;
            Ok::<_, Error>(RmsNorm::new(weight, config.rms_norm_eps))
        };
        let feed_forward = if config.moe[id.index()] {
            FeedForward::Routed(Moe::load(checkpoint, &format!("{prefix}.mlp"))?)
        } else {
            let bits = checkpoint.weights().of_backbone();
            FeedForward::Dense(Mlp::load(
                checkpoint,
                &format!("{prefix}.mlp"),
                config.intermediate_size,
                bits,
            )?)
        };
        Ok(Self {
            id,
            input_layernorm: norm("input_layernorm")?,
            attention: Attention::load(checkpoint, &format!("{prefix}.self_attn"), rotary)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            feed_forward,
        })
    }

    #[must_use]
    pub fn id(&self) -> LayerId {
        self.id
    }

    /// input_layernorm, attention over the cached rows, residual: in place on hidden `[rows, hidden]`. Writes the rows'
    /// latents (and index keys) into their pages first; writing the same position twice with the same input gives the
    /// same bits.
    pub fn attend(&self, hidden: &mut [f32], spans: &[Span<'_>], pages: &mut Pages) {
        let normed = Input::normed(&self.input_layernorm, hidden, Some(self.attention.first()));
        let output = self.attention.apply(&normed, spans, self.id.index(), pages);
        add(hidden, &output);
    }

    /// `[rows, hidden]` → `[rows, hidden]`, as the feed-forward takes them.
    #[must_use]
    pub fn post_attention_layernorm(&self, hidden: &[f32]) -> Input<'static> {
        let first = match &self.feed_forward {
            FeedForward::Dense(mlp) => Some(mlp.first()),
            FeedForward::Routed(moe) => moe.shared_experts.as_ref().map(Mlp::first),
        };
        Input::normed(&self.post_attention_layernorm, hidden, first)
    }

    #[must_use]
    pub fn feed_forward(&self) -> &FeedForward {
        &self.feed_forward
    }
}

impl Mlp {
    fn load(checkpoint: &Checkpoint, prefix: &str, width: usize, bits: Option<Bits>) -> Result<Self, Error> {
        let hidden_size = checkpoint.config().hidden_size;
        match bits {
            None => {
                let mapped = checkpoint.map(&Self::tensors(prefix, hidden_size, width))?;
                Self::from_mapped(&mapped, prefix, hidden_size, width)
            }
            Some(bits) => Ok(Self::quantized(checkpoint, prefix, width, bits)?.0),
        }
    }

    /// With the hash of what is computed with.
    pub(crate) fn quantized(
        checkpoint: &Checkpoint,
        prefix: &str,
        width: usize,
        bits: Bits,
    ) -> Result<(Self, WeightsHash), Error> {
        let tensors = Self::tensors(prefix, checkpoint.config().hidden_size, width);
        let shapes = Self::shapes(&tensors);
        let row = |mapped: &Mapped, matrix: usize, row, out: &mut Vec<f32>| {
            mapped.extend_row(&tensors[matrix].0, shapes[matrix].width, row, out);
        };
        let unit = checkpoint.packed(prefix, bits, &tensors, &shapes, row)?;
        let n_matrices = unit.matrices.len();
        let [gate_proj, up_proj, down_proj] = <[Linear; 3]>::try_from(unit.matrices)
            .map_err(|_| Error::new(format!("{prefix} has {n_matrices} matrices, wanted 3")))?;
        Ok((Self { gate_proj, up_proj, down_proj }, unit.hash))
    }

    /// The matrix that its rows are multiplied with first.
    pub(crate) const fn first(&self) -> &Linear {
        &self.gate_proj
    }

    /// Where its unit is in memory, if it is packed.
    pub(crate) fn packed_addresses(&self) -> Option<std::ops::Range<usize>> {
        self.gate_proj.packed_addresses()
    }

    /// What [`Mlp::tensors`] are packed as.
    pub(crate) fn shapes(tensors: &[(String, Vec<usize>); 3]) -> [Shape; 3] {
        tensors.each_ref().map(|(_, shape)| Shape { outputs: shape[0], width: shape[1] })
    }

    /// The names and shapes of its tensors.
    pub(crate) fn tensors(prefix: &str, hidden_size: usize, width: usize) -> [(String, Vec<usize>); 3] {
        [
            (format!("{prefix}.gate_proj.weight"), vec![width, hidden_size]),
            (format!("{prefix}.up_proj.weight"), vec![width, hidden_size]),
            (format!("{prefix}.down_proj.weight"), vec![hidden_size, width]),
        ]
    }

    pub(crate) fn from_mapped(
        mapped: &crate::checkpoint::Mapped,
        prefix: &str,
        hidden_size: usize,
        width: usize,
    ) -> Result<Self, Error> {
        Ok(Self {
            gate_proj: mapped.linear(&format!("{prefix}.gate_proj.weight"), hidden_size)?,
            up_proj: mapped.linear(&format!("{prefix}.up_proj.weight"), hidden_size)?,
            down_proj: mapped.linear(&format!("{prefix}.down_proj.weight"), width)?,
        })
    }

    /// `[rows, hidden]` → `[rows, hidden]`
    #[must_use]
    pub fn apply(&self, normed: &Input<'_>) -> Vec<f32> {
        Self::apply_list(&[(self, normed)]).swap_remove(0)
    }

    /// Several, each with rows of its own, in two jobs of the threads: gate and up, then down. What is packed is also
    /// activated and quantized in the first one.
    pub(crate) fn apply_list(list: &[(&Self, &Input<'_>)]) -> Vec<Vec<f32>> {
        Self::apply_list_beside(list, || ()).1
    }

    /// The same, and this thread does something else `first` while others begin.
    fn apply_list_beside<T>(list: &[(&Self, &Input<'_>)], first: impl FnOnce() -> T) -> (T, Vec<Vec<f32>>) {
        let mlps = list.iter().map(|(mlp, _)| *mlp);
        let all_gated = list.iter().map(|(mlp, x)| mlp.gate_proj.gated(&mlp.up_proj, x));
        if let Some(all_gated) = all_gated.collect::<Option<Vec<_>>>() {
            let threads = threads::installed();
            let ((done, awake), gated) = gated_beside(&all_gated, || (first(), threads.stay_awake()));
            let gated: Vec<Input<'_>> = gated.into_iter().map(Input::of_quantized).collect();
            let down: Vec<_> = mlps.zip(&gated).map(|(mlp, gated)| mlp.down_proj.product(gated)).collect();
            return (done, products_beside(&down, || drop(awake)).1);
        }
        let both = list.iter().flat_map(|(mlp, x)| [mlp.gate_proj.product(x), mlp.up_proj.product(x)]);
        let (done, mut gated) = products_beside(&both.collect::<Vec<_>>(), first);
        let n_gated = gated.iter().map(Vec::len).sum();
        let (pairs, _) = gated.as_chunks_mut::<2>();
        let pairs = pairs.iter_mut().collect();
        threads::share(n_gated, || threads::for_each(pairs, |[gate, up]| silu_mul(gate, up)));
        let gated: Vec<Input<'_>> = gated.iter().step_by(2).map(|gate| Input::new(gate)).collect();
        let down = mlps.zip(&gated).map(|(mlp, gated)| (&mlp.down_proj, gated));
        (done, Linear::apply_list(&down.collect::<Vec<_>>()))
    }
}

impl Moe {
    fn load(checkpoint: &Checkpoint, prefix: &str) -> Result<Self, Error> {
        let config = checkpoint.config();
        let width = config.n_shared_experts * config.moe_intermediate_size;
        let bits = checkpoint.weights().of_experts();
        let shared = || Mlp::load(checkpoint, &format!("{prefix}.shared_experts"), width, bits);
        Ok(Self {
            gate: Gate::load(checkpoint, &format!("{prefix}.gate"))?,
            shared_experts: (width > 0).then(shared).transpose()?,
        })
    }

    /// Routed experts that the gate chooses from.
    #[must_use]
    pub fn n_experts(&self) -> usize {
        self.gate.n_experts()
    }

    /// True if one thread computes the gate of so many rows: others may do something else meanwhile.
    #[must_use]
    pub const fn gates_alone(&self, n_rows: usize) -> bool {
        self.gate.is_small(n_rows)
    }

    /// normed hidden `[rows, hidden]` → `[rows, topk]` experts and weights (routed_scaling_factor applied).
    #[must_use]
    pub fn gate(&self, normed: &[f32]) -> Assignments {
        self.gate.apply(normed)
    }

    /// The gate as if `missing` did not exist, and which of them the rows would have chosen. A row that cannot be given
    /// top-k others keeps its choice.
    #[must_use]
    pub fn gate_without(
        &self,
        normed: &[f32],
        missing: &[ExpertId],
    ) -> (Assignments, Vec<(RowIndex, ExpertId)>) {
        self.gate.apply_without(normed, missing)
    }

    /// The shared experts' sum `[rows, hidden]`; zeros where the model has none.
    #[must_use]
    pub fn shared(&self, normed: &Input<'_>) -> Vec<f32> {
        self.shared_beside(normed, || ()).1
    }

    /// The same, and this thread does something else `first` while others begin.
    pub fn shared_beside<T>(&self, normed: &Input<'_>, first: impl FnOnce() -> T) -> (T, Vec<f32>) {
        match &self.shared_experts {
            Some(shared) => {
                let (done, mut outputs) = Mlp::apply_list_beside(&[(shared, normed)], first);
                (done, outputs.swap_remove(0))
            }
            None => (first(), vec![0.0; normed.len()]),
        }
    }
}
