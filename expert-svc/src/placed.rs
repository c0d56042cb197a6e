//! Follows the placement: what it wants of this instance is held, beside what is pinned.

use std::{sync::Arc, time::Duration};

use cluster::{Holds, Placement};
use ids::Version;
use shard::{Held, describe};
use telemetry::Tasks;
use tokio::sync::watch;

use crate::{presence::Presence, settle};

/// How long a placement that could not be applied waits for another try: a disk may have been busy, memory may be freed.
const TRY_AGAIN: Duration = Duration::from_secs(5);

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
            let news = placement.as_ref().and_then(|placement| {
                Some((placement.version, placement.news_for(presence.instance(), last)?.clone()))
            });
            let applied = match news {
                Some((version, wanted)) => {
                    let applied = hold(&presence, version, wanted).await;
                    if applied {
                        last = version;
                    }
                    applied
                }
                None => true,
            };
            let ended = tokio::select! {
                changed = placements.changed() => changed.is_err(),
                () = tokio::time::sleep(TRY_AGAIN), if !applied => false,
            };
            if ended {
                return;
            }
        }
    };
    tokio::select! {
        () = tasks.shutting_down() => {}
        () = followed => {}
    }
}

/// Off the threads that serve: reading weights takes as long as the disk needs. False: what was held stays.
async fn hold(presence: &Presence, version: Version, wanted: Holds) -> bool {
    let shard = Arc::clone(presence.shard());
    let names = describe(&wanted);
    tracing::info!(%version, wanted = names, "applying a placement");
    let held = tokio::task::spawn_blocking(move || shard.hold(&wanted)).await;
    // What was loaded for nothing is forgotten there, too.
    settle::beside(presence.shard());
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
            return true;
        }
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(%version, wanted = names, error, "placement refused, what was held stays");
    false
}

#[cfg(test)]
mod tests;
