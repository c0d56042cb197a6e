//! What wins on one machine and loses on another, tried at the start of a process: how many threads compute a short step,
//! whether they spin between two steps, whether weights lie in huge pages. Each is tried with the kernel that decoding
//! spends its time in, and takes some ten milliseconds.

use std::{num::NonZeroUsize, time::Duration};

use crate::{
    Bits, Error, Weights,
    checkpoint::memory::Memory,
    kernels::{Factors, Product, packed, products, threads::Threads},
};

/// How a process computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// With the caller's own.
    pub threads: NonZeroUsize,
    /// Turns of its loop that a thread without work looks for the next step before it sleeps.
    pub spins: u32,
    /// Quantized weights are for huge pages instead of mapped files.
    pub huge_pages: bool,
}

/// What need not be tried because somebody wants it so.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    pub threads: Option<NonZeroUsize>,
    pub spin: Option<bool>,
    pub huge_pages: Option<bool>,
}

impl Wanted {
    /// For `weights`: those that are stored are mapped, and there is nothing to try.
    #[must_use]
    pub fn with_weights(self, weights: Weights) -> Self {
        match weights.of_experts() {
            None => Self { huge_pages: Some(false), ..self },
            Some(_) => self,
        }
    }
}

/// Some 50 µs: waking a thread costs less than that, and a step's next job comes sooner.
const SPINS: u32 = 2_000;

/// A matrix beyond what caches hold of it, for the pages it lies in.
const PAGES_BYTES: usize = 128 << 20;

/// A matrix as one step multiplies it, for the threads: some 200 µs of one core.
const STEP_BYTES: usize = 1 << 22;
/// Steps of one try.
const STEPS: usize = 20;
/// Tries; the best one counts.
const TRIES: usize = 4;

/// What is not the simplest choice must be better by this much.
const BETTER: f64 = 0.97;
/// And fewer threads than cores by this: what else the machine does while it is tried looks as if they were better.
const FEWER_BETTER: f64 = 0.85;

const WIDTH: usize = 2048;

/// Two of it are a scale of 0.01: with ones the sums would be subnormal, which are slow.
pub(crate) const FILL: u8 = 0x3c;

/// A packed matrix and one row.
struct Probe {
    bytes: Memory,
    outputs: usize,
    quantized: packed::Rows,
}

impl Probe {
    fn new(n_bytes: usize, huge: bool) -> Result<Self, Error> {
        let outputs = n_bytes / Bits::Eight.panel_bytes(WIDTH) * packed::OUTPUTS;
        let mut bytes = Memory::new(Bits::Eight.matrix_bytes(outputs, WIDTH), huge)
            .map_err(|error| Error::new(format!("no memory for the start-up test: {error}")))?;
        bytes.fill(FILL);
        Ok(Self { bytes, outputs, quantized: packed::Rows::quantize(&[1.0; WIDTH], WIDTH) })
    }

    fn run(&self) {
        let factors = Factors::Packed(&self.quantized, Bits::Eight, &self.bytes);
        products(&[Product { width: WIDTH, outputs: self.outputs, factors }]);
    }
}

impl Tuning {
    /// The best of what is not `wanted` otherwise on a machine of `cores`. `elapsed` is the time since whenever.
    pub fn find(wanted: Wanted, cores: NonZeroUsize, elapsed: &dyn Fn() -> Duration) -> Result<Self, Error> {
        let threads = wanted.threads.map_or_else(|| candidates(cores), |threads| vec![threads]);
        let spins = wanted.spin.map_or_else(|| vec![0, SPINS], |spin| vec![if spin { SPINS } else { 0 }]);
        // Until they are tried, which takes threads.
        let huge_pages = wanted.huge_pages == Some(true);
        let mut found = Self { threads: threads[0], spins: spins[0], huge_pages };
        if threads.len() > 1 || threads[0].get() > 1 && spins.len() > 1 {
            let probe = Probe::new(STEP_BYTES, false)?;
            let mut shortest = Duration::MAX;
            for &threads in &threads {
                for &spins in &spins {
                    let time = Threads::start(threads, spins)?
                        .install(|| best(elapsed, || (0..STEPS).for_each(|_| probe.run())));
                    let better = if threads < cores { FEWER_BETTER } else { BETTER };
                    if shortest == Duration::MAX || time < shortest.mul_f64(better) {
                        shortest = time;
                        found = Self { threads, spins, huge_pages };
                    }
                }
            }
        }
        if wanted.huge_pages.is_none() {
            let [small, huge]: [Result<Duration, Error>; 2] = [false, true].map(|huge| {
                // One after the other: they are large.
                let probe = Probe::new(PAGES_BYTES, huge)?;
                Ok(best(elapsed, || probe.run()))
            });
            found.huge_pages = huge? < small?.mul_f64(BETTER);
        }
        Ok(found)
    }

    /// The threads to compute with.
    pub fn start(&self) -> Result<Threads, Error> {
        Threads::start(self.threads, self.spins)
    }
}

/// All cores, and half of them: hyperthreads share what a core computes with, and memory is often used up by half.
fn candidates(cores: NonZeroUsize) -> Vec<NonZeroUsize> {
    let half = NonZeroUsize::new(cores.get() / 2);
    [Some(cores), half].into_iter().flatten().collect()
}

fn best(elapsed: &dyn Fn() -> Duration, run: impl Fn()) -> Duration {
    let time = |_| {
        let before = elapsed();
        run();
        elapsed().saturating_sub(before)
    };
    (0..TRIES).map(time).fold(Duration::MAX, Duration::min)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_wanted_is_found() {
        let clock = Cell::new(0);
        let elapsed = || {
            clock.set(clock.get() + 1);
            Duration::from_millis(clock.get())
        };
        let find = |wanted| Tuning::find(wanted, NonZeroUsize::new(4).unwrap(), &elapsed).unwrap();
        let one = NonZeroUsize::MIN;
        let wanted = Wanted { threads: Some(one), spin: Some(true), huge_pages: Some(true) };
        assert_eq!(find(wanted), Tuning { threads: one, spins: SPINS, huge_pages: true });
        assert_eq!(clock.get(), 0, "nothing is tried");
        // All take the same time: the simplest is taken.
        let simplest = Tuning { threads: NonZeroUsize::new(4).unwrap(), spins: 0, huge_pages: false };
        assert_eq!(find(Wanted::default()), simplest);
    }
}
