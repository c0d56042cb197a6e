//! AVX2 and FMA, without VNNI. `maddubs` multiplies unsigned with signed bytes and saturates at 16 bits.
//!
//! For a few rows int8 products take |x| and w, signed again, with x's sign: their pairs stay below 2 · 127². int4 numbers are
//! unsigned as they are stored, and eight of their pairs stay below 8 · 2 · 15 · 127, so that a block is summed in 16 bits.
//! For more rows a panel's numbers are widened to 16 bits once for all of them: a product and its sum are two instructions
//! then, where those of signed bytes are four.

use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};

use super::{
    BLOCK, BLOCKS, Bits, OUTPUTS, Panel, Part, Quantize, ROUNDER, Row, Rows, SCALES_BYTES, WIDE_ROWS,
    ahead::Ahead, gated,
};

#[target_feature(enable = "avx2,fma")]
pub(super) fn quantize(part: Part<'_>) {
    super::quantize::<Avx2>(part);
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn select(from: &Rows, rows: &[usize], to: &mut Rows) {
    super::select(from, rows, to);
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn gate(part: gated::Part<'_, '_>) {
    gated::gate::<Avx2>(part);
}

pub(super) struct Avx2;

#[expect(
    unsafe_code,
    reason = "sound: used after AVX2 was detected; 32 numbers are there, no access needs alignment"
)]
impl Quantize for Avx2 {
    #[inline(always)]
    fn largest(x: &[f32; BLOCK]) -> u32 {
        unsafe {
            let magnitudes = |at: usize| {
                _mm256_and_si256(_mm256_loadu_si256(x[at..].as_ptr().cast()), _mm256_set1_epi32(i32::MAX))
            };
            let first = _mm256_max_epu32(magnitudes(0), magnitudes(8));
            let all = _mm256_max_epu32(first, _mm256_max_epu32(magnitudes(16), magnitudes(24)));
            let four = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32::<0b01>(two))) as u32
        }
    }

    #[inline(always)]
    fn round(x: &[f32; BLOCK], inverse: f32, numbers: &mut [i8; BLOCK]) -> i32 {
        unsafe {
            let (inverse, rounder) = (_mm256_set1_ps(inverse), _mm256_set1_ps(ROUNDER));
            let round = |at: usize| {
                let x = _mm256_loadu_ps(x[at..].as_ptr());
                let rounded = _mm256_add_ps(_mm256_mul_ps(x, inverse), rounder);
                _mm256_sub_epi32(_mm256_castps_si256(rounded), _mm256_castps_si256(rounder))
            };
            let (a, b, c, d) = (round(0), round(8), round(16), round(24));
            // Packing goes by halves of registers: fours of bytes are put back in order.
            let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_storeu_si256(numbers.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(packed, order));
            let all = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
            let four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b01>(two)))
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; 32]) -> __m256i {
    #[expect(unsafe_code, reason = "sound: 32 bytes are there, and the load needs no alignment")]
    unsafe {
        _mm256_loadu_si256(bytes.as_ptr().cast())
    }
}

/// Of both blocks of a pair, once.
#[inline(always)]
fn ask_for_scales(ahead: Ahead, panel: Panel<'_>, block: usize) {
    if block.is_multiple_of(2) {
        ahead.ask_for(panel.scales_line(block));
    }
}

/// Groups of four neighbouring elements in a block.
const STEPS: usize = BLOCK / 4;

/// Both halves of a panel's outputs.
type Two = [__m256i; 2];

/// The scales of one block as f32.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn scales(bytes: &[u8; SCALES_BYTES]) -> [__m256; 2] {
    let all = load(bytes);
    let (low, high) = (_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
    [
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low))),
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high))),
    ]
}

/// Four neighbouring bytes of a row in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast([a, b, c, d]: [i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]))
}

/// Adds one block's dot products to a row's sums.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(y: &mut [f32; OUTPUTS], dots: Two, w_scales: [__m256; 2], x_scale: f32) {
    let x_scale = _mm256_set1_ps(x_scale);
    let (halves, _) = y.as_chunks_mut::<8>();
    for half in 0..2 {
        let scale = _mm256_mul_ps(w_scales[half], x_scale);
        #[expect(unsafe_code, reason = "sound: eight floats are there, and neither needs an alignment")]
        unsafe {
            let sum = _mm256_loadu_ps(halves[half].as_ptr());
            let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half]), scale, sum);
            _mm256_storeu_ps(halves[half].as_mut_ptr(), sum);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn add_products_8<const R: usize>(
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    let ahead = Ahead::avx2();
    let ones = _mm256_set1_epi16(1);
    let flip = _mm256_set1_epi8(-128);
    for block in blocks {
        ask_for_scales(ahead, panel, block);
        let mut dots: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        for (step, run) in panel.block(block).iter().enumerate() {
            ahead.ask_for(run);
            let (halves, _) = run.as_chunks::<32>();
            let w = [_mm256_xor_si256(load(&halves[0]), flip), _mm256_xor_si256(load(&halves[1]), flip)];
            for r in 0..R {
                let (steps, _) = x[r].numbers(block).as_chunks::<4>();
                let x = broadcast(steps[step % STEPS]);
                let magnitudes = _mm256_abs_epi8(x);
                for half in 0..2 {
                    let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(w[half], x));
                    dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        let w_scales = scales(panel.scales(block));
        for r in 0..R {
            add(&mut y[r], dots[r], w_scales, x[r].scale(block));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn add_products_4<const R: usize>(
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    let ahead = Ahead::avx2();
    let ones = _mm256_set1_epi16(1);
    let low_halves = _mm256_set1_epi8(0x0f);
    for block in blocks {
        ask_for_scales(ahead, panel, block);
        let mut pairs: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        for (at, run) in panel.block(block).iter().enumerate() {
            ahead.ask_for(run);
            let (halves, _) = run.as_chunks::<32>();
            let w = [load(&halves[0]), load(&halves[1])];
            let w = [
                [_mm256_and_si256(w[0], low_halves), _mm256_and_si256(w[1], low_halves)],
                [
                    _mm256_and_si256(_mm256_srli_epi16::<4>(w[0]), low_halves),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(w[1]), low_halves),
                ],
            ];
            for part in 0..2 {
                for r in 0..R {
                    let (steps, _) = x[r].numbers(block).as_chunks::<4>();
                    let x = broadcast(steps[(2 * at + part) % STEPS]);
                    for half in 0..2 {
                        let products = _mm256_maddubs_epi16(w[part][half], x);
                        pairs[r][half] = _mm256_add_epi16(pairs[r][half], products);
                    }
                }
            }
        }
        let w_scales = scales(panel.scales(block));
        for r in 0..R {
            let bias = _mm256_set1_epi32(x[r].biases(block)[1]);
            let dots = [
                _mm256_add_epi32(_mm256_madd_epi16(pairs[r][0], ones), bias),
                _mm256_add_epi32(_mm256_madd_epi16(pairs[r][1], ones), bias),
            ];
            add(&mut y[r], dots, w_scales, x[r].scale(block));
        }
    }
}

/// One block of a panel in 16 bits: for each pair of elements both halves of the outputs. There from when it is widened:
/// clearing it first took 3 % of a step of 16 rows.
type Wide = [MaybeUninit<Two>; BLOCK / 2];

/// Adds the products of [`WIDE_FROM`](super::WIDE_FROM) or more rows with a whole panel to `y`.
#[target_feature(enable = "avx2,fma")]
pub(super) fn add_products_wide(
    bits: Bits,
    x: &Rows,
    first_row: usize,
    panel: Panel<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    let ahead = Ahead::avx2();
    let mut wide: [Wide; BLOCKS] = [[MaybeUninit::uninit(); BLOCK / 2]; BLOCKS];
    let (groups, rest) = y.as_chunks_mut::<WIDE_ROWS>();
    let mut padded = [[0.0; OUTPUTS]; WIDE_ROWS];
    for first in (0..x.blocks).step_by(BLOCKS) {
        let blocks = first..(first + BLOCKS).min(x.blocks);
        for (block, wide) in blocks.clone().zip(&mut wide) {
            ask_for_scales(ahead, panel, block);
            match bits {
                Bits::Eight => widen_8(panel.block(block), ahead, wide),
                Bits::Four => widen_4(panel.block(block), ahead, wide),
            }
        }
        for (group, y) in groups.iter_mut().enumerate() {
            add_wide(x, first_row / WIDE_ROWS + group, y, &wide, panel, blocks.clone());
        }
        if !rest.is_empty() {
            add_wide(x, first_row / WIDE_ROWS + groups.len(), &mut padded, &wide, panel, blocks);
        }
    }
    rest.copy_from_slice(&padded[..rest.len()]);
}

/// Bytes of eight outputs, four of each → pairs of 16 bits of all eight: of elements 0 and 1, and of 2 and 3.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(bytes: __m256i) -> Two {
    let pairs = _mm256_setr_epi8(
        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, //
        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
    );
    let sorted = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(bytes, pairs));
    [
        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(sorted)),
        _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(sorted)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_8(block: &[[u8; 64]], ahead: Ahead, wide: &mut Wide) {
    let flip = _mm256_set1_epi8(-128);
    assert_eq!(block.len() * 2, wide.len(), "a block of int8");
    for (run, wide) in block.iter().zip(wide.as_chunks_mut::<2>().0) {
        ahead.ask_for(run);
        let (halves, _) = run.as_chunks::<32>();
        let low = widen(_mm256_xor_si256(load(&halves[0]), flip));
        let high = widen(_mm256_xor_si256(load(&halves[1]), flip));
        wide[0].write([low[0], high[0]]);
        wide[1].write([low[1], high[1]]);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_4(block: &[[u8; 64]], ahead: Ahead, wide: &mut Wide) {
    let low_halves = _mm256_set1_epi8(0x0f);
    let eight = _mm256_set1_epi8(8);
    assert_eq!(block.len() * 4, wide.len(), "a block of int4");
    for (run, wide) in block.iter().zip(wide.as_chunks_mut::<4>().0) {
        ahead.ask_for(run);
        let (halves, _) = run.as_chunks::<32>();
        let mut pairs: [Two; 4] = [[_mm256_setzero_si256(); 2]; 4];
        for half in 0..2 {
            let bytes = load(&halves[half]);
            let low = widen(_mm256_sub_epi8(_mm256_and_si256(bytes, low_halves), eight));
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low_halves);
            let high = widen(_mm256_sub_epi8(high, eight));
            for pair in 0..2 {
                pairs[pair][half] = low[pair];
                pairs[2 + pair][half] = high[pair];
            }
        }
        for (wide, pair) in wide.iter_mut().zip(pairs) {
            wide.write(pair);
        }
    }
}

/// Adds the products of some blocks to the sums of a group of rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_wide(
    x: &Rows,
    group: usize,
    y: &mut [[f32; OUTPUTS]; WIDE_ROWS],
    wide: &[Wide; BLOCKS],
    panel: Panel<'_>,
    blocks: Range<usize>,
) {
    let of_group = &x.wide[group * x.blocks..][..x.blocks];
    // A row that is only there to fill the group has no scale.
    let rows: [_; WIDE_ROWS] = std::array::from_fn(|r| {
        let row = group * WIDE_ROWS + r;
        (row < x.n_rows).then(|| x.row(row))
    });
    for (block, w) in blocks.zip(wide) {
        let mut dots: [Two; WIDE_ROWS] = [[_mm256_setzero_si256(); 2]; WIDE_ROWS];
        for (x, w) in of_group[block].iter().zip(w) {
            #[expect(
                unsafe_code,
                reason = "sound: both ways of widening fill all pairs of each of these blocks"
            )]
            let w = unsafe { w.assume_init_ref() };
            for r in 0..WIDE_ROWS {
                let x = _mm256_set1_epi32(x[r]);
                for half in 0..2 {
                    dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(x, w[half]));
                }
            }
        }
        let w_scales = scales(panel.scales(block));
        for r in 0..WIDE_ROWS {
            let x_scale = rows[r].map_or(0.0, |row| row.scale(block));
            add(&mut y[r], dots[r], w_scales, x_scale);
        }
    }
}
