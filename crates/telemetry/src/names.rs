//! Every metric: name, kind, labels, meaning. `docs/metrics.md` is this list; dashboards and alert rules may use
//! nothing else. No label takes a value that a client can choose or that a restart makes new.

/// What serves a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    Every,
    Gateway,
    Router,
    Expert,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// As it is scraped: a counter's ends in `_total`.
    pub name: &'static str,
    pub kind: Kind,
    pub on: On,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

/// 100 µs to 10 s: what a frame, a layer or a step takes.
const SHORT: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// OpenTelemetry's buckets for the time to first token, and some for crowded times.
const FIRST_TOKEN: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0];
/// OpenTelemetry's for the time per output token, and shorter ones.
const PER_TOKEN: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// OpenTelemetry's for a whole request.
const REQUEST: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 300.0];
const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

/// The constants and [`ALL`], from one list.
macro_rules! catalogue {
    ($($id:ident = $name:literal, $kind:expr, $on:ident, [$($label:literal),*], $help:literal;)*) => {
        $(pub const $id: Metric =
            Metric { name: $name, kind: $kind, on: On::$on, labels: &[$($label),*], help: $help };)*
        /// In the order of the documentation.
        pub const ALL: &[Metric] = &[$($id),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

catalogue! {
    BUILD_INFO = "shoal_build_info", Gauge, Every, ["version", "process"],
        "Always 1; the labels say what runs";
    UPTIME = "shoal_uptime_seconds", Gauge, Every, [],
        "Time since this process started";
    SPANS = "shoal_trace_spans_total", Counter, Every, ["outcome"],
        "Trace spans: exported, failed (the collector did not take them) or recorded in all";
    REGISTRY_CONNECTED = "shoal_registry_connected", Gauge, Every, [],
        "1 while the registry answers, 0 while the last known members are used; static lists are always 1";
    REGISTRY_REVISION = "shoal_registry_revision", Gauge, Every, [],
        "The registry's count of changes that this process has seen";

    GATEWAY_REQUESTS = "shoal_gateway_requests_total", Counter, Gateway, ["endpoint", "outcome"],
        "Requests ended, by endpoint and by outcome: ok, cancelled, or the error's code";
    GATEWAY_RUNNING = "shoal_gateway_requests_running", Gauge, Gateway, [],
        "Requests admitted and not ended";
    GATEWAY_ADMIT = "shoal_gateway_admit_seconds", Histogram(SHORT), Gateway, [],
        "From a request's last byte until a router has taken it: reading, rendering, tokenizing, routing";
    GATEWAY_FIRST_TOKEN = "shoal_gateway_time_to_first_token_seconds", Histogram(FIRST_TOKEN), Gateway, ["model"],
        "From a request's arrival to its first token";
    GATEWAY_INTER_TOKEN = "shoal_gateway_inter_token_latency_seconds", Histogram(PER_TOKEN), Gateway, ["model"],
        "Between two tokens of one choice";
    GATEWAY_REQUEST = "shoal_gateway_request_seconds", Histogram(REQUEST), Gateway, ["model"],
        "From a request's arrival to its last byte";
    GATEWAY_PROMPT_TOKENS = "shoal_gateway_prompt_tokens_total", Counter, Gateway, ["model"],
        "Prompt tokens of requests that were answered";
    GATEWAY_GENERATION_TOKENS = "shoal_gateway_generation_tokens_total", Counter, Gateway, ["model"],
        "Tokens generated";
    GATEWAY_REPAIRS = "shoal_gateway_repairs_total", Counter, Gateway, ["outcome"],
        "Answers that lost their router: done (they went on at another one) or failed";
    GATEWAY_DEGRADED = "shoal_gateway_degraded_responses_total", Counter, Gateway, [],
        "Answers for which experts without a holder were left out";
    GATEWAY_ROUTERS = "shoal_gateway_routers", Gauge, Gateway, ["state"],
        "Routers known: ready, unready (they answer, and miss something), draining, silent";

    VLLM_RUNNING = "vllm:num_requests_running", Gauge, Gateway, ["model_name", "engine"],
        "Sequences that the routers compute";
    VLLM_WAITING = "vllm:num_requests_waiting", Gauge, Gateway, ["model_name", "engine"],
        "Sequences that wait at the routers";
    VLLM_CACHE_USAGE = "vllm:kv_cache_usage_perc", Gauge, Gateway, ["model_name", "engine"],
        "Share of the routers' KV cache pages in use, 0 to 1";
    VLLM_CACHE_CONFIG = "vllm:cache_config_info", Gauge, Gateway, ["block_size", "num_gpu_blocks", "engine"],
        "Always 1; positions of a KV cache page and the number of pages over all routers";
    VLLM_FIRST_TOKEN = "vllm:time_to_first_token_seconds", Histogram(FIRST_TOKEN), Gateway, ["model_name", "engine"],
        "As shoal_gateway_time_to_first_token_seconds";
    VLLM_INTER_TOKEN = "vllm:inter_token_latency_seconds", Histogram(PER_TOKEN), Gateway, ["model_name", "engine"],
        "As shoal_gateway_inter_token_latency_seconds";
    VLLM_E2E = "vllm:e2e_request_latency_seconds", Histogram(REQUEST), Gateway, ["model_name", "engine"],
        "As shoal_gateway_request_seconds";
    VLLM_PROMPT_TOKENS = "vllm:prompt_tokens_total", Counter, Gateway, ["model_name", "engine"],
        "As shoal_gateway_prompt_tokens_total";
    VLLM_GENERATION_TOKENS = "vllm:generation_tokens_total", Counter, Gateway, ["model_name", "engine"],
        "As shoal_gateway_generation_tokens_total";
    VLLM_SUCCESS = "vllm:request_success_total", Counter, Gateway, ["finished_reason", "model_name", "engine"],
        "Choices that ended well: stop or length";

    ROUTER_RUNNING = "shoal_router_sequences_running", Gauge, Router, [],
        "Sequences being computed";
    ROUTER_WAITING = "shoal_router_sequences_waiting", Gauge, Router, [],
        "Sequences in the queue";
    ROUTER_QUEUE = "shoal_router_queue_seconds", Histogram(FIRST_TOKEN), Router, [],
        "From a sequence's arrival to its first step";
    ROUTER_STEP = "shoal_router_step_seconds", Histogram(SHORT), Router, [],
        "One step: all layers for one batch, and sampling";
    ROUTER_STEP_ROWS = "shoal_router_step_rows", Histogram(COUNTS), Router, [],
        "Rows of a step: tokens computed together";
    ROUTER_STEP_SEQUENCES = "shoal_router_step_sequences", Histogram(COUNTS), Router, [],
        "Sequences of a step: the batch size";
    ROUTER_HALVED = "shoal_router_steps_halved_total", Counter, Router, [],
        "Steps computed in two half-batches, one of which attends while the other's experts work";
    ROUTER_TOKENS = "shoal_router_generation_tokens_total", Counter, Router, [],
        "Tokens drawn";
    ROUTER_PREEMPTIONS = "shoal_router_preemptions_total", Counter, Router, [],
        "Sequences that gave their pages back and started over";
    ROUTER_DEGRADED = "shoal_router_sequences_degraded_total", Counter, Router, [],
        "Sequences for which experts were left out";
    ROUTER_PAGES = "shoal_router_kv_pages", Gauge, Router, [],
        "Pages of the KV cache";
    ROUTER_PAGES_IN_USE = "shoal_router_kv_pages_in_use", Gauge, Router, [],
        "Pages that sequences hold";
    ROUTER_DISPATCH = "shoal_router_dispatch_seconds", Histogram(SHORT), Router, ["layer"],
        "From a layer's dispatch until every row is home: shared experts included. In half-batches also what the other one computes meanwhile, which is no wait then";
    ROUTER_DISPATCH_BYTES = "shoal_router_dispatch_bytes_total", Counter, Router, ["layer", "direction"],
        "Bytes of activations sent to expert servers (out) and back (in)";
    ROUTER_FRAME = "shoal_router_frame_seconds", Histogram(SHORT), Router, ["server"],
        "Round trip of a frame that was answered, by expert server (its address)";
    ROUTER_FRAME_COMPUTE = "shoal_router_frame_compute_seconds", Histogram(SHORT), Router, ["server"],
        "Of that, what the server itself says it computed: the difference is queue and network, and until this router read the answer";
    ROUTER_FRAMES = "shoal_router_frames_total", Counter, Router, ["kind"],
        "Frames sent: first, hedge, failover, probe";
    ROUTER_FRAME_FAILURES = "shoal_router_frame_failures_total", Counter, Router, ["reason"],
        "Frames that failed";
    ROUTER_STALE = "shoal_router_stale_replies_total", Counter, Router, [],
        "Replies that nobody waited for any more";
    ROUTER_EJECTIONS = "shoal_router_ejections_total", Counter, Router, [],
        "Times that an expert server was avoided for a while";
    ROUTER_SERVERS = "shoal_router_expert_servers", Gauge, Router, ["state"],
        "Expert servers known: connecting, ready, ejected, draining, refused";
    ROUTER_SERVER_UP = "shoal_router_server_up", Gauge, Router, ["server"],
        "1 if frames are sent to this expert server, 0 if it is ejected, draining or away";
    ROUTER_SERVER_OWED = "shoal_router_server_frames_in_flight", Gauge, Router, ["server"],
        "Frames that this expert server has not answered";
    ROUTER_EXPERT_ROWS = "shoal_router_expert_rows_total", Counter, Router, ["layer", "expert"],
        "Rows that the gate sent to each expert; left out for checkpoints with more than 4,096 (layer, expert) pairs unless --expert-metrics";
    ROUTER_IMBALANCE = "shoal_router_expert_imbalance_ratio", Gauge, Router, ["layer"],
        "Rows of the busiest expert over the mean of all, since the start";
    ROUTER_MISSING = "shoal_router_experts_missing", Gauge, Router, [],
        "(layer, expert) pairs that nobody holds";
    ROUTER_UNDER_REPLICATED = "shoal_router_experts_under_replicated", Gauge, Router, [],
        "(layer, expert) pairs with fewer holders than --replicas; with etcd, fewer expert servers";
    ROUTER_READY = "shoal_router_ready", Gauge, Router, [],
        "1 if requests can be answered";
    ROUTER_LEADER = "shoal_router_leader", Gauge, Router, [],
        "1 on the router that places experts";
    ROUTER_PLACEMENT = "shoal_router_placement_version", Gauge, Router, [],
        "Version of the placement in force";

    EXPERT_FRAMES = "shoal_expert_frames_total", Counter, Expert, ["outcome"],
        "Frames received: computed, late (their deadline had passed), failed for another reason";
    EXPERT_ROWS = "shoal_expert_rows_total", Counter, Expert, [],
        "Rows of the frames computed";
    EXPERT_PAIRS = "shoal_expert_pairs_total", Counter, Expert, [],
        "(row, expert) pairs computed";
    EXPERT_QUEUE = "shoal_expert_queue_seconds", Histogram(SHORT), Expert, [],
        "From a frame's arrival to its turn";
    EXPERT_COMPUTE = "shoal_expert_compute_seconds", Histogram(SHORT), Expert, [],
        "Computing a frame";
    EXPERT_STREAMS = "shoal_expert_dispatch_streams", Gauge, Expert, [],
        "Routers connected";
    EXPERT_HELD = "shoal_expert_experts_held", Gauge, Expert, [],
        "(layer, expert) pairs held";
    EXPERT_SHARD_BYTES = "shoal_expert_shard_bytes", Gauge, Expert, [],
        "Bytes of the experts held";
    EXPERT_MEMORY_MAX = "shoal_expert_memory_bytes_max", Gauge, Expert, [],
        "Most bytes of experts that a placement may give this server; 0 without an etcd registry";
    EXPERT_EPOCH = "shoal_expert_epoch", Gauge, Expert, [],
        "Changes of what is held";
    EXPERT_READY = "shoal_expert_ready", Gauge, Expert, [],
        "1 if frames are computed, 0 while loading or draining";
}

/// The documentation's table.
#[must_use]
pub fn markdown() -> String {
    let mut text = String::new();
    for (on, title) in [
        (On::Every, "Every process"),
        (On::Gateway, "Gateway"),
        (On::Router, "Router"),
        (On::Expert, "Expert server"),
    ] {
        text.push_str(&format!(
            "\n## {title}\n\n| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n"
        ));
        for metric in ALL.iter().filter(|metric| metric.on == on) {
            let kind = match metric.kind {
                Counter => "counter",
                Gauge => "gauge",
                Histogram(_) => "histogram",
            };
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            text.push_str(&format!(
                "| `{}` | {kind} | {} | {} |\n",
                metric.name,
                labels.join(", "),
                metric.help
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_say_what_they_are() {
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name is there twice");
        for Metric { name, kind, help, .. } in ALL {
            assert_eq!(name.ends_with("_total"), *kind == Counter, "{name}");
            assert!(!help.ends_with('.') && !help.contains('|'), "{name}");
            if let Histogram(buckets) = kind {
                assert!(buckets.is_sorted(), "{name}");
            }
        }
    }
}
