//! The only place that spawns. Every task has a name for the log and an owner that waits for it at drain.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The tasks of one service. Clones share one set.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

impl Tasks {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` until it ends. A panic in it is logged under `name`, and ends only it.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let task: JoinHandle<()> = tokio::spawn(self.tracker.track_future(future));
        tokio::spawn(self.tracker.track_future(async move {
            if let Err(error) = task.await
                && error.is_panic()
            {
                tracing::error!(task = name, %error, "task panicked");
            }
        }));
    }

    /// Resolves when [`Tasks::begin_shutdown`] was called; tasks that serve select on it.
    pub async fn shutting_down(&self) {
        self.shutdown.cancelled().await;
    }

    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutdown.is_cancelled()
    }

    /// A token for code that takes one.
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    pub fn begin_shutdown(&self) {
        self.shutdown.cancel();
    }

    /// Waits until every task has ended, at most `timeout`. False: some were still running.
    pub async fn join(&self, timeout: Duration) -> bool {
        self.tracker.close();
        tokio::time::timeout(timeout, self.tracker.wait()).await.is_ok()
    }
}

/// Resolves at SIGTERM or Ctrl-C, whichever comes first.
pub async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn join_waits_and_a_panic_ends_only_its_task() {
        let tasks = Tasks::new();
        tasks.spawn("panics", async { panic!("on purpose") });
        let inner = tasks.clone();
        tasks.spawn("waits", async move { inner.shutting_down().await });
        assert!(!tasks.join(Duration::from_millis(10)).await);
        tasks.begin_shutdown();
        assert!(tasks.join(Duration::from_secs(10)).await);
    }
}
