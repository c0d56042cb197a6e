//! The registry: leases, records, a placement that is written by transactions only, and watches that are late and out of
//! order. Leaders that do not know that they are none any more keep trying.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use cluster::{
    Holds, Placement,
    placement::{Goal, Machine, Urgency, next},
};
use ids::{ExpertId, InstanceId, Version};

use super::{
    server::{LAYER, N_EXPERTS},
    world::{Event, World},
};

#[derive(Debug)]
pub(super) struct Registry {
    pub(super) is_up: bool,
    goal: Goal,
    records: BTreeMap<InstanceId, Held>,
    /// Keys that go when their lease does.
    dying: BTreeMap<InstanceId, Duration>,
    placement: Option<Arc<Placement>>,
    /// Every placement ever written, for watches that are late.
    written: BTreeMap<u64, Arc<Placement>>,
    term: usize,
    /// What each leader last saw.
    last_seen: BTreeMap<usize, Arc<Placement>>,
}

#[derive(Clone, Debug)]
struct Held {
    holds: Holds,
    epoch: u64,
    applied: Version,
}

const LEASE: Duration = Duration::from_millis(300);

impl Registry {
    pub(super) fn new(replicas: usize) -> Self {
        Self {
            is_up: true,
            goal: Goal { layers: vec![LAYER], n_experts: N_EXPERTS as usize, replicas },
            records: BTreeMap::new(),
            dying: BTreeMap::new(),
            placement: None,
            written: BTreeMap::new(),
            term: 0,
            last_seen: BTreeMap::new(),
        }
    }
}

impl World {
    /// The server writes down what it is and holds.
    pub(super) fn register(&mut self, server: usize) {
        let state = &self.servers[server];
        let held = Held { holds: state.holds.clone(), epoch: state.epoch.0, applied: state.applied };
        let (instance, epoch) = (state.instance(), held.epoch);
        if self.registry.is_up {
            self.registry.records.insert(instance, held);
            let delay = self.dice.micros(200, 30_000);
            self.after(delay, Event::RecordHeard { server, epoch });
        }
    }

    pub(super) fn lose_lease(&mut self, server: usize) {
        let instance = self.servers[server].instance();
        self.registry.dying.insert(instance, self.at + LEASE);
    }

    /// Leases end, and those who live say so again.
    pub(super) fn registry_ticks(&mut self) {
        if self.registry.is_up {
            let at = self.at;
            let dead: Vec<InstanceId> = self
                .registry
                .dying
                .iter()
                .filter(|(_, ends)| **ends <= at)
                .map(|(instance, _)| instance.clone())
                .collect();
            for instance in dead {
                self.registry.dying.remove(&instance);
                self.registry.records.remove(&instance);
            }
            for server in 0..self.servers.len() {
                let state = &self.servers[server];
                let known = self.registry.records.get(&state.instance()).map(|held| held.epoch);
                if state.is_up && !state.frozen && known != Some(state.epoch.0) {
                    self.register(server);
                }
            }
            // A re-list brings what the watch may have lost.
            if let Some(placement) = &self.registry.placement {
                let version = placement.version.0;
                let server = self.dice.below(self.servers.len());
                let delay = self.dice.micros(200, 30_000);
                self.after(delay, Event::PlacementHeard { server, version });
            }
        }
        self.after(Duration::from_millis(20), Event::RegistryTicks);
    }

    pub(super) fn lose_data(&mut self) {
        self.registry.records.clear();
        self.registry.dying.clear();
        self.registry.placement = None;
    }

    /// Another leader is elected; the old one has not heard of it.
    pub(super) fn change_leader(&mut self) {
        self.registry.term += 1;
        let leader = self.registry.term;
        self.after(Duration::from_millis(1), Event::LeaderLooks { leader });
    }

    pub(super) fn leader_looks(&mut self, leader: usize) {
        // A leader that has been replaced finds out at last.
        let is_leader = leader == self.registry.term;
        if !is_leader && self.dice.chance(10) {
            return;
        }
        if self.registry.is_up {
            self.lead(leader, is_leader);
        }
        let pause = self.dice.micros(5_000, 30_000);
        self.after(pause, Event::LeaderLooks { leader });
    }

    fn lead(&mut self, leader: usize, is_leader: bool) {
        // What it has seen may be old.
        let current = self.registry.placement.clone();
        if let (Some(current), true) = (&current, self.dice.chance(80)) {
            self.registry.last_seen.insert(leader, Arc::clone(current));
        }
        let seen = self.registry.last_seen.get(&leader).cloned();
        let machines: Vec<Machine> = self
            .registry
            .records
            .iter()
            .map(|(instance, held)| {
                let wanted = seen.as_ref().and_then(|seen| seen.wanted.get(instance.as_str())).cloned();
                Machine {
                    instance: instance.clone(),
                    usable: self.router.is_joined(instance) && !self.registry.dying.contains_key(instance),
                    holds: held.holds.clone(),
                    pinned: Holds::default(),
                    wanted: wanted.unwrap_or_else(|| held.holds.clone()),
                    memory_bytes_max: 1 << 30,
                    expert_bytes: 1,
                }
            })
            .collect();
        if !machines.iter().any(|machine| machine.usable) {
            return;
        }
        let (wanted, urgency) = next(&self.registry.goal, &machines);
        if urgency == Urgency::None && current.is_some() {
            return;
        }
        let applied = self.registry.records.values().map(|held| held.applied);
        let newest = applied.chain(seen.as_ref().map(|seen| seen.version)).max().unwrap_or_default();
        let version = Version(newest.0 + 1);
        // The transaction: still the leader, and nobody has written since.
        if !is_leader
            || current.as_ref().map(|current| current.version)
                != seen.as_ref().filter(|_| current.is_some()).map(|seen| seen.version)
        {
            return self.note(|| format!("leader {leader}: version {version} refused"));
        }
        let placement = Arc::new(Placement {
            version,
            leader: format!("r{leader}").as_str().into(),
            wanted: wanted.into_iter().map(|(instance, holds)| (instance.to_string(), holds)).collect(),
        });
        self.note(|| format!("leader {leader}: version {version}, {urgency:?}: {:?}", placement.wanted));
        self.registry.placement = Some(Arc::clone(&placement));
        self.registry.written.insert(version.0, placement);
        for server in 0..self.servers.len() {
            let delay = self.dice.micros(200, 60_000);
            self.after(delay, Event::PlacementHeard { server, version: version.0 });
        }
    }

    pub(super) fn placement_heard(&mut self, server: usize, version: u64) {
        let state = &mut self.servers[server];
        let Some(placement) = self.registry.written.get(&version).cloned() else { return };
        if !state.is_up || state.frozen {
            return;
        }
        let (instance, before) = (state.instance(), state.applied);
        let Some(wanted) = placement.news_for(&instance, before) else { return };
        state.applied = placement.version;
        if state.holds != *wanted {
            state.holds = wanted.clone();
            state.epoch.0 += 1;
        }
        if placement.version <= before {
            self.violation(format!("{instance} applied version {} after {before}", placement.version));
        }
        self.note(|| format!("{instance} applies version {version}"));
        self.register(server);
    }

    /// In the end every expert has its holders, as the servers themselves say.
    pub(super) fn check_end(&mut self) {
        let n_up = self.servers.iter().filter(|state| state.is_up).count();
        let wanted = self.registry.goal.replicas.min(n_up);
        let short: BTreeSet<u32> = (0..N_EXPERTS)
            .filter(|&expert| {
                let holders = self
                    .servers
                    .iter()
                    .filter(|state| state.is_up && state.holds.contains(LAYER, ExpertId(expert)));
                holders.count() < wanted
            })
            .collect();
        if !short.is_empty() {
            self.violation(format!("experts {short:?} have fewer than {wanted} holders in the end"));
        }
        if self.router.n_landed_mended() < 20 {
            self.violation(format!(
                "only {} layers since everything works again",
                self.router.n_landed_mended()
            ));
        }
    }
}
