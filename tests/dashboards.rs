//! Dashboards, alert rules and the documentation speak of metrics that there are.

#![expect(clippy::panic, reason = "helpers fail a test as its own body does")]

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use serde_json::Value;
use telemetry::names::{ALL, Kind, Metric, markdown};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(ROOT).join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[expect(clippy::disallowed_methods, reason = "the tests' surroundings, not a program's configuration")]
fn surroundings(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// `UPDATE_DOCS=1 cargo test -p tests --test dashboards` writes it anew.
#[test]
fn the_documentation_lists_every_metric() {
    let head = "# Metrics\n\nEvery process serves `GET /metrics` (OpenMetrics text) on the port that it listens on. The gateway offers vLLM's\n\
                names beside its own where they mean the same, for dashboards and for the Kubernetes inference gateway.\n\
                No label takes a value that a client chooses or that a restart makes new: expert servers are named by address.\n\
                Generated from `crates/telemetry/src/names.rs`.\n";
    let expected = format!("{head}{}", markdown());
    if surroundings("UPDATE_DOCS").is_some() {
        fs::write(Path::new(ROOT).join("docs/metrics.md"), &expected)
            .expect("docs/metrics.md can be written");
    }
    assert_eq!(read("docs/metrics.md"), expected, "docs/metrics.md is not of today: UPDATE_DOCS=1 writes it");
}

/// Names in a query that are metrics of ours, with the labels that they are matched by.
fn metrics_in(query: &str) -> Vec<(String, Vec<String>)> {
    let starts = |at: usize| {
        let alone = !query[..at].ends_with(|before: char| before.is_alphanumeric() || "_:".contains(before));
        alone && (query[at..].starts_with("shoal_") || query[at..].starts_with("vllm:"))
    };
    let found = query.char_indices().map(|(at, _)| at).filter(|&at| starts(at));
    found
        .map(|at| {
            let is_name = |letter: &char| letter.is_ascii_alphanumeric() || *letter == '_' || *letter == ':';
            let name: String = query[at..].chars().take_while(is_name).collect();
            let rest = &query[at + name.len()..];
            let matchers =
                rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inside, _)| inside);
            let labels = matchers.split(',').filter_map(|matcher| matcher.split(['=', '!']).next());
            (name, labels.map(|label| label.trim().to_owned()).filter(|label| !label.is_empty()).collect())
        })
        .collect()
}

/// What Prometheus adds to every series.
const OF_THE_SCRAPE: [&str; 2] = ["job", "instance"];

fn series_of(metric: &Metric, name: &str) -> bool {
    match metric.kind {
        Kind::Counter | Kind::Gauge => metric.name == name,
        Kind::Histogram(_) => ["_bucket", "_sum", "_count"]
            .iter()
            .any(|part| name.strip_suffix(part).is_some_and(|stem| stem == metric.name)),
    }
}

#[track_caller]
fn assert_exist(origin: &str, queries: &[String]) {
    assert!(queries.len() > 10, "{origin} has only {} queries", queries.len());
    for query in queries {
        let metrics = metrics_in(query);
        assert!(!metrics.is_empty(), "{origin}: no metric of ours in {query}");
        for (name, labels) in metrics {
            let metric = ALL.iter().find(|metric| series_of(metric, &name));
            let metric = metric.unwrap_or_else(|| panic!("{origin}: there is no {name}, in {query}"));
            for label in labels {
                let known =
                    metric.labels.contains(&&*label) || OF_THE_SCRAPE.contains(&&*label) || label == "le";
                assert!(known, "{origin}: {name} has no label {label}, in {query}");
            }
        }
    }
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana/shoal.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries: Vec<String> =
        targets.map(|target| target["expr"].as_str().expect("an expression").to_owned()).collect();
    assert_exist("the dashboard", &queries);
    let ids: BTreeSet<u64> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
}

#[test]
fn the_alert_rules_ask_for_metrics_that_there_are() {
    // Rules are YAML of one shape: an expression follows `expr:`, on its line or indented below it.
    let rules = read("deploy/prometheus/alerts.yml");
    let queries: Vec<String> = rules
        .split("expr:")
        .skip(1)
        .map(|rest| {
            rest.split("\n        for:")
                .next()
                .unwrap_or(rest)
                .split("\n        labels:")
                .next()
                .unwrap_or(rest)
                .to_owned()
        })
        .collect();
    assert_exist("the alert rules", &queries);
}

#[test]
fn promtool_reads_the_rules() {
    let how = "promtool is not on PATH; on Debian: apt-get install prometheus";
    if Command::new("promtool").arg("--version").output().is_err() {
        assert!(surroundings("CI").as_deref() != Some("true"), "{how}");
        return println!("skipped: {how}");
    }
    for (check, file) in [("rules", "alerts.yml"), ("config", "prometheus.yml")] {
        let output = Command::new("promtool")
            .args(["check", check, file])
            .current_dir(Path::new(ROOT).join("deploy/prometheus"))
            .output()
            .expect("promtool runs");
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}: {said}");
    }
}
