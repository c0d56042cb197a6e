//! The gRPC service `shoal.v1.Expert`: streams to the engine, and what this server says about itself.

use std::{net::SocketAddr, sync::Arc};

use ids::InstanceId;
use proto::{
    Error, WIRE_VERSION,
    v1::{self, expert_server::Expert},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{shard::Shard, slot::Replies, stream::Streams};

pub(crate) struct Api {
    pub(crate) instance: InstanceId,
    pub(crate) address: SocketAddr,
    pub(crate) shard: Arc<Shard>,
    pub(crate) streams: Streams,
}

#[tonic::async_trait]
impl Expert for Api {
    type DispatchStream = Replies;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let router = request.remote_addr();
        let replies = self.streams.open(request.into_inner())?;
        tracing::info!(router = ?router, "dispatch stream opened");
        Ok(Response::new(replies))
    }

    async fn status(
        &self,
        _request: Request<v1::ExpertStatusRequest>,
    ) -> Result<Response<v1::ExpertStatus>, Status> {
        let counts = self.streams.counters.counts();
        // The system walks the page tables of everything mapped to say this: too long for a thread that serves.
        let shard = Arc::clone(&self.shard);
        let resident_bytes = tokio::task::spawn_blocking(move || shard.experts().resident_bytes())
            .await
            .map_err(|_| Error::internal("counting the resident bytes panicked"))?;
        let experts = self.shard.experts();
        let holds = self.shard.holds().iter().map(|(layer, experts)| v1::LayerExperts {
            layer: layer.0,
            experts: experts.iter().map(|expert| expert.0).collect(),
        });
        let state = if self.streams.tasks.is_shutting_down() { "draining" } else { "ready" };
        Ok(Response::new(v1::ExpertStatus {
            instance: self.instance.to_string(),
            address: self.address.to_string(),
            wire_version: WIRE_VERSION,
            checkpoint: self.shard.checkpoint().to_owned(),
            hidden_size: u32::try_from(self.shard.hidden_size()).unwrap_or(u32::MAX),
            holds: holds.collect(),
            device: format!("cpu {}", model::Isa::detect().name()),
            shard_bytes: experts.shard_bytes(),
            resident_bytes: resident_bytes.unwrap_or(0),
            mapped_bytes: experts.mapped_bytes(),
            open_streams: self.streams.n_open(),
            frames: counts.frames,
            rows: counts.rows,
            state: state.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            frames_failed: counts.frames_failed,
            pairs: counts.pairs,
        }))
    }
}
