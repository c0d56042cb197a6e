//! Experts move from their cache files into huge pages while frames are computed.

use std::sync::Arc;

use shard::Shard;

/// Moves what is held now, if huge pages were chosen for it, on a thread of its own.
pub(crate) fn beside(shard: &Arc<Shard>) {
    let shard = Arc::clone(shard);
    tokio::task::spawn_blocking(move || match shard.settle() {
        Ok(0) => {}
        Ok(bytes) => {
            tracing::info!(bytes, huge_bytes = model::huge_bytes(), "experts copied for huge pages");
        }
        Err(error) => tracing::warn!(%error, "some experts stay where their files are mapped"),
    });
}
