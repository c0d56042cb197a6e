//! Assembles an expert server from its flags: sockets, threads, registry.

use std::{
    io::ErrorKind::PermissionDenied,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use cluster::{LocalStream, Session};
use ids::InstanceId;
use model::{
    Checkpoint,
    tune::{Tuning, Wanted},
};
use proto::{HTTP2_FRAME_BYTES, HTTP2_WINDOW_BYTES, MESSAGE_BYTES_MAX, v1::expert_server::ExpertServer};
use shard::{Selection, Shard};
use telemetry::{Metrics, Process, Tasks};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::server::{Router, Server, TcpIncoming},
};
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::{
    Args,
    api::Api,
    counters::Counters,
    engine::{Clock, Engine, short_pairs_max},
    lifecycle::Lifecycle,
    memory,
    observe::{self, Observers},
    presence::Presence,
    stream::Streams,
};

/// Calls and streams open at once on one connection. Further ones wait at the client.
const STREAMS_PER_CONNECTION_MAX: u32 = 128;

/// The connection's window holds every stream's: a stream that is not read can never stop another one.
const CONNECTION_WINDOW_BYTES: u32 = STREAMS_PER_CONNECTION_MAX * HTTP2_WINDOW_BYTES;

/// A router that vanished without a word is noticed within the sum of the two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// The registry's tasks have nothing to finish by then.
const REGISTRY_END_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves `args` until `tasks` shuts down, then leaves in order. Calls `ready` with the bound address once it listens
/// and has loaded.
///
/// # Errors
/// Address in use, wrong flags, wrong checkpoint: the chain names what is at fault.
pub async fn run(args: Args, process: Process, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let tasks = process.tasks.clone();
    let selection = args.selection()?;
    let listener =
        TcpListener::bind(&args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr().context("cannot read the address listened on")?;
    let advertised = args.advertised(address).map_err(anyhow::Error::msg)?;
    let memory_bytes_max = memory_bytes_max(&args)?;
    let (model, weights, cache_dir) = (args.model.clone(), args.weights, args.cache_dir.clone());
    let wanted =
        Wanted { threads: args.threads, spin: args.spin, huge_pages: args.huge_pages }.with_weights(weights);
    let open_it = move || {
        let tuning = tune(wanted)?;
        let checkpoint = Checkpoint::open(&model)
            .with_context(|| format!("cannot open the checkpoint {}", model.display()))?
            .with_weights(weights, cache_dir)
            .with_huge_pages(tuning.huge_pages);
        Ok::<_, anyhow::Error>((open(checkpoint, &model, &selection, memory_bytes_max)?, tuning))
    };
    let (shard, tuning) =
        tokio::task::spawn_blocking(open_it).await.context("opening the checkpoint panicked")??;
    let shard = Arc::new(shard);
    let threads = tuning.start()?;
    let compute = Arc::clone(&shard);
    let delay = args.chaos_delay;
    let compute = move |frame: &_| {
        delayed(delay);
        compute.compute(frame)
    };
    let observers = Observers::new(&process.metrics, process.tracer.clone());
    // Whoever sleeps on purpose does it on a thread of its own.
    let short_pairs_max = if delay.is_some() { 0 } else { short_pairs_max(shard.expert_bytes()) };
    let engine = Engine::start(threads, Box::new(compute), system_clock(), observers, short_pairs_max)
        .context("cannot start the compute threads")?;
    let counters = Arc::new(Counters::default());
    let streams = Streams::new(shard.hidden_size(), engine.queue(), counters, system_clock(), tasks.clone());
    let instance = InstanceId::from(process.instance.as_str());
    tracing::info!(%instance, %address, advertised, ?tuning, "listening");

    // The registry is left last: its tasks outlive the others.
    let registered = Tasks::new();
    let _registered_ends = registered.token().drop_guard();
    let session = args
        .registry
        .as_ref()
        .filter(|_| args.is_registered())
        .map(|registry| Session::open(registry, &registered))
        .transpose()
        .context("--registry")?;
    if let Some(session) = &session {
        session.observe(&process.metrics);
    }
    let unix_socket = UnixSocket::bind(&instance);
    let presence = Arc::new(Presence::new(instance, advertised, shard));
    observe::read(&process.metrics, &presence, &streams);
    let (health, health_service) = tonic_health::server::health_reporter();
    let api = Arc::new(Api {
        presence: Arc::clone(&presence),
        streams: streams.clone(),
        listen: address,
        unix_socket: unix_socket.as_ref().map(|socket| socket.name.clone()),
    });
    let router = || router(Arc::clone(&api), health_service.clone(), &process.metrics);
    let stop = CancellationToken::new();
    let server = {
        let over_tcp =
            router()?.serve_with_incoming_shutdown(incoming(listener), stop.clone().cancelled_owned());
        let (router, stop) = (router()?, stop.clone());
        let on_this_host = async move {
            match unix_socket {
                Some(socket) => {
                    let incoming = UnixListenerStream::new(socket.listener)
                        .map(|stream| stream.and_then(LocalStream::checked))
                        .filter(|stream| !matches!(stream, Err(error) if error.kind() == PermissionDenied));
                    router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await
                }
                None => {
                    stop.cancelled().await;
                    Ok(())
                }
            }
        };
        Box::pin(async { tokio::try_join!(over_tcp, on_this_host).map(|((), ())| ()) })
    };
    // What serves holds it, and it holds the streams' queue: the compute threads end when nobody does.
    drop(api);
    let lifecycle = Lifecycle {
        tasks,
        presence,
        session,
        health,
        streams,
        engine,
        stop,
        handover_timeout: args.handover_timeout,
        drain_timeout: args.drain_timeout,
    };
    lifecycle.run(server, || ready(address)).await?;
    registered.begin_shutdown();
    if !registered.join(REGISTRY_END_TIMEOUT).await {
        tracing::warn!("the registry's tasks do not end");
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the edge: how long something takes is what this is about")]
fn tune(wanted: Wanted) -> anyhow::Result<Tuning> {
    let cores = std::thread::available_parallelism().context("cannot count the cores")?;
    let began = Instant::now();
    Ok(Tuning::find(wanted, cores, &|| began.elapsed())?)
}

fn memory_bytes_max(args: &Args) -> anyhow::Result<u64> {
    match args.memory_max.or_else(memory::default_bytes_max) {
        Some(bytes) => Ok(bytes),
        None if args.is_registered() => {
            anyhow::bail!("cannot read how much memory is available; give --memory-max")
        }
        // Nobody asks.
        None => Ok(0),
    }
}

/// Reads what the checkpoint says of itself and loads nothing yet.
fn open(
    checkpoint: Checkpoint,
    model: &Path,
    selection: &Selection,
    memory_bytes_max: u64,
) -> anyhow::Result<Shard> {
    let config = checkpoint.config();
    let n_experts = u32::try_from(config.n_routed_experts).context("n_routed_experts is beyond 32 bits")?;
    if n_experts == 0 || config.moe_layers().next().is_none() {
        anyhow::bail!("the checkpoint {} has no routed experts", model.display());
    }
    let experts = selection.experts(n_experts)?;
    Ok(Shard::new(Arc::new(checkpoint), &experts, memory_bytes_max))
}

/// Where processes of this host find this server too. Abstract: the name is in no folder, and gone with the process.
struct UnixSocket {
    name: String,
    listener: UnixListener,
}

impl UnixSocket {
    /// None where the system has no abstract names, or gives this one not: routers call over TCP then.
    fn bind(instance: &InstanceId) -> Option<Self> {
        if !cfg!(target_os = "linux") {
            return None;
        }
        let name = format!("shoal-expert-{instance}");
        UnixListener::bind(format!("\0{name}"))
            .inspect_err(|error| tracing::warn!(name, %error, "no Unix socket"))
            .map(|listener| Self { name, listener })
            .ok()
    }
}

fn router(api: Arc<Api>, health: HealthServer<impl Health>, metrics: &Metrics) -> anyhow::Result<Router> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The descriptors hold the gateway's and the router's services too.
            .with_service_name("shoal.v1.Expert")
            .with_service_name("grpc.health.v1.Health")
    };
    let expert = ExpertServer::from_arc(api)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let services = Routes::new(expert)
        .add_service(health)
        .add_service(reflection().build_v1().context("cannot serve reflection v1")?)
        .add_service(reflection().build_v1alpha().context("cannot serve reflection v1alpha")?);
    Ok(Server::builder()
        .initial_stream_window_size(HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        // For `/metrics`, which is plain HTTP on the same port.
        .accept_http1(true)
        .add_routes(metrics.mount(services.into_axum_router()).into()))
}

#[expect(clippy::disallowed_methods, reason = "--chaos-delay is there to be slow")]
fn delayed(delay: Option<Duration>) {
    if let Some(delay) = delay {
        std::thread::sleep(delay);
    }
}

/// Without `TCP_NODELAY` on accepted sockets, replies wait up to 40 ms for a delayed acknowledgement. tonic sets it
/// on listeners that it opens itself, and on others only through [`TcpIncoming`].
fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
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
    use super::*;
    use tokio::net::TcpStream;

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
