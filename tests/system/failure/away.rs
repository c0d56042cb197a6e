//! Parts that are away or frozen: who needs them waits for a while and then hears what is missing; nobody hangs.

use super::*;
use crate::harness::wait_for;

/// The message of the error that a stream must end with.
async fn error_of(mut events: Events) -> String {
    let chunks = within(BOUNDED, "end of the stream", events.rest()).await;
    let (last, others) = chunks.split_last().expect("an error");
    assert!(last["error"]["message"].is_string(), "{last}");
    let is_whole = |chunk: &serde_json::Value| chunk["choices"][0]["finish_reason"].is_string();
    assert!(!others.iter().any(is_whole), "an answer that was cut is not called whole: {others:?}");
    last["error"]["message"].to_string()
}

#[tokio::test]
async fn an_expert_without_a_holder_is_named_and_comes_back() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0,1", "2,3"]).router_args(&["--expert-wait", "1s"]);
    let mut cluster = builder.start().await;
    let http = cluster.http();
    assert_answers(&http).await;
    cluster.experts[1].process.terminate();
    assert!(cluster.experts[1].process.ended().await.status.success(), "it leaves in order");
    let ready = cluster.wait_for_ready(503).await;
    assert!(ready.contains("layer 1") && ready.contains("2-3"), "/ready names what is missing: {ready}");
    let missing = cluster.router_status().await.missing;
    assert_eq!(missing, [v1::MissingExperts { layer: 1, experts: vec![2, 3] }]);
    assert_names_expert_3(&post(http).await);
    cluster.idle().await;
    cluster.restart_expert(1).await;
    cluster.ready().await;
    for _ in 0..10 {
        assert_answers(&http).await;
    }
}

#[tokio::test]
async fn experts_that_nobody_ever_held_are_named() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0,1", "1-2"]).router_args(&["--expert-wait", "1s"]);
    let mut cluster = builder.launch().await;
    let http = cluster.http();
    let ready = wait_for("/ready that names the expert", async || {
        let response = http.get("/ready").await;
        let body = String::from_utf8_lossy(&response.body).into_owned();
        let named = response.status == 503 && body.contains("layer 1") && body.contains("expert 3");
        if named { Ok(body) } else { Err(format!("{} {body}", response.status)) }
    });
    ready.await;
    assert_eq!(http.get("/health").await.status, 200, "alive");
    assert_names_expert_3(&post(http).await);
    assert!(cluster.members().all(|member| member.process.exit_status().is_none()));
    cluster.idle().await;
}

#[tokio::test]
async fn an_expert_server_with_another_checkpoint_is_never_used() {
    let other = needs_expert_3().config("rms_norm_eps", json!(1e-5)).write();
    let stranger = Cluster::builder(&other).without_gateway().start().await;
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0-2"]).router_args(&["--expert-wait", "1s"]);
    let cluster = builder.also_expert_at(stranger.experts[0].address).launch().await;
    let detail = wait_for("refusal", async || {
        let servers = cluster.router_status().await.servers;
        let refused = servers.iter().find(|server| server.state == "refused");
        refused.map(|server| server.detail.clone()).ok_or_else(|| format!("{servers:?}"))
    });
    let (own, others) = (cluster.router_status().await.checkpoint, stranger.router_status().await.checkpoint);
    let detail = detail.await;
    assert!(detail.contains(&own) && detail.contains(&others), "{detail}");
    assert_names_expert_3(&post(cluster.http()).await);
}

#[tokio::test]
async fn a_killed_expert_server_fails_only_who_needs_it() {
    check_killed("never").await;
}

#[tokio::test]
async fn a_killed_expert_server_fails_only_who_needs_it_in_half_batches() {
    check_killed("always").await;
}

async fn check_killed(half_batches: &str) {
    let model = needs_expert_3().write();
    let flags = ["--expert-wait", "1s", "--half-batches", half_batches];
    let mut cluster = Cluster::builder(&model).placement(&["0,1", "2,3"]).router_args(&flags).start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 4).await;
    cluster.experts[1].process.kill();
    for events in streams {
        let error = error_of(events).await;
        assert!(error.contains("layer 1") && error.contains("expert"), "{error}");
    }
    cluster.wait_for_ready(503).await;
    assert_eq!(http.get("/health").await.status, 200, "alive");
    assert_names_expert_3(&post(http).await);
    cluster.idle().await;
    cluster.restart_expert(1).await;
    cluster.ready().await;
    for _ in 0..10 {
        assert_answers(&http).await;
    }
}

#[tokio::test]
async fn streams_wait_for_an_expert_server_that_comes_back() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0,1", "2,3"]).router_args(&["--expert-wait", "60s"]);
    let mut cluster = builder.start().await;
    let streams = long_streams(&cluster.http(), 4).await;
    cluster.experts[1].process.kill();
    cluster.wait_for_ready(503).await;
    cluster.restart_expert(1).await;
    assert_undisturbed(streams).await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_replica_takes_over_unnoticed() {
    check_replica("never").await;
}

/// The frames of both halves are lost with their server.
#[tokio::test]
async fn a_replica_takes_over_both_half_batches_unnoticed() {
    check_replica("always").await;
}

async fn check_replica(half_batches: &str) {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0-3", "0-3"]);
    let mut cluster = builder.router_args(&["--half-batches", half_batches]).start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 4).await;
    cluster.experts[0].process.kill();
    assert_undisturbed(streams).await;
    let streams = long_streams(&http, 4).await;
    cluster.restart_expert(0).await;
    cluster.servers_ready().await;
    cluster.experts[1].process.freeze();
    assert_undisturbed(streams).await;
    cluster.experts[1].process.thaw();
    cluster.ready().await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_frozen_expert_server_is_as_good_as_dead() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0,1", "2,3"]).router_args(&["--expert-wait", "1s"]);
    let cluster = builder.start().await;
    let http = cluster.http();
    cluster.experts[1].process.freeze();
    assert_names_expert_3(&post(http).await);
    cluster.wait_for_ready(503).await;
    cluster.experts[1].process.thaw();
    cluster.ready().await;
    assert_answers(&http).await;
}

#[tokio::test]
async fn a_frozen_router_turns_readiness_off() {
    let model = needs_expert_3().write();
    let cluster = Cluster::builder(&model).start().await;
    let http = cluster.http();
    cluster.router.process.freeze();
    within(BOUNDED, "/ready with 503", cluster.wait_for_ready(503)).await;
    assert_eq!(http.get("/health").await.status, 200, "alive");
    let response = post(http).await;
    assert_eq!(response.status, 503, "{}", response.json());
    cluster.router.process.thaw();
    cluster.ready().await;
    assert_answers(&http).await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_killed_router_ends_streams_and_readiness() {
    let model = needs_expert_3().write();
    let mut cluster = Cluster::builder(&model).start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 2).await;
    cluster.router.process.kill();
    for events in streams {
        error_of(events).await;
    }
    cluster.wait_for_ready(503).await;
    assert_eq!(post(http).await.status, 503);
    let status = cluster.expert_status(0).await;
    assert_eq!(status.state, "ready", "{status:?}");
    wait_for("no open stream", async || {
        let status = cluster.expert_status(0).await;
        if status.open_streams == 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}
