//! The one program: services, a whole cluster on one machine, and tools. Subcommands, nothing else.

mod bench;
mod chat;
mod checkpoint_dir;
mod cluster;
mod convert;
mod etcd;
mod inspect;
mod logits;
mod member;
mod process;
mod ps;
mod table;
mod text;
mod up;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::process::{LogArgs, Process, Workers};

/// Serve Mixture-of-Experts models with the experts sharded over processes and machines.
#[derive(Debug, Parser)]
#[command(name = "shoal", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  shoal chat \"What is 348 + 277?\"          ask the bundled model, over two expert processes
  shoal up --model DIR --experts 4         a whole cluster on this machine, API on port 8000
  shoal up --etcd --experts 4 --replicas 2 every expert on two servers, placed by the routers' leader
  shoal convert DIR --weights q8 --cache-dir CACHE
                                           quantize ahead; then up --weights q8 --cache-dir CACHE
  shoal inspect DIR                        what a checkpoint holds
  shoal expert --model DIR --shard 1/4     one expert server, for a cluster over machines";

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a gateway, a router and expert servers on this machine
    Up(up::Args),
    /// Ask a question, or talk: with a running gateway, or with a cluster started for the time of the chat
    Chat(chat::Args),
    /// Run a gateway
    Gateway(Service<gateway::Args>),
    /// Run a router
    Router(Service<router_svc::Args>),
    /// Run an expert server
    Expert(Service<expert_svc::Args>),
    /// Print what a checkpoint holds, without loading weights
    Inspect(inspect::Args),
    /// Measure prefill and decoding through a router and expert servers in processes of their own
    Bench(bench::Args),
    /// Quantize a checkpoint's weights ahead of the first start
    Convert(convert::Args),
    /// Compute logits and greedy tokens of given prompts through real processes
    Logits(logits::Args),
    /// Answer cases of golden text: tokenizer, detokenizer, chat template
    Text(text::Args),
    /// Print who is where, in which state, what it holds and how busy it is
    Ps(ps::Args),
    /// Break a cluster on purpose and compare what its clients see with an undisturbed run
    Chaos(::bench::chaos::Args),
    /// Print a shell's completions
    Completions { shell: clap_complete::Shell },
}

/// A service's flags, and those of every service process.
#[derive(Clone, Debug, clap::Args)]
struct Service<A: clap::Args> {
    #[command(flatten)]
    args: A,
    #[command(flatten)]
    process: Process,
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let Cli { log, command } = Cli::parse();
    match run(&log, command) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if this fails.
            let _unheard = writeln!(io::stderr(), "error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Names the instruction set that kernels compute with, for comparison. No flag: processes that are started from here
/// must see it too.
const ISA_VARIABLE: &str = "SHOAL_ISA";

fn run(log: &LogArgs, command: Command) -> anyhow::Result<ExitCode> {
    if let Some(name) = std::env::var_os(ISA_VARIABLE) {
        model::Isa::choose(&name.to_string_lossy()).context(ISA_VARIABLE)?;
    }
    if matches!(command, Command::Router(_) | Command::Expert(_) | Command::Bench(_)) {
        model::keep_freed();
    }
    match command {
        Command::Gateway(service) => {
            process::serve(log, "gateway", Workers::EveryCore, service.process, |process, ready| {
                gateway::run(service.args, process, ready)
            })
        }
        Command::Router(service) => {
            process::serve(log, "router", Workers::Few, service.process, |process, ready| {
                router_svc::run(service.args, process, ready)
            })
        }
        Command::Expert(service) => {
            process::serve(log, "expert", Workers::Few, service.process, |process, ready| {
                expert_svc::run(service.args, process, ready)
            })
        }
        Command::Up(args) => process::tool(log, up::run(args, log)),
        Command::Chat(args) => process::tool(log, chat::run(args)),
        Command::Logits(args) => process::tool(log, logits::run(args)),
        Command::Ps(args) => process::tool(log, ps::run(args)),
        Command::Chaos(args) => process::tool(log, async {
            let program = std::env::current_exe().context("cannot find this program's own file")?;
            let model = checkpoint_dir::find(args.model.as_deref())?;
            ::bench::chaos::run(args, program, model).await
        }),
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => process::tool(log, bench::run(args)),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Text(args) => text::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "shoal", &mut io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// An error and its causes in one line, each said once.
fn chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if parts.last().is_none_or(|last| !last.ends_with(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}
