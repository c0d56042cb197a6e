//! The ids of a trace at every door: gRPC, log lines, the chat's last line, the two ways to a collector.

use proto::v1::{self, chat_client::ChatClient};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tonic::Request;

use super::{CALLER, TRACE, body, complete, full};
use crate::{
    failure::needs_expert_3,
    fixtures::minnow,
    harness::{Cluster, Endpoint, Process, collector::Collector, up::Up, wait_for},
};

fn chat(prompt: &str, tokens: u32) -> v1::ChatRequest {
    let message =
        v1::ChatMessage { role: "user".into(), content: prompt.into(), ..v1::ChatMessage::default() };
    let options = v1::SamplingOptions { max_tokens: Some(tokens), ..v1::SamplingOptions::default() };
    v1::ChatRequest { messages: vec![message], options: Some(options), ..v1::ChatRequest::default() }
}

#[tokio::test]
async fn grpc_callers_are_parents_too() {
    let collector = Collector::start().await;
    let cluster = Cluster::builder(&minnow()).all_args(&["--otlp", &collector.url()]).start().await;
    let mut client = ChatClient::new(cluster.gateway().channel());
    let with_context = |message| {
        let mut request = Request::new(message);
        for (name, value) in full(TRACE) {
            request.metadata_mut().insert(name, value.parse().expect("ASCII"));
        }
        request
    };
    let response = client.chat(with_context(chat("What is 348 + 277?", 3))).await.expect("an answer");
    assert_eq!(response.metadata().get("x-shoal-trace-id").expect("it says its trace"), TRACE);
    let trace = collector
        .complete_trace(TRACE, |trace| {
            let n = trace.named("shoal-expert", "shoal.v1.Expert/Dispatch").count();
            let rooted = trace.0.iter().any(|span| span.parent == CALLER);
            if rooted && n > 0 { Ok(()) } else { Err(format!("{n} frames, root: {rooted}")) }
        })
        .await;
    trace.assert_is_a_tree_under(CALLER);
    let refused = v1::ChatRequest { model: "another".into(), ..chat("x", 1) };
    let status = client.chat(with_context(refused)).await.expect_err("it is not served");
    assert_eq!(status.metadata().get("x-shoal-trace-id").expect("it says its trace"), TRACE);
}

#[tokio::test]
async fn log_lines_have_ids_and_no_prompts() {
    const SECRET: &str = "the treasure lies under the oak";
    let model = needs_expert_3().write();
    for log_prompts in [false, true] {
        let mut builder = Cluster::builder(&model).all_args(&["--log", "json"]);
        builder = builder.router_args(&["--expert-wait", "1s"]);
        if log_prompts {
            builder = builder.gateway_args(&["--log-prompts"]);
        }
        let mut cluster = builder.start().await;
        let http = cluster.http();
        http.post(Endpoint::Completions.path(), &body(SECRET, 1)).await.ok();
        cluster.experts[0].process.kill();
        let response = complete(&http, &full(TRACE), 1).await;
        assert_eq!(response.status, 503);
        assert_eq!(response.json()["error"]["trace_id"], TRACE);
        // Written before the answer, but read from a pipe.
        let log = wait_for("a line that says why", async || {
            let log = cluster.gateway().process.log();
            if log.contains("request failed") { Ok(log) } else { Err(log) }
        })
        .await;
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON"));
        let failures: Vec<Value> = lines.filter(|line| line["message"] == "request failed").collect();
        let [failure] = &failures[..] else { panic!("{failures:?}") };
        assert_eq!(failure["span"]["trace_id"], TRACE);
        assert_eq!(
            failure["span"]["request_id"],
            response.header("x-request-id").expect("every answer has one")
        );
        assert_eq!(failure["reason"], "experts_missing");
        let told = cluster.members().filter(|member| member.process.log().contains(SECRET)).count();
        assert_eq!(told, usize::from(log_prompts));
    }
}

/// OTLP over HTTP goes to the path of its signal.
#[tokio::test]
async fn a_collector_may_speak_http() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/v1/traces", listener.local_addr().expect("it listens"));
    let cluster = Cluster::builder(&minnow()).all_args(&["--otlp", &url]).start().await;
    complete(&cluster.http(), &full(TRACE), 2).await.ok();
    let (mut connection, _) = listener.accept().await.expect("an export");
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        assert!(connection.read_buf(&mut request).await.expect("a request") > 0);
    }
    let head = String::from_utf8_lossy(&request).to_ascii_lowercase();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(head.contains("content-type: application/x-protobuf"), "{head}");
    // Whether it reads this is its own matter.
    let _gone = connection.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
}

#[tokio::test]
async fn the_chat_says_where_its_trace_is() {
    let up = Up::start(&minnow(), &["--jaeger", "http://127.0.0.1:16686/"]).await;
    up.ready().await;
    let url = format!("http://{}", up.member("gateway").address);
    let ended = Process::run(["chat", "--url", &url, "--max-tokens", "2", "What is 348 + 277?"]).await;
    assert!(ended.status.success(), "{}", ended.stderr);
    let line =
        ended.stderr.lines().find_map(|line| line.strip_prefix("trace: http://127.0.0.1:16686/trace/"));
    assert!(line.is_some_and(|id| id.len() == 32), "{}", ended.stderr);
}

/// What cannot be followed is refused by name, at once.
#[tokio::test]
async fn bad_trace_flags_are_refused() {
    for (flags, named) in
        [(["--otlp", "no url at all"], "no url at all"), (["--trace-sample", "2"], "--trace-sample")]
    {
        let model = minnow();
        let args = ["expert", "--model", model.to_str().expect("UTF-8"), flags[0], flags[1]];
        let ended = Process::run(args).await;
        assert!(!ended.status.success() && ended.stderr.contains(named), "{}", ended.stderr);
    }
}
