//! Assembles engine thread, links and API; drains in order.

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    sync::{Arc, atomic::AtomicUsize},
    time::Instant,
};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use cluster::{Record, Role, Session, State, placement::Goal};
use ids::InstanceId;
use model::{
    Backbone, Checkpoint,
    tune::{Tuning, Wanted},
};
use proto::v1::{self, router_server::RouterServer};
use telemetry::{Metrics, Process, Tasks};
use tokio::{net::TcpListener, sync::mpsc::unbounded_channel};
use tonic::service::Routes;
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    api::Api,
    args::Args,
    engine::{Command, Engine, Observers},
    event_loop::EventLoop,
    identity::Identity,
    inside::{self, Inside},
    link::Links,
    meters::{self, Meters},
    placer::Placer,
    remote::{Remote, View},
    spans::Policy,
    stats::Stats,
};

/// Serves until `tasks` shuts down. `ready` is called once requests can come in; experts may still be missing then,
/// and `Status` says which.
pub async fn run(args: Args, process: Process, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let tasks = process.tasks.clone();
    let (registry, selection) = (args.registry(), args.inside()?);
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr().context("the listening socket has no address")?;

    let (path, weights, cache_dir) = (args.model.clone(), args.weights, args.cache_dir.clone());
    let wanted =
        Wanted { threads: args.threads, spin: args.spin, huge_pages: args.huge_pages }.with_weights(weights);
    let (checkpoint, backbone, tuning) = tokio::task::spawn_blocking(move || -> Result<_, model::Error> {
        let tuning = tune(wanted)?;
        let checkpoint =
            Checkpoint::open(&path)?.with_weights(weights, cache_dir).with_huge_pages(tuning.huge_pages);
        let backbone = Backbone::load(&checkpoint)?;
        Ok((Arc::new(checkpoint), backbone, tuning))
    })
    .await?
    .with_context(|| format!("cannot load checkpoint {}", args.model.display()))?;
    let threads = tuning.start()?;
    let limits = args.limits(backbone.config())?;
    let config = backbone.config().clone();
    let instance = InstanceId::from(format!("router-{}", process.instance).as_str());
    let advertised = cluster::advertised(args.advertise.as_deref(), address, &registry)
        .context("cannot register this router")?;

    let inside = match selection.experts(config.n_routed_experts as u32)? {
        none if none.is_empty() => None,
        some if some.len() < config.n_routed_experts && args.registry.is_none() => {
            let (n, of) = (some.len(), config.n_routed_experts);
            anyhow::bail!(
                "this router holds {n} of {of} experts a layer, and no --registry says who holds the others"
            )
        }
        experts => Some(Inside::new(instance.clone(), Arc::clone(&checkpoint), &experts)),
    };
    if let Some(inside) = &inside {
        tokio::select! {
            loaded = inside::load(Arc::clone(inside.shard())) => loaded.context("cannot load the experts")?,
            () = tasks.shutting_down() => {
                inside.shard().stop_loading();
                tracing::info!("stopped while loading");
                return Ok(());
            }
        }
    }
    let held_here = inside.as_ref().map(|inside| inside.holder(&advertised));

    let (commands, mut inbox) = unbounded_channel();
    let (events, replies) = unbounded_channel();
    let event_loop = EventLoop::start().context("cannot start the links' event loop")?;
    let links_live = event_loop.handle();
    let view = Arc::new(ArcSwap::from_pointee(View::default()));
    let stats = Arc::new(Stats::default());
    let remote =
        Remote::new(event_loop, Arc::clone(&view), replies, limits.dispatch_timeout, args.health(), inside);
    let observers = Observers {
        meters: Meters::new(
            &process.metrics,
            config.moe_layers(),
            config.n_routed_experts,
            args.expert_metrics.then_some(true),
        ),
        tracer: process.tracer.clone(),
        policy: Policy { steps_first: args.trace_steps_first, step_every: args.trace_step_every },
    };
    let engine = Engine::new(Arc::new(backbone), &limits, remote, Arc::clone(&stats), observers);
    let engine = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || threads.install(|| engine.run(&mut inbox)))
        .context("cannot start the engine's thread")?;

    let identity =
        Identity { checkpoint: checkpoint.fingerprint().to_owned(), hidden_size: config.hidden_size };
    let links = Links::new(identity, view, events, commands.clone(), links_live, args.unix_sockets);
    if let Some(holder) = held_here {
        links.hold(holder)?;
    }
    // Links outlive the drain: running requests need their experts until the end.
    let link_tasks = Tasks::new();
    let session = Session::open(&registry, &link_tasks).context("cannot use --registry")?;
    session.observe(&process.metrics);
    links.follow(session.members(Role::Expert), &link_tasks);

    let goal = Goal {
        layers: config.moe_layers().collect(),
        n_experts: config.n_routed_experts,
        replicas: args.replicas.get(),
    };
    let placer = Placer::start(
        instance.clone(),
        checkpoint.fingerprint().to_owned(),
        goal.clone(),
        session.clone(),
        Arc::clone(&links),
        &link_tasks,
    );
    let record = |state: State| Record {
        instance: instance.clone(),
        address: advertised.clone(),
        state,
        checkpoint: checkpoint.fingerprint().to_owned(),
        wire_version: proto::WIRE_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        holdings: None,
    };
    let announcement = session.announce(Role::Router, record(State::Ready));

    let api = Arc::new(Api {
        instance: instance.to_string(),
        placer,
        replicas: goal.replicas,
        is_placed: session.is_dynamic(),
        checkpoint: Arc::clone(&checkpoint),
        config,
        limits,
        stats,
        links,
        commands: commands.clone(),
        open_streams: Arc::new(AtomicUsize::new(0)),
        tasks: tasks.clone(),
        tracer: process.tracer.clone(),
    });
    let reported = Arc::clone(&api);
    meters::read_status(&process.metrics, move |now| reported.report(now));
    tracing::info!(%address, %instance, ?tuning, checkpoint = checkpoint.fingerprint(), "router listens");
    ready(address);
    let settling = tasks.token().child_token();
    let _settling_ends = settling.clone().drop_guard();
    settle(Arc::clone(&checkpoint), move || !settling.is_cancelled());
    let served = serve(listener, api, &process.metrics, &tasks);
    let deadline = async {
        tasks.shutting_down().await;
        announcement.update(record(State::Draining));
        tokio::time::sleep(args.drain_timeout).await;
    };
    tokio::select! {
        result = served => result.context("the gRPC server failed")?,
        () = deadline => tracing::warn!(timeout = ?args.drain_timeout, "drain timed out, requests are cut off"),
    }

    announcement.revoke().await;
    link_tasks.begin_shutdown();
    let _engine_gone = commands.send(Command::Stop);
    let joined = tokio::task::spawn_blocking(move || engine.join()).await?;
    anyhow::ensure!(joined.is_ok(), "the engine's thread panicked");
    link_tasks.join(args.drain_timeout).await;
    tracing::info!(%instance, "router stopped");
    Ok(())
}

/// On a thread of its own, moves what was loaded from cache files into huge pages, if those were chosen. It is computed with
/// meanwhile.
fn settle(checkpoint: Arc<Checkpoint>, go_on: impl Fn() -> bool + Send + 'static) {
    tokio::task::spawn_blocking(move || match checkpoint.settle(&go_on) {
        Ok(0) => {}
        Ok(bytes) => {
            tracing::info!(bytes, huge_bytes = model::huge_bytes(), "weights copied for huge pages");
        }
        Err(error) => tracing::warn!(%error, "some weights stay where their files are mapped"),
    });
}

#[expect(clippy::disallowed_methods, reason = "the edge: how long something takes is what this is about")]
fn tune(wanted: Wanted) -> Result<Tuning, model::Error> {
    // A machine that cannot say how many cores it has gets one thread.
    let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let began = Instant::now();
    Tuning::find(wanted, cores, &|| began.elapsed())
}

async fn serve(listener: TcpListener, api: Arc<Api>, metrics: &Metrics, tasks: &Tasks) -> anyhow::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<RouterServer<Api>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let router = RouterServer::from_arc(api)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
    let shutdown = async {
        tasks.shutting_down().await;
        health.set_not_serving::<RouterServer<Api>>().await;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    };
    let services = Routes::new(router)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Server::builder()
        .initial_stream_window_size(proto::HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(proto::HTTP2_WINDOW_BYTES)
        // For `/metrics`, which is plain HTTP on the same port.
        .accept_http1(true)
        .add_routes(metrics.mount(services.into_axum_router()).into())
        // Not `TcpListenerStream`: it leaves Nagle's algorithm on, which costs 40 ms a token now and then.
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown)
        .await?;
    Ok(())
}
