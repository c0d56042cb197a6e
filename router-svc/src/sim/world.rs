//! Virtual time: a queue of events, taken in order of time; and everything that happens, as a history.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    hash::Hasher as _,
    time::{Duration, Instant},
};

use proto::{Frame, Reply};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use twox_hash::XxHash3_64;

use super::{
    END, FAULTS,
    faults::Network,
    registry::Registry,
    router::{N_BATCHES_MAX, Router},
    server::Server,
};
use crate::dispatch::tests::any_instant;

#[derive(Debug)]
pub(super) enum Event {
    FrameArrives {
        server: usize,
        link: u64,
        frame: Box<Frame>,
    },
    ReplyArrives {
        server: usize,
        link: u64,
        reply: Box<Reply>,
    },
    /// The router notices that this link is gone.
    LinkBreaks {
        server: usize,
        link: u64,
    },
    /// The router tries to connect.
    Connect {
        server: usize,
    },
    RouterWakes {
        turn: u64,
    },
    /// A half-batch comes to its next layer, or tries its last one again.
    Launch {
        half: usize,
    },
    Fault,
    Mend {
        server: usize,
        what: &'static str,
    },
    Restart {
        server: usize,
    },
    RegistryTicks,
    RecordHeard {
        server: usize,
        epoch: u64,
    },
    PlacementHeard {
        server: usize,
        version: u64,
    },
    LeaderLooks {
        leader: usize,
    },
}

pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// True in `percent` of a hundred times.
    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(super) fn micros(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from + self.0.next_u64() % (to - from))
    }
}

pub(super) struct World {
    pub(super) dice: Dice,
    start: Instant,
    pub(super) at: Duration,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, Event>,
    n_events: u64,
    pub(super) servers: Vec<Server>,
    pub(super) network: Network,
    pub(super) router: Router,
    pub(super) registry: Registry,
    history: XxHash3_64,
    tell: bool,
    pub(super) violations: Vec<String>,
    pub(super) n_faults: usize,
}

impl World {
    pub(super) fn new(seed: u64, tell: bool) -> Self {
        let mut dice = Dice(ChaCha8Rng::seed_from_u64(seed));
        let n_servers = 3 + dice.below(4);
        let replicas = 1 + dice.below(3);
        let mut world = Self {
            start: any_instant(),
            at: Duration::ZERO,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            n_events: 0,
            servers: (0..n_servers).map(Server::new).collect(),
            network: Network::new(n_servers),
            router: Router::new(),
            registry: Registry::new(replicas),
            history: XxHash3_64::new(),
            tell,
            violations: Vec::new(),
            n_faults: 0,
            dice,
        };
        for server in 0..n_servers {
            world.register(server);
            world.after(Duration::from_millis(1), Event::Connect { server });
        }
        world.after(Duration::from_millis(2), Event::LeaderLooks { leader: 0 });
        world.after(Duration::from_millis(10), Event::RegistryTicks);
        // With one batch, or with two, each of which launches when it likes.
        let n_batches = 1 + world.dice.below(N_BATCHES_MAX);
        for half in 0..n_batches {
            world.after(Duration::from_millis(50), Event::Launch { half });
        }
        world.after(Duration::from_millis(100), Event::Fault);
        world
    }

    pub(super) fn now(&self) -> Instant {
        self.start + self.at
    }

    pub(super) fn after(&mut self, delay: Duration, event: Event) {
        self.n_events += 1;
        self.queue.push(Reverse((self.at + delay, self.n_events)));
        self.events.insert(self.n_events, event);
    }

    pub(super) fn is_mended(&self) -> bool {
        self.at >= FAULTS
    }

    /// A line of the history.
    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        let line = what();
        self.history.write(line.as_bytes());
        self.history.write_u128(self.at.as_nanos());
        if self.tell {
            println!("{:>12.3} ms  {line}", self.at.as_secs_f64() * 1e3);
        }
    }

    pub(super) fn violation(&mut self, what: String) {
        self.note(|| format!("VIOLATION {what}"));
        self.violations.push(format!("at {:?}: {what}", self.at));
    }

    pub(super) fn run(&mut self) {
        while let Some(Reverse((at, id))) = self.queue.pop() {
            if at > END {
                break;
            }
            self.at = at;
            if let Some(event) = self.events.remove(&id) {
                self.handle(event);
            }
        }
        self.check_end();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::FrameArrives { server, link, frame } => self.frame_arrives(server, link, *frame),
            Event::ReplyArrives { server, link, reply } => self.reply_arrives(server, link, *reply),
            Event::LinkBreaks { server, link } => self.link_breaks(server, link),
            Event::Connect { server } => self.connect(server),
            Event::RouterWakes { turn } => self.router_wakes(turn),
            Event::Launch { half } => self.launch(half),
            Event::Fault => self.fault(),
            Event::Mend { server, what } => self.mend(server, what),
            Event::Restart { server } => self.restart(server),
            Event::RegistryTicks => self.registry_ticks(),
            Event::RecordHeard { server, epoch } => self.record_heard(server, epoch),
            Event::PlacementHeard { server, version } => self.placement_heard(server, version),
            Event::LeaderLooks { leader } => self.leader_looks(leader),
        }
    }

    pub(super) fn verdict(self) -> (Vec<String>, u64, usize) {
        (self.violations, self.history.finish(), self.n_faults)
    }
}
