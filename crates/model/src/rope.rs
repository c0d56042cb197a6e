//! Rotary embedding: frequencies with YaRN, and the two ways of pairing numbers.

use crate::config::{ModelConfig, Rope, Yarn};

/// Angles per position, and the factor on the softmax scale that comes with them.
#[derive(Clone, Debug)]
pub(crate) struct Rotary {
    /// `[qk_rope_head_dim / 2]`
    inv_freq: Vec<f32>,
    /// On cos and sin.
    attention_factor: f32,
}

/// m(s, x) = 0.1 x ln(s) + 1 (DeepSeek-V2's `yarn_get_mscale`).
fn mscale(scale: f64, x: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * x * scale.ln() + 1.0 }
}

impl Rope {
    /// The factor on cos and sin: m(factor, mscale) / m(factor, mscale_all_dim), or m(factor, 1) without the two keys.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        let Some(yarn) = self.yarn else { return 1.0 };
        let both = yarn.mscale.filter(|x| *x != 0.0).zip(yarn.mscale_all_dim.filter(|x| *x != 0.0));
        yarn.attention_factor.unwrap_or_else(|| match both {
            Some((x, all)) => mscale(yarn.factor, x) / mscale(yarn.factor, all),
            None => mscale(yarn.factor, 1.0),
        })
    }

    /// The softmax scale for heads of `qk_head_dim`: its inverse square root times m(factor, mscale_all_dim)².
    #[must_use]
    pub fn softmax_scale(&self, qk_head_dim: usize) -> f64 {
        let all = self.yarn.and_then(|yarn| yarn.mscale_all_dim.map(|all| mscale(yarn.factor, all)));
        (qk_head_dim as f64).powf(-0.5) * all.unwrap_or(1.0).powi(2)
    }
}

/// (cos, sin) of every pair at one position.
pub(crate) struct Angles(Vec<(f32, f32)>);

impl Rotary {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let dim = config.qk_rope_head_dim;
        let base = config.rope.theta as f32;
        let pos_freqs = (0..dim).step_by(2).map(|i| base.powf(i as f32 / dim as f32));
        let inv_freq = match config.rope.yarn {
            None => pos_freqs.map(|freq| 1.0 / freq).collect(),
            Some(yarn) => interpolate(&yarn, config.rope.theta, dim, pos_freqs),
        };
        Self { inv_freq, attention_factor: config.rope.attention_factor() as f32 }
    }

    /// The angle is the f32 product that the reference computes; its cosine is
    /// taken in f64, so that no libm's last bit shows.
    pub(crate) fn angles(&self, position: usize) -> Angles {
        let of_pair = |freq: &f32| {
            let (sin, cos) = f64::from(position as f32 * freq).sin_cos();
            (cos as f32 * self.attention_factor, sin as f32 * self.attention_factor)
        };
        Angles(self.inv_freq.iter().map(of_pair).collect())
    }
}

impl Angles {
    /// Rotates pairs (0, 1), (2, 3), …: MLA's queries and keys. Written back as halves, as the reference does; a
    /// scalar product does not see it.
    /// `room` is any memory.
    pub(crate) fn rotate_interleaved(&self, x: &mut [f32], room: &mut Vec<f32>) {
        let half = self.0.len();
        room.clear();
        room.extend_from_slice(&x[..2 * half]);
        for (at, (pair, (cos, sin))) in room.as_chunks::<2>().0.iter().zip(&self.0).enumerate() {
            x[at] = pair[0] * cos - pair[1] * sin;
            x[at + half] = pair[1] * cos + pair[0] * sin;
        }
    }

    /// Rotates pairs (i, i + half) of the first `2 * half` numbers: the indexer's queries and keys.
    pub(crate) fn rotate_half_split(&self, x: &mut [f32]) {
        let half = self.0.len();
        for (at, (cos, sin)) in self.0.iter().enumerate() {
            let (a, b) = (x[at], x[at + half]);
            x[at] = a * cos - b * sin;
            x[at + half] = b * cos + a * sin;
        }
    }
}

/// YaRN: high frequencies as they are, low ones divided by the factor, a ramp between.
fn interpolate(yarn: &Yarn, theta: f64, dim: usize, pos_freqs: impl Iterator<Item = f32>) -> Vec<f32> {
    let correction_dim = |rotations: f64| {
        dim as f64 * (yarn.original_max_position_embeddings / (rotations * std::f64::consts::TAU)).ln()
            / (2.0 * theta.ln())
    };
    let (low, high) = (correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow));
    let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, high) = (low.max(0.0) as f32, high.min(dim as f64 - 1.0) as f32);
    let high = if low == high { high + 0.001 } else { high };
    pos_freqs
        .enumerate()
        .map(|(at, freq)| {
            let ramp = ((at as f32 - low) / (high - low)).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            (1.0 / (yarn.factor as f32 * freq)) * (1.0 - keep) + (1.0 / freq) * keep
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(factor: f64, x: f64, all: f64, expected: (f64, f64)) {
        let yarn = Yarn {
            factor,
            original_max_position_embeddings: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(x),
            mscale_all_dim: Some(all),
            attention_factor: None,
            truncate: true,
        };
        let rope = Rope { theta: 10_000.0, yarn: Some(yarn) };
        let (cos_sin, softmax) = (rope.attention_factor(), rope.softmax_scale(192));
        assert!(
            (cos_sin - expected.0).abs() < 1e-6 && (softmax - expected.1).abs() < 1e-6,
            "{cos_sin} {softmax}"
        );
    }

    #[test]
    fn the_two_mscales_go_where_they_belong() {
        check(40.0, 0.707, 0.707, (1.0, 0.114_721));
        check(40.0, 1.0, 1.0, (1.0, 0.135_234));
        check(40.0, 1.0, 0.5, (1.155_722, 0.101_246));
    }
}
