//! The rows that packed matrices are multiplied with, quantized, in the order in which kernels read them.

use super::{
    super::{Isa, RmsNorm, generic::norm_rows, threads},
    BLOCK, ROWS_PASS, blocks, scalar,
};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Rows whose blocks lie together, but for AVX2's, and few of them: they read a matrix about as fast as one row does.
pub(super) const GROUP: usize = 8;
/// Rows of a group where AVX-512 multiplies more than [`GROUP`] with two panels at once: at most. With AMX those that do not fill
/// tiles.
pub(super) const PAIRED_ROWS: usize = 7;
/// The same where AMX multiplies tiles.
pub(super) const TILE_ROWS: usize = 16;
/// Rows of a group with AVX2, which multiplies so many at once.
pub(super) const WIDE_ROWS: usize = 4;
const _: () = assert!(GROUP.is_multiple_of(WIDE_ROWS));

/// What quantizing a block takes. Only code that is compiled for its instruction set, after it was detected, may use it.
pub(super) trait Quantize {
    /// The largest magnitude, as bits: they are ordered as the magnitudes are, and a NaN's are above all.
    fn largest(x: &[f32; BLOCK]) -> u32;

    /// `x * inverse`, rounded to whole numbers, and their sum.
    fn round(x: &[f32; BLOCK], inverse: f32, numbers: &mut [i8; BLOCK]) -> i32;

    /// Gives the scale and the sum of the numbers. A block with a number that is not finite has a scale that is none: so
    /// are all sums with it.
    #[inline(always)]
    fn quantize(x: &[f32; BLOCK], numbers: &mut [i8; BLOCK]) -> (f32, i32) {
        let largest = f32::from_bits(Self::largest(x));
        if !largest.is_finite() {
            return (f32::NAN, 0);
        }
        // Of a block of the smallest numbers that there are, the inverse would be infinite.
        let inverse = if largest > 0.0 { (127.0 / largest).min(f32::MAX) } else { 0.0 };
        (largest / 127.0, Self::round(x, inverse, numbers))
    }
}

/// Rows `[rows, width]` as int8 with a scale for each block; what is missing of the last two is zeros. In the order in which a
/// kernel reads them: groups of up to eight rows, four with AVX2 (the last has what is left), or of a tile's sixteen (the last is
/// filled up with zeros), in a group block after block, in a block row after row.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(super) n_rows: usize,
    /// With those that fill up the last tile.
    pub(super) n_places: usize,
    pub(super) group: usize,
    pub(super) blocks: usize,
    pub(super) numbers: Vec<[i8; BLOCK]>,
    pub(super) scales: Vec<f32>,
    /// What a block's dot product begins with where a matrix's numbers are read as unsigned.
    pub(super) biases: Vec<Biases>,
    /// `[groups, blocks]`: the numbers once more where AVX2 multiplies more than [`GROUP`] rows.
    pub(super) wide: Vec<WideBlock>,
}

/// The sum of a block's numbers times what makes a matrix's numbers unsigned: −128 for int8, −8 for int4.
pub(super) type Biases = [i32; 2];

/// One block of a group: pairs of neighbouring numbers in 16 bits each. Rows that are not there are zeros.
pub(super) type WideBlock = [[i32; WIDE_ROWS]; BLOCK / 2];

/// A group of [`Rows`], `[blocks, rows]` each.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) n_rows: usize,
    pub(super) numbers: &'a [[i8; BLOCK]],
    pub(super) scales: &'a [f32],
    pub(super) biases: &'a [Biases],
}

/// One row of a [`Group`].
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    group: Group<'a>,
    row: usize,
}

/// The first of some rows, and where their numbers, scales, biases and widened numbers go.
type Places<'a> = (usize, &'a mut [[i8; BLOCK]], &'a mut [f32], &'a mut [Biases], &'a mut [WideBlock]);

/// Some rows while they are quantized.
pub(super) struct Part<'a> {
    x: &'a [f32],
    /// What is done to them before, and where that goes.
    norm: Option<(&'a RmsNorm, &'a mut [f32])>,
    width: usize,
    group: usize,
    numbers: &'a mut [[i8; BLOCK]],
    scales: &'a mut [f32],
    biases: &'a mut [Biases],
    wide: &'a mut [WideBlock],
}

impl Rows {
    /// Rounds each element to the nearest of the 255 steps of its block.
    pub(crate) fn quantize(x: &[f32], width: usize) -> Self {
        Self::quantize_for(Isa::detect(), x, width)
    }

    pub(super) fn quantize_for(isa: Isa, x: &[f32], width: usize) -> Self {
        Self::quantize_parts(isa, x, width, &mut std::iter::repeat_with(|| None))
    }

    /// The normed rows, and the same quantized, while each is near.
    pub(crate) fn norm_quantize(norm: &RmsNorm, x: &[f32]) -> (Vec<f32>, Self) {
        Self::norm_quantize_for(Isa::detect(), norm, x)
    }

    pub(super) fn norm_quantize_for(isa: Isa, norm: &RmsNorm, x: &[f32]) -> (Vec<f32>, Self) {
        let width = norm.weight.len();
        let mut normed = vec![0.0; x.len()];
        let group = group_rows(isa, x.len() / width);
        let mut parts = normed.chunks_mut(group * width).map(|normed| Some((norm, normed)));
        let rows = Self::quantize_parts(isa, x, width, &mut parts);
        (normed, rows)
    }

    fn quantize_parts<'a>(
        isa: Isa,
        x: &'a [f32],
        width: usize,
        norms: &mut dyn Iterator<Item = Option<(&'a RmsNorm, &'a mut [f32])>>,
    ) -> Self {
        let mut rows = Self::zeros(isa, x.len() / width, width);
        let (blocks, group) = (rows.blocks, rows.group);
        let mut wide = rows.wide.chunks_mut(blocks);
        // A group a task: 16 rows are worth several threads.
        let parts = x
            .chunks(group * width)
            .zip(rows.numbers.chunks_mut(group * blocks))
            .zip(rows.scales.chunks_mut(group * blocks))
            .zip(rows.biases.chunks_mut(group * blocks))
            .zip(norms)
            .map(|((((x, numbers), scales), biases), norm)| {
                // There are none where no kernel reads them.
                let wide = wide.next().unwrap_or(&mut []);
                Part { x, norm, width, group, numbers, scales, biases, wide }
            })
            .collect();
        threads::share(x.len(), || threads::for_each(parts, |part| quantize_with(isa, part)));
        rows
    }

    /// Rows that were quantized before: `block` gives the scale and the numbers of a row's n-th [`BLOCK`], the last with
    /// what is left.
    pub(crate) fn of_blocks<'a>(
        n_rows: usize,
        width: usize,
        block: impl Fn(usize, usize) -> (f32, &'a [i8]) + Sync,
    ) -> Self {
        Self::of_blocks_for(Isa::detect(), n_rows, width, block)
    }

    pub(super) fn of_blocks_for<'a>(
        isa: Isa,
        n_rows: usize,
        width: usize,
        block: impl Fn(usize, usize) -> (f32, &'a [i8]) + Sync,
    ) -> Self {
        let mut rows = Self::zeros(isa, n_rows, width);
        let Self { n_places, group, blocks, .. } = rows;
        let mut wide = rows.wide.chunks_mut(blocks);
        let parts = rows
            .numbers
            .chunks_mut(group * blocks)
            .zip(rows.scales.chunks_mut(group * blocks))
            .zip(rows.biases.chunks_mut(group * blocks))
            .enumerate()
            .map(|(at, ((numbers, scales), biases))| {
                (at * group, numbers, scales, biases, wide.next().unwrap_or(&mut []))
            });
        let parts: Vec<_> = parts.collect();
        let fill = |(first, numbers, scales, biases, wide): Places<'_>| {
            let n_in_group = group.min(n_places - first);
            for row in 0..n_in_group.min(n_rows - first) {
                for of_row in 0..width.div_ceil(BLOCK) {
                    let at = of_row * n_in_group + row;
                    let (scale, given) = block(first + row, of_row);
                    match given.as_array() {
                        // Without a call.
                        Some(given) => numbers[at] = *given,
                        None => numbers[at][..given.len()].copy_from_slice(given),
                    }
                    scales[at] = scale;
                    biases[at] = biases_of(numbers[at].iter().map(|&number| i32::from(number)).sum());
                    if !wide.is_empty() {
                        widen(&numbers[at], row, &mut wide[of_row]);
                    }
                }
            }
        };
        threads::share(n_rows * width, || threads::for_each(parts, fill));
        rows
    }

    /// The scale and the numbers of a row's n-th block.
    pub(crate) fn block(&self, row: usize, at: usize) -> (f32, &[i8; BLOCK]) {
        let row = self.row(row);
        (row.scale(at), row.numbers(at))
    }

    /// Some of the rows, one below the other.
    pub(crate) fn select(&self, rows: &[usize]) -> Self {
        self.select_for(Isa::detect(), rows)
    }

    pub(super) fn select_for(&self, isa: Isa, rows: &[usize]) -> Self {
        let mut selected = Self::zeros(isa, rows.len(), self.blocks * BLOCK);
        match isa {
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
            Isa::Avx2 => unsafe { avx2::select(self, rows, &mut selected) },
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::select(self, rows, &mut selected) },
            _ => select(self, rows, &mut selected),
        }
        selected
    }

    pub(super) fn zeros(isa: Isa, n_rows: usize, width: usize) -> Self {
        let blocks = blocks(width);
        let group = group_rows(isa, n_rows);
        let n_places = if group == TILE_ROWS { n_rows.next_multiple_of(TILE_ROWS) } else { n_rows };
        let n = n_places * blocks;
        let groups = if isa.widens() && n_rows > GROUP { n_rows.div_ceil(WIDE_ROWS) } else { 0 };
        Self {
            n_rows,
            n_places,
            group,
            blocks,
            numbers: vec![[0; BLOCK]; n],
            scales: vec![0.0; n],
            biases: vec![[0; 2]; n],
            wide: vec![[[0; WIDE_ROWS]; BLOCK / 2]; groups * blocks],
        }
    }

    pub(crate) const fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The group that begins with row `first`.
    pub(super) fn group(&self, first: usize) -> Group<'_> {
        let n_rows = self.group.min(self.n_places - first);
        let of_group = first * self.blocks..(first + n_rows) * self.blocks;
        Group {
            n_rows,
            numbers: &self.numbers[of_group.clone()],
            scales: &self.scales[of_group.clone()],
            biases: &self.biases[of_group],
        }
    }

    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let in_group = in_group(row, self.group);
        Row { group: self.group(row - in_group), row: in_group }
    }

    /// True if they read a matrix as one row does: once, as fast as memory gives it.
    pub(super) const fn is_few(&self) -> bool {
        self.n_rows <= GROUP
    }

    /// How many rows meet a task's panels before the next ones do: of several passes each begins with a group.
    pub(super) fn pass_rows(&self) -> usize {
        let n_passes = self.n_rows.div_ceil(ROWS_PASS).max(1);
        let n = self.n_rows.div_ceil(n_passes).next_multiple_of(self.group);
        n.min(self.n_rows).max(1)
    }
}

impl<'a> Row<'a> {
    pub(super) fn numbers(self, block: usize) -> &'a [i8; BLOCK] {
        &self.group.numbers[block * self.group.n_rows + self.row]
    }

    pub(super) fn scale(self, block: usize) -> f32 {
        self.group.scales[block * self.group.n_rows + self.row]
    }

    pub(super) fn biases(self, block: usize) -> Biases {
        self.group.biases[block * self.group.n_rows + self.row]
    }
}

/// Of so many rows, those that lie together.
const fn group_rows(isa: Isa, n_rows: usize) -> usize {
    if isa.widens() {
        WIDE_ROWS
    } else if n_rows <= GROUP {
        GROUP
    } else if isa.has_tiles() && fill_tiles(n_rows) {
        TILE_ROWS
    } else if isa.pairs_panels() {
        // As few groups as it takes, and as short as that allows; the last has what is left.
        n_rows.div_ceil(n_rows.div_ceil(PAIRED_ROWS))
    } else {
        GROUP
    }
}

/// True of so many rows that tiles of them are faster than the same without: two tiles at least, and of an eighth more rows at
/// most.
const fn fill_tiles(n_rows: usize) -> bool {
    n_rows > TILE_ROWS && n_rows.next_multiple_of(TILE_ROWS) - n_rows <= n_rows / 8
}

/// Where a row lies in its group. A division of 32 bits: one of 64 would be noticed on older cores.
#[inline(always)]
pub(super) const fn in_group(row: usize, group: usize) -> usize {
    (row as u32 % group as u32) as usize
}

fn quantize_with(isa: Isa, part: Part<'_>) {
    match isa {
        Isa::Baseline => quantize::<scalar::Scalar>(part),
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx2 => unsafe { avx2::quantize(part) },
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "sound: such an `Isa` is made by `Isa::detect` alone")]
        Isa::Avx512 | Isa::Amx => unsafe { avx512::quantize(part) },
        // The compiler makes vectors of it.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => quantize::<scalar::Scalar>(part),
    }
}

#[inline(always)]
pub(super) fn quantize<Q: Quantize>(part: Part<'_>) {
    let Part { mut x, norm, width, group: group_rows, numbers, scales, biases, wide } = part;
    let blocks = blocks(width);
    if let Some((norm, normed)) = norm {
        norm_rows(x, &norm.weight, norm.eps, normed);
        x = normed;
    }
    for (group, x) in x.chunks(group_rows * width).enumerate() {
        let n_rows = if group_rows == TILE_ROWS { TILE_ROWS } else { x.len() / width };
        for (row, x) in x.chunks_exact(width).enumerate() {
            for (block, x) in x.chunks(BLOCK).enumerate() {
                let at = group * group_rows * blocks + block * n_rows + row;
                // What is missing of the last block reads as zeros.
                let mut whole = [0.0; BLOCK];
                let x = x.as_array().unwrap_or_else(|| {
                    whole[..x.len()].copy_from_slice(x);
                    &whole
                });
                let (scale, sum) = Q::quantize(x, &mut numbers[at]);
                scales[at] = scale;
                biases[at] = biases_of(sum);
                if !wide.is_empty() {
                    widen(&numbers[at], row, &mut wide[group * blocks + block]);
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn select(from: &Rows, rows: &[usize], to: &mut Rows) {
    let blocks = from.blocks;
    for (row, &from_row) in rows.iter().enumerate() {
        let from = from.row(from_row);
        let in_group = in_group(row, to.group);
        let first = row - in_group;
        let n_rows = to.group.min(to.n_places - first);
        for block in 0..blocks {
            let at = first * blocks + block * n_rows + in_group;
            to.numbers[at] = *from.numbers(block);
            to.scales[at] = from.scale(block);
            to.biases[at] = from.biases(block);
            if !to.wide.is_empty() {
                widen(&to.numbers[at], row, &mut to.wide[row / WIDE_ROWS * blocks + block]);
            }
        }
    }
}

pub(super) const fn biases_of(sum: i32) -> Biases {
    [-128 * sum, -8 * sum]
}

#[inline(always)]
pub(super) fn widen(numbers: &[i8; BLOCK], row: usize, wide: &mut WideBlock) {
    for (wide, pair) in wide.iter_mut().zip(numbers.as_chunks::<2>().0) {
        let [low, high] = pair.map(i32::from);
        wide[row % WIDE_ROWS] = low & 0xffff | high << 16;
    }
}
