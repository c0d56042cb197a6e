//! `config.json` in both spellings → one [`ModelConfig`], or the field that is wrong.
use ids::LayerId;
use std::path::Path;
use crate::Error;

/// Sizes and options of one model. Field names are the checkpoint's.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    pub architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub n_routed_experts: usize,
    pub num_experts_per_tok: usize,
    pub max_position_embeddings: usize,
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads `config.json` and `generation_config.json` of a checkpoint folder.
    pub fn load(_dir: &Path) -> Result<Self, Error> {
        unimplemented!()
    }
    /// The layers that have routed experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        (0..self.num_hidden_layers as u32).map(LayerId)
    }
}
