//! How stored numbers read: f32 or bf16, straight from the mapped file, or quantized and packed for the kernels.

use std::{
    borrow::Cow,
    ops::{Deref, Range},
    sync::{Arc, OnceLock},
};

use half::bf16;
use memmap2::Mmap;

use crate::{
    checkpoint::packed::Blob,
    kernels::{
        Factors, Product, RmsNorm, Weight,
        packed::{self, Bits, Gated},
        products, threads,
    },
};

/// How a checkpoint stores a tensor's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Bytes of one tensor in a mapping that several tensors share.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) map: Arc<Mmap>,
    pub(crate) bytes: Range<usize>,
    pub(crate) dtype: Dtype,
}

/// Numbers of one tensor.
#[derive(Clone, Debug)]
enum Values {
    Mapped(Stored),
    /// Copied once: not aligned in the file, or in another order there.
    Copied(Vec<f32>),
    CopiedHalves(Vec<bf16>),
    Packed {
        blob: Arc<Blob>,
        bytes: Range<usize>,
        bits: Bits,
    },
}

/// The same as slices.
enum View<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Packed(Bits, &'a [u8]),
}

/// Rows that several matrices are multiplied with: quantized once, when the first of them asks, or as they were normed.
#[derive(Debug)]
pub struct Input<'a> {
    rows: Cow<'a, [f32]>,
    quantized: OnceLock<packed::Rows>,
}

impl<'a> Input<'a> {
    pub(crate) const fn new(rows: &'a [f32]) -> Self {
        Self { rows: Cow::Borrowed(rows), quantized: OnceLock::new() }
    }

    /// Rows for packed matrices alone.
    pub(crate) fn of_quantized(rows: packed::Rows) -> Self {
        Self { rows: Cow::Borrowed(&[]), quantized: OnceLock::from(rows) }
    }

    /// Rows `[rows, width]` for packed matrices alone, quantized elsewhere: `block` gives the scale and the numbers of a
    /// row's n-th 32, the last with what is left.
    #[must_use]
    pub fn of_blocks<'b>(
        n_rows: usize,
        width: usize,
        block: impl Fn(usize, usize) -> (f32, &'b [i8]) + Sync,
    ) -> Self {
        Self::of_quantized(packed::Rows::of_blocks(n_rows, width, block))
    }

    /// What packed matrices are multiplied with: of rows of `width` numbers.
    #[must_use]
    pub fn blocks(&self, width: usize) -> Blocks<'_> {
        Blocks(self.quantized(width))
    }

    /// `x` normed for `matrix`, in one pass with what that takes.
    pub(crate) fn normed(norm: &RmsNorm, x: &[f32], matrix: Option<&Linear>) -> Self {
        if matrix.is_some_and(Linear::is_packed) {
            let (rows, quantized) = packed::Rows::norm_quantize(norm, x);
            return Self { rows: Cow::Owned(rows), quantized: OnceLock::from(quantized) };
        }
        Self::from(norm.apply(x))
    }

    /// Some of the rows for each of several matrices, all of one width. Quantized are all of them together, each once.
    pub(crate) fn select(&self, list: &[(&Linear, &[usize])]) -> Vec<Input<'static>> {
        let n_rows: usize = list.iter().map(|(_, rows)| rows.len()).sum();
        let Some((Linear { width, .. }, _)) = list.first() else { return Vec::new() };
        if list.iter().any(|(matrix, _)| matrix.is_packed()) {
            self.quantized(*width);
        }
        let select = |at| {
            let (matrix, rows): (&Linear, &[usize]) = list[at];
            if matrix.is_packed() {
                return Input::of_quantized(self.quantized(*width).select(rows));
            }
            let mut selected = Vec::with_capacity(rows.len() * width);
            rows.iter().for_each(|row| selected.extend_from_slice(&self[row * width..][..*width]));
            Input::from(selected)
        };
        threads::share(n_rows * width, || threads::map(list.len(), select))
    }

    fn quantized(&self, width: usize) -> &packed::Rows {
        self.quantized.get_or_init(|| packed::Rows::quantize(&self.rows, width))
    }
}

/// Rows in int8, each 32 numbers with a scale.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a>(&'a packed::Rows);

impl<'a> Blocks<'a> {
    /// The scale and the numbers of a row's n-th block; what is missing of the last is zeros.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn block(self, row: usize, at: usize) -> (f32, &'a [i8; packed::BLOCK]) {
        self.0.block(row, at)
    }
}

impl From<Vec<f32>> for Input<'_> {
    fn from(rows: Vec<f32>) -> Self {
        Self { rows: Cow::Owned(rows), quantized: OnceLock::new() }
    }
}

impl Deref for Input<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.rows
    }
}

/// A matrix `[outputs, width]`, one row an output.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    values: Values,
    outputs: usize,
    width: usize,
}

impl Stored {
    /// All numbers as f32.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut out = Vec::new();
        let n = self.bytes.len() / self.dtype.bytes();
        self.extend(0..n, &mut out);
        out
    }

    /// Appends some of the numbers as f32.
    pub(crate) fn extend(&self, numbers: Range<usize>, out: &mut Vec<f32>) {
        let bytes = &self.map[self.bytes.clone()];
        match self.dtype {
            Dtype::F32 => {
                out.extend(bytes.as_chunks::<4>().0[numbers].iter().map(|bytes| f32::from_le_bytes(*bytes)))
            }
            Dtype::Bf16 => out.extend(
                bytes.as_chunks::<2>().0[numbers]
                    .iter()
                    .map(|bytes| Weight::to_f32(bf16::from_le_bytes(*bytes))),
            ),
        }
    }

    fn is_aligned(&self) -> bool {
        let address = self.map[self.bytes.clone()].as_ptr() as usize;
        address.is_multiple_of(match self.dtype {
            Dtype::F32 => align_of::<f32>(),
            Dtype::Bf16 => align_of::<bf16>(),
        })
    }
}

impl Linear {
    pub(crate) fn new(stored: Stored, width: usize) -> Self {
        let outputs = stored.bytes.len() / stored.dtype.bytes() / width;
        // Files are little endian; on a big-endian machine every tensor is copied.
        let usable = stored.is_aligned() && cfg!(target_endian = "little");
        let values = if usable { Values::Mapped(stored) } else { Values::Copied(stored.to_f32()) };
        Self { values, outputs, width }
    }

    /// A packed matrix `[outputs, width]` at `bytes` of a unit.
    pub(crate) fn packed(
        blob: Arc<Blob>,
        bytes: Range<usize>,
        bits: Bits,
        outputs: usize,
        width: usize,
    ) -> Self {
        Self { values: Values::Packed { blob, bytes, bits }, outputs, width }
    }

    const fn is_packed(&self) -> bool {
        matches!(self.values, Values::Packed { .. })
    }

    /// Where its whole unit is in memory, if it is packed.
    pub(crate) fn packed_addresses(&self) -> Option<Range<usize>> {
        match &self.values {
            Values::Packed { blob, .. } => Some(blob.addresses()),
            Values::Mapped(_) | Values::Copied(_) | Values::CopiedHalves(_) => None,
        }
    }

    /// Multiply-adds for so many rows.
    pub(crate) const fn work(&self, n_rows: usize) -> usize {
        n_rows * self.width * self.outputs
    }

    fn view(&self) -> View<'_> {
        match &self.values {
            Values::Packed { blob, bytes, bits } => View::Packed(*bits, &blob.bytes()[bytes.clone()]),
            Values::Copied(w) => View::F32(w),
            Values::CopiedHalves(w) => View::Bf16(w),
            Values::Mapped(Stored { map, bytes, dtype: Dtype::F32 }) => {
                View::F32(bytemuck::cast_slice(&map[bytes.clone()]))
            }
            Values::Mapped(Stored { map, bytes, dtype: Dtype::Bf16 }) => {
                View::Bf16(bytemuck::cast_slice(&map[bytes.clone()]))
            }
        }
    }

    /// `x` `[rows, width]` → `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &Input<'_>, bias: Option<&[f32]>) -> Vec<f32> {
        let [mut y] = Self::apply_all([(self, x)]);
        add_bias(&mut y, bias);
        y
    }

    /// Several matrices, each with its rows, as one job of the threads.
    pub(crate) fn apply_all<const N: usize>(list: [(&Self, &Input<'_>); N]) -> [Vec<f32>; N] {
        let results = <[Vec<f32>; N]>::try_from(Self::apply_list(&list));
        results.unwrap_or_else(|_| unreachable!("a product has one result"))
    }

    /// The same for a list.
    pub(crate) fn apply_list(list: &[(&Self, &Input<'_>)]) -> Vec<Vec<f32>> {
        products(&list.iter().map(|(matrix, x)| matrix.product(x)).collect::<Vec<_>>())
    }

    /// What silu(gate x) · up x is computed from in one pass; None if any of the matrices is not packed.
    pub(crate) fn gated<'a>(&'a self, up: &'a Self, x: &'a Input<'_>) -> Option<Gated<'a>> {
        let Self { outputs, width, .. } = *self;
        match (self.view(), up.view()) {
            (View::Packed(bits, gate), View::Packed(up_bits, up)) if bits == up_bits => {
                Some(Gated { bits, gate, up, outputs, rows: x.quantized(width), width })
            }
            _ => None,
        }
    }

    pub(crate) fn product<'a>(&'a self, x: &'a Input<'_>) -> Product<'a> {
        let Self { outputs, width, .. } = *self;
        let factors = match self.view() {
            View::F32(_) | View::Bf16(_) if x.rows.is_empty() && x.quantized.get().is_some() => {
                unreachable!("an MLP's matrices are all packed or none is")
            }
            View::F32(w) => Factors::F32(x, w),
            View::Bf16(w) => Factors::Bf16(x, w),
            View::Packed(bits, bytes) => Factors::Packed(x.quantized(width), bits, bytes),
        };
        Product { width, outputs, factors }
    }

    /// Appends one row of the matrix as f32.
    pub(crate) fn extend_row(&self, row: usize, out: &mut Vec<f32>) {
        let numbers = row * self.width..(row + 1) * self.width;
        match self.view() {
            View::F32(w) => out.extend_from_slice(&w[numbers]),
            View::Bf16(w) => out.extend(w[numbers].iter().map(|value| value.to_f32())),
            View::Packed(bits, packed) => packed::unpack_row(bits, packed, self.width, row, out),
        }
    }

    /// Some outputs of a matrix as it is stored.
    pub(crate) fn rows(&self, outputs: Range<usize>) -> Self {
        let n_outputs = outputs.len();
        let numbers = outputs.start * self.width..outputs.end * self.width;
        let values = match (&self.values, self.view()) {
            (Values::Mapped(Stored { map, bytes, dtype }), _) => {
                let start = bytes.start + numbers.start * dtype.bytes();
                let bytes = start..start + numbers.len() * dtype.bytes();
                Values::Mapped(Stored { map: Arc::clone(map), bytes, dtype: *dtype })
            }
            (_, View::F32(w)) => Values::Copied(w[numbers].to_vec()),
            (_, View::Bf16(w)) => Values::CopiedHalves(w[numbers].to_vec()),
            (_, View::Packed(..)) => unreachable!("a packed matrix is not cut"),
        };
        Self { values, outputs: n_outputs, width: self.width }
    }

    /// Some outputs of a matrix as it is stored, the other way round: `[width, outputs]`.
    pub(crate) fn transposed(&self, outputs: Range<usize>) -> Self {
        let n_outputs = outputs.len();
        let order =
            || (0..self.width).flat_map(|at| outputs.clone().map(move |output| output * self.width + at));
        let values = match self.view() {
            View::F32(w) => Values::Copied(order().map(|at| w[at]).collect()),
            View::Bf16(w) => Values::CopiedHalves(order().map(|at| w[at]).collect()),
            View::Packed(..) => unreachable!("a packed matrix is not turned"),
        };
        Self { values, outputs: self.width, width: n_outputs }
    }
}

/// `y` `[rows, bias.len()] += bias`.
pub(crate) fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
        }
    }
}
