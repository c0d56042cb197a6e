use serde_json::{Value, json};

use super::*;

/// A small DeepSeek-V3 with `changes` merged in; a change to `null` is a `null`.
fn config(changes: Value) -> Value {
    let mut config = json!({
        "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3,
        "intermediate_size": 128, "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 4, "topk_group": 2,
        "first_k_dense_replace": 1, "max_position_embeddings": 4096, "eos_token_id": 1
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn parse(changes: Value) -> Result<ModelConfig, String> {
    ModelConfig::parse(&config(changes), &json!({})).map_err(|error| error.to_string())
}

fn refused(changes: Value, message: &str) {
    assert_eq!(parse(changes).map(|_| ()), Err(format!("config.json: {message}")));
}

#[test]
fn optional_keys_may_be_absent_or_null_and_numbers_may_be_floats() {
    let plain = parse(json!({})).unwrap();
    for key in [
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "tie_word_embeddings",
        "norm_topk_prob",
        "routed_scaling_factor",
        "scoring_func",
        "topk_method",
        "hidden_act",
        "moe_layer_freq",
        "mlp_layer_types",
        "num_nextn_predict_layers",
        "bos_token_id",
        "sliding_window",
    ] {
        assert_eq!(parse(json!({ key: null })).unwrap(), plain, "{key}");
    }
    assert_eq!(parse(json!({ "max_position_embeddings": 4096.0, "hidden_size": 64.0 })).unwrap(), plain);
    assert_eq!(parse(json!({ "rope_theta": 1e6 })).unwrap().rope.theta, 1e6);
    refused(json!({ "hidden_size": null }), "hidden_size is missing");
    refused(json!({ "hidden_size": 64.5 }), "hidden_size is 64.5, wanted a whole number");
    refused(json!({ "num_attention_heads": 0 }), "num_attention_heads is 0");
    refused(json!({ "vocab_size": "512" }), "vocab_size is \"512\", wanted a whole number");
}

#[test]
fn what_cannot_be_computed_is_named() {
    refused(
        json!({ "architectures": ["LlamaForCausalLM"] }),
        "architecture \"LlamaForCausalLM\" is not supported; supported are DeepseekV2ForCausalLM, \
         DeepseekV3ForCausalLM, DeepseekV32ForCausalLM",
    );
    refused(json!({ "architectures": null }), "architectures is missing");
    refused(json!({ "num_experts_per_tok": 17 }), "num_experts_per_tok 17 is more than n_routed_experts 16");
    refused(json!({ "n_group": 3 }), "n_group 3 does not divide n_routed_experts 16");
    refused(json!({ "topk_group": 5 }), "topk_group 5 is not in 1..=4");
    refused(
        json!({ "num_experts_per_tok": 9 }),
        "num_experts_per_tok 9 is more than the 8 experts of topk_group groups",
    );
    refused(json!({ "hidden_act": "gelu" }), "hidden_act \"gelu\" is not supported; supported is \"silu\"");
    refused(
        json!({ "mlp_layer_types": ["dense"] }),
        "mlp_layer_types is [\"dense\"], wanted 3 of \"dense\" and \"sparse\"",
    );
    assert!(parse(json!({ "scoring_func": "softmax" })).unwrap_err().contains("scoring_func \"softmax\""));
}

#[test]
fn four_spellings_of_yarn_are_one() {
    let yarn = |kind: Value| {
        let mut scaling = json!({ "factor": 4.0, "original_max_position_embeddings": 32 });
        for (key, value) in kind.as_object().unwrap() {
            scaling[key] = value.clone();
        }
        scaling
    };
    let old = |kind: Value| parse(json!({ "rope_theta": 10000, "rope_scaling": yarn(kind) }));
    let wanted = old(json!({ "type": "yarn" })).unwrap();
    assert!((wanted.rope.attention_factor() - 1.138_629).abs() < 1e-6);
    assert_eq!(old(json!({ "rope_type": "yarn" })).unwrap(), wanted);
    assert_eq!(old(json!({ "type": "yarn", "rope_type": "yarn" })).unwrap(), wanted);
    let new = yarn(json!({ "rope_type": "yarn", "rope_theta": 10000 }));
    assert_eq!(parse(json!({ "rope_parameters": new })).unwrap(), wanted);
    assert_eq!(
        old(json!({ "type": "yarn", "original_max_position_embeddings": 32.0, "unknown": [1] })).unwrap(),
        wanted
    );

    let plain = parse(json!({})).unwrap();
    assert_eq!(parse(json!({ "rope_scaling": { "type": "default" } })).unwrap(), plain);
    refused(
        json!({ "rope_scaling": yarn(json!({ "type": "yarn", "rope_type": "linear" })) }),
        "rope_scaling: rope_type \"linear\" and type \"yarn\" contradict each other",
    );
    refused(
        json!({ "rope_scaling": { "type": "longrope" } }),
        "rope_scaling: rope type \"longrope\" is not supported; supported are \"default\" and \"yarn\"",
    );
    refused(json!({ "rope_scaling": { "type": "yarn" } }), "rope_scaling: factor is missing");
}

#[test]
fn ids_that_end_an_answer_come_from_both_files() {
    let ids = |config_eos: Value, generation: Value| {
        ModelConfig::parse(&config(json!({ "eos_token_id": config_eos })), &generation).unwrap().eos_token_ids
    };
    assert_eq!(ids(json!(200), json!({ "eos_token_id": [200, 201] })), [200, 201]);
    assert_eq!(ids(json!([1, 2]), json!({})), [1, 2]);
    assert_eq!(ids(json!(null), json!({ "eos_token_id": null })), [0; 0]);
    assert_eq!(ids(json!(5), json!({ "eos_token_id": 7 })), [7, 5]);
    refused(json!({ "eos_token_id": "x" }), "eos_token_id is \"x\", wanted a token id or a list of them");
}

#[test]
fn layers_with_experts_follow_the_config() {
    let layers = |changes| parse(changes).unwrap().moe_layers().map(|layer| layer.0).collect::<Vec<_>>();
    assert_eq!(layers(json!({})), [1, 2]);
    assert_eq!(layers(json!({ "first_k_dense_replace": 0, "moe_layer_freq": 2 })), [0, 2]);
    assert_eq!(layers(json!({ "mlp_layer_types": ["sparse", "dense", "sparse"] })), [0, 2]);
}
