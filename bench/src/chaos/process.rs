//! One child process of a run: its log lies in a file, and it goes when its handle goes, frozen or not.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
};

/// How long a process may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// And until it has left in order.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct Process {
    pub(crate) name: String,
    child: Child,
    /// Held open: the child ends when it closes.
    _stdin: Option<ChildStdin>,
    pub(crate) log: PathBuf,
}

impl Process {
    /// Starts `command`; its stderr goes to a file in `dir`.
    pub(crate) fn start(name: &str, command: &mut Command, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let stderr = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name} ({:?})", command.as_std().get_program()))?;
        let stdin = child.stdin.take();
        Ok(Self { name: name.to_owned(), child, _stdin: stdin, log })
    }

    /// The address it says on stdout that it listens on.
    pub(crate) async fn address(&mut self) -> anyhow::Result<SocketAddr> {
        let stdout = self.child.stdout.take().context("stdout was read already")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(START_TIMEOUT, lines.next_line())
            .await
            .with_context(|| format!("{} does not listen within {START_TIMEOUT:?}", self.name))??;
        let Some(line) = line else {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            bail!("{} ended before it listened: {}", self.name, log.lines().last().unwrap_or_default());
        };
        let line: serde_json::Value =
            serde_json::from_str(&line).with_context(|| format!("{} says {line:?}", self.name))?;
        let address = line["listening"].as_str().with_context(|| format!("{} says {line}", self.name))?;
        Ok(address.parse()?)
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.child.id().with_context(|| format!("{} has ended", self.name))?;
        kill(Pid::from_raw(i32::try_from(pid)?), signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("cannot kill {}", self.name))
    }

    /// SIGTERM, and waits until it has left; an error if it does not, or not with success.
    pub(crate) async fn terminate(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::SIGTERM)?;
        match tokio::time::timeout(LEAVE_TIMEOUT, self.child.wait()).await {
            Ok(status) => {
                let status = status?;
                anyhow::ensure!(status.success(), "{} left with {status}", self.name);
                Ok(())
            }
            Err(_) => {
                self.kill().await?;
                bail!("{} did not leave within {LEAVE_TIMEOUT:?}", self.name)
            }
        }
    }

    /// True once it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }
}
