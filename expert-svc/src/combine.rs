//! Expert outputs → the rows of a reply: weights, the grid of exact combine, sums. Pure.
//!
//! Nothing that is not finite leaves here: it becomes an overflow row (exact) or an error that names the expert.

use std::collections::BTreeSet;

use half::bf16;
use ids::RowIndex;
use proto::{
    Code, Error, Frame,
    frame::{Assignment, Combine, Grid},
    rows::{Dtype, Rows},
};

use crate::group::Group;

/// What a frame became, before it is a reply.
#[derive(Debug, PartialEq)]
pub(crate) struct Combined {
    /// `[rows, hidden]`, or `[assignments, hidden]` for [`Combine::Pairs`].
    pub(crate) rows: Rows,
    /// Rows that do not fit the grid, ascending; zero in `rows`.
    pub(crate) overflow_rows: Vec<RowIndex>,
}

/// One group's outputs, weighted and, for exact combine, on the grid.
#[derive(Debug)]
pub(crate) struct Contributions<'g> {
    group: &'g Group,
    /// `[members, hidden]`
    values: Vec<f32>,
    overflow_rows: Vec<RowIndex>,
}

/// Weighs an expert's `outputs` (`[members, hidden]`) as `frame` asks.
pub(crate) fn weigh<'g>(
    frame: &Frame,
    group: &'g Group,
    mut outputs: Vec<f32>,
) -> Result<Contributions<'g>, Error> {
    let mut overflow_rows = Vec::new();
    for (&member, output) in group.members.iter().zip(outputs.chunks_exact_mut(frame.rows.width())) {
        let Assignment { row, weight, .. } = frame.assignments[member];
        match frame.combine {
            Combine::Exact(grid) => {
                if !scale_to_grid(output, weight, grid) {
                    overflow_rows.push(row);
                }
            }
            Combine::Fast | Combine::Pairs => {
                if !scale(output, weight) {
                    return Err(not_finite(format!(
                        "layer {} expert {} gives row {row} a number that is not finite",
                        frame.layer, group.expert
                    )));
                }
            }
        }
    }
    Ok(Contributions { group, values: outputs, overflow_rows })
}

/// `weight * output`, in place; false if any is not finite.
fn scale(output: &mut [f32], weight: f32) -> bool {
    output.iter_mut().fold(true, |finite, value| {
        *value *= weight;
        finite & value.is_finite()
    })
}

/// `weight * output` rounded half to even to whole steps of the grid, in place; false if any is beyond the bound or
/// not finite. Both products with the step are exact: it is a power of two.
fn scale_to_grid(output: &mut [f32], weight: f32, grid: Grid) -> bool {
    let step = grid.step();
    let per_step = step.recip();
    output.iter_mut().fold(true, |fits, value| {
        let contribution = weight * *value;
        *value = (contribution * per_step).round_ties_even() * step;
        // Written so that a NaN does not fit.
        fits & (contribution.abs() <= grid.contribution_max)
    })
}

/// The rows of a reply as they come together, one group after the other.
#[derive(Debug)]
pub(crate) struct Sums<'f> {
    frame: &'f Frame,
    /// `[rows, hidden]`, or `[assignments, hidden]` for [`Combine::Pairs`]
    values: Vec<f32>,
    overflow_rows: BTreeSet<RowIndex>,
}

impl<'f> Sums<'f> {
    pub(crate) fn new(frame: &'f Frame) -> Self {
        let n_rows = match frame.combine {
            Combine::Fast | Combine::Exact(_) => frame.rows.n_rows(),
            Combine::Pairs => frame.assignments.len(),
        };
        Self { frame, values: vec![0.0; n_rows * frame.rows.width()], overflow_rows: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, contributions: &Contributions<'_>) {
        let width = self.frame.rows.width();
        let Contributions { group, values, overflow_rows } = contributions;
        for (&member, values) in group.members.iter().zip(values.chunks_exact(width)) {
            let row = match self.frame.combine {
                Combine::Fast | Combine::Exact(_) => self.frame.assignments[member].row.index(),
                Combine::Pairs => member,
            };
            let sums = &mut self.values[row * width..(row + 1) * width];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        self.overflow_rows.extend(overflow_rows);
    }

    /// The reply's rows in the frame's dtype.
    pub(crate) fn finish(mut self) -> Result<Combined, Error> {
        let width = self.frame.rows.width();
        for row in &self.overflow_rows {
            self.values[row.index() * width..(row.index() + 1) * width].fill(0.0);
        }
        let dtype = self.frame.rows.dtype();
        let largest = match dtype {
            Dtype::F32 => f32::MAX,
            Dtype::Bf16 => bf16::MAX.to_f32(),
        };
        // A NaN does not fit either.
        let fits = |value: &f32| value.abs() <= largest;
        if let Some(at) = self.values.iter().position(|value| !fits(value)) {
            return Err(not_finite(format!(
                "layer {}: the reply's row {} has a number beyond {dtype:?}",
                self.frame.layer,
                at / width
            )));
        }
        Ok(Combined {
            rows: Rows::encode(dtype, width, &self.values),
            overflow_rows: self.overflow_rows.into_iter().collect(),
        })
    }
}

fn not_finite(message: String) -> Error {
    Error::new(Code::Internal, "not_finite", message)
}

#[cfg(test)]
mod tests {
    use ids::{ExpertId, FrameId, LayerId};

    use super::*;
    use crate::group::group;

    /// Two rows of width 2; row 0 goes to experts 1 and 2, row 1 to expert 2.
    fn frame(combine: Combine, dtype: Dtype, weight: f32) -> Frame {
        let assignment = |row, expert| Assignment { row: RowIndex(row), expert: ExpertId(expert), weight };
        Frame {
            id: FrameId(1),
            layer: LayerId(3),
            rows: Rows::encode(dtype, 2, &[0.0; 4]),
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
            sums.add(&weigh(frame, group, outputs.to_vec())?);
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
