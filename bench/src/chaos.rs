//! `shoal chaos`: a cluster of real processes, clients that compare every answer with an undisturbed run, and faults.
//!
//! A scenario (TOML, `bench/chaos/`) says what runs, what happens when, and what must hold. Random choices come from the
//! seed and are made beforehand; the history (JSON lines) begins with them, so that it can be replayed.

mod cluster;
mod etcd;
mod history;
mod hosts;
mod load;
mod process;
mod proxy;
mod run;
mod scenario;
mod verdict;

use std::{path::PathBuf, process::ExitCode};

/// Break a cluster of real processes on purpose, and compare what its clients see with an undisturbed run.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What runs, what happens and what must hold: bench/chaos/*.toml
    #[arg(value_name = "SCENARIO", required_unless_present = "replay")]
    pub scenarios: Vec<PathBuf>,
    /// Run again what this history records
    #[arg(long, value_name = "HISTORY", conflicts_with = "scenarios")]
    pub replay: Option<PathBuf>,
    /// Checkpoint folder [default: the bundled model minnow]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where random choices come from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Times and numbers of requests of the scenario times this; bounds stay
    #[arg(long, default_value_t = 1.0)]
    pub scale: f64,
    /// Folder for histories and logs [default: a temporary one, kept if a check fails]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Runs every scenario; `program` is the one under test, `model` its checkpoint.
pub async fn run(args: Args, program: PathBuf, model: PathBuf) -> anyhow::Result<ExitCode> {
    let mut all_hold = true;
    let plans = match &args.replay {
        Some(history) => vec![history::plan_of(history)?],
        None => args
            .scenarios
            .iter()
            .map(|path| scenario::Plan::load(path, args.seed, args.scale))
            .collect::<anyhow::Result<_>>()?,
    };
    for plan in plans {
        all_hold &= run::run(&plan, &program, &model, args.out.as_deref()).await?;
    }
    Ok(if all_hold { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
