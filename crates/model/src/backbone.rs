//! Everything but the routed experts: embedding, layers, final norm, head.

use std::sync::Arc;

use ids::LayerId;

use crate::{
    Bits, Checkpoint, Error, Layer, ModelConfig, Weights,
    kernels::RmsNorm,
    rope::Rotary,
    storage::{Input, Linear},
};

pub struct Backbone {
    config: ModelConfig,
    embed_tokens: Linear,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Linear,
    weights: Weights,
}

const EMBED_TOKENS: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

impl Backbone {
    /// Maps the backbone's tensors; none of the routed experts'.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let config = checkpoint.config().clone();
        let shape = [config.vocab_size, config.hidden_size];
        // A head of its own is used where there is one, also beside `tie_word_embeddings`.
        let has_head =
            checkpoint.tensors().contains_key(LM_HEAD) || checkpoint.absent().contains_key(LM_HEAD);
        let head = match (has_head, config.tie_word_embeddings) {
            (true, _) => LM_HEAD,
            (false, true) => EMBED_TOKENS,
            (false, false) => {
                return Err(Error::new(format!(
                    "tensor {LM_HEAD} is missing and tie_word_embeddings is false"
                )));
            }
        };
        let rotary = Arc::new(Rotary::new(&config));
        let layers = (0..config.num_hidden_layers as u32)
            .map(|layer| Layer::load(checkpoint, LayerId(layer), Arc::clone(&rotary)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embed_tokens: checkpoint.stored(EMBED_TOKENS, shape)?,
            layers,
            norm: RmsNorm::new(
                checkpoint.vector("model.norm.weight", config.hidden_size)?,
                config.rms_norm_eps,
            ),
            lm_head: match checkpoint.weights().of_backbone() {
                None => checkpoint.stored(head, shape)?,
                // What every answer goes through is worth its bytes.
                Some(_) => checkpoint.quantized(head, shape, Bits::Eight)?,
            },
            weights: checkpoint.weights(),
            config,
        })
    }

    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How its matrices are kept.
    #[must_use]
    pub const fn weights(&self) -> Weights {
        self.weights
    }

    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// ids (each below vocab_size) → hidden `[rows, hidden]`.
    #[must_use]
    pub fn embed(&self, ids: &[u32]) -> Vec<f32> {
        let mut hidden = Vec::with_capacity(ids.len() * self.config.hidden_size);
        ids.iter().for_each(|&id| self.embed_tokens.extend_row(id as usize, &mut hidden));
        hidden
    }

    /// hidden `[rows, hidden]` → logits `[rows, vocab]`: final norm and head.
    #[must_use]
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        self.lm_head.apply(&Input::normed(&self.norm, hidden, Some(&self.lm_head)), None)
    }
}
