//! What every process of ours has: logs, a runtime, signals, the line that says where it listens, and an end with its
//! parent.

use std::{
    future::Future,
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use model::{
    Weights,
    tune::{Tuning, Wanted},
};
use serde_json::json;
use telemetry::{Options, Tasks, log};
use tokio::runtime::{Builder, Runtime};

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LogArgs {
    /// How log lines are written, to stderr
    #[arg(long, global = true, env = "SHOAL_LOG", default_value = "text", value_name = "FORMAT")]
    pub(crate) log: Format,
    /// What is logged, as in RUST_LOG [default: info for services, warn for tools]
    #[arg(long, global = true, env = "SHOAL_LOG_FILTER", value_name = "FILTER")]
    pub(crate) log_filter: Option<String>,
}

/// Where traces go. OpenTelemetry's own OTEL_* variables count where a flag is absent.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TraceArgs {
    /// Collector for traces: http://host:4317 for gRPC, http://host:4318 for HTTP
    #[arg(long, env = "SHOAL_OTLP", value_name = "URL")]
    pub(crate) otlp: Option<String>,
    /// Share of the traces that begin here and are recorded; a caller's own decision goes before it [default: all]
    #[arg(long, env = "SHOAL_TRACE_SAMPLE", value_name = "0..1", value_parser = share)]
    pub(crate) trace_sample: Option<f64>,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("not between 0 and 1".to_owned()) }
}

impl TraceArgs {
    /// For a child.
    pub(crate) fn to_args(&self) -> Vec<String> {
        let otlp = self.otlp.iter().map(|url| format!("--otlp={url}"));
        otlp.chain(self.trace_sample.iter().map(|share| format!("--trace-sample={share}"))).collect()
    }
}

impl LogArgs {
    /// For a child.
    pub(crate) fn to_args(&self) -> Vec<String> {
        let format = (self.log == Format::Json).then(|| "--log=json".to_owned());
        format
            .into_iter()
            .chain(self.log_filter.iter().map(|filter| format!("--log-filter={filter}")))
            .collect()
    }
}

/// How the services keep the model's weights.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct WeightsArgs {
    /// How matrices are kept in memory: as the checkpoint has them, or quantized to int8 or int4
    #[arg(
        long,
        env = "SHOAL_WEIGHTS",
        value_name = "bf16|q8|q4|q8-experts|q4-experts",
        default_value = "bf16"
    )]
    pub(crate) weights: Weights,
    /// Where quantized weights are kept: the next start maps them instead of making them [default: nowhere]
    #[arg(long, env = "SHOAL_CACHE_DIR", value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
}

impl WeightsArgs {
    /// For a router or an expert server.
    pub(crate) fn to_args(&self) -> Vec<String> {
        let dir = self.cache_dir.iter().map(|dir| format!("--cache-dir={}", dir.display()));
        dir.chain([format!("--weights={}", self.weights.name())]).collect()
    }
}

/// Flags of every service process.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Process {
    #[command(flatten)]
    traces: TraceArgs,
    /// End when stdin closes: so a child ends with its parent, even a killed one
    #[arg(long, hide = true)]
    exit_with_stdin: bool,
}

/// The best way to compute on this machine.
#[expect(clippy::disallowed_methods, reason = "the edge: how long something takes is what this is about")]
pub(crate) fn tune(wanted: Wanted) -> anyhow::Result<Tuning> {
    let cores = std::thread::available_parallelism().context("cannot count the cores")?;
    let began = std::time::Instant::now();
    Ok(Tuning::find(wanted, cores, &|| began.elapsed())?)
}

/// How long a drain may go on after the parent is gone.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(5);

/// Threads of a service's runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Workers {
    /// One a core: they compute, too.
    EveryCore,
    /// For those beside whom other threads compute. Two take turns, and each wakes the other for most of what comes: that
    /// counts where there are few cores.
    Few,
}

/// Cores for each of [`Workers::Few`].
const CORES_A_WORKER: usize = 8;

fn init(args: &LogArgs, default_filter: &str, workers: Workers) -> anyhow::Result<Runtime> {
    let format = match args.log {
        Format::Text => log::Format::Text,
        Format::Json => log::Format::Json,
    };
    log::init(format, args.log_filter.as_deref().unwrap_or(default_filter)).context("--log-filter")?;
    let mut runtime = Builder::new_multi_thread();
    if let Workers::Few = workers {
        let cores = std::thread::available_parallelism().context("cannot count the cores")?;
        runtime.worker_threads((cores.get() / CORES_A_WORKER).max(1));
    }
    runtime.enable_all().build().context("cannot start the async runtime")
}

/// Runs a service until SIGTERM, Ctrl-C, or the end of its parent.
pub(crate) fn serve<F, R>(
    log: &LogArgs,
    service: &'static str,
    workers: Workers,
    process: Process,
    run: impl FnOnce(telemetry::Process, Box<dyn FnOnce(SocketAddr) + Send>) -> F,
) -> anyhow::Result<ExitCode>
where
    F: Future<Output = anyhow::Result<R>>,
{
    let runtime = init(log, "info", workers)?;
    runtime.block_on(async {
        let options = Options { endpoint: process.traces.otlp.clone(), sample: process.traces.trace_sample };
        let instance = uuid::Uuid::new_v4().simple().to_string();
        let running = telemetry::Process::start(service, env!("CARGO_PKG_VERSION"), instance, &options)?;
        let tasks = running.tasks.clone();
        let signalled = tasks.clone();
        tasks.spawn("signals", async move {
            match telemetry::tasks::stop_signal().await {
                Ok(()) => signalled.begin_shutdown(),
                Err(error) => tracing::error!(%error, "cannot listen for signals"),
            }
        });
        if process.exit_with_stdin {
            end_with_stdin(tasks.clone())?;
        }
        let result = run(running.clone(), Box::new(announce)).await;
        // Outside the runtime's own threads, which the export needs.
        tokio::task::spawn_blocking(move || running.finish()).await?;
        result.map(|_| ExitCode::SUCCESS)
    })
}

/// Runs a tool; logs only what is worth a warning.
pub(crate) fn tool(
    log: &LogArgs,
    run: impl Future<Output = anyhow::Result<ExitCode>>,
) -> anyhow::Result<ExitCode> {
    let runtime = init(log, "warn", Workers::EveryCore)?;
    let result = runtime.block_on(run);
    // A read of stdin that nobody will answer must not keep the process.
    runtime.shutdown_background();
    result
}

/// Tells whoever started this process where it listens.
fn announce(address: SocketAddr) {
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{}", json!({ "listening": address })).and_then(|()| out.flush());
    if let Err(error) = written {
        tracing::debug!(%error, "nobody reads where this process listens");
    }
}

/// A thread of its own: reading stdin blocks, and the runtime may be what hangs.
fn end_with_stdin(tasks: Tasks) -> anyhow::Result<()> {
    let watch = move || {
        let mut byte = [0];
        while !matches!(io::stdin().read(&mut byte), Ok(0) | Err(_)) {}
        tasks.begin_shutdown();
        tracing::warn!("the parent is gone, stopping");
        std::thread::park_timeout(ORPHAN_TIMEOUT);
        end_now();
    };
    std::thread::Builder::new().name("stdin".into()).spawn(watch).context("cannot watch stdin")?;
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the parent is gone and the drain hangs: nobody waits for an exit code"
)]
fn end_now() {
    std::process::exit(1);
}
