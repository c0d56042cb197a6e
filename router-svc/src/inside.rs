//! Experts that this router holds itself. Their frames are planned, counted and combined like any server's, and computed by
//! the engine's threads while the flight lands, instead of being sent.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use cluster::{Holder, Holds};
use ids::{ExpertId, InstanceId};
use model::Checkpoint;
use proto::{Frame, Reply, frame::Computed};
use shard::{HoldError, Shard};

pub(crate) struct Inside {
    instance: InstanceId,
    shard: Arc<Shard>,
    /// Ordered and not computed yet: empty when a flight has landed.
    due: VecDeque<Frame>,
}

impl Inside {
    /// Holds nothing yet.
    pub(crate) fn new(instance: InstanceId, checkpoint: Arc<Checkpoint>, experts: &[ExpertId]) -> Self {
        // Nobody but the command line says what it holds, whatever the size.
        let shard = Arc::new(Shard::new(checkpoint, experts, 0));
        Self { instance, shard, due: VecDeque::new() }
    }

    /// For whoever loads them, and may have to stop that.
    pub(crate) fn shard(&self) -> &Arc<Shard> {
        &self.shard
    }

    /// As the table has it; `address` is the router's.
    pub(crate) fn holder(&self, address: &str) -> Holder {
        let held = self.shard.held();
        let weights = |(layer, expert)| Some(((layer, expert), held.experts.weights(layer, expert)?));
        Holder {
            instance: self.instance.clone(),
            address: address.to_owned(),
            epoch: held.epoch,
            holds: held.holds.iter().filter_map(weights).collect(),
            draining: false,
            reads_blocks: self.shard.reads_blocks(),
        }
    }

    pub(crate) const fn instance(&self) -> &InstanceId {
        &self.instance
    }

    pub(crate) fn put(&mut self, frame: Frame) {
        self.due.push_back(frame);
    }

    pub(crate) fn is_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// Computes the frame that was put first, with the threads that this is called on; gives whose reply it is, too.
    pub(crate) fn reply(&mut self, clock: impl Fn() -> Instant) -> Option<(InstanceId, Reply)> {
        let frame = self.due.pop_front()?;
        let began = clock();
        let combined = shard::guarded(&frame, |frame| self.shard.compute(frame));
        let outcome = combined.map(|combined| Computed {
            rows: combined.rows,
            overflow_rows: combined.overflow_rows,
            compute_time: clock().saturating_duration_since(began),
            queue_time: Duration::ZERO,
        });
        let reply = Reply { id: frame.id, epoch: frame.epoch, weights: frame.weights, outcome };
        Some((self.instance.clone(), reply))
    }
}

/// Loads what `shard` is to hold; gives up soon after [`Shard::stop_loading`].
pub(crate) async fn load(shard: Arc<Shard>) -> anyhow::Result<()> {
    let loaded: Result<_, HoldError> =
        tokio::task::spawn_blocking(move || shard.hold(&Holds::default())).await?;
    let held = loaded?;
    tracing::info!(
        holds = shard::describe(&held.holds),
        shard_bytes = held.experts.shard_bytes(),
        "experts inside"
    );
    Ok(())
}
