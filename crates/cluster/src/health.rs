//! How well each server answers, as one router sees it: latencies and failures in, p95 and ejections out. Pure: the
//! clock is an argument. Outlier detection as Envoy has it, with two differences: latency is judged by frames of the
//! same size, and a server is never judged without a frame that it owes.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use ids::{FrameId, InstanceId};

mod budget;
mod latency;

pub use budget::Budget;
use latency::Latencies;

/// When a server is avoided, and how much may be sent twice.
#[derive(Clone, Debug)]
pub struct Limits {
    /// No frame is hedged sooner: below this, a second frame costs more than it saves.
    pub hedge_after_min: Duration,
    /// A server that owes a frame and has answered nothing for this long, and for [`SILENT_FACTOR`] times what such a
    /// frame takes, is ejected.
    pub silent_max: Duration,
    /// What owes a frame and says nothing for so long has a way to it that is made again: as long as a connection may take
    /// whose pings nobody answers. A stream can be lost inside one whose pings are answered. Twice as long each time that it
    /// was for nothing.
    pub mute_min: Duration,
    /// Longer nobody is waited for, whatever the frame: its own timeout.
    pub answer_max: Duration,
    /// So many failures in a row eject a server.
    pub failures_max: u32,
    /// The first ejection; each further one is twice as long.
    pub eject: Duration,
    pub eject_max: Duration,
    /// No more than this share of the servers is ejected at a time, and one may always be.
    pub eject_share: f32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            hedge_after_min: Duration::from_millis(2),
            silent_max: Duration::from_millis(250),
            mute_min: Duration::from_secs(3),
            answer_max: Duration::from_secs(30),
            failures_max: 5,
            eject: Duration::from_secs(1),
            eject_max: Duration::from_secs(30),
            eject_share: 0.34,
        }
    }
}

/// A frame that takes this many times the usual is no slow frame but a silent server.
const SILENT_FACTOR: u32 = 8;
/// How long it is known that making the way to a server again was for nothing.
const GIVEN_UP_KEPT: Duration = Duration::from_secs(600);

/// How a frame failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It may work the next time.
    Transient,
    /// The server computes wrongly: it is ejected at once.
    Wrong,
    /// It was asked for what it does not have: no fault of its.
    Excused,
}

/// All servers of one router.
#[derive(Debug)]
pub struct Health {
    limits: Limits,
    servers: HashMap<InstanceId, Server>,
    latencies: Latencies,
    n_ejections: u64,
    /// Whose ways were made again without an answer since: how often, and when last.
    given_up: HashMap<InstanceId, (u32, Instant)>,
    pub hedges: Budget,
    pub failovers: Budget,
}

#[derive(Debug)]
struct Server {
    owed: HashMap<FrameId, Owed>,
    answered_at: Instant,
    /// Since when it owes something and nothing was heard of it.
    unheard_since: Instant,
    /// Moving average of its latency over the usual one of frames of the same size.
    slowness: f32,
    latency: Duration,
    failures_in_a_row: u32,
    state: State,
    /// Ejections without a success in between.
    ejections_in_a_row: u32,
    n_ejections: u32,
}

#[derive(Clone, Copy, Debug)]
struct Owed {
    sent_at: Instant,
    n_pairs: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    In,
    Ejected {
        until: Instant,
    },
    /// One frame is on its way to find out.
    Probing {
        probe: FrameId,
    },
}

/// What is known of one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub ejected: bool,
    pub latency: Duration,
    pub n_owed: usize,
    pub n_ejections: u32,
}

/// Weight of the newest observation in moving averages.
const NEWEST: f32 = 0.1;

impl Health {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            servers: HashMap::new(),
            latencies: Latencies::default(),
            n_ejections: 0,
            given_up: HashMap::new(),
            hedges: Budget::hedges(),
            failovers: Budget::failovers(),
        }
    }

    /// `instance` serves from now on, with a clean record; but if making its way again was for nothing before, it is a hanging
    /// server, and a probe decides.
    pub fn join(&mut self, instance: &InstanceId, now: Instant) {
        let n_in_vain = self.times_given_up(instance).saturating_sub(1);
        let state = match n_in_vain {
            0 => State::In,
            n => State::Ejected { until: now + self.ejection(n) },
        };
        let server = Server {
            owed: HashMap::new(),
            answered_at: now,
            unheard_since: now,
            slowness: 1.0,
            latency: Duration::ZERO,
            failures_in_a_row: 0,
            state,
            ejections_in_a_row: n_in_vain,
            n_ejections: 0,
        };
        self.servers.insert(instance.clone(), server);
    }

    /// `instance` is gone, and with it what it owed.
    pub fn leave(&mut self, instance: &InstanceId) {
        self.servers.remove(instance);
    }

    /// Forgets the servers that `keep` does not name and welcomes those that are new.
    pub fn follow<'a>(&mut self, keep: impl Iterator<Item = &'a InstanceId> + Clone, now: Instant) {
        self.servers.retain(|instance, _| keep.clone().any(|kept| kept == instance));
        for instance in keep {
            if !self.servers.contains_key(instance) {
                self.join(instance, now);
            }
        }
    }

    pub fn sent(&mut self, instance: &InstanceId, frame: FrameId, n_pairs: usize, now: Instant) {
        self.hedges.earn();
        self.failovers.earn();
        if let Some(server) = self.servers.get_mut(instance) {
            if server.owed.is_empty() {
                server.unheard_since = now;
            }
            server.owed.insert(frame, Owed { sent_at: now, n_pairs });
        }
    }

    /// `instance` said something, whatever it was.
    pub fn heard(&mut self, instance: &InstanceId, now: Instant) {
        if let Some(server) = self.servers.get_mut(instance) {
            server.unheard_since = server.unheard_since.max(now);
        }
    }

    /// Nobody could listen for `span`: it speaks against no one.
    pub fn was_deaf(&mut self, span: Duration) {
        for server in self.servers.values_mut() {
            let Some(oldest) = server.owed.values().map(|owed| owed.sent_at).min() else { continue };
            server.unheard_since += span;
            server.answered_at = server.answered_at.max(oldest) + span;
        }
    }

    /// `instance` answered `frame` rightly, in time or not.
    pub fn answered(&mut self, instance: &InstanceId, frame: FrameId, now: Instant) {
        let Some(server) = self.servers.get_mut(instance) else { return };
        let Some(owed) = server.owed.remove(&frame) else { return };
        self.given_up.remove(instance);
        server.answered_at = now;
        server.failures_in_a_row = 0;
        let took = now.saturating_duration_since(owed.sent_at);
        match server.state {
            State::Probing { probe } if probe == frame => {
                server.state = State::In;
                server.slowness = 1.0;
                // Whatever else it owes is from before; it does not speak against it any more.
                server.owed.clear();
            }
            // Its time is over and it was asked all the same, because nobody else could be: as good as a probe.
            State::Ejected { until } if owed.sent_at >= until => {
                server.state = State::In;
                server.slowness = 1.0;
            }
            // An answer from the time of its absence says nothing about frames in general.
            State::Ejected { .. } | State::Probing { .. } => return,
            State::In => server.ejections_in_a_row = 0,
        }
        let usual = self.latencies.usual(owed.n_pairs).unwrap_or(took);
        let ratio = took.as_secs_f32() / usual.as_secs_f32().max(1e-6);
        server.slowness += NEWEST * (ratio.clamp(0.1, 100.0) - server.slowness);
        server.latency = server.latency.mul_f32(1.0 - NEWEST) + took.mul_f32(NEWEST);
        self.latencies.add(owed.n_pairs, took);
    }

    /// `instance` answered `frame` wrongly or not at all. True if it is ejected by it.
    pub fn failed(&mut self, instance: &InstanceId, frame: FrameId, failure: Failure, now: Instant) -> bool {
        let failures_max = self.limits.failures_max;
        let Some(server) = self.servers.get_mut(instance) else { return false };
        server.owed.remove(&frame);
        if failure == Failure::Excused {
            server.answered_at = now;
        } else {
            server.failures_in_a_row += 1;
        }
        match server.state {
            State::Probing { probe } if probe == frame => self.eject(instance, now),
            State::Ejected { .. } | State::Probing { .. } => false,
            State::In if failure == Failure::Wrong || server.failures_in_a_row >= failures_max => {
                self.eject(instance, now)
            }
            State::In => false,
        }
    }

    /// Ejects the servers that have been silent for too long; gives those that are out since now.
    pub fn tick(&mut self, now: Instant) -> Vec<InstanceId> {
        let mut silent: Vec<InstanceId> = self
            .servers
            .iter()
            .filter(|(_, server)| match server.state {
                State::In | State::Probing { .. } => self.silent_at(server).is_some_and(|at| at <= now),
                State::Ejected { .. } => false,
            })
            .map(|(instance, _)| instance.clone())
            .collect();
        silent.sort_unstable();
        silent.retain(|instance| self.eject(instance, now));
        silent
    }

    /// Servers that owe a frame and have said nothing for longer than any of them takes, ejected or not: what is sent to
    /// them the same way may be lost as well. Named once; again after as long a time.
    pub fn mute(&mut self, now: Instant) -> Vec<InstanceId> {
        let is_mute = |instance: &InstanceId, server: &Server| {
            self.mute_at(instance, server).is_some_and(|at| at <= now)
        };
        let mut mute: Vec<InstanceId> = self
            .servers
            .iter()
            .filter(|(instance, server)| is_mute(instance, server))
            .map(|(instance, _)| instance.clone())
            .collect();
        mute.sort_unstable();
        self.given_up.retain(|_, (_, at)| now.saturating_duration_since(*at) < GIVEN_UP_KEPT);
        for instance in &mute {
            self.heard(instance, now);
            let n = self.times_given_up(instance) + 1;
            self.given_up.insert(instance.clone(), (n, now));
        }
        mute
    }

    /// The next moment at which [`Health::tick`] or [`Health::mute`] may have something to say.
    #[must_use]
    pub fn next_tick(&self) -> Option<Instant> {
        let silent_at = |server: &Server| match server.state {
            State::In | State::Probing { .. } => self.silent_at(server),
            State::Ejected { .. } => None,
        };
        let of = |(instance, server)| {
            [silent_at(server), self.mute_at(instance, server)].into_iter().flatten().min()
        };
        self.servers.iter().filter_map(of).min()
    }

    fn mute_at(&self, instance: &InstanceId, server: &Server) -> Option<Instant> {
        let Limits { mute_min, answer_max, .. } = self.limits;
        let mute_min = mute_min * (1 << self.times_given_up(instance).min(16));
        let after = |owed: &Owed| {
            self.silent_after(owed.n_pairs).map_or(answer_max, |after| after.max(mute_min).min(answer_max))
        };
        Some(server.unheard_since + server.owed.values().map(after).max()?)
    }

    fn times_given_up(&self, instance: &InstanceId) -> u32 {
        self.given_up.get(instance).map_or(0, |(n, _)| *n)
    }

    /// How long the one after so many ejections lasts.
    fn ejection(&self, n_before: u32) -> Duration {
        (self.limits.eject * (1 << n_before.min(16))).min(self.limits.eject_max)
    }

    fn silent_at(&self, server: &Server) -> Option<Instant> {
        let oldest = server.owed.values().min_by_key(|owed| owed.sent_at)?;
        // Without any experience there is no usual time: the frame's own timeout decides.
        Some(server.answered_at.max(oldest.sent_at) + self.silent_after(oldest.n_pairs)?)
    }

    fn eject(&mut self, instance: &InstanceId, now: Instant) -> bool {
        let n_out = self
            .servers
            .iter()
            .filter(|(other, server)| *other != instance && server.state != State::In)
            .count();
        let out_max = ((self.servers.len() as f32 * self.limits.eject_share) as usize).max(1);
        let Some(server) = self.servers.get_mut(instance) else { return false };
        if n_out >= out_max {
            // Judged again when something changes, not at once.
            server.answered_at = now;
            return false;
        }
        let limits = &self.limits;
        let span = (limits.eject * (1 << server.ejections_in_a_row.min(16))).min(limits.eject_max);
        server.state = State::Ejected { until: now + span };
        server.ejections_in_a_row += 1;
        server.failures_in_a_row = 0;
        server.n_ejections += 1;
        self.n_ejections += 1;
        true
    }

    /// Servers whose time out is over: the next frame that they could answer is sent to them as well.
    #[must_use]
    pub fn probes_due(&self, now: Instant) -> Vec<InstanceId> {
        let due = |server: &Server| matches!(server.state, State::Ejected { until } if until <= now);
        let mut due: Vec<InstanceId> = self
            .servers
            .iter()
            .filter(|(_, server)| due(server))
            .map(|(instance, _)| instance.clone())
            .collect();
        due.sort_unstable();
        due
    }

    /// `probe`, just sent, decides about `instance`.
    pub fn probe(&mut self, instance: &InstanceId, probe: FrameId) {
        if let Some(server) = self.servers.get_mut(instance) {
            server.state = State::Probing { probe };
            // What it never answered is not asked about any more.
            server.owed.retain(|&frame, _| frame == probe);
        }
    }

    /// True if frames may be sent to `instance` while others hold the same.
    #[must_use]
    pub fn is_in(&self, instance: &InstanceId) -> bool {
        self.servers.get(instance).is_none_or(|server| server.state == State::In)
    }

    /// True if that is so for everybody.
    #[must_use]
    pub fn all_in(&self) -> bool {
        self.servers.values().all(|server| server.state == State::In)
    }

    /// How long `instance` may be expected to take, in units of a usual frame: frames that it owes count, and one
    /// that is overdue counts by how much.
    #[must_use]
    pub fn cost(&self, instance: &InstanceId, now: Instant) -> f32 {
        let Some(server) = self.servers.get(instance) else { return 1.0 };
        let overdue = server
            .owed
            .values()
            .map(|owed| {
                let usual = self.latencies.usual(owed.n_pairs).unwrap_or(self.limits.silent_max);
                now.saturating_duration_since(owed.sent_at).as_secs_f32() / usual.as_secs_f32().max(1e-4)
            })
            .fold(0.0, f32::max);
        server.slowness * (1.0 + server.owed.len() as f32) + overdue
    }

    /// How long a frame of so many (row, expert) pairs may take before a second one is sent; None: too little is known.
    #[must_use]
    pub fn hedge_after(&self, n_pairs: usize) -> Option<Duration> {
        Some(self.latencies.p95(n_pairs)?.max(self.limits.hedge_after_min))
    }

    /// How long a server may be silent that owes a frame of so many pairs; None: too little is known.
    #[must_use]
    pub fn silent_after(&self, n_pairs: usize) -> Option<Duration> {
        Some(self.limits.silent_max.max(self.latencies.usual(n_pairs)? * SILENT_FACTOR))
    }

    #[must_use]
    pub fn summary(&self, instance: &InstanceId) -> Summary {
        self.servers.get(instance).map_or_else(Summary::default, |server| Summary {
            ejected: server.state != State::In,
            latency: server.latency,
            n_owed: server.owed.len(),
            n_ejections: server.n_ejections,
        })
    }

    /// True if any server owes a frame.
    #[must_use]
    pub fn is_owed(&self) -> bool {
        self.servers.values().any(|server| !server.owed.is_empty())
    }

    #[must_use]
    pub const fn n_ejections(&self) -> u64 {
        self.n_ejections
    }
}

#[cfg(test)]
mod tests;
