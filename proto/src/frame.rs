//! Frames whose parts agree. The wire's lists can have any length; a [`Frame`] cannot: [`Frame::from_wire`] is the
//! only way from one to the other, and both ends of a dispatch stream go through it.

use std::time::Duration;

use ids::{Epoch, ExpertId, FrameId, LayerId, RowIndex, WeightsHash};

use crate::{Code, Error, checksum, rows::Rows, v1};

/// A router cuts a layer's work for one server into frames of at most this many bytes of rows. Far below
/// [`crate::MESSAGE_BYTES_MAX`], so that a reply with one row per assignment still fits.
pub const FRAME_BYTES_MAX: usize = 4 << 20;

/// Requests of one frame that are recorded in traces; further ones are not.
pub const TRACEPARENTS_MAX: usize = 256;

/// One (row, expert) pair with the gate's weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assignment {
    pub row: RowIndex,
    pub expert: ExpertId,
    pub weight: f32,
}

/// The grid of exact combine: every contribution is rounded to a multiple of `2^exponent`, and
/// `top-k × contribution_max ≤ 2^(exponent + 24)`, so that every partial sum is a whole number of steps below 2^24
/// and therefore exact in f32. Addition of exact sums is associative: any grouping over servers gives the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    pub exponent: i32,
    pub contribution_max: f32,
}

impl Grid {
    /// The finest grid for contributions of up to `contribution_max` (rounded up to a power of two), `top_k` a row.
    #[must_use]
    pub fn new(contribution_max: f32, top_k: usize) -> Self {
        // Within these bounds 2^exponent and its inverse are normal numbers.
        let bound = contribution_max.clamp(f32::exp2(-60.0), f32::exp2(90.0)).log2().ceil() as i32;
        let terms = top_k.next_power_of_two().trailing_zeros() as i32;
        Self { exponent: bound + terms - 24, contribution_max: f32::exp2(bound as f32) }
    }

    #[must_use]
    pub fn step(self) -> f32 {
        f32::exp2(self.exponent as f32)
    }
}

/// How a server answers. See `Combine` in `expert.proto`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    Fast,
    Exact(Grid),
    Pairs,
}

/// One layer's request to one expert server.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    pub id: FrameId,
    pub layer: LayerId,
    /// `[rows, hidden]`, after `post_attention_layernorm`.
    pub rows: Rows,
    /// Each names a row of `rows`; at least one.
    pub assignments: Vec<Assignment>,
    pub combine: Combine,
    /// How long the router will wait for the reply.
    pub timeout: Option<Duration>,
    /// W3C trace contexts of the requests in it that are recorded.
    pub traceparents: Vec<String>,
    /// Of the server's holdings that the frame was planned with; its reply carries it back.
    pub epoch: Epoch,
    /// Of the frame's experts, each once: a server with other weights refuses the frame.
    pub weights: WeightsHash,
}

/// What a frame became.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// `[rows, hidden]`, or `[assignments, hidden]` for [`Combine::Pairs`].
    pub rows: Rows,
    /// Rows that exact combine could not sum; to be asked for again as pairs.
    pub overflow_rows: Vec<RowIndex>,
    pub compute_time: Duration,
    /// From the frame's arrival to its turn.
    pub queue_time: Duration,
}

/// One frame's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub id: FrameId,
    /// The frame's.
    pub epoch: Epoch,
    /// Of the weights that computed it.
    pub weights: WeightsHash,
    pub outcome: Result<Computed, Error>,
}

impl Frame {
    /// Checks everything that can be checked without knowing which experts are held: checksum, lengths, row positions,
    /// `hidden_size`, finite numbers.
    pub fn from_wire(wire: v1::Frame, hidden_size: usize) -> Result<Self, Error> {
        checksum::check_frame(&wire)?;
        let combine = match wire.combine() {
            v1::Combine::Fast => Combine::Fast,
            v1::Combine::Pairs => Combine::Pairs,
            v1::Combine::Exact => Combine::Exact(checked_grid(&wire)?),
            v1::Combine::Unspecified => {
                return Err(Error::invalid("combine", format!("unknown combine {}", wire.combine)));
            }
        };
        let rows = Rows::from_wire(wire.rows.ok_or_else(|| Error::invalid("rows", "rows is missing"))?)?;
        if rows.width() != hidden_size {
            return Err(Error::new(
                Code::InvalidArgument,
                "wrong_hidden_size",
                format!("rows.width is {}, the model's hidden_size is {hidden_size}", rows.width()),
            )
            .with_param("rows.width"));
        }
        rows.check_finite()?;
        if wire.traceparents.len() > TRACEPARENTS_MAX {
            let n = wire.traceparents.len();
            return Err(Error::invalid(
                "traceparents",
                format!("{n} traceparents, {TRACEPARENTS_MAX} are allowed"),
            ));
        }
        let n = wire.assignment_row.len();
        for (field, len) in [
            ("assignment_expert", wire.assignment_expert.len()),
            ("assignment_weight", wire.assignment_weight.len()),
        ] {
            if len != n {
                return Err(Error::invalid(
                    field,
                    format!("{field} has {len} entries, assignment_row has {n}"),
                ));
            }
        }
        if n == 0 {
            return Err(Error::invalid("assignment_row", "the frame has no assignments"));
        }
        let lists = wire.assignment_row.iter().zip(&wire.assignment_expert).zip(&wire.assignment_weight);
        let mut assignments = Vec::with_capacity(n);
        for (at, ((&row, &expert), &weight)) in lists.enumerate() {
            if row as usize >= rows.n_rows() {
                return Err(Error::invalid(
                    "assignment_row",
                    format!("assignment_row[{at}] is {row}, the frame has {} rows", rows.n_rows()),
                ));
            }
            if !weight.is_finite() {
                return Err(Error::invalid(
                    "assignment_weight",
                    format!("assignment_weight[{at}] is {weight}"),
                ));
            }
            assignments.push(Assignment { row: RowIndex(row), expert: ExpertId(expert), weight });
        }
        Ok(Self {
            id: FrameId(wire.id),
            layer: LayerId(wire.layer),
            rows,
            assignments,
            combine,
            timeout: (wire.timeout_us > 0).then(|| Duration::from_micros(wire.timeout_us)),
            traceparents: wire.traceparents,
            epoch: Epoch(wire.epoch),
            weights: WeightsHash(wire.weights),
        })
    }

    #[must_use]
    pub fn into_wire(self) -> v1::Frame {
        let (combine, grid) = match self.combine {
            Combine::Fast => (v1::Combine::Fast, None),
            Combine::Pairs => (v1::Combine::Pairs, None),
            Combine::Exact(grid) => (v1::Combine::Exact, Some(grid)),
        };
        checksum::seal_frame(v1::Frame {
            id: self.id.0,
            layer: self.layer.0,
            rows: Some(self.rows.into_wire()),
            assignment_row: self.assignments.iter().map(|assignment| assignment.row.0).collect(),
            assignment_expert: self.assignments.iter().map(|assignment| assignment.expert.0).collect(),
            assignment_weight: self.assignments.iter().map(|assignment| assignment.weight).collect(),
            combine: combine.into(),
            grid_exponent: grid.map_or(0, |grid| grid.exponent),
            contribution_max: grid.map_or(0.0, |grid| grid.contribution_max),
            timeout_us: self
                .timeout
                .map_or(0, |timeout| u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX)),
            traceparents: self.traceparents,
            epoch: self.epoch.0,
            weights: self.weights.0,
            checksum: 0,
        })
    }
}

fn checked_grid(wire: &v1::Frame) -> Result<Grid, Error> {
    let grid = Grid { exponent: wire.grid_exponent, contribution_max: wire.contribution_max };
    if !(-126..=126).contains(&grid.exponent) {
        return Err(Error::invalid(
            "grid_exponent",
            format!("grid_exponent {} is not in -126..=126", grid.exponent),
        ));
    }
    // A single contribution within the bound must be a whole number of steps below 2^24.
    if !(grid.contribution_max > 0.0 && grid.contribution_max <= f32::exp2(24.0) * grid.step()) {
        return Err(Error::invalid(
            "contribution_max",
            format!("contribution_max {} does not fit the grid 2^{}", grid.contribution_max, grid.exponent),
        ));
    }
    Ok(grid)
}

impl Reply {
    /// Checks the checksum and the shape of the rows.
    pub fn from_wire(wire: v1::Reply) -> Result<Self, Error> {
        checksum::check_reply(&wire)?;
        let id = FrameId(wire.id);
        let outcome = match wire.outcome {
            None => return Err(Error::internal(format!("reply {id} has no outcome"))),
            Some(v1::reply::Outcome::Failure(failure)) => Err(Error {
                code: Code::parse(&failure.code),
                reason: failure.reason.into(),
                message: failure.message,
                param: None,
            }),
            Some(v1::reply::Outcome::Computed(computed)) => Ok(Computed {
                rows: Rows::from_wire(
                    computed.rows.ok_or_else(|| Error::internal(format!("reply {id} has no rows")))?,
                )?,
                overflow_rows: computed.overflow_rows.into_iter().map(RowIndex).collect(),
                compute_time: Duration::from_micros(computed.compute_us),
                queue_time: Duration::from_micros(computed.queue_us),
            }),
        };
        Ok(Self { id, epoch: Epoch(wire.epoch), weights: WeightsHash(wire.weights), outcome })
    }

    #[must_use]
    pub fn into_wire(self) -> v1::Reply {
        let outcome = match self.outcome {
            Ok(computed) => v1::reply::Outcome::Computed(v1::Computed {
                rows: Some(computed.rows.into_wire()),
                overflow_rows: computed.overflow_rows.into_iter().map(|row| row.0).collect(),
                compute_us: u64::try_from(computed.compute_time.as_micros()).unwrap_or(u64::MAX),
                queue_us: u64::try_from(computed.queue_time.as_micros()).unwrap_or(u64::MAX),
            }),
            Err(error) => v1::reply::Outcome::Failure(v1::Failure {
                code: error.code.as_str().to_owned(),
                reason: error.reason.into_owned(),
                message: error.message,
            }),
        };
        checksum::seal_reply(v1::Reply {
            id: self.id.0,
            epoch: self.epoch.0,
            weights: self.weights.0,
            checksum: 0,
            outcome: Some(outcome),
        })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::rows::Dtype;

    fn frame() -> Frame {
        Frame {
            id: FrameId(7),
            layer: LayerId(3),
            rows: Rows::encode(Dtype::F32, 2, [1.0, 2.0, 3.0, 4.0]),
            assignments: vec![
                Assignment { row: RowIndex(0), expert: ExpertId(5), weight: 0.5 },
                Assignment { row: RowIndex(1), expert: ExpertId(6), weight: 0.25 },
            ],
            combine: Combine::Exact(Grid::new(3.0, 8)),
            timeout: Some(Duration::from_millis(20)),
            traceparents: Vec::new(),
            epoch: Epoch(3),
            weights: WeightsHash(u64::MAX),
        }
    }

    #[test]
    fn a_frame_survives_the_wire() {
        assert_eq!(Frame::from_wire(frame().into_wire(), 2).unwrap(), frame());
    }

    fn check(change: impl FnOnce(&mut v1::Frame), message: &str) {
        let mut wire = frame().into_wire();
        change(&mut wire);
        assert_eq!(Frame::from_wire(checksum::seal_frame(wire), 2).unwrap_err().message, message);
    }

    #[test]
    fn a_flipped_bit_fails_the_whole_message() {
        let reply = Reply {
            id: FrameId(1),
            epoch: Epoch(2),
            weights: WeightsHash(3),
            outcome: Ok(Computed {
                rows: Rows::encode(Dtype::F32, 2, [1.0, 2.0]),
                overflow_rows: vec![RowIndex(0)],
                compute_time: Duration::from_micros(5),
                queue_time: Duration::from_micros(7),
            }),
        };
        let (frame, reply) = (frame().into_wire().encode_to_vec(), reply.into_wire().encode_to_vec());
        for bit in 0..frame.len() * 8 {
            let mut bytes = frame.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // What no longer decodes, or lost its field to an unknown one, is found too.
            let checked = v1::Frame::decode(bytes.as_slice()).map(|wire| Frame::from_wire(wire, 2));
            assert!(!matches!(checked, Ok(Ok(_))), "bit {bit} of the frame");
        }
        for bit in 0..reply.len() * 8 {
            let mut bytes = reply.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let checked = v1::Reply::decode(bytes.as_slice()).map(Reply::from_wire);
            assert!(!matches!(checked, Ok(Ok(_))), "bit {bit} of the reply");
        }
    }

    #[test]
    fn each_wrong_part_is_named() {
        check(|wire| wire.rows = None, "rows is missing");
        check(|wire| wire.combine = 9, "unknown combine 9");
        check(
            |wire| wire.assignment_weight.truncate(1),
            "assignment_weight has 1 entries, assignment_row has 2",
        );
        check(|wire| wire.assignment_row[1] = 2, "assignment_row[1] is 2, the frame has 2 rows");
        check(|wire| wire.assignment_weight[0] = f32::NAN, "assignment_weight[0] is NaN");
        check(|wire| wire.grid_exponent = 500, "grid_exponent 500 is not in -126..=126");
        check(|wire| wire.contribution_max = f32::NAN, "contribution_max NaN does not fit the grid 2^-19");
        let error = Frame::from_wire(frame().into_wire(), 3).unwrap_err();
        assert_eq!(error.message, "rows.width is 2, the model's hidden_size is 3");
    }

    #[test]
    fn sums_on_a_grid_do_not_depend_on_their_order() {
        // The largest contributions there may be, every one an odd number of steps: the worst case.
        for top_k in [1, 2, 3, 6, 8] {
            let grid = Grid::new(3.0, top_k);
            assert_eq!(grid.contribution_max, 4.0);
            let value = grid.contribution_max - grid.step();
            let mut sum = 0.0_f32;
            for _ in 0..top_k {
                sum += value;
            }
            assert_eq!(f64::from(sum), f64::from(value) * top_k as f64, "top-{top_k}");
        }
    }
}
