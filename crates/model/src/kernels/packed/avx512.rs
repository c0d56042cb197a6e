//! AVX-512 with VNNI. `dpbusd` multiplies unsigned with signed bytes: a matrix's numbers are unsigned as they are stored, and
//! a block's dot product begins with what that adds too much.
//!
//! A panel is multiplied with a group of up to eight rows at once: their sums, which stay in registers from the first block
//! to the last, their dot products and what is multiplied fit 32 registers.

use std::arch::x86_64::*;

use super::{
    BLOCK, Bits, GROUP, Group, Line, Near, OUTPUTS, Panel, Part, Quantize, ROUNDER, Rows, SCALES_BYTES,
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

/// Rows from `first` on times the outputs of one panel → `y`, one a row. What is read `next` is fetched meanwhile, a little
/// with each block: a panel takes longer to come from memory than a group's products.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn rows_with_panel(
    bits: Bits,
    x: &Rows,
    first: usize,
    panel: Panel<'_>,
    Near { is_cold, next }: Near<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    let mut next = next.chunks(next.len().div_ceil(y.len().div_ceil(GROUP)).max(1));
    for (at, y) in y.chunks_mut(GROUP).enumerate() {
        let (x, next) = (x.group(first + at * GROUP), next.next().unwrap_or(&[]));
        let near = Near { is_cold: is_cold && at == 0, next };
        match bits {
            Bits::Eight => group_with_panel::<false>(x, panel, near, y),
            Bits::Four => group_with_panel::<true>(x, panel, near, y),
        }
    }
}

/// The same with one group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn group_with_panel<const FOUR: bool>(
    x: Group<'_>,
    panel: Panel<'_>,
    Near { is_cold, next }: Near<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    macro_rules! of {
        ($($n:literal)*) => {
            match (y.len(), is_cold) {
                $(($n, true) => products::<$n, FOUR, true>(x, panel, next, y),)*
                $(($n, false) => products::<$n, FOUR, false>(x, panel, next, y),)*
                (n, _) => unreachable!("{n} rows in a group"),
            }
        };
    }
    of!(1 2 3 4 5 6 7 8);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn products<const R: usize, const FOUR: bool, const COLD: bool>(
    x: Group<'_>,
    panel: Panel<'_>,
    next: &[Line],
    y: &mut [[f32; OUTPUTS]],
) {
    let low_halves = _mm512_set1_epi8(0x0f);
    let ahead = Ahead::avx512(if FOUR { Bits::Four } else { Bits::Eight });
    // Loops over `R`, not `map`: what is not inlined here is compiled without this function's instructions.
    let mut sums = [_mm512_setzero_ps(); R];
    let pair_lines = const { if FOUR { Bits::Four.pair_lines() } else { Bits::Eight.pair_lines() } };
    let (x_numbers, x_scales) = (x.numbers.as_chunks::<R>().0, x.scales.as_chunks::<R>().0);
    let mut next = next.chunks(next.len().div_ceil(x_scales.len().max(1)).max(1));
    let mut of_rows = x_numbers.iter().zip(x_scales).zip(x.biases.as_chunks::<R>().0);
    for lines in panel.lines.chunks_exact(pair_lines) {
        let Some((w_scales, lines)) = lines.split_first() else { return };
        ask_for::<COLD>(ahead, w_scales);
        let blocks = lines.chunks_exact(pair_lines / 2).zip(w_scales.as_chunks::<SCALES_BYTES>().0);
        for ((lines, w_scales), ((x, x_scales), biases)) in blocks.zip(&mut of_rows) {
            for line in next.next().unwrap_or(&[]) {
                ahead::ask_for::<_MM_HINT_T1>(line, 0);
            }
            let mut dots = [_mm512_setzero_si512(); R];
            for r in 0..R {
                dots[r] = _mm512_set1_epi32(biases[r][usize::from(FOUR)]);
            }
            for (at, line) in lines.iter().enumerate() {
                let w = load(line);
                ask_for::<COLD>(ahead, line);
                if FOUR {
                    let low = _mm512_and_si512(w, low_halves);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low_halves);
                    for r in 0..R {
                        let (steps, _) = x[r].as_chunks::<4>();
                        dots[r] = _mm512_dpbusd_epi32(dots[r], low, broadcast(steps[2 * at % STEPS]));
                        dots[r] = _mm512_dpbusd_epi32(dots[r], high, broadcast(steps[(2 * at + 1) % STEPS]));
                    }
                } else {
                    for r in 0..R {
                        dots[r] =
                            _mm512_dpbusd_epi32(dots[r], w, broadcast(x[r].as_chunks::<4>().0[at % STEPS]));
                    }
                }
            }
            let w_scales = scales(w_scales);
            for r in 0..R {
                let scale = _mm512_mul_ps(w_scales, _mm512_set1_ps(x_scales[r]));
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), scale, sums[r]);
            }
        }
    }
    for (y, sums) in y.iter_mut().zip(sums) {
        #[expect(unsafe_code, reason = "sound: sixteen floats are there, and the store needs no alignment")]
        unsafe {
            _mm512_storeu_ps(y.as_mut_ptr(), sums);
        }
    }
}
