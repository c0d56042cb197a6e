//! `shoal inspect`: what a checkpoint holds, from its headers alone.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::Context as _;
use model::{Checkpoint, ModelConfig};
use serde_json::json;

use crate::table;

/// Print what a checkpoint holds, without loading weights.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder in Hugging Face layout
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The parts of a model, in the order of their use.
const PARTS: [&str; 11] = [
    "embedding",
    "attention",
    "indexer",
    "dense FFN",
    "gate",
    "shared experts",
    "routed experts",
    "norms",
    "head",
    "multi-token prediction",
    "other",
];

#[derive(Clone, Copy, Default)]
struct Size {
    tensors: usize,
    parameters: u64,
    bytes: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let checkpoint =
        Checkpoint::open(&args.dir).with_context(|| format!("cannot read {}", args.dir.display()))?;
    let config = checkpoint.config();
    let mut sizes: BTreeMap<usize, Size> = BTreeMap::new();
    let mut dtypes: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, info) in checkpoint.tensors() {
        let size = sizes.entry(part_of(name, config)).or_default();
        let parameters: u64 = info.shape.iter().map(|n| *n as u64).product();
        size.tensors += 1;
        size.parameters += parameters;
        size.bytes += info.n_bytes;
        *dtypes.entry(&info.dtype).or_default() += parameters;
    }
    let get = |part: &str| {
        PARTS.iter().position(|name| *name == part).and_then(|at| sizes.get(&at)).copied().unwrap_or_default()
    };
    let routed = get("routed experts");
    let total = sizes.values().fold(Size::default(), |sum, size| Size {
        tensors: sum.tensors + size.tensors,
        parameters: sum.parameters + size.parameters,
        bytes: sum.bytes + size.bytes,
    });
    let idle = routed.parameters
        - routed.parameters * config.num_experts_per_tok as u64 / config.n_routed_experts as u64;
    // The embedding is looked up, one row a token, and further predictions are not computed.
    let active =
        total.parameters - idle - get("embedding").parameters - get("multi-token prediction").parameters;
    let mut out = io::stdout().lock();
    let layers: Vec<u32> = config.moe_layers().map(|layer| layer.0).collect();
    if args.json {
        let parts: serde_json::Map<_, _> = sizes
            .iter()
            .map(|(at, size)| {
                let value =
                    json!({ "tensors": size.tensors, "parameters": size.parameters, "bytes": size.bytes });
                (PARTS[*at].to_owned(), value)
            })
            .collect();
        let summary = json!({
            "architecture": config.architecture,
            "checkpoint": checkpoint.fingerprint(),
            "files": checkpoint.files().len(),
            "tensors_absent": checkpoint.absent().len(),
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "moe_layers": layers,
            "n_routed_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "n_shared_experts": config.n_shared_experts,
            "num_nextn_predict_layers": config.num_nextn_predict_layers,
            "eos_token_ids": config.eos_token_ids,
            "dtypes": dtypes,
            "parameters": total.parameters,
            "parameters_active": active,
            "bytes": total.bytes,
            "parts": parts,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&summary)?)?;
        return Ok(());
    }
    writeln!(out, "{}  checkpoint {}", config.architecture, checkpoint.fingerprint())?;
    writeln!(
        out,
        "{} layers of {} numbers, vocabulary {}, context {}",
        config.num_hidden_layers, config.hidden_size, config.vocab_size, config.max_position_embeddings
    )?;
    writeln!(
        out,
        "{} routed experts a layer in {} layers, {} a token; {} shared",
        config.n_routed_experts,
        layers.len(),
        config.num_experts_per_tok,
        config.n_shared_experts
    )?;
    writeln!(
        out,
        "{} parameters, {} active a token, {} in {} files ({})\n",
        count(total.parameters),
        count(active),
        bytes(total.bytes),
        checkpoint.files().len(),
        dtypes.keys().copied().collect::<Vec<_>>().join(", ")
    )?;
    let mut rows = vec![["PART", "TENSORS", "PARAMETERS", "BYTES", "SHARE"].map(str::to_owned).to_vec()];
    rows.extend(sizes.iter().map(|(at, size)| {
        vec![
            PARTS[*at].to_owned(),
            size.tensors.to_string(),
            count(size.parameters),
            bytes(size.bytes),
            format!("{:.1} %", 100.0 * size.bytes as f64 / total.bytes as f64),
        ]
    }));
    write!(out, "{}", table::format(&rows))?;
    if !checkpoint.absent().is_empty() {
        let files: std::collections::BTreeSet<&str> =
            checkpoint.absent().values().map(String::as_str).collect();
        let files: Vec<&str> = files.into_iter().collect();
        writeln!(
            out,
            "\n{} tensors are in files that are not here: {}",
            checkpoint.absent().len(),
            files.join(", ")
        )?;
    }
    Ok(())
}

/// Which of [`PARTS`] a tensor belongs to, by its published name.
fn part_of(name: &str, config: &ModelConfig) -> usize {
    let part = match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => {
            let layer: usize = layer.parse().unwrap_or(usize::MAX);
            match rest {
                _ if layer >= config.num_hidden_layers => "multi-token prediction",
                rest if rest.starts_with("self_attn.indexer.") => "indexer",
                rest if rest.contains("norm.") => "norms",
                rest if rest.starts_with("self_attn.") => "attention",
                rest if rest.starts_with("mlp.experts.") => "routed experts",
                rest if rest.starts_with("mlp.shared_experts.") => "shared experts",
                rest if rest.starts_with("mlp.gate.") => "gate",
                rest if rest.starts_with("mlp.") => "dense FFN",
                _ => "other",
            }
        }
        None => match name {
            "model.embed_tokens.weight" => "embedding",
            "model.norm.weight" => "norms",
            "lm_head.weight" => "head",
            _ => "other",
        },
    };
    PARTS.iter().position(|candidate| *candidate == part).unwrap_or(PARTS.len() - 1)
}

fn count(n: u64) -> String {
    scaled(n as f64, 1000.0, ["", " k", " M", " G", " T"])
}

fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, [" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(mut value: f64, base: f64, units: [&str; 5]) -> String {
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    if unit == 0 { format!("{value}{}", units[0]) } else { format!("{value:.2}{}", units[unit]) }
}
