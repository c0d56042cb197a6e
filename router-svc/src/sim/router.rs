//! The router: one layer after the other through the real dispatch, with one batch or with two half-batches, and what every
//! layer must come to.

use std::{collections::HashMap, time::Duration};

use cluster::{Health, Holder, Members, RoutingTable, health::Limits};
use ids::InstanceId;
use proto::{
    Code, Error, Reply,
    frame::{Combine, Grid},
};

use super::{
    MENDED,
    server::{N_EXPERTS, weights},
    world::{Event, World},
};
use crate::{
    combine::combine,
    dispatch::tests::activations,
    flight::{
        Counts, FrameIds, Order, Surroundings,
        aloft::{Aloft, Ticket},
        tests::expected_of,
    },
};

pub(super) const N_BATCHES_MAX: usize = 2;

pub(super) struct Router {
    members: Members,
    table: RoutingTable,
    health: Health,
    ids: FrameIds,
    counts: Counts,
    /// By instance: which server it is.
    server_of: HashMap<InstanceId, usize>,
    aloft: Aloft,
    halves: [Half; N_BATCHES_MAX],
    turn: u64,
    n_landed_mended: usize,
}

#[derive(Default)]
struct Half {
    flying: Option<(Ticket, Duration)>,
    /// How long the rows of this layer have been tried.
    trying_since: Option<Duration>,
    chosen: Vec<u32>,
}

/// Longer than this no flight may take while every server that matters works: several hedges and failovers.
const LANDS_WITHIN: Duration = Duration::from_millis(100);
/// And longer than this never.
const DISPATCH_TIMEOUT: Duration = Duration::from_secs(2);
/// What lost rows wait before they are tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

impl Router {
    pub(super) fn new() -> Self {
        Self {
            members: Members::default(),
            table: RoutingTable::default(),
            health: Health::new(Limits {
                mute_min: Duration::from_millis(500),
                answer_max: DISPATCH_TIMEOUT,
                ..Limits::default()
            }),
            ids: FrameIds::default(),
            counts: Counts::default(),
            server_of: HashMap::new(),
            aloft: Aloft::default(),
            halves: Default::default(),
            turn: 0,
            n_landed_mended: 0,
        }
    }

    pub(super) fn is_joined(&self, instance: &InstanceId) -> bool {
        self.table.holder(instance).is_some()
    }

    pub(super) const fn n_landed_mended(&self) -> usize {
        self.n_landed_mended
    }
}

impl World {
    fn with_router<T>(&mut self, decide: impl FnOnce(&mut Aloft, &mut Surroundings<'_>) -> T) -> T {
        let now = self.now();
        let router = &mut self.router;
        router.health.follow(router.table.holders().map(|holder| &holder.instance), now);
        let mut around = Surroundings {
            table: &router.table,
            health: &mut router.health,
            ids: &mut router.ids,
            counts: &mut router.counts,
            now,
            heard_at: now,
            dispatch_timeout: DISPATCH_TIMEOUT,
        };
        decide(&mut router.aloft, &mut around)
    }

    fn join(&mut self, server: usize) {
        let state = &self.servers[server];
        let holder = Holder {
            instance: state.instance(),
            address: String::new(),
            epoch: state.epoch,
            holds: state.holds.iter().map(|(layer, expert)| ((layer, expert), weights(expert))).collect(),
            draining: false,
            reads_blocks: false,
            inside: false,
        };
        self.router.server_of.insert(holder.instance.clone(), server);
        match self.router.members.join(holder) {
            Ok(table) => self.router.table = table,
            Err(error) => self.violation(error.to_string()),
        }
        self.look_aloft();
    }

    pub(super) fn connect(&mut self, server: usize) {
        if self.network.link_of(server) != 0 {
            return;
        }
        let state = &self.servers[server];
        let answers = state.is_up
            && !state.frozen
            && self.network.passes_to[server]
            && self.network.passes_from[server];
        if !answers {
            let pause = self.dice.micros(20_000, 200_000);
            return self.after(pause, Event::Connect { server });
        }
        self.network.make(server);
        let instance = state.instance();
        self.note(|| format!("{instance} joins"));
        self.join(server);
    }

    /// The registry says that a server holds something else now; it is asked what.
    pub(super) fn record_heard(&mut self, server: usize, epoch: u64) {
        let state = &self.servers[server];
        let known = self.router.table.holder(&state.instance()).map(|holder| holder.epoch.0);
        if known.is_some_and(|known| known < epoch) && state.is_up && !state.frozen {
            self.join(server);
        }
    }

    pub(super) fn link_breaks(&mut self, server: usize, link: u64) {
        if !self.network.is_link(server, link) {
            return;
        }
        self.network.unmake(server);
        let gone: Vec<InstanceId> = self
            .router
            .server_of
            .iter()
            .filter(|(instance, of)| **of == server && self.router.is_joined(instance))
            .map(|(instance, _)| instance.clone())
            .collect();
        for instance in gone {
            self.note(|| format!("{instance} leaves"));
            if let Some(table) = self.router.members.leave(&instance) {
                self.router.table = table;
            }
            let error = Error::new(Code::Unavailable, "stream_ended", "the link broke");
            let orders = self.with_router(|aloft, around| aloft.lose_holder(&instance, &error, around));
            self.router.health.leave(&instance);
            self.send(orders);
        }
        let pause = self.dice.micros(1_000, 50_000);
        self.after(pause, Event::Connect { server });
        self.look_aloft();
    }

    fn send(&mut self, orders: Vec<Order>) {
        let mut orders = std::collections::VecDeque::from(orders);
        while let Some(Order { holder, frame }) = orders.pop_front() {
            match self
                .router
                .server_of
                .get(&holder)
                .copied()
                .filter(|&server| self.network.link_of(server) != 0)
            {
                Some(server) => self.carry_frame(server, frame),
                None => {
                    let error = Error::new(Code::Unavailable, "link_down", "no link");
                    let more = self.with_router(|aloft, around| aloft.lose_holder(&holder, &error, around));
                    orders.retain(|order| order.holder != holder);
                    orders.extend(more);
                }
            }
        }
    }

    pub(super) fn reply_arrives(&mut self, server: usize, link: u64, reply: Reply) {
        if !self.network.is_link(server, link) || self.network.swallows_reply(server, link) {
            return;
        }
        let state = &self.servers[server];
        if state.is_up && (state.frozen || !self.network.passes_from[server]) {
            return self.after(
                Duration::from_millis(5),
                Event::ReplyArrives { server, link, reply: Box::new(reply) },
            );
        }
        let instance = state.instance();
        let orders = self.with_router(|aloft, around| aloft.accept(&instance, reply, around));
        self.send(orders);
        self.look_aloft();
    }

    pub(super) fn router_wakes(&mut self, turn: u64) {
        if turn != self.router.turn {
            return;
        }
        let now = self.now();
        for instance in self.router.health.mute(now) {
            self.note(|| format!("{instance} is mute: its link is made again"));
            if let Some(&server) = self.router.server_of.get(&instance) {
                let link = self.network.link_of(server);
                self.after(Duration::from_micros(10), Event::LinkBreaks { server, link });
            }
        }
        let orders = self.with_router(Aloft::tick);
        self.send(orders);
        self.look_aloft();
    }

    pub(super) fn launch(&mut self, half: usize) {
        if self.router.halves[half].trying_since.is_none() {
            let n_rows = 1 + self.dice.below(5);
            // Two different experts a row, as a gate would choose.
            let chosen = (0..n_rows).flat_map(|_| {
                let first = self.dice.below(N_EXPERTS as usize);
                let second = (first + 1 + self.dice.below(N_EXPERTS as usize - 1)) % N_EXPERTS as usize;
                [first as u32, second as u32]
            });
            self.router.halves[half].chosen = chosen.collect();
            self.router.halves[half].trying_since = Some(self.at);
        }
        let mode = match self.dice.below(3) {
            0 => Combine::Pairs,
            _ => Combine::Exact(Grid { exponent: -10, contribution_max: 1e6 }),
        };
        let activations = activations(&self.router.halves[half].chosen);
        let n_rows = activations.n_rows();
        let (ticket, orders) =
            self.with_router(|aloft, around| aloft.launch(activations, 0..n_rows, mode, around));
        self.router.halves[half].flying = Some((ticket, self.at));
        self.send(orders);
        self.look_aloft();
    }

    /// Ends the flights that are home; wakes up when the others have something to do.
    fn look_aloft(&mut self) {
        let orders = self.with_router(Aloft::look_again);
        self.send(orders);
        self.router.turn += 1;
        let turn = self.router.turn;
        let mut is_aloft = false;
        for half in 0..N_BATCHES_MAX {
            let flying = self.router.halves[half].flying.take();
            match flying {
                Some((ticket, launched)) if self.router.aloft.is_home(&ticket) => {
                    self.land(half, ticket, launched);
                }
                Some((ticket, launched)) => {
                    is_aloft = true;
                    if self.with_router(|aloft, around| aloft.flight(&ticket).waits_in_vain(around)) {
                        self.violation(
                            "an ejected server is waited for although others could do its work".to_owned(),
                        );
                    }
                    self.router.halves[half].flying = Some((ticket, launched));
                }
                None => {}
            }
        }
        let wakes = [self.router.aloft.next_tick(), self.router.health.next_tick()];
        match wakes.into_iter().flatten().min() {
            Some(at) if is_aloft => {
                let wait = at.saturating_duration_since(self.now()).max(Duration::from_micros(1));
                self.after(wait, Event::RouterWakes { turn });
            }
            None if is_aloft => self.violation("a flight waits for nothing".to_owned()),
            Some(_) | None => {}
        }
    }

    fn land(&mut self, half: usize, ticket: Ticket, launched: Duration) {
        let took = self.at - launched;
        let landed = self.router.aloft.land(ticket);
        let chosen = self.router.halves[half].chosen.clone();
        let combined = combine(landed, vec![0.0; chosen.len()]);
        let expected = expected_of(&chosen);
        for row in 0..expected.len() / 2 {
            let range = row * 2..row * 2 + 2;
            if !combined.lost.contains_key(&row) && combined.update[range.clone()] != expected[range.clone()]
            {
                let (is, should) = (&combined.update[range.clone()], &expected[range]);
                self.violation(format!("row {row} is {is:?}, not {should:?}"));
            }
        }
        let is_calm = self.at >= MENDED;
        let n_lost = combined.lost.len();
        let n_rows = chosen.len() / 2;
        self.note(|| format!("{n_rows} rows landed in {took:?}, {n_lost} lost"));
        if took > DISPATCH_TIMEOUT * 3 {
            self.violation(format!("a flight took {took:?}"));
        }
        if is_calm && took > LANDS_WITHIN {
            self.violation(format!("a flight took {took:?} although every server works"));
        }
        let wait = if combined.lost.is_empty() {
            self.router.halves[half].trying_since = None;
            self.router.n_landed_mended += usize::from(self.is_mended());
            // Few layers are enough to see that it works again.
            if self.is_mended() { Duration::from_millis(10) } else { Duration::from_micros(300) }
        } else {
            if combined.last_failure.is_none() && combined.lost.values().any(Vec::is_empty) {
                self.violation("a row is lost without a name".to_owned());
            }
            if is_calm {
                self.violation(format!("{:?} are lost although every server works", combined.lost));
            }
            RETRY_AFTER
        };
        // A server that works, and holds what is asked for, is found.
        let trying_since = self.router.halves[half].trying_since;
        if is_calm && trying_since.is_some_and(|since| self.at - since > Duration::from_secs(1)) {
            self.violation("a layer has been tried for a second".to_owned());
        }
        let pause = self.dice.micros(1, 500);
        self.after(wait + pause, Event::Launch { half });
    }
}
