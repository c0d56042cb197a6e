//! The same through a real Jaeger and its query API.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use cluster::Port;
use serde_json::Value;

use super::{CALLER, TRACE, complete, full};
use crate::{
    fixtures::minnow,
    harness::{Cluster, Http, wait_for},
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const HOW: &str = "Jaeger is neither at target/tools/jaeger/jaeger nor on PATH: \
                   deploy/jaeger/build target/tools/jaeger builds it with Go and says how else to get it";

struct Jaeger {
    process: Child,
    otlp: Port,
    query: Http,
    _others: [Port; 3],
}

impl Drop for Jaeger {
    fn drop(&mut self) {
        // Whether it ended before is no matter.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

#[expect(clippy::disallowed_methods, reason = "the tests' surroundings, not a program's configuration")]
fn find() -> Option<PathBuf> {
    let built = PathBuf::from(ROOT).join("target/tools/jaeger/jaeger");
    let on_path = || {
        std::env::split_paths(&std::env::var("PATH").unwrap_or_default())
            .map(|dir| dir.join("jaeger"))
            .find(|file| file.is_file())
    };
    let found = if built.is_file() { Some(built) } else { on_path() };
    assert!(found.is_some() || std::env::var("CI").as_deref() != Ok("true"), "{HOW}");
    found
}

/// Jaeger does not say which port it took.
fn free() -> Port {
    Port::reserve(Ipv4Addr::LOCALHOST).expect("a free port")
}

impl Jaeger {
    async fn start() -> Option<Self> {
        let Some(program) = find() else {
            println!("skipped: {HOW}");
            return None;
        };
        let (otlp, otlp_http, query, query_grpc) = (free(), free(), free(), free());
        let process = Command::new(program)
            .arg("--config")
            .arg(PathBuf::from(ROOT).join("deploy/jaeger/config.yaml"))
            .env("JAEGER_OTLP_GRPC", otlp.address().to_string())
            .env("JAEGER_OTLP_HTTP", otlp_http.address().to_string())
            .env("JAEGER_QUERY_HTTP", query.address().to_string())
            .env("JAEGER_QUERY_GRPC", query_grpc.address().to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Jaeger starts");
        let jaeger = Self {
            process,
            otlp,
            query: Http { address: query.address() },
            _others: [otlp_http, query, query_grpc],
        };
        wait_for("Jaeger", async || match jaeger.query.try_get("/api/services").await {
            Ok(response) if response.status == 200 => Ok(()),
            Ok(response) => Err(response.status.to_string()),
            Err(error) => Err(error.to_string()),
        })
        .await;
        Some(jaeger)
    }

    /// The trace as the query API has it, once `complete` says so.
    async fn trace(&self, trace_id: &str, complete: impl Fn(&Found) -> Result<(), String>) -> Found {
        wait_for("complete trace in Jaeger", async || {
            let response = self.query.get(&format!("/api/traces/{trace_id}")).await;
            let found = Found::read(&response.json()["data"][0]).ok_or("no trace")?;
            complete(&found).map(|()| found).map_err(|error| error.clone())
        })
        .await
    }
}

/// A trace from `/api/traces`.
struct Found {
    services: BTreeMap<String, String>,
    spans: Vec<Value>,
}

impl Found {
    fn read(trace: &Value) -> Option<Self> {
        let processes = trace["processes"].as_object()?.iter();
        let name = |process: &Value| process["serviceName"].as_str().unwrap_or_default().to_owned();
        Some(Self {
            services: processes.map(|(id, process)| (id.clone(), name(process))).collect(),
            spans: trace["spans"].as_array()?.clone(),
        })
    }

    fn named<'a>(&'a self, service: &'a str, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.spans.iter().filter(move |span| {
            let process = span["processID"].as_str().unwrap_or_default();
            self.services.get(process).is_some_and(|found| found == service) && span["operationName"] == name
        })
    }
}

fn tag<'a>(span: &'a Value, key: &str) -> &'a Value {
    let tags = span["tags"].as_array().expect("tags");
    tags.iter().find(|tag| tag["key"] == key).map_or(&Value::Null, |tag| &tag["value"])
}

fn parent(span: &Value) -> Option<&str> {
    let references = span["references"].as_array()?;
    references.iter().find(|reference| reference["refType"] == "CHILD_OF")?["spanID"].as_str()
}

/// As the tests with a collector have it: as many frames received as sent, and the root is there.
fn is_complete(found: &Found) -> Result<(), String> {
    let sent = found.named("shoal-router", "shoal.v1.Expert/Dispatch").count();
    let received = found.named("shoal-expert", "shoal.v1.Expert/Dispatch").count();
    let rooted = found.spans.iter().any(|span| parent(span) == Some(CALLER));
    if sent > 0 && sent == received && rooted {
        Ok(())
    } else {
        Err(format!("{sent} frames sent, {received} received, root: {rooted}"))
    }
}

#[tokio::test]
async fn a_request_through_four_servers_is_one_whole_trace() {
    let Some(jaeger) = Jaeger::start().await else { return };
    let otlp = format!("http://{}", jaeger.otlp.address());
    let builder = Cluster::builder(&minnow()).experts(4).expert_args(1, &["--chaos-delay", "20ms"]);
    let page = "http://jaeger.example:16686";
    let builder = builder.gateway_args(&["--trace-url", page]).all_args(&["--otlp", &otlp]);
    let cluster = builder.start().await;
    let response = complete(&cluster.http(), &full(TRACE), 5).await;
    assert_eq!(response.header("x-shoal-trace-url"), Some(&*format!("{page}/trace/{TRACE}")));
    let found = jaeger.trace(TRACE, is_complete).await;
    let ids: BTreeSet<&str> =
        found.spans.iter().map(|span| span["spanID"].as_str().expect("an id")).collect();
    let mut layers = BTreeSet::new();
    for span in &found.spans {
        let parent = parent(span).expect("the caller's span is above all");
        assert!(parent == CALLER || ids.contains(parent), "an orphan: {span}");
        if let Some(layer) = tag(span, "shoal.layer").as_i64() {
            layers.insert(layer);
        }
    }
    assert_eq!(layers, (0..5).collect(), "every layer");
    // From the trace alone: who is slow, and that it is its computing and neither its queue nor the network.
    let mut slowest: BTreeMap<String, f64> = BTreeMap::new();
    for frame in found.named("shoal-router", "shoal.v1.Expert/Dispatch") {
        let server = tag(frame, "shoal.server").as_str().expect("a server").to_owned();
        let took = frame["duration"].as_f64().expect("a duration") / 1e3;
        let least = slowest.entry(server).or_insert(f64::MAX);
        *least = least.min(took);
    }
    assert_eq!(slowest.len(), 4, "{slowest:?}");
    let slow: Vec<_> = slowest.iter().filter(|(_, ms)| **ms >= 20.0).collect();
    let [(slow, _)] = slow[..] else { panic!("{slowest:?}") };
    assert_eq!(*slow, cluster.expert_status(1).await.instance);
    let frame = found
        .named("shoal-router", "shoal.v1.Expert/Dispatch")
        .find(|frame| tag(frame, "shoal.server") == slow)
        .expect("it was there before");
    assert!(tag(frame, "shoal.server_compute_us").as_i64().is_some_and(|us| us >= 20_000), "{frame}");
}
