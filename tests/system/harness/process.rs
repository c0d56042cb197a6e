//! One child process: spawned, signalled, its lines kept, gone when its handle is.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Read},
    net::SocketAddr,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::wait_for;

const PROGRAM: &str = env!("CARGO_BIN_EXE_shoal-under-test");

/// Lines of a process that a failed test prints.
const LINES_SHOWN_MAX: usize = 40;

pub(crate) struct Process {
    name: String,
    child: Child,
    /// Held open: with `--exit-with-stdin` the child ends when this end closes, however this process dies.
    _stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
}

/// What a process that has ended leaves.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    /// `shoal ARGS`, with an environment of its own. `name` is for messages.
    pub(crate) fn spawn(name: impl Into<String>, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let name = name.into();
        let mut child = Command::new(PROGRAM)
            .args(args)
            // Flags can come from SHOAL_* variables: a person's own must not change a test.
            .env_clear()
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {PROGRAM}: {error}"));
        let stdin = child.stdin.take();
        let stdout = Lines::read(child.stdout.take().expect("stdout is piped"));
        let stderr = Lines::read(child.stderr.take().expect("stderr is piped"));
        Self { name, child, _stdin: stdin, stdout, stderr }
    }

    /// A service: like [`Process::spawn`], and it ends with this process however that dies.
    pub(crate) fn spawn_service(
        name: impl Into<String>,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Self {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        Self::spawn(name, args.chain(["--exit-with-stdin".into()]))
    }

    /// `shoal ARGS` run to its end.
    pub(crate) async fn run(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
        let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let mut process = Self::spawn(format!("{args:?}"), args);
        process.ended().await
    }

    /// Where it listens, as it says itself on stdout.
    pub(crate) async fn address(&mut self) -> SocketAddr {
        wait_for("listening line", async || {
            if let Some(status) = self.exit_status() {
                panic!("{} ended before it listened: {status}\n{}", self.name, self.stderr.text());
            }
            let lines = self.stdout.text();
            let announced = lines.lines().find_map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).ok()?;
                line["listening"].as_str()?.parse().ok()
            });
            announced.ok_or(lines)
        })
        .await
    }

    /// Waits for its end; stdout and stderr are complete then.
    pub(crate) async fn ended(&mut self) -> Ended {
        let status = wait_for(&format!("end of {}", self.name), async || {
            self.exit_status().ok_or_else(|| self.stderr.text())
        })
        .await;
        let complete = self.stdout.finish() && self.stderr.finish();
        assert!(complete, "{} ended, and something that it started did not", self.name);
        Ended { status, stdout: self.stdout.text(), stderr: self.stderr.text() }
    }

    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child of ours can be waited for")
    }

    /// SIGKILL: it gets no chance to say anything.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("a child of ours can be waited for");
    }

    /// SIGTERM: asks it to drain and end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// SIGSTOP: alive, its sockets open, and it does nothing.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal)
            .unwrap_or_else(|error| panic!("cannot send {signal} to {}: {error}", self.name));
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"))
    }

    /// Everything it wrote to stderr so far.
    pub(crate) fn log(&self) -> String {
        self.stderr.text()
    }

    /// Everything it wrote to stdout so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Processor time that its threads have used.
    pub(crate) fn cpu_time(&self) -> Duration {
        // Linux counts in hundredths of a second towards programs, whatever its own tick is.
        const TICKS_PER_SECOND: f64 = 100.0;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("the process lives");
        // The program's name, in parentheses, may contain anything; utime and stime are fields 14 and 15.
        let fields: Vec<&str> = stat[stat.rfind(')').expect("a name") + 2..].split(' ').collect();
        let ticks = |field: usize| fields[field - 3].parse::<f64>().expect("a number");
        Duration::from_secs_f64((ticks(14) + ticks(15)) / TICKS_PER_SECOND)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A frozen process dies of SIGKILL too.
        let _gone_already = self.child.kill();
        let _status = self.child.wait();
        let complete = self.stdout.finish() && self.stderr.finish();
        let log = self.stderr.text();
        if std::thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            let shown = &lines[lines.len().saturating_sub(LINES_SHOWN_MAX)..];
            println!("--- last lines of {}:\n{}", self.name, shown.join("\n"));
        } else {
            // Whatever a test is about: no process may panic.
            assert!(!log.contains("panicked"), "{} panicked:\n{log}", self.name);
            assert!(complete, "{} is gone, and something that it started is not", self.name);
        }
    }
}

/// The lines of a pipe, read on a thread of their own so that the writer never waits.
struct Lines {
    text: Arc<Mutex<String>>,
    end: mpsc::Receiver<()>,
}

impl Lines {
    /// A pipe that is open for so long after its process ended is held by a child of it that should be gone.
    const END_WAIT: Duration = Duration::from_secs(20);

    fn read(pipe: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&text);
        let (at_end, end) = mpsc::channel();
        std::thread::spawn(move || {
            let _dropped_at_end: mpsc::Sender<()> = at_end;
            let mut pipe = BufReader::new(pipe);
            let mut line = Vec::new();
            while pipe.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                lock(&shared).push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self { text, end }
    }

    fn text(&self) -> String {
        lock(&self.text).clone()
    }

    /// Waits for the end of the pipe: call only after the process has ended. False: somebody else holds it open.
    fn finish(&self) -> bool {
        self.end.recv_timeout(Self::END_WAIT) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

fn lock(text: &Mutex<String>) -> MutexGuard<'_, String> {
    text.lock().unwrap_or_else(PoisonError::into_inner)
}
