//! `shoal chat`: one question, or a conversation.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::ProgressBar;
use proto::{
    Error,
    v1::{self, chat_client::ChatClient},
};
use tonic::transport::Channel;

use crate::{
    checkpoint_dir,
    cluster::{Cluster, LOCAL, Plan, Where, channel},
    process::WeightsArgs,
};

/// Ask a question, or talk: with a running gateway, or with a cluster started for the time of the chat.
///
/// The answer goes to stdout. Reasoning is dimmed on a terminal; where stdout is not a terminal it goes to stderr, so
/// that a pipe gets the answer alone. The last line, on stderr, says how fast it was and who took part.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  shoal chat \"What is 348 + 277?\"\n  shoal chat --url http://127.0.0.1:8000\n  echo \"Multiply 17 by 8.\" | shoal chat"
)]
pub(crate) struct Args {
    /// What to ask; without it, questions are read from stdin, one a line
    question: Option<String>,
    /// A running gateway; without it, a cluster is started for the time of the chat
    #[arg(long, env = "SHOAL_URL", value_name = "URL")]
    url: Option<String>,
    /// Checkpoint folder of the cluster to start [default: the bundled model minnow]
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR", conflicts_with = "url")]
    model: Option<PathBuf>,
    /// Expert servers of the cluster to start; 0: its router holds the experts
    #[arg(long, default_value = "2", value_name = "N", conflicts_with = "url")]
    experts: usize,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Most tokens of an answer [default: as many as the context takes]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// 0 takes the most likely token [default: the checkpoint's]
    #[arg(long)]
    temperature: Option<f32>,
    /// Makes a drawn answer repeatable
    #[arg(long)]
    seed: Option<u64>,
    /// A system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Leave reasoning out
    #[arg(long)]
    no_reasoning: bool,
}

/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let cluster = match &args.url {
        Some(_) => None,
        None => tokio::select! {
            cluster = start(&args) => Some(cluster?),
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                return Ok(ExitCode::from(INTERRUPTED));
            }
        },
    };
    let started =
        cluster.as_ref().and_then(|cluster| cluster.gateway.as_ref()).map(|gateway| gateway.address);
    let url = args.url.clone().or(started.map(|address| format!("http://{address}"))).unwrap_or_default();
    let result = talk(&args, &url).await;
    if let Some(cluster) = cluster {
        cluster.stop().await;
    }
    result
}

async fn start(args: &Args) -> anyhow::Result<Cluster> {
    let plan = Plan {
        model: checkpoint_dir::find(args.model.as_deref())?,
        experts: Plan::shards(args.experts, 1),
        registry: Where::Static,
        routers: 1,
        router_args: Vec::new(),
        gateway: Some((LOCAL, Vec::new())),
        quiet: true,
        log_args: vec!["--log-filter=warn".to_owned()],
        expert_args: Vec::new(),
        weights_args: args.weights.to_args(),
        trace_args: Vec::new(),
    };
    // Draws only on a terminal, on stderr.
    let starting = match args.experts {
        0 => "starting a router with the experts inside".to_owned(),
        n => format!("starting {n} expert servers"),
    };
    let spinner = ProgressBar::new_spinner().with_message(starting);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let cluster = Cluster::start(&plan).await;
    spinner.finish_and_clear();
    cluster
}

/// One exchange after the other.
async fn talk(args: &Args, url: &str) -> anyhow::Result<ExitCode> {
    let mut client =
        ChatClient::new(channel(url).await.context("is a gateway running there? see `shoal up`")?);
    let system = args.system.iter().map(|text| message("system", text));
    let mut messages: Vec<v1::ChatMessage> = system.collect();
    if let Some(question) = &args.question {
        messages.push(message("user", question));
        return match ask(&mut client, args, messages).await? {
            Some(_) => Ok(ExitCode::SUCCESS),
            None => Ok(ExitCode::from(INTERRUPTED)),
        };
    }
    loop {
        let Some(question) = read_question().await? else { return Ok(ExitCode::SUCCESS) };
        if question.trim().is_empty() {
            continue;
        }
        messages.push(message("user", &question));
        // Ctrl-C stops the answer and not the conversation; what was said of it is forgotten.
        match ask(&mut client, args, messages.clone()).await? {
            Some(answer) => messages.push(message("assistant", &answer)),
            None => {
                messages.pop();
            }
        }
    }
}

fn message(role: &str, content: &str) -> v1::ChatMessage {
    v1::ChatMessage { role: role.to_owned(), content: content.to_owned(), reasoning_content: String::new() }
}

/// The next line of stdin; None at its end or after Ctrl-C.
async fn read_question() -> anyhow::Result<Option<String>> {
    if io::stdin().is_terminal() {
        let mut err = io::stderr().lock();
        write!(err, "> ")?;
        err.flush()?;
    }
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|n| (n > 0).then_some(line))
    });
    tokio::select! {
        line = read => Ok(line??.map(|line| line.trim_end_matches(['\r', '\n']).to_owned())),
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            Ok(None)
        }
    }
}

/// Streams one answer. None: Ctrl-C stopped it.
async fn ask(
    client: &mut ChatClient<Channel>,
    args: &Args,
    messages: Vec<v1::ChatMessage>,
) -> anyhow::Result<Option<String>> {
    let options = v1::SamplingOptions {
        temperature: args.temperature,
        seed: args.seed,
        max_tokens: args.max_tokens,
        ..v1::SamplingOptions::default()
    };
    let request = v1::ChatRequest { messages, options: Some(options), ..v1::ChatRequest::default() };
    let begun = now();
    let response = client.chat_stream(request).await.map_err(|status| Error::from_status(&status))?;
    let trace_url =
        response.metadata().get("x-shoal-trace-url").and_then(|url| url.to_str().ok()).map(str::to_owned);
    let mut deltas = response.into_inner();
    let mut paper = Paper::new(args.no_reasoning);
    let mut first_token = None;
    loop {
        let delta = tokio::select! {
            delta = deltas.message() => delta.map_err(|status| Error::from_status(&status))?,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                paper.end()?;
                return Ok(None);
            }
        };
        let delta = delta.context("the gateway ended the stream before the answer ended")?;
        let first_token = *first_token.get_or_insert_with(now);
        paper.reasoning(&delta.reasoning_content)?;
        paper.content(&delta.content)?;
        if let Some(usage) = delta.usage {
            paper.end()?;
            let timing = Timing { to_first: first_token - begun, generating: now() - first_token };
            report(&usage, &delta.finish_reason, timing)?;
            if let Some(url) = trace_url {
                writeln!(io::stderr(), "trace: {url}")?;
            }
            return Ok(Some(paper.answer));
        }
    }
}

#[derive(Clone, Copy)]
struct Timing {
    to_first: Duration,
    generating: Duration,
}

/// The line after the answer.
fn report(usage: &v1::TokenUsage, finish_reason: &str, timing: Timing) -> io::Result<()> {
    // The first token belongs to the prompt's time.
    let decoded = f64::from(usage.completion_tokens.saturating_sub(1));
    let rate = decoded / timing.generating.as_secs_f64().max(1e-9);
    let cut = if finish_reason == "length" { ", cut at its limit" } else { "" };
    let line = format!(
        "{} tokens{cut}, {rate:.0} tokens/s, first after {:.0} ms; {} experts on {} servers took part",
        usage.completion_tokens,
        timing.to_first.as_secs_f64() * 1e3,
        usage.experts,
        usage.servers,
    );
    let mut err = io::stderr().lock();
    if colours(&io::stderr()) { writeln!(err, "\x1b[2m{line}\x1b[0m") } else { writeln!(err, "{line}") }
}

/// Where the answer is written.
struct Paper {
    no_reasoning: bool,
    /// Dims reasoning: stdout is a terminal that takes colours.
    dims: bool,
    to_terminal: bool,
    reasoned: bool,
    answer: String,
}

impl Paper {
    fn new(no_reasoning: bool) -> Self {
        let to_terminal = io::stdout().is_terminal();
        Self {
            no_reasoning,
            dims: colours(&io::stdout()),
            to_terminal,
            reasoned: false,
            answer: String::new(),
        }
    }

    fn reasoning(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() || self.no_reasoning {
            return Ok(());
        }
        self.reasoned = true;
        let text = if self.dims { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() };
        if self.to_terminal {
            put(&mut io::stdout().lock(), &text)
        } else {
            put(&mut io::stderr().lock(), &text)
        }
    }

    fn content(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        if self.reasoned && self.answer.is_empty() {
            let gap = if self.to_terminal {
                put(&mut io::stdout().lock(), "\n\n")
            } else {
                put(&mut io::stderr().lock(), "\n")
            };
            gap?;
        }
        self.answer.push_str(text);
        put(&mut io::stdout().lock(), text)
    }

    fn end(&self) -> io::Result<()> {
        put(&mut io::stdout().lock(), "\n")
    }
}

fn put(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Whether a stream shows colours. NO_COLOR (no-color.org) turns them off.
#[expect(clippy::disallowed_methods, reason = "NO_COLOR is a convention of terminals, not our configuration")]
fn colours(stream: &impl io::IsTerminal) -> bool {
    stream.is_terminal() && std::env::var("NO_COLOR").unwrap_or_default().is_empty()
}

#[expect(clippy::disallowed_methods, reason = "a person waits: an edge")]
fn now() -> Instant {
    Instant::now()
}
