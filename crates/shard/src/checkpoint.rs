//! Tiny DeepSeek-V3 checkpoints: the config and the routed experts, which are all that an expert server reads.

use std::{collections::BTreeMap, fs};

use ids::{ExpertId, LayerId};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use tempfile::TempDir;

/// The decoder layers with routed experts; layer 0 is dense.
pub(crate) const MOE_LAYERS: [u32; 2] = [1, 2];
pub(crate) const N_EXPERTS: u32 = 8;

/// `gate_proj` and `up_proj` (`[intermediate, hidden]`) and `down_proj` (`[hidden, intermediate]`) of one expert.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    pub(crate) gate: Vec<f32>,
    pub(crate) up: Vec<f32>,
    pub(crate) down: Vec<f32>,
}

pub(crate) struct Model {
    pub(crate) dir: TempDir,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) experts: BTreeMap<(LayerId, ExpertId), Weights>,
}

impl Model {
    /// Numbers that look random and are the same every time.
    pub(crate) fn random(hidden: usize, intermediate: usize) -> Self {
        let mut seed = 1;
        let mut matrix =
            || -> Vec<f32> { (0..hidden * intermediate).map(|_| uniform(&mut seed) * 0.5).collect() };
        let experts = MOE_LAYERS
            .iter()
            .flat_map(|&layer| (0..N_EXPERTS).map(move |expert| (LayerId(layer), ExpertId(expert))))
            .map(|id| (id, Weights { gate: matrix(), up: matrix(), down: matrix() }))
            .collect();
        Self { dir: tempfile::tempdir().unwrap(), hidden, intermediate, experts }
    }

    /// Gives one expert other weights, before [`Model::write`].
    pub(crate) fn with(mut self, layer: u32, expert: u32, change: impl FnOnce(&mut Weights)) -> Self {
        change(self.experts.get_mut(&(LayerId(layer), ExpertId(expert))).unwrap());
        self
    }

    pub(crate) fn write(self) -> Self {
        let config = json!({
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": 32,
            "hidden_size": self.hidden,
            "intermediate_size": 32,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": MOE_LAYERS.len() + 1,
            "num_nextn_predict_layers": 0,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_shared_experts": 1,
            "n_routed_experts": N_EXPERTS,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": true,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 8,
            "q_lora_rank": null,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": null,
            "max_position_embeddings": 128,
            "attention_bias": false,
            "tie_word_embeddings": false,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32"
        });
        fs::write(self.dir.path().join("config.json"), config.to_string()).unwrap();
        let mut tensors = Vec::new();
        for ((layer, expert), weights) in &self.experts {
            let name = |part| format!("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight");
            tensors.push((name("gate"), view(&weights.gate, [self.intermediate, self.hidden])));
            tensors.push((name("up"), view(&weights.up, [self.intermediate, self.hidden])));
            tensors.push((name("down"), view(&weights.down, [self.hidden, self.intermediate])));
        }
        let file = self.dir.path().join("model.safetensors");
        safetensors::serialize_to_file(tensors, None, &file).unwrap();
        self
    }

    /// Bytes of one expert.
    pub(crate) fn expert_bytes(&self) -> u64 {
        (3 * self.hidden * self.intermediate * 4) as u64
    }

    /// One expert's output for one row, in f64.
    pub(crate) fn reference(&self, layer: u32, expert: u32, row: &[f32]) -> Vec<f64> {
        let Weights { gate, up, down } = &self.experts[&(LayerId(layer), ExpertId(expert))];
        let row: Vec<f64> = row.iter().copied().map(f64::from).collect();
        let inner: Vec<f64> = product(gate, &row)
            .into_iter()
            .zip(product(up, &row))
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        product(down, &inner)
    }
}

fn view(values: &[f32], shape: [usize; 2]) -> TensorView<'_> {
    TensorView::new(Dtype::F32, shape.to_vec(), bytemuck::cast_slice(values)).unwrap()
}

fn product(matrix: &[f32], vector: &[f64]) -> Vec<f64> {
    matrix
        .chunks_exact(vector.len())
        .map(|row| row.iter().zip(vector).map(|(&weight, value)| f64::from(weight) * value).sum())
        .collect()
}

/// A number in -1..1; splitmix64.
pub(crate) fn uniform(seed: &mut u64) -> f32 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *seed;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
