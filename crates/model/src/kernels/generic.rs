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
pub(super) fn add_positive(products: &[[f32; LANES]], weights: &[f32], sum: &mut [f32; LANES]) {
    for (products, weight) in products.iter().zip(weights) {
        for (sum, product) in sum.iter_mut().zip(products) {
            *sum = weight.mul_add(product.max(0.0), *sum);
        }
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

/// Positions that are scored before any of them is weighed.
const TILE: usize = 48;

/// Heads and positions of one register block of scores.
const SCORED_HEADS: usize = 2;
const SCORED_POSITIONS: usize = 3;

/// Heads that are weighed at once.
pub(crate) const HEADS_MAX: usize = 4;

/// What some heads have read so far: an online softmax (Milakov and Gimelshein, 2018), so that no score is kept.
pub(crate) struct Attended<'a> {
    /// `[heads, width]`: Σ e^(score − highest) · row
    pub(crate) sums: &'a mut [f32],
    pub(crate) width: usize,
    highest: [f32; HEADS_MAX],
    /// Σ e^(score − highest)
    totals: [f32; HEADS_MAX],
}

impl<'a> Attended<'a> {
    /// Nothing so far, of at most [`HEADS_MAX`] heads: `sums` is zero.
    pub(crate) const fn new(sums: &'a mut [f32], width: usize) -> Self {
        Self { sums, width, highest: [f32::NEG_INFINITY; HEADS_MAX], totals: [0.0; HEADS_MAX] }
    }

    /// The sums become means.
    pub(crate) fn finish(self) {
        for (sums, total) in self.sums.chunks_exact_mut(self.width).zip(self.totals) {
            sums.iter_mut().for_each(|sum| *sum /= total);
        }
    }
}

/// Lets each head of `q` `[heads, row]` read `rows`, of which it weighs the first `width` numbers.
#[inline(always)]
pub(super) fn attend(q: &[f32], rows: &[&[f32]], scale: f32, attended: &mut Attended<'_>) {
    let Some(first) = rows.first() else { return };
    let n_heads = q.len() / first.len();
    let mut scores = [[0.0_f32; TILE]; HEADS_MAX];
    for tile in rows.chunks(TILE) {
        score(q, tile, scale, &mut scores[..n_heads]);
        for (head, scores) in scores[..n_heads].iter_mut().enumerate() {
            let scores = &mut scores[..tile.len()];
            let highest = scores.iter().copied().fold(attended.highest[head], f32::max);
            let shrink = exp(attended.highest[head] - highest);
            attended.highest[head] = highest;
            for score in &mut *scores {
                *score = exp(*score - highest);
            }
            attended.totals[head] = attended.totals[head].mul_add(shrink, sum(scores.iter().copied()));
            let sums = &mut attended.sums[head * attended.width..][..attended.width];
            sums.iter_mut().for_each(|sum| *sum *= shrink);
        }
        let width = attended.width;
        match n_heads {
            1 => weigh::<1>(&scores, tile, attended.sums, width),
            2 => weigh::<2>(&scores, tile, attended.sums, width),
            3 => weigh::<3>(&scores, tile, attended.sums, width),
            _ => weigh::<HEADS_MAX>(&scores, tile, attended.sums, width),
        }
    }
}

/// Scalar products of all heads with all rows, times `scale`.
#[inline(always)]
fn score(q: &[f32], rows: &[&[f32]], scale: f32, scores: &mut [[f32; TILE]]) {
    let width = rows[0].len();
    let (pairs, last) = scores.as_chunks_mut::<SCORED_HEADS>();
    for (pair, scores) in pairs.iter_mut().enumerate() {
        let heads: [&[f32]; SCORED_HEADS] =
            std::array::from_fn(|at| &q[(pair * SCORED_HEADS + at) * width..][..width]);
        score_heads(heads, rows, scale, scores);
    }
    if let [scores] = last {
        score_heads([&q[q.len() - width..]], rows, scale, std::array::from_mut(scores));
    }
}

#[inline(always)]
fn score_heads<const H: usize>(
    heads: [&[f32]; H],
    rows: &[&[f32]],
    scale: f32,
    scores: &mut [[f32; TILE]; H],
) {
    let (blocks, rest) = rows.as_chunks::<SCORED_POSITIONS>();
    for (block, rows) in blocks.iter().enumerate() {
        for (scores, products) in scores.iter_mut().zip(dots(heads, *rows)) {
            for (at, product) in products.into_iter().enumerate() {
                scores[block * SCORED_POSITIONS + at] = product * scale;
            }
        }
    }
    for (at, row) in rest.iter().enumerate() {
        for (scores, [product]) in scores.iter_mut().zip(dots(heads, [*row])) {
            scores[blocks.len() * SCORED_POSITIONS + at] = product * scale;
        }
    }
}

/// `sums[head] += Σ weights[head][i] · rows[i]`, in order.
#[inline(always)]
fn weigh<const H: usize>(weights: &[[f32; TILE]], rows: &[&[f32]], sums: &mut [f32], width: usize) {
    let mut start = 0;
    while start + LANES <= width {
        let mut lanes = [[0.0_f32; LANES]; H];
        for (head, lanes) in lanes.iter_mut().enumerate() {
            lanes.copy_from_slice(&sums[head * width + start..][..LANES]);
        }
        for (at, row) in rows.iter().enumerate() {
            let row = &row[start..][..LANES];
            for (head, lanes) in lanes.iter_mut().enumerate() {
                let weight = weights[head][at];
                for lane in 0..LANES {
                    lanes[lane] = weight.mul_add(row[lane], lanes[lane]);
                }
            }
        }
        for (head, lanes) in lanes.iter().enumerate() {
            sums[head * width + start..][..LANES].copy_from_slice(lanes);
        }
        start += LANES;
    }
    for (head, weights) in weights.iter().enumerate().take(H) {
        for (weight, row) in weights.iter().zip(rows) {
            axpy(*weight, &row[start..width], &mut sums[head * width + start..][..width - start]);
        }
    }
}
