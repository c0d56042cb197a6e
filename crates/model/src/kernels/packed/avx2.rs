//! AVX2 and FMA, without VNNI. `maddubs` multiplies unsigned with signed bytes and saturates at 16 bits.
//!
//! For a few rows int8 products take |x| and w, signed again, with x's sign: their pairs stay below 2 · 127². int4 numbers are
//! unsigned as they are stored, and eight of their pairs stay below 8 · 2 · 15 · 127, so that a block is summed in 16 bits.
//! For more rows a panel's numbers are laid out once for all of them. int8 becomes 16 bits wide: sixteen products and their sums
//! are two instructions then, and no sign is moved. int4 becomes bytes, whose products and sums are two instructions for
//! thirty-two.

use std::{arch::x86_64::*, mem::MaybeUninit, ops::Range};

use super::{
    BLOCK, Biases, Bits, GROUP, Line, OUTPUTS, Panel, Part, Quantize, ROUNDER, Row, Rows, SCALES_BYTES,
    WIDE_ROWS, ahead::Ahead, gated,
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
    y: &mut [[f32; OUTPUTS]],
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
    y: &mut [[f32; OUTPUTS]],
) {
    let ahead = Ahead::avx2();
    for block in blocks {
        ask_for_scales(ahead, panel, block);
        let numbers = x.map(|x| *x.numbers(block));
        let mut pairs: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        for (at, run) in panel.block(block).iter().enumerate() {
            ahead.ask_for(run);
            for (part, w) in unsigned_4(run).into_iter().enumerate() {
                add_pairs(&mut pairs, &numbers, 2 * at + part, w);
            }
        }
        let w_scales = scales(panel.scales(block));
        for r in 0..R {
            add(&mut y[r], dots_4(pairs[r], x[r].biases(block)), w_scales, x[r].scale(block));
        }
    }
}

/// A line's numbers as bytes that are 8 too large: its low halves, and its high ones.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned_4(line: &[u8; 64]) -> [Two; 2] {
    let low_halves = _mm256_set1_epi8(0x0f);
    let (halves, _) = line.as_chunks::<32>();
    let w = [load(&halves[0]), load(&halves[1])];
    [
        [_mm256_and_si256(w[0], low_halves), _mm256_and_si256(w[1], low_halves)],
        [
            _mm256_and_si256(_mm256_srli_epi16::<4>(w[0]), low_halves),
            _mm256_and_si256(_mm256_srli_epi16::<4>(w[1]), low_halves),
        ],
    ]
}

/// Adds the products of four neighbouring numbers of each row and output, two and two, in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs<const R: usize>(pairs: &mut [Two; R], x: &[[i8; BLOCK]; R], step: usize, w: Two) {
    for r in 0..R {
        let x = broadcast(x[r].as_chunks::<4>().0[step % STEPS]);
        for half in 0..2 {
            pairs[r][half] = _mm256_add_epi16(pairs[r][half], _mm256_maddubs_epi16(w[half], x));
        }
    }
}

/// Of a block's sums of unsigned int4.
#[inline]
#[target_feature(enable = "avx2")]
fn dots_4(pairs: Two, [_, bias]: Biases) -> Two {
    let (ones, bias) = (_mm256_set1_epi16(1), _mm256_set1_epi32(bias));
    [
        _mm256_add_epi32(_mm256_madd_epi16(pairs[0], ones), bias),
        _mm256_add_epi32(_mm256_madd_epi16(pairs[1], ones), bias),
    ]
}

/// One block of a panel as it meets many rows: pairs of 16 bits of int8, four bytes of int4, of both halves of the outputs.
/// There from when it is laid out: clearing it first took 3 % of a step of 16 rows.
type LaidOut = [MaybeUninit<Two>; BLOCK / 2];

/// Blocks of a panel that are laid out at a time: 16 KiB.
const BLOCKS: usize = 16;

/// True of so many rows that it pays to lay a panel out for them.
pub(super) const fn are_many(bits: Bits, n_rows: usize) -> bool {
    n_rows
        > match bits {
            Bits::Eight => GROUP,
            Bits::Four => 3,
        }
}

/// [Many](are_many) rows of `x` from `first` on, the first of a group, times the outputs of a panel.
#[target_feature(enable = "avx2,fma")]
pub(super) fn rows_with_panel(
    bits: Bits,
    x: &Rows,
    first: usize,
    panel: Panel<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    match bits {
        Bits::Eight => many_rows::<false>(x, first, panel, y),
        Bits::Four => many_rows::<true>(x, first, panel, y),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn many_rows<const IS_FOUR: bool>(x: &Rows, first: usize, panel: Panel<'_>, y: &mut [[f32; OUTPUTS]]) {
    let ahead = Ahead::avx2();
    y.fill([0.0; OUTPUTS]);
    let mut laid_out: [LaidOut; BLOCKS] = [[MaybeUninit::uninit(); BLOCK / 2]; BLOCKS];
    for start in (0..x.blocks).step_by(BLOCKS) {
        let blocks = start..(start + BLOCKS).min(x.blocks);
        for (block, laid_out) in blocks.clone().zip(&mut laid_out) {
            ask_for_scales(ahead, panel, block);
            lay_out::<IS_FOUR>(panel.block(block), ahead, laid_out);
        }
        for (group, y) in y.chunks_mut(WIDE_ROWS).enumerate() {
            let of = (x, first + group * WIDE_ROWS, panel);
            match y.len() {
                1 => group_with_blocks::<1, IS_FOUR>(of, blocks.clone(), &laid_out, y),
                2 => group_with_blocks::<2, IS_FOUR>(of, blocks.clone(), &laid_out, y),
                3 => group_with_blocks::<3, IS_FOUR>(of, blocks.clone(), &laid_out, y),
                4 => group_with_blocks::<4, IS_FOUR>(of, blocks.clone(), &laid_out, y),
                n => unreachable!("{n} rows in a group"),
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn lay_out<const IS_FOUR: bool>(block: &[Line], ahead: Ahead, to: &mut LaidOut) {
    let flip = _mm256_set1_epi8(-128);
    let (to, _) = to[..2 * block.len()].as_chunks_mut::<2>();
    for (line, to) in block.iter().zip(to) {
        ahead.ask_for(line);
        let [low, high] = if IS_FOUR {
            unsigned_4(line)
        } else {
            let (halves, _) = line.as_chunks::<32>();
            let first = widen(_mm256_xor_si256(load(&halves[0]), flip));
            let second = widen(_mm256_xor_si256(load(&halves[1]), flip));
            [[first[0], second[0]], [first[1], second[1]]]
        };
        to[0].write(low);
        to[1].write(high);
    }
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

/// Adds the products of some blocks to the sums of a group of rows.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn group_with_blocks<const R: usize, const IS_FOUR: bool>(
    (x, first, panel): (&Rows, usize, Panel<'_>),
    blocks: Range<usize>,
    laid_out: &[LaidOut; BLOCKS],
    y: &mut [[f32; OUTPUTS]],
) {
    let group = x.group(first);
    let numbers = &group.numbers.as_chunks::<R>().0[blocks.clone()];
    let scales = &group.scales.as_chunks::<R>().0[blocks.clone()];
    let biases = &group.biases.as_chunks::<R>().0[blocks.clone()];
    let wide = if IS_FOUR { &[] } else { &x.wide[first / WIDE_ROWS * x.blocks..][blocks.clone()] };
    let of_blocks = numbers.iter().zip(scales).zip(biases).zip(laid_out);
    for (at, (block, (((numbers, x_scales), biases), w))) in blocks.zip(of_blocks).enumerate() {
        // As many as there are: see `Panel`.
        #[expect(unsafe_code, reason = "sound: a block's lines were laid out, two for each")]
        let w = unsafe { w[..2 * panel.block_lines].assume_init_ref() };
        let mut dots: [Two; R] = [[_mm256_setzero_si256(); 2]; R];
        if IS_FOUR {
            for (at, w) in w.as_chunks::<2>().0.iter().enumerate() {
                add_pairs(&mut dots, numbers, 2 * at, w[0]);
                add_pairs(&mut dots, numbers, 2 * at + 1, w[1]);
            }
            for r in 0..R {
                dots[r] = dots_4(dots[r], biases[r]);
            }
        } else {
            for (x, w) in wide[at].as_chunks::<2>().0.iter().zip(w.as_chunks::<2>().0) {
                for (x, w) in x.iter().zip(w) {
                    for r in 0..R {
                        let x = _mm256_set1_epi32(x[r]);
                        for half in 0..2 {
                            dots[r][half] = _mm256_add_epi32(dots[r][half], _mm256_madd_epi16(x, w[half]));
                        }
                    }
                }
            }
        }
        let w_scales = self::scales(panel.scales(block));
        for r in 0..R {
            add(&mut y[r], dots[r], w_scales, x_scales[r]);
        }
    }
}
