//! `config.json` in both spellings → one [`ModelConfig`], or the field that is wrong.

mod fields;

use std::{fs, path::Path};

use fields::Fields;
use ids::LayerId;

use crate::Error;

/// The architectures that can be computed, as `architectures[0]` spells them.
pub const ARCHITECTURES: [&str; 3] =
    ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"];

/// Sizes and options of one model. Field names are the checkpoint's.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub architecture: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub intermediate_size: usize,
    pub rms_norm_eps: f32,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    /// Every id that ends an answer: of `generation_config.json` and `config.json`, without repetition.
    pub eos_token_ids: Vec<u32>,
    /// Layers behind the last one that predict further tokens. Recognized, not computed.
    pub num_nextn_predict_layers: usize,

    pub num_attention_heads: usize,
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    pub attention_bias: bool,
    pub rope: Rope,
    /// DeepSeek Sparse Attention, where the model has it.
    pub indexer: Option<Indexer>,

    pub n_routed_experts: usize,
    pub num_experts_per_tok: usize,
    pub n_shared_experts: usize,
    pub moe_intermediate_size: usize,
    pub gate: Gate,
    /// By layer: whether it has routed experts.
    pub moe: Vec<bool>,
}

/// Sizes of the DSA indexer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexer {
    pub index_n_heads: usize,
    pub index_head_dim: usize,
    pub index_topk: usize,
}

/// How the gate scores and chooses experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    pub scoring: Scoring,
    pub n_group: usize,
    pub topk_group: usize,
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts; a group scores as its best expert (DeepSeek-V2 §2.1.2, §2.2.2).
    Softmax,
    /// Sigmoid, chosen with a correction bias; a group scores as its two best (DeepSeek-V3 §2.1.2).
    Sigmoid,
}

/// Rotary embedding. `yarn`: interpolation by parts (arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub yarn: Option<Yarn>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_max_position_embeddings: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
    pub attention_factor: Option<f64>,
    pub truncate: bool,
}

impl ModelConfig {
    /// Reads `config.json` and `generation_config.json` of a checkpoint folder.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let config = read_json(&dir.join("config.json"))?
            .ok_or_else(|| Error::new(format!("{} does not exist", dir.join("config.json").display())))?;
        let generation = read_json(&dir.join("generation_config.json"))?;
        let generation = generation.unwrap_or(serde_json::Value::Object(serde_json::Map::new()));
        Self::parse(&config, &generation)
    }

    /// The same from parsed files.
    pub fn parse(config: &serde_json::Value, generation: &serde_json::Value) -> Result<Self, Error> {
        let fields = Fields::new(config, "config.json")?;
        let architecture = fields.architecture()?;
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            return Err(Error::new(format!(
                "config.json: architecture {architecture:?} is not supported; supported are {}",
                ARCHITECTURES.join(", ")
            )));
        }
        let (v2, v32) = (architecture == ARCHITECTURES[0], architecture == ARCHITECTURES[2]);
        let mut eos_token_ids = Fields::new(generation, "generation_config.json")?.ids("eos_token_id")?;
        for id in fields.ids("eos_token_id")? {
            if !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }
        let num_hidden_layers = fields.size("num_hidden_layers")?;
        let qk_rope_head_dim = fields.size_or("qk_rope_head_dim", 64)?;
        let this = Self {
            vocab_size: fields.size("vocab_size")?,
            hidden_size: fields.size("hidden_size")?,
            num_hidden_layers,
            intermediate_size: fields.size("intermediate_size")?,
            rms_norm_eps: fields.number_or("rms_norm_eps", 1e-6)? as f32,
            max_position_embeddings: fields
                .size_or("max_position_embeddings", if v2 { 2048 } else { 4096 })?,
            tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            eos_token_ids,
            num_nextn_predict_layers: fields.count_or("num_nextn_predict_layers", 0)?,
            num_attention_heads: fields.size("num_attention_heads")?,
            q_lora_rank: if v32 {
                Some(fields.size("q_lora_rank")?)
            } else {
                fields.optional_size("q_lora_rank")?
            },
            kv_lora_rank: fields.size_or("kv_lora_rank", 512)?,
            qk_nope_head_dim: fields.size_or("qk_nope_head_dim", 128)?,
            qk_rope_head_dim,
            v_head_dim: fields.size_or("v_head_dim", 128)?,
            attention_bias: fields.flag_or("attention_bias", false)?,
            rope: fields.rope()?,
            indexer: if v32 { Some(fields.indexer()?) } else { None },
            n_routed_experts: fields.size("n_routed_experts")?,
            num_experts_per_tok: fields.size("num_experts_per_tok")?,
            n_shared_experts: fields.count_or("n_shared_experts", 0)?,
            moe_intermediate_size: fields.size("moe_intermediate_size")?,
            gate: fields.gate(v2)?,
            moe: fields.moe_layers(num_hidden_layers)?,
            architecture,
        };
        this.check(&fields)?;
        Ok(this)
    }

    fn check(&self, fields: &Fields<'_>) -> Result<(), Error> {
        let ensure = |ok: bool, message: String| {
            if ok { Ok(()) } else { Err(Error::new(format!("config.json: {message}"))) }
        };
        fields.only("hidden_act", "silu")?;
        ensure(
            self.qk_rope_head_dim.is_multiple_of(2),
            format!("qk_rope_head_dim {} is odd", self.qk_rope_head_dim),
        )?;
        ensure(
            self.num_experts_per_tok <= self.n_routed_experts,
            format!(
                "num_experts_per_tok {} is more than n_routed_experts {}",
                self.num_experts_per_tok, self.n_routed_experts
            ),
        )?;
        ensure(
            self.n_routed_experts.is_multiple_of(self.gate.n_group),
            format!(
                "n_group {} does not divide n_routed_experts {}",
                self.gate.n_group, self.n_routed_experts
            ),
        )?;
        ensure(
            (1..=self.gate.n_group).contains(&self.gate.topk_group),
            format!("topk_group {} is not in 1..={}", self.gate.topk_group, self.gate.n_group),
        )?;
        let eligible = self.gate.topk_group * (self.n_routed_experts / self.gate.n_group);
        ensure(
            self.num_experts_per_tok <= eligible,
            format!(
                "num_experts_per_tok {} is more than the {eligible} experts of topk_group groups",
                self.num_experts_per_tok
            ),
        )?;
        if let Some(indexer) = self.indexer {
            ensure(
                indexer.index_head_dim >= self.qk_rope_head_dim,
                format!(
                    "index_head_dim {} is less than qk_rope_head_dim {}",
                    indexer.index_head_dim, self.qk_rope_head_dim
                ),
            )?;
        }
        let vocab = u32::try_from(self.vocab_size);
        ensure(vocab.is_ok(), format!("vocab_size {} is too large", self.vocab_size))
    }

    /// The layers that have routed experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = LayerId> + '_ {
        self.moe.iter().enumerate().filter(|(_, moe)| **moe).map(|(layer, _)| LayerId(layer as u32))
    }

    /// Numbers of one position in one layer's cache: the latent and the rotated key.
    #[must_use]
    pub const fn latent_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

fn read_json(path: &Path) -> Result<Option<serde_json::Value>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::new(format!("cannot read {}: {error}", path.display()))),
    };
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(format!("{} is not JSON: {error}", path.display())))?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests;
