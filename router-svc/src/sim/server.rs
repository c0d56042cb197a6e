//! An expert server: what it holds, and what is wrong with it. It computes with the tests' one-line experts.

use std::time::Duration;

use cluster::Holds;
use ids::{Epoch, ExpertId, InstanceId, LayerId, Version, WeightsHash};
use proto::{Code, Error, Frame, Reply, rows::Rows};

use super::world::{Event, World};
use crate::flight::tests::serve;

#[derive(Debug)]
pub(super) struct Server {
    index: usize,
    n_starts: u32,
    pub(super) is_up: bool,
    pub(super) holds: Holds,
    pub(super) epoch: Epoch,
    pub(super) applied: Version,
    /// Messages to and from it wait until it is thawed.
    pub(super) frozen: bool,
    pub(super) slow: u32,
    pub(super) answers_nan: bool,
    pub(super) answers_stale: bool,
}

pub(super) const LAYER: LayerId = LayerId(0);
pub(super) const N_EXPERTS: u32 = 12;

pub(super) fn weights(expert: ExpertId) -> WeightsHash {
    WeightsHash(1 << expert.0)
}

impl Server {
    pub(super) fn new(index: usize) -> Self {
        Self {
            index,
            n_starts: 1,
            is_up: true,
            holds: Holds::default(),
            epoch: Epoch(1),
            applied: Version(0),
            frozen: false,
            slow: 1,
            answers_nan: false,
            answers_stale: false,
        }
    }

    pub(super) fn instance(&self) -> InstanceId {
        format!("s{}.{}", self.index, self.n_starts).as_str().into()
    }

    fn start_again(&mut self) {
        *self = Self { n_starts: self.n_starts + 1, ..Self::new(self.index) };
    }

    fn compute(&self, frame: &Frame) -> Reply {
        let refuse = |reason: &'static str| Reply {
            id: frame.id,
            epoch: frame.epoch,
            weights: frame.weights,
            outcome: Err(Error::new(Code::NotFound, reason, reason)),
        };
        if frame.assignments.iter().any(|assignment| !self.holds.contains(LAYER, assignment.expert)) {
            return refuse("expert_not_held");
        }
        let mut reply = serve(frame, 1e6);
        let spoil = |reply: &mut Reply, value: f32| {
            if let Ok(computed) = &mut reply.outcome {
                let n = computed.rows.n_rows() * computed.rows.width();
                computed.rows = Rows::encode(computed.rows.dtype(), computed.rows.width(), vec![value; n]);
            }
        };
        if self.answers_stale {
            // Numbers of another time: whoever takes them gets a wrong row.
            reply.epoch = Epoch(frame.epoch.0 + 1);
            spoil(&mut reply, 0.125);
        }
        if self.answers_nan {
            spoil(&mut reply, f32::NAN);
        }
        reply
    }
}

impl World {
    pub(super) fn frame_arrives(&mut self, server: usize, link: u64, frame: Frame) {
        let is_lost = !self.network.is_link(server, link) || self.network.swallows_frame(server, link);
        if is_lost || !self.servers[server].is_up {
            return;
        }
        if self.servers[server].frozen || !self.network.passes_to[server] {
            // It waits in a buffer. The link may break first.
            return self.after(
                Duration::from_millis(5),
                Event::FrameArrives { server, link, frame: Box::new(frame) },
            );
        }
        let reply = self.servers[server].compute(&frame);
        let took = self.dice.micros(50, 400) * self.servers[server].slow;
        self.carry_reply(server, link, reply, took);
    }

    pub(super) fn restart(&mut self, server: usize) {
        if self.servers[server].is_up {
            return;
        }
        self.servers[server].start_again();
        let instance = self.servers[server].instance();
        self.note(|| format!("{instance} starts"));
        self.register(server);
        let delay = self.dice.micros(100, 20_000);
        self.after(delay, Event::Connect { server });
    }
}
