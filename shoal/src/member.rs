//! One child process of a cluster on this machine: started, watched, started again at the same address, ended.

use std::{
    collections::VecDeque,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use telemetry::Tasks;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdin, Command},
};
use tokio_util::sync::CancellationToken;

/// Lines of a child's stderr kept for the message if it fails to start.
const LINES_KEPT_MAX: usize = 40;
const RESTART_MIN: Duration = Duration::from_millis(100);
const RESTART_MAX: Duration = Duration::from_secs(5);
/// A child that ran this long is healthy: the next pause is short again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// Longer than a service's own drain: what is still there hangs.
const STOP_TIMEOUT: Duration = Duration::from_secs(35);

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) name: String,
    /// What it holds or does, for the table.
    pub(crate) role: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) listen: SocketAddr,
    /// Its log lines are kept for errors and not shown.
    pub(crate) quiet: bool,
}

/// A running child.
pub(crate) struct Member {
    pub(crate) spec: Spec,
    pub(crate) address: SocketAddr,
    pid: Arc<AtomicU32>,
    stop: CancellationToken,
    ended: CancellationToken,
}

/// One run of the program.
struct Run {
    child: Child,
    address: SocketAddr,
    /// Held open: the child ends when it closes. (`Child::wait` would close it.)
    _stdin: Option<ChildStdin>,
}

type Lines = Arc<Mutex<VecDeque<String>>>;

impl Member {
    /// Starts it and waits until it listens. A child that ends before that is an error with its own last words.
    pub(crate) async fn start(spec: Spec, tasks: &Tasks) -> anyhow::Result<Self> {
        let run = launch(&spec, spec.listen, tasks).await?;
        let member = Self {
            address: run.address,
            pid: Arc::new(AtomicU32::new(run.child.id().unwrap_or(0))),
            stop: CancellationToken::new(),
            ended: CancellationToken::new(),
            spec: spec.clone(),
        };
        let (pid, stop, ended) = (Arc::clone(&member.pid), member.stop.clone(), member.ended.clone());
        let spawn = tasks.clone();
        tasks.spawn("member", async move {
            watch(spec, run, &pid, &stop, &spawn).await;
            ended.cancel();
        });
        Ok(member)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Relaxed)
    }

    /// SIGTERM, and kill if that does not help. Returns when it is gone.
    pub(crate) async fn stop(&self) {
        self.stop.cancel();
        self.ended.cancelled().await;
    }
}

/// Keeps it running until `stop`.
async fn watch(spec: Spec, mut run: Run, pid: &AtomicU32, stop: &CancellationToken, tasks: &Tasks) {
    let address = run.address;
    let mut pause = RESTART_MIN;
    loop {
        let healthy = tokio::time::sleep(HEALTHY_AFTER);
        tokio::pin!(healthy);
        let mut was_healthy = false;
        let status = loop {
            tokio::select! {
                () = stop.cancelled() => return end(&spec, run.child).await,
                () = &mut healthy, if !was_healthy => was_healthy = true,
                status = run.child.wait() => break status,
            }
        };
        if was_healthy {
            pause = RESTART_MIN;
        }
        pid.store(0, Relaxed);
        let status = status.map_or_else(|error| error.to_string(), describe);
        tracing::warn!(name = %spec.name, status, ?pause, "child ended, starting it again");
        run = loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(RESTART_MAX);
            match launch(&spec, address, tasks).await {
                Ok(run) => break run,
                Err(error) => {
                    tracing::warn!(name = %spec.name, error = %crate::chain(&error), "cannot start it again")
                }
            }
        };
        pid.store(run.child.id().unwrap_or(0), Relaxed);
    }
}

async fn launch(spec: &Spec, listen: SocketAddr, tasks: &Tasks) -> anyhow::Result<Run> {
    let mut command = Command::new(&spec.program);
    // Who is where and holds what is said with flags: a registry of another cluster is nobody's business here.
    for variable in
        ["SHOAL_REGISTRY", "SHOAL_SHARD", "SHOAL_EXPERTS", "SHOAL_ROUTER_SHARD", "SHOAL_ROUTER_EXPERTS"]
    {
        command.env_remove(variable);
    }
    let mut child = command
        // Ctrl-C reaches whoever stops them in order, and not them too.
        .process_group(0)
        .args(&spec.args)
        .args(["--listen", &listen.to_string(), "--exit-with-stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {} ({})", spec.name, spec.program.display()))?;
    let stdin = child.stdin.take();
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("{} has no output to read", spec.name);
    };
    let lines = Lines::default();
    let ended = CancellationToken::new();
    tasks.spawn("child's stderr", {
        let (lines, ended) = (Arc::clone(&lines), ended.clone());
        let shown = (!spec.quiet).then(|| spec.name.clone());
        async move {
            pass_on(stderr, shown, &lines).await;
            ended.cancel();
        }
    });
    let mut out = BufReader::new(stdout).lines();
    let Some(line) = out.next_line().await.with_context(|| format!("cannot read what {} says", spec.name))?
    else {
        let status = child.wait().await.map_or_else(|error| error.to_string(), describe);
        // Its last words may still be on their way.
        ended.cancelled().await;
        bail!("{} {status}: {}", spec.name, last_words(&lines));
    };
    let message: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
    let address = message["listening"].as_str().and_then(|address| address.parse().ok());
    let address =
        address.with_context(|| format!("{} said {line:?} instead of where it listens", spec.name))?;
    // A full pipe must not stop the child.
    tasks.spawn("child's stdout", async move { while let Ok(Some(_)) = out.next_line().await {} });
    Ok(Run { child, address, _stdin: stdin })
}

async fn pass_on(stderr: impl AsyncRead + Unpin, shown: Option<String>, lines: &Lines) {
    let mut stderr = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = stderr.next_line().await {
        if let Some(name) = &shown {
            // Nobody is left to tell if this fails.
            let _unheard = writeln!(std::io::stderr(), "{name:>8} | {line}");
        }
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES_KEPT_MAX {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// The error a child ended with, or else all it said.
fn last_words(lines: &Lines) -> String {
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let error = lines.iter().rev().find_map(|line| line.strip_prefix("error: ").map(str::to_owned));
    error.unwrap_or_else(|| lines.iter().cloned().collect::<Vec<_>>().join("\n"))
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

async fn end(spec: &Spec, mut child: Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = kill(pid, Signal::SIGTERM)
    {
        tracing::debug!(name = %spec.name, %error, "cannot send SIGTERM");
    }
    if tokio::time::timeout(STOP_TIMEOUT, child.wait()).await.is_err() {
        tracing::warn!(name = %spec.name, "does not stop, killing it");
        if let Err(error) = child.kill().await {
            tracing::warn!(name = %spec.name, %error, "cannot kill it");
        }
    }
}
