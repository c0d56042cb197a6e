//! The sync core: frames of all streams wait in one bounded queue and are computed one after the other, each by all
//! threads. Knows no gRPC and no tensors.
//!
//! One at a time, because a frame alone can use the whole memory bandwidth, and because two at once would finish late
//! together. A short one that finds nobody before it, and no other stream, is computed by the thread that read it: handing it over
//! and its reply back would wake two threads, which can take as long as computing it.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use model::Threads;
use proto::{Code, Error, Frame, Reply, frame::Computed};
use shard::Combined;
use tokio::sync::{mpsc, oneshot};

use crate::{
    counters::Receipt,
    observe::{Observers, Times},
    slot::Slot,
};

/// Frames of all streams that wait to be computed, at most 4 MiB of rows each. When the queue is full, streams are
/// not read.
pub(crate) const FRAMES_QUEUED_MAX: usize = 64;

/// Weights that a frame may read where it was received: some milliseconds, in which that thread, and whatever else of this
/// process waits for it, does nothing else. What takes longer gains little from not being handed over.
const SHORT_BYTES_MAX: u64 = 128 << 20;

/// (row, expert) pairs of a frame that may be computed where it was read, each with other weights.
pub(crate) fn short_pairs_max(expert_bytes: u64) -> usize {
    usize::try_from(SHORT_BYTES_MAX / expert_bytes.max(1)).unwrap_or(usize::MAX).min(64)
}

pub(crate) type Compute = dyn Fn(&Frame) -> Result<Combined, Error> + Send + Sync;
pub(crate) type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// A frame with all that its answer needs.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) frame: Frame,
    /// The frame's timeout runs from here.
    pub(crate) received: Instant,
    pub(crate) queued: Instant,
    pub(crate) slot: Slot,
    pub(crate) receipt: Receipt,
}

/// The compute threads. They end when every clone of the queue is dropped and what it held is answered.
#[derive(Debug)]
pub(crate) struct Engine {
    queue: Queue,
    ended: oneshot::Receiver<()>,
}

/// The way to the compute threads.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    jobs: mpsc::Sender<Job>,
    core: Arc<Core>,
}

/// What computes, one frame at a time.
struct Core {
    threads: Threads,
    compute: Box<Compute>,
    clock: Clock,
    observers: Observers,
    short_pairs_max: usize,
    /// Held by whoever computes.
    seat: Mutex<()>,
    /// Frames that were put into the queue and have not yet the seat.
    waiting: AtomicUsize,
}

impl Engine {
    /// Frames of up to `short_pairs_max` pairs may be computed by the thread that puts them into the queue.
    pub(crate) fn start(
        threads: Threads,
        compute: Box<Compute>,
        clock: Clock,
        observers: Observers,
        short_pairs_max: usize,
    ) -> io::Result<Self> {
        let (sender, mut jobs) = mpsc::channel::<Job>(FRAMES_QUEUED_MAX);
        let (ending, ended) = oneshot::channel();
        let core = Arc::new(Core {
            threads,
            compute,
            clock,
            observers,
            short_pairs_max,
            seat: Mutex::default(),
            waiting: AtomicUsize::new(0),
        });
        let queue = Queue { jobs: sender, core: Arc::clone(&core) };
        // This thread computes too, and what is too small to share is computed without another one being woken.
        let serve = move || {
            while let Some(job) = jobs.blocking_recv() {
                let _seat = core.seat.lock().unwrap_or_else(PoisonError::into_inner);
                core.waiting.fetch_sub(1, Ordering::Relaxed);
                core.run(job);
            }
            drop(ending);
        };
        thread::Builder::new().name("expert".to_owned()).spawn(serve)?;
        Ok(Self { queue, ended })
    }

    pub(crate) fn queue(&self) -> Queue {
        self.queue.clone()
    }

    /// Waits until everything queued is answered and every other clone of the queue is dropped.
    pub(crate) async fn end(self) {
        drop(self.queue);
        // An error says that the sender is gone: that is the end waited for.
        let _ended = self.ended.await;
    }
}

impl Queue {
    /// Has `job` answered, at once or later; gives it back when the compute threads have ended. `alone` if no other stream
    /// than the job's is open: what others send meanwhile should be read, and how long it waits be seen.
    pub(crate) async fn put(&self, job: Job, alone: bool) -> Result<(), Job> {
        let left = if alone { self.run_here(job) } else { Some(job) };
        let Some(job) = left else {
            // Its reply leaves before this thread takes another frame.
            tokio::task::yield_now().await;
            return Ok(());
        };
        let Ok(place) = self.jobs.reserve().await else { return Err(job) };
        self.core.waiting.fetch_add(1, Ordering::Relaxed);
        place.send(job);
        Ok(())
    }

    /// Computes it now, if it is short and nobody is before it; gives it back if not.
    fn run_here(&self, job: Job) -> Option<Job> {
        let Core { seat, waiting, short_pairs_max, .. } = &*self.core;
        if job.frame.assignments.len() > *short_pairs_max || waiting.load(Ordering::Relaxed) > 0 {
            return Some(job);
        }
        let _seat = match seat.try_lock() {
            Ok(seat) => seat,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Some(job),
        };
        self.core.run(job);
        None
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Core {
    fn run(&self, job: Job) {
        self.threads.install(|| job.run(&*self.compute, &*self.clock, &self.observers));
    }
}

impl Job {
    fn run(self, compute: &Compute, clock: &dyn Fn() -> Instant, observers: &Observers) {
        // The router left: its frame is dropped uncomputed.
        if self.slot.is_abandoned() {
            return;
        }
        let Self { frame, received, queued, slot, receipt } = self;
        let traced = observers.traced(&frame);
        let started = clock();
        let waited = started.duration_since(received);
        let outcome = match frame.timeout {
            Some(timeout) if waited > timeout => {
                receipt.late();
                Err(late(&frame, waited, timeout))
            }
            Some(_) | None => {
                let outcome = shard::guarded(&frame, compute);
                // Counted before it is sent: who has the reply sees it in the counters.
                match &outcome {
                    Ok(_) => receipt.computed(&frame),
                    Err(_) => receipt.failed(),
                }
                outcome.map(|combined| Computed {
                    rows: combined.rows,
                    overflow_rows: combined.overflow_rows,
                    compute_time: clock().duration_since(started),
                    queue_time: started.duration_since(queued),
                })
            }
        };
        // The weights that computed it are those that it asked for: with any others it is not computed.
        let computed = clock();
        let failure = outcome.as_ref().err().cloned();
        let reply = Reply { id: frame.id, epoch: frame.epoch, weights: frame.weights, outcome };
        let replied = slot.reply(reply, clock);
        let times = Times { received, queued, started, computed, replied };
        observers.answered(&times, traced.as_ref(), failure.as_ref());
    }
}

fn late(frame: &Frame, waited: Duration, timeout: Duration) -> Error {
    Error::new(
        Code::DeadlineExceeded,
        "deadline_exceeded",
        format!("frame {} waited {waited:?} to be computed, its timeout is {timeout:?}", frame.id),
    )
}
