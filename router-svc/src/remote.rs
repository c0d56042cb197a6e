//! The engine's side of the links: sends what a flight orders and waits for what comes back. The only place where the
//! engine's thread waits for the network.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use cluster::RoutingTable;
use ids::InstanceId;
use proto::{Code, Error, Reply, frame::Combine, v1};
use tokio::sync::mpsc::{Sender, error::TrySendError};

use crate::{
    dispatch::Activations,
    flight::{Flight, FrameIds, Landed, Order, Surroundings},
};

/// Frames that may wait on one link. A layer orders one frame a server, a few for long batches; a link that is this
/// far behind has failed.
pub(crate) const LINK_FRAMES_MAX: usize = 256;

/// The table of the moment and a way to every holder in it. Swapped as a whole by the one writer in `link`.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) table: RoutingTable,
    pub(crate) links: HashMap<InstanceId, Sender<v1::Frame>>,
}

/// What links tell the engine. The channel is unbounded; frames in flight bound it.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    Reply(Reply),
    /// The stream to this instance ended; sent after the view without it is in place.
    Broken {
        instance: InstanceId,
        error: Error,
    },
}

pub(crate) struct Remote {
    view: Arc<ArcSwap<View>>,
    events: mpsc::Receiver<LinkEvent>,
    ids: FrameIds,
    dispatch_timeout: Duration,
    n_stale_replies: u64,
}

impl Remote {
    pub(crate) fn new(
        view: Arc<ArcSwap<View>>,
        events: mpsc::Receiver<LinkEvent>,
        dispatch_timeout: Duration,
    ) -> Self {
        Self { view, events, ids: FrameIds::default(), dispatch_timeout, n_stale_replies: 0 }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Sends the frames of one layer.
    pub(crate) fn dispatch(
        &mut self,
        activations: Activations,
        rows: impl IntoIterator<Item = usize>,
        combine: Combine,
    ) -> Flight {
        // Whatever arrives between layers belongs to a flight that has landed. Breaks among it are in the view already.
        while let Ok(event) = self.events.try_recv() {
            self.n_stale_replies += u64::from(matches!(event, LinkEvent::Reply(_)));
        }
        let view = self.view();
        let mut around = Surroundings { table: &view.table, ids: &mut self.ids };
        let (mut flight, orders) = Flight::launch(activations, rows, combine, &mut around);
        self.send(&mut flight, orders);
        flight
    }

    /// Waits until every row is home or lost.
    pub(crate) fn land(&mut self, mut flight: Flight) -> Landed {
        let mut deadline = now() + self.dispatch_timeout;
        while !flight.is_home() {
            let event = self.events.recv_timeout(deadline.saturating_duration_since(now()));
            let view = self.view();
            let mut around = Surroundings { table: &view.table, ids: &mut self.ids };
            let orders = match event {
                Ok(LinkEvent::Reply(reply)) => flight.accept(reply, &mut around).unwrap_or_else(|| {
                    self.n_stale_replies += 1;
                    Vec::new()
                }),
                Ok(LinkEvent::Broken { instance, error }) => {
                    flight.lose_holder(&instance, error, &mut around)
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    deadline = now() + self.dispatch_timeout;
                    flight.expire(&mut around)
                }
                // The links are gone: the process is ending. What is outstanding counts as lost.
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            };
            self.send(&mut flight, orders);
        }
        flight.land()
    }

    fn send(&mut self, flight: &mut Flight, orders: Vec<Order>) {
        let mut orders = VecDeque::from(orders);
        while let Some(Order { holder, mut frame }) = orders.pop_front() {
            frame.timeout = Some(self.dispatch_timeout);
            let view = self.view();
            let why = match view.links.get(&holder).map(Sender::try_reserve) {
                Some(Ok(place)) => {
                    place.send(frame.into_wire());
                    continue;
                }
                Some(Err(TrySendError::Full(()))) => {
                    format!("{LINK_FRAMES_MAX} frames wait on the link to {holder}")
                }
                Some(Err(TrySendError::Closed(()))) | None => format!("the link to {holder} is down"),
            };
            let error = Error::new(Code::Unavailable, "link_down", why);
            let mut around = Surroundings { table: &view.table, ids: &mut self.ids };
            orders.extend(flight.lose_holder(&holder, error, &mut around));
            orders.retain(|order| order.holder != holder);
        }
    }

    pub(crate) const fn n_stale_replies(&self) -> u64 {
        self.n_stale_replies
    }
}

#[expect(clippy::disallowed_methods, reason = "waiting for the network is an edge")]
fn now() -> Instant {
    Instant::now()
}
