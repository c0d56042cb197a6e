//! The twin that every other kernel of this folder is compared with, bit by bit.

use std::ops::Range;

use super::{BLOCK, Bits, OUTPUTS, Panel, Quantize, ROUNDER, Row};

pub(super) struct Scalar;

impl Quantize for Scalar {
    #[inline(always)]
    fn largest(x: &[f32; BLOCK]) -> u32 {
        x.iter().fold(0, |largest, x| u32::max(largest, x.abs().to_bits()))
    }

    #[inline(always)]
    fn round(x: &[f32; BLOCK], inverse: f32, numbers: &mut [i8; BLOCK]) -> i32 {
        let mut sum = 0;
        for (number, x) in numbers.iter_mut().zip(x) {
            let rounded = (x * inverse + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32;
            *number = rounded as i8;
            sum += rounded;
        }
        sum
    }
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
    y: &mut [[f32; OUTPUTS]],
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
