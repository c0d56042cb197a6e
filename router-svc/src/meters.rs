//! The router's metrics: what the engine observes after each step, and what is read from the status at a scrape.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use cluster::RoutingTable;
use ids::{InstanceId, LayerId, Version};
use proto::v1;
use telemetry::{
    Metrics,
    metrics::{Counter, Histogram, Histograms, Reading, labels, one},
    names::{self, Metric},
};

use crate::{
    flight::log::{Attempt, Ending, Kind},
    spans::{LayerLog, StepLog},
};

/// (layer, expert) pairs up to which each has a series of its own unless the flags say otherwise.
const EXPERT_SERIES_DEFAULT_MAX: usize = 4096;

/// Why frames fail. A server says its reason itself: what is not here is counted as the last.
const FAILURE_REASONS: [&str; 15] = [
    "transport",
    "stream_ended",
    "link_down",
    "dispatch_timeout",
    "deadline_exceeded",
    "checksum_mismatch",
    "weights_mismatch",
    "stale_reply",
    "not_finite",
    "expert_not_held",
    "loading",
    "draining",
    "internal",
    "invalid_value",
    "other",
];

/// What the engine's thread observes.
pub(crate) struct Meters {
    queue: Histogram,
    step: Histogram,
    step_rows: Histogram,
    step_sequences: Histogram,
    halved: Counter,
    layers: HashMap<LayerId, Layer>,
    frames: Vec<(Kind, Counter)>,
    failures: Vec<(&'static str, Counter)>,
    round_trip: Histograms,
    compute: Histograms,
    servers: HashMap<InstanceId, Server>,
    /// Of the table that `servers` follows.
    followed: Version,
}

struct Layer {
    seconds: Histogram,
    bytes_out: Counter,
    bytes_in: Counter,
    rows: Arc<Rows>,
}

/// Rows of one layer by expert.
#[derive(Debug)]
struct Rows(Vec<AtomicU64>);

struct Server {
    address: String,
    round_trip: Histogram,
    compute: Histogram,
}

impl Meters {
    /// `each_expert`: a series for every (layer, expert) pair; None: if they are few.
    pub(crate) fn new(
        metrics: &Metrics,
        layers: impl Iterator<Item = LayerId>,
        n_experts: usize,
        each_expert: Option<bool>,
    ) -> Self {
        let dispatch = metrics.histograms(&names::ROUTER_DISPATCH);
        let bytes = metrics.counters(&names::ROUTER_DISPATCH_BYTES);
        let layers: HashMap<LayerId, Layer> = layers
            .map(|layer| {
                let name = layer.to_string();
                let bytes = |direction| {
                    bytes.get_or_create_owned(&labels(&names::ROUTER_DISPATCH_BYTES, [&name, direction]))
                };
                let meters = Layer {
                    seconds: dispatch.get_or_create_owned(&labels(&names::ROUTER_DISPATCH, [&name])),
                    bytes_out: bytes("out"),
                    bytes_in: bytes("in"),
                    rows: Arc::new(Rows((0..n_experts).map(|_| AtomicU64::new(0)).collect())),
                };
                (layer, meters)
            })
            .collect();
        let mut by_layer: Vec<(LayerId, Arc<Rows>)> =
            layers.iter().map(|(&layer, meters)| (layer, Arc::clone(&meters.rows))).collect();
        by_layer.sort_unstable_by_key(|(layer, _)| *layer);
        let imbalance = by_layer.clone();
        metrics.read(&names::ROUTER_IMBALANCE, move || {
            imbalance
                .iter()
                .map(|(layer, rows)| reading(&names::ROUTER_IMBALANCE, layer, rows.imbalance()))
                .collect()
        });
        if each_expert.unwrap_or(layers.len() * n_experts <= EXPERT_SERIES_DEFAULT_MAX) {
            metrics.read(&names::ROUTER_EXPERT_ROWS, move || {
                let of_layer = |(layer, rows): &(LayerId, Arc<Rows>)| rows.readings(*layer);
                by_layer.iter().flat_map(of_layer).collect()
            });
        }
        let frames = metrics.counters(&names::ROUTER_FRAMES);
        let failures = metrics.counters(&names::ROUTER_FRAME_FAILURES);
        let failure =
            |reason| (reason, failures.get_or_create_owned(&labels(&names::ROUTER_FRAME_FAILURES, [reason])));
        let kind =
            |kind: Kind| (kind, frames.get_or_create_owned(&labels(&names::ROUTER_FRAMES, [kind.as_str()])));
        Self {
            queue: metrics.histogram(&names::ROUTER_QUEUE),
            step: metrics.histogram(&names::ROUTER_STEP),
            step_rows: metrics.histogram(&names::ROUTER_STEP_ROWS),
            step_sequences: metrics.histogram(&names::ROUTER_STEP_SEQUENCES),
            halved: metrics.counter(&names::ROUTER_HALVED),
            layers,
            frames: Kind::ALL.map(kind).to_vec(),
            failures: FAILURE_REASONS.map(failure).to_vec(),
            round_trip: metrics.histograms(&names::ROUTER_FRAME),
            compute: metrics.histograms(&names::ROUTER_FRAME_COMPUTE),
            servers: HashMap::new(),
            followed: Version(0),
        }
    }

    pub(crate) fn queued(&self, waited: Duration) {
        self.queue.observe(waited.as_secs_f64());
    }

    pub(crate) fn step(&mut self, step: &StepLog<'_>) {
        self.follow(step.table);
        self.step.observe((step.ended - step.started).as_secs_f64());
        self.step_rows.observe(step.n_rows as f64);
        self.step_sequences.observe(step.n_sequences as f64);
        self.halved.inc_by(u64::from(step.pass.in_halves));
        step.pass.layers.iter().for_each(|layer| self.layer(layer));
    }

    fn layer(&self, log: &LayerLog) {
        let (Some(dispatch), Some(layer)) = (&log.dispatch, self.layers.get(&log.layer)) else { return };
        layer.seconds.observe((dispatch.landed - dispatch.dispatched).as_secs_f64());
        layer.rows.add(&dispatch.rows_by_expert);
        for attempt in &dispatch.log.attempts {
            layer.bytes_out.inc_by(attempt.bytes_out as u64);
            self.attempt(attempt, layer);
        }
    }

    fn attempt(&self, attempt: &Attempt, layer: &Layer) {
        if let Some((_, sent)) = self.frames.iter().find(|(kind, _)| *kind == attempt.kind) {
            sent.inc();
        }
        match &attempt.ending {
            Ending::Outrun => {}
            Ending::Answered { compute, bytes_in, .. } => {
                layer.bytes_in.inc_by(*bytes_in as u64);
                if let (Some(server), Some(ended_at)) = (self.servers.get(&attempt.holder), attempt.ended_at)
                {
                    server.round_trip.observe((ended_at - attempt.sent_at).as_secs_f64());
                    server.compute.observe(compute.as_secs_f64());
                }
            }
            Ending::Failed { reason, .. } => {
                let known = self.failures.iter().find(|(known, _)| known == reason);
                if let Some((_, failed)) = known.or_else(|| self.failures.last()) {
                    failed.inc();
                }
            }
        }
    }

    /// A series for each server of the table, by its address: a restart makes no new one, and one that is gone has none.
    fn follow(&mut self, table: &RoutingTable) {
        if self.followed == table.version() {
            return;
        }
        self.followed = table.version();
        let listed: HashMap<InstanceId, String> = table
            .holders()
            .filter(|holder| !holder.inside)
            .map(|holder| (holder.instance.clone(), holder.address.clone()))
            .collect();
        let gone: Vec<Server> = self
            .servers
            .extract_if(|instance, _| !listed.contains_key(instance))
            .map(|(_, server)| server)
            .collect();
        for Server { address, .. } in gone {
            if !listed.values().any(|other| *other == address) {
                self.round_trip.remove(&labels(&names::ROUTER_FRAME, [&address]));
                self.compute.remove(&labels(&names::ROUTER_FRAME_COMPUTE, [&address]));
            }
        }
        for (instance, address) in listed {
            let (round_trip, compute) = (&self.round_trip, &self.compute);
            self.servers.entry(instance).or_insert_with(|| Server {
                round_trip: round_trip.get_or_create_owned(&labels(&names::ROUTER_FRAME, [&address])),
                compute: compute.get_or_create_owned(&labels(&names::ROUTER_FRAME_COMPUTE, [&address])),
                address,
            });
        }
    }
}

fn reading(metric: &Metric, layer: &LayerId, value: f64) -> Reading {
    (labels(metric, [&layer.to_string()]), value)
}

impl Rows {
    fn add(&self, rows: &[u32]) {
        for (sum, &rows) in self.0.iter().zip(rows).filter(|(_, rows)| **rows > 0) {
            sum.fetch_add(u64::from(rows), Relaxed);
        }
    }

    /// Rows of the busiest over the mean; 1 before there are any.
    fn imbalance(&self) -> f64 {
        let counts = || self.0.iter().map(|count| count.load(Relaxed) as f64);
        let sum: f64 = counts().sum();
        if sum == 0.0 { 1.0 } else { counts().fold(0.0, f64::max) * self.0.len() as f64 / sum }
    }

    fn readings(&self, layer: LayerId) -> Vec<Reading> {
        let layer = layer.to_string();
        let reading = |(expert, count): (usize, &AtomicU64)| {
            let labels = labels(&names::ROUTER_EXPERT_ROWS, [&layer, &expert.to_string()]);
            (labels, count.load(Relaxed) as f64)
        };
        self.0.iter().enumerate().map(reading).collect()
    }
}

/// The status, made once for the many metrics of one scrape.
struct Fresh<F> {
    make: F,
    last: Mutex<Option<(Instant, Arc<v1::RouterStatus>)>>,
}

const FRESH_FOR: Duration = Duration::from_millis(50);

impl<F: Fn(Instant) -> v1::RouterStatus> Fresh<F> {
    #[expect(clippy::disallowed_methods, reason = "a scrape is an edge")]
    fn get(&self) -> Arc<v1::RouterStatus> {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, status)) if now.saturating_duration_since(*at) < FRESH_FOR => Arc::clone(status),
            _ => {
                let status = Arc::new((self.make)(now));
                *last = Some((now, Arc::clone(&status)));
                status
            }
        }
    }
}

/// The servers of a router's status that are not that router itself.
fn of_others(status: &v1::RouterStatus) -> impl Iterator<Item = &v1::ExpertServer> {
    status.servers.iter().filter(|server| server.transport != "inside")
}

/// Metrics that the status has.
pub(crate) fn read_status(
    metrics: &Metrics,
    status: impl Fn(Instant) -> v1::RouterStatus + Send + Sync + 'static,
) {
    type Read = fn(&v1::RouterStatus) -> f64;
    let status = Arc::new(Fresh { make: status, last: Mutex::new(None) });
    let values: [(&Metric, Read); 14] = [
        (&names::ROUTER_RUNNING, |status| f64::from(status.running)),
        (&names::ROUTER_WAITING, |status| f64::from(status.waiting)),
        (&names::ROUTER_TOKENS, |status| status.tokens_out as f64),
        (&names::ROUTER_PREEMPTIONS, |status| status.preemptions as f64),
        (&names::ROUTER_DEGRADED, |status| status.sequences_degraded as f64),
        (&names::ROUTER_PAGES, |status| f64::from(status.pages)),
        (&names::ROUTER_PAGES_IN_USE, |status| f64::from(status.pages_in_use)),
        (&names::ROUTER_STALE, |status| status.stale_replies as f64),
        (&names::ROUTER_EJECTIONS, |status| status.ejections as f64),
        (&names::ROUTER_MISSING, |status| {
            status.missing.iter().map(|layer| layer.experts.len()).sum::<usize>() as f64
        }),
        (&names::ROUTER_UNDER_REPLICATED, |status| f64::from(status.under_replicated)),
        (&names::ROUTER_READY, |status| f64::from(u8::from(status.ready))),
        (&names::ROUTER_LEADER, |status| f64::from(u8::from(status.leader))),
        (&names::ROUTER_PLACEMENT, |status| status.placement as f64),
    ];
    for (metric, read) in values {
        let status = Arc::clone(&status);
        metrics.read(metric, move || one(read(&status.get())));
    }
    let servers = Arc::clone(&status);
    metrics.read(&names::ROUTER_SERVERS, move || {
        let status = servers.get();
        ["connecting", "ready", "ejected", "draining", "refused"]
            .map(|state| {
                let n = of_others(&status).filter(|server| server.state == state).count();
                (labels(&names::ROUTER_SERVERS, [state]), n as f64)
            })
            .to_vec()
    });
    type ReadServer = fn(&v1::ExpertServer) -> f64;
    let by_server: [(&'static Metric, ReadServer); 2] = [
        (&names::ROUTER_SERVER_UP, |server| f64::from(u8::from(server.state == "ready"))),
        (&names::ROUTER_SERVER_OWED, |server| server.frames_in_flight as f64),
    ];
    for (metric, read) in by_server {
        let status = Arc::clone(&status);
        metrics.read(metric, move || {
            let status = status.get();
            // An address may be listed twice for a moment, by a server and by the one that came before it.
            let mut by_address: Vec<(&str, f64)> = Vec::new();
            for server in of_others(&status) {
                let value = read(server);
                match by_address.iter_mut().find(|(address, _)| *address == server.address) {
                    Some((_, known)) => *known = known.max(value),
                    None => by_address.push((&server.address, value)),
                }
            }
            by_address.into_iter().map(|(address, value)| (labels(metric, [address]), value)).collect()
        });
    }
}
