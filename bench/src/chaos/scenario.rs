//! What runs, what happens when, and what must hold.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use serde::{Deserialize, Serialize};

use super::{load::QUESTIONS_MAX, proxy::Toxics};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Scenario {
    /// One line: what it shows.
    pub(crate) about: String,
    #[serde(default)]
    pub(crate) cluster: Topology,
    pub(crate) load: Load,
    #[serde(default, rename = "event")]
    pub(crate) events: Vec<Event>,
    #[serde(default)]
    pub(crate) check: Checks,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Topology {
    pub(crate) experts: usize,
    pub(crate) replicas: usize,
    pub(crate) routers: usize,
    pub(crate) gateways: usize,
    /// A fault proxy before each expert server.
    pub(crate) proxied: bool,
    /// A network namespace for each expert server.
    pub(crate) hosts: bool,
    pub(crate) router_args: Vec<String>,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            experts: 4,
            replicas: 2,
            routers: 1,
            gateways: 1,
            proxied: false,
            hosts: false,
            router_args: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Load {
    pub(crate) clients: usize,
    /// So many requests in all, or
    #[serde(default)]
    pub(crate) requests: usize,
    /// for so long. With both, whichever is later.
    #[serde(default, with = "humantime_serde")]
    pub(crate) lasts: Duration,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Event {
    /// Since the load began.
    #[serde(with = "humantime_serde")]
    pub(crate) at: Duration,
    #[serde(rename = "do")]
    pub(crate) action: Action,
    /// `expert 0`, `router random`, `experts half`, `all`; needed by actions on processes.
    #[serde(default)]
    pub(crate) target: String,
    /// Again and again, until `until`.
    #[serde(default, with = "humantime_serde")]
    pub(crate) every: Duration,
    #[serde(default, with = "humantime_serde")]
    pub(crate) until: Duration,
    /// Of `toxic`.
    #[serde(default)]
    pub(crate) toxics: Toxics,
    /// Of `lose`: percent of the packets to and from the host.
    #[serde(default)]
    pub(crate) lose_to: u8,
    #[serde(default)]
    pub(crate) lose_from: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Action {
    /// SIGKILL.
    Kill,
    /// A process that was killed or has left, again, as a new instance.
    Start,
    Freeze,
    Thaw,
    /// SIGTERM, and wait until it has left.
    Terminate,
    /// SIGTERM, wait, start again; with `all`, one after the other.
    Restart,
    /// One more expert server.
    Add,
    EtcdDown,
    EtcdUp,
    /// Its data is gone.
    EtcdWipe,
    EtcdFreeze,
    EtcdThaw,
    Toxic,
    Lose,
}

/// What must hold; what is not named is not checked. Nothing lost and nothing changed is checked always.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Checks {
    /// Longest time between two pieces of any answer.
    pub(crate) gap_max_ms: Option<f64>,
    /// Tokens a second, as a share of the undisturbed run's.
    pub(crate) throughput_min: Option<f64>,
    /// Every expert has its replicas again, after the last start, addition or kill.
    #[serde(with = "humantime_serde::option")]
    pub(crate) replicated_within: Option<Duration>,
    #[serde(with = "humantime_serde::option")]
    pub(crate) ejected_within: Option<Duration>,
    #[serde(with = "humantime_serde::option")]
    pub(crate) readmitted_within: Option<Duration>,
    /// After the last event every living expert server is registered exactly once.
    #[serde(with = "humantime_serde::option")]
    pub(crate) registered_within: Option<Duration>,
    /// Hedges, as a share of all frames.
    pub(crate) hedges_max: Option<f64>,
    /// Frames in all, as a multiple of those that a peaceful run would send.
    pub(crate) amplification_max: Option<f64>,
    /// Reasons of failed frames that must have been counted.
    pub(crate) counted: Vec<String>,
    /// No expert server may be ejected or lost by its routers but those that something was done to.
    pub(crate) nobody_evicted: bool,
    /// Answers that may fail, each with a message that contains this: for scenarios in which there is no holder.
    pub(crate) failures_name: Option<String>,
    /// Of a server started under load: from being ready to its first frame.
    #[serde(with = "humantime_serde::option")]
    pub(crate) first_frame_within: Option<Duration>,
    /// Answers, at least.
    pub(crate) answers_min: usize,
}

/// A scenario with every choice made: what a history begins with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) seed: u64,
    pub(crate) questions_max: usize,
    pub(crate) scenario: Scenario,
}

impl Plan {
    /// Reads a scenario; times and numbers of requests are multiplied by `scale`.
    pub(crate) fn load(path: &Path, seed: u64, scale: f64) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut scenario: Scenario =
            toml::from_str(&text).with_context(|| format!("{} is no scenario", path.display()))?;
        scenario.load.requests = (scenario.load.requests as f64 * scale).ceil() as usize;
        scenario.load.lasts = scenario.load.lasts.mul_f64(scale);
        for event in &mut scenario.events {
            event.at = event.at.mul_f64(scale);
            event.until = event.until.mul_f64(scale);
        }
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        let topology = scenario.cluster.clone();
        scenario.events = expand(&scenario.events, &topology, &mut dice);
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let questions_max = ((QUESTIONS_MAX as f64 * scale) as usize).clamp(QUESTIONS_MAX / 3, QUESTIONS_MAX);
        Ok(Self { name, seed, questions_max, scenario })
    }
}

/// Every event once, in order of time, with its target named.
fn expand(events: &[Event], topology: &Topology, dice: &mut ChaCha8Rng) -> Vec<Event> {
    let mut expanded = Vec::new();
    for event in events {
        let mut at = event.at;
        // What is killed at random comes back before the next one goes.
        loop {
            let mut one = Event { at, every: Duration::ZERO, until: Duration::ZERO, ..event.clone() };
            if let Some(role) = event.target.strip_suffix(" random") {
                let n = match role {
                    "router" => topology.routers,
                    "gateway" => topology.gateways,
                    _ => topology.experts,
                };
                one.target = format!("{role} {}", dice.next_u64() as usize % n.max(1));
            }
            let comes_back = one.action == Action::Kill && !event.every.is_zero();
            let back = Event { at: at + event.every / 3, action: Action::Start, ..one.clone() };
            expanded.push(one);
            if comes_back {
                expanded.push(back);
            }
            at += event.every;
            if event.every.is_zero() || at >= event.until {
                break;
            }
        }
    }
    expanded.sort_by_key(|event| event.at);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_of_ours_can_be_read() {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/chaos"));
        let mut n = 0;
        for file in std::fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            let plan = Plan::load(&path, 1, 1.0).unwrap_or_else(|error| panic!("{error:?}"));
            assert!(!plan.scenario.about.is_empty(), "{}", path.display());
            n += 1;
        }
        assert!(n > 8, "{n}");
    }

    #[test]
    fn choices_are_made_beforehand_and_depend_on_the_seed_alone() {
        let event = Event {
            at: Duration::from_secs(1),
            action: Action::Kill,
            target: "expert random".into(),
            every: Duration::from_secs(3),
            until: Duration::from_secs(60),
            toxics: Toxics::default(),
            lose_to: 0,
            lose_from: 0,
        };
        let targets = |seed| {
            let expanded = expand(
                std::slice::from_ref(&event),
                &Topology::default(),
                &mut ChaCha8Rng::seed_from_u64(seed),
            );
            assert!(
                expanded.iter().all(|event| event.target.starts_with("expert ") && event.every.is_zero())
            );
            expanded.iter().map(|event| (event.at, event.action, event.target.clone())).collect::<Vec<_>>()
        };
        assert_eq!(targets(1), targets(1));
        assert_ne!(targets(1), targets(2));
        assert_eq!(targets(1).len(), 40, "each kill has its start");
    }
}
