//! From loading to leaving: what an expert server does in turn, and who is told.

use std::{future::Future, pin::pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use cluster::{Holds, Session, State};
use proto::v1::expert_server::ExpertServer;
use shard::{Held, describe};
use telemetry::Tasks;
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, transport};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{api::Api, engine::Engine, handover, placed, presence::Presence, settle, stream::Streams};

/// What health is reported of.
const SERVICES: [&str; 2] = ["", <ExpertServer<Api> as NamedService>::NAME];

/// The parts of a server whose sockets are open.
pub(crate) struct Lifecycle {
    pub(crate) tasks: Tasks,
    pub(crate) presence: Arc<Presence>,
    /// Of a server that is registered.
    pub(crate) session: Option<Session>,
    pub(crate) health: HealthReporter,
    pub(crate) streams: Streams,
    pub(crate) engine: Engine,
    /// Stops the gRPC server.
    pub(crate) stop: CancellationToken,
    pub(crate) handover_timeout: Duration,
    pub(crate) drain_timeout: Duration,
}

impl Lifecycle {
    /// Loads while `server` answers, calls `ready`, serves until shutdown, and leaves in order.
    pub(crate) async fn run(
        mut self,
        server: impl Future<Output = Result<(), transport::Error>>,
        ready: impl FnOnce(),
    ) -> anyhow::Result<()> {
        let mut server = pin!(server);
        self.report(ServingStatus::NotServing).await;
        let served = tokio::select! {
            served = self.serve(ready) => served,
            ended = &mut server => {
                ended.context("the gRPC server failed").and_then(|()| anyhow::bail!("the gRPC server ended by itself"))
            }
        };
        self.presence.shard().stop_loading();
        let presence = Arc::clone(&self.presence);
        let ended = match served {
            Ok(()) => self.drain(server).await,
            Err(error) => Err(error),
        };
        presence.revoke().await;
        ended
    }

    /// Until this instance may go.
    async fn serve(&mut self, ready: impl FnOnce()) -> anyhow::Result<()> {
        if let Some(session) = &self.session {
            self.presence.announce(session);
        }
        tokio::select! {
            loaded = self.load() => loaded?,
            () = self.tasks.shutting_down() => {
                tracing::info!("stopped while loading");
                self.presence.enter(State::Draining);
                return Ok(());
            }
        }
        self.streams.admit();
        self.report(ServingStatus::Serving).await;
        self.presence.enter(State::Ready);
        if let Some(session) = &self.session {
            let follow = placed::follow(session.placement(), Arc::clone(&self.presence), self.tasks.clone());
            self.tasks.spawn("placement", follow);
        }
        ready();
        settle::beside(self.presence.shard());
        self.tasks.shutting_down().await;
        // What it holds now is what others take over.
        self.presence.shard().stop_loading();
        self.presence.enter(State::Draining);
        tracing::info!(open_streams = self.streams.n_open(), "draining");
        self.report(ServingStatus::NotServing).await;
        self.hand_over().await;
        Ok(())
    }

    /// What is pinned.
    async fn load(&self) -> anyhow::Result<()> {
        let shard = Arc::clone(self.presence.shard());
        let held = tokio::task::spawn_blocking(move || shard.hold(&Holds::default()))
            .await
            .context("loading the experts panicked")?
            .context("cannot load the experts")?;
        let Held { holds, experts, .. } = &*held;
        let (shard_bytes, memory_bytes_max) =
            (experts.shard_bytes(), self.presence.shard().memory_bytes_max());
        tracing::info!(holds = describe(holds), shard_bytes, memory_bytes_max, "serving");
        Ok(())
    }

    /// Frames are answered meanwhile, and new streams are taken: who has nobody else may still come here.
    async fn hand_over(&self) {
        let Some(session) = &self.session else { return };
        let handed_over = handover::handed_over(session, &self.presence);
        match tokio::time::timeout(self.handover_timeout, handed_over).await {
            Ok(()) => tracing::info!("handed over"),
            Err(_) => tracing::warn!(
                handover_timeout = ?self.handover_timeout,
                "nobody else holds all that is held here; leaving all the same"
            ),
        }
    }

    /// Within the drain's timeout: answer the frames in flight and end their streams while calls for `Status` and health
    /// are still taken, close connections, end the threads.
    async fn drain(
        mut self,
        mut server: std::pin::Pin<&mut impl Future<Output = Result<(), transport::Error>>>,
    ) -> anyhow::Result<()> {
        let drain_timeout = self.drain_timeout;
        self.streams.close();
        let drained = tokio::time::timeout(drain_timeout, async {
            tokio::select! {
                ended = &mut server => return ended,
                () = self.streams.closed() => {}
            }
            // A watch of a service's health ends only when the service is forgotten.
            for service in SERVICES {
                self.health.clear_service_status(service).await;
            }
            self.stop.cancel();
            server.await?;
            drop(self.streams);
            self.engine.end().await;
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

    async fn report(&self, status: ServingStatus) {
        for service in SERVICES {
            self.health.set_service_status(service, status).await;
        }
    }
}
