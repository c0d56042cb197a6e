//! The kernels themselves, in plain Rust that compilers turn into vector code of any width: the sixteen lanes are
//! independent, and `mul_add` is one instruction where there is one and the same bits where there is none.

use super::Weight;

/// Virtual lanes of every sum: element i belongs to lane i % 16.
const LANES: usize = 16;

/// Rows and outputs of one register block.
const BLOCK_ROWS: usize = 3;
const BLOCK_OUTPUTS: usize = 2;

/// The one reduction tree: halves are added until one number is left.
#[inline(always)]
fn reduce(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Scalar products of each of `x` with each of `w`, all of one length.
#[inline(always)]
fn dots<W: Weight, const R: usize, const C: usize>(x: [&[f32]; R], w: [&[W]; C]) -> [[f32; C]; R] {
    let mut lanes = [[[0.0_f32; LANES]; C]; R];
    let x = x.map(|x| x.as_chunks::<LANES>());
    let w = w.map(|w| w.as_chunks::<LANES>());
    for at in 0..x[0].0.len() {
        for c in 0..C {
            let w = w[c].0[at].map(W::to_f32);
            for r in 0..R {
                let x = &x[r].0[at];
                for lane in 0..LANES {
                    lanes[r][c][lane] = x[lane].mul_add(w[lane], lanes[r][c][lane]);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            for (lane, (x, w)) in lanes[r][c].iter_mut().zip(x[r].1.iter().zip(w[c].1)) {
                *lane = x.mul_add(w.to_f32(), *lane);
            }
        }
    }
    lanes.map(|row| row.map(reduce))
}

#[inline(always)]
pub(super) fn dot<W: Weight>(x: &[f32], w: &[W]) -> f32 {
    dots([x], [w])[0][0]
}

#[inline(always)]
pub(super) fn matmul<W: Weight>(x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
    let n_outputs = w.len() / width;
    let n_rows = x.len() / width;
    let mut row = 0;
    while row < n_rows {
        let x = |r: usize| &x[(row + r) * width..][..width];
        let y = &mut y[row * n_outputs..];
        match n_rows - row {
            1 => stripe([x(0)], w, width, y),
            2 => stripe([x(0), x(1)], w, width, y),
            _ => stripe([x(0), x(1), x(2)], w, width, y),
        }
        row += BLOCK_ROWS;
    }
}

/// A few rows times all outputs.
#[inline(always)]
fn stripe<W: Weight, const R: usize>(x: [&[f32]; R], w: &[W], width: usize, y: &mut [f32]) {
    let n_outputs = w.len() / width;
    let mut output = 0;
    while output + BLOCK_OUTPUTS <= n_outputs {
        let w = [&w[output * width..][..width], &w[(output + 1) * width..][..width]];
        for (r, products) in dots(x, w).into_iter().enumerate() {
            y[r * n_outputs + output..][..BLOCK_OUTPUTS].copy_from_slice(&products);
        }
        output += BLOCK_OUTPUTS;
    }
    if output < n_outputs {
        for (r, [product]) in dots(x, [&w[output * width..][..width]]).into_iter().enumerate() {
            y[r * n_outputs + output] = product;
        }
    }
}

#[inline(always)]
pub(super) fn axpy<W: Weight>(a: f32, x: &[W], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x.to_f32(), *y);
    }
}

/// e^x within 2 ulp, from additions and multiplications alone: libm's differs from machine to machine, and experts on
/// different machines must agree. Cephes' `expf`: x = n ln 2 + r, a polynomial of degree 6 in r, times 2^n.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let polynomial = COEFFICIENTS.iter().fold(0.0_f32, |sum, coefficient| sum.mul_add(r, *coefficient));
    let power = polynomial.mul_add(r * r, r) + 1.0;
    power * f32::from_bits(((n as i32 + 127) as u32) << 23)
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

/// Sum over sixteen lanes, the order of [`dot`].
#[inline(always)]
fn sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; LANES];
    for (at, value) in values.enumerate() {
        lanes[at % LANES] += value;
    }
    reduce(lanes)
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

/// `weight * x / sqrt(mean(x²) + eps)` for each row of `x` `[rows, weight.len()]`.
#[inline(always)]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut normed = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean = sum(row.iter().map(|value| value * value)) / row.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        normed.extend(row.iter().zip(weight).map(|(value, weight)| weight * (value * scale)));
    }
    normed
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
