//! Threads for short steps: a decode step hands them some twenty jobs a layer, each of tens of microseconds. A job is
//! numbered tasks; whoever is free takes the next number, the caller too. It never waits for a thread that has not begun:
//! a job that is done before anybody woke up costs its own time and no more.
//!
//! Which thread computes a task does not show in its result.

use std::{
    any::Any,
    cell::RefCell,
    hint,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
};

use super::cores;
use crate::Error;

/// What is done with each number below the number of tasks.
pub type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Turns of its loop that the caller waits for the last tasks of others before it sleeps.
const SPINS_AT_END: u32 = 2_000;

/// Turns of its loop that a helper waits for a job that is to come at once, before it sleeps all the same.
const SPINS_BETWEEN: u32 = 2_000;

/// Numbers to be read and written below which they are not worth a second thread: some 5 µs of one core.
const SHARED_FROM: usize = 1 << 14;

/// The threads that one engine computes with. They end when it is dropped.
///
/// If there is one for every core, each stays on its own: several processes on a machine then share every core, and none
/// lies idle while two threads of another one wait for the same, which schedulers leave so for milliseconds.
#[derive(Debug)]
pub struct Threads {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// How many compute at a time.
    n: usize,
    /// Turns of its loop that a helper waits for the next job before it sleeps.
    spins: u32,
    /// Held by the caller of a job: there is one at a time.
    calling: Mutex<()>,
    state: Mutex<State>,
    /// Of the state, for those who look without its lock.
    published: AtomicU64,
    /// Helpers that have begun the job and not yet left it.
    inside: AtomicUsize,
    /// The caller of the job sleeps until they have.
    waited_for: AtomicBool,
    /// How many [`Awake`] there are.
    stay_awake: AtomicUsize,
    /// The next task.
    next: AtomicUsize,
    /// Those that compute beside the caller.
    helpers: Vec<Helper>,
    left: Condvar,
}

/// One of the threads, as others see it.
#[derive(Debug, Default)]
struct Helper {
    /// The core that it stays on.
    core: Option<usize>,
    asleep: AtomicBool,
    /// Set when it runs.
    thread: OnceLock<Thread>,
}

#[derive(Default)]
struct State {
    /// The one to be computed now.
    job: Option<Job>,
    /// Of jobs so far.
    n_jobs: u64,
    /// What a task of the job panicked with.
    panic: Option<Box<dyn Any + Send>>,
    stop: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("n_jobs", &self.n_jobs).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
struct Job {
    task: &'static Task<'static>,
    n_tasks: usize,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

impl Threads {
    /// `n` with the caller's own. A helper without a job looks `spins` times for the next one before it sleeps: that
    /// saves waking it, where there is a core for each thread.
    pub fn start(n: NonZeroUsize, spins: u32) -> Result<Self, Error> {
        let cores = cores::allowed();
        let helpers: Vec<Helper> = if n.get() > 1 && n.get() == cores.len() {
            // The one that stays where the caller happens to be sleeps on.
            cores.into_iter().map(|core| Helper { core: Some(core), ..Helper::default() }).collect()
        } else {
            (1..n.get()).map(|_| Helper::default()).collect()
        };
        let n_helpers = helpers.len();
        let shared = Arc::new(Shared {
            n: n.get(),
            spins,
            calling: Mutex::default(),
            state: Mutex::default(),
            published: AtomicU64::new(0),
            inside: AtomicUsize::new(0),
            waited_for: AtomicBool::new(false),
            stay_awake: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            helpers,
            left: Condvar::new(),
        });
        // Dropped at an error, which ends those that were started.
        let mut threads = Self { shared, workers: Vec::new() };
        for at in 0..n_helpers {
            let shared = Arc::clone(&threads.shared);
            let worker = thread::Builder::new()
                .name(format!("compute-{at}"))
                .spawn(move || shared.serve(&shared.helpers[at]))
                .map_err(|error| Error::new(format!("cannot start {n} compute threads: {error}")))?;
            threads.workers.push(worker);
        }
        Ok(threads)
    }

    #[must_use]
    pub fn n(&self) -> usize {
        self.shared.n
    }

    /// Runs `compute`, whose kernels then compute with these threads. What is computed elsewhere has one thread.
    pub fn install<T>(&self, compute: impl FnOnce() -> T) -> T {
        let _restored = Current::set(Some(Arc::clone(&self.shared)));
        compute()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.published.store(u64::MAX, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A helper catches what its tasks panic with, and has nothing else to fail at.
            let _ended = worker.join();
        }
    }
}

/// Puts back what was current before.
struct Current(Option<Arc<Shared>>);

impl Current {
    fn set(shared: Option<Arc<Shared>>) -> Self {
        Self(CURRENT.replace(shared))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// How many threads compute here.
#[must_use]
pub fn count() -> usize {
    CURRENT.with_borrow(|shared| shared.as_ref().map_or(1, |shared| shared.n))
}

/// Runs `task` with each number below `n_tasks`, on this thread and the others installed here. Returns when all are
/// done; panics if one of them did. A task that calls this itself computes alone.
pub fn run(n_tasks: usize, task: &Task<'_>) {
    if n_tasks > 1 {
        // This thread takes one.
        run_waking(n_tasks - 1, n_tasks, task, || ());
    } else {
        (0..n_tasks).for_each(task);
    }
}

/// The same, and this thread does something else `first` while others begin; if it computes then, it does so alone.
pub fn run_beside<T>(n_tasks: usize, task: &Task<'_>, first: impl FnOnce() -> T) -> T {
    run_waking(n_tasks, n_tasks, task, first)
}

fn run_waking<T>(n_awake: usize, n_tasks: usize, task: &Task<'_>, first: impl FnOnce() -> T) -> T {
    match CURRENT.with_borrow(Clone::clone) {
        Some(shared) if shared.n > 1 => {
            let _alone = Current::set(None);
            shared.run(n_awake, n_tasks, task, first)
        }
        Some(_) | None => {
            let done = first();
            (0..n_tasks).for_each(task);
            done
        }
    }
}

/// While there is one, jobs follow each other at once: a helper that has done what it could of one waits for the next one
/// awake, whatever `spins` says. Between two jobs of a step there are microseconds, which is less than what waking it takes.
#[derive(Debug)]
pub struct Awake(Option<Arc<Shared>>);

/// The threads installed here, for whoever computes something else first.
#[derive(Debug)]
pub struct Installed(Option<Arc<Shared>>);

#[must_use]
pub fn installed() -> Installed {
    Installed(CURRENT.with_borrow(Clone::clone))
}

/// Of the threads installed here.
#[must_use]
pub fn stay_awake() -> Awake {
    installed().stay_awake()
}

impl Installed {
    #[must_use]
    pub fn stay_awake(self) -> Awake {
        if let Some(shared) = &self.0 {
            shared.stay_awake.fetch_add(1, Ordering::Relaxed);
        }
        Awake(self.0)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.stay_awake.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Runs `compute` on this thread alone.
pub fn alone<T>(compute: impl FnOnce() -> T) -> T {
    let _alone = Current::set(None);
    compute()
}

/// Runs `compute`, which reads and writes `numbers` each a few times, on this thread alone if they are not worth another.
pub fn share<T>(numbers: usize, compute: impl FnOnce() -> T) -> T {
    if numbers < SHARED_FROM { alone(compute) } else { compute() }
}

/// Runs `task` with each of `items`.
pub fn for_each<T: Send>(items: Vec<T>, task: impl Fn(T) + Sync) {
    if items.len() > 1 {
        let items = Items::new(items);
        run(items.0.len(), &|at| items.run(at, &task));
    } else {
        items.into_iter().for_each(task);
    }
}

/// The same, and this thread does something else `first` while others begin; if it computes then, it does so alone.
pub fn for_each_beside<T: Send, F>(items: Vec<T>, task: impl Fn(T) + Sync, first: impl FnOnce() -> F) -> F {
    let items = Items::new(items);
    run_beside(items.0.len(), &|at| items.run(at, &task), first)
}

/// What each task takes for itself.
struct Items<T>(Vec<Mutex<Option<T>>>);

impl<T> Items<T> {
    fn new(items: Vec<T>) -> Self {
        Self(items.into_iter().map(|item| Mutex::new(Some(item))).collect())
    }

    fn run(&self, at: usize, task: impl Fn(T)) {
        let item = self.0[at].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(item) = item {
            task(item);
        }
    }
}

/// What `task` makes of each number below `n`, in their order.
pub fn map<T: Send>(n: usize, task: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..n).map(|_| None).collect();
    for_each(results.iter_mut().enumerate().collect(), |(at, result)| *result = Some(task(at)));
    results.into_iter().flatten().collect()
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Tasks do not panic while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<T>(&self, n_awake: usize, n_tasks: usize, task: &Task<'_>, first: impl FnOnce() -> T) -> T {
        let _calling = match self.calling.try_lock() {
            Ok(calling) => calling,
            // A job that panicked has ended.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let done = first();
                (0..n_tasks).for_each(task);
                return done;
            }
        };
        #[expect(unsafe_code, reason = "sound: this function returns only when nobody is inside the job")]
        let task = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        let job = Job { task, n_tasks };
        let mut state = self.lock();
        self.next.store(0, Ordering::Relaxed);
        state.job = Some(job);
        state.n_jobs += 1;
        let n_jobs = state.n_jobs;
        drop(state);
        // Whoever looks for it finds the lock free.
        self.published.store(n_jobs, Ordering::SeqCst);
        self.wake(n_awake);
        // Unwind safe: the panic goes on in the caller.
        let done = catch_unwind(AssertUnwindSafe(first));
        let caught = self.work(job);
        self.lock().job = None;
        for _ in 0..SPINS_AT_END {
            if self.inside.load(Ordering::Acquire) == 0 {
                break;
            }
            hint::spin_loop();
        }
        let mut state = self.lock();
        if self.inside.load(Ordering::Acquire) > 0 {
            // Who leaves after this sees it.
            self.waited_for.store(true, Ordering::SeqCst);
            while self.inside.load(Ordering::SeqCst) > 0 {
                state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            self.waited_for.store(false, Ordering::SeqCst);
        }
        let panic = state.panic.take().or(caught);
        drop(state);
        match (done, panic) {
            (Ok(done), None) => done,
            (Err(panic), _) | (_, Some(panic)) => resume_unwind(panic),
        }
    }

    /// Wakes so many helpers, but not the one that would take this thread's core from it.
    fn wake(&self, n: usize) {
        let here = cores::current();
        let elsewhere = self.helpers.iter().filter(|helper| helper.core.is_none() || helper.core != here);
        let asleep = elsewhere.filter(|helper| helper.asleep.swap(false, Ordering::SeqCst));
        asleep.take(n).filter_map(|helper| helper.thread.get()).for_each(Thread::unpark);
    }

    /// Takes tasks until there are none; gives what one of them panicked with.
    fn work(&self, job: Job) -> Option<Box<dyn Any + Send>> {
        // Unwind safe: whoever sees what a task left half done is told by the panic that goes on in the caller.
        catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.n_tasks {
                    return;
                }
                (job.task)(task);
            }
        }))
        .err()
    }

    fn serve(&self, helper: &Helper) {
        if let Some(core) = helper.core {
            cores::pin(core);
        }
        helper.thread.get_or_init(thread::current);
        let mut seen = 0;
        loop {
            // It may have been seen before it was published.
            let called = || self.published.load(Ordering::SeqCst) > seen;
            let mut spins = 0;
            while !called()
                && (spins < self.spins
                    || spins < SPINS_BETWEEN && self.stay_awake.load(Ordering::Relaxed) > 0)
            {
                hint::spin_loop();
                spins += 1;
            }
            while !called() {
                helper.asleep.store(true, Ordering::SeqCst);
                // Who calls after this sees the helper asleep.
                if !called() {
                    thread::park();
                }
                helper.asleep.store(false, Ordering::SeqCst);
            }
            let state = self.lock();
            if state.stop {
                return;
            }
            seen = state.n_jobs;
            let Some(job) = state.job else { continue };
            // Under the lock, as is the end of the job: nobody enters after its caller has looked.
            self.inside.fetch_add(1, Ordering::Relaxed);
            drop(state);
            if let Some(panic) = self.work(job) {
                self.lock().panic.get_or_insert(panic);
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
            if self.waited_for.load(Ordering::SeqCst) {
                // The caller looks with the lock: it is asleep, or has seen that this one left.
                drop(self.lock());
                self.left.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests;
