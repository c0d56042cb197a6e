//! Everything but the routed experts: embedding, layers, final norm, head.
use crate::{Checkpoint, Error, Layer, ModelConfig};

pub struct Backbone {}

impl Backbone {
    pub fn load(_checkpoint: &Checkpoint) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn config(&self) -> &ModelConfig {
        unimplemented!()
    }
    pub fn layers(&self) -> &[Layer] {
        unimplemented!()
    }
    /// ids (each below vocab_size) → hidden `[rows, hidden]`.
    pub fn embed(&self, _ids: &[u32]) -> Vec<f32> {
        unimplemented!()
    }
    /// hidden `[rows, hidden]` → logits `[rows, vocab]`: final norm and head.
    pub fn logits(&self, _hidden: &[f32]) -> Vec<f32> {
        unimplemented!()
    }
}
