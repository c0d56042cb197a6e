//! Activation rows on the wire: f32, bf16 at half the bytes, int8 with a scale a row at a quarter, or int8 as quantized experts
//! compute with them. A [`Rows`] always has exactly `n_rows × width` numbers; the only ways to make one are [`Rows::encode`],
//! [`Rows::of_blocks`] and [`Rows::from_wire`].

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
    /// A scale (f32) for each row, then a byte for each number, the nearest multiple of the scale: error at most 1/254 of
    /// the row's largest magnitude.
    Int8,
    /// The same for each [`BLOCK`] of a row's numbers (the last has what is left). Quantized experts round f32 rows to just
    /// this, so for them it is exact.
    Int8Blocks,
}

/// Numbers with one scale in [`Dtype::Int8Blocks`].
pub const BLOCK: usize = 32;

/// Bytes of a scale.
const SCALE_BYTES: usize = 4;
const BLOCK_BYTES: usize = SCALE_BYTES + BLOCK;

impl Dtype {
    /// Bytes of a row of `width` numbers.
    #[must_use]
    pub const fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => width.saturating_mul(4),
            Self::Bf16 => width.saturating_mul(2),
            Self::Int8 => width.saturating_add(SCALE_BYTES),
            Self::Int8Blocks => width.saturating_add(width.div_ceil(BLOCK).saturating_mul(SCALE_BYTES)),
        }
    }

    /// True if it says all that a server would make of f32 rows.
    #[must_use]
    pub const fn is_exact(self) -> bool {
        matches!(self, Self::F32 | Self::Int8Blocks)
    }

    /// Numbers of a row of `width` that have one scale, where there are scales.
    const fn scaled(self, width: usize) -> usize {
        if matches!(self, Self::Int8Blocks) && width > BLOCK { BLOCK } else { width }
    }

    /// How a frame of such rows is answered: sums of several experts' outputs are not rounded as far as what they were made
    /// from.
    #[must_use]
    pub const fn of_reply(self) -> Self {
        match self {
            Self::F32 | Self::Int8Blocks => Self::F32,
            Self::Bf16 | Self::Int8 => Self::Bf16,
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
    /// Encodes `values`, row after row; their number must be a multiple of `width`. A `Vec` of them is kept as it is where
    /// f32 is asked for. An int8 row
    /// with a number that is not finite has none that is.
    ///
    /// # Panics
    /// If it is not: the caller made both numbers.
    #[must_use]
    pub fn encode(dtype: Dtype, width: usize, values: impl Into<Vec<f32>>) -> Self {
        let values = values.into();
        assert!(
            width > 0 && values.len().is_multiple_of(width),
            "{} values in rows of {width}",
            values.len()
        );
        let n_rows = values.len() / width;
        let zeros = || BytesMut::zeroed(n_rows * dtype.row_bytes(width));
        let data = match dtype {
            Dtype::F32 => Bytes::from_owner(LittleEndian::new(values)),
            Dtype::Bf16 => {
                let mut data = zeros();
                for (bytes, value) in data.as_chunks_mut().0.iter_mut().zip(values) {
                    *bytes = bf16::from_f32(value).to_le_bytes();
                }
                data.freeze()
            }
            Dtype::Int8 | Dtype::Int8Blocks => {
                let mut data = zeros();
                let scaled = dtype.scaled(width);
                let rows = data.chunks_exact_mut(dtype.row_bytes(width)).zip(values.chunks_exact(width));
                for (row, values) in rows {
                    let blocks = row.chunks_mut(SCALE_BYTES + scaled).zip(values.chunks(scaled));
                    blocks.for_each(|(block, values)| encode_int8(block, values));
                }
                data.freeze()
            }
        };
        Self { dtype, n_rows, width, data }
    }

    /// Rows that are quantized already: `block` gives the scale and the numbers of a row's n-th [`BLOCK`], of which those
    /// beyond `width` are left out.
    ///
    /// # Panics
    /// If `width` is zero.
    #[must_use]
    pub fn of_blocks<'a>(
        n_rows: usize,
        width: usize,
        block: impl Fn(usize, usize) -> (f32, &'a [i8; BLOCK]),
    ) -> Self {
        assert!(width > 0, "rows of nothing");
        let dtype = Dtype::Int8Blocks;
        let mut data = vec![0; n_rows * dtype.row_bytes(width)];
        for (row, bytes) in data.chunks_exact_mut(dtype.row_bytes(width)).enumerate() {
            // Whole ones are copied as such, which is no call.
            let (whole, rest) = bytes.as_chunks_mut::<BLOCK_BYTES>();
            for (at, bytes) in whole.iter_mut().enumerate() {
                *bytes = block_bytes(block(row, at));
            }
            if !rest.is_empty() {
                rest.copy_from_slice(&block_bytes(block(row, whole.len()))[..rest.len()]);
            }
        }
        Self { dtype, n_rows, width, data: data.into() }
    }

    /// Scale and numbers of a row's n-th [`BLOCK`], the last with what is left; None for another [`Dtype`], and beyond
    /// the rows.
    #[must_use]
    pub fn block(&self, row: usize, at: usize) -> Option<(f32, &[i8])> {
        if self.dtype != Dtype::Int8Blocks || row >= self.n_rows || at >= self.width.div_ceil(BLOCK) {
            return None;
        }
        let bytes = &self.data[row * self.row_bytes()..][..self.row_bytes()];
        let (scale, numbers) = bytes[at * BLOCK_BYTES..].split_first_chunk::<SCALE_BYTES>()?;
        let numbers = &numbers[..BLOCK.min(self.width - at * BLOCK)];
        Some((f32::from_le_bytes(*scale), bytemuck::cast_slice(numbers)))
    }

    /// Checks that the announced shape and the bytes agree.
    pub fn from_wire(wire: v1::Rows) -> Result<Self, Error> {
        let dtype = match wire.dtype() {
            v1::Dtype::F32 => Dtype::F32,
            v1::Dtype::Bf16 => Dtype::Bf16,
            v1::Dtype::Int8 => Dtype::Int8,
            v1::Dtype::Int8Blocks => Dtype::Int8Blocks,
            v1::Dtype::Unspecified => {
                return Err(Error::invalid("rows.dtype", format!("unknown rows.dtype {}", wire.dtype)));
            }
        };
        let (n_rows, width) = (wire.n_rows as usize, wire.width as usize);
        let row_bytes = dtype.row_bytes(width);
        let expected = n_rows.checked_mul(row_bytes);
        if width == 0 || expected != Some(wire.data.len()) {
            return Err(Error::invalid(
                "rows.data",
                format!(
                    "rows.data has {} bytes, not {n_rows} rows of {width} {dtype:?} in {row_bytes} bytes",
                    wire.data.len(),
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
            Dtype::Int8 => v1::Dtype::Int8,
            Dtype::Int8Blocks => v1::Dtype::Int8Blocks,
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

    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.width)
    }

    /// All numbers as f32, row after row: `[n_rows, width]`.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::Bf16 => self.halves().collect(),
            Dtype::Int8 | Dtype::Int8Blocks => {
                let mut values = Vec::with_capacity(self.n_rows * self.width);
                for (scale, numbers) in self.scaled() {
                    values.extend(numbers.iter().map(|number| f32::from(*number as i8) * scale));
                }
                values
            }
        }
    }

    fn halves(&self) -> impl Iterator<Item = f32> + '_ {
        // Written out: `half`'s own conversion branches on NaN.
        let bits = self.data.as_chunks().0.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes)));
        bits.map(|bits| f32::from_bits(bits << 16))
    }

    /// Scales, each with the numbers that it is of, row after row.
    fn scaled(&self) -> impl Iterator<Item = (f32, &[u8])> + '_ {
        let block_bytes = SCALE_BYTES + self.dtype.scaled(self.width);
        let blocks = self.data.chunks_exact(self.row_bytes()).flat_map(move |row| row.chunks(block_bytes));
        blocks.filter_map(|block| {
            let (scale, numbers) = block.split_first_chunk::<SCALE_BYTES>()?;
            Some((f32::from_le_bytes(*scale), numbers))
        })
    }

    /// An error that names the first number that is NaN or infinite.
    pub fn check_finite(&self) -> Result<(), Error> {
        // All of them first, which is faster than looking for one.
        let all = |all: bool, value: f32| all & value.is_finite();
        let finite = match self.dtype {
            Dtype::F32 => {
                let values = self.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                values.fold(true, all)
            }
            Dtype::Bf16 => self.halves().fold(true, all),
            Dtype::Int8 | Dtype::Int8Blocks => return self.check_int8(),
        };
        if finite {
            return Ok(());
        }
        let at = self.to_f32().iter().position(|value| !value.is_finite()).unwrap_or_default();
        Err(not_finite(format!(
            "rows.data is not finite at row {}, column {}",
            at / self.width,
            at % self.width
        )))
    }

    /// Scales that are finite times 127, the largest number that there may be. Blocks are multiplied as they are: theirs are what
    /// finite numbers have.
    fn check_int8(&self) -> Result<(), Error> {
        let is_scale = |scale: f32| match self.dtype {
            Dtype::Int8Blocks => scale.abs() <= f32::MAX / 127.0,
            _ => (scale * 127.0).is_finite(),
        };
        let scaled = self.dtype.scaled(self.width);
        let per_row = self.width.div_ceil(scaled);
        for (at, (scale, numbers)) in self.scaled().enumerate() {
            let (row, first) = (at / per_row, at % per_row * scaled);
            if !is_scale(scale) {
                let whose = if first == 0 {
                    "its scale".to_owned()
                } else {
                    format!("its scale from column {first}")
                };
                return Err(not_finite(format!(
                    "rows.data is not finite at row {row}: {whose} is {scale:e}"
                )));
            }
            // All of them first, which is faster than looking for one.
            if numbers.iter().fold(false, |any, number| any | (*number == 0x80))
                && let Some(column) = numbers.iter().position(|number| *number == 0x80)
            {
                let column = first + column;
                let message = format!("rows.data has -128 at row {row}, column {column}: -127 is the least");
                return Err(Error::invalid("rows.data", message));
            }
        }
        Ok(())
    }
}

fn block_bytes((scale, numbers): (f32, &[i8; BLOCK])) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    let (scale_bytes, number_bytes) = bytes.split_at_mut(SCALE_BYTES);
    scale_bytes.copy_from_slice(&scale.to_le_bytes());
    number_bytes.copy_from_slice(&bytemuck::cast::<[i8; BLOCK], [u8; BLOCK]>(*numbers));
    bytes
}

/// Numbers whose memory is what they are on the wire.
struct LittleEndian(Vec<f32>);

impl LittleEndian {
    fn new(mut values: Vec<f32>) -> Self {
        if cfg!(target_endian = "big") {
            values.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
        }
        Self(values)
    }
}

impl AsRef<[u8]> for LittleEndian {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn not_finite(message: String) -> Error {
    Error::new(crate::Code::InvalidArgument, "not_finite", message).with_param("rows.data")
}

/// A scale and its numbers. Maximum and rounding are on integers, which compilers make vectors of: magnitudes are
/// ordered as their bits are, and a number that is added to 1.5 × 2²³ is rounded there, ties to even.
fn encode_int8(block: &mut [u8], values: &[f32]) {
    const ROUNDER: f32 = 12_582_912.0;
    let Some((scale, numbers)) = block.split_first_chunk_mut::<SCALE_BYTES>() else { return };
    let largest =
        f32::from_bits(values.iter().fold(0, |largest, value| u32::max(largest, value.abs().to_bits())));
    if !largest.is_finite() {
        *scale = f32::NAN.to_le_bytes();
        return;
    }
    *scale = (largest / 127.0).to_le_bytes();
    // Of a row of the smallest numbers that there are, the inverse would be infinite.
    let inverse = if largest > 0.0 { (127.0 / largest).min(f32::MAX) } else { 0.0 };
    for (number, value) in numbers.iter_mut().zip(values) {
        *number = (value * inverse + ROUNDER).to_bits() as u8;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn f32_rows_survive_to_the_bit(values in proptest::collection::vec(any::<f32>(), 1..40)) {
            let rows = Rows::encode(Dtype::F32, 1, values.clone());
            let back = Rows::from_wire(rows.into_wire()).unwrap().to_f32();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&back), bits(&values));
        }

        #[test]
        fn bf16_rows_are_within_their_bound(values in proptest::collection::vec(-1e30_f32..1e30, 1..40)) {
            let back = Rows::encode(Dtype::Bf16, 1, values.clone()).to_f32();
            for (value, back) in values.iter().zip(back) {
                // Below the normal numbers the spacing is absolute.
                prop_assert!((value - back).abs() <= value.abs() / 256.0 + 1e-40, "{} became {}", value, back);
            }
        }
    }

    proptest! {
        #[test]
        fn int8_rows_are_within_half_a_step(values in proptest::collection::vec(-1e30_f32..1e30, 40)) {
            let back = Rows::encode(Dtype::Int8, 20, values.clone()).to_f32();
            for (values, back) in values.chunks(20).zip(back.chunks(20)) {
                let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                for (value, back) in values.iter().zip(back) {
                    prop_assert!((value - back).abs() <= largest / 253.0, "{} became {}", value, back);
                }
            }
        }
    }

    #[test]
    fn int8_rows_have_a_scale_each_and_zeros_and_nothing_finite_stay_so() {
        let rows = Rows::encode(Dtype::Int8, 2, [0.0, 0.0, 127.0, -127.0, 1e-44, 0.0, 1.0, f32::INFINITY]);
        assert_eq!((rows.n_bytes(), rows.row_bytes()), (24, 6));
        let values = rows.to_f32();
        assert_eq!(values[..4], [0.0, 0.0, 127.0, -127.0]);
        assert!(values[4..6].iter().all(|value| value.abs() <= 1e-44));
        assert!(values[6..].iter().all(|value| value.is_nan()));
        assert_eq!(
            rows.check_finite().unwrap_err().message,
            "rows.data is not finite at row 3: its scale is NaN"
        );
        assert_eq!(Rows::from_wire(rows.clone().into_wire()).unwrap(), rows);
    }

    #[test]
    fn each_block_has_a_scale_and_the_last_what_is_left() {
        let values: Vec<f32> = (0..2 * 40).map(|at| if at % 40 < 32 { 1.0 } else { 254.0 }).collect();
        let rows = Rows::encode(Dtype::Int8Blocks, 40, values.clone());
        assert_eq!((rows.n_bytes(), rows.row_bytes()), (2 * 48, 48));
        assert_eq!(rows.to_f32(), values);
        assert_eq!(rows.block(1, 1), Some((2.0, &[127; 8][..])));
        assert_eq!([rows.block(1, 2), rows.block(2, 0)], [None; 2]);
        assert_eq!(Rows::encode(Dtype::Int8Blocks, 2, [f32::MAX, -f32::MAX]).check_finite(), Ok(()));
        let whole = [[127; BLOCK], [127; BLOCK]];
        let scales = [1.0 / 127.0, 2.0];
        assert_eq!(Rows::of_blocks(2, 40, |_, at| (scales[at], &whole[at])), rows);
        let mut wire = rows.into_wire();
        let mut data = wire.data.to_vec();
        data[48 + 36..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        wire.data = data.clone().into();
        let error = Rows::from_wire(wire.clone()).unwrap().check_finite().unwrap_err();
        assert_eq!(error.message, "rows.data is not finite at row 1: its scale from column 32 is inf");
        data[48 + 36..][..5].copy_from_slice(&[0, 0, 0, 0, 0x80]);
        wire.data = data.into();
        let error = Rows::from_wire(wire).unwrap().check_finite().unwrap_err();
        assert_eq!(error.message, "rows.data has -128 at row 1, column 32: -127 is the least");
    }

    #[test]
    fn a_scale_that_is_too_large_is_named() {
        let mut wire = Rows::encode(Dtype::Int8, 2, [1.0, 0.5]).into_wire();
        wire.data = [&f32::MAX.to_le_bytes()[..], &[127, 1]].concat().into();
        let error = Rows::from_wire(wire).unwrap().check_finite().unwrap_err();
        assert_eq!(error.message, "rows.data is not finite at row 0: its scale is 3.4028235e38");
        // The only number that 127 times a scale does not bound.
        let mut wire = Rows::encode(Dtype::Int8, 2, [1.0, 0.5, 1.0, 0.5]).into_wire();
        wire.data =
            [&1.0_f32.to_le_bytes()[..], &[127, 1], &1.0_f32.to_le_bytes(), &[1, 0x80]].concat().into();
        let error = Rows::from_wire(wire).unwrap().check_finite().unwrap_err();
        assert_eq!(error.message, "rows.data has -128 at row 1, column 1: -127 is the least");
    }

    #[test]
    fn a_wrong_length_is_named() {
        let mut wire = Rows::encode(Dtype::Bf16, 3, [0.0; 6]).into_wire();
        wire.data = Bytes::from_static(&[0; 11]);
        let error = Rows::from_wire(wire).unwrap_err();
        assert_eq!(error.message, "rows.data has 11 bytes, not 2 rows of 3 Bf16 in 6 bytes");
    }

    #[test]
    fn the_first_nan_is_named() {
        let rows = Rows::encode(Dtype::F32, 2, [0.0, 1.0, 2.0, f32::NAN]);
        assert_eq!(rows.check_finite().unwrap_err().message, "rows.data is not finite at row 1, column 1");
    }
}
