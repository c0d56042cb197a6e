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
    let max = model::largest(logits);
    let mut ranked = Ranked::new(logits);
    let id = if sampling.temperature > 0.0 {
        draw(&mut ranked, max, sampling, position)
    } else {
        // The lowest id among the largest logits.
        logits.iter().position(|logit| *logit == max).unwrap_or(0)
    };
    let total = model::sum_of_exp(logits, max, 1.0).ln();
    let logprob = |id: usize| (f64::from(logits[id] - max) - total) as f32;
    let top = ranked.first(n_top).iter().map(|&id| (id, logprob(id as usize))).collect();
    Drawn { id: id as u32, logprob: logprob(id), top }
}

/// Ids by their logits, largest first, lower ids first among equals. Ordered only as far as somebody looks: that is a small
/// part of a large vocabulary.
struct Ranked<'a> {
    logits: &'a [f32],
    /// None was looked at if empty.
    ids: Vec<u32>,
    n_ordered: usize,
}

impl<'a> Ranked<'a> {
    const ORDERED_AT_ONCE: usize = 64;

    const fn new(logits: &'a [f32]) -> Self {
        Self { logits, ids: Vec::new(), n_ordered: 0 }
    }

    /// The first `n`, or all if there are fewer.
    fn first(&mut self, n: usize) -> &[u32] {
        let n = n.min(self.logits.len());
        if n > self.n_ordered {
            if self.ids.is_empty() {
                self.ids = (0..self.logits.len() as u32).collect();
            }
            let order = |a: &u32, b: &u32| {
                let [of_a, of_b] = [a, b].map(|id| self.logits[*id as usize]);
                of_b.total_cmp(&of_a).then(a.cmp(b))
            };
            // More than were asked for: whoever goes from one to the next asks for few of them.
            let n_ordered = n.max(4 * self.n_ordered).max(Self::ORDERED_AT_ONCE).min(self.ids.len());
            let left = &mut self.ids[self.n_ordered..];
            let n_more = n_ordered - self.n_ordered;
            if n_more < left.len() {
                left.select_nth_unstable_by(n_more - 1, order);
            }
            left[..n_more].sort_unstable_by(order);
            self.n_ordered = n_ordered;
        }
        &self.ids[..n]
    }

    fn get(&mut self, at: usize) -> Option<usize> {
        self.first(at + 1).get(at).map(|&id| id as usize)
    }
}

/// Every filter keeps some of the first candidates.
fn draw(ranked: &mut Ranked<'_>, max: f32, sampling: &Sampling, position: u64) -> usize {
    let n_logits = ranked.logits.len();
    let temperature = f64::from(sampling.temperature);
    // The best candidate's is 1.
    let weight = |logits: &[f32], id: usize| (f64::from(logits[id] - max) / temperature).exp();
    let mut n_kept = if sampling.top_k == 0 { n_logits } else { sampling.top_k.min(n_logits) };
    let mut total = if n_kept == n_logits {
        // Of the smallest temperatures that there are, the reciprocal would be infinite.
        model::sum_of_exp(ranked.logits, max, sampling.temperature.recip().min(f32::MAX))
    } else {
        let logits = ranked.logits;
        ranked.first(n_kept).iter().map(|&id| weight(logits, id as usize)).sum()
    };
    if sampling.top_p < 1.0 || sampling.min_p > 0.0 {
        let (mut n, mut mass) = (0, 0.0);
        while n < n_kept
            && let Some(id) = ranked.get(n)
        {
            let weight = weight(ranked.logits, id);
            let is_enough = sampling.top_p < 1.0 && mass >= f64::from(sampling.top_p) * total;
            if n > 0 && is_enough || weight < f64::from(sampling.min_p) {
                break;
            }
            mass += weight;
            n += 1;
        }
        (n_kept, total) = (n, mass);
    }
    let mut left = uniform(sampling.seed, position) * total;
    for at in 0..n_kept {
        let Some(id) = ranked.get(at) else { break };
        left -= weight(ranked.logits, id);
        if left < 0.0 {
            return id;
        }
    }
    // Rounding can leave a crumb past the last candidate, which may be one that must not be drawn: it is the first one's.
    ranked.get(0).unwrap_or(0)
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
    fn any_temperature_draws_what_has_a_weight() {
        let logits: Vec<f32> = (0..300).map(|id| (id * 7 % 300) as f32 / 50.0).collect();
        let best = at(&logits, &GREEDY, 0).id;
        for temperature in [f32::from_bits(1), f32::MIN_POSITIVE, 1e-6] {
            let cold = Sampling { temperature, ..GREEDY };
            assert!((0..50).all(|position| at(&logits, &cold, position).id == best), "{temperature:e}");
        }
        let hot = Sampling { temperature: f32::MAX, ..GREEDY };
        let mut seen: Vec<u32> = (0..20_000).map(|position| at(&logits, &hot, position).id).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), logits.len());
    }

    #[test]
    fn ids_are_ranked_as_far_as_one_looks() {
        let logits: Vec<f32> = (0..1000).map(|id| (id * 37 % 101) as f32).collect();
        let mut all: Vec<u32> = (0..1000).collect();
        all.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let mut ranked = Ranked::new(&logits);
        for n in [0, 1, 3, 64, 65, 400, 1000, 1001] {
            assert_eq!(ranked.first(n), &all[..n.min(1000)]);
        }
        assert_eq!(Ranked::new(&[]).get(0), None);
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
