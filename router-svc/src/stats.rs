//! What the engine last reported, for anybody to read without asking it.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use cluster::health::Summary;
use ids::InstanceId;

use crate::{flight::Counts, remote::Remote, scheduler::Scheduler};

/// A turn longer than this means that the engine hangs; the router is not ready then.
const TURN_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) running: AtomicUsize,
    pub(crate) waiting: AtomicUsize,
    pub(crate) pages_in_use: AtomicUsize,
    pub(crate) steps: AtomicU64,
    pub(crate) tokens_out: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    pub(crate) sequences_degraded: AtomicU64,
    dispatch: Mutex<Dispatch>,
    calibrated: AtomicBool,
    turn_began: Mutex<Option<Instant>>,
}

/// What became of the frames so far, and how the servers do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dispatch {
    pub(crate) counts: Counts,
    pub(crate) hedges: u64,
    pub(crate) failovers: u64,
    pub(crate) ejections: u64,
    pub(crate) servers: HashMap<InstanceId, Summary>,
}

impl Stats {
    /// The engine's own loop calls this after every turn.
    pub(crate) fn publish(&self, scheduler: &Scheduler, remote: &Remote) {
        self.running.store(scheduler.running().len(), Relaxed);
        self.waiting.store(scheduler.n_waiting(), Relaxed);
        self.pages_in_use.store(scheduler.pages_in_use(), Relaxed);
        self.preemptions.store(scheduler.n_preemptions(), Relaxed);
        let health = remote.health();
        let servers = remote.view().table.holders().map(|holder| holder.instance.clone()).collect::<Vec<_>>();
        *lock(&self.dispatch) = Dispatch {
            counts: remote.counts().clone(),
            hedges: health.hedges.n_spent(),
            failovers: health.failovers.n_spent(),
            ejections: health.n_ejections(),
            servers: servers
                .into_iter()
                .map(|instance| (instance.clone(), health.summary(&instance)))
                .collect(),
        };
    }

    pub(crate) fn dispatch(&self) -> Dispatch {
        lock(&self.dispatch).clone()
    }

    pub(crate) fn count_step(&self) {
        self.steps.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_token(&self) {
        self.tokens_out.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_degraded(&self) {
        self.sequences_degraded.fetch_add(1, Relaxed);
    }

    pub(crate) fn set_calibrated(&self) {
        self.calibrated.store(true, Relaxed);
    }

    pub(crate) fn is_calibrated(&self) -> bool {
        self.calibrated.load(Relaxed)
    }

    pub(crate) fn begin_turn(&self, now: Instant) {
        *lock(&self.turn_began) = Some(now);
    }

    pub(crate) fn end_turn(&self) {
        *lock(&self.turn_began) = None;
    }

    /// True if the engine has been in one turn for too long.
    pub(crate) fn hangs(&self, now: Instant) -> bool {
        let began = *lock(&self.turn_began);
        began.is_some_and(|began| now.saturating_duration_since(began) > TURN_MAX)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
