//! What a service is handed when it starts.

use std::{sync::Arc, time::Instant};

use crate::{
    Tasks,
    metrics::Metrics,
    otlp::{self, BadOptions, Exporter, Options},
    trace::Tracer,
};

/// One running service process: who it is, its tasks, and what it tells about itself.
#[derive(Clone)]
pub struct Process {
    /// Random; another one after every start.
    pub instance: String,
    pub tasks: Tasks,
    pub metrics: Metrics,
    pub tracer: Tracer,
    exporter: Option<Arc<Exporter>>,
}

impl Process {
    /// Call it inside the runtime.
    ///
    /// # Errors
    /// Trace options that cannot be followed.
    pub fn start(
        service: &'static str,
        version: &'static str,
        instance: String,
        traces: &Options,
    ) -> Result<Self, BadOptions> {
        let metrics = Metrics::new(service, now(), version);
        let (tracer, exporter) = otlp::start(traces, service, &instance, version, &metrics)?;
        Ok(Self { instance, tasks: Tasks::new(), metrics, tracer, exporter })
    }

    /// One that tells nothing: for services in tests.
    #[must_use]
    pub fn quiet(instance: &str, tasks: Tasks) -> Self {
        let (metrics, tracer) = (Metrics::default(), Tracer::off());
        Self { instance: instance.to_owned(), tasks, metrics, tracer, exporter: None }
    }

    /// Sends the spans that are left, for at most two seconds. Blocks: call it outside the runtime's threads.
    pub fn finish(&self) {
        if let Some(exporter) = &self.exporter {
            exporter.shutdown();
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a process starts: an edge")]
fn now() -> Instant {
    Instant::now()
}
