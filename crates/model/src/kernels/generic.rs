//! The kernels themselves, in plain Rust that compilers turn into vector code of any width: the sixteen lanes are
//! independent, and `mul_add` is one instruction where there is one and the same bits where there is none.

use super::lanes::{LANES, Lanes as _, Portable};

/// 1.5 × 2²³: a number that is added to it is rounded there, ties to even, and is in its low bits as an integer.
pub(super) const ROUNDER: f32 = 12_582_912.0;

/// e^x within 2 ulp, from additions and multiplications alone: libm's differs from machine to machine, and experts on
/// different machines must agree. Cephes' `expf`: x = n ln 2 + r, a polynomial of degree 6 in r, times 2^n.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let polynomial = COEFFICIENTS.iter().fold(0.0_f32, |sum, coefficient| sum.mul_add(r, *coefficient));
    let power = polynomial.mul_add(r * r, r) + 1.0;
    // A cast would be the same, but one number after the other.
    let exponent = (n + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()).wrapping_add(127);
    power * f32::from_bits(exponent << 23)
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// SwiGLU: `gate = gate * sigmoid(gate) * up`.
#[inline(always)]
pub(super) fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate * sigmoid(*gate) * up;
    }
}

#[inline(always)]
pub(super) fn add_weighted(sum: &mut [f32], values: &[f32], weight: f32) -> bool {
    let mut all = true;
    for (sum, value) in sum.iter_mut().zip(values) {
        let product = weight * value;
        *sum += product;
        all &= product.is_finite();
    }
    all
}

/// Both products with the step are exact: it is a power of two.
#[inline(always)]
pub(super) fn add_on_grid(sum: &mut [f32], values: &[f32], weight: f32, step: f32, max: f32) -> bool {
    let per_step = step.recip();
    let mut all = true;
    for (sum, value) in sum.iter_mut().zip(values) {
        let product = weight * value;
        *sum += (product * per_step).round_ties_even() * step;
        // Written so that a NaN does not fit.
        all &= product.abs() <= max;
    }
    all
}

#[inline(always)]
pub(super) fn add_numbers(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}

#[inline(always)]
pub(super) fn add_positive(products: &[[f32; LANES]], weights: &[f32], sum: &mut [f32; LANES]) {
    for (products, weight) in products.iter().zip(weights) {
        for (sum, product) in sum.iter_mut().zip(products) {
            *sum = weight.mul_add(product.max(0.0), *sum);
        }
    }
}

/// Sum over sixteen lanes, in the order of every other one.
#[inline(always)]
pub(super) fn sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; LANES];
    for (at, value) in values.enumerate() {
        lanes[at % LANES] += value;
    }
    Portable::load(&lanes).reduce()
}

/// Scores → probabilities, in place.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in &mut *scores {
        *score = exp(*score - max);
    }
    let total = sum(scores.iter().copied());
    for score in scores {
        *score /= total;
    }
}

/// The largest of `values`, −∞ if there is none; what is no number does not count.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            if *value > *lane {
                *lane = *value;
            }
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// True if no magnitude is above `max`; what is no number is.
#[inline(always)]
pub(super) fn within(values: &[f32], max: f32) -> bool {
    // All of them, which is faster than stopping at the first.
    let mut lanes = [1_u32; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for values in whole {
        for (within, value) in lanes.iter_mut().zip(values) {
            *within &= u32::from(value.abs() <= max);
        }
    }
    lanes == [1; LANES] && rest.iter().all(|value| value.abs() <= max)
}

/// Σ e^(scale · (value − shift)). A part's terms are added as f32: that is exact to some of its last places.
#[inline(always)]
pub(super) fn sum_of_exp(values: &[f32], shift: f32, scale: f32) -> f64 {
    const PART: usize = 64 * LANES;
    let mut total = 0.0;
    // Loops: what a closure does may be compiled without the caller's instructions.
    for part in values.chunks(PART) {
        let mut lanes = [0.0; LANES];
        let (whole, rest) = part.as_chunks::<LANES>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane += exp(scale * (value - shift));
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += exp(scale * (value - shift));
        }
        total += f64::from(Portable::load(&lanes).reduce());
    }
    total
}

/// `weight * x / sqrt(mean(x²) + eps)` for each row of `x` `[rows, weight.len()]`.
#[inline(always)]
pub(super) fn norm_rows(x: &[f32], weight: &[f32], eps: f32, normed: &mut [f32]) {
    for (row, normed) in x.chunks_exact(weight.len()).zip(normed.chunks_exact_mut(weight.len())) {
        let mean = sum(row.iter().map(|value| value * value)) / row.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for (normed, (value, weight)) in normed.iter_mut().zip(row.iter().zip(weight)) {
            *normed = weight * (value * scale);
        }
    }
}

/// `weight * (x - mean) / sqrt(variance + eps) + bias` for each row of `x` `[rows, weight.len()]`.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let mut normed = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let n = row.len() as f32;
        let mean = sum(row.iter().copied()) / n;
        let variance = sum(row.iter().map(|value| (value - mean) * (value - mean))) / n;
        let scale = 1.0 / (variance + eps).sqrt();
        let parts = row.iter().zip(weight).zip(bias);
        normed.extend(parts.map(|((value, weight), bias)| ((value - mean) * scale).mul_add(*weight, *bias)));
    }
    normed
}
