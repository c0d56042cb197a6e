//! A question comes in over any door, and the answer was computed by several processes.

use std::{ffi::OsStr, net::SocketAddr};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto::v1;
use serde_json::json;
use tokio_stream::StreamExt as _;

use crate::{
    fixtures::{Chain, minnow},
    harness::{
        Cluster, Endpoint, Http, Process, ask, clients, cluster::MODEL, process::Ended, sse::Answer, up::Up,
        wait_for,
    },
};

const QUESTION: &str = "What is 348 + 277?";

async fn assert_answers(http: &Http, model: &str) -> Answer {
    let answer = ask(http, Endpoint::Chat, QUESTION, &json!({"model": model})).await;
    assert!(answer.text.contains("625"), "{answer:?}");
    assert!(!answer.reasoning.is_empty() && !answer.reasoning.contains("think>"), "{answer:?}");
    assert_eq!(answer.finish_reason, "stop");
    answer
}

#[tokio::test]
async fn four_expert_servers_answer_over_http_and_grpc() {
    let cluster = Cluster::builder(&minnow()).experts(4).start().await;
    let over_http = assert_answers(&cluster.http(), MODEL).await;
    let request = v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: "user".into(),
            content: QUESTION.into(),
            ..Default::default()
        }],
        options: Some(v1::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ..Default::default()
    };
    let mut chat = clients::chat(cluster.gateway().address);
    let reply = chat.chat(request.clone()).await.expect("an answer").into_inner();
    let over_grpc = Answer {
        text: reply.content,
        reasoning: reply.reasoning_content,
        finish_reason: reply.finish_reason,
    };
    assert_eq!(over_grpc, over_http);
    let usage = reply.usage.expect("usage");
    assert_eq!(usage.servers, 4, "{usage:?}");
    assert!(usage.experts > 16 && usage.reasoning_tokens > 0, "{usage:?}");
    assert!(usage.completion_tokens > usage.reasoning_tokens && usage.prompt_tokens > 0, "{usage:?}");

    let deltas = chat.chat_stream(request).await.expect("a stream").into_inner();
    let deltas: Vec<v1::ChatDelta> = deltas.map(|delta| delta.expect("the stream is whole")).collect().await;
    assert!(deltas.len() > 3, "one after the other: {deltas:?}");
    let (last, others) = deltas.split_last().expect("deltas");
    assert!(others.iter().all(|delta| delta.finish_reason.is_empty() && delta.usage.is_none()));
    assert_eq!(last.usage.as_ref(), Some(&usage));
    let streamed = Answer {
        text: deltas.iter().map(|delta| delta.content.as_str()).collect(),
        reasoning: deltas.iter().map(|delta| delta.reasoning_content.as_str()).collect(),
        finish_reason: last.finish_reason.clone(),
    };
    assert_eq!(streamed, over_http);
    for index in 0..4 {
        assert!(cluster.expert_status(index).await.pairs > 0, "every server took part");
    }
}

#[tokio::test]
async fn the_model_is_listed_and_health_is_told() {
    let cluster = Cluster::builder(&minnow()).start().await;
    let http = cluster.http();
    let models = http.get("/v1/models").await.ok();
    assert_eq!((&models["object"], models["data"].as_array().map(Vec::len)), (&json!("list"), Some(1)));
    assert_eq!(models["data"][0]["id"], MODEL);
    assert_eq!(http.get(&format!("/v1/models/{MODEL}")).await.ok()["id"], MODEL);
    assert_eq!(http.get("/v1/models/another").await.status, 404);
    assert_eq!(http.get("/health").await.status, 200);
    let members = [("shoal.v1.Chat", cluster.gateway()), ("shoal.v1.Router", &cluster.router)];
    for (service, member) in members.into_iter().chain([("shoal.v1.Expert", &cluster.experts[0])]) {
        let mut health = tonic_health::pb::health_client::HealthClient::new(member.channel());
        for service in ["", service] {
            let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
            let status = health.check(request).await.expect("health is served").into_inner().status();
            assert_eq!(
                status,
                tonic_health::pb::health_check_response::ServingStatus::Serving,
                "{service:?}"
            );
        }
    }
}

#[tokio::test]
async fn the_chat_command_answers_by_itself() {
    let model = minnow();
    let ended =
        Process::run(["chat".as_ref(), "--model".as_ref(), model.as_os_str(), QUESTION.as_ref()]).await;
    assert_shows_answer(ended);
}

#[tokio::test]
async fn the_chat_command_asks_a_running_gateway() {
    let cluster = Cluster::builder(&minnow()).experts(2).start().await;
    let url = format!("http://{}", cluster.gateway().address);
    assert_shows_answer(Process::run(["chat", "--url", &url, QUESTION]).await);
    cluster.idle().await;
}

fn assert_shows_answer(ended: Ended) {
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(ended.stdout.contains("625"), "{}", ended.stdout);
    assert!(!ended.stdout.contains('\u{1b}'), "no colours into a pipe: {:?}", ended.stdout);
    let all = ended.stdout + &ended.stderr;
    assert!(all.contains("tokens/s") && all.contains("servers"), "who took part, and how fast: {all}");
}

#[tokio::test]
async fn up_restarts_a_killed_child_where_it_was() {
    let up = Up::start(&minnow(), &["--experts", "3"]).await;
    up.ready().await;
    assert_answers(&up.http(), "minnow").await;
    let names: Vec<&str> = up.members.iter().map(|member| member.name.as_str()).collect();
    assert_eq!(names.iter().filter(|name| name.starts_with("expert")).count(), 3, "{names:?}");
    let router = clients::router(clients::channel(up.member("router").address));
    let servers = async || {
        let status = router.clone().status(v1::RouterStatusRequest {}).await.expect("a router answers");
        status.into_inner().servers
    };
    let instance_at = |servers: &[v1::ExpertServer], address: SocketAddr| {
        let server = servers.iter().find(|server| server.address == address.to_string());
        server.filter(|server| server.state == "ready").map(|server| server.instance.clone())
    };
    let killed = up.member("expert");
    let before = instance_at(&servers().await, killed.address).expect("it is there");
    kill(killed.pid, Signal::SIGKILL).expect("it lives");
    wait_for("another instance where the killed one was", async || {
        let servers = servers().await;
        let new = instance_at(&servers, killed.address).is_some_and(|instance| instance != before);
        if new { Ok(()) } else { Err(format!("{servers:?}")) }
    })
    .await;
    up.ready().await;
    assert_answers(&up.http(), "minnow").await;
}

/// A zombie that nobody reaps is gone for all that matters.
fn is_running(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

#[tokio::test]
async fn everything_ends_with_up_however_it_ends() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT] {
        let mut up = Up::start(&minnow(), &[]).await;
        assert!(up.members.len() >= 4, "gateway, router and two experts at least: {:?}", up.members);
        kill(up.process.pid(), signal).expect("it lives");
        let ended = up.process.ended().await;
        let ended_well = ended.status.success();
        assert_eq!(ended_well, signal != Signal::SIGKILL, "{signal}: {:?} {}", ended.status, ended.stderr);
        wait_for("end of all children", async || {
            let alive: Vec<_> = up.members.iter().filter(|member| is_running(member.pid)).collect();
            if alive.is_empty() { Ok(()) } else { Err(format!("{signal}: {alive:?}")) }
        })
        .await;
    }
}

#[tokio::test]
async fn up_that_cannot_start_says_why_and_leaves_nothing() {
    let model = minnow();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    let fails = async |args: &[&OsStr], words: &[&str]| {
        // That the pipes close, which `run` sees to, is that no child is left.
        let ended = Process::run([OsStr::new("up")].iter().chain(args)).await;
        assert!(ended.status.code().is_some_and(|code| code != 0), "{:?}", ended.status);
        for word in words {
            assert!(ended.stderr.contains(word), "no {word:?} in {}", ended.stderr);
        }
    };
    let port = [OsStr::new("--listen"), address.as_ref(), "--model".as_ref(), model.as_ref()];
    fails(&port, &[&address, "in use"]).await;
    let up_proj = "model.layers.1.mlp.experts.3.up_proj.weight";
    let broken = Chain::new().without(up_proj).write();
    let anywhere = ["--listen", "127.0.0.1:0", "--model"].map(OsStr::new);
    fails(&[&anywhere[..], &[broken.path().as_ref()]].concat(), &[up_proj]).await;
}

/// What a person sees: a table, and how to go on.
#[tokio::test]
async fn up_prints_a_table_of_who_listens_where() {
    let model = minnow();
    let args = ["up", "--experts", "3", "--listen", "127.0.0.1:0", "--model"].map(OsStr::new);
    let up = Process::spawn("up", args.into_iter().chain([model.as_os_str()]));
    wait_for("table and hint", async || {
        let shown = up.stdout();
        let rows = ["gateway", "router", "expert", "ready: http://127.0.0.1:", "shoal chat --url http://"];
        if rows.iter().all(|row| shown.contains(row)) { Ok(()) } else { Err(shown) }
    })
    .await;
    let shown = up.stdout();
    assert_eq!(shown.lines().filter(|line| line.starts_with("expert")).count(), 3, "{shown}");
}
