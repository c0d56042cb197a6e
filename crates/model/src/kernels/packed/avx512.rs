//! AVX-512 with VNNI. `dpbusd` multiplies unsigned with signed bytes: int8 products take x + 128 and subtract 128 Σ w
//! again; int4 numbers are unsigned as they are stored.

use std::{arch::x86_64::*, ops::Range};

use super::{BLOCK, OUTPUTS, Panel, Row, SCALES_BYTES};

/// Groups of four neighbouring elements in a block.
const STEPS: usize = BLOCK / 4;

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

/// Four neighbouring numbers of a row in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(numbers: &[i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(numbers.map(|number| number as u8)))
}

/// Adds one block's dot products to a row's sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn add(y: &mut [f32; OUTPUTS], dot: __m512i, w_scales: __m512, x_scale: f32) {
    let scale = _mm512_mul_ps(w_scales, _mm512_set1_ps(x_scale));
    #[expect(unsafe_code, reason = "sound: sixteen floats are there, and neither needs an alignment")]
    unsafe {
        let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, _mm512_loadu_ps(y.as_ptr()));
        _mm512_storeu_ps(y.as_mut_ptr(), sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn add_products_8<const R: usize>(
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    let offset = _mm512_set1_epi8(-128);
    for block in blocks {
        let mut dots = [_mm512_setzero_si512(); R];
        let mut offsets = _mm512_setzero_si512();
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (step, w) in panel.block(block).iter().enumerate() {
            let w = load(w);
            offsets = _mm512_dpbusd_epi32(offsets, offset, w);
            for r in 0..R {
                let x = _mm512_xor_si512(broadcast(&steps[r][step % STEPS]), offset);
                dots[r] = _mm512_dpbusd_epi32(dots[r], x, w);
            }
        }
        let w_scales = scales(&panel.scales[block]);
        for r in 0..R {
            add(&mut y[r], _mm512_sub_epi32(dots[r], offsets), w_scales, x[r].scales[block]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn add_products_4<const R: usize>(
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    let low_halves = _mm512_set1_epi8(0x0f);
    for block in blocks {
        let mut dots = [_mm512_setzero_si512(); R];
        let steps = x.map(|row| row.numbers[block].as_chunks::<4>().0);
        for (run, w) in panel.block(block).iter().enumerate() {
            let w = load(w);
            let low = _mm512_and_si512(w, low_halves);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(w), low_halves);
            for r in 0..R {
                dots[r] = _mm512_dpbusd_epi32(dots[r], low, broadcast(&steps[r][2 * run % STEPS]));
                dots[r] = _mm512_dpbusd_epi32(dots[r], high, broadcast(&steps[r][(2 * run + 1) % STEPS]));
            }
        }
        let w_scales = scales(&panel.scales[block]);
        for r in 0..R {
            let offset = _mm512_set1_epi32(8 * x[r].sums[block]);
            add(&mut y[r], _mm512_sub_epi32(dots[r], offset), w_scales, x[r].scales[block]);
        }
    }
}
