//! How long frames take, by their size: the last observations of each power of two of (row, expert) pairs.

use std::{collections::VecDeque, time::Duration};

/// Observations kept for a size.
const KEPT: usize = 128;
/// Fewer say nothing about a percentile.
const NEEDED: usize = 20;
/// The sorted view is made again after so many new observations.
const REFRESH: usize = 16;
/// Sizes up to 2^31 pairs.
const SIZES: usize = 32;

#[derive(Debug)]
pub(super) struct Latencies {
    sizes: [Size; SIZES],
}

#[derive(Debug, Default)]
struct Size {
    recent: VecDeque<Duration>,
    n_since_sorted: usize,
    p50: Duration,
    p95: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        Self { sizes: std::array::from_fn(|_| Size::default()) }
    }
}

impl Latencies {
    pub(super) fn add(&mut self, n_pairs: usize, took: Duration) {
        let size = &mut self.sizes[size_of(n_pairs)];
        if size.recent.len() == KEPT {
            size.recent.pop_front();
        }
        size.recent.push_back(took);
        size.n_since_sorted += 1;
        if size.n_since_sorted >= REFRESH || size.recent.len() == NEEDED {
            size.n_since_sorted = 0;
            let mut sorted: Vec<Duration> = size.recent.iter().copied().collect();
            sorted.sort_unstable();
            size.p50 = sorted[sorted.len() / 2];
            size.p95 = sorted[sorted.len() * 95 / 100];
        }
    }

    /// The median for such frames; of a size never seen, from the nearest: a larger one as it is, a smaller one scaled.
    pub(super) fn usual(&self, n_pairs: usize) -> Option<Duration> {
        self.nearest(n_pairs, |size| size.p50)
    }

    pub(super) fn p95(&self, n_pairs: usize) -> Option<Duration> {
        self.nearest(n_pairs, |size| size.p95)
    }

    fn nearest(&self, n_pairs: usize, percentile: impl Fn(&Size) -> Duration) -> Option<Duration> {
        let wanted = size_of(n_pairs);
        let known = |size: &Size| size.recent.len() >= NEEDED;
        let exact_or_smaller = (0..=wanted).rev().find(|&at| known(&self.sizes[at]));
        let scaled = |at: usize| percentile(&self.sizes[at]) * (1_u32 << (wanted - at).min(16));
        let larger =
            || (wanted..SIZES).find(|&at| known(&self.sizes[at])).map(|at| percentile(&self.sizes[at]));
        exact_or_smaller.map(scaled).or_else(larger)
    }
}

fn size_of(n_pairs: usize) -> usize {
    (n_pairs.max(1).ilog2() as usize).min(SIZES - 1)
}
