//! Requests and frames that are larger than something: than a message's default limit, than a connection's window,
//! than the KV cache.

use futures_util::future::join_all;
use tokio_stream::StreamExt as _;
use tonic::Streaming;

use super::*;
use crate::{
    fixtures::chain::MOE_LAYER,
    harness::{
        clients::{self, generate},
        wait_for,
        wait_for::DEADLINE,
    },
};

/// Rows of 28 KiB: a layer's work for one server passes gRPC's default of 4 MiB at 147 rows.
#[tokio::test]
async fn a_long_prompt_whose_rows_all_go_to_one_expert() {
    const HIDDEN: usize = 7168;
    let model = Chain::new().hidden_size(HIDDEN).experts_add().prefers([0, 1]).write();
    let prompt: Vec<u32> = (0..600).map(|position| position * 7 % 256).collect();
    let lengths = [145, 146, 147, 148, 600];
    let mut by_hand = Vec::new();
    for (chunk, combine) in [("100", "exact"), ("600", "exact"), ("600", "pairs"), ("100", "pairs")] {
        let flags = ["--chunk", chunk, "--step-rows", "600", "--combine", combine];
        // All rows go to the first server, which holds both preferred experts.
        let builder =
            Cluster::builder(&model).placement(&["0,1", "2,3"]).router_args(&flags).without_gateway();
        let cluster = builder.start().await;
        for (index, &n) in lengths.iter().enumerate() {
            let generated =
                generate(cluster.router.router(), &prompt[..n], 2).await.expect("the router answers");
            assert_eq!(generated.prompt_logits.len(), n * 320);
            let bits: Vec<u32> = generated.prompt_logits.into_iter().map(f32::to_bits).collect();
            match by_hand.get(index).filter(|_| combine == "exact") {
                Some(split) => assert!(bits == *split, "{n} rows, chunk {chunk}, {combine}"),
                None if combine == "exact" => by_hand.push(bits),
                None => {}
            }
        }
    }
}

/// Several streams on one connection: one that nobody reads must not stop the others.
#[tokio::test]
async fn an_unread_stream_does_not_block_another_one() {
    const HIDDEN: u32 = 7168;
    let model = Chain::new().hidden_size(HIDDEN as usize).write();
    let cluster = Cluster::builder(&model).without_gateway().start().await;
    let status = cluster.expert_status(0).await;
    let expert = clients::expert(clients::channel_for_many_streams(cluster.experts[0].address));
    // Each row for `n_experts` experts, each of which answers with a row.
    let frame = |n_rows: u32, n_experts: u32| {
        let rows = v1::Rows {
            dtype: v1::Dtype::F32.into(),
            n_rows,
            width: HIDDEN,
            data: vec![0; (n_rows * HIDDEN * 4) as usize].into(),
        };
        let frame = v1::Frame {
            layer: MOE_LAYER,
            rows: Some(rows),
            assignment_row: (0..n_rows).flat_map(|row| vec![row; n_experts as usize]).collect(),
            assignment_expert: (0..n_rows).flat_map(|_| 0..n_experts).collect(),
            assignment_weight: vec![1.0; (n_rows * n_experts) as usize],
            combine: v1::Combine::Pairs.into(),
            ..Default::default()
        };
        clients::planned(frame, &status)
    };
    let open = async |n_rows: u32, n_experts: u32| {
        // The stream stays open after the frame: only the reply is waited for.
        let frames = tokio_stream::once(frame(n_rows, n_experts)).chain(tokio_stream::pending());
        expert.clone().dispatch(frames).await.expect("a stream").into_inner()
    };
    let read = async |replies: &mut Streaming<v1::Reply>| {
        let reply = within(DEADLINE, "reply", replies.message()).await.expect("a reply").expect("a reply");
        assert!(matches!(reply.outcome, Some(v1::reply::Outcome::Computed(_))), "{reply:?}");
    };
    // More than the window of a stream: 12.5 MB each.
    let (mut first, mut second) = (open(146, 3).await, open(146, 3).await);
    read(&mut second).await;
    read(&mut first).await;
    let calls = join_all((0..64).map(|_| open(40, 1))).await;
    // The last first.
    for mut replies in calls.into_iter().rev() {
        read(&mut replies).await;
    }
}

#[tokio::test]
async fn requests_larger_than_the_kv_cache() {
    let model =
        Chain::new().cycles().recites(b'>', "ok").config("max_position_embeddings", json!(1000)).write();
    let builder = Cluster::builder(&model).router_args(&["--pages", "4", "--page-positions", "16"]);
    let cluster = builder.start().await;
    let http = cluster.http();
    let ask_with = async |n_prompt: usize, max_tokens: serde_json::Value| {
        let prompt = "x".repeat(n_prompt);
        let body = Endpoint::Completions.body(&prompt, &json!({"max_tokens": max_tokens}));
        within(BOUNDED, "answer", http.post(Endpoint::Completions.path(), &body)).await
    };
    // The last token of an answer needs no place in the cache.
    for (n_prompt, max_tokens, n_answer) in [(63, 1, 1), (64, 1, 1), (60, 10, 5), (64, 10, 1), (1, 1000, 64)]
    {
        let answer = ask_with(n_prompt, json!(max_tokens)).await.ok();
        assert_eq!(answer["usage"]["completion_tokens"], n_answer, "{n_prompt} + {max_tokens}: {answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    for (n_prompt, limit) in [(65, "64"), (999, "64"), (1000, "1000"), (1001, "1000")] {
        let response = ask_with(n_prompt, json!(1)).await;
        let body = response.json();
        assert_eq!(
            (response.status, &body["error"]["code"]),
            (400, &json!("context_length_exceeded")),
            "{body}"
        );
        let message = body["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(&n_prompt.to_string()) && message.contains(limit), "{body}");
        assert_eq!(body["error"]["param"], "prompt");
    }
    let null = ask_with(60, serde_json::Value::Null).await.ok();
    assert_eq!(null["usage"]["completion_tokens"], 5);
    // More at once than fit: they take turns.
    let together = join_all((0..8).map(|_| ask_with(30, json!(20)))).await;
    for response in together {
        assert_eq!(response.ok()["choices"][0]["text"], "yx".repeat(10));
    }
    cluster.idle().await;
    assert!(cluster.router_status().await.preemptions > 0, "two of them do not fit to their ends");
    assert_eq!(ask(&http, Endpoint::Completions, "abcd>", &json!({})).await.text, "ok");
    let log = cluster.router.process.log();
    assert!(log.len() < 100_000, "{} bytes of log", log.len());
}

/// More requests than places: the rest is refused at once, and nobody else notices.
#[tokio::test]
async fn more_requests_than_places() {
    let model = needs_expert_3().write();
    let builder = Cluster::builder(&model).router_args(&["--running-max", "2", "--queue-max", "3"]);
    let cluster = builder.start().await;
    let http = cluster.http();
    let streams = long_streams(&http, 2).await;
    let body = Endpoint::Chat.body(">", &json!({}));
    let calls = (0..20).map(|_| async {
        let response = http.post(Endpoint::Chat.path(), &body).await;
        if response.status == 429 {
            let after = response.header("retry-after").and_then(|after| after.parse::<u32>().ok());
            assert!(after.is_some_and(|seconds| seconds > 0), "{:?}", response.headers);
            assert_eq!(response.json()["error"]["code"], "queue_full", "{}", response.json());
        }
        response.status
    });
    let refused = within(BOUNDED, "answers and refusals", join_all(calls));
    let statuses = refused.await;
    assert!(statuses.iter().all(|status| [200, 429].contains(status)), "{statuses:?}");
    let n_answered = statuses.iter().filter(|status| **status == 200).count();
    assert!((3..20).contains(&n_answered), "three wait, later ones may find a place: {statuses:?}");
    assert_undisturbed(streams).await;
    assert_answers(&http).await;
    cluster.idle().await;
}

/// Clients that ask for much and read nothing: what is under way to them must not fill what everybody shares.
#[tokio::test]
async fn clients_that_do_not_read_delay_nobody() {
    const CLIENTS: u32 = 64;
    const TOKENS: u32 = 1000;
    let model = needs_expert_3().write();
    let cluster = Cluster::builder(&model).router_args(&["--pages", "4096"]).start().await;
    let before = cluster.router_status().await.tokens_out;
    // About 15 MB between router and gateway.
    let request = v1::CompleteRequest {
        prompt: Some(v1::complete_request::Prompt::Text("x".into())),
        options: Some(v1::SamplingOptions {
            max_tokens: Some(TOKENS),
            top_logprobs: Some(20),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut unread = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = clients::narrow_chat(cluster.gateway().address);
        unread.push(client.complete_stream(request.clone()).await.expect("it is taken"));
    }
    wait_for("everything that nobody reads to be computed", async || {
        let n = cluster.router_status().await.tokens_out - before;
        if n >= u64::from(CLIENTS * TOKENS) { Ok(()) } else { Err(format!("{n} tokens")) }
    })
    .await;
    within(BOUNDED, "answer", assert_answers(&cluster.http())).await;
    drop(unread);
    cluster.idle().await;
}
