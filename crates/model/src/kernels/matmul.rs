//! Rows times a stored matrix, f32 or bf16: every product is summed in sixteen lanes, whichever rows and outputs share a
//! register block with it.

use std::slice;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::{
    Isa,
    lanes::{LANES, Lanes, Portable},
};

/// How far ahead of what a row alone reads the first cache has it.
const NEAR_BYTES: usize = 512;

/// Of a line of the caches.
const LINE_BYTES: usize = 64;

/// So much of a matrix meets a pass of rows before the next block does: it stays in a core's second cache. The next one is
/// fetched there meanwhile.
const BLOCK_BYTES: usize = 128 << 10;

/// A pass of rows has so much, to stay there beside two blocks where that is large enough.
const PASS_BYTES: usize = 512 << 10;

/// But so many rows at least, if there are: every pass reads the matrix from memory.
const PASS_ROWS: usize = 32;

/// So many vectors at most lie between the next lines that are asked for.
const STRETCH: usize = 16;

/// Numbers of a few rows that meet all outputs of a block before the next ones do: they stay in the first cache.
const PART: usize = 1024;
const _: () = assert!(PART.is_multiple_of(LANES));

/// A stored number, read as f32 exactly.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;

    fn lanes<V: Lanes>(w: &[Self; LANES]) -> V;

    /// One part of them, which are [`apart`](Self::apart).
    fn part<V: Lanes>(w: &[Self; LANES], part: usize) -> V::Part;

    /// In the order in which a part of such numbers is loaded, and back.
    #[inline(always)]
    fn apart<V: Lanes>(lanes: V) -> V {
        lanes
    }

    #[inline(always)]
    fn together<V: Lanes>(lanes: V) -> V {
        lanes
    }
}

impl Weight for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn lanes<V: Lanes>(w: &[Self; LANES]) -> V {
        V::load(w)
    }

    #[inline(always)]
    fn part<V: Lanes>(w: &[Self; LANES], part: usize) -> V::Part {
        V::load_part(w, part)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        // Written out: `half`'s own conversion branches on NaN.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn lanes<V: Lanes>(w: &[Self; LANES]) -> V {
        V::load_halves(w)
    }

    #[inline(always)]
    fn part<V: Lanes>(w: &[Self; LANES], part: usize) -> V::Part {
        V::load_halves_part(w, part)
    }

    #[inline(always)]
    fn apart<V: Lanes>(lanes: V) -> V {
        lanes.apart()
    }

    #[inline(always)]
    fn together<V: Lanes>(lanes: V) -> V {
        lanes.together()
    }
}

/// `x` `[rows, width]` times `w` `[outputs, width]` transposed → `y` `[rows, outputs]`.
pub(crate) fn matmul<W: Weight>(isa: Isa, x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2<W: Weight>(x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
        matmul_with::<Avx2, W, 2, 3, 2>(x, w, width, y);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
    fn avx512<W: Weight>(x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
        // One row waits for memory alone, and for eight streams of it least.
        matmul_with::<Avx512, W, 8, 6, 4>(x, w, width, y);
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: `Isa::Avx2` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { avx2(x, w, width, y) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512(x, w, width, y) },
        _ => matmul_with::<Portable, W, 2, 3, 2>(x, w, width, y),
    }
}

/// The same with register blocks of one row and `ALONE` outputs, or of up to `ROWS` rows and `OUTPUTS` outputs.
#[inline(always)]
fn matmul_with<V: Lanes, W: Weight, const ALONE: usize, const ROWS: usize, const OUTPUTS: usize>(
    x: &[f32],
    w: &[W],
    width: usize,
    y: &mut [f32],
) {
    const { assert!(ROWS <= 6) }
    debug_assert!(w.len().is_multiple_of(width), "whole outputs");
    debug_assert_eq!(y.len(), x.len() / width * (w.len() / width), "rows times outputs");
    if x.len() == width {
        return row::<V, W, ALONE>(x, w, y);
    }
    let (n_rows, n_outputs) = (x.len() / width, w.len() / width);
    if n_rows == 0 || n_outputs == 0 {
        return;
    }
    let n_block = (BLOCK_BYTES / (width * size_of::<W>())).max(1).next_multiple_of(OUTPUTS);
    let n_passes = n_rows.div_ceil((PASS_BYTES / (width * size_of::<f32>())).max(PASS_ROWS));
    let n_pass = n_rows.div_ceil(n_passes);
    let n_sums = if width > PART { n_block.min(n_outputs.next_multiple_of(OUTPUTS)) * ROWS } else { 0 };
    let mut sums = vec![V::splat(0.0); n_sums];
    let mut packed = Vec::with_capacity(n_pass * (width / LANES));
    for (x, y) in x.chunks(n_pass * width).zip(y.chunks_mut(n_pass * n_outputs)) {
        let n_groups = (x.len() / width).div_ceil(ROWS);
        // Few rows are shared out as evenly as groups of one size allow: one alone takes half as long as all.
        let n_together = (x.len() / width).div_ceil(n_groups);
        packed.clear();
        for x in x.chunks(n_together * width) {
            pack::<V, W>(x, width, &mut packed);
        }
        for (block, of_block) in w.chunks(n_block * width).enumerate() {
            let next = &w[block * n_block * width..][of_block.len()..];
            let mut pieces = in_pieces(&next[..next.len().min(of_block.len())], n_groups);
            let groups = x.chunks(n_together * width).zip(y.chunks_mut(n_together * n_outputs));
            let mut packed = packed.as_slice();
            for (x, y) in groups {
                let of_group;
                (of_group, packed) = packed.split_at(x.len() / width * (width / LANES));
                let (first, next) = (block * n_block, pieces.next().unwrap_or(&[]));
                macro_rules! group_of {
                    ($($n:literal)*) => {
                        match y.len() / n_outputs {
                            $($n if $n <= ROWS => group::<V, W, $n, OUTPUTS>(
                                (x, of_group), (of_block, next), width, first, y, &mut sums,
                            ),)*
                            n => unreachable!("{n} rows in a group"),
                        }
                    };
                }
                group_of!(1 2 3 4 5 6);
            }
        }
    }
}

/// One row times all outputs.
#[inline(always)]
fn row<V: Lanes, W: Weight, const OUTPUTS: usize>(x: &[f32], w: &[W], y: &mut [f32]) {
    let width = x.len();
    let output = |at: usize| &w[at * width..][..width];
    let (tiles, rest) = y.as_chunks_mut::<OUTPUTS>();
    let n_tiled = tiles.len() * OUTPUTS;
    for (tile, y) in tiles.iter_mut().enumerate() {
        [*y] = dots::<V, W, 1, OUTPUTS, true>([x], std::array::from_fn(|at| output(tile * OUTPUTS + at)));
    }
    for (at, y) in rest.iter_mut().enumerate() {
        [[*y]] = dots::<V, W, 1, 1, false>([x], [output(n_tiled + at)]);
    }
}

/// Sixteen numbers, a line of the caches: what lies across two of them takes two loads.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Vector([f32; LANES]);

/// Appends the numbers of a few rows in the order in which [`group`] reads them: sixteen of each row by turns. What is left of
/// the rows is not among them.
#[inline(always)]
fn pack<V: Lanes, W: Weight>(x: &[f32], width: usize, packed: &mut Vec<Vector>) {
    for at in 0..width / LANES {
        for x in x.chunks_exact(width) {
            let mut vector = Vector([0.0; LANES]);
            W::apart(V::load(&x.as_chunks().0[at])).store(&mut vector.0);
            packed.push(vector);
        }
    }
}

/// A few rows, also `packed`, times some outputs, of which the first is the one at `first` of each row of `y`. `next` is fetched
/// meanwhile; `sums` keep what the products come to from one part of the width to the next.
#[inline(always)]
fn group<V: Lanes, W: Weight, const R: usize, const OUTPUTS: usize>(
    (x, packed): (&[f32], &[Vector]),
    (w, next): (&[W], &[W]),
    width: usize,
    first: usize,
    y: &mut [f32],
    sums: &mut [V],
) {
    let n_outputs = y.len() / R;
    let n = w.len() / width;
    let n_tiles = n.div_ceil(OUTPUTS);
    let (packed, _) = packed.as_chunks::<R>();
    let (sums, _) = sums.as_chunks_mut::<OUTPUTS>();
    let n_whole = width / LANES;
    let n_part = n_whole.div_ceil(width.div_ceil(PART)).max(1);
    // One that is empty if rows have less than a vector.
    let n_parts = n_whole.div_ceil(n_part).max(1);
    let mut pieces = in_pieces(next, n_tiles * n_parts);
    for part in 0..n_parts {
        let part = part * n_part..((part + 1) * n_part).min(n_whole);
        let packed = &packed[part.clone()];
        for tile in 0..n_tiles {
            let at = tile * OUTPUTS;
            // The last output once more where there are no more.
            let outputs: [&[W]; OUTPUTS] =
                std::array::from_fn(|c| &w[(at + c).min(n - 1) * width..][..width]);
            let of_part = outputs.map(|w| &w.as_chunks().0[part.clone()]);
            let mut so_far = [[V::splat(0.0); OUTPUTS]; R];
            if part.start > 0 {
                so_far.copy_from_slice(&sums[tile * R..][..R]);
            }
            add_products(packed, of_part, pieces.next().unwrap_or(&[]), &mut so_far);
            if part.end < n_whole {
                sums[tile * R..][..R].copy_from_slice(&so_far);
                continue;
            }
            for sum in so_far.as_flattened_mut() {
                *sum = W::together(*sum);
            }
            let rows = std::array::from_fn(|r| &x[r * width..][..width]);
            let n = OUTPUTS.min(n - at);
            for (r, products) in finish(rows, outputs, so_far).iter().enumerate() {
                y[r * n_outputs + first + at..][..n].copy_from_slice(&products[..n]);
            }
        }
    }
}

/// `w` in up to `n` pieces, of whole lines of the caches.
fn in_pieces<W>(w: &[W], n: usize) -> slice::Chunks<'_, W> {
    w.chunks(w.len().div_ceil(n).next_multiple_of(LINE_BYTES / size_of::<W>()).max(1))
}

/// Adds the products of whole vectors. `next` is fetched into the second cache meanwhile, a little with each stretch of them.
#[inline(always)]
fn add_products<V: Lanes, W: Weight, const R: usize, const C: usize>(
    x: &[[Vector; R]],
    w: [&[[W; LANES]]; C],
    next: &[W],
    sums: &mut [[V; C]; R],
) {
    // Of its own, so that they stay in registers.
    let mut so_far = *sums;
    let mut lines = next.chunks(LINE_BYTES / size_of::<W>());
    // Short where there is much to ask for: a core has room for some ten requests.
    let n_stretch = (4 * x.len()).div_ceil(lines.len().max(1)).clamp(1, STRETCH);
    let n_at_once = lines.len().div_ceil(x.len().div_ceil(n_stretch).max(1));
    for (stretch, x) in x.chunks(n_stretch).enumerate() {
        for line in lines.by_ref().take(n_at_once) {
            V::ask_later(line.as_ptr());
        }
        let mut of_stretch: [&[[W; LANES]]; C] = [&[]; C];
        for c in 0..C {
            // Of one length, which the compiler sees: nothing is checked inside the loop.
            of_stretch[c] = &w[c][stretch * n_stretch..][..x.len()];
        }
        for at in 0..x.len() {
            for part in 0..V::PARTS {
                let mut of_part = [W::part::<V>(&of_stretch[0][at], part); C];
                for c in 1..C {
                    of_part[c] = W::part::<V>(&of_stretch[c][at], part);
                }
                for r in 0..R {
                    let x = V::load_part(&x[at][r].0, part);
                    for c in 0..C {
                        so_far[r][c].add_part(part, x, of_part[c]);
                    }
                }
            }
        }
    }
    *sums = so_far;
}

/// Scalar products of each of `x` with each of `w`, all of one length. With `AHEAD`, others follow `w` in memory, and a single
/// row waits for nothing else: they are asked for.
#[inline(always)]
pub(super) fn dots<V: Lanes, W: Weight, const R: usize, const C: usize, const AHEAD: bool>(
    x: [&[f32]; R],
    w: [&[W]; C],
) -> [[f32; C]; R] {
    let mut sums = [[V::splat(0.0); C]; R];
    // Of one length, which the compiler sees: nothing is checked inside the loop.
    let n = x[0].len() / LANES;
    let whole_x = x.map(|x| &x.as_chunks::<LANES>().0[..n]);
    let whole_w = w.map(|w| &w.as_chunks::<LANES>().0[..n]);
    for at in 0..n {
        for c in 0..C {
            if AHEAD {
                let here = whole_w[c][at].as_ptr();
                V::ask_soon(here.wrapping_add(NEAR_BYTES / size_of::<W>()));
                V::ask_later(here.wrapping_add(C * n * LANES));
            }
            let w = W::lanes::<V>(&whole_w[c][at]);
            for r in 0..R {
                sums[r][c] = V::load(&whole_x[r][at]).mul_add(w, sums[r][c]);
            }
        }
    }
    finish(x, w, sums)
}

/// The scalar products: sums of whole vectors, and what is left of all.
#[inline(always)]
fn finish<V: Lanes, W: Weight, const R: usize, const C: usize>(
    x: [&[f32]; R],
    w: [&[W]; C],
    mut sums: [[V; C]; R],
) -> [[f32; C]; R] {
    let x = x.map(|x| x.as_chunks::<LANES>().1);
    let w = w.map(|w| w.as_chunks::<LANES>().1);
    let mut products = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            if !x[r].is_empty() {
                let mut lanes = [0.0; LANES];
                sums[r][c].store(&mut lanes);
                for (lane, (x, w)) in lanes.iter_mut().zip(x[r].iter().zip(w[c])) {
                    *lane = x.mul_add(w.to_f32(), *lane);
                }
                sums[r][c] = V::load(&lanes);
            }
            products[r][c] = sums[r][c].reduce();
        }
    }
    products
}
