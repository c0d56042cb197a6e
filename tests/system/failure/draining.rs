//! SIGTERM under load: what runs is finished, nothing new is taken, and the process ends well.

use super::*;
use crate::harness::{process::Ended, wait_for};

#[track_caller]
fn assert_ended_well(ended: &Ended) {
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
}

#[tokio::test]
async fn an_expert_server_leaves_its_work_to_the_replica() {
    let model = endless();
    let mut cluster = Cluster::builder(&model).placement(&["0-3", "0-3"]).start().await;
    let streams = long_streams(&cluster.http(), 6).await;
    cluster.experts[0].process.terminate();
    assert_ended_well(&cluster.experts[0].process.ended().await);
    assert_undisturbed(streams).await;
    assert_answers(&cluster.http()).await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_router_finishes_its_sequences() {
    let model = endless();
    let mut cluster = Cluster::builder(&model).experts(2).start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 6).await;
    cluster.router.process.terminate();
    let refused = wait_for("refusal", async || {
        let response = post(http).await;
        if response.status == 200 { Err("taken".to_owned()) } else { Ok(response) }
    });
    assert_eq!(refused.await.status, 503);
    assert_undisturbed(streams).await;
    assert_ended_well(&cluster.router.process.ended().await);
    cluster.wait_for_ready(503).await;
}

#[tokio::test]
async fn a_gateway_finishes_its_streams() {
    let model = endless();
    let mut cluster = Cluster::builder(&model).experts(2).start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 6).await;
    cluster.gateway().process.terminate();
    wait_for("closed or unready door", async || match http.try_get("/ready").await {
        Ok(response) if response.status == 200 => Err("ready"),
        Ok(_) | Err(_) => Ok(()),
    })
    .await;
    assert_undisturbed(streams).await;
    assert_ended_well(&cluster.gateway_mut().process.ended().await);
    cluster.idle().await;
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut() {
    let model = endless();
    let builder = Cluster::builder(&model).router_args(&["--drain-timeout", "300ms"]);
    let mut cluster = builder.gateway_args(&["--drain-timeout", "300ms"]).start().await;
    let http = cluster.http();
    let body =
        Endpoint::Chat.body("x", &json!({"stream": true, "max_tokens": 4000, "n": 4, "ignore_eos": true}));
    let mut events = http.stream(Endpoint::Chat.path(), &body).await;
    events.next().await.expect("the stream goes on");
    cluster.router.process.terminate();
    within(BOUNDED, "end of the router", cluster.router.process.ended()).await;
    cluster.gateway().process.terminate();
    within(BOUNDED, "end of the gateway", cluster.gateway_mut().process.ended()).await;
}
