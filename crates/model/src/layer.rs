//! One decoder layer: attend, gate, shared experts or dense FFN.
use ids::LayerId;
use crate::{Assignments, Pages, Span};

pub struct Layer {}
pub struct Mlp {}
pub struct Moe {}

pub enum FeedForward {
    Dense(Mlp),
    Routed(Moe),
}

impl Layer {
    pub fn id(&self) -> LayerId {
        unimplemented!()
    }
    /// input_layernorm, attention over the cached rows, residual: in place on hidden `[rows, hidden]`. Writes the rows' latents
    /// (and index keys) into their pages first; writing the same position twice with the same input gives the same bits.
    pub fn attend(&self, _hidden: &mut [f32], _spans: &[Span<'_>], _pages: &mut Pages) {
        unimplemented!()
    }
    /// `[rows, hidden]` → `[rows, hidden]`
    pub fn post_attention_layernorm(&self, _hidden: &[f32]) -> Vec<f32> {
        unimplemented!()
    }
    pub fn feed_forward(&self) -> &FeedForward {
        unimplemented!()
    }
}

impl Mlp {
    /// `[rows, hidden]` → `[rows, hidden]`
    pub fn apply(&self, _normed: &[f32]) -> Vec<f32> {
        unimplemented!()
    }
}

impl Moe {
    /// normed hidden `[rows, hidden]` → `[rows, topk]` experts and weights (routed_scaling_factor applied).
    pub fn gate(&self, _normed: &[f32]) -> Assignments {
        unimplemented!()
    }
    /// The shared experts' sum `[rows, hidden]`; zeros where the model has none.
    pub fn shared(&self, _normed: &[f32]) -> Vec<f32> {
        unimplemented!()
    }
}
