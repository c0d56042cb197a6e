//! Checkpoints that are broken or not whole: whoever needs the broken part refuses to start and says what it is.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    fixtures::{
        Chain, Expected, Variant,
        chain::{FIRST_FILE, SECOND_FILE},
        fixture, write_prompts,
    },
    harness::{Cluster, Endpoint, Process, ask},
};

/// `shoal expert` that wants all experts.
const EXPERT: &[&str] = &["expert", "--listen", "127.0.0.1:0", "--model"];
const ROUTER: &[&str] =
    &["router", "--listen", "127.0.0.1:0", "--registry", "static://127.0.0.1:1", "--model"];
const GATEWAY: &[&str] =
    &["gateway", "--listen", "127.0.0.1:0", "--registry", "static://127.0.0.1:1", "--model"];
const INSPECT: &[&str] = &["inspect"];

/// `command` on the checkpoint ends with an error in which every word occurs, and never listens.
async fn refuses(command: &[&str], checkpoint: impl AsRef<Path>, words: &[&str]) {
    let args = command.iter().map(std::ffi::OsString::from);
    let ended = Process::run(args.chain([checkpoint.as_ref().into()])).await;
    let what = format!("{command:?}: {:?}, {}", ended.status, ended.stderr);
    assert!(ended.status.code().is_some_and(|code| code != 0), "{what}");
    for word in words {
        assert!(ended.stderr.contains(word), "no {word:?} in {what}");
    }
    assert!(!ended.stdout.contains("listening") && !ended.stderr.contains("panicked"), "{what}");
}

async fn accepts(command: &[&str], checkpoint: impl AsRef<Path>) -> String {
    let args = command.iter().map(std::ffi::OsString::from);
    let ended = Process::run(args.chain([checkpoint.as_ref().into()])).await;
    assert!(ended.status.success(), "{command:?}: {}", ended.stderr);
    ended.stdout
}

/// Whether a service starts on it.
async fn serves(command: &[&str], checkpoint: impl AsRef<Path>) {
    let args = command.iter().map(std::ffi::OsString::from);
    let mut process =
        Process::spawn_service(format!("{command:?}"), args.chain([checkpoint.as_ref().into()]));
    process.address().await;
}

#[tokio::test]
async fn tensors_that_are_missing_or_misshapen() {
    let up = "model.layers.1.mlp.experts.2.up_proj.weight";
    let o_proj = "model.layers.0.self_attn.o_proj.weight";
    let no_expert = Chain::new().without(up).write();
    refuses(EXPERT, &no_expert, &[up]).await;
    serves(ROUTER, &no_expert).await;
    let no_attention = Chain::new().without(o_proj).write();
    refuses(ROUTER, &no_attention, &[o_proj]).await;
    serves(EXPERT, &no_attention).await;
    refuses(EXPERT, Chain::new().reshaped(up, &[16, 319]).write(), &[up, "[16, 319]", "[16, 320]"]).await;
    refuses(ROUTER, Chain::new().reshaped(o_proj, &[16, 320]).write(), &[o_proj, "[16, 320]", "[320, 16]"])
        .await;
}

#[tokio::test]
async fn files_that_are_cut_corrupt_or_absent() {
    let whole = Chain::new().two_files().write();
    for command in [EXPERT, ROUTER, INSPECT] {
        let cut = Variant::of(&whole).bytes(SECOND_FILE, |bytes| bytes.truncate(bytes.len() / 2));
        refuses(command, &cut, &[SECOND_FILE]).await;
        let empty = Variant::of(&whole).write(SECOND_FILE, b"");
        refuses(command, &empty, &[SECOND_FILE]).await;
        let corrupt = Variant::of(&whole).bytes(SECOND_FILE, |bytes| bytes[8..28].fill(b'}'));
        refuses(command, &corrupt, &[SECOND_FILE, "header"]).await;
        let huge = Variant::of(&whole).bytes(SECOND_FILE, |bytes| bytes[..8].fill(0xFF));
        refuses(command, &huge, &[SECOND_FILE]).await;
        refuses(command, TempDir::new().expect("a temporary folder").path(), &["config.json"]).await;
        let folder = Variant::of(&whole).without(SECOND_FILE);
        fs::create_dir(folder.path(SECOND_FILE)).expect("the folder is ours");
        if command == EXPERT {
            refuses(command, &folder, &[SECOND_FILE]).await;
        }
        let no_json = Variant::of(&whole).write("config.json", b"{\"architectures\": ");
        refuses(command, &no_json, &["config.json"]).await;
    }
    // A download that stopped: whoever needs the file says so.
    let no_experts = Variant::of(&whole).without(SECOND_FILE);
    refuses(EXPERT, &no_experts, &[SECOND_FILE]).await;
    serves(ROUTER, &no_experts).await;
    let no_backbone = Variant::of(&whole).without(FIRST_FILE);
    refuses(ROUTER, &no_backbone, &[FIRST_FILE]).await;
    serves(EXPERT, &no_backbone).await;
}

#[tokio::test]
async fn an_index_that_is_wrong() {
    const INDEX: &str = "model.safetensors.index.json";
    let whole = Chain::new().two_files().write();
    let gate = "model.layers.1.mlp.experts.0.gate_proj.weight";
    let moved = Variant::of(&whole).json(INDEX, |index| index["weight_map"][gate] = json!(FIRST_FILE));
    refuses(EXPERT, &moved, &[gate, SECOND_FILE, FIRST_FILE]).await;
    let invented =
        Variant::of(&whole).json(INDEX, |index| index["weight_map"]["model.nothing"] = json!(FIRST_FILE));
    refuses(EXPERT, &invented, &["model.nothing", FIRST_FILE]).await;
    let elsewhere = Variant::of(&whole).json(INDEX, |index| index["weight_map"][gate] = json!("../secret"));
    refuses(EXPERT, &elsewhere, &["../secret"]).await;
    let listless = Variant::of(&whole).write(INDEX, b"{}");
    refuses(EXPERT, &listless, &[INDEX]).await;
}

#[tokio::test]
async fn configs_that_cannot_be_computed() {
    let v3 = fixture("deepseek-v3");
    for command in [EXPERT, ROUTER, INSPECT] {
        let llama = Variant::of(&v3).config(|config| config["architectures"] = json!(["LlamaForCausalLM"]));
        refuses(command, &llama, &["LlamaForCausalLM", "DeepseekV3ForCausalLM"]).await;
        for required in ["hidden_size", "num_hidden_layers", "n_routed_experts", "vocab_size"] {
            let without = Variant::of(&v3).config(|config| config[required] = Value::Null);
            refuses(command, &without, &["config.json", required]).await;
        }
    }
    let rope = |value: Value| Variant::of(&v3).config(|config| config["rope_parameters"] = value);
    refuses(INSPECT, rope(json!({"rope_type": "spiral", "factor": 2.0})), &["spiral"]).await;
    let contradiction = json!({"rope_type": "yarn", "type": "linear", "factor": 2.0});
    refuses(INSPECT, rope(contradiction), &["yarn", "linear"]).await;
}

#[tokio::test]
async fn optional_fields_may_be_absent_null_or_float() {
    let v3 = fixture("deepseek-v3");
    let whole = accepts(INSPECT, &v3).await;
    let config: Value =
        serde_json::from_slice(&fs::read(v3.join("config.json")).expect("a config")).expect("JSON");
    let optional = [
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "head_dim",
        "hidden_act",
        "initializer_range",
        "model_type",
        "num_key_value_heads",
        "num_nextn_predict_layers",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "qk_head_dim",
        "rms_norm_eps",
        "rope_interleave",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "norm_topk_prob",
        "sliding_window",
        "quantization_config",
    ];
    // All at once: each alone is a matter of the crate that reads them.
    let null = Variant::of(&v3).config(|config| optional.iter().for_each(|key| config[key] = Value::Null));
    accepts(INSPECT, &null).await;
    let absent = Variant::of(&v3).config(|config| {
        config.as_object_mut().expect("an object").retain(|key, _| !optional.contains(&key.as_str()));
    });
    accepts(INSPECT, &absent).await;
    let floats = Variant::of(&v3).config(|float| {
        for (key, value) in config.as_object().expect("an object") {
            if let Some(number) = value.as_u64().filter(|_| !key.ends_with("token_id")) {
                float[key] = json!(number as f64);
            }
        }
    });
    // The first line has a hash over the file.
    let below = |shown: String| shown.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(below(accepts(INSPECT, &floats).await), below(whole));
}

/// The logits of one prompt, as bits.
async fn logits(checkpoint: impl AsRef<Path>, prompt: &[u32]) -> Vec<u32> {
    let folder = TempDir::new().expect("a temporary folder");
    let (tokens, out) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    write_prompts(&tokens, &[prompt.to_vec()]);
    let args = ["logits".into(), checkpoint.as_ref().into(), "--tokens".into(), tokens.into_os_string()];
    let ended = Process::run(args.into_iter().chain(["--out".into(), out.clone().into_os_string()])).await;
    assert!(ended.status.success(), "{}", ended.stderr);
    Expected::logits_of(&out, 0).into_iter().map(f32::to_bits).collect()
}

#[tokio::test]
async fn four_spellings_of_yarn_are_one_model() {
    let prompt: Vec<u32> = (2..103).collect();
    let v3 = fixture("deepseek-v3");
    let spelled = |change: &dyn Fn(&mut Value)| {
        Variant::of(&v3).config(|config| {
            let fields = config.as_object_mut().expect("an object");
            fields.shift_remove("rope_parameters");
            fields.insert("rope_theta".into(), json!(10000));
            change(config);
        })
    };
    let scaling = |kind: Value| {
        let mut scaling = json!({"factor": 4.0, "original_max_position_embeddings": 32});
        for (key, value) in kind.as_object().expect("an object") {
            scaling[key] = value.clone();
        }
        scaling
    };
    let old = |kind: Value| spelled(&|config| config["rope_scaling"] = scaling(kind.clone()));
    let yarn = logits(old(json!({"type": "yarn"})), &prompt).await;
    assert_eq!(logits(old(json!({"rope_type": "yarn"})), &prompt).await, yarn);
    assert_eq!(logits(old(json!({"type": "yarn", "rope_type": "yarn"})), &prompt).await, yarn);
    let as_float = json!({"type": "yarn", "original_max_position_embeddings": 32.0});
    assert_eq!(logits(old(as_float), &prompt).await, yarn);
    let new = spelled(&|config| {
        config.as_object_mut().expect("an object").shift_remove("rope_theta");
        config["rope_parameters"] = scaling(json!({"rope_type": "yarn", "rope_theta": 10000}));
    });
    assert_eq!(logits(new, &prompt).await, yarn);

    let plain = logits(spelled(&|config| config["rope_scaling"] = Value::Null), &prompt).await;
    assert_ne!(plain, yarn);
    let default = spelled(&|config| config["rope_scaling"] = json!({"rope_type": "default"}));
    assert_eq!(logits(default, &prompt).await, plain);
}

#[tokio::test]
async fn a_head_that_is_missing_is_the_embedding_or_an_error() {
    let head = "lm_head.weight";
    refuses(ROUTER, Chain::new().without(head).write(), &[head]).await;
    // With the embedding as its head, this model repeats its prompt's last token.
    let tied = Chain::new().without(head).config("tie_word_embeddings", json!(true)).write();
    let cluster = Cluster::builder(&tied).start().await;
    let answer = ask(&cluster.http(), Endpoint::Completions, "a", &json!({"max_tokens": 4})).await;
    assert_eq!(answer.text, "aaaa");
}

/// Every id that ends an answer ends it, wherever the checkpoint lists it.
#[tokio::test]
async fn ids_that_end_an_answer() {
    let chain = |config: Value| Chain::new().walks(65, [66, 201, 67]).config("eos_token_id", config);
    let check = async |chain: Chain, text: &str| {
        let cluster = Cluster::builder(&chain.write()).start().await;
        let options = json!({"max_tokens": 3});
        let answer = ask(&cluster.http(), Endpoint::Completions, "A", &options).await;
        let finish_reason = if text == "B" { "stop" } else { "length" };
        assert_eq!((answer.text.as_str(), answer.finish_reason.as_str()), (text, finish_reason));
        let ignoring = json!({"max_tokens": 3, "ignore_eos": true});
        let answer = ask(&cluster.http(), Endpoint::Completions, "A", &ignoring).await;
        assert_eq!((answer.text.as_str(), answer.finish_reason.as_str()), ("B\u{FFFD}C", "length"));
    };
    check(chain(json!(200)).generation_config(json!({"eos_token_id": [200, 201]})), "B").await;
    check(chain(json!([200, 201])), "B").await;
    check(chain(json!(201)).generation_config(json!({})), "B").await;
    check(chain(Value::Null).generation_config(json!({"eos_token_id": null})), "B\u{FFFD}C").await;
}

#[tokio::test]
async fn a_port_in_use_and_flags_that_make_no_sense() {
    let model = Chain::new().write();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    for command in [
        &["expert", "--listen", &address, "--model"][..],
        &["router", "--registry", "static://127.0.0.1:1", "--listen", &address, "--model"],
        &["gateway", "--registry", "static://127.0.0.1:1", "--listen", &address, "--model"],
    ] {
        refuses(command, &model, &[&address, "in use"]).await;
    }
    refuses(&["expert", "--shard", "5/4", "--model"], &model, &["--shard", "5/4"]).await;
    refuses(&["expert", "--experts", "0-4", "--model"], &model, &["0-4", "4 routed experts"]).await;
    refuses(
        &["router", "--registry", "carrier-pigeon://x", "--model"],
        &model,
        &["carrier-pigeon", "static://"],
    )
    .await;
    refuses(&["router", "--model"], &model, &["--registry"]).await;
    refuses(&["router", "--shard", "1/2", "--model"], &model, &["2 of 4 experts", "--registry"]).await;
    refuses(&["router", "--shard", "5/4", "--experts", "0-4", "--model"], &model, &["--shard", "--experts"])
        .await;
    refuses(&["router", "--experts", "0-4", "--model"], &model, &["0-4", "4 routed experts"]).await;
    let registry = ["router", "--registry", "static://127.0.0.1:1"];
    let flags = |flags: &[&'static str]| [&registry[..], flags, &["--model"]].concat();
    for wire in ["bf16", "int8"] {
        let says = format!("--wire {wire}");
        let flags = flags(&["--wire", wire, "--combine", "exact"]);
        refuses(&flags, &model, &[&says, "--combine fast"]).await;
    }
    refuses(&flags(&["--chunk", "0", "--pages", "0"]), &model, &["--chunk", "--pages"]).await;
    refuses(&flags(&["--context-max", "5000"]), &model, &["5000", "4096"]).await;
    let broken = Variant::of(&model).write("tokenizer.json", b"{}");
    refuses(GATEWAY, &broken, &["tokenizer.json"]).await;
}
