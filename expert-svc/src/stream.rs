//! One router's dispatch stream: receive → queue → reply. The engine computes.

use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use ids::{Epoch, FrameId, WeightsHash};
use proto::{
    Code, Error, Frame, MESSAGE_BYTES_MAX, Reply,
    frame::{Combine, FRAME_BYTES_MAX},
    v1,
};
use telemetry::Tasks;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    counters::Counters,
    engine::{Clock, Job, Queue},
    slot::{self, Replies, Slot, Slots},
};

/// Frames of one stream that are read but whose replies the transport has not taken. At the limit the stream is not
/// read, and HTTP/2 flow control stops its router.
pub const FRAMES_PER_STREAM_MAX: usize = 8;

/// Dispatch streams open at once, one a router. The next is refused.
pub(crate) const STREAMS_MAX: u32 = 256;

/// Bytes of rows in a reply: what is left of a message holds its other fields with room to spare.
const REPLY_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (1 << 20);

/// What all streams share.
#[derive(Clone)]
pub(crate) struct Streams {
    pub(crate) hidden_size: usize,
    pub(crate) queue: Queue,
    pub(crate) counters: Arc<Counters>,
    pub(crate) clock: Clock,
    pub(crate) tasks: Tasks,
    /// Streams are taken from here on.
    admitting: CancellationToken,
    /// No stream is taken any more, and those that are open end.
    closing: CancellationToken,
    /// A permit each open stream.
    open: Arc<Semaphore>,
}

impl Streams {
    pub(crate) fn new(
        hidden_size: usize,
        queue: Queue,
        counters: Arc<Counters>,
        clock: Clock,
        tasks: Tasks,
    ) -> Self {
        let open = Arc::new(Semaphore::new(STREAMS_MAX as usize));
        let (admitting, closing) = (CancellationToken::new(), CancellationToken::new());
        Self { hidden_size, queue, counters, clock, tasks, admitting, closing, open }
    }

    /// Takes streams from now on: there is something to compute them with.
    pub(crate) fn admit(&self) {
        self.admitting.cancel();
    }

    /// Takes no stream any more, and ends those that are open when what was read of them is answered.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    /// Serves `frames` until they end, they break, or [`Streams::close`].
    pub(crate) fn open(
        &self,
        frames: impl Stream<Item = Result<v1::Frame, Status>> + Send + Unpin + 'static,
    ) -> Result<Replies, Error> {
        if !self.admitting.is_cancelled() {
            return Err(Error::new(
                Code::Unavailable,
                "loading",
                "this expert server is loading its experts",
            ));
        }
        if self.closing.is_cancelled() {
            return Err(Error::new(Code::Unavailable, "draining", "this expert server is draining"));
        }
        let Ok(open) = Arc::clone(&self.open).try_acquire_owned() else {
            let message = format!("{STREAMS_MAX} dispatch streams are open, no more are taken");
            return Err(Error::new(Code::Overloaded, "streams_max", message));
        };
        let (slots, replies) = slot::channel(FRAMES_PER_STREAM_MAX, open);
        self.tasks.spawn("dispatch", self.clone().serve(frames, slots));
        Ok(replies)
    }

    pub(crate) fn n_open(&self) -> u32 {
        n_open(&self.open)
    }

    /// [`Streams::n_open`] for whoever asks after the streams are gone.
    pub(crate) fn n_open_later(&self) -> impl Fn() -> u32 + Send + Sync + 'static {
        let open = Arc::clone(&self.open);
        move || n_open(&open)
    }

    /// Resolves when no stream is open; none can be opened while this waits.
    pub(crate) async fn closed(&self) {
        // An error would say that the semaphore is closed, which nobody does.
        let _all = self.open.acquire_many(STREAMS_MAX).await;
    }

    /// Ends when the router is done or gone, or at [`Streams::close`]: frames not read by then are for the router to send
    /// elsewhere, and the replies end when those that were read are answered.
    async fn serve(self, mut frames: impl Stream<Item = Result<v1::Frame, Status>> + Unpin, slots: Slots) {
        loop {
            // Both waits of `next` are cancel safe: a slot goes back, a frame not yet whole stays in `frames`.
            let next = async {
                let slot = slots.reserve().await?;
                Some((frames.next().await?, slot))
            };
            let received = tokio::select! {
                biased;
                () = self.closing.cancelled() => None,
                () = slots.abandoned() => None,
                received = next => received,
            };
            match received {
                Some((Ok(frame), slot)) => self.receive(frame, slot).await,
                Some((Err(status), slot)) => {
                    tracing::debug!(%status, "dispatch stream broke");
                    return slot.end(status);
                }
                None => return,
            }
        }
    }

    async fn receive(&self, wire: v1::Frame, slot: Slot) {
        let received = (self.clock)();
        let receipt = self.counters.receive();
        let (id, epoch, weights) = (FrameId(wire.id), Epoch(wire.epoch), WeightsHash(wire.weights));
        let failure = |error| Reply { id, epoch, weights, outcome: Err(error) };
        match checked(wire, self.hidden_size) {
            Ok(frame) => {
                let job = Job { frame, received, queued: (self.clock)(), slot, receipt };
                if let Err(Job { slot, receipt, .. }) = self.queue.put(job, self.n_open() == 1).await {
                    receipt.failed();
                    slot.reply(failure(Error::internal("the compute threads have ended")), &*self.clock);
                }
            }
            Err(error) => {
                tracing::debug!(frame = %id, reason = %error.reason, %error, "frame refused");
                receipt.failed();
                let reply = match error.reason.as_ref() {
                    // Nothing that it says is certain. Its id is as good a guess as any.
                    "checksum_mismatch" => {
                        Reply { epoch: Epoch::default(), weights: WeightsHash::default(), ..failure(error) }
                    }
                    _ => failure(error),
                };
                slot.reply(reply, &*self.clock);
            }
        }
    }
}

fn n_open(open: &Semaphore) -> u32 {
    STREAMS_MAX - u32::try_from(open.available_permits()).unwrap_or(STREAMS_MAX)
}

/// A frame whose parts agree and whose reply fits a message.
fn checked(wire: v1::Frame, hidden_size: usize) -> Result<Frame, Error> {
    let frame = Frame::from_wire(wire, hidden_size)?;
    let row_bytes = frame.rows.row_bytes();
    if frame.rows.n_bytes() > FRAME_BYTES_MAX {
        return Err(Error::new(
            Code::TooLarge,
            "frame_too_large",
            format!(
                "the frame has {} rows of {row_bytes} bytes, its limit is {FRAME_BYTES_MAX} bytes",
                frame.rows.n_rows()
            ),
        )
        .with_param("rows"));
    }
    let row_bytes = frame.rows.dtype().of_reply().row_bytes(frame.rows.width());
    if frame.combine == Combine::Pairs && frame.assignments.len().saturating_mul(row_bytes) > REPLY_BYTES_MAX
    {
        return Err(Error::new(
            Code::TooLarge,
            "reply_too_large",
            format!(
                "the reply would have {} rows of {row_bytes} bytes, its limit is {REPLY_BYTES_MAX} bytes",
                frame.assignments.len()
            ),
        )
        .with_param("assignment_row"));
    }
    Ok(frame)
}

#[cfg(test)]
mod tests;
