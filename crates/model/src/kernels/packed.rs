//! Products of rows with quantized matrices. Rows are quantized to int8 in blocks of 32 as well, so that what is summed
//! inside a block are whole numbers: exact in any order. Blocks are then added in their order, one fused multiply-add
//! each, so every instruction set, number of rows and number of threads gives the same bits.
//!
//! A matrix is packed once into the order in which every kernel reads it: **panels** of 16 outputs. A panel has pairs of
//! blocks, each a line of 64 bytes with both blocks' scales (bf16, `[2, 16]`) and then their numbers: eight (int8) or four
//! (int4) lines a block, in which each output has four neighbouring bytes. That is one register of AVX-512, two of AVX2
//! and four of NEON, and the operand of their dot products of four. An odd last block has a partner of zeros.
//!
//! int8: byte j of output o in line r is element `4 r + j` of the block plus 128. int4: the low half of byte j in line r
//! is element `8 r + j`, its high half element `8 r + 4 + j`, both plus 8.

#[cfg(target_arch = "x86_64")]
mod ahead;
#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod gated;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
mod rows;
mod scalar;

use std::{mem::MaybeUninit, ops::Range};

use half::bf16;

use self::rows::{Biases, GROUP, Group, Quantize, Row, WIDE_ROWS, WideBlock, biases_of, in_group, widen};
#[cfg(target_arch = "x86_64")]
use self::rows::{PAIRED_ROWS, Part, TILE_ROWS, quantize, select};
pub(crate) use self::{
    gated::{Blocks, Gated},
    rows::Rows,
};
use super::{Columns, Isa, generic::ROUNDER};

/// Outputs of a panel.
pub(crate) const OUTPUTS: usize = 16;
/// Elements that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a panel's scales for one block.
const SCALES_BYTES: usize = OUTPUTS * 2;
/// Blocks of a panel that are multiplied with all rows before the next ones are: they stay in the first cache.
const BLOCKS: usize = 8;
/// About so many rows meet a task's panels before the next ones do: they stay in the second cache.
const ROWS_PASS: usize = 128;
/// Rows that kernels without groups of them multiply at once.
const ROWS_AT_ONCE: usize = 4;
/// Panels whose outputs of a row are stored together: rows are pages apart.
const PANELS_PASS: usize = 4;

/// How many bits a quantized number has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// −127 to 127.
    Eight,
    /// −8 to 7.
    Four,
}

/// One panel's bytes.
#[derive(Clone, Copy)]
struct Panel<'a> {
    lines: &'a [Line],
    /// Of a block. Not a constant of all kernels: a compiler that knows it unrolls their innermost loop, and AVX2 has not
    /// enough registers for that.
    block_lines: usize,
}

type Line = [u8; 64];

/// What is around a panel in the order in which a thread reads.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "AVX-512 alone fetches ahead"))]
struct Near<'a> {
    /// Nobody has asked for the panel in this pass.
    is_cold: bool,
    /// What is read after it.
    next: &'a [Line],
}

/// A panel, and where the rows' products with it go, one a row.
struct Turn<'a, 'y> {
    panel: Panel<'a>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "AVX-512 alone fetches ahead"))]
    near: Near<'a>,
    y: &'y mut [[f32; OUTPUTS]],
}

impl Near<'_> {
    /// Few rows ask for all they read themselves, as far ahead as memory is away.
    const FEW_ROWS: Self = Self { is_cold: true, next: &[] };
}

impl Bits {
    /// Lines of one block of a panel.
    const fn block_lines(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Four => 4,
        }
    }

    /// Lines of two blocks, with their scales.
    const fn pair_lines(self) -> usize {
        1 + 2 * self.block_lines()
    }

    /// Bytes of a panel of that width.
    pub(crate) const fn panel_bytes(self, width: usize) -> usize {
        blocks(width) / 2 * self.pair_lines() * size_of::<Line>()
    }

    /// Bytes of a packed matrix.
    pub(crate) const fn matrix_bytes(self, outputs: usize, width: usize) -> usize {
        outputs.div_ceil(OUTPUTS) * self.panel_bytes(width)
    }
}

/// Blocks of a row or a panel of that width, an even number.
const fn blocks(width: usize) -> usize {
    width.div_ceil(2 * BLOCK) * 2
}

/// Packs `w` `[outputs, width]` into `packed`, which has [`Bits::matrix_bytes`].
pub(crate) fn pack(bits: Bits, w: &[f32], width: usize, packed: &mut [u8]) {
    let outputs = w.chunks_exact(width).collect::<Vec<_>>();
    let panels = packed.chunks_exact_mut(bits.panel_bytes(width));
    for (outputs, panel) in outputs.chunks(OUTPUTS).zip(panels) {
        // Outputs that are not there, and what is missing of the last blocks, read as zeros.
        panel.fill(match bits {
            Bits::Eight => 0x80,
            Bits::Four => 0x88,
        });
        for pair in panel.chunks_exact_mut(bits.pair_lines() * size_of::<Line>()) {
            pair[..size_of::<Line>()].fill(0);
        }
        for (o, output) in outputs.iter().enumerate() {
            pack_output(bits, output, panel, o);
        }
    }
}

/// Packs one output into a panel, of which nothing else changes; blocks that it does not fill must be zeros.
pub(crate) fn pack_output(bits: Bits, output: &[f32], panel: &mut [u8], o: usize) {
    let (lines, _) = panel.as_chunks_mut::<{ size_of::<Line>() }>();
    for (pair, elements) in lines.chunks_exact_mut(bits.pair_lines()).zip(output.chunks(2 * BLOCK)) {
        let Some((scales, lines)) = pair.split_first_mut() else { continue };
        let scales = scales.as_chunks_mut::<SCALES_BYTES>().0;
        let blocks = elements.chunks(BLOCK).zip(scales).zip(lines.chunks_exact_mut(bits.block_lines()));
        for ((elements, scales), lines) in blocks {
            let scale = scale(bits, elements);
            scales[2 * o..][..2].copy_from_slice(&scale.to_le_bytes());
            let inverse = if scale.to_f32() == 0.0 { 0.0 } else { scale.to_f32().recip() };
            for (at, element) in elements.iter().enumerate() {
                let number = (element * inverse).round_ties_even();
                match bits {
                    Bits::Eight => {
                        lines[at / 4][o * 4 + at % 4] = number.clamp(-127.0, 127.0) as i8 as u8 ^ 0x80;
                    }
                    Bits::Four => {
                        let byte = &mut lines[at / 8][o * 4 + at % 4];
                        let half = (number.clamp(-8.0, 7.0) + 8.0) as u8;
                        *byte = if at % 8 < 4 { *byte & 0xf0 | half } else { *byte & 0x0f | half << 4 };
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
        Self { lines: packed[panel * n_bytes..][..n_bytes].as_chunks().0, block_lines: bits.block_lines() }
    }

    const fn pair_lines(&self) -> usize {
        1 + 2 * self.block_lines
    }

    const fn n_blocks(&self) -> usize {
        self.lines.len() / self.pair_lines() * 2
    }

    /// The scales of a block and its partner.
    const fn scales_line(&self, block: usize) -> &'a Line {
        &self.lines[block / 2 * self.pair_lines()]
    }

    /// One block's scales as bf16.
    fn scales(&self, block: usize) -> &'a [u8; SCALES_BYTES] {
        &self.scales_line(block).as_chunks().0[block % 2]
    }

    fn scale(&self, block: usize, output: usize) -> f32 {
        let bytes = self.scales(block);
        f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * output], bytes[2 * output + 1]])) << 16)
    }

    fn block(&self, block: usize) -> &'a [Line] {
        &self.lines[block / 2 * self.pair_lines() + 1 + block % 2 * self.block_lines..][..self.block_lines]
    }
}

/// Adds the products of some rows with some blocks of a panel to `y`, one a row, block after block.
fn add_products<const R: usize>(
    isa: Isa,
    bits: Bits,
    x: [Row<'_>; R],
    panel: Panel<'_>,
    blocks: Range<usize>,
    y: &mut [[f32; OUTPUTS]],
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe {
            match bits {
                Bits::Eight => avx2::add_products_8(x, panel, blocks, y),
                Bits::Four => avx2::add_products_4(x, panel, blocks, y),
            }
        },
        _ => scalar::add_products(bits, x, panel, blocks, y),
    }
}

/// Rows of `x` from `first` on, the first of a group, times the outputs of two panels.
fn rows_with_two((isa, bits): (Isa, Bits), x: &Rows, first: usize, turns: [Turn<'_, '_>; 2]) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
    if isa.pairs_panels() && x.group != TILE_ROWS && !x.is_few() {
        return unsafe { avx512::rows_with_turns(bits, x, first, turns) };
    }
    turns.into_iter().for_each(|turn| rows_with_panel((isa, bits), x, first, turn));
}

/// The same with one.
fn rows_with_panel((isa, bits): (Isa, Bits), x: &Rows, first: usize, turn: Turn<'_, '_>) {
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
    match isa {
        Isa::Amx if x.group == TILE_ROWS => {
            return unsafe { amx::rows_with_panel(bits, x, first, turn.panel, turn.y) };
        }
        Isa::Avx512 | Isa::Amx => return unsafe { avx512::rows_with_turns(bits, x, first, [turn]) },
        Isa::Avx2 if x.group == WIDE_ROWS && avx2::are_many(bits, x.n_rows) => {
            return unsafe { avx2::rows_with_panel(bits, x, first, turn.panel, turn.y) };
        }
        Isa::Avx2 | Isa::Baseline => {}
    }
    let Turn { panel, y, .. } = turn;
    #[cfg(target_arch = "aarch64")]
    #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
    match isa {
        Isa::Neon => return unsafe { neon::rows_with_panel(bits, x, first, panel, y) },
        Isa::Baseline => {}
    }
    y.fill([0.0; OUTPUTS]);
    let n_blocks = panel.n_blocks();
    for start in (0..n_blocks).step_by(BLOCKS) {
        let blocks = start..(start + BLOCKS).min(n_blocks);
        for (at, y) in y.chunks_mut(ROWS_AT_ONCE).enumerate() {
            let first = first + ROWS_AT_ONCE * at;
            macro_rules! add_products_of {
                ($($n:literal)*) => {
                    match y.len() {
                        $($n => {
                            let x: [Row<'_>; $n] = std::array::from_fn(|r| x.row(first + r));
                            add_products(isa, bits, x, panel, blocks.clone(), y);
                        })*
                        n => unreachable!("{n} rows at once"),
                    }
                };
            }
            add_products_of!(1 2 3 4);
        }
    }
}

/// `x` `[rows, width]` times some panels of a packed matrix `[outputs, width]` transposed → their columns of `y`
/// `[rows, outputs]`, every number of them.
pub(crate) fn rows_with_panels(
    isa: Isa,
    bits: Bits,
    x: &Rows,
    packed: &[u8],
    width: usize,
    panels: Range<usize>,
    y: &mut Columns<'_, MaybeUninit<f32>>,
) {
    let rows_max = x.pass_rows();
    let (mut few, mut many) = ([[0.0; OUTPUTS]; GROUP * PANELS_PASS], Vec::new());
    let sums = sums(rows_max * PANELS_PASS, &mut few, &mut many);
    let panel = |at| Panel::of(bits, packed, width, at);
    let near = |at: usize| Near {
        is_cold: at < panels.start + 2,
        next: if at + 2 < panels.end { panel(at + 2).lines } else { &[] },
    };
    for first in (0..x.n_rows).step_by(rows_max) {
        let n_rows = rows_max.min(x.n_rows - first);
        for start in panels.clone().step_by(PANELS_PASS) {
            let some = start..(start + PANELS_PASS).min(panels.end);
            let mut turns = some.clone().zip(sums.chunks_exact_mut(rows_max)).map(|(at, sums)| Turn {
                panel: panel(at),
                near: if x.is_few() { Near::FEW_ROWS } else { near(at) },
                y: &mut sums[..n_rows],
            });
            while let Some(turn) = turns.next() {
                match turns.next() {
                    Some(second) => rows_with_two((isa, bits), x, first, [turn, second]),
                    None => rows_with_panel((isa, bits), x, first, turn),
                }
            }
            for row in 0..n_rows {
                let y = &mut y.row(first + row)[(start - panels.start) * OUTPUTS..];
                for (y, sums) in y.chunks_mut(OUTPUTS).zip(sums.chunks_exact(rows_max)).take(some.len()) {
                    match y.as_mut_array() {
                        Some(y) => *y = sums[row].map(MaybeUninit::new),
                        None => _ = y.write_copy_of_slice(&sums[row][..y.len()]),
                    }
                }
            }
        }
    }
}

/// Room for `n` sums: `few`, which needs no memory of the heap, if that is enough.
fn sums<'a>(
    n: usize,
    few: &'a mut [[f32; OUTPUTS]],
    many: &'a mut Vec<[f32; OUTPUTS]>,
) -> &'a mut [[f32; OUTPUTS]] {
    if n <= few.len() {
        return &mut few[..n];
    }
    many.resize(n, [0.0; OUTPUTS]);
    many
}

/// For each output of some int8 panels: Σ weights[row] · max(x[row] · output, 0), in the order of the rows.
pub(crate) fn sum_of_positive(x: &Rows, weights: &[f32], panels: &[u8], width: usize, sums: &mut [f32]) {
    let isa = Isa::detect();
    let (mut of_first, mut of_second) = (vec![[0.0; OUTPUTS]; x.n_rows], vec![[0.0; OUTPUTS]; x.n_rows]);
    for (pair, sums) in sums.chunks_mut(2 * OUTPUTS).enumerate() {
        let turn = |at, y| Turn {
            panel: Panel::of(Bits::Eight, panels, width, 2 * pair + at),
            near: Near::FEW_ROWS,
            y,
        };
        let n_panels = sums.len().div_ceil(OUTPUTS);
        let of = (isa, Bits::Eight);
        if n_panels == 2 {
            rows_with_two(of, x, 0, [turn(0, &mut of_first), turn(1, &mut of_second)]);
        } else {
            rows_with_panel(of, x, 0, turn(0, &mut of_first));
        }
        for (products, sums) in [&of_first, &of_second].into_iter().zip(sums.chunks_mut(OUTPUTS)) {
            let mut sum = [0.0; OUTPUTS];
            super::add_positive(products, weights, &mut sum);
            sums.copy_from_slice(&sum[..sums.len()]);
        }
    }
}

#[cfg(test)]
mod tests;
