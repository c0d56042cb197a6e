//! What the engine last reported, for anybody to read without asking it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::{remote::Remote, scheduler::Scheduler};

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
    pub(crate) stale_replies: AtomicU64,
    calibrated: AtomicBool,
    turn_began: Mutex<Option<Instant>>,
}

impl Stats {
    /// The engine's own loop calls this after every turn.
    pub(crate) fn publish(&self, scheduler: &Scheduler, remote: &Remote) {
        self.running.store(scheduler.running().len(), Relaxed);
        self.waiting.store(scheduler.n_waiting(), Relaxed);
        self.pages_in_use.store(scheduler.pages_in_use(), Relaxed);
        self.preemptions.store(scheduler.n_preemptions(), Relaxed);
        self.stale_replies.store(remote.n_stale_replies(), Relaxed);
    }

    pub(crate) fn count_step(&self) {
        self.steps.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_token(&self) {
        self.tokens_out.fetch_add(1, Relaxed);
    }

    pub(crate) fn set_calibrated(&self) {
        self.calibrated.store(true, Relaxed);
    }

    pub(crate) fn is_calibrated(&self) -> bool {
        self.calibrated.load(Relaxed)
    }

    pub(crate) fn begin_turn(&self, now: Instant) {
        *self.turn_began.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    pub(crate) fn end_turn(&self) {
        *self.turn_began.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// True if the engine has been in one turn for too long.
    pub(crate) fn hangs(&self, now: Instant) -> bool {
        let began = *self.turn_began.lock().unwrap_or_else(PoisonError::into_inner);
        began.is_some_and(|began| now.saturating_duration_since(began) > TURN_MAX)
    }
}
