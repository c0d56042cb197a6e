//! `/metrics` of every process.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::{body, complete};
use crate::{
    failure::needs_expert_3,
    fixtures::minnow,
    harness::{Cluster, Endpoint, Http, cluster::Member},
};

/// One scrape: series → value, and the type of each metric.
#[derive(Debug, Default)]
pub(super) struct Scrape {
    series: BTreeMap<String, f64>,
    types: BTreeMap<String, String>,
}

impl Scrape {
    pub(super) async fn of(member: &Member) -> Self {
        let response = Http { address: member.address }.get("/metrics").await;
        assert_eq!(response.status, 200);
        assert!(
            response
                .header("content-type")
                .is_some_and(|kind| kind.starts_with("application/openmetrics-text"))
        );
        let mut scrape = Self::default();
        for line in String::from_utf8(response.body).expect("text").lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a name and a type");
                assert!(
                    scrape.types.insert(name.to_owned(), kind.to_owned()).is_none(),
                    "{name} is there twice"
                );
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').expect("a series and a value");
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                assert!(scrape.series.insert(series.to_owned(), value).is_none(), "{series} is there twice");
            }
        }
        scrape
    }

    #[track_caller]
    pub(super) fn value(&self, series: &str) -> f64 {
        *self.series.get(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.series.keys()))
    }
}

#[tokio::test]
async fn every_process_counts_what_it_did() {
    let cluster = Cluster::builder(&minnow()).experts(2).start().await;
    complete(&cluster.http(), &[], 10).await.ok();
    cluster.idle().await;
    let gateway = Scrape::of(cluster.gateway()).await;
    let vllm = r#"{model_name="tested",engine="0"}"#;
    for (series, expected) in [
        (r#"shoal_gateway_requests_total{endpoint="completions",outcome="ok"}"#.to_owned(), 1.0),
        (r#"shoal_gateway_generation_tokens_total{model="tested"}"#.to_owned(), 10.0),
        (r#"shoal_gateway_time_to_first_token_seconds_count{model="tested"}"#.to_owned(), 1.0),
        (r#"shoal_gateway_inter_token_latency_seconds_count{model="tested"}"#.to_owned(), 9.0),
        (format!("vllm:generation_tokens_total{vllm}"), 10.0),
        (format!("vllm:num_requests_running{vllm}"), 0.0),
        (format!("vllm:num_requests_waiting{vllm}"), 0.0),
        (format!("vllm:kv_cache_usage_perc{vllm}"), 0.0),
        (format!("vllm:time_to_first_token_seconds_count{vllm}"), 1.0),
        (format!("vllm:e2e_request_latency_seconds_count{vllm}"), 1.0),
        (
            r#"vllm:request_success_total{finished_reason="length",model_name="tested",engine="0"}"#
                .to_owned(),
            1.0,
        ),
        (r#"shoal_gateway_routers{state="ready"}"#.to_owned(), 1.0),
        (r"shoal_registry_connected".to_owned(), 1.0),
    ] {
        assert_eq!(gateway.value(&series), expected, "{series}");
    }
    let router = Scrape::of(&cluster.router).await;
    let status = cluster.router_status().await;
    assert_eq!(router.value("shoal_router_generation_tokens_total"), 10.0);
    assert_eq!(router.value("shoal_router_queue_seconds_count"), 1.0);
    // Calibration is no step.
    assert_eq!(router.value("shoal_router_step_seconds_count"), status.steps as f64);
    let mut pairs = 0.0;
    for index in 0..2 {
        let expert = Scrape::of(&cluster.experts[index]).await;
        let status = cluster.expert_status(index).await;
        assert_eq!(expert.value("shoal_expert_pairs_total"), status.pairs as f64);
        assert_eq!(expert.value(r#"shoal_expert_frames_total{outcome="computed"}"#), status.frames as f64);
        assert_eq!(expert.value("shoal_expert_compute_seconds_count"), status.frames as f64);
        assert_eq!(expert.value("shoal_expert_experts_held"), 32.0);
        pairs += status.pairs as f64;
        let address = cluster.experts[index].address;
        assert!(router.value(&format!("shoal_router_frame_seconds_count{{server=\"{address}\"}}")) > 0.0);
        assert_eq!(router.value(&format!("shoal_router_server_up{{server=\"{address}\"}}")), 1.0);
    }
    let of_experts: f64 = router
        .series
        .iter()
        .filter(|(name, _)| name.starts_with("shoal_router_expert_rows_total"))
        .map(|(_, n)| n)
        .sum();
    // The probe of the calibration, 64 rows through four layers, is in the servers' counts alone.
    let probe = 64.0 * 4.0 * top_k();
    assert_eq!(of_experts, pairs - probe);
}

/// The catalogue is what is served, and nothing else is.
#[tokio::test]
async fn the_catalogue_is_served() {
    use telemetry::names::{ALL, On};
    let cluster = Cluster::builder(&minnow()).all_args(&["--otlp", "http://127.0.0.1:1"]).start().await;
    complete(&cluster.http(), &[], 2).await.ok();
    for (member, on) in
        [(cluster.gateway(), On::Gateway), (&cluster.router, On::Router), (&cluster.experts[0], On::Expert)]
    {
        let served: BTreeSet<String> = Scrape::of(member).await.types.into_keys().collect();
        let stem = |name: &str| name.strip_suffix("_total").unwrap_or(name).to_owned();
        let of_registry = |name: &str| name.starts_with("shoal_registry");
        let listed: BTreeSet<String> = ALL
            .iter()
            .filter(|metric| metric.on == on || metric.on == On::Every)
            // An expert server with a static list has no registry.
            .filter(|metric| !(on == On::Expert && of_registry(metric.name)))
            .map(|metric| stem(metric.name))
            .collect();
        assert_eq!(served, listed, "{on:?}");
    }
}

/// minnow's.
fn top_k() -> f64 {
    let config = std::fs::read(minnow().join("config.json")).expect("minnow has a config");
    let config: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
    config["num_experts_per_tok"].as_f64().expect("a number")
}

/// B30: no label takes what a client sends.
#[tokio::test]
async fn clients_cannot_make_series() {
    let cluster = Cluster::builder(&needs_expert_3().write()).start().await;
    let http = cluster.http();
    // One of each kind first: what follows is not new.
    let junk = async |n: usize| {
        let mut request = body("x", 1);
        request["model"] = json!(format!("junk-{n:04}"));
        assert_eq!(http.post(Endpoint::Completions.path(), &request).await.status, 404);
        assert_eq!(http.get(&format!("/v1/x{n}")).await.status, 404);
    };
    junk(0).await;
    let before = Scrape::of(cluster.gateway()).await;
    for n in 1..=1000 {
        junk(n).await;
    }
    let after = Scrape::of(cluster.gateway()).await;
    let names = |scrape: &Scrape| scrape.series.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&before), names(&after));
    assert_eq!(before.types, after.types);
    for (series, value) in &before.series {
        if series.contains("_total") || series.contains("_count") || series.contains("_bucket") {
            assert!(after.series[series] >= *value, "{series} went down");
        }
    }
    let refused = r#"shoal_gateway_requests_total{endpoint="completions",outcome="not_found"}"#;
    assert_eq!(after.value(refused), 1001.0);
}

/// B30: nor does a restart.
#[tokio::test]
async fn restarts_make_no_series() {
    let model = needs_expert_3().write();
    let mut cluster = Cluster::builder(&model).placement(&["0-3", "0-3"]).start().await;
    complete(&cluster.http(), &[], 4).await.ok();
    let of_servers =
        |scrape: &Scrape| scrape.series.keys().filter(|series| series.contains("server=")).count();
    let before = of_servers(&Scrape::of(&cluster.router).await);
    for _ in 0..20 {
        cluster.experts[0].process.kill();
        cluster.restart_expert(0).await;
        cluster.servers_ready().await;
        complete(&cluster.http(), &[], 2).await.ok();
    }
    assert_eq!(of_servers(&Scrape::of(&cluster.router).await), before);
}

/// The slow one of four is found from the router's metrics alone.
#[tokio::test]
async fn a_slow_server_is_found_by_metrics() {
    let builder = Cluster::builder(&minnow()).experts(4).expert_args(2, &["--chaos-delay", "20ms"]);
    let cluster = builder.start().await;
    complete(&cluster.http(), &[], 6).await.ok();
    let router = Scrape::of(&cluster.router).await;
    let mean = |address: std::net::SocketAddr| {
        let of = |part| router.value(&format!("shoal_router_frame_seconds_{part}{{server=\"{address}\"}}"));
        of("sum") / of("count")
    };
    let means: Vec<f64> = cluster.experts.iter().map(|expert| mean(expert.address)).collect();
    for (index, mean) in means.iter().enumerate() {
        assert_eq!(*mean >= 0.02, index == 2, "{means:?}");
    }
}
