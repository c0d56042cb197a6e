//! Whether a step is faster in two half-batches: tried, by steps of the same kind and about the same size, and what was faster is
//! done until the next trial. Halves let this router attend while experts work elsewhere, and read every expert that both choose
//! twice: what that comes to depends on the network, on the machines and on the rows. Pure.

use std::time::Duration;

use crate::args::HalfBatches;

/// Fewer rows are not worth it anywhere: they read weights, and two halves read most of them twice.
const ROWS_MIN: usize = 8;
/// The steps of a trial: what is slowly different, such as the context's length, and what every other one has, such as the second
/// chunk of a prompt, is so for both kinds.
const TRIAL: [bool; 8] = [false, true, true, false, true, false, false, true];
/// A trial is won by so much, or nothing changes.
const GAIN_MIN: f32 = 0.03;
/// Steps until the next trial; twice as many each time that nothing changed.
const STEPS_FIRST: u32 = 32;
const STEPS_MAX: u32 = 256;

#[derive(Debug)]
pub(crate) struct Halves {
    policy: HalfBatches,
    /// By powers of two of a step's rows; of steps that decode alone, and of those with a prompt.
    classes: [Vec<Class>; 2],
}

/// How a step is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) in_halves: bool,
    n_rows: usize,
    with_prompt: bool,
    /// It was chosen by what is measured.
    counts: bool,
}

#[derive(Clone, Debug)]
struct Class {
    in_halves: bool,
    /// Steps until the next trial.
    left: u32,
    /// What `left` was at first.
    pause: u32,
    /// Microseconds a row of the trial's steps so far.
    trial: Vec<f32>,
}

impl Default for Class {
    fn default() -> Self {
        Self { in_halves: false, left: 0, pause: STEPS_FIRST, trial: Vec::new() }
    }
}

impl Halves {
    pub(crate) fn new(policy: HalfBatches) -> Self {
        Self { policy, classes: Default::default() }
    }

    /// How to compute a step. `elsewhere`: some server may be on another host.
    pub(crate) fn choose(&mut self, n_rows: usize, with_prompt: bool, elsewhere: bool) -> Choice {
        let counts = self.policy == HalfBatches::Measured && n_rows >= ROWS_MIN && elsewhere;
        let in_halves = match self.policy {
            HalfBatches::Always => n_rows >= 2,
            HalfBatches::Never => false,
            HalfBatches::Measured => counts && self.class(n_rows, with_prompt).next(),
        };
        Choice { in_halves, n_rows, with_prompt, counts }
    }

    /// How long a step took that was computed as chosen, and all of whose rows came home.
    pub(crate) fn note(&mut self, choice: Choice, took: Duration) {
        if choice.counts {
            let micros_a_row = took.as_secs_f32() * 1e6 / choice.n_rows as f32;
            self.class(choice.n_rows, choice.with_prompt).note(micros_a_row);
        }
    }

    fn class(&mut self, n_rows: usize, with_prompt: bool) -> &mut Class {
        let (class, classes) = (n_rows.ilog2() as usize, &mut self.classes[usize::from(with_prompt)]);
        if classes.len() <= class {
            classes.resize(class + 1, Class::default());
        }
        &mut classes[class]
    }
}

impl Class {
    fn next(&self) -> bool {
        if self.left > 0 { self.in_halves } else { TRIAL[self.trial.len()] }
    }

    fn note(&mut self, micros_a_row: f32) {
        if self.left > 0 {
            self.left -= 1;
            return;
        }
        self.trial.push(micros_a_row);
        if self.trial.len() < TRIAL.len() {
            return;
        }
        let of = |in_halves| {
            let steps = self.trial.iter().zip(TRIAL);
            median(steps.filter(|(_, halved)| *halved == in_halves).map(|(micros, _)| *micros).collect())
        };
        if of(!self.in_halves) < of(self.in_halves) * (1.0 - GAIN_MIN) {
            self.in_halves = !self.in_halves;
            self.pause = STEPS_FIRST;
        } else {
            self.pause = (self.pause * 2).min(STEPS_MAX);
        }
        self.trial.clear();
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

    const HALVED: usize = TRIAL.len() / 2;

    fn measured() -> Halves {
        Halves::new(HalfBatches::Measured)
    }

    /// So many of `n` steps were computed in halves; the `at`th takes `micros(at, in_halves)` microseconds a row.
    fn halved_of(halves: &mut Halves, n: usize, micros: impl Fn(usize, bool) -> u64) -> usize {
        let step = |at: &usize| {
            let choice = halves.choose(512, true, true);
            halves.note(choice, Duration::from_micros(512 * micros(*at, choice.in_halves)));
            choice.in_halves
        };
        (0..n).filter(step).count()
    }

    #[test]
    fn what_measures_faster_is_done_and_looked_at_again() {
        let faster = |_, in_halves| if in_halves { 700 } else { 1000 };
        let slower = |_, in_halves| if in_halves { 1300 } else { 1000 };
        let (mut halves, pause) = (measured(), STEPS_FIRST as usize);
        assert_eq!(halved_of(&mut halves, TRIAL.len(), faster), HALVED);
        assert_eq!(halved_of(&mut halves, pause, faster), pause);
        // The experts came nearer.
        assert_eq!(halved_of(&mut halves, TRIAL.len(), slower), HALVED);
        assert_eq!(halved_of(&mut halves, pause, slower), 0);
        // What stays as it is is tried more seldom, but tried.
        let n_halved = halved_of(&mut halves, 20_000, slower);
        assert!((70 * HALVED..90 * HALVED).contains(&n_halved), "{n_halved}");
    }

    #[test]
    fn a_trial_is_not_won_by_its_order() {
        // Too little to change anything for; ever longer contexts; prompts of two and of three chunks.
        let cases: [fn(usize, bool) -> u64; 4] = [
            |_, in_halves| if in_halves { 980 } else { 1000 },
            |at, _| 1000 + 10 * at as u64,
            |at, _| 1000 + 100 * (at % 2) as u64,
            |at, _| 1000 + 100 * (at % 3) as u64,
        ];
        for (case, micros) in cases.into_iter().enumerate() {
            let mut halves = measured();
            halved_of(&mut halves, TRIAL.len(), micros);
            assert_eq!(halved_of(&mut halves, STEPS_FIRST as usize, micros), 0, "case {case}");
        }
    }

    #[test]
    fn kinds_and_sizes_are_apart_and_what_is_never_worth_it_is_not_tried() {
        let micros = Duration::from_micros;
        let mut halves = measured();
        halved_of(&mut halves, TRIAL.len(), |_, in_halves| if in_halves { 700 } else { 1000 });
        assert!(halves.choose(512, true, true).in_halves);
        assert!(!halves.choose(512, false, true).in_halves, "its own trial begins whole");
        assert!(!halves.choose(64, true, true).in_halves, "and this one's");
        // On one host nothing is measured: what comes elsewhere later is tried as if it were new.
        for _ in 0..100 {
            let choice = halves.choose(64, true, false);
            assert!(!choice.in_halves);
            halves.note(choice, micros(1));
        }
        for in_halves in TRIAL {
            let choice = halves.choose(64, true, true);
            assert_eq!(choice.in_halves, in_halves);
            halves.note(choice, micros(if in_halves { 700 } else { 1000 }));
        }
        assert!(halves.choose(64, true, true).in_halves);
        for _ in 0..100 {
            let choice = halves.choose(ROWS_MIN - 1, false, true);
            assert!(!choice.in_halves);
            halves.note(choice, micros(10));
        }
        assert!(Halves::new(HalfBatches::Always).choose(2, false, false).in_halves);
        assert!(!Halves::new(HalfBatches::Always).choose(1, false, false).in_halves);
        assert!(!Halves::new(HalfBatches::Never).choose(512, true, true).in_halves);
    }
}
