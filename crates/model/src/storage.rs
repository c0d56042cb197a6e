//! How stored numbers read: f32 or bf16, straight from the mapped file, or quantized and packed for the kernels.

use std::{cell::OnceCell, ops::Range, sync::Arc};

use half::bf16;
use memmap2::Mmap;

use crate::{
    checkpoint::packed::Blob,
    kernels::{
        Isa, Weight, axpy, linear,
        packed::{self, Bits},
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
    /// Not aligned in the file: copied once.
    Copied(Vec<f32>),
    Packed {
        blob: Arc<Blob>,
        bytes: Range<usize>,
        bits: Bits,
        outputs: usize,
    },
}

/// Rows that several matrices are multiplied with: quantized once, when the first of them asks.
pub(crate) struct Input<'a> {
    rows: &'a [f32],
    quantized: OnceCell<packed::Rows>,
}

impl<'a> Input<'a> {
    pub(crate) const fn new(rows: &'a [f32]) -> Self {
        Self { rows, quantized: OnceCell::new() }
    }
}

/// A matrix `[outputs, width]`, one row an output.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    values: Values,
    width: usize,
}

/// Runs `$body` with the numbers as a slice of their own type, or `$packed` with a packed matrix.
macro_rules! with_values {
    ($values:expr, |$w:ident| $body:expr, |$bits:ident, $bytes:ident, $outputs:ident| $packed:expr) => {
        match $values {
            Values::Packed { blob, bytes, bits: $bits, outputs: $outputs } => {
                let $bytes = &blob.bytes()[bytes.clone()];
                $packed
            }
            Values::Copied($w) => $body,
            Values::Mapped(stored) => {
                let bytes = &stored.map[stored.bytes.clone()];
                match stored.dtype {
                    Dtype::F32 => {
                        let $w: &[f32] = bytemuck::cast_slice(bytes);
                        $body
                    }
                    Dtype::Bf16 => {
                        let $w: &[bf16] = bytemuck::cast_slice(bytes);
                        $body
                    }
                }
            }
        }
    };
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
        // Files are little endian; on a big-endian machine every tensor is copied.
        let usable = stored.is_aligned() && cfg!(target_endian = "little");
        let values = if usable { Values::Mapped(stored) } else { Values::Copied(stored.to_f32()) };
        Self { values, width }
    }

    /// A packed matrix `[outputs, width]` at `bytes` of a unit.
    pub(crate) fn packed(
        blob: Arc<Blob>,
        bytes: Range<usize>,
        bits: Bits,
        outputs: usize,
        width: usize,
    ) -> Self {
        Self { values: Values::Packed { blob, bytes, bits, outputs }, width }
    }

    /// Where its whole unit is in memory, if it is packed.
    pub(crate) fn packed_addresses(&self) -> Option<Range<usize>> {
        match &self.values {
            Values::Packed { blob, .. } => {
                let start = blob.bytes().as_ptr() as usize;
                Some(start..start + blob.bytes().len())
            }
            Values::Mapped(_) | Values::Copied(_) => None,
        }
    }

    /// `x` `[rows, width]` → `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        self.apply_to(&Input::new(x), bias)
    }

    /// The same for rows that other matrices are multiplied with too.
    pub(crate) fn apply_to(&self, x: &Input<'_>, bias: Option<&[f32]>) -> Vec<f32> {
        with_values!(&self.values, |w| linear(x.rows, w, self.width, bias), |bits, packed, outputs| {
            let rows = x.quantized.get_or_init(|| packed::Rows::quantize(x.rows, self.width));
            let mut y = packed::matmul(*bits, rows, packed, self.width, *outputs);
            if let Some(bias) = bias {
                for row in y.chunks_exact_mut(*outputs) {
                    row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
                }
            }
            y
        })
    }

    /// The same with some of the outputs alone, of a matrix as it is stored.
    pub(crate) fn apply_outputs(&self, x: &[f32], outputs: Range<usize>) -> Vec<f32> {
        let of = outputs.start * self.width..outputs.end * self.width;
        with_values!(&self.values, |w| linear(x, &w[of], self.width, None), |_bits, _packed, _outputs| {
            unreachable!("a packed matrix is applied whole")
        })
    }

    /// `x` `[outputs.len()]` times those rows of a matrix as it is stored: `sum` `[width] += Σ x[i] * row[i]`, in order.
    pub(crate) fn add_rows(&self, x: &[f32], outputs: Range<usize>, sum: &mut [f32]) {
        let isa = Isa::detect();
        with_values!(
            &self.values,
            |w| for (x, row) in x.iter().zip(outputs) {
                axpy(isa, *x, &w[row * self.width..][..self.width], sum);
            },
            |_bits, _packed, _outputs| unreachable!("a packed matrix is applied whole")
        );
    }

    /// Appends one row of the matrix as f32.
    pub(crate) fn extend_row(&self, row: usize, out: &mut Vec<f32>) {
        with_values!(
            &self.values,
            |w| out.extend(w[row * self.width..][..self.width].iter().map(|value| value.to_f32())),
            |bits, packed, _outputs| packed::unpack_row(*bits, packed, self.width, row, out)
        );
    }
}
