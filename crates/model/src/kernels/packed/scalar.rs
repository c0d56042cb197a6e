//! The twin that every other kernel of this folder is compared with, bit by bit.

use std::ops::Range;

use super::{BLOCK, Bits, OUTPUTS, Panel, Row};

/// Gives a block's scale and the sum of its numbers. A block with a number that is not finite has a scale that is none: so
/// are all sums with it.
///
/// Maximum and rounding are on integers, which every instruction set has vectors of: magnitudes are ordered as their bits
/// are, and a number that is added to 1.5 × 2²³ is rounded there, ties to even.
#[inline(always)]
pub(super) fn quantize(x: &[f32; BLOCK], numbers: &mut [i8; BLOCK]) -> (f32, i32) {
    const ROUNDER: f32 = 12_582_912.0;
    let largest = x.iter().fold(0, |largest, x| u32::max(largest, x.abs().to_bits()));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return (f32::NAN, 0);
    }
    // Of a block of the smallest numbers that there are, the inverse would be infinite.
    let inverse = if largest > 0.0 { (127.0 / largest).min(f32::MAX) } else { 0.0 };
    let mut sum = 0;
    for (number, x) in numbers.iter_mut().zip(x) {
        let rounded = (x * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
        *number = rounded as i8;
        sum += rounded;
    }
    (largest / 127.0, sum)
}

/// Element `at` of a block of output `o`.
pub(super) fn number(bits: Bits, block: &[[u8; 64]], o: usize, at: usize) -> i8 {
    match bits {
        Bits::Eight => (block[at / 4][o * 4 + at % 4] ^ 0x80) as i8,
        Bits::Four => {
            let byte = block[at / 8][o * 4 + at % 4];
            (if at % 8 < 4 { byte & 0x0f } else { byte >> 4 }) as i8 - 8
        }
    }
}

pub(super) fn add_products<const R: usize>(
    bits: Bits,
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    for block in blocks {
        let numbers = panel.block(block);
        for (x, y) in x.iter().zip(&mut *y) {
            for (o, y) in y.iter_mut().enumerate() {
                let products = x
                    .numbers(block)
                    .iter()
                    .enumerate()
                    .map(|(at, x)| i32::from(*x) * i32::from(number(bits, numbers, o, at)));
                let dot: i32 = products.sum();
                *y = (dot as f32).mul_add(panel.scale(block, o) * x.scale(block), *y);
            }
        }
    }
}
