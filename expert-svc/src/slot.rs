//! The way back to a router: a bounded channel of replies in which a place is taken before a frame is read. So a
//! computed reply never waits for a slow router, and a router that does not read its replies is not read either.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use proto::{Reply, v1};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tonic::Status;

type Item = Result<v1::Reply, Status>;

/// Where the places for one stream's replies come from.
#[derive(Debug)]
pub(crate) struct Slots(mpsc::Sender<Item>);

/// A place for one reply. Dropped unused, it is free again.
#[derive(Debug)]
pub(crate) struct Slot {
    place: mpsc::OwnedPermit<Item>,
    replies: mpsc::Sender<Item>,
}

/// One stream's replies as the transport takes them. It ends, cleanly, when [`Slots`] and every [`Slot`] are gone.
#[derive(Debug)]
pub(crate) struct Replies {
    replies: mpsc::Receiver<Item>,
    /// The stream counts as open until the transport is done with it or has dropped it.
    _open: OwnedSemaphorePermit,
}

pub(crate) fn channel(slots_max: usize, open: OwnedSemaphorePermit) -> (Slots, Replies) {
    let (sender, replies) = mpsc::channel(slots_max);
    (Slots(sender), Replies { replies, _open: open })
}

impl Slots {
    /// Waits for a place; None when nobody will read it. Cancel safe: a place not handed out stays free.
    pub(crate) async fn reserve(&self) -> Option<Slot> {
        let place = self.0.clone().reserve_owned().await.ok()?;
        Some(Slot { place, replies: self.0.clone() })
    }

    /// Resolves when nobody will read a reply any more.
    pub(crate) async fn abandoned(&self) {
        self.0.closed().await;
    }
}

impl Slot {
    /// The stream is gone: nobody will read the reply.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.replies.is_closed()
    }

    /// Gives the time at which the reply was about to be handed over: the router has it later than that.
    pub(crate) fn reply(self, reply: Reply, clock: &dyn Fn() -> Instant) -> Instant {
        let wire = reply.into_wire();
        let now = clock();
        self.place.send(Ok(wire));
        now
    }

    /// Ends the stream with an error instead of a reply.
    pub(crate) fn end(self, status: Status) {
        self.place.send(Err(status));
    }
}

impl Stream for Replies {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        self.replies.poll_recv(cx)
    }
}
