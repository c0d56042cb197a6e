//! AVX-512 with VNNI. `dpbusd` multiplies unsigned with signed bytes: a matrix's numbers are unsigned as they are stored, and
//! a block's dot product begins with what that adds too much.
//!
//! A panel is multiplied with a group of up to eight rows at once, or two panels with up to seven, so that a core loads less than
//! it multiplies: their sums, which stay in registers from the first block to the last, their dot products and what is
//! multiplied fit 32 registers (of int4, but for a few that are stored for a while).

use std::arch::x86_64::*;

use super::{
    BLOCK, Bits, GROUP, Group, Line, OUTPUTS, PAIRED_ROWS, Part, Quantize, ROUNDER, Rows, SCALES_BYTES, Turn,
    ahead::{self, Ahead},
    gated,
};

/// How far ahead lines of a panel that is in the second cache are asked for.
const NEARER_BYTES: usize = 1024;
/// Groups of four neighbouring elements in a block.
const STEPS: usize = BLOCK / 4;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn quantize(part: Part<'_>) {
    super::quantize::<Avx512>(part);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn select(from: &Rows, rows: &[usize], to: &mut Rows) {
    super::select(from, rows, to);
}

pub(super) struct Avx512;

#[expect(
    unsafe_code,
    reason = "sound: used after AVX-512 was detected; 32 numbers are there, no access needs alignment"
)]
impl Quantize for Avx512 {
    #[inline(always)]
    fn largest(x: &[f32; BLOCK]) -> u32 {
        unsafe {
            let magnitudes = |x| _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi32(i32::MAX));
            let (low, high) = (magnitudes(x.as_ptr().cast()), magnitudes(x[16..].as_ptr().cast()));
            _mm512_reduce_max_epu32(_mm512_max_epu32(low, high))
        }
    }

    #[inline(always)]
    fn round(x: &[f32; BLOCK], inverse: f32, numbers: &mut [i8; BLOCK]) -> i32 {
        unsafe {
            let (inverse, rounder) = (_mm512_set1_ps(inverse), _mm512_set1_ps(ROUNDER));
            let round = |x| {
                let rounded = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(x), inverse), rounder);
                _mm512_sub_epi32(_mm512_castps_si512(rounded), _mm512_castps_si512(rounder))
            };
            let (low, high) = (round(x.as_ptr()), round(x[16..].as_ptr()));
            _mm_storeu_si128(numbers.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(low));
            _mm_storeu_si128(numbers[16..].as_mut_ptr().cast(), _mm512_cvtepi32_epi8(high));
            _mm512_reduce_add_epi32(_mm512_add_epi32(low, high))
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn gate(part: gated::Part<'_, '_>) {
    gated::gate::<Avx512>(part);
}

#[inline(always)]
pub(super) fn load(bytes: &Line) -> __m512i {
    #[expect(unsafe_code, reason = "sound: 64 bytes are there, and the load needs no alignment")]
    unsafe {
        _mm512_loadu_si512(bytes.as_ptr().cast())
    }
}

#[inline(always)]
fn ask_for<const COLD: bool>(ahead: Ahead, line: &Line) {
    if COLD {
        ahead.ask_for(line);
    } else {
        ahead::ask_for::<_MM_HINT_T0>(line, NEARER_BYTES);
    }
}

/// The scales of one block as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn scales(bytes: &[u8; SCALES_BYTES]) -> __m512 {
    #[expect(unsafe_code, reason = "sound: 32 bytes are there, and the load needs no alignment")]
    let halves = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

/// Four neighbouring numbers of a row in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast([a, b, c, d]: [i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))
}

/// Rows from `first` on times the outputs of some panels, one or two, which share what is loaded of the rows. What is read next
/// is fetched meanwhile, a little with each block: a panel takes longer to come from memory than a group's products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn rows_with_turns<const P: usize>(
    bits: Bits,
    x: &Rows,
    first: usize,
    mut turns: [Turn<'_, '_>; P],
) {
    let n_rows = turns[0].y.len();
    // Whole lines a block.
    let part =
        |lines: &[Line]| lines.len().div_ceil(n_rows.div_ceil(x.group).max(1)).next_multiple_of(x.blocks);
    let mut next = turns.each_ref().map(|Turn { near, .. }| near.next.chunks(part(near.next).max(1)));
    for start in (0..n_rows).step_by(x.group) {
        let (x, rows) = (x.group(first + start), start..(start + x.group).min(n_rows));
        let is_cold = start == 0 && turns[0].near.is_cold;
        let next = next.each_mut().map(|next| next.next().unwrap_or(&[]));
        let panels = turns.each_ref().map(|turn| turn.panel.lines);
        let y = turns.each_mut().map(|turn| &mut turn.y[rows.clone()]);
        match bits {
            Bits::Eight => group_with_panels::<P, { Bits::Eight.pair_lines() }>(x, is_cold, panels, next, y),
            Bits::Four => group_with_panels::<P, { Bits::Four.pair_lines() }>(x, is_cold, panels, next, y),
        }
    }
}

/// True if the sums and dot products of so many rows and panels leave four registers for what is multiplied.
const fn fits(rows: usize, panels: usize) -> bool {
    2 * rows * panels + 4 <= 32
}

const _: () = assert!(fits(GROUP, 1) && fits(PAIRED_ROWS, 2));

/// The same with one group. `PAIR` lines are two blocks of a panel, with their scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn group_with_panels<const P: usize, const PAIR: usize>(
    x: Group<'_>,
    is_cold: bool,
    panels: [&[Line]; P],
    next: [&[Line]; P],
    y: [&mut [[f32; OUTPUTS]]; P],
) {
    macro_rules! of {
        ($($n:literal)*) => {
            match (y[0].len(), is_cold) {
                $(($n, true) if const { fits($n, P) } => products::<$n, P, PAIR, true>(x, panels, next, y),)*
                $(($n, false) if const { fits($n, P) } => products::<$n, P, PAIR, false>(x, panels, next, y),)*
                (n, _) => unreachable!("{n} rows in a group"),
            }
        };
    }
    of!(1 2 3 4 5 6 7 8);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn products<const R: usize, const P: usize, const PAIR: usize, const COLD: bool>(
    x: Group<'_>,
    panels: [&[Line]; P],
    next: [&[Line]; P],
    y: [&mut [[f32; OUTPUTS]]; P],
) {
    let is_four = const { PAIR == Bits::Four.pair_lines() };
    let block_lines = const { PAIR / 2 };
    let low_halves = _mm512_set1_epi8(0x0f);
    let ahead = Ahead::avx512(if is_four { Bits::Four } else { Bits::Eight });
    let panels = panels.map(|lines| lines.as_chunks::<PAIR>().0);
    // Loops over `R` and `P`, not `map`: what is not inlined here is compiled without this function's instructions.
    let mut sums = [[_mm512_setzero_ps(); R]; P];
    let x_numbers = x.numbers.as_chunks::<R>().0.as_chunks::<2>().0;
    let x_scales = x.scales.as_chunks::<R>().0.as_chunks::<2>().0;
    let biases = x.biases.as_chunks::<R>().0.as_chunks::<2>().0;
    let n_next = next.map(|next| next.len().div_ceil(2 * x_numbers.len().max(1)));
    for (pair, ((x, x_scales), biases)) in x_numbers.iter().zip(x_scales).zip(biases).enumerate() {
        let mut pairs = [&[[0; 64]; PAIR]; P];
        for p in 0..P {
            pairs[p] = &panels[p][pair];
            ask_for::<COLD>(ahead, &pairs[p][0]);
        }
        for half in 0..2 {
            for (next, n) in next.iter().zip(n_next) {
                let next = next.as_ptr().wrapping_add((2 * pair + half) * n);
                for at in 0..n {
                    ahead::ask_for::<_MM_HINT_T1>(next.wrapping_add(at), 0);
                }
            }
            let mut dots = [[_mm512_setzero_si512(); R]; P];
            for r in 0..R {
                let bias = _mm512_set1_epi32(biases[half][r][usize::from(is_four)]);
                for dots in &mut dots {
                    dots[r] = bias;
                }
            }
            for at in 0..block_lines {
                let mut w = [_mm512_setzero_si512(); P];
                for p in 0..P {
                    let line = &pairs[p][1 + half * block_lines + at];
                    w[p] = load(line);
                    ask_for::<COLD>(ahead, line);
                }
                if is_four {
                    let mut high = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(w[p]), low_halves);
                        w[p] = _mm512_and_si512(w[p], low_halves);
                    }
                    multiply(&mut dots, w, &x[half], 2 * at);
                    multiply(&mut dots, high, &x[half], 2 * at + 1);
                } else {
                    multiply(&mut dots, w, &x[half], at);
                }
            }
            for p in 0..P {
                let w_scales = scales(&pairs[p][0].as_chunks().0[half]);
                for r in 0..R {
                    let scale = _mm512_mul_ps(w_scales, _mm512_set1_ps(x_scales[half][r]));
                    sums[p][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[p][r]), scale, sums[p][r]);
                }
            }
        }
    }
    for (y, sums) in y.into_iter().zip(sums) {
        for (y, sums) in y.iter_mut().zip(sums) {
            #[expect(
                unsafe_code,
                reason = "sound: sixteen floats are there, and the store needs no alignment"
            )]
            unsafe {
                _mm512_storeu_ps(y.as_mut_ptr(), sums);
            }
        }
    }
}

/// Adds the products of four numbers of each panel's outputs with those of each row.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply<const R: usize, const P: usize>(
    dots: &mut [[__m512i; R]; P],
    w: [__m512i; P],
    x: &[[i8; BLOCK]; R],
    step: usize,
) {
    for r in 0..R {
        let x = broadcast(x[r].as_chunks::<4>().0[step % STEPS]);
        for p in 0..P {
            dots[p][r] = _mm512_dpbusd_epi32(dots[p][r], w[p], x);
        }
    }
}
