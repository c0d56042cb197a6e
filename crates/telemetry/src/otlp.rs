//! The way out for spans: OTLP over gRPC or HTTP, from the SDK's batch processor. A collector that is down or hangs costs
//! spans, which are counted, and nothing else.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use opentelemetry::KeyValue;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, hyper::HyperClient};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SpanData, SpanExporter as Export, SpanProcessor as _,
    },
};
use tokio::runtime::Handle;

use crate::{
    metrics::{Metrics, labels},
    names,
    trace::Tracer,
};

/// Spans that wait for export; further ones are dropped. About 32 MiB at most.
const QUEUE_SPANS_MAX: usize = 1 << 16;
const BATCH_SPANS_MAX: usize = 1024;
/// How long a finished span may wait for others before it is sent.
const BATCH_DELAY: Duration = Duration::from_millis(500);
/// What the end of the process spends on spans that are left.
const SHUTDOWN_MAX: Duration = Duration::from_secs(2);
const COMPLAINT_INTERVAL: Duration = Duration::from_mins(1);

/// Where spans go and which.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `http://host:4317` (gRPC) or `http://host:4318` (HTTP). None: as `OTEL_EXPORTER_OTLP_*` say, or nowhere.
    pub endpoint: Option<String>,
    /// Share of the traces that begin here. None: as `OTEL_TRACES_SAMPLER` says, or all.
    pub sample: Option<f64>,
}

/// Options that cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum BadOptions {
    #[error("{name} is {value:?}, wanted {wanted}")]
    Value { name: &'static str, value: String, wanted: &'static str },
    #[error("cannot export traces to {endpoint}: {source}")]
    Exporter { endpoint: String, source: opentelemetry_otlp::ExporterBuildError },
}

pub(crate) struct Exporter {
    pub(crate) sampler: Sampler,
    processor: BatchSpanProcessor,
    recorded: AtomicU64,
    fate: Arc<Fate>,
}

/// What became of spans that reached the exporter.
#[derive(Debug, Default)]
struct Fate {
    exported: AtomicU64,
    failed: AtomicU64,
    complained_at: Mutex<Option<Instant>>,
}

impl Exporter {
    pub(crate) fn send(&self, span: Box<SpanData>) {
        self.recorded.fetch_add(1, Relaxed);
        self.processor.on_end(*span);
    }

    /// Sends what is left, as far as the collector takes it in time.
    pub(crate) fn shutdown(&self) {
        if let Err(error) = self.processor.shutdown_with_timeout(SHUTDOWN_MAX) {
            tracing::debug!(%error, "spans were left unsent");
        }
    }

    fn count(self: &Arc<Self>, metrics: &Metrics) {
        let exporter = Arc::clone(self);
        metrics.read(&names::SPANS, move || {
            let Fate { exported, failed, .. } = &*exporter.fate;
            [("recorded", &exporter.recorded), ("exported", exported), ("failed", failed)]
                .map(|(outcome, count)| (labels(&names::SPANS, [outcome]), count.load(Relaxed) as f64))
                .to_vec()
        });
    }
}

/// Begins to export, if that is asked for. Call it inside the runtime.
///
/// # Errors
/// An endpoint or a variable that cannot be read.
pub(crate) fn start(
    options: &Options,
    service: &'static str,
    instance: &str,
    version: &'static str,
    metrics: &Metrics,
) -> Result<(Tracer, Option<Arc<Exporter>>), BadOptions> {
    let endpoint = options
        .endpoint
        .clone()
        .or_else(|| variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
        .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
        || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
    let Some(endpoint) = endpoint.filter(|_| !disabled) else { return Ok((Tracer::off(), None)) };
    let fate = Arc::new(Fate::default());
    let counted = Counted { exporter: exporter(options, &endpoint)?, fate: Arc::clone(&fate) };
    let mut batches = BatchConfigBuilder::default();
    if variable("OTEL_BSP_MAX_QUEUE_SIZE").is_none() {
        batches = batches.with_max_queue_size(QUEUE_SPANS_MAX);
    }
    if variable("OTEL_BSP_MAX_EXPORT_BATCH_SIZE").is_none() {
        batches = batches.with_max_export_batch_size(BATCH_SPANS_MAX);
    }
    if variable("OTEL_BSP_SCHEDULE_DELAY").is_none() {
        batches = batches.with_scheduled_delay(BATCH_DELAY);
    }
    let mut processor = BatchSpanProcessor::new(counted, batches.build());
    processor.set_resource(&resource(service, instance, version));
    let exporter =
        Arc::new(Exporter { sampler: sampler(options)?, processor, recorded: AtomicU64::new(0), fate });
    exporter.count(metrics);
    Ok((Tracer::to(Arc::clone(&exporter)), Some(exporter)))
}

/// `endpoint` is the flag's or a variable's; of the latter the library makes the URL itself.
fn exporter(options: &Options, endpoint: &str) -> Result<SpanExporter, BadOptions> {
    let flag = options.endpoint.as_deref();
    let protocol = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]
        .into_iter()
        .find_map(|name| variable(name).map(|value| (name, value)));
    let http = match protocol {
        Some((_, value)) if value == "grpc" => false,
        Some((_, value)) if value == "http/protobuf" => true,
        Some((name, value)) => {
            return Err(BadOptions::Value { name, value, wanted: "grpc or http/protobuf" });
        }
        // The ports are assigned.
        None => endpoint.contains(":4318") || endpoint.ends_with("/v1/traces"),
    };
    let built = if http {
        let client = OnRuntime {
            client: HyperClient::with_default_connector(Duration::from_secs(10), None),
            runtime: Handle::current(),
        };
        let builder =
            SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_http_client(client);
        match flag {
            Some(endpoint) => builder.with_endpoint(traces_url(endpoint)).build(),
            None => builder.build(),
        }
    } else {
        let builder = SpanExporter::builder().with_tonic();
        match flag {
            Some(endpoint) => builder.with_endpoint(endpoint).build(),
            None => builder.build(),
        }
    };
    built.map_err(|source| BadOptions::Exporter { endpoint: endpoint.to_owned(), source })
}

/// An endpoint without a path is the collector's, to which the signal's path is added.
fn traces_url(endpoint: &str) -> String {
    let after_scheme = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    match after_scheme.split_once('/') {
        None | Some((_, "")) => format!("{}/v1/traces", endpoint.trim_end_matches('/')),
        Some(_) => endpoint.to_owned(),
    }
}

fn sampler(options: &Options) -> Result<Sampler, BadOptions> {
    let ratio = |name: &'static str, value: String| {
        let wrong = || BadOptions::Value { name, value: value.clone(), wanted: "a number from 0 to 1" };
        value.parse::<f64>().ok().filter(|ratio| (0.0..=1.0).contains(ratio)).ok_or_else(wrong)
    };
    let parent_based = |root: Sampler| Sampler::ParentBased(Box::new(root));
    if let Some(sample) = options.sample {
        return Ok(parent_based(Sampler::TraceIdRatioBased(sample)));
    }
    let argument = || {
        variable("OTEL_TRACES_SAMPLER_ARG").map_or(Ok(1.0), |value| ratio("OTEL_TRACES_SAMPLER_ARG", value))
    };
    Ok(match variable("OTEL_TRACES_SAMPLER").as_deref() {
        None | Some("parentbased_always_on") => parent_based(Sampler::AlwaysOn),
        Some("parentbased_always_off") => parent_based(Sampler::AlwaysOff),
        Some("parentbased_traceidratio") => parent_based(Sampler::TraceIdRatioBased(argument()?)),
        Some("always_on") => Sampler::AlwaysOn,
        Some("always_off") => Sampler::AlwaysOff,
        Some("traceidratio") => Sampler::TraceIdRatioBased(argument()?),
        Some(other) => {
            return Err(BadOptions::Value {
                name: "OTEL_TRACES_SAMPLER",
                value: other.to_owned(),
                wanted: "one of OpenTelemetry's always_on, always_off, traceidratio, with or without parentbased_",
            });
        }
    })
}

fn resource(service: &'static str, instance: &str, version: &'static str) -> Resource {
    let mut resource = Resource::builder().with_attributes([
        KeyValue::new("service.namespace", "shoal"),
        KeyValue::new("service.instance.id", instance.to_owned()),
        KeyValue::new("service.version", version),
    ]);
    let named = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES")
            .is_some_and(|attributes| attributes.contains("service.name="));
    if !named {
        resource = resource.with_service_name(format!("shoal-{service}"));
    }
    resource.build()
}

/// One of OpenTelemetry's own variables, which are named by its specification; empty is absent.
#[expect(clippy::disallowed_methods, reason = "a standard's variables, which every flag of ours goes before")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Sends requests on the runtime, whoever waits for them: the batch processor's thread has none.
#[derive(Debug)]
struct OnRuntime {
    client: HyperClient,
    runtime: Handle,
}

#[async_trait::async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        self.runtime.spawn(async move { client.send_bytes(request).await }).await?
    }
}

/// Counts what an exporter does, and says once in a while that it fails.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    fate: Arc<Fate>,
}

impl<E: Export> Export for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let n = batch.len() as u64;
        let result = self.exporter.export(batch).await;
        match &result {
            Ok(()) => self.fate.exported.fetch_add(n, Relaxed),
            Err(error) => {
                let now = now();
                let mut complained_at =
                    self.fate.complained_at.lock().unwrap_or_else(PoisonError::into_inner);
                if complained_at.is_none_or(|at| now.saturating_duration_since(at) >= COMPLAINT_INTERVAL) {
                    *complained_at = Some(now);
                    tracing::warn!(%error, spans = n, "the trace collector takes no spans; they are dropped");
                }
                self.fate.failed.fetch_add(n, Relaxed)
            }
        };
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[expect(clippy::disallowed_methods, reason = "the exporter's thread is an edge")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_needs_no_path() {
        for (endpoint, url) in [
            ("http://c:4318", "http://c:4318/v1/traces"),
            ("http://c:4318/", "http://c:4318/v1/traces"),
            ("http://c/otlp/v1/traces", "http://c/otlp/v1/traces"),
        ] {
            assert_eq!(traces_url(endpoint), url);
        }
    }
}
