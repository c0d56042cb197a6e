//! What this server did since it started. Every frame received ends as computed or as failed, on every way out: it
//! carries a [`Receipt`] that counts it as failed when it is dropped.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use proto::Frame;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    frames: AtomicU64,
    frames_failed: AtomicU64,
    frames_late: AtomicU64,
    frames_computed: AtomicU64,
    rows: AtomicU64,
    pairs: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Frames received.
    pub(crate) frames: u64,
    /// Of those, frames answered with a failure or dropped with their stream.
    pub(crate) frames_failed: u64,
    /// Of the failed, frames whose deadline had passed.
    pub(crate) frames_late: u64,
    /// Frames computed.
    pub(crate) frames_computed: u64,
    /// Rows of the frames computed.
    pub(crate) rows: u64,
    /// (row, expert) pairs of the frames computed.
    pub(crate) pairs: u64,
}

impl Counters {
    pub(crate) fn receive(self: &Arc<Self>) -> Receipt {
        self.frames.fetch_add(1, Relaxed);
        Receipt { counters: Arc::clone(self), computed: false }
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            frames: self.frames.load(Relaxed),
            frames_failed: self.frames_failed.load(Relaxed),
            frames_late: self.frames_late.load(Relaxed),
            frames_computed: self.frames_computed.load(Relaxed),
            rows: self.rows.load(Relaxed),
            pairs: self.pairs.load(Relaxed),
        }
    }
}

/// One received frame that is not counted as computed or failed yet.
#[derive(Debug)]
pub(crate) struct Receipt {
    counters: Arc<Counters>,
    computed: bool,
}

impl Receipt {
    pub(crate) fn computed(mut self, frame: &Frame) {
        self.computed = true;
        self.counters.frames_computed.fetch_add(1, Relaxed);
        self.counters.rows.fetch_add(frame.rows.n_rows() as u64, Relaxed);
        self.counters.pairs.fetch_add(frame.assignments.len() as u64, Relaxed);
    }

    /// Counts the frame as failed because its deadline had passed.
    pub(crate) fn late(self) {
        self.counters.frames_late.fetch_add(1, Relaxed);
    }

    /// Counts the frame as failed; as good as dropping it, but said.
    pub(crate) fn failed(self) {
        drop(self);
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if !self.computed {
            self.counters.frames_failed.fetch_add(1, Relaxed);
        }
    }
}
