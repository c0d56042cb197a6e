//! What a client reads is whole characters, cut where it asked, counted once; and a client that goes away is forgotten.

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use crate::{
    fixtures::{Chain, byte_tokenizer::BOS, chain::Checkpoint},
    harness::{
        Cluster, Endpoint, Http, ask, clients,
        sse::{Answer, Event},
        wait_for,
    },
};

async fn check_text(http: &Http, prompt: &str, options: &Value, text: &str, finish_reason: &str) {
    for endpoint in Endpoint::ALL {
        let answer = ask(http, endpoint, prompt, options).await;
        let expected =
            Answer { text: text.to_owned(), finish_reason: finish_reason.to_owned(), ..Answer::default() };
        assert_eq!(answer, expected, "{endpoint:?} {prompt:?} {options}");
    }
}

#[tokio::test]
async fn a_character_is_never_cut() {
    const FAMILY: &str = "👨‍👩‍👧";
    let family = FAMILY.as_bytes();
    let cut_anywhere: Vec<&[u8]> =
        [0..2, 2..5, 5..8, 8..11, 11..13, 13..16, 16..18].map(|range| &family[range]).to_vec();
    let mut chain = Chain::new().recites(b'1', "🌶éA").recites_pieces(b'2', &cut_anywhere);
    let texts: Vec<String> = (0..8_u8)
        .map(|stream| {
            let emoji = char::from_u32(0x1F600 + u32::from(stream)).expect("a face");
            let letter = char::from_u32(0xE0 + u32::from(stream)).expect("a letter with an accent");
            format!("{stream}{emoji}-{stream}{letter}.")
        })
        .collect();
    for (prompt, text) in (b'a'..).zip(&texts) {
        let bytes = text.as_bytes();
        chain = chain.recites_pieces(prompt, &[&bytes[..3], &bytes[3..5], &bytes[5..8], &bytes[8..]]);
    }
    let cluster = Cluster::builder(&chain.write()).experts(2).start().await;
    let http = &cluster.http();
    check_text(http, "1", &json!({}), "🌶éA", "stop").await;
    check_text(http, "2", &json!({}), FAMILY, "stop").await;
    // One detokenizer a request: no stream gets another one's bytes.
    let prompts: Vec<String> = ('a'..='h').map(String::from).collect();
    let options = json!({});
    let all = join_all(
        prompts.iter().zip(&texts).map(|(prompt, text)| check_text(http, prompt, &options, text, "stop")),
    );
    all.await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_stop_string_is_never_shown() {
    let model = Chain::new().recites(b'>', "quick brown").recites(b'<', "théx").write();
    let cluster = Cluster::builder(&model).start().await;
    let http = &cluster.http();
    check_text(http, ">", &json!({"stop": ["k b"]}), "quic", "stop").await;
    check_text(http, ">", &json!({"stop": "k b"}), "quic", "stop").await;
    // What was held back comes when there is no match.
    check_text(http, ">", &json!({"stop": ["wnX"], "max_tokens": 11}), "quick brown", "length").await;
    check_text(http, ">", &json!({"stop": ["wnX"]}), "quick brown", "stop").await;
    // A longer candidate must not hide a certain match.
    check_text(http, ">", &json!({"stop": ["ck brX", "k"]}), "quic", "stop").await;
    check_text(http, "<", &json!({"stop": ["é"]}), "th", "stop").await;
    cluster.idle().await;
}

#[tokio::test]
async fn a_prompt_is_never_echoed() {
    let model = Chain::new().walks(0x8C, [0xB6, b'!'.into(), b'?'.into()]).write();
    let cluster = Cluster::builder(&model).start().await;
    // It ends inside a character.
    let prompt = [b"Hello world ".as_slice(), &[0xF0, 0x9F, 0x8C]].concat();
    let answer = ask(&cluster.http(), Endpoint::Completions, "", &json!({"prompt": prompt})).await;
    assert!(["🌶!?", "!?", "\u{FFFD}!?"].contains(&answer.text.as_str()), "{answer:?}");
    assert_ne!(answer.text, "\u{FFFD}!?", "the prompt's part of the character is known");
}

/// The chunks of a stream, and the usage of the same request asked plainly.
async fn usage_of(http: &Http, endpoint: Endpoint, options: &Value) -> (Vec<Value>, Value) {
    let mut body = endpoint.body(">", options);
    body["stream"] = json!(true);
    let chunks = http.stream(endpoint.path(), &body).await.rest().await;
    body["stream"] = json!(false);
    body.as_object_mut().expect("an object").remove("stream_options");
    (chunks, http.post(endpoint.path(), &body).await.ok()["usage"].clone())
}

#[tokio::test]
async fn usage_comes_when_asked_for_and_once() {
    let model = Chain::new().recites(b'>', "quick brown").write();
    let cluster = Cluster::builder(&model).start().await;
    let http = &cluster.http();
    for endpoint in Endpoint::ALL {
        for options in
            [json!({}), json!({"stream_options": null}), json!({"stream_options": {"include_usage": false}})]
        {
            let (chunks, _) = usage_of(http, endpoint, &options).await;
            for chunk in &chunks {
                assert_eq!(chunk["choices"].as_array().map(Vec::len), Some(1), "{options} {chunk}");
                assert!(chunk["usage"].is_null(), "{options} {chunk}");
            }
        }
        for n in [1, 2] {
            let options = json!({"stream_options": {"include_usage": true}, "n": n});
            let (chunks, plain) = usage_of(http, endpoint, &options).await;
            let (last, others) = chunks.split_last().expect("chunks");
            assert_eq!(last["choices"], json!([]), "{last}");
            for chunk in others {
                assert!(chunk["usage"].is_null() && chunk["choices"] != json!([]), "{chunk}");
            }
            let usage = &last["usage"];
            let field = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("{name} in {usage}"));
            // "quick brown" and the end of the answer.
            assert_eq!((field("prompt_tokens"), field("completion_tokens")), (1, 12 * n), "{endpoint:?}");
            assert_eq!(field("total_tokens"), 1 + 12 * n);
            assert_eq!(*usage, plain, "as in the plain answer");
        }
        let body = endpoint.body(">", &json!({"stream_options": {"include_usage": true}}));
        let response = http.post(endpoint.path(), &body).await;
        assert!([200, 400].contains(&response.status), "stream_options without stream: {}", response.status);
    }
}

#[tokio::test]
async fn the_newer_name_of_max_tokens_counts() {
    let model = Chain::new().cycles().write();
    let cluster = Cluster::builder(&model).router_args(&["--context-max", "100"]).start().await;
    let http = &cluster.http();
    check_text(http, "x", &json!({"max_completion_tokens": 1}), "y", "length").await;
    check_text(http, "x", &json!({"max_completion_tokens": 2, "max_tokens": 2}), "yx", "length").await;
    check_text(http, "x", &json!({"max_completion_tokens": 3, "max_tokens": null}), "yxy", "length").await;
    for endpoint in Endpoint::ALL {
        for wrong in [json!(0), json!(-1), json!("2"), json!(1.5)] {
            for field in ["max_tokens", "max_completion_tokens"] {
                let mut options = json!({});
                options[field] = wrong.clone();
                let response = http.post(endpoint.path(), &endpoint.body("x", &options)).await;
                assert_eq!(response.status, 400, "{field} {wrong}");
                assert_eq!(response.json()["error"]["param"], field, "{wrong}: {}", response.json());
            }
        }
    }
    // Unset: what OpenAI's API has for completions, and for chat what the context takes.
    let unset = json!({"max_completion_tokens": null});
    let answer = ask(http, Endpoint::Completions, "x", &unset).await;
    assert_eq!((answer.text.len(), answer.finish_reason.as_str()), (16, "length"));
    let answer = ask(http, Endpoint::Chat, "x", &unset).await;
    assert_eq!((answer.text.len(), answer.finish_reason.as_str()), (99, "length"));
}

#[tokio::test]
async fn the_beginning_of_a_sequence_is_there_once() {
    let with_bos = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let model = Chain::new().tokenizer_adds_bos().template(Some(with_bos)).write();
    let cluster = Cluster::builder(&model).start().await;
    let http = &cluster.http();
    let check = async |endpoint: Endpoint, prompt: &str, n_tokens: usize| {
        let usage =
            http.post(endpoint.path(), &endpoint.body(prompt, &json!({}))).await.ok()["usage"].clone();
        assert_eq!(usage["prompt_tokens"], n_tokens, "{endpoint:?} {prompt:?}");
    };
    check(Endpoint::Chat, "hi", 3).await;
    check(Endpoint::Completions, "hi", 3).await;
    // Special tokens in a user's text are text: five bytes.
    check(Endpoint::Completions, "<bos>hi", 1 + 5 + 2).await;
    check(Endpoint::Chat, "<bos>hi", 1 + 5 + 2).await;
    let ids = http
        .post("/v1/completions", &Endpoint::Completions.body("", &json!({"prompt": [BOS, 104, 105]})))
        .await
        .ok();
    assert_eq!(ids["usage"]["prompt_tokens"], 3, "ids are taken as they are");
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    AfterThreeEvents,
    ResetAfterThreeEvents,
    BeforeTheFirstToken,
    ResetBeforeTheFirstToken,
    HalfCloseThenClose,
    WhileItWaitsForAPlainAnswer,
    GrpcAfterThreeDeltas,
    GrpcBeforeTheFirstDelta,
    GrpcWhileItWaitsForAPlainAnswer,
}

impl Leave {
    const ALL: [Self; 9] = [
        Self::AfterThreeEvents,
        Self::ResetAfterThreeEvents,
        Self::BeforeTheFirstToken,
        Self::ResetBeforeTheFirstToken,
        Self::HalfCloseThenClose,
        Self::WhileItWaitsForAPlainAnswer,
        Self::GrpcAfterThreeDeltas,
        Self::GrpcBeforeTheFirstDelta,
        Self::GrpcWhileItWaitsForAPlainAnswer,
    ];
}

/// Asks for an answer that would be long, and leaves.
async fn ask_and_leave(cluster: &Cluster, leave: Leave, endpoint: Endpoint) {
    let http = cluster.http();
    let path = endpoint.path();
    let stream = endpoint.body("x", &json!({"stream": true, "max_tokens": TOKENS_MAX}));
    let plain = endpoint.body("x", &json!({"max_tokens": TOKENS_MAX}));
    let request = proto::v1::ChatRequest {
        messages: vec![proto::v1::ChatMessage {
            role: "user".into(),
            content: "x".into(),
            ..Default::default()
        }],
        options: Some(proto::v1::SamplingOptions { max_tokens: Some(TOKENS_MAX), ..Default::default() }),
        ..Default::default()
    };
    match leave {
        Leave::AfterThreeEvents | Leave::ResetAfterThreeEvents => {
            let mut events = http.stream(path, &stream).await;
            for _ in 0..3 {
                let event = events.next().await.expect("the stream goes on");
                assert!(matches!(event, Some(Event::Data(_))), "{event:?}");
            }
            if matches!(leave, Leave::ResetAfterThreeEvents) {
                events.into_connection().reset();
            }
        }
        Leave::BeforeTheFirstToken => drop(http.open(path, &stream).await),
        Leave::ResetBeforeTheFirstToken => http.open(path, &stream).await.reset(),
        Leave::HalfCloseThenClose => {
            let mut connection = http.open(path, &stream).await;
            connection.half_close().await;
            // A server may answer a client that only reads, or take it for gone; then it closes.
            let _either = connection.head().await;
        }
        Leave::WhileItWaitsForAPlainAnswer => {
            let _connection = http.open(path, &plain).await;
            wait_for_a_sequence(cluster).await;
        }
        Leave::GrpcAfterThreeDeltas => {
            let mut chat = clients::chat(http.address);
            let deltas = chat.chat_stream(request).await.expect("it is taken").into_inner();
            let read: Vec<_> = deltas.take(3).collect().await;
            assert!(read.iter().all(Result::is_ok), "{read:?}");
        }
        Leave::GrpcBeforeTheFirstDelta => {
            let mut chat = clients::chat(http.address);
            let _deltas = chat.chat_stream(request).await.expect("it is taken");
        }
        Leave::GrpcWhileItWaitsForAPlainAnswer => {
            let mut chat = clients::chat(http.address);
            tokio::select! {
                answer = chat.chat(request) => panic!("{answer:?} came before anybody left"),
                () = wait_for_a_sequence(cluster) => {}
            }
        }
    }
}

/// Far more than is computed before everybody has left.
const TOKENS_MAX: u32 = 100_000;

async fn wait_for_a_sequence(cluster: &Cluster) {
    wait_for("running sequence", async || {
        let status = cluster.router_status().await;
        if status.running + status.waiting > 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}

fn endless() -> Checkpoint {
    Chain::new().cycles().recites(b'>', "ok").config("max_position_embeddings", json!(200_000)).write()
}

#[tokio::test]
async fn clients_that_leave_leave_nothing_behind() {
    let model = endless();
    let cluster = Cluster::builder(&model).experts(2).router_args(&["--pages", "4096"]).start().await;
    let leaving = (0..200).map(|request| {
        let leave = Leave::ALL[request % Leave::ALL.len()];
        ask_and_leave(&cluster, leave, Endpoint::ALL[request % 2])
    });
    join_all(leaving).await;
    cluster.idle().await;
    for index in 0..2 {
        let frames = cluster.expert_status(index).await.frames;
        cluster.router_status().await;
        let status = cluster.expert_status(index).await;
        assert_eq!(status.frames, frames, "nobody computes for those who left");
        assert_eq!(status.open_streams, 1, "the router's");
    }
    check_text(&cluster.http(), ">", &json!({}), "ok", "stop").await;
    cluster.idle().await;
}

#[tokio::test]
async fn the_prompt_decides_what_is_reasoning() {
    // A prompt's last token decides the answer: `</think>` is followed by one, an open `<think>` by another.
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}\
                    {{ '<think>' if thinking else '</think>' }}";
    let (end_think, think) = (259, 260);
    let hm: Vec<u32> = b"hm".iter().copied().map(u32::from).collect();
    let reasons = hm.iter().copied().chain([end_think]);
    let chain =
        Chain::new().template(Some(template)).walks(think, reasons).walks(end_think, b"ok".map(u32::from));
    let cluster = Cluster::builder(&chain.write()).start().await;
    let http = &cluster.http();
    let check = async |options: Value, reasoning: &str, text: &str| {
        let answer = ask(http, Endpoint::Chat, "q", &options).await;
        let expected =
            Answer { text: text.into(), reasoning: reasoning.into(), finish_reason: "stop".into() };
        assert_eq!(answer, expected, "{options}");
    };
    check(json!({}), "", "ok").await;
    check(json!({"chat_template_kwargs": {"thinking": false, "unknown": [1]}}), "", "ok").await;
    for thinking in [
        json!({"chat_template_kwargs": {"thinking": true}}),
        json!({"thinking": {"type": "enabled"}}),
        json!({"enable_thinking": true}),
    ] {
        check(thinking, "hm", "ok").await;
    }
    cluster.idle().await;
}
