//! Activation rows on the wire: f32, or bf16 at half the bytes. A [`Rows`] always has exactly
//! `n_rows × width` numbers; the only ways to make one are [`Rows::encode`] and [`Rows::from_wire`].

use bytes::{Bytes, BytesMut};
use half::bf16;

use crate::{Error, v1};

/// How a number of an activation row is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 4 bytes, exact.
    F32,
    /// 2 bytes, rounded to nearest even: relative error at most 2^-8 for normal numbers.
    Bf16,
}

impl Dtype {
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A matrix of activations in wire form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    dtype: Dtype,
    n_rows: usize,
    width: usize,
    data: Bytes,
}

impl Rows {
    /// Encodes `values`, row after row; their number must be a multiple of `width`.
    ///
    /// # Panics
    /// If it is not: the caller made both numbers.
    #[must_use]
    pub fn encode(dtype: Dtype, width: usize, values: &[f32]) -> Self {
        assert!(
            width > 0 && values.len().is_multiple_of(width),
            "{} values in rows of {width}",
            values.len()
        );
        let mut data = BytesMut::with_capacity(values.len() * dtype.bytes());
        match dtype {
            Dtype::F32 => values.iter().for_each(|value| data.extend_from_slice(&value.to_le_bytes())),
            Dtype::Bf16 => {
                values.iter().for_each(|value| data.extend_from_slice(&bf16::from_f32(*value).to_le_bytes()));
            }
        }
        Self { dtype, n_rows: values.len() / width, width, data: data.freeze() }
    }

    /// Checks that the announced shape and the bytes agree.
    pub fn from_wire(wire: v1::Rows) -> Result<Self, Error> {
        let dtype = match wire.dtype() {
            v1::Dtype::F32 => Dtype::F32,
            v1::Dtype::Bf16 => Dtype::Bf16,
            v1::Dtype::Unspecified => {
                return Err(Error::invalid("rows.dtype", format!("unknown rows.dtype {}", wire.dtype)));
            }
        };
        let (n_rows, width) = (wire.n_rows as usize, wire.width as usize);
        let expected = n_rows.checked_mul(width).and_then(|n| n.checked_mul(dtype.bytes()));
        if width == 0 || expected != Some(wire.data.len()) {
            return Err(Error::invalid(
                "rows.data",
                format!(
                    "rows.data has {} bytes, not {n_rows} x {width} x {} bytes",
                    wire.data.len(),
                    dtype.bytes()
                ),
            ));
        }
        Ok(Self { dtype, n_rows, width, data: wire.data })
    }

    #[must_use]
    pub fn into_wire(self) -> v1::Rows {
        let dtype = match self.dtype {
            Dtype::F32 => v1::Dtype::F32,
            Dtype::Bf16 => v1::Dtype::Bf16,
        };
        v1::Rows {
            dtype: dtype.into(),
            n_rows: u32::try_from(self.n_rows).unwrap_or(u32::MAX),
            width: u32::try_from(self.width).unwrap_or(u32::MAX),
            data: self.data,
        }
    }

    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    #[must_use]
    pub const fn n_rows(&self) -> usize {
        self.n_rows
    }

    #[must_use]
    pub const fn width(&self) -> usize {
        self.width
    }

    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.data.len()
    }

    /// All numbers as f32, row after row.
    pub fn values(&self) -> impl Iterator<Item = f32> + '_ {
        // One arm of the chain is empty: an iterator of one type without a box.
        let (singles, halves): (&[u8], &[u8]) = match self.dtype {
            Dtype::F32 => (&self.data, &[]),
            Dtype::Bf16 => (&[], &self.data),
        };
        let singles = singles.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let halves = halves.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32());
        singles.chain(halves)
    }

    /// All numbers as f32, row after row: `[n_rows, width]`.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => {
                self.data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
            }
            Dtype::Bf16 => self
                .data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
                .collect(),
        }
    }

    /// An error that names the first number that is NaN or infinite.
    pub fn check_finite(&self) -> Result<(), Error> {
        match self.values().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::new(
                crate::Code::InvalidArgument,
                "not_finite",
                format!("rows.data is not finite at row {}, column {}", at / self.width, at % self.width),
            )
            .with_param("rows.data")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn f32_rows_survive_to_the_bit(values in proptest::collection::vec(any::<f32>(), 1..40)) {
            let rows = Rows::encode(Dtype::F32, 1, &values);
            let back = Rows::from_wire(rows.into_wire()).unwrap().to_f32();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&back), bits(&values));
        }

        #[test]
        fn bf16_rows_are_within_their_bound(values in proptest::collection::vec(-1e30_f32..1e30, 1..40)) {
            let back = Rows::encode(Dtype::Bf16, 1, &values).to_f32();
            for (value, back) in values.iter().zip(back) {
                // Below the normal numbers the spacing is absolute.
                prop_assert!((value - back).abs() <= value.abs() / 256.0 + 1e-40, "{} became {}", value, back);
            }
        }
    }

    #[test]
    fn a_wrong_length_is_named() {
        let mut wire = Rows::encode(Dtype::Bf16, 3, &[0.0; 6]).into_wire();
        wire.data = Bytes::from_static(&[0; 11]);
        let error = Rows::from_wire(wire).unwrap_err();
        assert_eq!(error.message, "rows.data has 11 bytes, not 2 x 3 x 2 bytes");
    }

    #[test]
    fn the_first_nan_is_named() {
        let rows = Rows::encode(Dtype::F32, 2, &[0.0, 1.0, 2.0, f32::NAN]);
        assert_eq!(rows.check_finite().unwrap_err().message, "rows.data is not finite at row 1, column 1");
    }
}
