use super::*;

fn threads(n: usize, spins: u32) -> Threads {
    Threads::start(NonZeroUsize::new(n).unwrap(), spins).unwrap()
}

#[test]
fn every_task_is_run_once() {
    for (n, spins) in [(1, 0), (2, 0), (4, 0), (4, 1_000)] {
        threads(n, spins).install(|| {
            assert_eq!(count(), n);
            for n_tasks in [0, 1, 2, 7, 1_000] {
                for _ in 0..50 {
                    let runs: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                    run(n_tasks, &|at| {
                        runs[at].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
                }
            }
        });
        assert_eq!(count(), 1, "nothing is installed any more");
    }
}

#[test]
fn results_keep_their_order_and_a_task_may_have_tasks() {
    let squares = threads(3, 0).install(|| map(100, |at| map(at + 1, |inner| inner * at)[at]));
    assert_eq!(squares, (0..100).map(|at| at * at).collect::<Vec<_>>());
}

#[test]
fn callers_at_once_do_not_mix_their_jobs() {
    let threads = threads(2, 0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let squares = threads.install(|| map(50, |at| at * at));
                    assert_eq!(squares, (0..50).map(|at| at * at).collect::<Vec<_>>());
                }
            });
        }
    });
}

#[test]
fn the_caller_may_do_something_else_first() {
    for threads in [threads(1, 0), threads(3, 0)] {
        threads.install(|| {
            for n_tasks in [0, 1, 100] {
                let runs = AtomicUsize::new(0);
                let count = |_| {
                    runs.fetch_add(1, Ordering::Relaxed);
                };
                let squares = run_beside(n_tasks, &count, || map(20, |at| at * at));
                assert_eq!(squares, (0..20).map(|at| at * at).collect::<Vec<_>>());
                assert_eq!(runs.into_inner(), n_tasks);
            }
        });
    }
    // Another one has begun meanwhile.
    let begun = AtomicBool::new(false);
    let begin = |_| begun.store(true, Ordering::SeqCst);
    let wait = || {
        while !begun.load(Ordering::SeqCst) {
            hint::spin_loop();
        }
    };
    threads(2, 0).install(|| run_beside(1, &begin, wait));
}

#[test]
fn jobs_in_a_row_are_all_computed() {
    for threads in [threads(1, 0), threads(3, 0)] {
        threads.install(|| {
            for n_jobs in [0, 1, 50] {
                let _awake = stay_awake();
                for _ in 0..n_jobs {
                    let inner = stay_awake();
                    let squares = map(20, |at| at * at);
                    assert_eq!(squares, (0..20).map(|at| at * at).collect::<Vec<_>>());
                    // While the next one has begun.
                    run_beside(20, &|_| (), || drop(inner));
                }
            }
        });
        assert_eq!(threads.shared.stay_awake.load(Ordering::Relaxed), 0);
    }
    // Nobody is kept where nothing is installed.
    drop(stay_awake());
}

#[test]
fn a_panic_reaches_the_caller_and_the_threads_live_on() {
    let threads = threads(3, 0);
    for bad in [0, 50, 99] {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            threads.install(|| run(100, &|at| assert_ne!(at, bad, "on purpose")));
        }));
        assert!(outcome.is_err());
        let first = || panic!("on purpose");
        let outcome = catch_unwind(AssertUnwindSafe(|| threads.install(|| run_beside(100, &|_| (), first))));
        assert!(outcome.is_err());
        assert_eq!(count(), 1, "what was current is put back");
        let sum: usize = threads.install(|| map(100, |at| at)).into_iter().sum();
        assert_eq!(sum, 4950);
    }
}
