//! A trace collector in the test's own process: takes OTLP over gRPC and keeps every span.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::span::SpanKind,
};
use telemetry::Tasks;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use super::wait_for;

#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) service: String,
    pub(crate) trace_id: String,
    pub(crate) id: String,
    /// Empty: none.
    pub(crate) parent: String,
    pub(crate) name: String,
    pub(crate) kind: SpanKind,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Name and attributes.
    pub(crate) events: Vec<(String, BTreeMap<String, String>)>,
    /// Trace ids of what it links to.
    pub(crate) links: Vec<String>,
    pub(crate) failed: bool,
}

impl Span {
    #[track_caller]
    pub(crate) fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }
}

#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Span>>>);

pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    spans: Spans,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a listening socket has an address");
        let spans = Spans::default();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(spans.clone()).max_decoding_message_size(64 << 20))
            .serve_with_incoming(TcpIncoming::from(listener));
        // Gone with the test's own runtime.
        Tasks::new().spawn("collector", async move {
            if let Err(error) = server.await {
                panic!("the collector ended: {error}");
            }
        });
        Self { address, spans }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn trace(&self, trace_id: &str) -> Trace {
        let spans = self.spans.0.lock().expect("nobody panics with it");
        Trace(spans.iter().filter(|span| span.trace_id == trace_id).cloned().collect())
    }

    pub(crate) fn all(&self) -> Vec<Span> {
        self.spans.0.lock().expect("nobody panics with it").clone()
    }

    /// Waits until the trace has all that `complete` wants, and what its spans hang under: each process sends its own in
    /// batches.
    pub(crate) async fn complete_trace(
        &self,
        trace_id: &str,
        complete: impl Fn(&Trace) -> Result<(), String>,
    ) -> Trace {
        wait_for("complete trace", async || {
            let trace = self.trace(trace_id);
            complete(&trace)?;
            // The caller's span is none of ours.
            let ids: HashSet<&str> = trace.0.iter().map(|span| span.id.as_str()).collect();
            let parents = trace.0.iter().map(|span| span.parent.as_str());
            let elsewhere: HashSet<&str> = parents.filter(|parent| !ids.contains(parent)).collect();
            if elsewhere.len() <= 1 { Ok(trace) } else { Err(format!("orphans of {elsewhere:?}")) }
        })
        .await
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().expect("nobody panics with it");
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| map(resource.attributes)).unwrap_or_default();
            let service = attributes.get("service.name").cloned().unwrap_or_default();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.push(Span {
                    service: service.clone(),
                    kind: span.kind(),
                    trace_id: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    name: span.name,
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    attributes: map(span.attributes),
                    events: span
                        .events
                        .into_iter()
                        .map(|event| (event.name, map(event.attributes)))
                        .collect(),
                    links: span.links.iter().map(|link| hex(&link.trace_id)).collect(),
                    // 2 is Error.
                    failed: span.status.is_some_and(|status| status.code == 2),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn map(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |attribute: KeyValue| {
        let value = match attribute.value.and_then(|value| value.value) {
            Some(Value::StringValue(text)) => text,
            Some(Value::IntValue(number)) => number.to_string(),
            Some(Value::DoubleValue(number)) => number.to_string(),
            Some(Value::BoolValue(flag)) => flag.to_string(),
            other => format!("{other:?}"),
        };
        (attribute.key, value)
    };
    attributes.into_iter().map(text).collect()
}

/// The spans of one trace.
#[derive(Clone, Debug)]
pub(crate) struct Trace(pub(crate) Vec<Span>);

impl Trace {
    pub(crate) fn named<'a>(&'a self, service: &'a str, name: &'a str) -> impl Iterator<Item = &'a Span> {
        self.0.iter().filter(move |span| span.service == service && span.name == name)
    }

    pub(crate) fn children<'a>(&'a self, parent: &'a Span) -> impl Iterator<Item = &'a Span> {
        self.0.iter().filter(move |span| span.parent == parent.id)
    }

    /// Every span hangs under another one or under `root`, and lies inside its parent in time.
    #[track_caller]
    pub(crate) fn assert_is_a_tree_under(&self, root: &str) {
        let by_id: HashMap<&str, &Span> = self.0.iter().map(|span| (span.id.as_str(), span)).collect();
        assert_eq!(by_id.len(), self.0.len(), "two spans have one id");
        for span in &self.0 {
            assert!(span.start <= span.end, "{span:?}");
            if span.parent == root {
                continue;
            }
            let parent = by_id.get(span.parent.as_str());
            let parent =
                parent.unwrap_or_else(|| panic!("an orphan: {} of {}: {span:?}", span.name, span.service));
            assert!(
                parent.start <= span.start && span.end <= parent.end,
                "{} of {} lies {} ns before and {} ns behind its parent {}",
                span.name,
                span.service,
                parent.start.saturating_sub(span.start),
                span.end.saturating_sub(parent.end),
                parent.name
            );
        }
    }
}
