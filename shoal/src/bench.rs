//! `shoal bench`: tokens a second of a cluster of this machine's own, without gateway and tokenizer.

mod kernels;
mod round_trip;

use std::{
    fmt,
    io::{self, Write as _},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use indicatif::ProgressBar;
use proto::{
    Error,
    v1::{self, router_client::RouterClient},
};
use serde::Serialize;
use tonic::transport::Channel;

use crate::{
    checkpoint_dir,
    cluster::{Cluster, Plan, Where, router_client},
    process::WeightsArgs,
    table,
    up::PassOn,
};

/// Measure prefill and decoding through a router and expert servers in processes of their own.
///
/// Prompts are random token ids, answers are as long as asked whatever they say. Decoding is timed from the moment at
/// which every sequence has its first token until the first one ends. Each figure is the median over the rounds, with
/// the smallest and the largest. By turns, each round is also compared with the same round of the first number of expert
/// servers: OF FIRST is the median of these ratios.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  shoal bench --model DIR --weights q8 --experts 1,2,4,8 --batch 1,16")]
pub(crate) struct Args {
    /// Checkpoint folder [default: the bundled model minnow]
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Numbers of expert servers; 0: the router holds the experts, in one process
    #[arg(long, value_delimiter = ',', default_value = "2", value_name = "N,…")]
    experts: Vec<usize>,
    /// Lengths of prompts whose prefill is timed; 0: none
    #[arg(long, value_delimiter = ',', default_value = "512", value_name = "TOKENS,…")]
    prefill: Vec<usize>,
    /// Numbers of sequences that are decoded together; 0: none
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_name = "N,…")]
    batch: Vec<usize>,
    /// Lengths of the prompts before them
    #[arg(long, value_delimiter = ',', default_value = "8", value_name = "TOKENS,…")]
    context: Vec<usize>,
    /// Tokens decoded by each sequence
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    decode: u32,
    /// Measured rounds
    #[arg(long, default_value = "5", value_name = "N")]
    rounds: NonZeroUsize,
    /// Rounds before them
    #[arg(long, default_value = "1", value_name = "N")]
    warm_up: usize,
    /// Measure the numbers of expert servers by turns, round for round, instead of one after the other: what else the machine
    /// does then meets all of them. Every one of them has the whole model in memory
    #[arg(long, conflicts_with_all = ["kernels", "round_trip"])]
    by_turns: bool,
    /// Measure the kernels instead, each beside the machine's limit
    #[arg(long, conflicts_with = "round_trip")]
    kernels: bool,
    /// Measure a dispatch to one expert server and back instead, beside a raw socket
    #[arg(long)]
    round_trip: bool,
    /// Print one JSON line a figure instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pass: PassOn,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "what")]
enum Case {
    Prefill { tokens: usize },
    Decode { batch: usize, context: usize },
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill { tokens } => write!(f, "prefill {tokens}"),
            Self::Decode { batch, context } => write!(f, "decode, batch {batch}, context {context}"),
        }
    }
}

#[derive(Debug, Serialize)]
struct Figure {
    #[serde(flatten)]
    case: Case,
    experts: usize,
    weights: &'static str,
    /// Tokens a second.
    median: f64,
    min: f64,
    max: f64,
    /// The median of what each round reached of the first subject's. Only if they were measured by turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    of_first: Option<f64>,
    rounds: usize,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.kernels {
        return kernels::run(args.json).map(|()| ExitCode::SUCCESS);
    }
    if args.round_trip {
        let model = checkpoint_dir::find(args.model.as_deref())?;
        return round_trip::run(&model, args.json).await.map(|()| ExitCode::SUCCESS);
    }
    ensure!(!args.by_turns || args.experts.len() > 1, "--by-turns compares several numbers of --experts");
    ensure!(args.decode >= 2, "--decode must be at least 2: the first token is not timed");
    let model = checkpoint_dir::find(args.model.as_deref())?;
    ensure!(!args.context.contains(&0), "--context must be at least 1: no router answers an empty prompt");
    let prefill = args.prefill.iter().filter(|&&tokens| tokens > 0).map(|&tokens| Case::Prefill { tokens });
    let decode = args
        .batch
        .iter()
        .filter(|&&batch| batch > 0)
        .flat_map(|&batch| args.context.iter().map(move |&context| Case::Decode { batch, context }));
    let cases: Vec<Case> = prefill.chain(decode).collect();
    // Draws only on a terminal, on stderr.
    let progress = ProgressBar::new((args.experts.len() * cases.len()) as u64);
    let mut figures = Vec::new();
    let together = if args.by_turns { args.experts.len() } else { 1 };
    for experts in args.experts.chunks(together.max(1)) {
        let mut subjects = Vec::with_capacity(experts.len());
        for &experts in experts {
            subjects.push(Subject::start(&args, &model, experts).await?);
        }
        for &case in &cases {
            figures.extend(compare(&mut subjects, experts, case, &args).await?);
            progress.inc(experts.len() as u64);
        }
        for subject in subjects {
            subject.cluster.stop().await;
        }
    }
    progress.finish_and_clear();
    print(&figures, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// The figures of `case`, measured by turns.
async fn compare(
    subjects: &mut [Subject],
    experts: &[usize],
    case: Case,
    args: &Args,
) -> anyhow::Result<Vec<Figure>> {
    let mut rates = vec![Vec::with_capacity(args.rounds.get()); subjects.len()];
    for round in 0..args.warm_up + args.rounds.get() {
        for turn in 0..subjects.len() {
            // Each begins a round once.
            let at = (round + turn) % subjects.len();
            let Subject { client, prompts, .. } = &mut subjects[at];
            let rate = measure(client, case, args.decode, prompts).await;
            let rate = rate.with_context(|| format!("{case} with {} expert servers", experts[at]))?;
            if round >= args.warm_up {
                rates[at].push(rate);
            }
        }
    }
    let figures = experts.iter().zip(&rates).map(|(&experts, of_it)| Figure {
        case,
        experts,
        weights: args.weights.weights.name(),
        median: median(of_it.clone()),
        min: of_it.iter().copied().fold(f64::INFINITY, f64::min),
        max: of_it.iter().copied().fold(0.0, f64::max),
        of_first: args.by_turns.then(|| of_first(of_it, &rates[0])),
        rounds: of_it.len(),
    });
    Ok(figures.collect())
}

/// The median of what each round reached of the same round of `first`.
fn of_first(rates: &[f64], first: &[f64]) -> f64 {
    median(rates.iter().zip(first).map(|(rate, first)| rate / first).collect())
}

/// Between the two in the middle of an even number; there is one at least.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

/// A cluster that is measured.
struct Subject {
    cluster: Cluster,
    client: RouterClient<Channel>,
    prompts: Prompts,
}

impl Subject {
    async fn start(args: &Args, model: &Path, experts: usize) -> anyhow::Result<Self> {
        let cluster = Cluster::start(&plan(args, model.to_owned(), experts)).await?;
        cluster.settled().await?;
        let mut client = router_client(cluster.routers[0].address).await?;
        let status = client.status(v1::RouterStatusRequest {}).await?.into_inner();
        // The same for all.
        Ok(Self { cluster, client, prompts: Prompts { vocab: status.vocab_size, state: 1 } })
    }
}

fn plan(args: &Args, model: PathBuf, experts: usize) -> Plan {
    Plan {
        model,
        experts: Plan::shards(experts, 1),
        registry: Where::Static,
        routers: 1,
        router_args: args.pass.router.clone(),
        gateway: None,
        quiet: true,
        log_args: vec!["--log-filter=warn".to_owned()],
        expert_args: (0..experts).map(|at| args.pass.for_expert(at)).collect(),
        weights_args: args.weights.to_args(),
        trace_args: Vec::new(),
    }
}

/// Random prompts: no two have a prefix in common that could be cached.
struct Prompts {
    vocab: u32,
    state: u64,
}

impl Prompts {
    fn next(&mut self, len: usize) -> Vec<u32> {
        let mut id = || {
            // An LCG (Knuth's MMIX): its high bits are random enough to spread over experts.
            self.state =
                self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.state >> 33) % u64::from(self.vocab)) as u32
        };
        (0..len).map(|_| id()).collect()
    }
}

/// Tokens a second.
async fn measure(
    client: &RouterClient<Channel>,
    case: Case,
    decode: u32,
    prompts: &mut Prompts,
) -> anyhow::Result<f64> {
    match case {
        Case::Prefill { tokens } => {
            let prompt = prompts.next(tokens);
            let began = now();
            let times = generate(client.clone(), prompt, 1).await?;
            Ok(tokens as f64 / seconds(began, times[0]))
        }
        Case::Decode { batch, context } => {
            let answers = (0..batch).map(|_| generate(client.clone(), prompts.next(context), decode));
            let answers = futures_util::future::try_join_all(answers).await?;
            let first = answers.iter().map(|times| times[0]).max().context("no sequence")?;
            let last = answers.iter().map(|times| times[times.len() - 1]).min().context("no sequence")?;
            let timed = answers.iter().flatten().filter(|time| **time > first && **time <= last).count();
            ensure!(timed > 0, "the first sequence ended before the last one began: raise --decode");
            Ok(timed as f64 / seconds(first, last))
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).max(Duration::from_nanos(1)).as_secs_f64()
}

/// When each token came.
async fn generate(
    mut client: RouterClient<Channel>,
    prompt: Vec<u32>,
    tokens: u32,
) -> anyhow::Result<Vec<Instant>> {
    let request = v1::GenerateRequest {
        prompt_ids: prompt,
        tokens_max: tokens,
        tokens_min: tokens,
        ..v1::GenerateRequest::default()
    };
    let mut replies =
        client.generate(request).await.map_err(|status| Error::from_status(&status))?.into_inner();
    let mut times = Vec::with_capacity(tokens as usize);
    while let Some(reply) = replies.message().await.map_err(|status| Error::from_status(&status))? {
        times.extend(reply.tokens.iter().map(|_| now()));
    }
    ensure!(
        times.len() == tokens as usize,
        "{} of {tokens} tokens came: is the context long enough?",
        times.len()
    );
    Ok(times)
}

#[expect(clippy::disallowed_methods, reason = "the clock is what this is about")]
fn now() -> Instant {
    Instant::now()
}

fn print(figures: &[Figure], as_json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if as_json {
        for figure in figures {
            writeln!(out, "{}", serde_json::to_string(figure)?)?;
        }
        return Ok(());
    }
    let by_turns = figures.iter().any(|figure| figure.of_first.is_some());
    let last = by_turns.then_some("OF FIRST");
    let header = ["EXPERTS", "WEIGHTS", "CASE", "TOKENS/S", "MIN", "MAX"].into_iter().chain(last);
    let mut rows = vec![header.map(str::to_owned).collect::<Vec<_>>()];
    rows.extend(figures.iter().map(|figure| {
        let rate = |rate: f64| format!("{rate:.1}");
        let mut row = vec![
            figure.experts.to_string(),
            figure.weights.to_owned(),
            figure.case.to_string(),
            rate(figure.median),
            rate(figure.min),
            rate(figure.max),
        ];
        row.extend(figure.of_first.map(|ratio| format!("{:.1} %", ratio * 100.0)));
        row
    }));
    write!(out, "{}", table::format(&rows))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_lie_in_the_middle() {
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), 3.0);
    }

    #[test]
    fn rounds_are_compared_with_the_same_round() {
        // The machine was half as fast in the second round, for both.
        assert_eq!(of_first(&[9.0, 4.5, 9.0], &[10.0, 5.0, 10.0]), 0.9);
    }
}
