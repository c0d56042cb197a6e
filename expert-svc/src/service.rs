//! Listens, loads, serves, drains.

use std::{
    future::Future,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ids::InstanceId;
use proto::{HTTP2_WINDOW_BYTES, MESSAGE_BYTES_MAX, v1::expert_server::ExpertServer};
use telemetry::Tasks;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Router, Server, TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    Args,
    api::Api,
    args::Selection,
    counters::Counters,
    engine::{Clock, Engine},
    shard::Shard,
    stream::Streams,
};

/// Calls and streams open at once on one connection. Further ones wait at the client.
const STREAMS_PER_CONNECTION_MAX: u32 = 128;

/// The connection's window holds every stream's: a stream that is not read can never stop another one.
const CONNECTION_WINDOW_BYTES: u32 = STREAMS_PER_CONNECTION_MAX * HTTP2_WINDOW_BYTES;

/// A router that vanished without a word is noticed within the sum of the two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves `args` until `tasks` shuts down, then drains. Calls `ready` with the bound address once it serves.
///
/// # Errors
/// Address in use, wrong flags, wrong checkpoint: the chain names what is at fault.
pub async fn run(args: Args, tasks: Tasks, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let selection = args.selection()?;
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr().context("cannot read the address listened on")?;
    let model = args.model.clone();
    let shard = tokio::task::spawn_blocking(move || load(model, &selection))
        .await
        .context("loading the experts panicked")??;
    let shard = Arc::new(shard);

    let threads = match args.threads {
        Some(threads) => threads.get(),
        None => std::thread::available_parallelism().context("cannot count the cores; give --threads")?.get(),
    };
    let compute = Arc::clone(&shard);
    let engine = Engine::start(threads, Arc::new(move |frame: &_| compute.compute(frame)), system_clock())
        .context("cannot start the compute threads")?;
    let counters = Arc::new(Counters::default());
    let streams = Streams::new(shard.hidden_size(), engine.queue(), counters, system_clock(), tasks.clone());
    let instance = InstanceId::from(uuid::Uuid::new_v4().to_string().as_str());
    tracing::info!(
        %instance,
        %address,
        holds = cluster::table::describe(shard.holds()),
        shard_bytes = shard.experts().shard_bytes(),
        threads,
        "serving"
    );

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ExpertServer<Api>>().await;
    let api = Api { instance, address, shard, streams: streams.clone() };
    let router = router(api)?.add_service(health_service);
    let stop = CancellationToken::new();
    let server = router.serve_with_incoming_shutdown(incoming(listener), stop.clone().cancelled_owned());
    ready(address);
    serve(server, Lifecycle { tasks, health, streams, stop, engine }, args.drain_timeout).await
}

fn load(model: PathBuf, selection: &Selection) -> anyhow::Result<Shard> {
    let checkpoint = model::Checkpoint::open(&model)
        .with_context(|| format!("cannot open the checkpoint {}", model.display()))?;
    let config = checkpoint.config();
    let n_experts = u32::try_from(config.n_routed_experts).context("n_routed_experts is beyond 32 bits")?;
    if n_experts == 0 || config.moe_layers().next().is_none() {
        anyhow::bail!("the checkpoint {} has no routed experts", model.display());
    }
    let experts = selection.experts(n_experts)?;
    Shard::load(&checkpoint, &experts)
        .with_context(|| format!("cannot load the experts of the checkpoint {}", model.display()))
}

fn router(api: Api) -> anyhow::Result<Router> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The descriptors hold the gateway's and the router's services too.
            .with_service_name("shoal.v1.Expert")
            .with_service_name("grpc.health.v1.Health")
    };
    let expert = ExpertServer::new(api)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    Ok(Server::builder()
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(expert)
        .add_service(reflection().build_v1().context("cannot serve reflection v1")?)
        .add_service(reflection().build_v1alpha().context("cannot serve reflection v1alpha")?))
}

/// Without `TCP_NODELAY` on accepted sockets, replies wait up to 40 ms for a delayed acknowledgement. tonic sets it
/// on listeners that it opens itself, and on others only through [`TcpIncoming`].
fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// What a server's end needs.
struct Lifecycle {
    tasks: Tasks,
    health: HealthReporter,
    streams: Streams,
    /// Stops the gRPC server.
    stop: CancellationToken,
    engine: Engine,
}

/// Serves until shutdown. Then, within `drain_timeout`: say so, answer the frames in flight and end their streams
/// while calls for `Status` and health are still taken, close connections, end the threads.
async fn serve(
    server: impl Future<Output = Result<(), tonic::transport::Error>>,
    lifecycle: Lifecycle,
    drain_timeout: Duration,
) -> anyhow::Result<()> {
    let Lifecycle { tasks, mut health, streams, stop, engine } = lifecycle;
    let mut server = pin!(server);
    tokio::select! {
        ended = &mut server => {
            ended.context("the gRPC server failed")?;
            anyhow::bail!("the gRPC server ended by itself");
        }
        () = tasks.shutting_down() => {}
    }
    tracing::info!(open_streams = streams.n_open(), "draining");
    let services = ["", <ExpertServer<Api> as tonic::server::NamedService>::NAME];
    for service in services {
        health.set_service_status(service, ServingStatus::NotServing).await;
    }
    let drained = tokio::time::timeout(drain_timeout, async {
        tokio::select! {
            ended = &mut server => return ended,
            () = streams.closed() => {}
        }
        // A watch of a service's health ends only when the service is forgotten.
        for service in services {
            health.clear_service_status(service).await;
        }
        stop.cancel();
        server.await?;
        drop(streams);
        engine.end().await;
        Ok(())
    });
    match drained.await {
        Ok(ended) => {
            ended.context("the gRPC server failed while it drained")?;
            tracing::info!("drained");
        }
        Err(_) => tracing::warn!(?drain_timeout, "drain timed out, what is still open is cut"),
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the edge: everything behind it takes the clock as an argument"
)]
fn system_clock() -> Clock {
    Arc::new(Instant::now)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn accepted_sockets_do_not_delay() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (router, accepted) = tokio::join!(TcpStream::connect(address), async {
            let mut incoming = incoming(listener);
            incoming.next().await.unwrap().unwrap()
        });
        assert!(accepted.nodelay().unwrap());
        // The default is the other way round: the line above would not hold by itself.
        assert!(!router.unwrap().nodelay().unwrap());
    }
}
