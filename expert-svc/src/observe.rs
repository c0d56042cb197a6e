//! What is told of each frame: metrics, and spans in the traces of the requests that are in it.

use std::{sync::Arc, time::Instant};

use ids::ExpertId;
use proto::{Error, Frame};
use telemetry::{
    Metrics, Tracer,
    metrics::{Histogram, labels, one},
    names,
    trace::{Anchor, Context, Finished, SpanKind, new_span_id},
};

use crate::{presence::Presence, stream::Streams};

/// When a frame was where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Its bytes were there.
    pub(crate) received: Instant,
    /// It was checked, and waited for its turn.
    pub(crate) queued: Instant,
    pub(crate) started: Instant,
    pub(crate) computed: Instant,
    /// The reply was handed to the transport.
    pub(crate) replied: Instant,
}

/// Who is told.
#[derive(Clone)]
pub(crate) struct Observers {
    queue: Histogram,
    compute: Histogram,
    tracer: Tracer,
}

/// What a frame was, kept for its spans when the frame itself is gone.
pub(crate) struct Traced {
    contexts: Vec<Context>,
    id: u64,
    layer: u32,
    n_rows: usize,
    n_pairs: usize,
    n_bytes: usize,
    experts: String,
}

impl Observers {
    pub(crate) fn new(metrics: &Metrics, tracer: Tracer) -> Self {
        Self {
            queue: metrics.histogram(&names::EXPERT_QUEUE),
            compute: metrics.histogram(&names::EXPERT_COMPUTE),
            tracer,
        }
    }

    /// None for a frame that no trace wants.
    pub(crate) fn traced(&self, frame: &Frame) -> Option<Traced> {
        if frame.traceparents.is_empty() || !self.tracer.is_on() {
            return None;
        }
        let contexts = frame.traceparents.iter().filter_map(|text| Context::parse(text, ""));
        let mut experts: Vec<ExpertId> =
            frame.assignments.iter().map(|assignment| assignment.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        let experts: Vec<String> = experts.iter().map(ToString::to_string).collect();
        Some(Traced {
            contexts: contexts.filter(|context| context.sampled).collect(),
            id: frame.id.0,
            layer: frame.layer.0,
            n_rows: frame.rows.n_rows(),
            n_pairs: frame.assignments.len(),
            n_bytes: frame.rows.n_bytes(),
            experts: experts.join(","),
        })
    }

    /// A frame has been answered.
    pub(crate) fn answered(&self, times: &Times, traced: Option<&Traced>, failure: Option<&Error>) {
        self.queue.observe((times.started - times.queued).as_secs_f64());
        if failure.is_none() {
            self.compute.observe((times.computed - times.started).as_secs_f64());
        }
        let Some(traced) = traced else { return };
        let anchor = Anchor::now();
        let at = |instant| anchor.time(instant);
        for parent in &traced.contexts {
            let context = parent.under(new_span_id());
            let mut span = Finished::new(
                &context,
                parent.span_id,
                SpanKind::Server,
                "shoal.v1.Expert/Dispatch",
                at(times.received),
                at(times.replied),
            )
            .with("rpc.system.name", "grpc")
            .with("shoal.frame", traced.id as i64)
            .with("shoal.layer", i64::from(traced.layer))
            .with("shoal.experts", traced.experts.clone())
            .with("shoal.rows", traced.n_rows as i64)
            .with("shoal.pairs", traced.n_pairs as i64)
            .with("shoal.bytes_in", traced.n_bytes as i64);
            if let Some(error) = failure {
                span = span.failed(&error.reason, &error.message);
            }
            self.tracer.send(span);
            for (name, start, end) in [
                ("receive", times.received, times.queued),
                ("queue", times.queued, times.started),
                ("compute", times.started, times.computed),
                ("reply", times.computed, times.replied),
            ] {
                let child = context.under(new_span_id());
                self.tracer.send(Finished::new(
                    &child,
                    context.span_id,
                    SpanKind::Internal,
                    name,
                    at(start),
                    at(end),
                ));
            }
        }
    }
}

/// Metrics that are read where they are kept.
pub(crate) fn read(metrics: &Metrics, presence: &Arc<Presence>, streams: &Streams) {
    let counters = Arc::clone(&streams.counters);
    metrics.read(&names::EXPERT_FRAMES, move || {
        let counts = counters.counts();
        let failed = counts.frames_failed - counts.frames_late.min(counts.frames_failed);
        // What is under way is in no outcome yet.
        [("computed", counts.frames_computed), ("late", counts.frames_late), ("failed", failed)]
            .map(|(outcome, n)| (labels(&names::EXPERT_FRAMES, [outcome]), n as f64))
            .to_vec()
    });
    let counters = Arc::clone(&streams.counters);
    metrics.read(&names::EXPERT_ROWS, move || one(counters.counts().rows as f64));
    let counters = Arc::clone(&streams.counters);
    metrics.read(&names::EXPERT_PAIRS, move || one(counters.counts().pairs as f64));
    // Not the streams themselves: they hold the queue, and the compute threads end when nobody does.
    let n_open = streams.n_open_later();
    metrics.read(&names::EXPERT_STREAMS, move || one(f64::from(n_open())));
    type Read = fn(&Presence) -> f64;
    let values: [(&names::Metric, Read); 5] = [
        (&names::EXPERT_HELD, |presence| {
            presence.shard().held().holds.layers().map(|(_, experts)| experts.len()).sum::<usize>() as f64
        }),
        (&names::EXPERT_SHARD_BYTES, |presence| presence.shard().held().experts.shard_bytes() as f64),
        (&names::EXPERT_MEMORY_MAX, |presence| presence.shard().memory_bytes_max() as f64),
        (&names::EXPERT_EPOCH, |presence| presence.shard().held().epoch.0 as f64),
        (&names::EXPERT_READY, |presence| {
            f64::from(u8::from(presence.record().state == cluster::State::Ready))
        }),
    ];
    for (metric, read) in values {
        let presence = Arc::clone(presence);
        metrics.read(metric, move || one(read(&presence)));
    }
}
