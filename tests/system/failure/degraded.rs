//! Experts that are left out on request, damaged weights, and answers that lose their router for good.

use std::path::Path;

use super::*;
use crate::harness::wait_for;

#[tokio::test]
async fn an_expert_without_a_holder_is_left_out_on_request_and_the_answer_says_so() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).placement(&["0-2", "3"]);
    let mut cluster = builder.router_args(&["--on-missing-expert", "skip"]).start().await;
    let http = cluster.http();
    let whole = http.post(Endpoint::Chat.path(), &Endpoint::Chat.body(">", &json!({}))).await;
    assert_eq!(whole.header("x-shoal-degraded"), None);
    assert_eq!(whole.ok()["usage"]["shoal"]["experts_masked"], 0);
    cluster.experts[1].process.kill();
    wait_for("missing expert", async || {
        let status = cluster.router_status().await;
        if status.missing.is_empty() { Err("none") } else { Ok(()) }
    })
    .await;
    assert!(cluster.router_status().await.ready, "it can answer");
    for endpoint in Endpoint::ALL {
        let degraded = http.post(endpoint.path(), &endpoint.body(">", &json!({"max_tokens": 2}))).await;
        assert_eq!(degraded.header("x-shoal-degraded"), Some("experts"), "{endpoint:?}");
        assert_eq!(degraded.ok()["usage"]["shoal"]["experts_masked"], 1, "{endpoint:?}");
        let options = json!({"max_tokens": 2, "stream": true, "stream_options": {"include_usage": true}});
        let chunks = http.stream(endpoint.path(), &endpoint.body(">", &options)).await.rest().await;
        let usage = chunks.iter().find(|chunk| chunk["usage"].is_object()).expect("usage");
        assert_eq!(usage["usage"]["shoal"]["experts_masked"], 1, "{usage}");
    }
    assert!(cluster.router_status().await.sequences_degraded >= 4);
    cluster.restart_expert(1).await;
    wait_for("a holder", async || {
        let status = cluster.router_status().await;
        if status.missing.is_empty() { Ok(()) } else { Err(format!("{:?}", status.missing)) }
    })
    .await;
    let whole = http.post(Endpoint::Chat.path(), &Endpoint::Chat.body(">", &json!({}))).await;
    assert_eq!(whole.header("x-shoal-degraded"), None);
    assert_answers(&http).await;
}

/// Flips a bit of expert 3's last matrix, as a bad disk would.
fn damage(model: &Path) {
    let file = std::fs::read_dir(model)
        .expect("a folder")
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .expect("weights");
    let mut bytes = std::fs::read(&file).expect("it can be read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("a length")) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("a header");
    let offset = tensors["model.layers.1.mlp.experts.3.down_proj.weight"]["data_offsets"][0].as_u64();
    bytes[8 + header + offset.expect("it is there") as usize] ^= 1;
    std::fs::write(file, bytes).expect("it can be written");
}

#[tokio::test]
async fn a_server_with_a_flipped_bit_in_its_weights_is_refused_with_both_named() {
    let (model, damaged) = (needs_expert_3().write(), needs_expert_3().write());
    damage(damaged.path());
    let stranger = Cluster::builder(&damaged).without_gateway().start().await;
    let builder = Cluster::builder(&model).also_expert_at(stranger.experts[0].address);
    let cluster = builder.start().await;
    let refused = wait_for("refusal", async || {
        let servers = cluster.router_status().await.servers;
        let refused = servers.iter().find(|server| server.state == "refused");
        refused.map(|server| server.detail.clone()).ok_or_else(|| format!("{servers:?}"))
    })
    .await;
    let (own, other) = (cluster.expert_status(0).await.instance, stranger.expert_status(0).await.instance);
    assert!(refused.contains("layer 1 expert 3"), "{refused}");
    assert!(refused.contains(&own) && refused.contains(&other), "{refused}");
}

#[tokio::test]
async fn an_answer_goes_on_when_its_only_router_comes_back() {
    let model = endless();
    let mut cluster = Cluster::builder(&model).start().await;
    let streams = long_streams(&cluster.http(), 3).await;
    cluster.router.process.kill();
    cluster.restart_router().await;
    assert_undisturbed(streams).await;
    let health = cluster.http().get("/health").await.ok();
    assert_eq!((&health["repairs"], &health["repairs_failed"]), (&json!(3), &json!(0)), "{health}");
}

#[tokio::test]
async fn an_answer_that_may_not_be_repaired_says_what_it_lost() {
    let model = endless();
    let mut cluster = Cluster::builder(&model).gateway_args(&["--repairs-max", "0"]).start().await;
    let streams = long_streams(&cluster.http(), 1).await;
    cluster.router.process.kill();
    for mut events in streams {
        let chunks = within(BOUNDED, "end of the stream", events.rest()).await;
        let last = chunks.last().expect("an error");
        assert_eq!(last["error"]["code"], "repairs_max", "{last}");
    }
}
