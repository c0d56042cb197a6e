//! Traces, as an OTLP collector gets them.

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use cluster::Port;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::json;
use tokio::net::TcpListener;

use super::{CALLER, TRACE, body, complete, full, metrics::Scrape};
use crate::{
    fixtures::minnow,
    harness::{
        Cluster, Endpoint,
        collector::{Collector, Span, Trace},
        http::Response,
        wait_for, within,
    },
};

const TOKENS: usize = 6;
/// minnow's layers with experts, and all.
const MOE_LAYERS: [&str; 4] = ["1", "2", "3", "4"];

/// The gateway's span for the request is there: it comes last.
fn is_rooted(trace: &Trace) -> Result<(), String> {
    let rooted = trace.0.iter().any(|span| span.parent == CALLER && span.service == "shoal-gateway");
    if rooted { Ok(()) } else { Err(format!("{} spans, no root", trace.0.len())) }
}

/// Every client span has its server's, and every decode step is there.
fn is_complete(trace: &Trace) -> Result<(), String> {
    is_rooted(trace)?;
    let steps =
        trace.named("shoal-router", "decode").count() + trace.named("shoal-router", "prefill").count();
    let clients = trace.named("shoal-router", "shoal.v1.Expert/Dispatch").count();
    let servers = trace.named("shoal-expert", "shoal.v1.Expert/Dispatch").count();
    let calls = trace.named("shoal-router", "shoal.v1.Router/Generate").count();
    if steps >= TOKENS && clients == servers && clients > 0 && calls > 0 {
        Ok(())
    } else {
        Err(format!("{steps} steps, {clients} frames sent, {servers} received"))
    }
}

async fn traced_cluster(collector: &Collector, experts: usize) -> Cluster {
    Cluster::builder(&minnow()).experts(experts).all_args(&["--otlp", &collector.url()]).start().await
}

#[track_caller]
fn assert_says_its_trace(response: &Response, trace_id: &str) {
    assert_eq!(response.header("x-shoal-trace-id"), Some(trace_id));
}

#[tokio::test]
async fn one_request_is_one_tree_down_to_the_experts() {
    let collector = Collector::start().await;
    let cluster = traced_cluster(&collector, 4).await;
    let response = complete(&cluster.http(), &full(TRACE), TOKENS).await;
    response.ok();
    assert_says_its_trace(&response, TRACE);
    let trace = collector.complete_trace(TRACE, is_complete).await;
    trace.assert_is_a_tree_under(CALLER);
    let roots: Vec<&Span> = trace.0.iter().filter(|span| span.parent == CALLER).collect();
    let [root] = roots[..] else { panic!("{} roots", roots.len()) };
    assert_eq!((root.name.as_str(), root.kind), ("text_completion tested", SpanKind::Server));
    assert!(root.events.iter().any(|(name, _)| name == "first_token"), "{root:?}");
    for (key, value) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.provider.name", "shoal"),
        ("gen_ai.request.model", "tested"),
        ("gen_ai.response.model", "tested"),
        ("gen_ai.usage.output_tokens", "6"),
        ("gen_ai.response.finish_reasons", "length"),
        ("http.response.status_code", "200"),
    ] {
        assert_eq!(root.attribute(key), value, "{key}");
    }
    let steps: Vec<&Span> = trace
        .0
        .iter()
        .filter(|span| span.service == "shoal-router" && matches!(span.name.as_str(), "prefill" | "decode"))
        .collect();
    assert_eq!(steps.len(), TOKENS, "a step a token, the first of them the prefill");
    let mut servers = BTreeSet::new();
    for step in steps {
        let layers: Vec<&Span> = trace.children(step).collect();
        assert_eq!(layers.len(), 1 + MOE_LAYERS.len(), "every layer of step {step:?}");
        for layer in layers.iter().filter(|layer| MOE_LAYERS.contains(&layer.attribute("shoal.layer"))) {
            let frames: Vec<&Span> = trace.children(layer).collect();
            assert!(!frames.is_empty(), "{layer:?}");
            for frame in frames {
                assert_eq!(frame.kind, SpanKind::Client);
                servers.insert(frame.attribute("shoal.server").to_owned());
                let answers: Vec<&Span> = trace.children(frame).collect();
                let [server] = answers[..] else { panic!("{} servers answered {frame:?}", answers.len()) };
                assert_eq!((server.service.as_str(), server.kind), ("shoal-expert", SpanKind::Server));
                for key in ["shoal.layer", "shoal.experts", "shoal.rows", "shoal.pairs", "shoal.frame"] {
                    assert_eq!(server.attribute(key), frame.attribute(key), "{key}");
                }
                let parts: Vec<&str> = trace.children(server).map(|span| span.name.as_str()).collect();
                assert_eq!(parts, ["receive", "queue", "compute", "reply"]);
            }
        }
    }
    assert_eq!(servers.len(), 4, "every server was touched: {servers:?}");
    // The first parts of the way.
    for name in ["admit", "shoal.v1.Router/Generate"] {
        assert_eq!(trace.children(root).filter(|span| span.name == name).count(), 1, "{name}");
    }
    assert_eq!(trace.named("shoal-router", "queue").count(), 1);
}

/// A request that is in both half-batches has each layer twice, with the rows of either.
#[tokio::test]
async fn half_batches_are_told_apart() {
    let collector = Collector::start().await;
    let builder = Cluster::builder(&minnow()).experts(2).all_args(&["--otlp", &collector.url()]);
    let cluster = builder.router_args(&["--half-batches", "always"]).start().await;
    complete(&cluster.http(), &full(TRACE), TOKENS).await.ok();
    let trace = collector.complete_trace(TRACE, is_complete).await;
    trace.assert_is_a_tree_under(CALLER);
    let rows = |span: &Span| span.attribute("shoal.rows").parse::<usize>().expect("a number");
    let steps = trace.0.iter().filter(|span| matches!(span.name.as_str(), "prefill" | "decode"));
    for step in steps.filter(|span| span.service == "shoal-router") {
        let halves = if step.name == "prefill" { 2 } else { 1 };
        let layers: Vec<&Span> = trace.children(step).collect();
        assert_eq!(layers.len(), halves * (1 + MOE_LAYERS.len()), "{step:?}");
        for layer in MOE_LAYERS {
            let of_layer = layers.iter().filter(|span| span.attribute("shoal.layer") == layer);
            assert_eq!(of_layer.clone().map(|span| rows(span)).sum::<usize>(), rows(step));
            for span in of_layer {
                let mut frames = trace.children(span).peekable();
                assert!(frames.peek().is_some() && frames.all(|frame| rows(frame) <= rows(span)), "{span:?}");
            }
        }
    }
    cluster.idle().await;
    let steps = Scrape::of(&cluster.router).await.value("shoal_router_steps_halved_total");
    assert!((steps - 1.0).abs() < f64::EPSILON, "{steps}");
}

#[tokio::test]
async fn requests_of_one_batch_keep_their_traces_apart() {
    check_traces_apart("never").await;
}

/// Each is a half of its own.
#[tokio::test]
async fn requests_of_two_half_batches_keep_their_traces_apart() {
    check_traces_apart("always").await;
}

async fn check_traces_apart(half_batches: &str) {
    const OTHER: &str = "1af7651916cd43dd8448eb211c80319d";
    let collector = Collector::start().await;
    let builder = Cluster::builder(&minnow()).experts(2).all_args(&["--otlp", &collector.url()]);
    let cluster = builder.router_args(&["--half-batches", half_batches]).start().await;
    let http = cluster.http();
    let (one, other) = (full(TRACE), full(OTHER));
    tokio::join!(complete(&http, &one, 60), complete(&http, &other, 60));
    let mut shared = 0;
    for (trace_id, other_id) in [(TRACE, OTHER), (OTHER, TRACE)] {
        let trace = collector.complete_trace(trace_id, is_complete).await;
        trace.assert_is_a_tree_under(CALLER);
        for span in &trace.0 {
            assert!(!format!("{span:?}").contains(other_id), "{span:?}");
        }
        for step in trace.named("shoal-router", "decode") {
            shared += usize::from(step.attribute("shoal.batch_sequences") == "2");
            let layers =
                trace.children(step).filter(|span| MOE_LAYERS.contains(&span.attribute("shoal.layer")));
            for layer in layers {
                assert!(trace.children(layer).next().is_some(), "its rows were sent: {layer:?}");
            }
        }
    }
    assert!(shared > 0, "they shared no step");
    let links = |span: &Span| span.links.iter().cloned().collect::<BTreeSet<_>>();
    let steps: Vec<Span> = collector
        .all()
        .into_iter()
        .filter(|span| span.service == "shoal-router" && span.name == "step")
        .collect();
    let both = BTreeSet::from([TRACE.to_owned(), OTHER.to_owned()]);
    assert!(steps.iter().any(|step| links(step) == both), "a step that both shared links to both");
    assert!(steps.iter().all(|step| step.parent.is_empty() && !both.contains(&step.trace_id)));
}

#[tokio::test]
async fn the_caller_decides_what_is_recorded() {
    const UNSAMPLED: &str = "2af7651916cd43dd8448eb211c80319e";
    let collector = Collector::start().await;
    let cluster = traced_cluster(&collector, 1).await;
    let http = cluster.http();
    let not = vec![("traceparent", format!("00-{UNSAMPLED}-{CALLER}-00"))];
    let response = complete(&http, &not, 2).await;
    assert_says_its_trace(&response, UNSAMPLED);
    // Malformed: as if it were not there.
    let malformed = complete(&http, &[("traceparent", "00-zz-01".to_owned())], 2).await;
    malformed.ok();
    let own = malformed.header("x-shoal-trace-id").expect("every answer says its trace").to_owned();
    let rooted = |trace: &Trace| {
        let found = trace.0.iter().any(|span| span.service == "shoal-gateway" && span.parent.is_empty());
        if found { Ok(()) } else { Err(format!("{} spans", trace.0.len())) }
    };
    collector.complete_trace(&own, rooted).await;
    // What came before it would be there by now.
    assert!(collector.trace(UNSAMPLED).0.is_empty());
    // An error is in a trace too, and its body says which.
    let unknown = json!({"model": "no such model", "prompt": "x"});
    let response = http.post_with(Endpoint::Completions.path(), &full(TRACE), &unknown).await;
    assert_eq!(response.status, 404);
    assert_eq!(response.json()["error"]["trace_id"], TRACE);
    let trace = collector.complete_trace(TRACE, is_rooted).await;
    let root = trace.0.iter().find(|span| span.parent == CALLER).expect("complete");
    assert!(root.failed && root.attribute("error.type") == "model_not_found", "{root:?}");
    assert!(
        !format!("{trace:?}").contains("no such model") || root.attribute("gen_ai.request.model") == "tested"
    );
}

/// Neither a hedge nor an ejection takes the frame away from the server before it is killed: the kill alone does.
#[tokio::test]
async fn a_killed_server_and_its_replacement_are_in_the_trace() {
    const STALLED: Duration = Duration::from_millis(500);
    let collector = Collector::start().await;
    let builder = Cluster::builder(&minnow()).placement(&["0-15", "0-15"]);
    let builder = builder.router_args(&["--hedge-after-min", "60s", "--silent-max", "60s"]);
    let mut cluster = builder.all_args(&["--otlp", &collector.url()]).start().await;
    let killed = cluster.expert_status(0).await.instance;
    let survivor = cluster.expert_status(1).await.instance;
    let http = cluster.http();
    let mut request = body("What is 348 + 277?", 400);
    request["stream"] = json!(true);
    // Not every step: 400 whole steps are more spans than the exporter's queue promises to hold.
    let sampled = vec![("traceparent", format!("00-{TRACE}-{CALLER}-01"))];
    let mut events = http.stream_with(Endpoint::Completions.path(), &sampled, &request).await;
    for _ in 0..5 {
        events.next().await.expect("the stream goes on").expect("the stream goes on");
    }
    cluster.experts[0].process.freeze();
    // Until nothing comes: a frame is with the frozen server.
    while let Ok(event) = tokio::time::timeout(STALLED, events.next()).await {
        event.expect("the stream goes on").expect("the stream goes on");
    }
    cluster.experts[0].process.kill();
    events.rest().await;
    let trace = collector.complete_trace(TRACE, is_rooted).await;
    let failed: Vec<&Span> =
        trace.named("shoal-router", "shoal.v1.Expert/Dispatch").filter(|span| span.failed).collect();
    assert!(!failed.is_empty(), "the attempt at the killed server");
    for attempt in failed {
        assert_eq!(
            (attempt.attribute("shoal.outcome"), attempt.attribute("shoal.server")),
            ("failed", &*killed)
        );
        assert!(attempt.attributes.contains_key("error.type"), "{attempt:?}");
        let layer = trace.0.iter().find(|other| other.id == attempt.parent).expect("no orphans");
        let replaced = trace.children(layer).any(|other| {
            let what = ["shoal.attempt", "shoal.outcome", "shoal.server"].map(|key| other.attribute(key));
            what == ["failover", "answered", &survivor] && other.attribute("shoal.cause").contains(&killed)
        });
        assert!(replaced, "the one that answered, in {layer:?}");
        let told = layer.events.iter().find(|(name, _)| name == "failover");
        assert!(told.is_some_and(|(_, attributes)| attributes["shoal.cause"].contains(&killed)), "{layer:?}");
    }
    // The rest of the tree is as whole as ever.
    trace.assert_is_a_tree_under(CALLER);
}

/// Of a sampled request that does not ask for every step, the slow one is there: that is known only after it.
#[tokio::test]
async fn a_slow_step_is_recorded_afterwards() {
    // What a server may be silent for before it is ejected.
    const SILENT: Duration = Duration::from_millis(250);
    let collector = Collector::start().await;
    let builder = Cluster::builder(&minnow()).experts(2).all_args(&["--otlp", &collector.url()]);
    let builder = builder.router_args(&["--trace-steps-first", "0", "--trace-step-every", "0"]);
    let cluster = builder.start().await;
    let sampled = vec![("traceparent", format!("00-{TRACE}-{CALLER}-01"))];
    let mut request = body("What is 348 + 277?", 400);
    request["stream"] = json!(true);
    let mut events = cluster.http().stream_with(Endpoint::Completions.path(), &sampled, &request).await;
    for _ in 0..20 {
        events.next().await.expect("the stream goes on").expect("the stream goes on");
    }
    cluster.experts[0].process.freeze();
    wait_for("an ejection", async || {
        let log = cluster.router.process.log();
        if log.contains("expert server is silent: ejected") { Ok(()) } else { Err(log) }
    })
    .await;
    cluster.experts[0].process.thaw();
    events.rest().await;
    let trace = collector.complete_trace(TRACE, is_rooted).await;
    let decoded: Vec<&Span> = trace.named("shoal-router", "decode").collect();
    let slow = decoded.iter().find(|step| u128::from(step.end - step.start) >= SILENT.as_nanos());
    let slow =
        slow.unwrap_or_else(|| panic!("the frozen server's step is not among {} recorded", decoded.len()));
    assert_eq!(slow.attribute("shoal.slow"), "true");
    assert!(decoded.len() < 100, "{} steps of 400 were recorded", decoded.len());
    // Nobody told the server to record it; the router's span has what the server said.
    let frames: Vec<&Span> = trace.children(slow).flat_map(|layer| trace.children(layer)).collect();
    assert!(!frames.is_empty() && frames.iter().all(|frame| trace.children(frame).next().is_none()));
    let answered = frames.iter().filter(|frame| frame.attribute("shoal.outcome") == "answered");
    assert!(answered.clone().count() > 0);
    for frame in answered {
        assert!(frame.attributes.contains_key("shoal.server_compute_us"), "{frame:?}");
    }
}

/// B30's sister: with nobody on the collector's port, and with somebody there who never answers.
#[tokio::test]
async fn a_collector_that_is_away_or_hangs_costs_nothing() {
    const EXIT_MAX: Duration = Duration::from_secs(5);
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let hanging = format!("http://{}", silent.local_addr().expect("it listens"));
    let port = Port::reserve(Ipv4Addr::LOCALHOST).expect("a free port");
    let nobody = format!("http://{}", port.address());
    for url in [hanging, nobody] {
        let mut cluster = Cluster::builder(&minnow()).experts(2).all_args(&["--otlp", &url]).start().await;
        let http = cluster.http();
        for _ in 0..20 {
            within(Duration::from_secs(20), "answer", complete(&http, &full(TRACE), 8)).await.ok();
        }
        let began = now();
        for member in cluster.members() {
            member.process.terminate();
        }
        for member in cluster.members() {
            let ended = member.process.ended().await;
            assert!(ended.status.success(), "{}", ended.stderr);
            let complaints = ended.stderr.matches("the trace collector takes no spans").count();
            assert!(complaints <= 2, "one warning a minute at most: {}", ended.stderr);
        }
        assert!(began.elapsed() < EXIT_MAX, "{:?}", began.elapsed());
    }
}

#[expect(clippy::disallowed_methods, reason = "an exit is timed")]
fn now() -> Instant {
    Instant::now()
}
