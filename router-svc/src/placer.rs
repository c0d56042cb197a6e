//! The leader's work: as long as this router leads, it writes the next placement whenever the servers' records or links
//! call for one. Decisions are `cluster::placement`; here is when to ask for them, and with what.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use cluster::{
    Holdings, Membership, Placement, Record, Refused, Role, Session, State, Term,
    placement::{Goal, Machine, Urgency, Wanted, next},
};
use ids::{InstanceId, Version};
use telemetry::Tasks;
use tokio::sync::watch;

use crate::link::Links;

/// How often the leader looks, besides whenever something changes.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How long an expert with one holder less is left alone: a server that is started again needs no moves. One without any
/// holder is not.
const REPLICAS_PATIENCE: Duration = Duration::from_secs(1);

/// How long the very first placement waits for further servers.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// The same for mere inequality.
const BALANCE_PATIENCE: Duration = Duration::from_millis(500);

/// What `Status` says about it.
#[derive(Debug, Default)]
pub(crate) struct PlacerState {
    leads: AtomicBool,
    version: AtomicU64,
}

impl PlacerState {
    pub(crate) fn leads(&self) -> bool {
        self.leads.load(Relaxed)
    }

    /// Of the placement in force; 0: none.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Relaxed)
    }
}

pub(crate) struct Placer {
    instance: InstanceId,
    checkpoint: String,
    goal: Goal,
    session: Session,
    links: Arc<Links>,
    state: Arc<PlacerState>,
    /// The newest placement ever seen: a registry that lost its data is given it again.
    last: Mutex<Option<Arc<Placement>>>,
}

impl Placer {
    /// Takes part in the election and places experts while it leads, until shutdown.
    pub(crate) fn start(
        instance: InstanceId,
        checkpoint: String,
        goal: Goal,
        session: Session,
        links: Arc<Links>,
        tasks: &Tasks,
    ) -> Arc<PlacerState> {
        let state = Arc::new(PlacerState::default());
        if !session.is_dynamic() {
            return state;
        }
        let term = session.campaign(instance.clone());
        let placer = Self {
            instance,
            checkpoint,
            goal,
            session,
            links,
            state: Arc::clone(&state),
            last: Mutex::default(),
        };
        let stop = tasks.clone();
        tasks.spawn("placer", async move {
            tokio::select! {
                () = stop.shutting_down() => {}
                () = placer.run(term) => {}
            }
        });
        state
    }

    async fn run(self, mut term: watch::Receiver<Option<Term>>) {
        let mut members = self.session.members(Role::Expert);
        let mut placement = self.session.placement();
        // Since when the same kind of step has been due.
        let mut due: Option<(Urgency, Instant)> = None;
        loop {
            let current = placement.borrow_and_update().clone();
            self.remember(current.clone());
            let leading = term.borrow_and_update().clone();
            self.state.leads.store(leading.is_some(), Relaxed);
            if let Some(leading) = leading {
                let membership = Arc::clone(&members.borrow_and_update());
                let step = self.step(&membership, current.as_deref());
                due = step.as_ref().map(|(urgency, ..)| match due {
                    Some((before, since)) if before == *urgency => (before, since),
                    Some(_) | None => (*urgency, now()),
                });
                if let (Some((urgency, next)), Some((_, since))) = (step, due)
                    && now().saturating_duration_since(since) >= patience(urgency, self.last().is_none())
                {
                    due = None;
                    self.write(&leading, current.as_deref(), next, urgency).await;
                }
            }
            let heard = tokio::select! {
                heard = term.changed() => heard,
                heard = placement.changed() => heard,
                heard = members.changed() => heard,
                () = tokio::time::sleep(LOOK_INTERVAL) => Ok(()),
            };
            if heard.is_err() {
                // The session has ended, and with it everything that could be decided on.
                return;
            }
        }
    }

    fn remember(&self, current: Option<Arc<Placement>>) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = current
            && last.as_ref().is_none_or(|last| last.version <= current.version)
        {
            self.state.version.store(current.version.0, Relaxed);
            *last = Some(current);
        }
    }

    fn last(&self) -> Option<Arc<Placement>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The placement to be written, if there is one, and how urgent it is.
    fn step(&self, membership: &Membership, current: Option<&Placement>) -> Option<(Urgency, Placement)> {
        let joined = self.links.joined();
        let records: Vec<&Record> = membership
            .members
            .values()
            .filter_map(|member| member.record.as_ref())
            .filter(|record| {
                record.checkpoint == self.checkpoint && record.wire_version == proto::WIRE_VERSION
            })
            .collect();
        let last = self.last();
        let machines: Vec<Machine> = records
            .iter()
            .filter_map(|record| {
                let holdings = record.holdings.as_ref()?;
                Some(machine(record, holdings, joined.contains(&record.instance), last.as_deref()))
            })
            .collect();
        // Whoever reaches nobody is cut off himself.
        if !machines.iter().any(|machine| machine.usable) {
            return None;
        }
        let (wanted, urgency) = next(&self.goal, &machines);
        let before: Wanted = machines.into_iter().map(|machine| (machine.instance, machine.wanted)).collect();
        // A registry that has lost the placement gets it again.
        if current.is_some() && (urgency == Urgency::None || wanted == before) {
            return None;
        }
        let applied =
            records.iter().filter_map(|record| record.holdings.as_ref()).map(|holdings| holdings.placement);
        let newest = applied.chain(last.map(|last| last.version)).max().unwrap_or_default();
        let wanted: BTreeMap<String, _> =
            wanted.into_iter().map(|(instance, holds)| (instance.to_string(), holds)).collect();
        let placement = Placement { version: Version(newest.0 + 1), leader: self.instance.clone(), wanted };
        Some((urgency, placement))
    }

    async fn write(&self, term: &Term, current: Option<&Placement>, next: Placement, urgency: Urgency) {
        let before = current.map_or(Version(0), |current| current.version);
        let version = next.version;
        match self.session.propose(term, before, next).await {
            Ok(()) => tracing::info!(%version, ?urgency, "placement written"),
            // The watch will say what has changed.
            Err(error @ (Refused::NotLeader | Refused::Conflict)) => {
                tracing::info!(%version, %error, "placement not written");
            }
            Err(error @ Refused::Unreachable(_)) => tracing::warn!(%version, %error, "placement not written"),
        }
    }
}

fn machine(record: &Record, holdings: &Holdings, joined: bool, last: Option<&Placement>) -> Machine {
    let wanted = last.and_then(|last| last.wanted.get(record.instance.as_str())).cloned();
    // Not placed yet, or by a leader that nobody remembers: what it holds is what it should.
    let wanted = wanted.unwrap_or_else(|| {
        holdings.holds.iter().filter(|&(layer, expert)| !holdings.pinned.contains(layer, expert)).collect()
    });
    Machine {
        instance: record.instance.clone(),
        usable: joined && record.state == State::Ready,
        holds: holdings.holds.clone(),
        pinned: holdings.pinned.clone(),
        wanted,
        memory_bytes_max: holdings.memory_bytes_max,
        expert_bytes: holdings.expert_bytes,
    }
}

const fn patience(urgency: Urgency, is_first: bool) -> Duration {
    match urgency {
        // Servers that start together should share the experts, and the first of them not load all.
        _ if is_first => FIRST_PATIENCE,
        Urgency::None | Urgency::Orphans => Duration::ZERO,
        Urgency::Replicas => REPLICAS_PATIENCE,
        Urgency::Balance => BALANCE_PATIENCE,
    }
}

#[expect(clippy::disallowed_methods, reason = "how long a step has been due is measured here: an edge")]
fn now() -> Instant {
    Instant::now()
}
