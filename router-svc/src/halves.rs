//! Whether a step is faster in two half-batches: tried, by steps of about the same size, and what was faster is done until the
//! next trial. Halves let this router attend while experts work elsewhere, and read every expert that both choose twice: what
//! that comes to depends on the network, on the machines and on the rows. Pure.

use std::time::Duration;

use crate::args::HalfBatches;

/// Fewer rows are not worth it anywhere: they read weights, and two halves read most of them twice.
const ROWS_MIN: usize = 8;
/// Steps of either kind in a trial, by turns: what is slowly different, such as the context's length, is so for both.
const TRIALS: usize = 4;
/// A trial is won by so much, or nothing changes.
const GAIN_MIN: f32 = 0.03;
/// Steps until the next trial; twice as many each time that it ended like the last one.
const STEPS_FIRST: u32 = 32;
const STEPS_MAX: u32 = 2048;

#[derive(Debug)]
pub(crate) struct Halves {
    policy: HalfBatches,
    /// By powers of two of a step's rows.
    classes: Vec<Class>,
}

#[derive(Clone, Debug)]
struct Class {
    in_halves: bool,
    /// Steps until the next trial.
    left: u32,
    /// What `left` was at first.
    pause: u32,
    /// Microseconds a row of each step of the trial, whole and in halves.
    trial: [Vec<f32>; 2],
}

impl Default for Class {
    fn default() -> Self {
        Self { in_halves: false, left: 0, pause: STEPS_FIRST, trial: [Vec::new(), Vec::new()] }
    }
}

impl Halves {
    pub(crate) const fn new(policy: HalfBatches) -> Self {
        Self { policy, classes: Vec::new() }
    }

    /// How to compute a step. `elsewhere`: some experts are on another host.
    pub(crate) fn choose(&mut self, n_rows: usize, elsewhere: bool) -> bool {
        match self.policy {
            HalfBatches::Always => n_rows >= 2,
            HalfBatches::Never => false,
            HalfBatches::Measured => n_rows >= ROWS_MIN && elsewhere && self.class(n_rows).next(),
        }
    }

    /// How long a step took that was computed as chosen, in which nothing went wrong.
    pub(crate) fn note(&mut self, n_rows: usize, in_halves: bool, took: Duration) {
        if self.policy == HalfBatches::Measured && n_rows >= ROWS_MIN {
            self.class(n_rows).note(in_halves, took.as_secs_f32() * 1e6 / n_rows as f32);
        }
    }

    fn class(&mut self, n_rows: usize) -> &mut Class {
        let class = n_rows.ilog2() as usize;
        if self.classes.len() <= class {
            self.classes.resize(class + 1, Class::default());
        }
        &mut self.classes[class]
    }
}

impl Class {
    fn next(&self) -> bool {
        if self.left > 0 { self.in_halves } else { self.trial[1].len() < self.trial[0].len() }
    }

    fn note(&mut self, in_halves: bool, micros_a_row: f32) {
        if self.left > 0 {
            self.left -= 1;
            return;
        }
        self.trial[usize::from(in_halves)].push(micros_a_row);
        if self.trial.iter().any(|steps| steps.len() < TRIALS) {
            return;
        }
        let [whole, halves] = std::mem::take(&mut self.trial).map(median);
        let (now, other) = if self.in_halves { (halves, whole) } else { (whole, halves) };
        if other < now * (1.0 - GAIN_MIN) {
            self.in_halves = !self.in_halves;
            self.pause = STEPS_FIRST;
        } else {
            self.pause = (self.pause * 2).min(STEPS_MAX);
        }
        self.left = self.pause;
    }
}

/// The upper one of two in the middle.
fn median(mut steps: Vec<f32>) -> f32 {
    steps.sort_unstable_by(f32::total_cmp);
    steps[steps.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many of `n` steps were computed in halves, each of which takes `whole` or `halved` microseconds.
    fn halved_of(halves: &mut Halves, n: usize, whole: u64, halved: u64) -> usize {
        let step = |_| {
            let in_halves = halves.choose(512, true);
            halves.note(512, in_halves, Duration::from_micros(if in_halves { halved } else { whole }));
            in_halves
        };
        (0..n).map(step).filter(|&in_halves| in_halves).count()
    }

    #[test]
    fn what_measures_faster_is_done_and_looked_at_again() {
        let mut halves = Halves::new(HalfBatches::Measured);
        let trial = 2 * TRIALS;
        assert_eq!(halved_of(&mut halves, trial, 1000, 700), TRIALS, "by turns");
        assert_eq!(halved_of(&mut halves, STEPS_FIRST as usize, 1000, 700), STEPS_FIRST as usize);
        // The experts came nearer.
        assert_eq!(halved_of(&mut halves, trial, 1000, 1300), TRIALS);
        assert_eq!(halved_of(&mut halves, STEPS_FIRST as usize, 1000, 1300), 0);
        // What stays as it is is tried ever more seldom, but tried.
        let n_halved = halved_of(&mut halves, 20_000, 1000, 1300);
        assert!((TRIALS..100).contains(&n_halved), "{n_halved}");
        // Too little to change anything for.
        assert_eq!(halved_of(&mut Halves::new(HalfBatches::Measured), 1000, 1000, 980), 5 * TRIALS);
    }

    #[test]
    fn sizes_are_apart_and_what_is_never_worth_it_is_not_tried() {
        let mut halves = Halves::new(HalfBatches::Measured);
        halved_of(&mut halves, 2 * TRIALS, 1000, 700);
        assert!(halves.choose(512, true));
        assert!(!halves.choose(512, false), "everything is on this host");
        assert!(!halves.choose(64, true), "its own trial begins whole");
        halves.note(64, false, Duration::from_micros(10));
        assert!(halves.choose(64, true));
        halves.note(ROWS_MIN - 1, false, Duration::from_micros(10));
        assert!(!halves.choose(ROWS_MIN - 1, true));
        assert!(Halves::new(HalfBatches::Always).choose(2, false));
        assert!(!Halves::new(HalfBatches::Always).choose(1, false));
        assert!(!Halves::new(HalfBatches::Never).choose(512, true));
    }
}
