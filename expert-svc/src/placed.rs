//! Follows the placement: what it wants of this instance is held, beside what is pinned.

use std::sync::Arc;

use cluster::{Holds, Placement};
use ids::{InstanceId, Version};
use telemetry::Tasks;
use tokio::sync::watch;

use crate::{
    presence::Presence,
    shard::{Held, describe},
};

/// What `placement` wants of `instance`, nothing if it does not name it. None if the placement is not newer than
/// `last`: a leader that has been replaced may still write, and is not obeyed.
pub(crate) fn apply(placement: &Placement, instance: &InstanceId, last: Version) -> Option<Holds> {
    let wanted = || placement.wanted.get(instance.as_str()).cloned().unwrap_or_default();
    (placement.version > last).then(wanted)
}

/// Applies each placement until `tasks` shuts down. While one is applied, only the latest of those that follow waits.
pub(crate) async fn follow(
    mut placements: watch::Receiver<Option<Arc<Placement>>>,
    presence: Arc<Presence>,
    tasks: Tasks,
) {
    let mut last = Version::default();
    let followed = async {
        loop {
            let placement = placements.borrow_and_update().clone();
            if let Some(placement) = placement
                && let Some(wanted) = apply(&placement, presence.instance(), last)
            {
                // One that fails is not tried again: the record shows that it was not applied, and the leader decides.
                last = placement.version;
                hold(&presence, placement.version, wanted).await;
            }
            if placements.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = tasks.shutting_down() => {}
        () = followed => {}
    }
}

/// Off the threads that serve: reading weights takes as long as the disk needs.
async fn hold(presence: &Presence, version: Version, wanted: Holds) {
    let shard = Arc::clone(presence.shard());
    let names = describe(&wanted);
    tracing::info!(%version, wanted = names, "applying a placement");
    let held = tokio::task::spawn_blocking(move || shard.hold(&wanted)).await;
    let error = match held {
        Ok(Ok(held)) => {
            presence.applied(version);
            let Held { holds, epoch, experts } = &*held;
            tracing::info!(
                %version,
                %epoch,
                holds = describe(holds),
                shard_bytes = experts.shard_bytes(),
                "placement applied"
            );
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(%version, wanted = names, error, "placement refused, what was held stays");
}

#[cfg(test)]
mod tests;
