//! What was seen → what holds. Pure.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use proto::v1;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    load::{Answer, QUESTIONS_MAX},
    scenario::{Action, Event, Scenario},
};

/// Everything a run has shown.
pub(crate) struct Observed {
    pub(crate) peaceful: Vec<Answer>,
    pub(crate) answers: Vec<Answer>,
    pub(crate) took: Duration,
    /// When each began and ended, since the load began.
    pub(crate) events: Vec<(Duration, Duration, Event)>,
    pub(crate) seen: Vec<Seen>,
    pub(crate) registered: Option<Duration>,
    pub(crate) fallen: Vec<String>,
}

/// A router's view at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) at: Duration,
    router: SocketAddr,
    pub(crate) under_replicated: u32,
    missing: bool,
    pub(crate) ejected: Vec<String>,
    ready: Vec<String>,
    frames: u64,
    hedges: u64,
    failovers: u64,
    stale: u64,
    failures: BTreeMap<String, u64>,
}

impl Seen {
    pub(crate) fn new(at: Duration, router: SocketAddr, status: &v1::RouterStatus) -> Self {
        let in_state = |state: &str| {
            let servers = status.servers.iter().filter(|server| server.state == state);
            servers.map(|server| server.address.clone()).collect::<Vec<_>>()
        };
        Self {
            at,
            router,
            under_replicated: status.under_replicated,
            missing: !status.missing.is_empty(),
            ejected: in_state("ejected"),
            ready: in_state("ready"),
            frames: status.frames,
            hedges: status.hedges,
            failovers: status.failovers,
            stale: status.stale_replies,
            failures: status.failures.clone().into_iter().collect(),
        }
    }

    /// What is worth a line of the history when it changes.
    pub(crate) fn summary(&self) -> Value {
        json!({
            "router": self.router.to_string(),
            "under_replicated": self.under_replicated,
            "missing": self.missing,
            "ejected": self.ejected,
            "ready": self.ready.len(),
            "failures": self.failures,
        })
    }
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) check: &'static str,
    pub(crate) value: String,
    pub(crate) bound: String,
    pub(crate) holds: bool,
}

fn verdict(check: &'static str, value: impl ToString, bound: impl ToString, holds: bool) -> Verdict {
    Verdict { check, value: value.to_string(), bound: bound.to_string(), holds }
}

fn ms(span: Duration) -> String {
    format!("{:.0} ms", span.as_secs_f64() * 1e3)
}

/// A value within a bound; what was never seen is not within it.
fn within(check: &'static str, value: Option<Duration>, bound: Duration) -> Verdict {
    let shown = value.map_or_else(|| "never".to_owned(), ms);
    verdict(check, shown, format!("≤ {}", ms(bound)), value.is_some_and(|value| value <= bound))
}

pub(crate) fn judge(scenario: &Scenario, observed: &Observed) -> Vec<Verdict> {
    let check = &scenario.check;
    let mut verdicts = answers(scenario, observed);
    let gap = observed.answers.iter().map(|answer| answer.gap_ms).fold(0.0, f64::max);
    let gap_bound = check.gap_max_ms;
    verdicts.push(verdict(
        "longest gap between two pieces",
        format!("{gap:.0} ms"),
        gap_bound.map_or_else(String::new, |bound| format!("≤ {bound:.0} ms")),
        gap_bound.is_none_or(|bound| gap <= bound),
    ));
    let rate = observed.answers.iter().map(|answer| answer.n_tokens).sum::<u64>() as f64
        / observed.took.as_secs_f64();
    let peaceful = peaceful_rate(observed);
    let share = rate / peaceful;
    verdicts.push(verdict(
        "tokens/s against the peaceful run",
        format!("{rate:.0}/{peaceful:.0} = {share:.2}"),
        check.throughput_min.map_or_else(String::new, |bound| format!("≥ {bound:.2}")),
        check.throughput_min.is_none_or(|bound| share >= bound),
    ));
    verdicts.extend(recovery(scenario, observed));
    verdicts.extend(counters(scenario, observed));
    let fallen = if observed.fallen.is_empty() { "none".to_owned() } else { observed.fallen.join(", ") };
    verdicts.push(verdict("processes that ended by themselves", fallen, "none", observed.fallen.is_empty()));
    verdicts
}

fn peaceful_rate(observed: &Observed) -> f64 {
    let tokens: u64 = observed.peaceful.iter().map(|answer| answer.n_tokens).sum();
    let began = observed.peaceful.iter().map(|answer| answer.began_s).fold(f64::MAX, f64::min);
    let ended = observed.peaceful.iter().map(|answer| answer.began_s + answer.took_s).fold(0.0, f64::max);
    tokens as f64 / (ended - began)
}

fn answers(scenario: &Scenario, observed: &Observed) -> Vec<Verdict> {
    let check = &scenario.check;
    let mut reference: Vec<Option<&str>> = vec![None; QUESTIONS_MAX];
    for answer in &observed.peaceful {
        reference[answer.question] = Some(&answer.text);
    }
    let failed: Vec<&Answer> = observed.answers.iter().filter(|answer| answer.error.is_some()).collect();
    let changed = observed.answers.iter().filter(|answer| {
        answer.error.is_none() && reference[answer.question].is_some_and(|text| text != answer.text)
    });
    let n_changed = changed.count();
    let n = observed.answers.len();
    let mut verdicts = vec![verdict(
        "answers",
        format!("{n} in {:.1} s", observed.took.as_secs_f64()),
        format!("≥ {}", check.answers_min),
        n >= check.answers_min,
    )];
    let named = |answer: &&Answer| {
        let error = answer.error.as_deref().unwrap_or_default();
        check.failures_name.as_ref().is_some_and(|name| error.contains(name.as_str()))
    };
    let unexplained: Vec<&&Answer> = failed.iter().filter(|answer| !named(answer)).collect();
    let first = unexplained.first().and_then(|answer| answer.error.clone()).unwrap_or_default();
    match &check.failures_name {
        None => verdicts.push(verdict("failed", format!("{} {first}", failed.len()), "0", failed.is_empty())),
        Some(name) => {
            let holds = unexplained.is_empty() && !failed.is_empty();
            let value = format!("{}, {} otherwise {first}", failed.len(), unexplained.len());
            verdicts.push(verdict("failed, with a message", value, format!("each says {name:?}"), holds));
        }
    }
    verdicts.push(verdict("changed", n_changed, "0", n_changed == 0));
    verdicts
}

fn last_of<'a>(observed: &'a Observed, actions: &[Action]) -> Option<&'a (Duration, Duration, Event)> {
    observed.events.iter().rev().find(|(_, _, event)| actions.contains(&event.action))
}

fn recovery(scenario: &Scenario, observed: &Observed) -> Vec<Verdict> {
    let check = &scenario.check;
    let mut verdicts = Vec::new();
    if let Some(bound) = check.replicated_within {
        let actions = [Action::Start, Action::Add, Action::Kill, Action::Terminate, Action::Restart];
        let since = last_of(observed, &actions).map_or(Duration::ZERO, |(began, ..)| *began);
        // The end of the last time that it was not so.
        let short = observed.seen.iter().filter(|seen| seen.at > since && seen.under_replicated > 0);
        let last_short = short.map(|seen| seen.at).max();
        let whole = observed.seen.last().is_some_and(|seen| seen.under_replicated == 0);
        let took = last_short.map_or(Duration::ZERO, |at| at.saturating_sub(since));
        verdicts.push(within("every expert has its replicas", whole.then_some(took), bound));
    }
    let first = |action: Action| {
        observed.events.iter().find(|(_, _, event)| {
            event.action == action || (action == Action::Freeze && event.action == Action::Lose)
        })
    };
    if let (Some(bound), Some((began, ..))) = (check.ejected_within, first(Action::Freeze)) {
        let n_ready = scenario.cluster.experts;
        let out = observed
            .seen
            .iter()
            .find(|seen| seen.at > *began && (!seen.ejected.is_empty() || seen.ready.len() < n_ready));
        verdicts.push(within("ejected", out.map(|seen| seen.at - *began), bound));
    }
    let mended = observed.events.iter().rev().find(|(_, _, event)| {
        event.action == Action::Thaw
            || (event.action == Action::Lose && event.lose_to == 0 && event.lose_from == 0)
    });
    if let (Some(bound), Some((_, ended, _))) = (check.readmitted_within, mended) {
        let n_all = scenario.cluster.experts;
        let back = observed.seen.iter().find(|seen| seen.at > *ended && seen.ready.len() == n_all);
        verdicts.push(within("re-admitted", back.map(|seen| seen.at - *ended), bound));
    }
    if let Some(bound) = check.registered_within {
        verdicts.push(within("each registered exactly once", observed.registered, bound));
    }
    if check.nobody_evicted {
        let evicted = observed.seen.iter().filter(|seen| seen.missing).count();
        verdicts.push(verdict("views without a holder of some expert", evicted, "0", evicted == 0));
    }
    verdicts
}

fn counters(scenario: &Scenario, observed: &Observed) -> Vec<Verdict> {
    let check = &scenario.check;
    // Each router's own counters begin at nought: the last word of each counts.
    let mut last: BTreeMap<SocketAddr, &Seen> = BTreeMap::new();
    for seen in &observed.seen {
        last.insert(seen.router, seen);
    }
    let sum = |of: fn(&Seen) -> u64| last.values().map(|seen| of(seen)).sum::<u64>();
    let (frames, hedges, failovers) =
        (sum(|seen| seen.frames), sum(|seen| seen.hedges), sum(|seen| seen.failovers));
    let share = hedges as f64 / frames.max(1) as f64;
    let needed = frames.saturating_sub(hedges + failovers).max(1);
    let amplification = frames as f64 / needed as f64;
    let mut verdicts = vec![
        verdict(
            "hedges of all frames",
            format!("{hedges}/{frames} = {share:.3}"),
            check.hedges_max.map_or_else(String::new, |bound| format!("≤ {bound}")),
            check.hedges_max.is_none_or(|bound| share <= bound),
        ),
        verdict(
            "frames against those needed",
            format!("{amplification:.3}"),
            check.amplification_max.map_or_else(String::new, |bound| format!("≤ {bound}")),
            check.amplification_max.is_none_or(|bound| amplification <= bound),
        ),
        verdict("late replies, none of them used", sum(|seen| seen.stale), "", true),
    ];
    let mut failures: BTreeMap<&str, u64> = BTreeMap::new();
    for seen in last.values() {
        for (reason, n) in &seen.failures {
            *failures.entry(reason).or_default() += n;
        }
    }
    let all = failures.iter().map(|(reason, n)| format!("{reason} {n}")).collect::<Vec<_>>().join(", ");
    let missing: Vec<&String> =
        check.counted.iter().filter(|reason| !failures.contains_key(reason.as_str())).collect();
    verdicts.push(verdict(
        "failed frames by reason",
        all,
        if check.counted.is_empty() { String::new() } else { format!("has {}", check.counted.join(", ")) },
        missing.is_empty(),
    ));
    verdicts
}
