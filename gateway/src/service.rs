//! Assembles text, routes and the two doors on one port; drains in order.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use axum::serve::{ListenerExt as _, serve};
use cluster::{Role, Session};
use proto::{
    Code, Error,
    v1::{self, chat_server::ChatServer},
};
use telemetry::{Process, Tasks};
use text::{ChatInput, Prompt, TextModel};
use tokio::net::TcpListener;

use crate::{admit::Defaults, args::Args, grpc::Door, http, observe::Observers, repair, route::Routes};

/// How often answers went on at another router.
pub(crate) struct Repairs {
    pub(crate) limits: repair::Limits,
    pub(crate) done: Count,
    /// Answers that could not be repaired.
    pub(crate) failed: Count,
}

#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn count(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What every request of one gateway shares.
pub(crate) struct Gateway {
    pub(crate) name: String,
    pub(crate) model: Arc<TextModel>,
    pub(crate) routes: Arc<Routes>,
    pub(crate) repairs: Repairs,
    pub(crate) defaults: Defaults,
    pub(crate) requests: AtomicUsize,
    pub(crate) requests_max: usize,
    pub(crate) body_bytes_max: usize,
    pub(crate) started_seconds: u64,
    pub(crate) tasks: Tasks,
    pub(crate) observers: Observers,
    /// Of a page for traces.
    pub(crate) trace_url: Option<String>,
    pub(crate) log_prompts: bool,
}

impl Gateway {
    pub(crate) fn check_model(&self, name: Option<&str>) -> Result<(), Error> {
        match name {
            Some(name) if name == self.name => Ok(()),
            Some(name) => {
                let message = format!("the model {name:?} is not served here; {:?} is", self.name);
                Err(Error::new(Code::NotFound, "model_not_found", message).with_param("model"))
            }
            None => Err(Error::invalid("model", format!("model is missing; {:?} is served here", self.name))),
        }
    }

    /// Renders and tokenizes on a thread of its own: templates are code, and long prompts take a while.
    pub(crate) async fn chat_prompt(&self, input: ChatInput) -> Result<Prompt, Error> {
        let model = Arc::clone(&self.model);
        let rendered = tokio::task::spawn_blocking(move || model.prompt(&input)).await;
        let rendered =
            rendered.map_err(|error| Error::internal(format!("rendering the prompt failed: {error}")))?;
        rendered.map_err(|error| match error {
            text::Error::Messages { param, message } => {
                Error::new(Code::InvalidArgument, "invalid_value", message).with_param(param)
            }
            text::Error::Template(_) => {
                Error::new(Code::InvalidArgument, "template_refused", error.to_string())
                    .with_param("messages")
            }
            text::Error::NoTemplate(message) => {
                Error::new(Code::InvalidArgument, "no_chat_template", message).with_param("messages")
            }
            text::Error::Checkpoint(message) => Error::internal(message),
        })
    }

    /// Only if the operator asked for it.
    pub(crate) fn log_prompt(&self, prompt: &Prompt) {
        if self.log_prompts {
            // Of a prompt that came as ids there may be no text.
            let text = match prompt.text.as_str() {
                "" => self.model.tokenizer().decode(&prompt.ids).unwrap_or_else(|error| error.to_string()),
                text => text.to_owned(),
            };
            tracing::info!(tokens = prompt.ids.len(), text, "prompt");
        }
    }

    #[expect(clippy::unused_self, reason = "the wall clock is the gateway's to read")]
    pub(crate) fn now_seconds(&self) -> u64 {
        now_seconds()
    }
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// Serves until `tasks` shuts down. `ready` is called once requests can come in; `/ready` says when routers can answer.
pub async fn run(args: Args, process: Process, ready: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let tasks = process.tasks.clone();
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr().context("the listening socket has no address")?;
    let gateway = Arc::new(assemble(&args, &process).await?);
    Observers::read(&process.metrics, &gateway);
    gateway.routes.listen().await;

    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ChatServer<Door>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The descriptors hold the router's and the expert's services too.
            .with_service_name("shoal.v1.Chat")
            .with_service_name("grpc.health.v1.Health")
    };
    let grpc = tonic::service::Routes::new(ChatServer::new(Door(Arc::clone(&gateway))))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .into_axum_router();
    // A path of no service falls to HTTP's answer, which has a body.
    let app = process.metrics.mount(http::router(Arc::clone(&gateway)).merge(grpc.reset_fallback()));

    let stop = tasks.clone();
    let shutdown = async move {
        stop.shutting_down().await;
        health.set_not_serving::<ChatServer<Door>>().await;
        health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    };
    // A small event must not wait for the acknowledgement of the one before.
    let listener = listener.tap_io(|socket| {
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    });
    tracing::info!(%address, model = %gateway.name, "gateway listens");
    ready(address);
    let served = serve(listener, app).with_graceful_shutdown(shutdown);
    let deadline = async {
        tasks.shutting_down().await;
        tokio::time::sleep(args.drain_timeout).await;
    };
    tokio::select! {
        result = served.into_future() => result.context("the HTTP server failed")?,
        () = deadline => tracing::warn!(timeout = ?args.drain_timeout, "drain timed out, answers are cut off"),
    }
    tracing::info!("gateway stopped");
    Ok(())
}

async fn assemble(args: &Args, process: &Process) -> anyhow::Result<Gateway> {
    let tasks = &process.tasks;
    let options = text::Options {
        chat_template: args.chat_template.clone(),
        chat_format: args.chat_format,
        allow_special: args.allow_special,
    };
    let dir = args.model.clone();
    let model = tokio::task::spawn_blocking(move || TextModel::load(&dir, &options)).await?;
    let model = model.with_context(|| format!("cannot read the text files of {}", args.model.display()))?;
    if let Err(error) = model.chat() {
        tracing::warn!(%error, "chat requests will be refused, completions work");
    }
    let folder = || {
        let path = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
        path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    };
    let session = Session::open(&args.registry, tasks).context("cannot use --registry")?;
    session.observe(&process.metrics);
    let routes = Routes::new();
    routes.follow(session.members(Role::Router), tasks);
    let generation = std::fs::read(args.model.join("generation_config.json")).unwrap_or_default();
    let name = args.served_model_name.clone().unwrap_or_else(folder);
    Ok(Gateway {
        observers: Observers::new(&process.metrics, process.tracer.clone(), &name),
        trace_url: args.trace_url.clone(),
        log_prompts: args.log_prompts,
        name,
        model: Arc::new(model),
        routes,
        repairs: Repairs {
            limits: repair::Limits { repairs_max: args.repairs_max, wait: args.repair_wait },
            done: Count::default(),
            failed: Count::default(),
        },
        // Absent or unreadable: the router, which needs it for its own part, says so.
        defaults: Defaults::read(&serde_json::from_slice(&generation).unwrap_or_default()),
        requests: AtomicUsize::new(0),
        requests_max: args.requests_max,
        body_bytes_max: args.body_bytes_max,
        started_seconds: now_seconds(),
        tasks: tasks.clone(),
    })
}
