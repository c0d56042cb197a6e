//! What a step did → the spans of the requests in it. Made after the step, so that what was slow or went wrong can be
//! recorded though nobody knew it before. A step is shared, a trace is not: each traced request gets spans of its own
//! for the rows that are its, and a span for the whole step, in a trace of its own, links to them.

use std::{
    ops::Range,
    time::{Duration, Instant, SystemTime},
};

use cluster::RoutingTable;
use ids::LayerId;
use telemetry::{
    Tracer,
    trace::{Anchor, Context, Finished, KeyValue, SpanId, SpanKind, micros, new_span_id, new_trace_id},
};

use crate::flight::log::{Attempt, Ending, Kind, Log};

/// Which steps of a sampled request are recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// So many from the first.
    pub(crate) steps_first: u64,
    /// Then one in so many.
    pub(crate) step_every: u64,
}

/// Most spans of one request, those of its servers not counted. What comes after are its steps without their layers.
const SPANS_PER_REQUEST_MAX: usize = 20_000;

/// A step of this many times the usual is recorded whenever it comes.
const SLOW_FACTOR: u32 = 3;
const SLOW_MIN: Duration = Duration::from_millis(5);

/// The trace that one sequence belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trail {
    /// Under the router's own span for the request.
    pub(crate) context: Context,
    /// Steps so far, prefill included.
    n_steps: u64,
    n_spans: usize,
    /// Since when it waits for its first step, or for the first after a preemption.
    pub(crate) queued_at: Option<Instant>,
}

impl Trail {
    pub(crate) const fn new(context: Context, now: Instant) -> Self {
        Self { context, n_steps: 0, n_spans: 0, queued_at: Some(now) }
    }

    /// It is known beforehand that the next step is recorded: the servers are told.
    pub(crate) fn wants_next(&self, policy: Policy, is_prefill: bool) -> bool {
        let by_turn = || {
            self.n_steps < policy.steps_first
                || policy.step_every > 0 && self.n_steps.is_multiple_of(policy.step_every)
        };
        self.context.sampled && (self.context.full || is_prefill || by_turn())
    }
}

/// How a step's rows went through the layers.
#[derive(Debug, Default)]
pub(crate) struct PassLog {
    /// In two half-batches.
    pub(crate) in_halves: bool,
    /// One for each layer and batch.
    pub(crate) layers: Vec<LayerLog>,
}

/// What one layer did with one batch of a step. While one waits for its experts, the other's layer may be attended to.
#[derive(Debug)]
pub(crate) struct LayerLog {
    pub(crate) layer: LayerId,
    /// Of the step.
    pub(crate) rows: Range<usize>,
    pub(crate) started: Instant,
    pub(crate) attended: Instant,
    /// Of layers with routed experts.
    pub(crate) dispatch: Option<DispatchLog>,
    pub(crate) ended: Instant,
}

impl LayerLog {
    /// How many of these rows of the step are among its own.
    fn rows_of(&self, rows: &Range<usize>) -> usize {
        self.rows.end.min(rows.end).saturating_sub(self.rows.start.max(rows.start))
    }
}

#[derive(Debug)]
pub(crate) struct DispatchLog {
    /// The gate has chosen; other threads may have begun with the shared experts.
    pub(crate) dispatched: Instant,
    /// The shared experts are done, and the frames were sent before.
    pub(crate) shared: Instant,
    pub(crate) landed: Instant,
    /// Rows that the gate sent to each expert.
    pub(crate) rows_by_expert: Vec<u32>,
    pub(crate) log: Log,
}

/// One sequence's part in a step.
pub(crate) struct Part<'a> {
    pub(crate) trail: &'a mut Trail,
    pub(crate) rows: Range<usize>,
    pub(crate) position: usize,
    pub(crate) is_prefill: bool,
    /// It was known beforehand.
    pub(crate) wanted: bool,
    /// Why the step did not count for it.
    pub(crate) failure: Option<(&'static str, String)>,
}

/// One step.
pub(crate) struct StepLog<'a> {
    pub(crate) number: u64,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) n_rows: usize,
    pub(crate) n_sequences: usize,
    pub(crate) pass: &'a PassLog,
    /// Of the step's beginning: who may have been lost meanwhile is in it.
    pub(crate) table: &'a RoutingTable,
}

/// How long steps of a size usually take: a moving average by powers of two of their rows.
#[derive(Debug, Default)]
pub(crate) struct Usual(Vec<Option<Duration>>);

impl Usual {
    /// True if the step took much longer than such steps did so far.
    pub(crate) fn is_slow(&mut self, n_rows: usize, took: Duration) -> bool {
        let class = n_rows.max(1).ilog2() as usize;
        if self.0.len() <= class {
            self.0.resize(class + 1, None);
        }
        let usual = &mut self.0[class];
        let slow = usual.is_some_and(|usual| took > (usual * SLOW_FACTOR).max(SLOW_MIN));
        *usual = Some(usual.map_or(took, |usual| usual.mul_f32(0.95) + took.mul_f32(0.05)));
        slow
    }
}

/// Sends the spans of every part that is to be recorded, and counts the step for all.
pub(crate) fn record(tracer: &Tracer, step: &StepLog<'_>, slow: bool, parts: Vec<Part<'_>>) {
    let anchor = Anchor::now();
    let writer = Writer { tracer, anchor, step, slow };
    let whole = Context { trace_id: new_trace_id(), span_id: new_span_id(), sampled: true, full: false };
    let mut recorded = Vec::new();
    for part in parts {
        let first = part.trail.n_steps;
        part.trail.n_steps += 1;
        if part.wanted || part.failure.is_some() || slow || writer.is_remarkable(&part) {
            recorded.push(writer.part(part, first, &whole));
        }
    }
    if recorded.is_empty() {
        return;
    }
    let mut span = Finished::new(
        &whole,
        SpanId::INVALID,
        SpanKind::Internal,
        "step",
        anchor.time(step.started),
        anchor.time(step.ended),
    )
    .with("shoal.step", step.number as i64)
    .with("shoal.rows", step.n_rows as i64)
    .with("shoal.sequences", step.n_sequences as i64)
    .with("shoal.half_batches", step.pass.in_halves)
    .with("shoal.slow", slow);
    for context in &recorded {
        span = span.with_link(context);
    }
    tracer.send(span);
}

/// The wait of a sequence for its first step.
pub(crate) fn record_queue(tracer: &Tracer, trail: &mut Trail, until: Instant) {
    let Some(since) = trail.queued_at.take() else { return };
    if trail.context.sampled {
        let anchor = Anchor::now();
        let context = trail.context.under(new_span_id());
        let (start, end) = (anchor.time(since), anchor.time(until));
        tracer.send(Finished::new(&context, trail.context.span_id, SpanKind::Internal, "queue", start, end));
    }
}

struct Writer<'a> {
    tracer: &'a Tracer,
    anchor: Anchor,
    step: &'a StepLog<'a>,
    slow: bool,
}

impl Writer<'_> {
    fn is_remarkable(&self, part: &Part<'_>) -> bool {
        let flights = self.step.pass.layers.iter().filter_map(|layer| layer.dispatch.as_ref());
        let mut attempts = flights.flat_map(|dispatch| &dispatch.log.attempts);
        attempts.any(|attempt| attempt.is_remarkable() && touches(attempt, &part.rows))
    }

    fn time(&self, at: Instant) -> SystemTime {
        self.anchor.time(at)
    }

    /// One request's step with its layers; gives the context of its span.
    fn part(&self, part: Part<'_>, n_steps: u64, whole: &Context) -> Context {
        let step = self.step;
        let parent = part.trail.context;
        let context = parent.under(new_span_id());
        let name = if part.is_prefill { "prefill" } else { "decode" };
        let (start, end) = (self.time(step.started), self.time(step.ended));
        let mut span = Finished::new(&context, parent.span_id, SpanKind::Internal, name, start, end)
            .with("shoal.step", step.number as i64)
            .with("shoal.step_of_request", n_steps as i64)
            .with("shoal.position", part.position as i64)
            .with("shoal.rows", part.rows.len() as i64)
            .with("shoal.batch_rows", step.n_rows as i64)
            .with("shoal.batch_sequences", step.n_sequences as i64)
            .with("shoal.slow", self.slow)
            .with_link(whole);
        if let Some((error_type, message)) = &part.failure {
            span = span.failed(error_type, message);
        }
        let mut n_spans = 1;
        if part.trail.n_spans < SPANS_PER_REQUEST_MAX {
            for layer in step.pass.layers.iter().filter(|layer| layer.rows_of(&part.rows) > 0) {
                n_spans += self.layer(layer, &context, &part);
            }
        } else {
            span = span.with("shoal.layers_left_out", true);
        }
        part.trail.n_spans += n_spans;
        self.tracer.send(span);
        context
    }

    fn layer(&self, layer: &LayerLog, parent: &Context, part: &Part<'_>) -> usize {
        let context = parent.under(new_span_id());
        let (start, end) = (self.time(layer.started), self.time(layer.ended));
        let mut span = Finished::new(&context, parent.span_id, SpanKind::Internal, "layer", start, end)
            .with("shoal.layer", i64::from(layer.layer.0))
            .with("shoal.rows", layer.rows_of(&part.rows) as i64)
            .with("shoal.attend_us", micros(layer.attended - layer.started));
        let mut n_spans = 1;
        if let Some(dispatch) = &layer.dispatch {
            span = span
                .with("shoal.gate_us", micros(dispatch.dispatched - layer.attended))
                .with("shoal.shared_us", micros(dispatch.shared - dispatch.dispatched))
                .with("shoal.wait_us", micros(dispatch.landed - dispatch.shared))
                .with("shoal.combine_us", micros(layer.ended - dispatch.landed));
            for attempt in dispatch.log.attempts.iter().filter(|attempt| touches(attempt, &part.rows)) {
                if let Some(cause) = &attempt.cause {
                    let attributes = vec![
                        KeyValue::new("shoal.cause", cause.clone()),
                        KeyValue::new("shoal.server", attempt.holder.to_string()),
                    ];
                    span = span.with_event(attempt.kind.as_str(), self.time(attempt.sent_at), attributes);
                }
                self.attempt(attempt, layer.layer, dispatch.landed, &context, part);
                n_spans += 1;
            }
            for ejection in &dispatch.log.ejections {
                let attributes = vec![
                    KeyValue::new("shoal.cause", ejection.cause.clone()),
                    KeyValue::new("shoal.server", ejection.holder.to_string()),
                ];
                span = span.with_event("ejection", self.time(ejection.at), attributes);
            }
        }
        self.tracer.send(span);
        n_spans
    }

    fn attempt(&self, attempt: &Attempt, layer: LayerId, landed: Instant, parent: &Context, part: &Part<'_>) {
        let context = parent.under(attempt.span_id);
        let start = self.time(attempt.sent_at);
        let end = self.time(attempt.ended_at.unwrap_or(landed));
        let experts: Vec<String> = attempt.experts.iter().map(ToString::to_string).collect();
        let (kind, name) = match attempt.inside {
            true => (SpanKind::Internal, "experts inside"),
            false => (SpanKind::Client, "shoal.v1.Expert/Dispatch"),
        };
        let mut span = Finished::new(&context, parent.span_id, kind, name, start, end);
        if !attempt.inside {
            span = span.with("rpc.system.name", "grpc");
        }
        span = span
            .with("shoal.server", attempt.holder.to_string())
            .with("shoal.frame", attempt.frame_id.0 as i64)
            .with("shoal.layer", i64::from(layer.0))
            .with("shoal.experts", experts.join(","))
            .with("shoal.rows", attempt.rows.len() as i64)
            .with("shoal.pairs", attempt.n_pairs as i64)
            .with("shoal.as_pairs", attempt.as_pairs)
            .with("shoal.bytes_out", attempt.bytes_out as i64)
            .with("shoal.attempt", attempt.kind.as_str())
            .with("shoal.hedged", attempt.kind == Kind::Hedge)
            .with("shoal.retried", attempt.kind == Kind::Failover)
            .with("shoal.server_traced", part.wanted && !attempt.inside);
        if let Some(holder) = self.step.table.holder(&attempt.holder) {
            span = span.with("server.address", holder.address.clone());
        }
        if let Some(cause) = &attempt.cause {
            span = span.with("shoal.cause", cause.clone());
        }
        span = match &attempt.ending {
            Ending::Outrun => span.with("shoal.outcome", "outrun"),
            Ending::Answered { queue, compute, bytes_in } => span
                .with("shoal.outcome", "answered")
                .with("shoal.bytes_in", *bytes_in as i64)
                .with("shoal.server_queue_us", micros(*queue))
                .with("shoal.server_compute_us", micros(*compute)),
            Ending::Failed { reason, message } => {
                span.with("shoal.outcome", "failed").failed(reason, message)
            }
        };
        self.tracer.send(span);
    }
}

fn touches(attempt: &Attempt, rows: &Range<usize>) -> bool {
    let first = attempt.rows.partition_point(|&row| row < rows.start);
    attempt.rows.get(first).is_some_and(|row| rows.contains(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_slow_by_its_size() {
        let mut usual = Usual::default();
        let ms = Duration::from_millis;
        assert!(!usual.is_slow(1, ms(4)));
        assert!(!usual.is_slow(64, ms(200)), "the first of its size says what is usual");
        assert!(!usual.is_slow(1, ms(11)));
        assert!(usual.is_slow(1, ms(20)));
        assert!(!usual.is_slow(100, ms(300)));
    }
}
