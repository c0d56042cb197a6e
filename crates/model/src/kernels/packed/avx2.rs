//! AVX2 and FMA, without VNNI. `maddubs` multiplies unsigned with signed bytes and saturates at 16 bits: int8 products
//! take |x| and w with x's sign, whose pairs stay below 2 · 127²; int4 numbers are unsigned as they are stored, and
//! eight of their pairs stay below 8 · 2 · 15 · 127, so that a whole block is summed in 16 bits.

use std::arch::x86_64::*;

use super::{BLOCK, OUTPUTS, Panel, Row, Rows, SCALES_BYTES, Sums};

#[target_feature(enable = "avx2,fma")]
pub(super) fn quantize(x: &[f32], width: usize) -> Rows {
    // The same code: the compiler makes vectors of it.
    super::quantize(x, width)
}

#[inline(always)]
fn load(bytes: &[u8; 32]) -> __m256i {
    #[expect(unsafe_code, reason = "sound: 32 bytes are there, and the load needs no alignment")]
    unsafe {
        _mm256_loadu_si256(bytes.as_ptr().cast())
    }
}

/// Both halves of a panel's outputs.
type Two = [__m256i; 2];

/// The scales of one block as f32.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scales(bytes: &[u8; SCALES_BYTES]) -> [__m256; 2] {
    let all = load(bytes);
    [_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all)]
        .map(|half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn store<const R: usize>(sums: [[__m256; 2]; R]) -> Sums<R> {
    sums.map(|halves| {
        let mut row = [0.0; OUTPUTS];
        for (half, out) in halves.into_iter().zip(row.as_chunks_mut::<8>().0) {
            #[expect(unsafe_code, reason = "sound: eight floats are there, and the store needs no alignment")]
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), half);
            }
        }
        row
    })
}

/// Four neighbouring numbers of a row in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(numbers: &[i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes(numbers.map(|number| number as u8)))
}

/// Adds one block's dot products to the sums.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(sums: &mut [__m256; 2], dots: Two, w_scales: [__m256; 2], x_scale: f32) {
    let x_scale = _mm256_set1_ps(x_scale);
    for ((sum, dot), w_scale) in sums.iter_mut().zip(dots).zip(w_scales) {
        *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(w_scale, x_scale), *sum);
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn sums_8<const R: usize>(x: [Row<'_>; R], panel: Panel<'_>) -> Sums<R> {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let blocks = panel.numbers.as_chunks::<{ BLOCK * OUTPUTS }>().0;
    for (block, (numbers, w_scales)) in blocks.iter().zip(panel.scales).enumerate() {
        let mut dots: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (step, w) in numbers.as_chunks::<64>().0.iter().enumerate() {
            let w = w.as_chunks::<32>().0;
            let w = [load(&w[0]), load(&w[1])];
            for r in 0..R {
                let x = broadcast(&steps[r][step]);
                let magnitude = _mm256_abs_epi8(x);
                for half in 0..2 {
                    let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(w[half], x));
                    dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        let w_scales = scales(w_scales);
        for r in 0..R {
            add(&mut sums[r], dots[r], w_scales, x[r].scales[block]);
        }
    }
    store(sums)
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn sums_4<const R: usize>(x: [Row<'_>; R], panel: Panel<'_>) -> Sums<R> {
    let ones = _mm256_set1_epi16(1);
    let low_halves = _mm256_set1_epi8(0x0f);
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let blocks = panel.numbers.as_chunks::<{ BLOCK * OUTPUTS / 2 }>().0;
    for (block, (numbers, w_scales)) in blocks.iter().zip(panel.scales).enumerate() {
        let mut pairs: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (run, w) in numbers.as_chunks::<64>().0.iter().enumerate() {
            let w = w.as_chunks::<32>().0;
            let w = [load(&w[0]), load(&w[1])];
            let low = w.map(|w| _mm256_and_si256(w, low_halves));
            let high = w.map(|w| _mm256_and_si256(_mm256_srli_epi16::<4>(w), low_halves));
            for r in 0..R {
                for (w, step) in [(low, 2 * run), (high, 2 * run + 1)] {
                    let x = broadcast(&steps[r][step]);
                    for half in 0..2 {
                        let products = _mm256_maddubs_epi16(w[half], x);
                        pairs[r][half] = _mm256_add_epi16(pairs[r][half], products);
                    }
                }
            }
        }
        let w_scales = scales(w_scales);
        for r in 0..R {
            let offset = _mm256_set1_epi32(8 * x[r].sums[block]);
            let dots = pairs[r].map(|pairs| _mm256_sub_epi32(_mm256_madd_epi16(pairs, ones), offset));
            add(&mut sums[r], dots, w_scales, x[r].scales[block]);
        }
    }
    store(sums)
}
