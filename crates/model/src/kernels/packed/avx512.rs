//! AVX-512 with VNNI. `dpbusd` multiplies unsigned with signed bytes: int8 products take x + 128 and subtract 128 Σ w
//! again; int4 numbers are unsigned as they are stored.

use std::arch::x86_64::*;

use super::{BLOCK, OUTPUTS, Panel, Row, SCALES_BYTES, Sums};

#[inline(always)]
fn load(bytes: &[u8; 64]) -> __m512i {
    #[expect(unsafe_code, reason = "sound: 64 bytes are there, and the load needs no alignment")]
    unsafe {
        _mm512_loadu_si512(bytes.as_ptr().cast())
    }
}

/// The scales of one block as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn scales(bytes: &[u8; SCALES_BYTES]) -> __m512 {
    #[expect(unsafe_code, reason = "sound: 32 bytes are there, and the load needs no alignment")]
    let halves = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn store<const R: usize>(sums: [__m512; R]) -> Sums<R> {
    sums.map(|sums| {
        let mut row = [0.0; OUTPUTS];
        #[expect(unsafe_code, reason = "sound: sixteen floats are there, and the store needs no alignment")]
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), sums);
        }
        row
    })
}

/// Four neighbouring numbers of a row in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(numbers: &[i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(numbers.map(|number| number as u8)))
}

/// Adds one block's dot products to a sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn add(sum: &mut __m512, dot: __m512i, w_scales: __m512, x_scale: f32) {
    let scale = _mm512_mul_ps(w_scales, _mm512_set1_ps(x_scale));
    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, *sum);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn sums_8<const R: usize>(x: [Row<'_>; R], panel: Panel<'_>) -> Sums<R> {
    let offset = _mm512_set1_epi8(-128);
    let mut sums = [_mm512_setzero_ps(); R];
    let blocks = panel.numbers.as_chunks::<{ BLOCK * OUTPUTS }>().0;
    for (block, (numbers, w_scales)) in blocks.iter().zip(panel.scales).enumerate() {
        let mut dots = [_mm512_setzero_si512(); R];
        let mut offsets = _mm512_setzero_si512();
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (step, w) in numbers.as_chunks::<64>().0.iter().enumerate() {
            let w = load(w);
            offsets = _mm512_dpbusd_epi32(offsets, offset, w);
            for r in 0..R {
                let x = _mm512_xor_si512(broadcast(&steps[r][step]), offset);
                dots[r] = _mm512_dpbusd_epi32(dots[r], x, w);
            }
        }
        let w_scales = scales(w_scales);
        for r in 0..R {
            add(&mut sums[r], _mm512_sub_epi32(dots[r], offsets), w_scales, x[r].scales[block]);
        }
    }
    store(sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn sums_4<const R: usize>(x: [Row<'_>; R], panel: Panel<'_>) -> Sums<R> {
    let low_halves = _mm512_set1_epi8(0x0f);
    let mut sums = [_mm512_setzero_ps(); R];
    let blocks = panel.numbers.as_chunks::<{ BLOCK * OUTPUTS / 2 }>().0;
    for (block, (numbers, w_scales)) in blocks.iter().zip(panel.scales).enumerate() {
        let mut dots = [_mm512_setzero_si512(); R];
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (run, w) in numbers.as_chunks::<64>().0.iter().enumerate() {
            let w = load(w);
            let low = _mm512_and_si512(w, low_halves);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low_halves);
            for r in 0..R {
                dots[r] = _mm512_dpbusd_epi32(dots[r], low, broadcast(&steps[r][2 * run]));
                dots[r] = _mm512_dpbusd_epi32(dots[r], high, broadcast(&steps[r][2 * run + 1]));
            }
        }
        let w_scales = scales(w_scales);
        for r in 0..R {
            let offset = _mm512_set1_epi32(8 * x[r].sums[block]);
            add(&mut sums[r], _mm512_sub_epi32(dots[r], offset), w_scales, x[r].scales[block]);
        }
    }
    store(sums)
}
