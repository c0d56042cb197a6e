//! `shoal convert`: quantizes a checkpoint's weights into a cache folder, ahead of the first start.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use ids::ExpertId;
use indicatif::ProgressBar;
use model::{Backbone, Checkpoint, Experts, Weights};

/// Quantize a checkpoint's weights into a cache folder, so that the first start maps them too.
///
/// What is there already and fits is kept. All files of the checkpoint must be here; a machine that has some of them
/// needs no conversion ahead: each server converts what it holds at its first start.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  shoal convert DIR --weights q8 --cache-dir CACHE")]
pub(crate) struct Args {
    /// Checkpoint folder
    dir: PathBuf,
    /// int8 or int4
    #[arg(long, env = "SHOAL_WEIGHTS", value_name = "q8|q4|q8-experts|q4-experts")]
    weights: Weights,
    /// Where to write
    #[arg(long, env = "SHOAL_CACHE_DIR", value_name = "DIR")]
    cache_dir: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.weights == Weights::Stored {
        bail!("--weights bf16 is how the checkpoint has them: there is nothing to convert");
    }
    let checkpoint = Checkpoint::open(&args.dir)
        .with_context(|| format!("cannot read {}", args.dir.display()))?
        .with_weights(args.weights, Some(args.cache_dir.clone()));
    let config = checkpoint.config();
    let layers: Vec<_> = config.moe_layers().collect();
    // Draws only on a terminal, on stderr.
    let progress = ProgressBar::new((layers.len() * config.n_routed_experts) as u64).with_message("experts");
    drop(Backbone::load(&checkpoint)?);
    for layer in layers {
        for expert in 0..config.n_routed_experts as u32 {
            drop(Experts::load(&checkpoint, &[(layer, ExpertId(expert))])?);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    Ok(())
}
