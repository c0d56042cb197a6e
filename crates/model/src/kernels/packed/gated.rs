//! gate_proj, up_proj, SwiGLU and the quantizing of what comes of it in one pass: 32 outputs of both matrices are a block of
//! the rows that down_proj is multiplied with. What is between stays in the first caches.

use std::{marker::PhantomData, ops::Range};

use super::{
    super::generic::silu_mul, BLOCK, Biases, Bits, GROUP, Isa, Near, OUTPUTS, Panel, Quantize, Rows, Turn,
    WideBlock, biases_of, in_group, rows_with_two, scalar, sums, widen,
};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Panels of a block of outputs.
const PANELS: usize = BLOCK / OUTPUTS;

/// The packed gate_proj and up_proj `[outputs, width]` of one MLP, and the rows `[rows, width]` that they are for.
#[derive(Clone, Copy)]
pub(crate) struct Gated<'a> {
    pub(crate) bits: Bits,
    pub(crate) gate: &'a [u8],
    pub(crate) up: &'a [u8],
    pub(crate) outputs: usize,
    pub(crate) rows: &'a Rows,
    pub(crate) width: usize,
}

/// Some blocks of rows that several threads fill, each with blocks of its own.
pub(crate) struct Blocks<'a> {
    numbers: *mut [i8; BLOCK],
    scales: *mut f32,
    biases: *mut Biases,
    /// None where no kernel reads them.
    wide: Option<*mut WideBlock>,
    n_rows: usize,
    /// With those that fill up the last tile.
    n_places: usize,
    group: usize,
    blocks: usize,
    range: Range<usize>,
    rows: PhantomData<&'a mut Rows>,
}

#[expect(unsafe_code, reason = "sound: as a `&mut Rows` is, since no two hold the same block")]
unsafe impl Send for Blocks<'_> {}

/// Products of some rows with one block's panels of both matrices, and where they go.
pub(super) struct Part<'p, 'r> {
    /// `[panels, rows]`, as are those of `up`.
    gate: &'p mut [[f32; OUTPUTS]],
    up: &'p [[f32; OUTPUTS]],
    first: usize,
    block: usize,
    to: &'p mut Blocks<'r>,
}

impl Gated<'_> {
    /// Blocks of outputs.
    pub(crate) const fn n_blocks(&self) -> usize {
        self.outputs.div_ceil(BLOCK)
    }

    /// Multiply-adds.
    pub(crate) const fn work(&self) -> usize {
        2 * self.rows.n_rows() * self.width * self.outputs
    }

    /// Rows of zeros for the result.
    pub(crate) fn result(&self, isa: Isa) -> Rows {
        Rows::zeros(isa, self.rows.n_rows(), self.outputs)
    }

    /// silu(gate x) · up x for the outputs of some blocks.
    pub(crate) fn compute(&self, isa: Isa, to: &mut Blocks<'_>) {
        let n_panels = self.outputs.div_ceil(OUTPUTS);
        let rows_max = self.rows.pass_rows();
        let (mut few, mut many) = ([[0.0; OUTPUTS]; GROUP * 2 * PANELS], Vec::new());
        let sums = sums(rows_max * 2 * PANELS, &mut few, &mut many);
        let blocks = to.range.clone();
        let read = |packed, at: usize| {
            let panel = |at| Panel::of(self.bits, packed, self.width, at);
            let has_next = at + 1 < n_panels.min(blocks.end * PANELS);
            let near = Near {
                is_cold: at == blocks.start * PANELS,
                next: if has_next { panel(at + 1).lines } else { &[] },
            };
            (panel(at), if self.rows.is_few() { Near::FEW_ROWS } else { near })
        };
        for first in (0..self.rows.n_rows()).step_by(rows_max) {
            let n_rows = rows_max.min(self.rows.n_rows() - first);
            let (gate, up) = sums[..n_rows * 2 * PANELS].split_at_mut(n_rows * PANELS);
            for block in blocks.clone() {
                let sums = gate.chunks_exact_mut(n_rows).zip(up.chunks_exact_mut(n_rows));
                for (at, (gate, up)) in (block * PANELS..).zip(sums) {
                    if at >= n_panels {
                        gate.fill([0.0; OUTPUTS]);
                        up.fill([0.0; OUTPUTS]);
                        continue;
                    }
                    let turns = [(self.gate, gate), (self.up, up)].map(|(packed, y)| {
                        let (panel, near) = read(packed, at);
                        Turn { panel, near, y }
                    });
                    rows_with_two((isa, self.bits), self.rows, first, turns);
                }
                gate_with(isa, Part { gate, up, first, block, to });
            }
        }
    }
}

fn gate_with(isa: Isa, part: Part<'_, '_>) {
    match isa {
        Isa::Baseline => gate::<scalar::Scalar>(part),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { avx2::gate(part) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::gate(part) },
        // The compiler makes vectors of it.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => gate::<scalar::Scalar>(part),
    }
}

#[inline(always)]
pub(super) fn gate<Q: Quantize>(part: Part<'_, '_>) {
    let Part { gate, up, first, block, to } = part;
    silu_mul(gate.as_flattened_mut(), up.as_flattened());
    let (low, high) = gate.split_at(gate.len() / PANELS);
    for (row, (low, high)) in low.iter().zip(high).enumerate() {
        let mut x = [0.0; BLOCK];
        x[..OUTPUTS].copy_from_slice(low);
        x[OUTPUTS..].copy_from_slice(high);
        to.put::<Q>(first + row, block, &x);
    }
}

impl<'a> Blocks<'a> {
    /// Cuts `rows` between blocks of the first `n_blocks`: `share` of them each, the last what is left.
    pub(crate) fn split(rows: &'a mut Rows, n_blocks: usize, share: usize) -> impl Iterator<Item = Self> {
        assert!(n_blocks <= rows.blocks, "{n_blocks} blocks of {}", rows.blocks);
        let &mut Rows { n_rows, n_places, group, blocks, .. } = rows;
        let (numbers, scales) = (rows.numbers.as_mut_ptr(), rows.scales.as_mut_ptr());
        let (biases, has_wide) = (rows.biases.as_mut_ptr(), !rows.wide.is_empty());
        let wide = has_wide.then_some(rows.wide.as_mut_ptr());
        (0..n_blocks).step_by(share).map(move |start| Self {
            numbers,
            scales,
            biases,
            wide,
            n_rows,
            n_places,
            group,
            blocks,
            range: start..(start + share).min(n_blocks),
            rows: PhantomData,
        })
    }

    /// Quantizes one block of one row.
    #[inline(always)]
    fn put<Q: Quantize>(&mut self, row: usize, block: usize, x: &[f32; BLOCK]) {
        assert!(row < self.n_rows && self.range.contains(&block), "block {block} of row {row}");
        let in_group = in_group(row, self.group);
        let first = row - in_group;
        let at = first * self.blocks + block * self.group.min(self.n_places - first) + in_group;
        #[expect(
            unsafe_code,
            reason = "sound: the block is one of the rows', which outlive this, and nobody else has this one of any row"
        )]
        unsafe {
            let numbers = &mut *self.numbers.add(at);
            let (scale, sum) = Q::quantize(x, numbers);
            *self.scales.add(at) = scale;
            *self.biases.add(at) = biases_of(sum);
            if let Some(wide) = self.wide {
                widen(numbers, row, &mut *wide.add(row / super::WIDE_ROWS * self.blocks + block));
            }
        }
    }
}
