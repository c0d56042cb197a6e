//! The gRPC service `shoal.v1.Expert`: streams to the engine, and what this server says about itself.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use ids::{ExpertId, LayerId};
use proto::{
    Error,
    v1::{self, expert_server::Expert},
};
use shard::Held;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    presence::{Presence, device},
    slot::Replies,
    stream::Streams,
};

pub(crate) struct Api {
    pub(crate) presence: Arc<Presence>,
    pub(crate) streams: Streams,
    pub(crate) listen: SocketAddr,
    /// Its abstract name, where there are such.
    pub(crate) unix_socket: Option<String>,
}

#[tonic::async_trait]
impl Expert for Api {
    type DispatchStream = Replies;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        // A Unix socket has no address.
        let router =
            request.remote_addr().map_or_else(|| "of this host".to_owned(), |address| address.to_string());
        let replies = self.streams.open(request.into_inner())?;
        tracing::info!(router, "dispatch stream opened");
        Ok(Response::new(replies))
    }

    async fn status(
        &self,
        _request: Request<v1::ExpertStatusRequest>,
    ) -> Result<Response<v1::ExpertStatus>, Status> {
        let counts = self.streams.counters.counts();
        // Before the resident bytes: what is said to be copied is in memory.
        let unsettled_bytes = self.presence.shard().unsettled_bytes();
        // Before what is held: a placement that is said to be applied is.
        let record = self.presence.record();
        let shard = self.presence.shard();
        let held = shard.held();
        // The system walks the page tables of everything mapped to say this: too long for a thread that serves.
        let mapped = Arc::clone(&held);
        let resident_bytes = tokio::task::spawn_blocking(move || mapped.experts.resident_bytes())
            .await
            .map_err(|_| Error::internal("counting the resident bytes panicked"))?;
        Ok(Response::new(v1::ExpertStatus {
            instance: record.instance.to_string(),
            address: record.address,
            wire_version: record.wire_version,
            checkpoint: record.checkpoint,
            hidden_size: u32::try_from(shard.hidden_size()).unwrap_or(u32::MAX),
            holds: layers(&held),
            device: device(),
            shard_bytes: held.experts.shard_bytes(),
            resident_bytes: resident_bytes.unwrap_or(0),
            mapped_bytes: held.experts.mapped_bytes(),
            open_streams: self.streams.n_open(),
            frames: counts.frames,
            rows: counts.rows,
            state: record.state.as_str().to_owned(),
            version: record.version,
            frames_failed: counts.frames_failed,
            pairs: counts.pairs,
            epoch: held.epoch.0,
            memory_bytes_max: shard.memory_bytes_max(),
            placement: record.holdings.map_or(0, |holdings| holdings.placement.0),
            frames_late: counts.frames_late,
            listen: self.listen.to_string(),
            unix_socket: self.unix_socket.clone().unwrap_or_default(),
            reads_blocks: shard.reads_blocks(),
            unsettled_bytes,
        }))
    }
}

fn layers(held: &Held) -> Vec<v1::LayerExperts> {
    let layer = |(layer, experts): (LayerId, &BTreeSet<ExpertId>)| {
        let weights = experts.iter().filter_map(|&expert| held.experts.weights(layer, expert));
        v1::LayerExperts {
            layer: layer.0,
            experts: experts.iter().map(|expert| expert.0).collect(),
            weights: weights.map(|weights| weights.0).collect(),
        }
    };
    held.holds.layers().map(layer).collect()
}
