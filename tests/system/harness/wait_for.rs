//! Waiting without sleeping: for a condition, or for a future, with the last state seen in the failure's message.

use std::{fmt::Display, future::Future, panic::Location, time::Duration};

/// Long enough for two cores that are busy with other things: reached only by a test that fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

const POLL_INTERVAL: Duration = Duration::from_millis(15);

/// Asks `condition` again and again until it is Ok; an Err is the state that was seen instead.
///
/// # Panics
/// At the deadline, with the last state.
#[track_caller]
pub(crate) fn wait_for<T, E: Display>(
    what: &str,
    mut condition: impl AsyncFnMut() -> Result<T, E>,
) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        let mut state = "not asked yet".to_owned();
        let polling = async {
            loop {
                match condition().await {
                    Ok(value) => return value,
                    Err(other) => state = other.to_string(),
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        match tokio::time::timeout(DEADLINE, polling).await {
            Ok(value) => value,
            Err(_) => panic!("{caller}: no {what} within {DEADLINE:?}; last seen: {state}"),
        }
    }
}

/// The result of `future`, which must come before `limit`.
///
/// # Panics
/// If it does not.
#[track_caller]
pub(crate) fn within<T>(
    limit: Duration,
    what: &str,
    future: impl Future<Output = T>,
) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        match tokio::time::timeout(limit, future).await {
            Ok(value) => value,
            Err(_) => panic!("{caller}: no {what} within {limit:?}"),
        }
    }
}
