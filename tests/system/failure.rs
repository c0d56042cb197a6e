//! What users see when a part is away, frozen, wrong, leaving or too small.

mod away;
mod degraded;
mod draining;
mod inside;
mod large;
mod mute;
mod stand_in;
mod wrong;

use std::time::Duration;

use proto::v1;
use serde_json::json;

use crate::{
    fixtures::{Chain, chain::Checkpoint, minnow},
    harness::{
        Cluster, Endpoint, Http, ask,
        http::Response,
        sse::{Answer, Events},
        wait_for, within,
    },
};

/// A refusal must come within this: far less than a person would wait, far more than two busy cores need.
const BOUNDED: Duration = Duration::from_secs(40);

/// Recites `ok` after `>`; every row needs experts 0 and 3.
pub(crate) fn needs_expert_3() -> Chain {
    Chain::new().recites(b'>', "ok").cycles().prefers([0, 3])
}

async fn post(http: Http) -> Response {
    let body = Endpoint::Chat.body(">", &json!({}));
    within(BOUNDED, "answer or refusal", http.post(Endpoint::Chat.path(), &body)).await
}

async fn assert_answers(http: &Http) {
    assert_eq!(ask(http, Endpoint::Chat, ">", &json!({})).await.text, "ok");
}

/// A 503 that names what is missing.
#[track_caller]
fn assert_names_expert_3(response: &Response) {
    let body = response.json();
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert_eq!(response.status, 503, "{body}");
    assert!(message.contains("layer 1") && message.contains("expert") && message.contains('3'), "{body}");
}

/// A stream that is longer than what is done to the cluster meanwhile.
const LONG: usize = 1500;

fn endless() -> Checkpoint {
    needs_expert_3().write()
}

/// Starts `n` long streams and reads the first events of each.
async fn long_streams(http: &Http, n: usize) -> Vec<Events> {
    let mut streams = Vec::new();
    for index in 0..n {
        let endpoint = Endpoint::ALL[index % 2];
        let body = endpoint.body("x", &json!({"stream": true, "max_tokens": LONG, "ignore_eos": true}));
        let mut events = http.stream(endpoint.path(), &body).await;
        for _ in 0..3 {
            events.next().await.expect("the stream goes on").expect("the stream goes on");
        }
        streams.push(events);
    }
    streams
}

/// Every stream ends whole, with the text that it would have had in peace.
async fn assert_undisturbed(streams: Vec<Events>) {
    for (index, mut events) in streams.into_iter().enumerate() {
        let chunks = events.rest().await;
        let answer = Answer::of_chunks(&chunks, 0);
        assert_eq!(answer.finish_reason, "length", "stream {index}");
        let text = "yx".repeat(LONG / 2);
        assert!(
            text.ends_with(&answer.text) && answer.text.len() >= LONG - 50,
            "stream {index}: {}",
            answer.text.len()
        );
    }
}

#[tokio::test]
async fn an_idle_cluster_costs_nothing() {
    const WATCHED: Duration = Duration::from_secs(3);
    let mut cluster = Cluster::builder(&endless()).experts(2).start().await;
    assert_answers(&cluster.http()).await;
    cluster.idle().await;
    let used =
        |cluster: &mut Cluster| cluster.members().map(|member| member.process.cpu_time()).collect::<Vec<_>>();
    let before = used(&mut cluster);
    tokio::time::sleep(WATCHED).await;
    for (index, (after, before)) in used(&mut cluster).into_iter().zip(before).enumerate() {
        let share = (after - before).as_secs_f64() / WATCHED.as_secs_f64();
        assert!(share < 0.04, "process {index} used {:.0} % of a core doing nothing", share * 100.0);
    }
}

#[tokio::test]
async fn half_the_experts_take_half_the_memory() {
    let whole = Cluster::builder(&minnow()).without_gateway().start().await;
    let halves = Cluster::builder(&minnow()).experts(2).without_gateway().start().await;
    for cluster in [&whole, &halves] {
        let prompt: Vec<u32> = (2..400).collect();
        let generated = crate::harness::clients::generate(cluster.router.router(), &prompt, 8).await;
        generated.expect("the router answers");
    }
    let whole = whole.expert_status(0).await;
    let total = |of: fn(&v1::ExpertStatus) -> u64| of(&whole) as f64;
    for index in 0..2 {
        let half = halves.expert_status(index).await;
        assert_eq!(2 * half.shard_bytes, whole.shard_bytes, "{half:?}");
        for of in [
            |status: &v1::ExpertStatus| status.resident_bytes,
            |status: &v1::ExpertStatus| status.mapped_bytes,
        ] {
            let share = of(&half) as f64 / total(of);
            assert!((0.45..0.6).contains(&share), "{share} of {whole:?}: {half:?}");
        }
        assert!(half.resident_bytes as f64 >= 0.5 * half.shard_bytes as f64, "it was used: {half:?}");
    }
}

/// From the second start on, weights are where their files are mapped and then in huge pages; a process that is gone
/// meanwhile, or afterwards the cache folder, costs nobody anything.
#[tokio::test]
async fn answers_do_not_depend_on_where_weights_are() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let folder = cache.path().to_str().expect("a name");
    let flags = ["--weights", "q8", "--cache-dir", folder, "--huge-pages", "true"];
    let start = async || {
        let cluster = Cluster::builder(&minnow()).experts(2).without_gateway().router_args(&flags);
        cluster.expert_args(0, &flags).expert_args(1, &flags).start().await
    };
    let prompt: Vec<u32> = (2..200).collect();
    let ask = async |cluster: &Cluster| {
        let generated = crate::harness::clients::generate(cluster.router.router(), &prompt, 8).await;
        generated.expect("the router answers").ids
    };
    let first = start().await;
    let expected = ask(&first).await;
    assert_eq!(first.router_status().await.unsettled_bytes, 0, "made, not found");

    let mut cluster = start().await;
    // Whether it was still moving or not, there is an answer.
    cluster.experts[0].process.kill();
    cluster.restart_expert(0).await;
    cluster.servers_ready().await;
    assert_eq!(ask(&cluster).await, expected);
    for member in cluster.members() {
        wait_for("weights in huge pages", async || {
            let log = member.process.log();
            if log.contains("copied for huge pages") { Ok(()) } else { Err(log) }
        })
        .await;
    }
    let left = [cluster.expert_status(0).await, cluster.expert_status(1).await].map(|of| of.unsettled_bytes);
    assert_eq!((left, cluster.router_status().await.unsettled_bytes), ([0; 2], 0));
    drop(cache);
    assert_eq!(ask(&cluster).await, expected);
}
