//! Expert outputs → the rows of a reply: weights, the grid of exact combine, sums. Pure.
//!
//! Nothing that is not finite leaves here: it becomes an overflow row (exact) or an error that names the expert.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use ids::RowIndex;
use model::threads;
use proto::{
    Code, Error, Frame,
    frame::{Assignment, Combine},
    rows::{Dtype, Rows},
};

use crate::group::Group;

/// What a frame became, before it is a reply.
#[derive(Debug, PartialEq)]
pub struct Combined {
    /// `[rows, hidden]`, or `[assignments, hidden]` for [`Combine::Pairs`].
    pub rows: Rows,
    /// Rows that do not fit the grid, ascending; zero in `rows`.
    pub overflow_rows: Vec<RowIndex>,
}

/// Rows that one thread sums at a time.
const ROWS_PART: usize = 8;

/// The rows of a reply as they come together, some groups after the others.
#[derive(Debug)]
pub(crate) struct Sums<'f> {
    frame: &'f Frame,
    /// `[rows, hidden]`, or `[assignments, hidden]` for [`Combine::Pairs`]
    values: Vec<f32>,
    /// For each row of `values`: false once a contribution was not finite or did not fit the grid.
    good: Vec<bool>,
}

impl<'f> Sums<'f> {
    pub(crate) fn new(frame: &'f Frame) -> Self {
        let n_rows = match frame.combine {
            Combine::Fast | Combine::Exact(_) => frame.rows.n_rows(),
            Combine::Pairs => frame.assignments.len(),
        };
        Self { frame, values: vec![0.0; n_rows * frame.rows.width()], good: vec![true; n_rows] }
    }

    /// Adds the groups' outputs, `[members, hidden]` each, weighted as the frame asks. A row's are added in the order of
    /// the groups; rows are shared by the threads.
    pub(crate) fn add(&mut self, groups: &[&Group], outputs: &[Vec<f32>]) -> Result<(), Error> {
        let frame = self.frame;
        let width = frame.rows.width();
        // By row of `values`: the assignments, and their outputs.
        let mut contributions: Vec<Vec<(&Assignment, &[f32])>> = vec![Vec::new(); self.good.len()];
        for (group, outputs) in groups.iter().zip(outputs) {
            for (&member, output) in group.members.iter().zip(outputs.chunks_exact(width)) {
                let assignment = &frame.assignments[member];
                let row = match frame.combine {
                    Combine::Fast | Combine::Exact(_) => assignment.row.index(),
                    Combine::Pairs => member,
                };
                contributions[row].push((assignment, output));
            }
        }
        let bad = Mutex::new(None);
        let parts = self.values.chunks_mut(ROWS_PART * width).zip(self.good.chunks_mut(ROWS_PART));
        let parts = parts.zip(contributions.chunks(ROWS_PART)).collect();
        threads::for_each(parts, |((values, good), contributions)| {
            for ((sum, good), contributions) in values.chunks_exact_mut(width).zip(good).zip(contributions) {
                for &(assignment, output) in contributions {
                    let fits = add(frame.combine, sum, output, assignment.weight);
                    *good &= fits;
                    if !fits && !matches!(frame.combine, Combine::Exact(_)) {
                        let mut bad = bad.lock().unwrap_or_else(PoisonError::into_inner);
                        let first = bad.get_or_insert(*assignment);
                        if (assignment.expert, assignment.row) < (first.expert, first.row) {
                            *first = *assignment;
                        }
                    }
                }
            }
        });
        match bad.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(Assignment { row, expert, .. }) => Err(not_finite(format!(
                "layer {} expert {expert} gives row {row} a number that is not finite",
                frame.layer
            ))),
        }
    }

    /// The reply's rows.
    pub(crate) fn finish(mut self) -> Result<Combined, Error> {
        let width = self.frame.rows.width();
        let mut overflow_rows = Vec::new();
        for (row, values) in self.values.chunks_exact_mut(width).enumerate() {
            if !self.good[row] {
                values.fill(0.0);
                overflow_rows.push(RowIndex(row as u32));
            }
        }
        let dtype = self.frame.rows.dtype().of_reply();
        let largest = match dtype {
            Dtype::F32 | Dtype::Int8 | Dtype::Int8Blocks => f32::MAX,
            Dtype::Bf16 => bf16::MAX.to_f32(),
        };
        // A NaN does not fit either. All of them first, which is faster than looking for one.
        let fits = |value: &f32| value.abs() <= largest;
        if !model::within(&self.values, largest)
            && let Some(at) = self.values.iter().position(|value| !fits(value))
        {
            return Err(not_finite(format!(
                "layer {}: the reply's row {} has a number beyond {dtype:?}",
                self.frame.layer,
                at / width
            )));
        }
        Ok(Combined { rows: Rows::encode(dtype, width, self.values), overflow_rows })
    }
}

/// `sum += weight * output` as the mode has it; false if that went wrong.
fn add(combine: Combine, sum: &mut [f32], output: &[f32], weight: f32) -> bool {
    match combine {
        Combine::Exact(grid) => model::add_on_grid(sum, output, weight, grid.step(), grid.contribution_max),
        Combine::Fast | Combine::Pairs => model::add_weighted(sum, output, weight),
    }
}

fn not_finite(message: String) -> Error {
    Error::new(Code::Internal, "not_finite", message)
}

#[cfg(test)]
mod tests {
    use ids::{ExpertId, FrameId, LayerId};
    use proto::frame::Grid;

    use super::*;
    use crate::group::group;

    /// Two rows of width 2; row 0 goes to experts 1 and 2, row 1 to expert 2.
    fn frame(combine: Combine, dtype: Dtype, weight: f32) -> Frame {
        let assignment = |row, expert| Assignment { row: RowIndex(row), expert: ExpertId(expert), weight };
        Frame {
            id: FrameId(1),
            layer: LayerId(3),
            rows: Rows::encode(dtype, 2, [0.0; 4]),
            assignments: vec![assignment(0, 2), assignment(0, 1), assignment(1, 2)],
            combine,
            timeout: None,
            traceparents: Vec::new(),
            epoch: ids::Epoch::default(),
            weights: ids::WeightsHash::default(),
        }
    }

    fn combine(frame: &Frame, outputs: [&[f32]; 2]) -> Result<(Vec<f32>, Vec<u32>), Error> {
        let groups = group(&frame.assignments);
        let mut sums = Sums::new(frame);
        for (group, outputs) in groups.iter().zip(outputs) {
            sums.add(&[group], &[outputs.to_vec()])?;
        }
        let combined = sums.finish()?;
        assert_eq!(combined.rows.dtype(), frame.rows.dtype());
        Ok((combined.rows.to_f32(), combined.overflow_rows.into_iter().map(|row| row.0).collect()))
    }

    /// Outputs of expert 1 for row 0, and of expert 2 for rows 0 and 1.
    fn check(combine_as: Combine, outputs: [&[f32]; 2], rows: &[f32], overflow_rows: &[u32]) {
        let result = combine(&frame(combine_as, Dtype::F32, 0.5), outputs);
        assert_eq!(result, Ok((rows.to_vec(), overflow_rows.to_vec())), "{combine_as:?} {outputs:?}");
    }

    const QUARTERS: Grid = Grid { exponent: -2, contribution_max: 4.0 };

    #[test]
    fn each_mode_answers_its_rows() {
        let outputs: [&[f32]; 2] = [&[2.0, 4.0], &[20.0, 40.0, 200.0, 400.0]];
        check(Combine::Fast, outputs, &[11.0, 22.0, 100.0, 200.0], &[]);
        check(Combine::Pairs, outputs, &[10.0, 20.0, 1.0, 2.0, 100.0, 200.0], &[]);
        check(
            Combine::Exact(Grid { exponent: -2, contribution_max: 256.0 }),
            outputs,
            &[11.0, 22.0, 100.0, 200.0],
            &[],
        );
    }

    #[test]
    fn exact_contributions_are_rounded_half_to_even_before_they_are_summed() {
        // Weighted: 0.125 → 0 and 0.375 → 0.5 (halves of a step), 0.3 → 0.25, -0.375 → -0.5.
        check(
            Combine::Exact(QUARTERS),
            [&[0.25, 0.75], &[0.25, 0.6, -0.75, 8.0]],
            &[0.0, 0.75, -0.5, 4.0],
            &[],
        );
    }

    #[test]
    fn a_row_beyond_the_grid_is_listed_and_zero() {
        let beyond = 8.0_f32.next_up();
        check(Combine::Exact(QUARTERS), [&[2.0, beyond], &[2.0, 2.0, 2.0, 2.0]], &[0.0, 0.0, 1.0, 1.0], &[0]);
        check(
            Combine::Exact(QUARTERS),
            [&[2.0, 2.0], &[2.0, 2.0, f32::NAN, 2.0]],
            &[2.0, 2.0, 0.0, 0.0],
            &[1],
        );
        let both: [&[f32]; 2] = [&[f32::INFINITY, 0.0], &[-9.0, 0.0, -9.0, 0.0]];
        check(Combine::Exact(QUARTERS), both, &[0.0; 4], &[0, 1]);
    }

    #[test]
    fn what_is_not_finite_is_an_error_that_names_the_expert() {
        let bad: [&[f32]; 2] = [&[0.0, 0.0], &[0.0, 0.0, f32::NAN, 0.0]];
        for mode in [Combine::Fast, Combine::Pairs] {
            let error = combine(&frame(mode, Dtype::F32, 0.5), bad).unwrap_err();
            assert_eq!(error.message, "layer 3 expert 2 gives row 1 a number that is not finite");
            assert_eq!((error.code, error.reason.as_ref()), (Code::Internal, "not_finite"));
        }
        // Finite by themselves, infinite as a sum or in bf16.
        let large: [&[f32]; 2] = [&[f32::MAX, 0.0], &[f32::MAX, 0.0, 0.0, 0.0]];
        let error = combine(&frame(Combine::Fast, Dtype::F32, 1.0), large).unwrap_err();
        assert_eq!(error.message, "layer 3: the reply's row 0 has a number beyond F32");
        let error = combine(&frame(Combine::Pairs, Dtype::Bf16, 1.0), large).unwrap_err();
        assert_eq!(error.message, "layer 3: the reply's row 0 has a number beyond Bf16");
    }
}
