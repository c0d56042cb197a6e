//! NEON with the dot products of ARMv8.2. `sdot` multiplies signed with signed bytes, a vector with the same four of another
//! one in each lane. A matrix's int8 numbers, which are unsigned as they are stored, are made signed; int4 numbers are both,
//! and a block's dot product begins with what their 8 adds too much.
//!
//! A panel is multiplied with a group of up to eight rows at once. From five rows on it is one half of its outputs after the
//! other: the dot products and what is multiplied then fit 32 registers, and a vector that is made signed serves all rows.

use std::arch::{aarch64::*, asm};

use super::{BLOCK, Bits, GROUP, Group, Line, OUTPUTS, Panel, Rows, SCALES_BYTES};

/// Outputs of a vector.
const LANES: usize = 4;

/// Vectors of a panel's outputs.
const VECTORS: usize = OUTPUTS / LANES;

/// Adds, for each output, four numbers of `w` times four of `x`, the same for all outputs: those of lane `LANE`.
///
/// Written in assembly: the intrinsic is not stable.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(in crate::kernels) fn sdot<const LANE: usize>(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    const { assert!(LANE < LANES) }
    let mut sum = sum;
    #[expect(unsafe_code, reason = "sound: an instruction that is enabled here, from registers to one")]
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; 16]) -> uint8x16_t {
    #[expect(unsafe_code, reason = "sound: 16 bytes are there, and the load needs no alignment")]
    unsafe {
        vld1q_u8(bytes.as_ptr())
    }
}

/// Part `part` of `V` vectors of a line.
#[inline]
#[target_feature(enable = "neon")]
fn load_part<const V: usize>(line: &Line, part: usize) -> [uint8x16_t; V] {
    let bytes = &line.as_chunks::<16>().0.as_chunks::<V>().0[part];
    let mut vectors = [vdupq_n_u8(0); V];
    for v in 0..V {
        vectors[v] = load(&bytes[v]);
    }
    vectors
}

/// The scales of one block as f32.
#[inline]
#[target_feature(enable = "neon")]
fn scales<const V: usize>(bytes: &[u8; SCALES_BYTES], part: usize) -> [float32x4_t; V] {
    let halves = &bytes.as_chunks::<{ 2 * LANES }>().0.as_chunks::<V>().0[part];
    let mut scales = [vdupq_n_f32(0.0); V];
    for v in 0..V {
        #[expect(unsafe_code, reason = "sound: 8 bytes are there, and the load needs no alignment")]
        let halves = unsafe { vld1_u8(halves[v].as_ptr()) };
        scales[v] = vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(halves)));
    }
    scales
}

/// Rows from `first` on times the outputs of one panel → `y`, one a row.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn rows_with_panel(
    bits: Bits,
    x: &Rows,
    first: usize,
    panel: Panel<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    for (at, y) in y.chunks_mut(GROUP).enumerate() {
        let x = x.group(first + at * GROUP);
        match bits {
            Bits::Eight => group_with_panel::<false>(x, panel, y),
            Bits::Four => group_with_panel::<true>(x, panel, y),
        }
    }
}

/// The same with one group.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn group_with_panel<const FOUR: bool>(x: Group<'_>, panel: Panel<'_>, y: &mut [[f32; OUTPUTS]]) {
    match y.len() {
        1 => products::<1, VECTORS, FOUR>(x, panel, y),
        2 => products::<2, VECTORS, FOUR>(x, panel, y),
        3 => products::<3, VECTORS, FOUR>(x, panel, y),
        4 => products::<4, VECTORS, FOUR>(x, panel, y),
        5 => products::<5, { VECTORS / 2 }, FOUR>(x, panel, y),
        6 => products::<6, { VECTORS / 2 }, FOUR>(x, panel, y),
        7 => products::<7, { VECTORS / 2 }, FOUR>(x, panel, y),
        8 => products::<8, { VECTORS / 2 }, FOUR>(x, panel, y),
        n => unreachable!("{n} rows in a group"),
    }
}

/// `R` rows, `V` vectors of outputs at a time.
#[target_feature(enable = "neon,dotprod")]
fn products<const R: usize, const V: usize, const FOUR: bool>(
    x: Group<'_>,
    panel: Panel<'_>,
    y: &mut [[f32; OUTPUTS]],
) {
    // Loops over `R` and `V`, not `map`: what is not inlined here is compiled without this function's instructions.
    let mut sums = [[vdupq_n_f32(0.0); VECTORS]; R];
    let pair_lines = const { if FOUR { Bits::Four.pair_lines() } else { Bits::Eight.pair_lines() } };
    let (x_numbers, x_scales) = (x.numbers.as_chunks::<R>().0, x.scales.as_chunks::<R>().0);
    let mut of_rows = x_numbers.iter().zip(x_scales).zip(x.biases.as_chunks::<R>().0);
    for lines in panel.lines.chunks_exact(pair_lines) {
        let Some((w_scales, lines)) = lines.split_first() else { return };
        let blocks = lines.chunks_exact(pair_lines / 2).zip(w_scales.as_chunks::<SCALES_BYTES>().0);
        for ((lines, w_scales), ((x, x_scales), biases)) in blocks.zip(&mut of_rows) {
            for part in 0..VECTORS / V {
                let mut dots = [[vdupq_n_s32(0); V]; R];
                if FOUR {
                    for r in 0..R {
                        dots[r] = [vdupq_n_s32(biases[r][1]); V];
                    }
                    add_4(x, lines, part, &mut dots);
                } else {
                    add_8(x, lines, part, &mut dots);
                }
                let w_scales = scales::<V>(w_scales, part);
                for r in 0..R {
                    let sums = &mut sums[r].as_chunks_mut::<V>().0[part];
                    for v in 0..V {
                        let scale = vmulq_n_f32(w_scales[v], x_scales[r]);
                        sums[v] = vfmaq_f32(sums[v], vcvtq_f32_s32(dots[r][v]), scale);
                    }
                }
            }
        }
    }
    for (y, sums) in y.iter_mut().zip(&sums) {
        for (y, sums) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            #[expect(unsafe_code, reason = "sound: four floats are there, and the store needs no alignment")]
            unsafe {
                vst1q_f32(y.as_mut_ptr(), *sums);
            }
        }
    }
}

/// Sixteen numbers of each row, from number `16 * at` of the block on.
#[inline]
#[target_feature(enable = "neon")]
fn of_rows<const R: usize>(x: &[[i8; BLOCK]; R], at: usize) -> [int8x16_t; R] {
    let mut vectors = [vdupq_n_s8(0); R];
    for r in 0..R {
        let numbers = &x[r].as_chunks::<16>().0[at];
        #[expect(unsafe_code, reason = "sound: 16 bytes are there, and the load needs no alignment")]
        unsafe {
            vectors[r] = vld1q_s8(numbers.as_ptr());
        }
    }
    vectors
}

/// Adds the products of four numbers of each output with those of each row.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add<const LANE: usize, const R: usize, const V: usize>(
    w: [int8x16_t; V],
    x: &[int8x16_t; R],
    dots: &mut [[int32x4_t; V]; R],
) {
    for v in 0..V {
        for r in 0..R {
            dots[r][v] = sdot::<LANE>(dots[r][v], w[v], x[r]);
        }
    }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_8<const R: usize, const V: usize>(
    x: &[[i8; BLOCK]; R],
    lines: &[Line],
    part: usize,
    dots: &mut [[int32x4_t; V]; R],
) {
    for (at, [a, b, c, d]) in lines.as_chunks::<4>().0.iter().enumerate() {
        let x = of_rows(x, at % 2);
        add::<0, R, V>(signed(load_part(a, part)), &x, dots);
        add::<1, R, V>(signed(load_part(b, part)), &x, dots);
        add::<2, R, V>(signed(load_part(c, part)), &x, dots);
        add::<3, R, V>(signed(load_part(d, part)), &x, dots);
    }
}

/// What is stored as a number plus 128 → the number.
#[inline]
#[target_feature(enable = "neon")]
fn signed<const V: usize>(w: [uint8x16_t; V]) -> [int8x16_t; V] {
    let mut numbers = [vdupq_n_s8(0); V];
    for v in 0..V {
        numbers[v] = vreinterpretq_s8_u8(veorq_u8(w[v], vdupq_n_u8(0x80)));
    }
    numbers
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_4<const R: usize, const V: usize>(
    x: &[[i8; BLOCK]; R],
    lines: &[Line],
    part: usize,
    dots: &mut [[int32x4_t; V]; R],
) {
    for (at, [a, b]) in lines.as_chunks::<2>().0.iter().enumerate() {
        let x = of_rows(x, at % 2);
        let (a, b) = (load_part(a, part), load_part(b, part));
        add::<0, R, V>(low(a), &x, dots);
        add::<1, R, V>(high(a), &x, dots);
        add::<2, R, V>(low(b), &x, dots);
        add::<3, R, V>(high(b), &x, dots);
    }
}

/// Bytes' low halves.
#[inline]
#[target_feature(enable = "neon")]
fn low<const V: usize>(bytes: [uint8x16_t; V]) -> [int8x16_t; V] {
    let mut halves = [vdupq_n_s8(0); V];
    for v in 0..V {
        halves[v] = vreinterpretq_s8_u8(vandq_u8(bytes[v], vdupq_n_u8(0x0f)));
    }
    halves
}

/// Bytes' high halves.
#[inline]
#[target_feature(enable = "neon")]
fn high<const V: usize>(bytes: [uint8x16_t; V]) -> [int8x16_t; V] {
    let mut halves = [vdupq_n_s8(0); V];
    for v in 0..V {
        halves[v] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes[v]));
    }
    halves
}
