//! Which server should hold which expert: every expert on `replicas` servers, equal loads, few moves. Pure; the leader
//! asks for the next placement whenever something has changed, and each answer is one safe step: experts are given to a
//! server before another one gives them up, and nothing is taken away while anything is still being loaded.

use std::collections::BTreeMap;

use ids::{ExpertId, InstanceId, LayerId};

use crate::Holds;

/// What the cluster should look like.
#[derive(Clone, Debug)]
pub struct Goal {
    pub layers: Vec<LayerId>,
    /// Routed experts of each layer.
    pub n_experts: usize,
    /// Servers that shall hold each expert.
    pub replicas: usize,
}

/// An expert server as the leader sees it.
#[derive(Clone, Debug)]
pub struct Machine {
    pub instance: InstanceId,
    /// It can be given experts and counts as a holder: ready, and it answers.
    pub usable: bool,
    pub holds: Holds,
    /// Never taken away.
    pub pinned: Holds,
    /// What the placement in force gives it, beyond what is pinned.
    pub wanted: Holds,
    pub memory_bytes_max: u64,
    /// Of one expert of one layer.
    pub expert_bytes: u64,
}

/// By instance, what each should hold beyond what is pinned there.
pub type Wanted = BTreeMap<InstanceId, Holds>;

impl Goal {
    fn pairs(&self) -> impl Iterator<Item = (LayerId, ExpertId)> + '_ {
        let experts =
            move || (0..self.n_experts).filter_map(|expert| u32::try_from(expert).ok()).map(ExpertId);
        self.layers.iter().flat_map(move |&layer| experts().map(move |expert| (layer, expert)))
    }
}

/// What a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Nothing to do.
    None,
    /// Loads would be more equal, or an expert has more holders than needed.
    Balance,
    /// An expert has too few holders.
    Replicas,
    /// An expert has no holder at all.
    Orphans,
}

/// The next step from what `machines` hold towards `goal`.
#[must_use]
pub fn next(goal: &Goal, machines: &[Machine]) -> (Wanted, Urgency) {
    let mut plan = Plan::new(machines);
    let mut urgency = plan.fill(goal);
    if urgency == Urgency::None && plan.is_settled() && (plan.trim(goal) || plan.level(goal)) {
        urgency = Urgency::Balance;
    }
    let wanted = plan.machines.into_iter().map(|planned| (planned.machine.instance.clone(), planned.wanted));
    (wanted.collect(), urgency)
}

struct Plan<'a> {
    machines: Vec<Planned<'a>>,
}

struct Planned<'a> {
    machine: &'a Machine,
    wanted: Holds,
    n_by_layer: BTreeMap<LayerId, usize>,
    n: usize,
}

impl Planned<'_> {
    /// Is, or will be, a holder.
    fn has(&self, (layer, expert): (LayerId, ExpertId)) -> bool {
        self.wanted.contains(layer, expert) || self.machine.pinned.contains(layer, expert)
    }

    fn has_room(&self) -> bool {
        (self.n as u64 + 1).saturating_mul(self.machine.expert_bytes) <= self.machine.memory_bytes_max
    }

    fn load(&self, layer: LayerId) -> (usize, usize) {
        (self.n_by_layer.get(&layer).copied().unwrap_or(0), self.n)
    }

    fn give(&mut self, (layer, expert): (LayerId, ExpertId)) {
        self.wanted.insert(layer, expert);
        *self.n_by_layer.entry(layer).or_default() += 1;
        self.n += 1;
    }

    fn take(&mut self, (layer, expert): (LayerId, ExpertId)) {
        self.wanted.remove(layer, expert);
        if let Some(n) = self.n_by_layer.get_mut(&layer) {
            *n -= 1;
        }
        self.n -= 1;
    }
}

impl<'a> Plan<'a> {
    fn new(machines: &'a [Machine]) -> Self {
        let mut machines: Vec<Planned<'a>> = machines
            .iter()
            .map(|machine| {
                let pinned = |&(layer, expert): &(LayerId, ExpertId)| machine.pinned.contains(layer, expert);
                let wanted: Holds = machine.wanted.iter().filter(|pair| !pinned(pair)).collect();
                let mut n_by_layer: BTreeMap<LayerId, usize> = BTreeMap::new();
                wanted
                    .iter()
                    .chain(machine.pinned.iter())
                    .for_each(|(layer, _)| *n_by_layer.entry(layer).or_default() += 1);
                Planned { machine, n: wanted.len() + machine.pinned.len(), wanted, n_by_layer }
            })
            .collect();
        machines.sort_by(|a, b| a.machine.instance.cmp(&b.machine.instance));
        Self { machines }
    }

    fn usable(&mut self) -> impl Iterator<Item = &mut Planned<'a>> {
        self.machines.iter_mut().filter(|planned| planned.machine.usable)
    }

    /// Gives every expert its holders. The least loaded server in that layer gets it; among equals the first, so that
    /// servers with equal loads come to mirror each other, and few pairs of them are the only holders of anything.
    fn fill(&mut self, goal: &Goal) -> Urgency {
        let mut urgency = Urgency::None;
        let n_holders = |plan: &mut Self, pair| plan.usable().filter(|planned| planned.has(pair)).count();
        // Those without any holder get one before anybody gets a second.
        for wanted in 1..=goal.replicas {
            for pair in goal.pairs() {
                if n_holders(self, pair) >= wanted {
                    continue;
                }
                let candidates = self.usable().filter(|planned| !planned.has(pair) && planned.has_room());
                if let Some(planned) = candidates.min_by_key(|planned| planned.load(pair.0)) {
                    planned.give(pair);
                    urgency = match (wanted, urgency) {
                        (1, _) | (_, Urgency::Orphans) => Urgency::Orphans,
                        _ => Urgency::Replicas,
                    };
                }
            }
        }
        urgency
    }

    /// Everybody holds what it should.
    fn is_settled(&self) -> bool {
        let held = |planned: &Planned<'_>| {
            planned.wanted.iter().all(|(layer, expert)| planned.machine.holds.contains(layer, expert))
        };
        self.machines.iter().filter(|planned| planned.machine.usable).all(held)
    }

    /// Takes experts from where they are one too many.
    fn trim(&mut self, goal: &Goal) -> bool {
        let mut trimmed = false;
        for pair in goal.pairs() {
            while self.usable().filter(|planned| planned.has(pair)).count() > goal.replicas {
                let candidates = self.usable().filter(|planned| planned.wanted.contains(pair.0, pair.1));
                let Some(planned) = candidates.max_by_key(|planned| (planned.n, planned.load(pair.0))) else {
                    break;
                };
                planned.take(pair);
                trimmed = true;
            }
        }
        trimmed
    }

    /// Gives experts of servers that hold more than their part to servers that hold less; [`Plan::trim`] takes them
    /// from the former once they are loaded.
    fn level(&mut self, goal: &Goal) -> bool {
        let mut loads: BTreeMap<InstanceId, usize> =
            self.usable().map(|planned| (planned.machine.instance.clone(), planned.n)).collect();
        let mut levelled = false;
        for pair in goal.pairs() {
            let giver = self
                .machines
                .iter()
                .filter(|planned| planned.machine.usable && planned.wanted.contains(pair.0, pair.1))
                .map(|planned| planned.machine.instance.clone())
                .max_by_key(|instance| loads[instance]);
            let Some(giver) = giver else { continue };
            let giver_load = loads[&giver];
            let taker = self
                .usable()
                .filter(|planned| !planned.has(pair) && planned.has_room() && planned.n + 1 < giver_load)
                .min_by_key(|planned| (planned.n, planned.load(pair.0)));
            let Some(taker) = taker else { continue };
            taker.give(pair);
            loads.entry(giver).and_modify(|load| *load -= 1);
            loads.entry(taker.machine.instance.clone()).and_modify(|load| *load += 1);
            levelled = true;
        }
        levelled
    }
}

#[cfg(test)]
mod tests;
