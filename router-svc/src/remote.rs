//! The engine's side of the links: sends what a flight orders and waits for what comes back. The only place where the
//! engine's thread waits for the network.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use cluster::{Health, RoutingTable, health};
use ids::{ExpertId, InstanceId, LayerId, Version};
use proto::{Code, Error, Frame, Reply, frame::Combine, v1};
use telemetry::trace::new_span_id;
use tokio::{
    sync::{
        Notify,
        mpsc::{Sender, UnboundedReceiver, error::TrySendError},
    },
    time::timeout,
};

use crate::{
    dispatch::Activations,
    event_loop::EventLoop,
    flight::{
        Counts, FrameIds, Landed, Order, Surroundings,
        aloft::{Aloft, Ticket},
    },
    inside::Inside,
};

/// Frames that may wait on one link. A layer orders one frame a server, a few for long batches; a link that is this
/// far behind has failed.
pub(crate) const LINK_FRAMES_MAX: usize = 256;

/// The table of the moment and a way to every holder in it. Swapped as a whole by the one writer in `link`.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) table: RoutingTable,
    pub(crate) links: HashMap<InstanceId, Way>,
}

/// The engine's end of a link.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) frames: Sender<v1::Frame>,
    /// Told when nothing comes back: the link is to be made again.
    pub(crate) given_up: Arc<Notify>,
    /// The server is on another host, as far as this one can tell.
    pub(crate) elsewhere: bool,
}

/// What links tell the engine. The channel is unbounded; frames in flight and what happens to servers bound it.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    Reply {
        instance: InstanceId,
        reply: Reply,
        /// When it came, whenever the engine hears of it.
        at: Instant,
    },
    /// The stream to this instance ended; sent after the view without it is in place.
    Broken { instance: InstanceId, error: Error },
    /// The view has another table; sent after it is in place.
    Table,
}

pub(crate) struct Remote {
    /// Shared with nobody but a turn of it, during which the rest of this is used too.
    event_loop: Arc<EventLoop>,
    view: Arc<ArcSwap<View>>,
    events: UnboundedReceiver<LinkEvent>,
    health: Health,
    /// Of the table that `health` follows.
    followed: Version,
    ids: FrameIds,
    counts: Counts,
    aloft: Aloft,
    dispatch_timeout: Duration,
    inside: Option<Inside>,
}

/// What a socket takes at once with Linux's defaults. What is more goes on while the engine computes.
const SOCKET_BYTES: usize = 64 << 10;
/// Of an assignment in a frame, at most.
const ASSIGNMENT_BYTES: usize = 12;

/// What a wait for replies takes at least.
const LISTEN_MIN: Duration = Duration::from_millis(1);
/// Waking so much too late is no matter of a busy core.
const MISSED_MIN: Duration = Duration::from_millis(250);

fn is_large(frame: &Frame) -> bool {
    frame.rows.n_bytes() + frame.assignments.len() * ASSIGNMENT_BYTES > SOCKET_BYTES
}

impl Remote {
    pub(crate) fn new(
        event_loop: EventLoop,
        view: Arc<ArcSwap<View>>,
        events: UnboundedReceiver<LinkEvent>,
        dispatch_timeout: Duration,
        limits: health::Limits,
        inside: Option<Inside>,
    ) -> Self {
        Self {
            event_loop: Arc::new(event_loop),
            view,
            events,
            health: Health::new(limits),
            followed: Version(0),
            ids: FrameIds::new(u64::from_be_bytes(new_span_id().to_bytes())),
            counts: Counts::default(),
            aloft: Aloft::default(),
            dispatch_timeout,
            inside,
        }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Serves the links until `awaited` is there, or until `limit` is over.
    pub(crate) fn wait<T>(&self, awaited: impl Future<Output = T>, limit: Duration) -> Option<T> {
        self.event_loop.run(async { timeout(limit, awaited).await.ok() })
    }

    /// The experts of `layer` that nobody holds, of `n_experts`.
    pub(crate) fn missing(&self, layer: LayerId, n_experts: usize) -> Vec<ExpertId> {
        self.view.load().table.missing_of(layer, n_experts)
    }

    /// True if some server may be on another host.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.view.load().links.values().any(|way| way.elsewhere)
    }

    /// Runs `decide` on what is aloft, with the table and the time of the moment.
    fn decide<T>(&mut self, decide: impl FnOnce(&mut Aloft, &mut Surroundings<'_>) -> T) -> T {
        self.decide_on(now(), decide)
    }

    /// The same about something that came at `heard_at`.
    fn decide_on<T>(
        &mut self,
        heard_at: Instant,
        decide: impl FnOnce(&mut Aloft, &mut Surroundings<'_>) -> T,
    ) -> T {
        let view = self.view();
        let now = now();
        if self.followed != view.table.version() {
            self.followed = view.table.version();
            let instances = view.table.holders().map(|holder| &holder.instance);
            self.health.follow(instances, now);
        }
        let mut around = Surroundings {
            table: &view.table,
            health: &mut self.health,
            ids: &mut self.ids,
            counts: &mut self.counts,
            now,
            heard_at,
            dispatch_timeout: self.dispatch_timeout,
        };
        decide(&mut self.aloft, &mut around)
    }

    /// Sends the frames of one layer. Another layer's may be in the air.
    pub(crate) fn dispatch(
        &mut self,
        activations: Activations,
        rows: impl IntoIterator<Item = usize>,
        combine: Combine,
    ) -> Ticket {
        self.hear_all();
        let (ticket, orders) = self.decide(|aloft, around| aloft.launch(activations, rows, combine, around));
        let mut leave = orders.iter().filter(|order| !self.is_inside(&order.holder)).peekable();
        if leave.peek().is_none() {
            self.send(orders);
            return ticket;
        }
        let is_large = leave.any(|order| is_large(&order.frame));
        // On their way before anything else is computed.
        let event_loop = Arc::clone(&self.event_loop);
        event_loop.turn(|| self.send(orders));
        if is_large {
            self.event_loop.hand_over();
        }
        ticket
    }

    /// Of a flight that has not landed.
    pub(crate) fn activations(&self, ticket: &Ticket) -> &Activations {
        self.aloft.activations(ticket)
    }

    /// Waits until every row of that flight is home or lost.
    pub(crate) fn land(&mut self, ticket: Ticket) -> Landed {
        loop {
            // What was heard may have ejected somebody whom this flight, too, waits for.
            self.order(Aloft::look_again);
            self.compute_inside(&ticket);
            if self.aloft.is_home(&ticket) {
                let landed = self.aloft.land(ticket);
                if !self.aloft.is_empty() {
                    // The other half's frames go on, and its replies are read, while this one attends.
                    self.event_loop.hand_over();
                }
                return landed;
            }
            let wake_at = [self.aloft.next_tick(), self.health.next_tick()].into_iter().flatten().min();
            let began = now();
            let wait = wake_at.map_or(self.dispatch_timeout, |at| at.saturating_duration_since(began));
            // Sockets are read before anybody is late, who may have answered while this thread computed.
            let wait = wait.max(LISTEN_MIN);
            match self.event_loop.run(async { timeout(wait, self.events.recv()).await }) {
                Ok(Some(event)) => self.hear(event),
                Err(_) => {}
                // The links are gone: the process is ending. What is outstanding counts as lost.
                Ok(None) => return self.aloft.land(ticket),
            }
            self.hear_all();
            let missed = wake_at
                .map_or(Duration::ZERO, |at| now().saturating_duration_since(at.max(began + LISTEN_MIN)));
            if missed > MISSED_MIN {
                self.catch_up(missed);
            }
            if wake_at.is_some_and(|at| at <= now()) {
                self.give_up_mute();
                self.order(Aloft::tick);
            }
        }
    }

    fn is_inside(&self, holder: &InstanceId) -> bool {
        self.inside.as_ref().is_some_and(|inside| inside.instance() == holder)
    }

    /// Computes the frames of the experts in this process; the other half's are left to it. Between two of them that is heard
    /// which the links have read: with large frames, their caretaker reads meanwhile.
    fn compute_inside(&mut self, ticket: &Ticket) {
        let Some(inside) = &self.inside else { return };
        if inside.due().any(is_large) && !self.view.load().links.is_empty() {
            self.event_loop.hand_over();
        }
        while !(self.aloft.is_home(ticket) && self.aloft.has_others(ticket))
            && let Some((instance, reply)) =
                self.inside.as_mut().and_then(|inside| inside.reply(|frame| self.aloft.waits_for(frame), now))
        {
            self.hear(LinkEvent::Reply { instance, reply, at: now() });
            self.hear_all();
            self.order(Aloft::look_again);
        }
    }

    /// All that has come.
    pub(crate) fn hear_all(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.hear(event);
        }
    }

    /// True if replies may come, also if nobody waits for them any more.
    pub(crate) fn is_owed(&self) -> bool {
        self.health.is_owed()
    }

    fn hear(&mut self, event: LinkEvent) {
        let orders = match event {
            LinkEvent::Reply { instance, reply, at } => {
                self.decide_on(at, |aloft, around| aloft.accept(&instance, reply, around))
            }
            LinkEvent::Broken { instance, error } => {
                let orders = self.decide(|aloft, around| aloft.lose_holder(&instance, &error, around));
                self.forget(&instance);
                orders
            }
            LinkEvent::Table => Vec::new(),
        };
        self.send(orders);
    }

    /// `instance` starts anew, if only because its link is there again already.
    fn forget(&mut self, instance: &InstanceId) {
        self.health.leave(instance);
        self.followed = Version(0);
    }

    /// Has the links made again on which nothing comes back. What was sent on them is lost when they say that they broke.
    pub(crate) fn give_up_mute(&mut self) {
        let view = self.view();
        for instance in self.health.mute(now()) {
            if let Some(way) = view.links.get(&instance) {
                way.given_up.notify_one();
            }
        }
    }

    /// This process, or its machine, was stopped: what came meanwhile has not been read, and what did not come is nobody's
    /// fault.
    fn catch_up(&mut self, missed: Duration) {
        self.event_loop.run(tokio::time::sleep(LISTEN_MIN));
        self.health.was_deaf(missed);
        self.hear_all();
    }

    /// Sends what is ordered on what is aloft.
    fn order(&mut self, decide: impl FnOnce(&mut Aloft, &mut Surroundings<'_>) -> Vec<Order>) {
        let orders = self.decide(decide);
        self.send(orders);
    }

    fn send(&mut self, orders: Vec<Order>) {
        let mut orders = VecDeque::from(orders);
        while let Some(Order { holder, frame }) = orders.pop_front() {
            if let Some(inside) = self.inside.as_mut().filter(|inside| *inside.instance() == holder) {
                inside.put(frame, now());
                continue;
            }
            let view = self.view();
            let why = match view.links.get(&holder).map(|way| way.frames.try_reserve()) {
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
            let more = self.decide(|aloft, around| aloft.lose_holder(&holder, &error, around));
            orders.retain(|order| order.holder != holder);
            orders.extend(more);
        }
    }

    /// The clock that frames are measured with.
    #[expect(clippy::unused_self, reason = "the network's side of the engine is where time is read")]
    pub(crate) fn now(&self) -> Instant {
        now()
    }

    pub(crate) const fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(crate) const fn health(&self) -> &Health {
        &self.health
    }
}

#[expect(clippy::disallowed_methods, reason = "waiting for the network is an edge")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
