//! Logits → token: temperature, then top-k, top-p, min-p (the order of vLLM and transformers). Stateless: the random
//! number of a draw is a function of (seed, position), so that a replay of the same sequence on another router draws
//! the same tokens.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};

/// Most candidates whose log-probabilities a request may ask for.
pub(crate) const TOP_LOGPROBS_MAX: u32 = 20;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sampling {
    /// 0: the most likely token.
    pub(crate) temperature: f32,
    /// Keep the k most likely tokens; 0: all.
    pub(crate) top_k: usize,
    /// Keep the smallest set of most likely tokens with at least this probability together; 1: all.
    pub(crate) top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0: all.
    pub(crate) min_p: f32,
    pub(crate) seed: u64,
}

/// A drawn token with the log-probabilities of the model's own distribution (before temperature and filters).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Drawn {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
    /// The most likely tokens, best first.
    pub(crate) top: Vec<(u32, f32)>,
}

/// What to draw beside the distribution.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Draw<'a> {
    /// Position in the answer: each has its own random number.
    pub(crate) position: u64,
    /// Ids that must not be drawn, as if their logits were -inf.
    pub(crate) banned: &'a [u32],
    /// How many of the most likely tokens are reported.
    pub(crate) n_top: usize,
}

/// Draws a token from `logits` `[vocab]`.
pub(crate) fn sample(logits: &[f32], sampling: &Sampling, draw: Draw<'_>) -> Drawn {
    if draw.banned.is_empty() {
        return sample_allowed(logits, sampling, draw);
    }
    let mut allowed = logits.to_vec();
    for &id in draw.banned {
        if let Some(logit) = allowed.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    sample_allowed(&allowed, sampling, draw)
}

fn sample_allowed(logits: &[f32], sampling: &Sampling, Draw { position, n_top, .. }: Draw<'_>) -> Drawn {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let id = if sampling.temperature > 0.0 { draw(logits, max, sampling, position) } else { argmax(logits) };
    let total: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let logprob = |id: usize| (f64::from(logits[id] - max) - total.ln()) as f32;
    let top = most_likely(logits, n_top).into_iter().map(|id| (id as u32, logprob(id))).collect();
    Drawn { id: id as u32, logprob: logprob(id), top }
}

/// The lowest id among the largest logits.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best
}

/// The `n` largest logits' ids, largest first, lower ids first among equals.
fn most_likely(logits: &[f32], n: usize) -> Vec<usize> {
    let n = n.min(logits.len());
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if n == 0 {
        return Vec::new();
    }
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

fn draw(logits: &[f32], max: f32, sampling: &Sampling, position: u64) -> usize {
    let keep = if sampling.top_k == 0 { logits.len() } else { sampling.top_k };
    let mut candidates: Vec<(usize, f64)> = most_likely(logits, keep)
        .into_iter()
        .map(|id| (id, (f64::from(logits[id] - max) / f64::from(sampling.temperature)).exp()))
        .collect();
    if sampling.top_p < 1.0 {
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut mass = 0.0;
        let n_kept = candidates.iter().take_while(|(_, weight)| {
            let needed = mass < f64::from(sampling.top_p) * total;
            mass += weight;
            needed
        });
        let n_kept = n_kept.count().max(1);
        candidates.truncate(n_kept);
    }
    if sampling.min_p > 0.0 {
        // The best candidate's weight is 1 by construction.
        candidates.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
    }
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut left = uniform(sampling.seed, position) * total;
    for (id, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    // Rounding can leave a crumb past the last candidate.
    candidates.last().map_or(0, |(id, _)| *id)
}

/// A number in [0, 1) that depends on the seed and the position alone.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_word_pos(u128::from(position) * 2);
    (rng.next_u64() >> 11) as f64 * f64::exp2(-53.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 };

    fn at(logits: &[f32], sampling: &Sampling, position: u64) -> Drawn {
        sample(logits, sampling, Draw { position, ..Draw::default() })
    }

    #[test]
    fn banned_ids_are_not_drawn() {
        let draw = Draw { banned: &[1, 99], ..Draw::default() };
        assert_eq!(sample(&[0.0, 2.0, 1.0], &GREEDY, draw).id, 2);
    }

    fn seen(sampling: Sampling) -> Vec<u32> {
        let logits = [1.0, 4.0, 3.0, 2.0];
        let mut seen: Vec<u32> = (0..500).map(|position| at(&logits, &sampling, position).id).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn filters_keep_the_likeliest() {
        let warm = Sampling { temperature: 1.0, ..GREEDY };
        assert_eq!(seen(GREEDY), [1]);
        assert_eq!(seen(warm), [0, 1, 2, 3]);
        assert_eq!(seen(Sampling { top_k: 2, ..warm }), [1, 2]);
        // Probabilities 0.644, 0.237, 0.087, 0.032: two tokens reach 0.8.
        assert_eq!(seen(Sampling { top_p: 0.8, ..warm }), [1, 2]);
        assert_eq!(seen(Sampling { top_p: 0.0001, ..warm }), [1]);
        assert_eq!(seen(Sampling { min_p: 0.2, ..warm }), [1, 2]);
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let sampling = Sampling { temperature: 2.0, seed: 7, ..GREEDY };
        let logits: Vec<f32> = (0..64).map(|id| (id % 7) as f32).collect();
        let draws = |seed| -> Vec<u32> {
            (0..40).map(|position| at(&logits, &Sampling { seed, ..sampling }, position).id).collect()
        };
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let sampling = Sampling { temperature: 1.0, seed: 3, ..GREEDY };
        let logits = [0.0, f32::ln(3.0)];
        let ones = (0..20_000).filter(|&position| at(&logits, &sampling, position).id == 1).count();
        assert!((14_700..15_300).contains(&ones), "{ones} of 20000, 15000 expected");
    }

    #[test]
    fn logprobs_are_the_models_own() {
        let drawn = sample(
            &[0.0, 2.0, 1.0, 2.0],
            &Sampling { temperature: 0.5, top_k: 1, ..GREEDY },
            Draw { n_top: 3, ..Draw::default() },
        );
        assert_eq!(drawn.id, 1);
        assert_eq!(drawn.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2]);
        let expected = 2.0 - (0f64.exp() + 2.0 * 2f64.exp() + 1f64.exp()).ln();
        assert!((f64::from(drawn.logprob) - expected).abs() < 1e-6);
    }
}
