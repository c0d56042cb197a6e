//! Attention of one row's heads over latents: scores, an online softmax, the weighed sums. Tile after tile, so that what is
//! scored is still near when it is weighed. Positions may be read in parts, each from nothing, that are merged afterwards.

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::{
    Isa,
    generic::{exp, sum},
    lanes::{LANES, Lanes, Portable},
    matmul::dots,
};

/// Positions that are scored before any of them is weighed.
const TILE: usize = 48;

/// Heads that may read a tile while it is near.
pub(crate) const HEADS_MAX: usize = 16;

/// Heads that are weighed at once.
const WEIGHED_HEADS: usize = 4;

/// What a head has read so far: an online softmax (Milakov and Gimelshein, 2018), so that no score is kept. Beside it is
/// Σ e^(score − highest) · row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softmax {
    highest: f32,
    /// Σ e^(score − highest)
    total: f32,
}

impl Softmax {
    /// Nothing so far; the sums beside it are zero.
    pub(crate) const NOTHING: Self = Self { highest: f32::NEG_INFINITY, total: 0.0 };

    /// The sums become means.
    pub(crate) fn finish(self, sums: &mut [f32]) {
        sums.iter_mut().for_each(|sum| *sum /= self.total);
    }

    /// Adds what the head has read of positions that follow.
    pub(crate) fn merge(&mut self, sums: &mut [f32], next: Self, next_sums: &[f32]) {
        let highest = if next.highest > self.highest { next.highest } else { self.highest };
        let (shrink, next_shrink) = (exp(self.highest - highest), exp(next.highest - highest));
        for (sum, next) in sums.iter_mut().zip(next_sums) {
            *sum = *sum * shrink + *next * next_shrink;
        }
        *self = Self { highest, total: self.total * shrink + next.total * next_shrink };
    }
}

/// Lets each head of `q` `[heads, row]` read `rows`, of which it weighs the first `width` numbers into `sums` `[heads, width]`.
pub(crate) fn attend(
    isa: Isa,
    q: &[f32],
    rows: &[&[f32]],
    scale: f32,
    sums: &mut [f32],
    softmaxes: &mut [Softmax],
) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2(q: &[f32], rows: &[&[f32]], scale: f32, sums: &mut [f32], softmaxes: &mut [Softmax]) {
        attend_with::<Avx2, 2, 3, 1>(q, rows, scale, sums, softmaxes);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
    fn avx512(q: &[f32], rows: &[&[f32]], scale: f32, sums: &mut [f32], softmaxes: &mut [Softmax]) {
        attend_with::<Avx512, 4, 4, 4>(q, rows, scale, sums, softmaxes);
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: `Isa::Avx2` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { avx2(q, rows, scale, sums, softmaxes) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512(q, rows, scale, sums, softmaxes) },
        _ => attend_with::<Portable, 2, 3, 1>(q, rows, scale, sums, softmaxes),
    }
}

/// The same with register blocks of `HEADS` × `POSITIONS` scores, and of `VECTORS` × [`LANES`] numbers of each head's sum.
/// They do not show in the result.
#[inline(always)]
fn attend_with<V: Lanes, const HEADS: usize, const POSITIONS: usize, const VECTORS: usize>(
    q: &[f32],
    rows: &[&[f32]],
    scale: f32,
    sums: &mut [f32],
    softmaxes: &mut [Softmax],
) {
    let Some(first) = rows.first() else { return };
    debug_assert_eq!(q.len(), softmaxes.len() * first.len(), "heads");
    let width = sums.len() / softmaxes.len();
    for tile in rows.chunks(TILE) {
        let heads = q.chunks(WEIGHED_HEADS * first.len()).zip(sums.chunks_mut(WEIGHED_HEADS * width));
        for ((q, sums), softmaxes) in heads.zip(softmaxes.chunks_mut(WEIGHED_HEADS)) {
            let mut scores = [[0.0_f32; TILE]; WEIGHED_HEADS];
            let scores = &mut scores[..q.len() / first.len()];
            score::<V, HEADS, POSITIONS>(q, tile, scale, scores);
            let of_heads = scores.iter_mut().zip(sums.chunks_exact_mut(width));
            for ((scores, sums), softmax) in of_heads.zip(softmaxes) {
                let scores = &mut scores[..tile.len()];
                let before = softmax.highest;
                softmax.highest = largest(scores, before);
                let shrink = exp(before - softmax.highest);
                for score in &mut *scores {
                    *score = exp(*score - softmax.highest);
                }
                softmax.total = softmax.total.mul_add(shrink, sum(scores.iter().copied()));
                sums.iter_mut().for_each(|sum| *sum *= shrink);
            }
            match scores {
                [a] => weigh::<V, 1, VECTORS>([a], tile, sums, width),
                [a, b] => weigh::<V, 2, VECTORS>([a, b], tile, sums, width),
                [a, b, c] => weigh::<V, 3, VECTORS>([a, b, c], tile, sums, width),
                [a, b, c, d, ..] => weigh::<V, 4, VECTORS>([a, b, c, d], tile, sums, width),
                [] => {}
            }
        }
    }
}

/// The largest of `scores` and `floor`; what is no number is passed over.
#[inline(always)]
fn largest(scores: &[f32], floor: f32) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [floor; LANES];
    let (whole, rest) = scores.as_chunks::<LANES>();
    for scores in whole {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *lane = larger(*score, *lane);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(floor, |sum, score| larger(score, sum))
}

/// Scalar products of all heads with all rows, times `scale`.
#[inline(always)]
fn score<V: Lanes, const HEADS: usize, const POSITIONS: usize>(
    q: &[f32],
    rows: &[&[f32]],
    scale: f32,
    scores: &mut [[f32; TILE]],
) {
    let width = rows[0].len();
    for (scores, q) in scores.chunks_mut(HEADS).zip(q.chunks(HEADS * width)) {
        let q = |head: usize| &q[head * width..][..width];
        match scores {
            [a] => score_heads::<V, 1, POSITIONS>([q(0)], rows, scale, [a]),
            [a, b] => score_heads::<V, 2, POSITIONS>([q(0), q(1)], rows, scale, [a, b]),
            [a, b, c] => score_heads::<V, 3, POSITIONS>([q(0), q(1), q(2)], rows, scale, [a, b, c]),
            [a, b, c, d, ..] => {
                score_heads::<V, 4, POSITIONS>([q(0), q(1), q(2), q(3)], rows, scale, [a, b, c, d])
            }
            [] => {}
        }
    }
}

#[inline(always)]
fn score_heads<V: Lanes, const H: usize, const POSITIONS: usize>(
    heads: [&[f32]; H],
    rows: &[&[f32]],
    scale: f32,
    mut scores: [&mut [f32; TILE]; H],
) {
    let (blocks, rest) = rows.as_chunks::<POSITIONS>();
    for (block, rows) in blocks.iter().enumerate() {
        for (scores, products) in scores.iter_mut().zip(dots::<V, f32, H, POSITIONS, false>(heads, *rows)) {
            for (at, product) in products.into_iter().enumerate() {
                scores[block * POSITIONS + at] = product * scale;
            }
        }
    }
    for (at, row) in rest.iter().enumerate() {
        for (scores, [product]) in scores.iter_mut().zip(dots::<V, f32, H, 1, false>(heads, [*row])) {
            scores[blocks.len() * POSITIONS + at] = product * scale;
        }
    }
}

/// `sums[head] += Σ weights[head][i] · rows[i]`, in order.
#[inline(always)]
fn weigh<V: Lanes, const H: usize, const VECTORS: usize>(
    weights: [&mut [f32; TILE]; H],
    rows: &[&[f32]],
    sums: &mut [f32],
    width: usize,
) {
    let mut start = 0;
    while start + VECTORS * LANES <= width {
        weigh_some::<V, H, VECTORS>(&weights, rows, sums, width, start);
        start += VECTORS * LANES;
    }
    while start + LANES <= width {
        weigh_some::<V, H, 1>(&weights, rows, sums, width, start);
        start += LANES;
    }
    for (head, weights) in weights.iter().enumerate() {
        for (weight, row) in weights.iter().zip(rows) {
            let sums = &mut sums[head * width..][..width];
            for (sum, number) in sums.iter_mut().zip(*row).skip(start) {
                *sum = weight.mul_add(*number, *sum);
            }
        }
    }
}

/// The same for the numbers of a register block.
#[inline(always)]
fn weigh_some<V: Lanes, const H: usize, const VECTORS: usize>(
    weights: &[&mut [f32; TILE]; H],
    rows: &[&[f32]],
    sums: &mut [f32],
    width: usize,
    start: usize,
) {
    let mut vectors = [[V::splat(0.0); VECTORS]; H];
    for (head, vectors) in vectors.iter_mut().enumerate() {
        let (sums, _) = sums[head * width + start..].as_chunks::<LANES>();
        for (vector, sums) in vectors.iter_mut().zip(sums) {
            *vector = V::load(sums);
        }
    }
    for (at, row) in rows.iter().enumerate().take(TILE) {
        let (row, _) = row[start..][..VECTORS * LANES].as_chunks::<LANES>();
        for head in 0..H {
            let weight = V::splat(weights[head][at]);
            for v in 0..VECTORS {
                vectors[head][v] = weight.mul_add(V::load(&row[v]), vectors[head][v]);
            }
        }
    }
    for (head, vectors) in vectors.iter().enumerate() {
        let (sums, _) = sums[head * width + start..].as_chunks_mut::<LANES>();
        for (vector, sums) in vectors.iter().zip(sums) {
            vector.store(sums);
        }
    }
}
