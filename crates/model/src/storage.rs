//! How stored numbers read: f32 or bf16, straight from the mapped file.

use std::{ops::Range, sync::Arc};

use half::bf16;
use memmap2::Mmap;

use crate::kernels::{Isa, Weight, axpy, linear};

/// How a checkpoint stores a tensor's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    Bf16,
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
}

/// A matrix `[outputs, width]`, one row an output.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    values: Values,
    width: usize,
}

/// Runs `$body` with the numbers as a slice of their own type.
macro_rules! with_values {
    ($values:expr, |$w:ident| $body:expr) => {
        match $values {
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
        let bytes = &self.map[self.bytes.clone()];
        match self.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| Weight::to_f32(bf16::from_le_bytes(*bytes)))
                .collect(),
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

    /// `x` `[rows, width]` → `[rows, outputs]`.
    pub(crate) fn apply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        with_values!(&self.values, |w| linear(x, w, self.width, bias))
    }

    /// The same with some of the outputs alone.
    pub(crate) fn apply_outputs(&self, x: &[f32], outputs: Range<usize>) -> Vec<f32> {
        with_values!(&self.values, |w| linear(
            x,
            &w[outputs.start * self.width..outputs.end * self.width],
            self.width,
            None
        ))
    }

    /// `x` `[outputs.len()]` times those rows of the matrix: `sum` `[width] += Σ x[i] * row[i]`, in order.
    pub(crate) fn add_rows(&self, x: &[f32], outputs: Range<usize>, sum: &mut [f32]) {
        let isa = Isa::detect();
        with_values!(&self.values, |w| for (x, row) in x.iter().zip(outputs) {
            axpy(isa, *x, &w[row * self.width..][..self.width], sum);
        });
    }

    /// Appends one row of the matrix as f32.
    pub(crate) fn extend_row(&self, row: usize, out: &mut Vec<f32>) {
        with_values!(&self.values, |w| out
            .extend(w[row * self.width..][..self.width].iter().map(|value| value.to_f32())));
    }
}
