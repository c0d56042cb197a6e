//! Rows times a stored matrix, f32 or bf16: every product is summed in sixteen lanes, whichever rows and outputs share a
//! register block with it.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::{
    Isa,
    lanes::{LANES, Lanes, Portable},
};

/// How far ahead of what is read the first cache has it.
const NEAR_BYTES: usize = 512;

/// So much of a matrix meets all rows before the next part does: it stays in a core's second cache.
const BLOCK_BYTES: usize = 128 << 10;

/// A stored number, read as f32 exactly.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;

    fn lanes<V: Lanes>(w: &[Self; LANES]) -> V;
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
}

/// `x` `[rows, width]` times `w` `[outputs, width]` transposed → `y` `[rows, outputs]`.
pub(crate) fn matmul<W: Weight>(isa: Isa, x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2<W: Weight>(x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
        matmul_with::<Avx2, W, 3, 2>(x, w, width, y);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
    fn avx512<W: Weight>(x: &[f32], w: &[W], width: usize, y: &mut [f32]) {
        if x.len() == width {
            // One row waits for memory alone, and for eight streams of it least.
            return stripe::<Avx512, W, 1, 8>(x, w, width, 0, y);
        }
        matmul_with::<Avx512, W, 4, 4>(x, w, width, y);
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: `Isa::Avx2` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { avx2(x, w, width, y) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512(x, w, width, y) },
        _ => matmul_with::<Portable, W, 3, 2>(x, w, width, y),
    }
}

/// The same with register blocks of up to `ROWS` rows and `OUTPUTS` outputs.
#[inline(always)]
fn matmul_with<V: Lanes, W: Weight, const ROWS: usize, const OUTPUTS: usize>(
    x: &[f32],
    w: &[W],
    width: usize,
    y: &mut [f32],
) {
    const { assert!(ROWS <= 8) }
    let n_outputs = w.len() / width;
    if n_outputs == 0 {
        return;
    }
    let n_block = (BLOCK_BYTES / (width * size_of::<W>())).next_multiple_of(OUTPUTS).max(OUTPUTS);
    for (block, w) in w.chunks(n_block * width).enumerate() {
        for (x, y) in x.chunks(ROWS * width).zip(y.chunks_mut(ROWS * n_outputs)) {
            macro_rules! stripe_of {
                ($($n:literal)*) => {
                    match y.len() / n_outputs {
                        $($n if $n <= ROWS => stripe::<V, W, $n, OUTPUTS>(x, w, width, block * n_block, y),)*
                        n => unreachable!("{n} rows in a block"),
                    }
                };
            }
            stripe_of!(1 2 3 4 5 6 7 8);
        }
    }
}

/// A few rows times some outputs, of which the first is the `first` of `y`.
#[inline(always)]
fn stripe<V: Lanes, W: Weight, const R: usize, const OUTPUTS: usize>(
    x: &[f32],
    w: &[W],
    width: usize,
    first: usize,
    y: &mut [f32],
) {
    let x: [&[f32]; R] = std::array::from_fn(|row| &x[row * width..][..width]);
    let n_outputs = y.len() / R;
    let output = |output: usize| &w[output * width..][..width];
    let n = w.len() / width;
    let mut at = 0;
    while at + OUTPUTS <= n {
        let products = dots::<V, W, R, OUTPUTS, true>(x, std::array::from_fn(|next| output(at + next)));
        for (r, products) in products.into_iter().enumerate() {
            y[r * n_outputs + first + at..][..OUTPUTS].copy_from_slice(&products);
        }
        at += OUTPUTS;
    }
    for at in at..n {
        for (r, [product]) in dots::<V, W, R, 1, false>(x, [output(at)]).into_iter().enumerate() {
            y[r * n_outputs + first + at] = product;
        }
    }
}

/// Scalar products of each of `x` with each of `w`, all of one length. With `AHEAD`, others follow `w` in memory, and a single
/// row waits for nothing else: they are asked for.
#[inline(always)]
pub(super) fn dots<V: Lanes, W: Weight, const R: usize, const C: usize, const AHEAD: bool>(
    x: [&[f32]; R],
    w: [&[W]; C],
) -> [[f32; C]; R] {
    let mut sums = [[V::splat(0.0); C]; R];
    let x = x.map(|x| x.as_chunks::<LANES>());
    let w = w.map(|w| w.as_chunks::<LANES>());
    // Of one length, which the compiler sees: nothing is checked inside the loop.
    let n = x[0].0.len();
    let (whole_x, whole_w) = (x.map(|x| &x.0[..n]), w.map(|w| &w.0[..n]));
    for at in 0..n {
        for c in 0..C {
            if AHEAD && R == 1 {
                let here = whole_w[c][at].as_ptr();
                V::ask_for(here.wrapping_add(NEAR_BYTES / size_of::<W>()), here.wrapping_add(C * n * LANES));
            }
            let w = W::lanes::<V>(&whole_w[c][at]);
            for r in 0..R {
                sums[r][c] = V::load(&whole_x[r][at]).mul_add(w, sums[r][c]);
            }
        }
    }
    let mut products = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            if !x[r].1.is_empty() {
                let mut lanes = [0.0; LANES];
                sums[r][c].store(&mut lanes);
                for (lane, (x, w)) in lanes.iter_mut().zip(x[r].1.iter().zip(w[c].1)) {
                    *lane = x.mul_add(w.to_f32(), *lane);
                }
                sums[r][c] = V::load(&lanes);
            }
            products[r][c] = sums[r][c].reduce();
        }
    }
    products
}
