//! What is held at one moment, and how the next such moment is made: a whole new set is loaded beside the old one and
//! takes its place at once. Frames under way keep the set that they began with.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use arc_swap::ArcSwap;
use cluster::Holds;
use ids::{Epoch, ExpertId};
use model::{Checkpoint, Experts};

/// Some routed experts of one checkpoint.
pub struct Shard {
    checkpoint: Arc<Checkpoint>,
    pinned: Holds,
    memory_bytes_max: u64,
    /// Of the largest expert.
    expert_bytes: u64,
    held: ArcSwap<Held>,
    /// Whoever has it makes the next set.
    changing: Mutex<()>,
    stopped: AtomicBool,
}

/// The experts held at one moment.
pub struct Held {
    pub experts: Experts,
    pub holds: Holds,
    /// 0: nothing was loaded so far.
    pub epoch: Epoch,
}

/// Why the set held stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error(transparent)]
    Load(#[from] model::Error),
    #[error("they have {needed} bytes with what is pinned, at most {max} bytes may be held here")]
    TooLarge { needed: u64, max: u64 },
}

impl Shard {
    /// Holds nothing yet. `pinned`: experts that [`Shard::hold`] always adds, whatever their size.
    #[must_use]
    pub fn new(checkpoint: Arc<Checkpoint>, pinned: &[ExpertId], memory_bytes_max: u64) -> Self {
        let pinned = Holds::of_layers(checkpoint.config().moe_layers(), pinned);
        let config = checkpoint.config();
        let experts = (0..config.n_routed_experts as u32).map(ExpertId);
        let every = config.moe_layers().flat_map(|layer| experts.clone().map(move |expert| (layer, expert)));
        // Files of experts that are not held here may be missing.
        let expert_bytes =
            every.filter_map(|pair| Experts::bytes_of(&checkpoint, [pair]).ok()).max().unwrap_or(0);
        let nothing = Held { experts: Experts::default(), holds: Holds::default(), epoch: Epoch::default() };
        Self {
            checkpoint,
            pinned,
            memory_bytes_max,
            expert_bytes,
            held: ArcSwap::from_pointee(nothing),
            changing: Mutex::default(),
            stopped: AtomicBool::new(false),
        }
    }

    #[must_use]
    pub const fn expert_bytes(&self) -> u64 {
        self.expert_bytes
    }

    /// Holds `wanted` and what is pinned from now on, and nothing else. Takes as long as it takes to read what is new;
    /// at an error, what was held stays.
    ///
    /// # Errors
    /// A tensor that is missing or wrong, or more bytes than may be held.
    pub fn hold(&self, wanted: &Holds) -> Result<Arc<Held>, HoldError> {
        // Guards no data that a panic could leave half written.
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.held();
        let holds: Holds = self.pinned.iter().chain(wanted.iter()).collect();
        if holds == before.holds && before.epoch > Epoch::default() {
            return Ok(before);
        }
        let pairs: Vec<_> = holds.iter().collect();
        if holds != self.pinned {
            let needed = Experts::bytes_of(&self.checkpoint, pairs.iter().copied())?;
            if needed > self.memory_bytes_max {
                return Err(HoldError::TooLarge { needed, max: self.memory_bytes_max });
            }
        }
        let go_on = || !self.stopped.load(Ordering::Relaxed);
        let experts = Experts::load_after(&before.experts, &self.checkpoint, &pairs, &go_on)?;
        let held = Arc::new(Held { experts, holds, epoch: Epoch(before.epoch.0 + 1) });
        self.held.store(Arc::clone(&held));
        Ok(held)
    }

    /// Copies what was loaded from cache files into huge pages, if those were chosen: [`Checkpoint::settle`].
    ///
    /// # Errors
    /// The system gives no memory: what is not copied stays where it is mapped.
    pub fn settle(&self) -> Result<u64, model::Error> {
        self.checkpoint.settle(&|| !self.stopped.load(Ordering::Relaxed))
    }

    /// Bytes of experts that [`Shard::settle`] has not moved yet.
    #[must_use]
    pub fn unsettled_bytes(&self) -> u64 {
        self.checkpoint.unsettled_bytes()
    }

    /// Ends a [`Shard::hold`] or [`Shard::settle`] under way soon: nobody waits for it any more.
    pub fn stop_loading(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn held(&self) -> Arc<Held> {
        self.held.load_full()
    }

    #[must_use]
    pub const fn pinned(&self) -> &Holds {
        &self.pinned
    }

    #[must_use]
    pub const fn memory_bytes_max(&self) -> u64 {
        self.memory_bytes_max
    }

    /// True if its experts are quantized: f32 rows become int8 blocks before they meet them.
    #[must_use]
    pub fn reads_blocks(&self) -> bool {
        self.checkpoint.weights().of_experts().is_some()
    }

    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.checkpoint.config().hidden_size
    }

    /// The checkpoint's fingerprint.
    #[must_use]
    pub fn checkpoint(&self) -> &str {
        self.checkpoint.fingerprint()
    }
}

/// `layers 1-2: experts 0-3`, for messages to people.
#[must_use]
pub fn describe(holds: &Holds) -> String {
    if holds.is_empty() {
        return "nothing".to_owned();
    }
    let lists = holds.layers().map(|(layer, experts)| (layer, experts.iter().copied().collect()));
    cluster::table::describe(&lists.collect())
}
