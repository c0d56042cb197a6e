//! A matrix that several threads fill, each with columns of its own.

use std::{marker::PhantomData, ops::Range, slice};

/// Some columns of a matrix `[rows, n_columns]`.
pub(crate) struct Columns<'a, T = f32> {
    /// The matrix's first number.
    start: *mut T,
    n_rows: usize,
    n_columns: usize,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "sound: as a `&mut [T]` is, since no two hold the same number")]
unsafe impl<T: Send> Send for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    /// Cuts `matrix` between columns: `share` of them each, the last what is left.
    pub(crate) fn split(matrix: &'a mut [T], n_columns: usize, share: usize) -> impl Iterator<Item = Self> {
        let (start, n_rows) = (matrix.as_mut_ptr(), matrix.len() / n_columns);
        (0..n_columns).step_by(share).map(move |first| Self {
            start,
            n_rows,
            n_columns,
            columns: first..(first + share).min(n_columns),
            matrix: PhantomData,
        })
    }

    /// All of them.
    pub(crate) fn whole(matrix: &'a mut [T], n_columns: usize) -> Self {
        let (start, n_rows) = (matrix.as_mut_ptr(), matrix.len() / n_columns);
        Self { start, n_rows, n_columns, columns: 0..n_columns, matrix: PhantomData }
    }

    /// Which columns these are.
    pub(crate) fn range(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Their numbers of one row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.n_rows, "row {row} of {}", self.n_rows);
        #[expect(
            unsafe_code,
            reason = "sound: the row is in the matrix, which outlives this, and nobody else has these columns of it"
        )]
        unsafe {
            let start = self.start.add(row * self.n_columns + self.columns.start);
            slice::from_raw_parts_mut(start, self.columns.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_cover_a_matrix_once() {
        for share in [1, 2, 3, 5, 7] {
            let mut matrix = [0.0; 3 * 5];
            for (at, mut columns) in Columns::split(&mut matrix, 5, share).enumerate() {
                for row in 0..3 {
                    columns.row(row).iter_mut().for_each(|value| *value += (at * share + row) as f32);
                }
            }
            for (at, value) in matrix.iter().enumerate() {
                assert_eq!(*value, (at % 5 / share * share + at / 5) as f32, "{share}: {matrix:?}");
            }
        }
    }
}
