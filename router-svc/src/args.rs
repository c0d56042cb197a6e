//! Flags of the router, and what they come to: [`Args`] is what was typed, [`Limits`] what the engine needs.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail, ensure};
use cluster::{Registry, health};
use model::{ModelConfig, Pages, Weights};
use proto::rows::Dtype;
use shard::{Problems, Selection};

/// How the contributions of a row's experts are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Combine {
    /// On a grid, at the servers: the same bits however experts are spread. Needs the f32 wire.
    Exact,
    /// One row back for each (row, expert) pair, summed here in gate order: the same bits at top-k times the bytes.
    Pairs,
    /// At the servers, as it comes: the last bits depend on the placement.
    Fast,
}

/// How activations travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Wire {
    /// Exact; to quantized experts as the int8 blocks that they make of f32
    F32,
    Bf16,
    /// With a scale a row; back come bf16 rows
    Int8,
}

impl Wire {
    pub(crate) const fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::Bf16,
            Self::Int8 => Dtype::Int8,
        }
    }
}

/// What happens to a row whose expert nobody holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnMissingExpert {
    /// It waits, at most --expert-wait.
    Wait,
    /// The gate chooses among the others, and the answer is marked degraded.
    Skip,
}

/// Whether the rows of a step go through the layers in two half-batches, of which one attends while the other's experts work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HalfBatches {
    /// By steps of about the same size, from 8 rows on, where it measures faster; never while all servers are known to be on
    /// this host.
    Measured,
    Always,
    Never,
}

/// Run a router: attention, gate and KV cache; the experts are elsewhere, or some of them in the router too.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Checkpoint folder in Hugging Face layout
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    pub model: PathBuf,
    /// How matrices are kept in memory: bf16 as the checkpoint has them, q8 or q4 quantized to int8 or int4 in blocks of
    /// 32 (not: embedding, gate, norms; the head has int8 at least),
    /// q8-experts or q4-experts the same for routed and shared experts only
    #[arg(
        long,
        env = "SHOAL_WEIGHTS",
        value_name = "bf16|q8|q4|q8-experts|q4-experts",
        default_value = "bf16"
    )]
    pub weights: Weights,
    /// Where quantized weights are kept: the next start maps them instead of making them [default: nowhere]
    #[arg(long, env = "SHOAL_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, env = "SHOAL_LISTEN", default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    pub listen: SocketAddr,
    /// Where the expert servers are: static://host:port,host:port or etcd://host:2379/prefix. Without it there are none, and
    /// this router holds every expert
    #[arg(long, env = "SHOAL_REGISTRY", value_name = "URL", required_unless_present_any = ["shard", "experts"])]
    pub registry: Option<Registry>,
    /// The parts of every layer's experts that this router holds itself, such as 1/4 or 1/4,3/4; 1/1: all. They are computed
    /// without being sent, for this router alone: no placement counts them [default: none]
    #[arg(long, env = "SHOAL_ROUTER_SHARD", value_name = "I/N")]
    pub shard: Option<String>,
    /// The experts of every layer that this router holds itself, such as 0-7,12
    #[arg(long, env = "SHOAL_ROUTER_EXPERTS", value_name = "LIST")]
    pub experts: Option<String>,
    /// Address at which gateways reach this router, if it is not the one it listens on
    #[arg(long, env = "SHOAL_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Call expert servers on this host through Unix sockets instead of TCP
    #[arg(long, env = "SHOAL_UNIX_SOCKETS", default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false")]
    pub unix_sockets: bool,
    /// How many servers shall hold each expert: what the leader of the routers sees to, with an etcd registry
    #[arg(long, env = "SHOAL_REPLICAS", default_value = "1", value_name = "N")]
    pub replicas: NonZeroUsize,
    /// What happens to a row whose expert nobody holds
    #[arg(long, env = "SHOAL_ON_MISSING_EXPERT", default_value = "wait")]
    pub on_missing_expert: OnMissingExpert,
    /// How contributions are summed [default: exact on the f32 wire, otherwise fast]
    #[arg(long, env = "SHOAL_COMBINE")]
    pub combine: Option<Combine>,
    /// How activations travel to the experts and back
    #[arg(long, env = "SHOAL_WIRE", default_value = "f32")]
    pub wire: Wire,
    /// Most prompt rows of one sequence in a step
    #[arg(long, env = "SHOAL_CHUNK", default_value_t = 256, value_name = "ROWS")]
    pub chunk: usize,
    /// Most rows of a step, over all sequences: bounds how long a long prompt delays the running ones
    #[arg(long, env = "SHOAL_STEP_ROWS", default_value_t = 512, value_name = "ROWS")]
    pub step_rows: usize,
    /// Compute a step in two half-batches: one attends while the other's experts work
    #[arg(long, env = "SHOAL_HALF_BATCHES", default_value = "measured")]
    pub half_batches: HalfBatches,
    /// Pages of the KV cache [default: sixteen full contexts, at most 1 GiB]
    #[arg(long, env = "SHOAL_PAGES")]
    pub pages: Option<usize>,
    /// Positions in a page
    #[arg(long, env = "SHOAL_PAGE_POSITIONS", default_value_t = 64)]
    pub page_positions: usize,
    /// Longest sequence, prompt and answer together [default: the checkpoint's max_position_embeddings]
    #[arg(long, env = "SHOAL_CONTEXT_MAX", value_name = "TOKENS")]
    pub context_max: Option<usize>,
    /// Most sequences computed together
    #[arg(long, env = "SHOAL_RUNNING_MAX", default_value_t = 64)]
    pub running_max: usize,
    /// Most sequences waiting for their turn; one more is refused at once
    #[arg(long, env = "SHOAL_QUEUE_MAX", default_value_t = 256)]
    pub queue_max: usize,
    /// How long a request waits for an expert that nobody holds
    #[arg(long, env = "SHOAL_EXPERT_WAIT", default_value = "10s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub expert_wait: Duration,
    /// How long one layer may wait for its replies before its servers count as failed
    #[arg(long, env = "SHOAL_DISPATCH_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub dispatch_timeout: Duration,
    /// No frame is sent to a second server sooner; later than this, past the p95 of frames of its size
    #[arg(long, env = "SHOAL_HEDGE_AFTER_MIN", default_value = "2ms", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub hedge_after_min: Duration,
    /// A server that owes a frame and says nothing for so long is avoided for a while
    #[arg(long, env = "SHOAL_SILENT_MAX", default_value = "250ms", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub silent_max: Duration,
    /// Most of the servers that are avoided at a time; one may always be
    #[arg(long, env = "SHOAL_EJECT_SHARE", default_value_t = 0.34, value_parser = share, value_name = "0..1")]
    pub eject_share: f32,
    /// Steps of a sampled request that are traced from its first on
    #[arg(long, env = "SHOAL_TRACE_STEPS_FIRST", default_value_t = 4, value_name = "N")]
    pub trace_steps_first: u64,
    /// After those, one step in so many; 0 traces only slow steps and those in which something failed
    #[arg(long, env = "SHOAL_TRACE_STEP_EVERY", default_value_t = 32, value_name = "N")]
    pub trace_step_every: u64,
    /// Count the rows of each expert in metrics even if there are more than 4,096 (layer, expert) pairs
    #[arg(long, env = "SHOAL_EXPERT_METRICS")]
    pub expert_metrics: bool,
    /// Compute threads [default: what a test at the start finds best, all cores or half of them]
    #[arg(long, env = "SHOAL_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Compute threads spin for a moment between steps before they sleep: they wake sooner where each has a core for
    /// itself [default: by the same test]
    #[arg(long, env = "SHOAL_SPIN", value_name = "true|false")]
    pub spin: Option<bool>,
    /// Quantized weights are copied into huge pages, while it serves already, instead of staying in mapped files [default: by
    /// the same test]
    #[arg(long, env = "SHOAL_HUGE_PAGES", value_name = "true|false")]
    pub huge_pages: Option<bool>,
    /// How long running requests may take to finish after SIGTERM
    #[arg(long, env = "SHOAL_DRAIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub drain_timeout: Duration,
}

fn share(text: &str) -> Result<f32, String> {
    let share = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("not between 0 and 1".to_owned()) }
}

/// Bytes of KV cache that the default number of pages stays under.
const DEFAULT_CACHE_BYTES_MAX: usize = 1 << 30;
/// Full contexts that the default number of pages holds.
const DEFAULT_CONTEXTS: usize = 16;

/// The named limits of one router.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) combine: Combine,
    pub(crate) wire: Wire,
    pub(crate) chunk_rows_max: usize,
    pub(crate) step_rows_max: usize,
    pub(crate) half_batches: HalfBatches,
    pub(crate) n_pages: usize,
    pub(crate) page_positions: usize,
    pub(crate) context_max: usize,
    pub(crate) running_max: usize,
    pub(crate) queue_max: usize,
    pub(crate) expert_wait: Duration,
    pub(crate) dispatch_timeout: Duration,
    pub(crate) on_missing_expert: OnMissingExpert,
}

impl Args {
    /// Where the others are.
    pub(crate) fn registry(&self) -> Registry {
        self.registry.clone().unwrap_or_else(|| Registry::Static(Vec::new()))
    }

    /// The experts that this router holds itself.
    pub(crate) fn inside(&self) -> Result<Selection, Problems> {
        Selection::parse(self.shard.as_deref(), self.experts.as_deref(), true)
    }

    pub(crate) fn health(&self) -> health::Limits {
        health::Limits {
            hedge_after_min: self.hedge_after_min,
            silent_max: self.silent_max,
            answer_max: self.dispatch_timeout,
            eject_share: self.eject_share,
            ..health::Limits::default()
        }
    }

    /// All that is wrong with the flags for this model, at once.
    pub(crate) fn limits(&self, config: &ModelConfig) -> anyhow::Result<Limits> {
        let zero: Vec<&str> = [
            ("--chunk", self.chunk),
            ("--step-rows", self.step_rows),
            ("--page-positions", self.page_positions),
            ("--running-max", self.running_max),
            ("--pages", self.pages.unwrap_or(1)),
            ("--context-max", self.context_max.unwrap_or(1)),
        ]
        .into_iter()
        .filter_map(|(flag, value)| (value == 0).then_some(flag))
        .collect();
        ensure!(zero.is_empty(), "must not be 0: {}", zero.join(", "));
        let combine = match (self.combine, self.wire) {
            (None, Wire::F32) => Combine::Exact,
            (None, Wire::Bf16 | Wire::Int8) => Combine::Fast,
            (Some(Combine::Exact | Combine::Pairs), Wire::Bf16 | Wire::Int8) => {
                let wire = if self.wire == Wire::Int8 { "int8" } else { "bf16" };
                bail!("--wire {wire} rounds what it carries, so it goes with --combine fast only")
            }
            (Some(combine), _) => combine,
        };
        let context_max = self.context_max.unwrap_or(config.max_position_embeddings);
        ensure!(
            context_max <= config.max_position_embeddings,
            "--context-max {context_max} is more than the checkpoint's max_position_embeddings {}",
            config.max_position_embeddings
        );
        let page_bytes = Pages::page_bytes(config, self.weights, self.page_positions);
        let n_pages = self.pages.unwrap_or_else(|| {
            let wanted = DEFAULT_CONTEXTS * context_max.div_ceil(self.page_positions);
            wanted.min(DEFAULT_CACHE_BYTES_MAX / page_bytes).max(1)
        });
        n_pages
            .checked_mul(page_bytes)
            .filter(|&bytes| bytes <= isize::MAX as usize && n_pages <= u32::MAX as usize)
            .with_context(|| {
                format!("--pages {n_pages} of {page_bytes} bytes are more than a machine can address")
            })?;
        Ok(Limits {
            combine,
            wire: self.wire,
            chunk_rows_max: self.chunk,
            step_rows_max: self.step_rows,
            half_batches: self.half_batches,
            n_pages,
            page_positions: self.page_positions,
            context_max,
            running_max: self.running_max,
            queue_max: self.queue_max,
            expert_wait: self.expert_wait,
            dispatch_timeout: self.dispatch_timeout,
            on_missing_expert: self.on_missing_expert,
        })
    }
}

impl Limits {
    /// Positions that the KV cache holds.
    pub(crate) const fn capacity(&self) -> usize {
        self.n_pages * self.page_positions
    }

    /// Most tokens a sequence with this prompt can generate. The last one needs no place in the cache.
    pub(crate) fn tokens_max(&self, n_prompt: usize) -> usize {
        let by_context = self.context_max.saturating_sub(n_prompt);
        let by_cache = (self.capacity() + 1).saturating_sub(n_prompt);
        by_context.min(by_cache)
    }
}
