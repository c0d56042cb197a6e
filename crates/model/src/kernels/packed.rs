//! Products of rows with quantized matrices. Rows are quantized to int8 in blocks of 32 as well, so that what is summed
//! inside a block are whole numbers: exact in any order. Blocks are then added in their order, one fused multiply-add
//! each, so every instruction set, number of rows and number of threads gives the same bits.
//!
//! A matrix is packed once into the order in which every kernel reads it: **panels** of 16 outputs. A panel has its
//! scales first (bf16, `[blocks, 16]`), then its numbers, block after block: eight (int8) or four (int4) runs of 64
//! bytes, in which each output has four neighbouring bytes. That is one register of AVX-512, two of AVX2 and four of
//! NEON, and the operand of their dot products of four.
//!
//! int8: byte j of output o in run r is element `4 r + j` of the block. int4: the low half of byte j in run r is
//! element `8 r + j`, its high half element `8 r + 4 + j`, both plus 8.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{Isa, PARALLEL_FROM};

/// Outputs of a panel.
pub(crate) const OUTPUTS: usize = 16;
/// Elements that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a panel's scales for one block.
const SCALES_BYTES: usize = OUTPUTS * 2;
/// Blocks of a panel that are multiplied with all rows before the next ones are: they stay in the first cache.
const BLOCKS: usize = 8;

/// Rows from which AVX2 widens a matrix's numbers to 16 bits once for all of them.
const WIDE_FROM: usize = 4;

/// Rows that it multiplies at once.
const WIDE_ROWS: usize = 4;

/// How many bits a quantized number has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// −127 to 127.
    Eight,
    /// −8 to 7.
    Four,
}

/// Rows `[rows, width]` as int8 with a scale for each block; the last block is filled with zeros.
#[derive(Debug)]
pub(crate) struct Rows {
    blocks: usize,
    /// `[rows, blocks, 32]`
    numbers: Vec<[i8; BLOCK]>,
    /// `[rows, blocks]`
    scales: Vec<f32>,
    /// `[rows, blocks]`: the sum of a block's numbers.
    sums: Vec<i32>,
    /// `[groups of rows, blocks]`: the numbers once more where there are [`WIDE_FROM`] rows.
    wide: Vec<WideBlock>,
}

/// One block of four rows: pairs of neighbouring numbers in 16 bits each. Rows that are not there are zeros.
type WideBlock = [[i32; WIDE_ROWS]; BLOCK / 2];

/// One row of [`Rows`].
#[derive(Clone, Copy)]
struct Row<'a> {
    numbers: &'a [[i8; BLOCK]],
    scales: &'a [f32],
    sums: &'a [i32],
}

/// One panel's bytes.
#[derive(Clone, Copy)]
struct Panel<'a> {
    scales: &'a [[u8; SCALES_BYTES]],
    /// In runs of 64 bytes.
    numbers: &'a [[u8; 64]],
    /// Of a block. Not a constant of the kernels: a compiler that knows it unrolls their innermost loop, and has not
    /// enough registers for that.
    runs: usize,
}

impl Bits {
    /// Bytes of one block of a panel, without its scales.
    const fn block_bytes(self) -> usize {
        match self {
            Self::Eight => BLOCK * OUTPUTS,
            Self::Four => BLOCK * OUTPUTS / 2,
        }
    }

    /// Bytes of a panel of that width.
    pub(crate) const fn panel_bytes(self, width: usize) -> usize {
        width.div_ceil(BLOCK) * (SCALES_BYTES + self.block_bytes())
    }

    /// Bytes of a packed matrix.
    pub(crate) const fn matrix_bytes(self, outputs: usize, width: usize) -> usize {
        outputs.div_ceil(OUTPUTS) * self.panel_bytes(width)
    }
}

impl Rows {
    /// Rounds each element to the nearest of the 255 steps of its block.
    pub(crate) fn quantize(x: &[f32], width: usize) -> Self {
        match Isa::detect() {
            Isa::Baseline => quantize(x, width),
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
            Isa::Avx2 | Isa::Avx512 => unsafe { avx2::quantize(x, width) },
        }
    }

    fn row(&self, row: usize) -> Row<'_> {
        let blocks = row * self.blocks..(row + 1) * self.blocks;
        Row {
            numbers: &self.numbers[blocks.clone()],
            scales: &self.scales[blocks.clone()],
            sums: &self.sums[blocks],
        }
    }

    pub(crate) fn n_rows(&self) -> usize {
        self.scales.len() / self.blocks
    }
}

#[inline(always)]
fn quantize(x: &[f32], width: usize) -> Rows {
    let blocks = width.div_ceil(BLOCK);
    let n_rows = x.len() / width;
    let n = n_rows * blocks;
    let mut rows = Rows {
        wide: Vec::new(),
        blocks,
        numbers: vec![[0; BLOCK]; n],
        scales: Vec::with_capacity(n),
        sums: Vec::with_capacity(n),
    };
    let of_x = x.chunks_exact(width).flat_map(|row| row.chunks(BLOCK));
    for (x, numbers) in of_x.zip(&mut rows.numbers) {
        rows.scales.push(scalar::quantize(x, numbers));
        rows.sums.push(numbers.iter().map(|number| i32::from(*number)).sum());
    }
    if n_rows >= WIDE_FROM {
        let groups = n_rows.div_ceil(WIDE_ROWS);
        rows.wide = vec![[[0; WIDE_ROWS]; BLOCK / 2]; groups * blocks];
        for (at, numbers) in rows.numbers.iter().enumerate() {
            let (row, block) = (at / blocks, at % blocks);
            let wide = &mut rows.wide[row / WIDE_ROWS * blocks + block];
            for (wide, pair) in wide.iter_mut().zip(numbers.as_chunks::<2>().0) {
                let [low, high] = pair.map(i32::from);
                wide[row % WIDE_ROWS] = low & 0xffff | high << 16;
            }
        }
    }
    rows
}

/// Packs `w` `[outputs, width]` into `packed`, which has [`Bits::matrix_bytes`].
pub(crate) fn pack(bits: Bits, w: &[f32], width: usize, packed: &mut [u8]) {
    let outputs = w.len() / width;
    let blocks = width.div_ceil(BLOCK);
    for (panel, packed) in packed.chunks_exact_mut(bits.panel_bytes(width)).enumerate() {
        let (scales, numbers) = packed.split_at_mut(blocks * SCALES_BYTES);
        numbers.fill(match bits {
            Bits::Eight => 0,
            Bits::Four => 0x88,
        });
        scales.fill(0);
        for o in 0..OUTPUTS.min(outputs - panel * OUTPUTS) {
            let row = &w[(panel * OUTPUTS + o) * width..][..width];
            for (block, elements) in row.chunks(BLOCK).enumerate() {
                let scale = scale(bits, elements);
                scales[block * SCALES_BYTES + 2 * o..][..2].copy_from_slice(&scale.to_le_bytes());
                let numbers = &mut numbers[block * bits.block_bytes()..][..bits.block_bytes()];
                let inverse = if scale.to_f32() == 0.0 { 0.0 } else { scale.to_f32().recip() };
                for (at, element) in elements.iter().enumerate() {
                    let number = (element * inverse).round_ties_even();
                    match bits {
                        Bits::Eight => {
                            numbers[at / 4 * 64 + o * 4 + at % 4] = number.clamp(-127.0, 127.0) as i8 as u8;
                        }
                        Bits::Four => {
                            let byte = &mut numbers[at / 8 * 64 + o * 4 + at % 4];
                            let half = (number.clamp(-8.0, 7.0) + 8.0) as u8;
                            *byte = if at % 8 < 4 { *byte & 0xf0 | half } else { *byte & 0x0f | half << 4 };
                        }
                    }
                }
            }
        }
    }
}

/// The scale of a block. int8: the largest magnitude is 127. int4: the element of largest magnitude is −8, as in
/// llama.cpp's Q4_0, so that all sixteen steps are used.
fn scale(bits: Bits, elements: &[f32]) -> bf16 {
    // What is not finite makes a scale that is not, and so every sum.
    let larger = |a: f32, b: f32| if b.is_nan() || b.abs() > a.abs() { b } else { a };
    let largest = elements.iter().copied().fold(0.0_f32, larger);
    match bits {
        Bits::Eight => bf16::from_f32(largest.abs() / 127.0),
        Bits::Four => bf16::from_f32(largest / -8.0),
    }
}

/// Appends one row of a packed matrix as f32.
pub(crate) fn unpack_row(bits: Bits, packed: &[u8], width: usize, output: usize, out: &mut Vec<f32>) {
    let panel = Panel::of(bits, packed, width, output / OUTPUTS);
    let o = output % OUTPUTS;
    out.extend((0..width).map(|at| {
        let (block, at) = (at / BLOCK, at % BLOCK);
        let scale = panel.scale(block, o);
        f32::from(scalar::number(bits, panel.block(block), o, at)) * scale
    }));
}

impl<'a> Panel<'a> {
    fn of(bits: Bits, packed: &'a [u8], width: usize, panel: usize) -> Self {
        let n_bytes = bits.panel_bytes(width);
        let (scales, numbers) =
            packed[panel * n_bytes..][..n_bytes].split_at(width.div_ceil(BLOCK) * SCALES_BYTES);
        let runs = bits.block_bytes() / 64;
        Self { scales: scales.as_chunks().0, numbers: numbers.as_chunks().0, runs }
    }

    fn scale(&self, block: usize, output: usize) -> f32 {
        let bytes = &self.scales[block];
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * output], bytes[2 * output + 1]])) << 16)
    }

    fn block(&self, block: usize) -> &'a [[u8; 64]] {
        &self.numbers[block * self.runs..][..self.runs]
    }
}

/// Adds the products of some rows with some blocks of a panel to `y`, block after block.
fn add_products<const R: usize>(
    isa: Isa,
    bits: Bits,
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]; R],
) {
    match isa {
        Isa::Baseline => scalar::add_products(bits, x, panel, blocks, y),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe {
            match bits {
                Bits::Eight => avx2::add_products_8(x, panel, blocks, y),
                Bits::Four => avx2::add_products_4(x, panel, blocks, y),
            }
        },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 => unsafe {
            match bits {
                Bits::Eight => avx512::add_products_8(x, panel, blocks, y),
                Bits::Four => avx512::add_products_4(x, panel, blocks, y),
            }
        },
    }
}

/// `x` times the outputs of one panel → `y`, one a row.
fn rows_with_panel(isa: Isa, bits: Bits, x: &Rows, panel: Panel<'_>, y: &mut [[f32; OUTPUTS]]) {
    y.fill([0.0; OUTPUTS]);
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 && x.n_rows() >= WIDE_FROM {
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        unsafe {
            avx2::add_products_wide(bits, x, panel, y);
        }
        return;
    }
    let n_blocks = panel.scales.len();
    let mut first = 0;
    while first < n_blocks {
        let blocks = first..(first + BLOCKS).min(n_blocks);
        first = blocks.end;
        let (pairs, last) = y.as_chunks_mut::<2>();
        for (at, y) in pairs.iter_mut().enumerate() {
            add_products(isa, bits, [x.row(2 * at), x.row(2 * at + 1)], panel, blocks.clone(), y);
        }
        if let [y] = last {
            let x = [x.row(x.n_rows() - 1)];
            add_products(isa, bits, x, panel, blocks, std::array::from_mut(y));
        }
    }
}

/// `x` times some of the panels; `outputs` ends with the last one's. Rows of `y` are `stride` long.
fn rows_with_panels(
    bits: Bits,
    x: &Rows,
    packed: &[u8],
    width: usize,
    panels: Range<usize>,
    (y, stride): (&mut [f32], usize),
) {
    let isa = Isa::detect();
    let mut sums = vec![[0.0; OUTPUTS]; x.n_rows()];
    let first = panels.start;
    for at in panels {
        rows_with_panel(isa, bits, x, Panel::of(bits, packed, width, at), &mut sums);
        let start = (at - first) * OUTPUTS;
        let n = OUTPUTS.min(stride - start);
        for (y, sums) in y.chunks_exact_mut(stride).zip(&sums) {
            y[start..][..n].copy_from_slice(&sums[..n]);
        }
    }
}

/// `x` `[rows, width]` times the packed matrix `[outputs, width]` transposed → `[rows, outputs]`. On the threads of the
/// pool if there is enough to do: they share the panels, so that each is read once.
pub(crate) fn matmul(bits: Bits, x: &Rows, packed: &[u8], width: usize, outputs: usize) -> Vec<f32> {
    let n_rows = x.n_rows();
    let panels = outputs.div_ceil(OUTPUTS);
    let mut y = vec![0.0; n_rows * outputs];
    let threads = rayon::current_num_threads();
    if threads == 1 || n_rows * width * outputs < PARALLEL_FROM {
        rows_with_panels(bits, x, packed, width, 0..panels, (&mut y, outputs));
        return y;
    }
    let share = panels.div_ceil(threads * 4);
    let parts: Vec<Vec<f32>> = (0..panels.div_ceil(share))
        .into_par_iter()
        .map(|part| {
            let panels = part * share..((part + 1) * share).min(panels);
            let stride = (panels.end * OUTPUTS).min(outputs) - panels.start * OUTPUTS;
            let mut y = vec![0.0; n_rows * stride];
            rows_with_panels(bits, x, packed, width, panels, (&mut y, stride));
            y
        })
        .collect();
    let mut start = 0;
    for part in parts {
        let n = part.len() / n_rows;
        for (row, values) in part.chunks_exact(n).enumerate() {
            y[row * outputs + start..][..n].copy_from_slice(values);
        }
        start += n;
    }
    y
}

#[cfg(test)]
mod tests;
