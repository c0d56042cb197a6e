//! Experts that this router holds itself. Their frames are planned, counted and combined like any server's, and computed by
//! the engine's threads while the flight lands, instead of being sent.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use cluster::{Holder, Holds};
use ids::{ExpertId, FrameId, InstanceId};
use model::Checkpoint;
use proto::{Code, Error, Frame, Reply, frame::Computed};
use shard::{HoldError, Shard};

/// Why a frame was not computed that somebody else's reply has made superfluous.
pub(crate) const NOT_NEEDED: &str = "not_needed";

pub(crate) struct Inside {
    instance: InstanceId,
    shard: Arc<Shard>,
    /// Ordered and not computed yet, and since when: empty when the last flight has landed.
    due: VecDeque<(Frame, Instant)>,
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
            inside: true,
        }
    }

    pub(crate) const fn instance(&self) -> &InstanceId {
        &self.instance
    }

    pub(crate) fn put(&mut self, frame: Frame, now: Instant) {
        self.due.push_back((frame, now));
    }

    /// The frames that are due.
    pub(crate) fn due(&self) -> impl Iterator<Item = &Frame> {
        self.due.iter().map(|(frame, _)| frame)
    }

    /// Computes the frame that was put first, if that is still `needed`, with the threads that this is called on.
    pub(crate) fn reply(
        &mut self,
        needed: impl Fn(FrameId) -> bool,
        clock: impl Fn() -> Instant,
    ) -> Option<(InstanceId, Reply)> {
        let (frame, put_at) = self.due.pop_front()?;
        let began = clock();
        let combined = if needed(frame.id) {
            shard::guarded(&frame, |frame| self.shard.compute(frame))
        } else {
            Err(Error::new(Code::Unavailable, NOT_NEEDED, "somebody else has answered"))
        };
        let outcome = combined.map(|combined| Computed {
            rows: combined.rows,
            overflow_rows: combined.overflow_rows,
            compute_time: clock().saturating_duration_since(began),
            queue_time: began.saturating_duration_since(put_at),
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
