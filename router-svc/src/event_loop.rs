//! The event loop of the links. The engine's thread runs it while it waits for them: a frame leaves and its reply comes in
//! without another thread being woken. While the engine computes for long, or when it says that there is much to send, a
//! caretaker runs it instead, so that pings are answered and servers join; it leaves when the engine comes back.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::Notify,
};

/// How long the engine may compute before somebody else looks after the links: several times shorter than any time limit of
/// theirs.
const CARE_INTERVAL: Duration = Duration::from_millis(250);

/// Tasks that the loop runs before it looks whether others have become ready; it also looks when none is left.
const TASKS_A_TURN: u32 = 1024;

/// Dropped, it ends all that runs on it.
#[derive(Debug)]
pub(crate) struct EventLoop {
    shared: Arc<Shared>,
    caretaker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Until it is dropped.
    runtime: Option<Runtime>,
    /// The engine's thread runs the loop now.
    attended: AtomicBool,
    /// How often it has.
    visits: AtomicU64,
    caretaker_sleeps: AtomicBool,
    /// The engine has left the loop to the caretaker.
    handed_over: AtomicBool,
    /// The caretaker runs the loop, until it is told that somebody else wants to.
    cared_for: AtomicBool,
    wanted: Notify,
    stop: AtomicBool,
}

impl EventLoop {
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            runtime: Some(Builder::new_current_thread().event_interval(TASKS_A_TURN).enable_all().build()?),
            attended: AtomicBool::new(false),
            visits: AtomicU64::new(0),
            caretaker_sleeps: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            cared_for: AtomicBool::new(false),
            wanted: Notify::new(),
            stop: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let caretaker = thread::Builder::new().name("links".into()).spawn(move || theirs.care())?;
        Ok(Self { shared, caretaker: Some(caretaker) })
    }

    /// What is spawned there runs on this loop.
    pub(crate) fn handle(&self) -> Handle {
        self.shared.runtime().handle().clone()
    }

    /// Runs everything until `awaited` is there.
    pub(crate) fn run<T>(&self, awaited: impl Future<Output = T>) -> T {
        let shared = &*self.shared;
        shared.attended.store(true, Ordering::SeqCst);
        shared.handed_over.store(false, Ordering::SeqCst);
        if shared.cared_for.load(Ordering::SeqCst) {
            shared.wanted.notify_one();
        }
        let outcome = shared.runtime().block_on(awaited);
        shared.visits.fetch_add(1, Ordering::Relaxed);
        shared.attended.store(false, Ordering::SeqCst);
        if shared.caretaker_sleeps.swap(false, Ordering::SeqCst) {
            self.wake_caretaker();
        }
        outcome
    }

    /// Does something, and runs what can be run then. Whom it wakes, the loop itself finds: from outside it, that would take
    /// a system call each.
    pub(crate) fn turn<T>(&self, act: impl FnOnce() -> T) -> T {
        self.run(async {
            let done = act();
            // Behind all whom that woke, whether this thread has the loop or the caretaker has not left it yet.
            let _ran = self.shared.runtime().spawn(async {}).await;
            // Goes on when nobody else can: whom those woke has run too.
            tokio::task::yield_now().await;
            done
        })
    }

    /// Leaves the loop to the caretaker, at once and until the engine comes back: what takes longer than the engine should
    /// look at it goes on.
    pub(crate) fn hand_over(&self) {
        self.shared.handed_over.store(true, Ordering::SeqCst);
        self.wake_caretaker();
    }

    fn wake_caretaker(&self) {
        if let Some(caretaker) = &self.caretaker {
            caretaker.thread().unpark();
        }
    }
}

impl Shared {
    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().unwrap_or_else(|| unreachable!("it is taken when nobody is left to run it"))
    }

    fn care(&self) {
        let mut visits_seen = 0;
        while !self.stop.load(Ordering::SeqCst) {
            let visits = self.visits.load(Ordering::Relaxed);
            if self.attended.load(Ordering::SeqCst) {
                // Whoever leaves the loop after this says so.
                self.caretaker_sleeps.store(true, Ordering::SeqCst);
                if self.attended.load(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.caretaker_sleeps.store(false, Ordering::SeqCst);
            } else if self.handed_over.swap(false, Ordering::SeqCst) || visits == visits_seen {
                // Of a takeover that came to nothing.
                let _stale = self.wanted.notified().now_or_never();
                self.cared_for.store(true, Ordering::SeqCst);
                // Whoever wants it after this says so.
                if !self.attended.load(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
                    self.runtime().block_on(self.wanted.notified());
                }
                self.cared_for.store(false, Ordering::SeqCst);
            }
            visits_seen = visits;
            if !self.handed_over.load(Ordering::SeqCst) {
                thread::park_timeout(CARE_INTERVAL);
            }
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wanted.notify_one();
        if let Some(caretaker) = self.caretaker.take() {
            caretaker.thread().unpark();
            let _ended = caretaker.join();
        }
        // Not waited for: a name that is looked up may take long.
        if let Some(runtime) = Arc::get_mut(&mut self.shared).and_then(|shared| shared.runtime.take()) {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_spawned_runs_while_the_engine_waits_and_while_it_computes() {
        let event_loop = EventLoop::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        let (asked, mut asks) = tokio::sync::mpsc::unbounded_channel();
        event_loop.handle().spawn(async move {
            while let Some(ask) = asks.recv().await {
                let _test_gone = sender.send(ask);
            }
        });
        event_loop.turn(|| asked.send(1).unwrap());
        assert_eq!(receiver.try_recv(), Ok(1));
        // The engine does not come back: the caretaker does it, and goes on to.
        for ask in [2, 3] {
            asked.send(ask).unwrap();
            assert_eq!(receiver.recv(), Ok(ask));
        }
        // It leaves when the engine is there again, sleeps meanwhile, and takes over once more.
        event_loop.run(async { tokio::time::sleep(CARE_INTERVAL * 2).await });
        asked.send(4).unwrap();
        assert_eq!(receiver.recv(), Ok(4));
    }

    #[test]
    fn a_turn_runs_all_that_was_ready_and_what_that_made_ready() {
        let event_loop = EventLoop::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        // The caretaker has the loop, as after a long computation.
        while !event_loop.shared.cared_for.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        // Each wakes a second one, as a link does its connection.
        for at in 0..100 {
            let sender = sender.clone();
            let (wake, woken) = tokio::sync::oneshot::channel();
            event_loop.handle().spawn(async move { sender.send(woken.await.unwrap()).unwrap() });
            event_loop.handle().spawn(async move { wake.send(at).unwrap() });
        }
        event_loop.turn(|| ());
        assert_eq!(receiver.try_iter().count(), 100);
    }

    #[test]
    fn what_is_handed_over_goes_on_at_once() {
        let event_loop = EventLoop::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        for round in 0..50 {
            let sender = sender.clone();
            event_loop.handle().spawn(async move {
                tokio::time::sleep(Duration::from_micros(10)).await;
                sender.send(round).unwrap();
            });
            event_loop.turn(|| ());
            event_loop.hand_over();
            // Sooner than it would have been found out.
            assert_eq!(receiver.recv_timeout(CARE_INTERVAL / 2), Ok(round));
        }
    }

    #[test]
    fn a_name_that_is_looked_up_does_not_keep_it() {
        let event_loop = EventLoop::start().unwrap();
        let (done, wait) = mpsc::channel::<()>();
        event_loop.handle().spawn_blocking(move || wait.recv());
        event_loop.turn(|| ());
        drop(event_loop);
        // Only now may the look-up end: had it been waited for, this would not be reached.
        drop(done);
    }

    #[test]
    fn dropped_it_ends_what_runs_on_it() {
        let event_loop = EventLoop::start().unwrap();
        let (sender, receiver) = mpsc::channel::<()>();
        event_loop.handle().spawn(async move {
            let _held = sender;
            std::future::pending::<()>().await;
        });
        event_loop.turn(|| ());
        drop(event_loop);
        assert_eq!(receiver.recv(), Err(mpsc::RecvError));
    }
}
