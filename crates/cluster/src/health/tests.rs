use super::*;

struct Bench {
    health: Health,
    now: Instant,
    next: u64,
}

#[expect(clippy::disallowed_methods, reason = "any instant will do")]
fn start() -> Instant {
    Instant::now()
}

fn id(name: &str) -> InstanceId {
    name.into()
}

impl Bench {
    fn new(names: &[&str]) -> Self {
        let mut health = Health::new(Limits::default());
        let now = start();
        names.iter().for_each(|name| health.join(&id(name), now));
        Self { health, now, next: 0 }
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn send(&mut self, name: &str) -> FrameId {
        self.next += 1;
        self.health.sent(&id(name), FrameId(self.next), 8, self.now);
        FrameId(self.next)
    }

    /// So many frames of one millisecond each.
    fn work(&mut self, name: &str, n: usize) {
        for _ in 0..n {
            let frame = self.send(name);
            self.wait(1);
            self.health.answered(&id(name), frame, self.now);
        }
    }
}

#[test]
fn a_frame_is_hedged_past_the_p95_of_its_size() {
    let mut bench = Bench::new(&["a"]);
    assert_eq!(bench.health.hedge_after(8), None);
    bench.work("a", 10);
    assert_eq!(bench.health.hedge_after(8), None, "ten are too few");
    bench.work("a", 90);
    assert_eq!(bench.health.hedge_after(8), Some(Duration::from_millis(2)), "the floor");
    for _ in 0..10 {
        let slow = bench.send("a");
        bench.wait(30);
        bench.health.answered(&id("a"), slow, bench.now);
    }
    bench.work("a", 16);
    assert_eq!(bench.health.hedge_after(8), Some(Duration::from_millis(30)));
    assert_eq!(bench.health.hedge_after(32), Some(Duration::from_millis(120)), "a size never seen is scaled");
}

#[test]
fn a_silent_server_is_ejected_and_a_probe_brings_it_back() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.work("a", 40);
    let owed = bench.send("a");
    assert!(bench.health.tick(bench.now).is_empty());
    bench.wait(249);
    assert!(bench.health.tick(bench.now).is_empty());
    bench.wait(1);
    assert_eq!(bench.health.next_tick(), Some(bench.now));
    assert_eq!(bench.health.tick(bench.now), [id("a")]);
    assert!(!bench.health.is_in(&id("a")) && bench.health.probes_due(bench.now).is_empty());
    // A late answer does not bring it back.
    bench.wait(500);
    bench.health.answered(&id("a"), owed, bench.now);
    assert!(!bench.health.is_in(&id("a")));
    bench.wait(500);
    assert_eq!(bench.health.probes_due(bench.now), [id("a")]);
    let probe = bench.send("a");
    bench.health.probe(&id("a"), probe);
    assert!(bench.health.probes_due(bench.now).is_empty() && !bench.health.is_in(&id("a")));
    // The probe is not answered either: twice as long.
    bench.wait(250);
    assert_eq!(bench.health.tick(bench.now), [id("a")]);
    bench.wait(1999);
    assert!(bench.health.probes_due(bench.now).is_empty());
    bench.wait(1);
    let probe = bench.send("a");
    bench.health.probe(&id("a"), probe);
    bench.health.answered(&id("a"), probe, bench.now);
    assert!(bench.health.is_in(&id("a")));
    assert_eq!(bench.health.n_ejections(), 2);
}

#[test]
fn a_server_that_says_nothing_for_three_seconds_is_mute_once() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.work("a", 40);
    bench.send("a");
    bench.wait(2999);
    bench.health.tick(bench.now);
    assert!(!bench.health.is_in(&id("a")) && bench.health.mute(bench.now).is_empty());
    bench.wait(1);
    assert_eq!(bench.health.next_tick(), Some(bench.now));
    assert_eq!(bench.health.mute(bench.now), [id("a")]);
    assert!(bench.health.mute(bench.now).is_empty(), "it was said");
    // Whatever it says, it is heard; what owes nothing may say nothing.
    bench.wait(2999);
    bench.health.heard(&id("a"), bench.now);
    bench.wait(2999);
    assert!(bench.health.mute(bench.now).is_empty());
    bench.health.leave(&id("a"));
    bench.health.join(&id("a"), bench.now);
    bench.wait(60_000);
    assert!(bench.health.mute(bench.now).is_empty());
}

#[test]
fn a_server_that_hangs_is_given_more_time_and_comes_back_by_a_probe() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.work("a", 40);
    for seconds in [3, 6, 12, 24, 30, 30] {
        bench.send("a");
        bench.wait(seconds * 1000 - 1);
        assert!(bench.health.mute(bench.now).is_empty(), "{seconds}");
        bench.wait(1);
        assert_eq!(bench.health.mute(bench.now), [id("a")], "{seconds}");
        bench.health.leave(&id("a"));
        bench.health.join(&id("a"), bench.now);
        assert_eq!(bench.health.is_in(&id("a")), seconds == 3, "once it may have been the way");
    }
    bench.wait(30_000);
    assert_eq!(bench.health.probes_due(bench.now), [id("a")]);
    let probe = bench.send("a");
    bench.health.probe(&id("a"), probe);
    bench.health.answered(&id("a"), probe, bench.now);
    bench.send("a");
    bench.wait(3000);
    assert!(bench.health.is_in(&id("a")) && bench.health.mute(bench.now) == [id("a")], "from the start");
}

#[test]
fn what_was_heard_before_or_not_listened_to_makes_nobody_mute() {
    let mut bench = Bench::new(&["a"]);
    bench.work("a", 40);
    let early = bench.now;
    bench.wait(3000);
    bench.send("a");
    bench.health.heard(&id("a"), early);
    assert!(bench.health.mute(bench.now).is_empty());
    bench.wait(5000);
    bench.health.was_deaf(Duration::from_secs(5));
    assert!(bench.health.mute(bench.now).is_empty() && bench.health.tick(bench.now).is_empty());
}

#[test]
fn without_experience_the_frames_own_timeout_makes_a_server_mute() {
    let mut bench = Bench::new(&["a"]);
    bench.send("a");
    bench.wait(29_999);
    assert!(bench.health.mute(bench.now).is_empty());
    bench.wait(1);
    assert_eq!(bench.health.mute(bench.now), [id("a")]);
}

#[test]
fn a_server_that_nobody_can_stand_in_for_comes_back_by_its_work() {
    let mut bench = Bench::new(&["a"]);
    bench.work("a", 40);
    bench.send("a");
    bench.wait(250);
    assert_eq!(bench.health.tick(bench.now), [id("a")]);
    bench.work("a", 1);
    assert!(!bench.health.is_in(&id("a")), "its second is not over");
    bench.wait(1000);
    bench.work("a", 1);
    assert!(bench.health.is_in(&id("a")));
}

#[test]
fn failures_in_a_row_and_wrong_answers_eject() {
    let mut bench = Bench::new(&["a", "b", "c", "d"]);
    for failure in 1..=5 {
        let frame = bench.send("a");
        assert_eq!(bench.health.failed(&id("a"), frame, Failure::Transient, bench.now), failure == 5);
    }
    let frame = bench.send("b");
    assert!(!bench.health.failed(&id("b"), frame, Failure::Wrong, bench.now), "one of four is out already");
    bench.wait(1000);
    let probe = bench.send("a");
    bench.health.probe(&id("a"), probe);
    bench.health.answered(&id("a"), probe, bench.now);
    let frame = bench.send("b");
    assert!(bench.health.failed(&id("b"), frame, Failure::Wrong, bench.now));
}

#[test]
fn what_is_owed_makes_a_server_dear() {
    let mut bench = Bench::new(&["a", "b"]);
    bench.work("a", 40);
    bench.work("b", 40);
    let cost = |bench: &Bench, name: &str| bench.health.cost(&id(name), bench.now);
    assert!((cost(&bench, "a") - cost(&bench, "b")).abs() < 0.1);
    bench.send("a");
    assert!(cost(&bench, "a") > cost(&bench, "b") + 0.9);
    bench.wait(50);
    assert!(cost(&bench, "a") > 40.0);
}

#[test]
fn extra_frames_are_a_share_of_the_traffic() {
    let mut bench = Bench::new(&["a"]);
    let mut hedged = 0;
    for _ in 0..1000 {
        bench.work("a", 1);
        hedged += usize::from(bench.health.hedges.spend(1));
    }
    assert!((80..=89).contains(&hedged), "{hedged}");
    assert_eq!(bench.health.hedges.n_refused(), 1000 - hedged as u64);
}
