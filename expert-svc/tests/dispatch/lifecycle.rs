//! Start, health, reflection, drain.

use std::path::Path;

use futures_util::StreamExt as _;
use proto::{Code, v1::ExpertStatusRequest};
use telemetry::{Process, Tasks};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    checkpoint::Model,
    harness::{Router, Server, args, frame, watched},
};

async fn start_error(model: &Path, flags: &[&str]) -> String {
    let result = watched(
        "start",
        expert_svc::run(args(model, flags), Process::quiet("tested", Tasks::new()), |_| panic!("it serves")),
    );
    format!("{:#}", result.await.unwrap_err())
}

#[tokio::test]
async fn a_start_that_fails_says_why() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &[]).await;
    let address = server.address.to_string();
    let taken = start_error(model.dir.path(), &["--listen", &address]).await;
    assert!(taken.starts_with(&format!("cannot listen on {address}: ")), "{taken}");
    assert!(taken.to_lowercase().contains("in use"), "{taken}");

    let flags = ["--shard", "9/4", "--experts", "3-1"];
    assert_eq!(
        start_error(model.dir.path(), &flags).await,
        "--shard and --experts both say which experts to hold; give one of them; \
         --shard 9/4: shards of 4 are 1/4 to 4/4; --experts 3-1: the range ends before it begins"
    );
    let beyond = start_error(model.dir.path(), &["--experts", "6-8"]).await;
    assert_eq!(beyond, "--experts 6-8: the model has 8 routed experts a layer, numbered from 0");

    let nowhere = start_error(&model.dir.path().join("nowhere"), &[]).await;
    assert!(nowhere.ends_with("nowhere is not a folder"), "{nowhere}");
}

#[tokio::test]
async fn a_missing_expert_is_named_at_the_start() {
    let mut model = Model::random(64, 16);
    model.experts.remove(&(ids::LayerId(2), ids::ExpertId(5)));
    let model = model.write();
    let error = start_error(model.dir.path(), &["--shard", "2/2"]).await;
    assert!(error.contains("model.layers.2.mlp.experts.5."), "{error}");
    // Who does not hold it does not miss it.
    Server::start(model.dir.path(), &["--shard", "1/2"]).await;
}

#[tokio::test]
async fn a_server_stopped_while_it_starts_ends() {
    let model = Model::random(64, 16).write();
    let tasks = Tasks::new();
    tasks.begin_shutdown();
    // It may have loaded before it hears of it.
    watched("end", expert_svc::run(args(model.dir.path(), &[]), Process::quiet("tested", tasks), |_| {}))
        .await
        .unwrap();
}

#[tokio::test]
async fn reflection_lists_what_is_served() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &[]).await;
    macro_rules! check {
        ($version:ident) => {{
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            let request = ServerReflectionRequest {
                host: String::new(),
                message_request: Some(MessageRequest::ListServices(String::new())),
            };
            let mut client = ServerReflectionClient::new(server.channel().await);
            let call = client.server_reflection_info(tokio_stream::once(request));
            let mut responses = watched("reflection", call).await.unwrap().into_inner();
            let response = responses.next().await.unwrap().unwrap().message_response;
            let Some(MessageResponse::ListServicesResponse(list)) = response else { panic!("{response:?}") };
            let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
            assert_eq!(names, ["shoal.v1.Expert", "grpc.health.v1.Health"], stringify!($version));
        }};
    }
    check!(v1);
    check!(v1alpha);
}

#[tokio::test]
async fn drain_ends_streams_and_watches_cleanly() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &[]).await;
    let channel = server.channel().await;
    let mut router = server.router().await;
    router.ask(frame(64, 4, &[0, 1])).await.unwrap();
    let mut watches = Vec::new();
    for service in ["", "shoal.v1.Expert"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let watch = HealthClient::new(channel.clone()).watch(request).await.unwrap();
        let mut watch = watch.into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        watches.push(watch);
    }

    // A frame that was sent before the drain is answered or left to the router, and the stream ends cleanly.
    router.send(router.plan(frame(64, 4, &[2]))).await;
    server.tasks.begin_shutdown();
    if let Some(reply) = router.reply().await {
        reply.outcome.unwrap();
        assert!(router.reply().await.is_none());
    }
    for mut watch in watches {
        // The change may be missed when the end comes at once; an error may not come.
        while let Some(change) = watched("watch", watch.message()).await.unwrap() {
            assert_eq!(change.status(), ServingStatus::NotServing);
        }
    }
    let address = server.address;
    server.ended().await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "the port is free");
}

/// A stream whose replies are larger than its window and are not read: it stays open for as long as the router likes.
async fn unread(server: &Server) -> (Router, usize) {
    let router = server.router().await;
    let n_frames = 4;
    for _ in 0..n_frames {
        router.send(router.plan(frame(64, 16_384, &[0]))).await;
    }
    let mut client = server.client().await;
    let received = async {
        while client.status(ExpertStatusRequest {}).await.unwrap().into_inner().frames < n_frames as u64 {}
    };
    watched("frames", received).await;
    (router, n_frames)
}

#[tokio::test]
async fn drain_says_so_and_answers_what_it_has() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &[]).await;
    let mut client = server.client().await;
    let (mut router, n_frames) = unread(&server).await;
    assert_eq!(client.status(ExpertStatusRequest {}).await.unwrap().into_inner().state, "ready");
    server.tasks.begin_shutdown();
    let refused = async {
        loop {
            // One that is taken just before the drain begins ends with it.
            if let Err(error) = client.dispatch(tokio_stream::pending()).await {
                return proto::Error::from_status(&error);
            }
        }
    };
    let error = watched("refusal", refused).await;
    assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "draining"));
    assert_eq!(client.status(ExpertStatusRequest {}).await.unwrap().into_inner().state, "draining");
    for _ in 0..n_frames {
        router.reply().await.unwrap().outcome.unwrap();
    }
    assert!(router.reply().await.is_none());
    server.ended().await.unwrap();
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &["--drain-timeout", "10ms"]).await;
    let (_router, _) = unread(&server).await;
    server.tasks.begin_shutdown();
    server.ended().await.unwrap();
}
