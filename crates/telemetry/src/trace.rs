//! Traces: contexts that travel with requests and frames, and spans that go to a collector. Spans are made of the SDK's
//! own data and given to its batch processor, which exports on a thread of its own from a bounded queue; nothing here
//! waits. Without a collector nothing is recorded, and contexts still give every request its id.

use std::{
    borrow::Cow,
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Context as Ambient, InstrumentationScope,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanContext, Status, TraceContextExt as _, TraceFlags, TraceState},
};
pub use opentelemetry::{
    KeyValue, SpanId, TraceId, Value,
    trace::{Event, Link, SpanKind},
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{
        IdGenerator as _, RandomIdGenerator, SamplingDecision, ShouldSample as _, SpanData, SpanEvents,
        SpanLinks,
    },
};

use crate::otlp::Exporter;

/// Where a piece of work belongs: W3C trace context, and whether every step of it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace_id: TraceId,
    /// The span that children hang under.
    pub span_id: SpanId,
    pub sampled: bool,
    /// Every step is recorded, not one in so many.
    pub full: bool,
}

const FULL_KEY: &str = "shoal";
const FULL: &str = "full";

struct Headers<'a>(&'a str, &'a str);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(self.0),
            "tracestate" if !self.1.is_empty() => Some(self.1),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

impl Context {
    /// Reads W3C headers. None if they are malformed: then they count as absent.
    #[must_use]
    pub fn parse(traceparent: &str, tracestate: &str) -> Option<Self> {
        // The library takes fields of any length, and signs before digits.
        let lengths = traceparent.trim().split('-').map(str::len).take(4);
        let is_hex = traceparent.trim().bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        if !lengths.eq([2, 32, 16, 2]) || !is_hex {
            return None;
        }
        let extracted = TraceContextPropagator::new()
            .extract_with_context(&Ambient::new(), &Headers(traceparent, tracestate));
        let span = extracted.span();
        let context = span.span_context();
        context.is_valid().then(|| Self {
            trace_id: context.trace_id(),
            span_id: context.span_id(),
            sampled: context.is_sampled(),
            full: context.is_sampled() && context.trace_state().get(FULL_KEY) == Some(FULL),
        })
    }

    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }

    /// Empty if there is nothing to say.
    #[must_use]
    pub fn tracestate(&self) -> &'static str {
        if self.full { "shoal=full" } else { "" }
    }

    /// The same work, under another span.
    #[must_use]
    pub const fn under(self, span_id: SpanId) -> Self {
        Self { span_id, ..self }
    }

    fn span_context(&self) -> SpanContext {
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        SpanContext::new(self.trace_id, self.span_id, flags, false, TraceState::NONE)
    }

    /// As a link from another trace.
    #[must_use]
    pub fn link(&self) -> Link {
        Link::with_context(self.span_context())
    }
}

/// Makes spans of one process. Clones share the way out.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Exporter>>);

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Tracer(on)" } else { "Tracer(off)" })
    }
}

impl Tracer {
    /// Contexts, and no spans.
    #[must_use]
    pub fn off() -> Self {
        Self::default()
    }

    pub(crate) fn to(exporter: Arc<Exporter>) -> Self {
        Self(Some(exporter))
    }

    /// The context of a request that comes in with `caller`'s. A new trace is sampled as configured; one that the caller
    /// began is as the caller says. `full` asks for every step, whoever sampled.
    #[must_use]
    pub fn accept(&self, caller: Option<Context>, full: bool) -> Context {
        let new = || Context {
            trace_id: RandomIdGenerator::default().new_trace_id(),
            span_id: SpanId::INVALID,
            sampled: false,
            full: false,
        };
        let mut context = caller.unwrap_or_else(new);
        let Some(exporter) = &self.0 else {
            // Nothing is recorded here, and nothing downstream on our account.
            return context;
        };
        let parent = caller.map(|caller| Ambient::new().with_remote_span_context(caller.span_context()));
        let decision = exporter
            .sampler
            .should_sample(parent.as_ref(), context.trace_id, "request", &SpanKind::Server, &[], &[])
            .decision;
        context.sampled = full || decision == SamplingDecision::RecordAndSample;
        context.full = context.sampled && (full || context.full);
        context
    }

    /// A span under `parent`, from now until it is dropped. Records nothing unless `parent` is sampled.
    #[must_use]
    pub fn span(&self, parent: &Context, kind: SpanKind, name: impl Into<Cow<'static, str>>) -> Span {
        self.span_at(parent, kind, name, now())
    }

    /// As [`Tracer::span`], from `start`.
    #[must_use]
    pub fn span_at(
        &self,
        parent: &Context,
        kind: SpanKind,
        name: impl Into<Cow<'static, str>>,
        start: SystemTime,
    ) -> Span {
        let recorded = parent.sampled.then(|| self.0.clone()).flatten();
        let Some(exporter) = recorded else {
            return Span { context: *parent, recording: None };
        };
        let context = parent.under(new_span_id());
        let data = Finished::new(&context, parent.span_id, kind, name, start, start);
        Span { context, recording: Some(Recording { data: data.0, exporter }) }
    }

    /// Sends a span that is over.
    pub fn send(&self, span: Finished) {
        if let Some(exporter) = &self.0 {
            exporter.send(span.0);
        }
    }

    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }
}

#[must_use]
pub fn new_span_id() -> SpanId {
    RandomIdGenerator::default().new_span_id()
}

#[must_use]
pub fn new_trace_id() -> TraceId {
    RandomIdGenerator::default().new_trace_id()
}

/// A span whose times and ids its maker knows.
#[derive(Clone, Debug)]
pub struct Finished(Box<SpanData>);

impl Finished {
    #[must_use]
    pub fn new(
        context: &Context,
        parent: SpanId,
        kind: SpanKind,
        name: impl Into<Cow<'static, str>>,
        start: SystemTime,
        end: SystemTime,
    ) -> Self {
        Self(Box::new(SpanData {
            span_context: context.span_context(),
            parent_span_id: parent,
            parent_span_is_remote: kind == SpanKind::Server,
            span_kind: kind,
            name: name.into(),
            start_time: start,
            end_time: end.max(start),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("shoal").build(),
        }))
    }

    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.0.attributes.push(KeyValue::new(key, value));
        self
    }

    #[must_use]
    pub fn with_event(mut self, name: &'static str, at: SystemTime, attributes: Vec<KeyValue>) -> Self {
        self.0.events.events.push(Event::new(name, at, attributes, 0));
        self
    }

    #[must_use]
    pub fn with_link(mut self, to: &Context) -> Self {
        self.0.links.links.push(to.link());
        self
    }

    #[must_use]
    pub fn failed(mut self, error_type: &str, message: &str) -> Self {
        fail(&mut self.0, error_type, message);
        self
    }
}

fn fail(data: &mut SpanData, error_type: &str, message: &str) {
    data.attributes.push(KeyValue::new("error.type", error_type.to_owned()));
    data.status = Status::error(message.to_owned());
}

/// A span that is going on. It ends when it is dropped, on whatever way.
#[derive(Debug)]
pub struct Span {
    context: Context,
    recording: Option<Recording>,
}

struct Recording {
    data: Box<SpanData>,
    exporter: Arc<Exporter>,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.data.name)
    }
}

impl Span {
    /// What children take as their parent.
    #[must_use]
    pub const fn context(&self) -> Context {
        self.context
    }

    #[must_use]
    pub const fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if let Some(recording) = &mut self.recording {
            recording.data.attributes.push(KeyValue::new(key, value));
        }
    }

    pub fn event<const N: usize>(&mut self, name: &'static str, attributes: [(&'static str, String); N]) {
        if let Some(recording) = &mut self.recording {
            let attributes = attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
            recording.data.events.events.push(Event::new(name, now(), attributes, 0));
        }
    }

    /// Marks the work as failed. `error_type` is one of a closed set.
    pub fn fail(&mut self, error_type: &str, message: &str) {
        if let Some(recording) = &mut self.recording {
            fail(&mut recording.data, error_type, message);
        }
    }

    pub fn end(self) {}
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(Recording { mut data, exporter }) = self.recording.take() {
            data.end_time = now().max(data.start_time);
            exporter.send(data);
        }
    }
}

/// The wall clock at one instant: turns the instants of measured work into times.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    instant: Instant,
    time: SystemTime,
}

impl Anchor {
    /// Reads both clocks. Children in one process must lie inside their parents in another: a reading during which the
    /// thread was sent away is done again.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "where both clocks are read together")]
    pub fn now() -> Self {
        let read = || {
            let before = Instant::now();
            let time = now();
            (before.elapsed(), Self { instant: before, time })
        };
        let mut best = read();
        for _ in 0..ANCHOR_READINGS_MAX {
            if best.0 <= ANCHOR_ERROR_MAX {
                break;
            }
            let again = read();
            if again.0 < best.0 {
                best = again;
            }
        }
        best.1
    }

    #[must_use]
    pub fn time(&self, at: Instant) -> SystemTime {
        match at.checked_duration_since(self.instant) {
            Some(after) => self.time + after,
            None => self.time - self.instant.saturating_duration_since(at),
        }
    }
}

/// How long the two readings of an anchor may lie apart, and how often that is tried for.
const ANCHOR_ERROR_MAX: Duration = Duration::from_micros(2);
const ANCHOR_READINGS_MAX: usize = 8;

fn now() -> SystemTime {
    SystemTime::now()
}

/// Microseconds as an attribute.
#[must_use]
pub fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_is_read_and_written_as_w3c_says() {
        let context = Context::parse(PARENT, "").unwrap();
        assert!(context.sampled && !context.full);
        assert_eq!(context.traceparent(), PARENT);
        assert!(Context::parse(PARENT, "other=1,shoal=full").unwrap().full);
        let unsampled = Context::parse(&PARENT.replace("-01", "-00"), "shoal=full").unwrap();
        assert!(!unsampled.sampled && !unsampled.full);
        for malformed in ["", "00-1-2-01", "zz", &PARENT.replace('0', "x"), &format!("{PARENT}-more")] {
            assert_eq!(Context::parse(malformed, ""), None, "{malformed}");
        }
        assert_eq!(Context::parse("00-00000000000000000000000000000000-b7ad6b7169203331-01", ""), None);
    }

    #[test]
    fn without_a_collector_there_are_ids_and_no_spans() {
        let tracer = Tracer::off();
        let (first, second) = (tracer.accept(None, true), tracer.accept(None, true));
        assert!(!first.sampled && first.trace_id != second.trace_id);
        let span = tracer.span(&first, SpanKind::Server, "request");
        assert!(!span.is_recording());
        assert_eq!(span.context().trace_id, first.trace_id);
    }

    #[test]
    fn an_anchor_reaches_both_ways() {
        let anchor = Anchor::now();
        let second = Duration::from_secs(1);
        assert_eq!(anchor.time(anchor.instant + second), anchor.time + second);
        assert_eq!(anchor.time(anchor.instant - second), anchor.time - second);
    }
}
