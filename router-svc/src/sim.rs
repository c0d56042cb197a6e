//! Dispatch, failover and placement in a simulated world: virtual time, seeded faults, no sockets, no threads. The
//! router's part is the real one (`dispatch`, `flight`, `combine`, `cluster::{Health, Members, placement}`); servers,
//! network and registry are models that crash, freeze, lose, delay, double, reorder and lie.
//!
//! A failing seed is printed; `SHOAL_SIM_SEED=17 cargo test --release -p router-svc sim -- --nocapture` replays it with
//! its history, and `SHOAL_SIM_SEEDS=10000` runs so many.

mod faults;
mod registry;
mod router;
mod server;
mod world;

use std::time::Duration;

use world::World;

/// Faults happen for so long (virtual), then everything is mended.
const FAULTS: Duration = Duration::from_millis(1500);
/// From the mending on: what must work works by then, and stays so until the end.
const MENDED: Duration = Duration::from_millis(8000);
const END: Duration = Duration::from_millis(9000);

#[expect(clippy::disallowed_methods, reason = "the seeds of a test run are not a program's configuration")]
fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one world; gives its violations, the hash of its history, and how many faults it saw.
fn run(seed: u64, tell: bool) -> (Vec<String>, u64, usize) {
    let mut world = World::new(seed, tell);
    world.run();
    world.verdict()
}

#[test]
fn no_seed_violates_an_invariant() {
    if let Some(seed) = variable("SHOAL_SIM_SEED") {
        let (violations, hash, n_faults) = run(seed, true);
        println!("seed {seed}: {n_faults} faults, history {hash:016x}");
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
        return;
    }
    let n_seeds = variable("SHOAL_SIM_SEEDS").unwrap_or(500);
    let mut n_faults_all = 0;
    for seed in 0..n_seeds {
        let (violations, _, n_faults) = run(seed, false);
        n_faults_all += n_faults;
        assert!(
            violations.is_empty(),
            "replay with SHOAL_SIM_SEED={seed}: {} violations, the first: {}",
            violations.len(),
            violations[0]
        );
    }
    println!("{n_seeds} seeds, {n_faults_all} faults");
    assert!(n_faults_all as u64 > 10 * n_seeds, "{n_faults_all} faults are too few to mean anything");
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..10 {
        assert_eq!(run(seed, false), run(seed, false), "seed {seed}");
    }
    assert_ne!(run(1, false).1, run(2, false).1);
}
