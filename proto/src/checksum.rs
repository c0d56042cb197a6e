//! What TCP's own checksum lets through: XXH3-64 over every field of a frame or reply. A message whose checksum does not
//! fit has failed as a whole; no part of it is looked at.

use std::hash::Hasher as _;

use twox_hash::XxHash3_64;

use crate::{Code, Error, v1};

struct Sum(XxHash3_64);

impl Sum {
    fn number(&mut self, number: impl Into<u64>) -> &mut Self {
        self.0.write(&number.into().to_le_bytes());
        self
    }

    /// Length first, so that bytes cannot move from one field to the next.
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u64);
        self.0.write(bytes);
        self
    }

    fn numbers(&mut self, numbers: &[u32]) -> &mut Self {
        self.number(numbers.len() as u64);
        numbers.iter().for_each(|number| self.0.write(&number.to_le_bytes()));
        self
    }

    fn rows(&mut self, rows: Option<&v1::Rows>) -> &mut Self {
        match rows {
            None => self.number(0_u64),
            Some(rows) => {
                self.number(1_u64).number(rows.dtype as u32).number(rows.n_rows).number(rows.width);
                self.bytes(&rows.data)
            }
        }
    }
}

/// The checksum that `frame` should carry.
#[must_use]
pub fn of_frame(frame: &v1::Frame) -> u64 {
    let mut sum = Sum(XxHash3_64::new());
    sum.number(frame.id).number(frame.layer).rows(frame.rows.as_ref());
    sum.numbers(&frame.assignment_row).numbers(&frame.assignment_expert);
    sum.number(frame.assignment_weight.len() as u64);
    frame.assignment_weight.iter().for_each(|weight| sum.0.write(&weight.to_bits().to_le_bytes()));
    sum.number(frame.combine as u32)
        .number(frame.grid_exponent as u32)
        .number(frame.contribution_max.to_bits())
        .number(frame.timeout_us)
        .number(frame.traceparents.len() as u64);
    frame.traceparents.iter().for_each(|traceparent| {
        sum.bytes(traceparent.as_bytes());
    });
    sum.number(frame.epoch).number(frame.weights);
    sum.0.finish()
}

/// The checksum that `reply` should carry.
#[must_use]
pub fn of_reply(reply: &v1::Reply) -> u64 {
    let mut sum = Sum(XxHash3_64::new());
    sum.number(reply.id).number(reply.epoch).number(reply.weights);
    match &reply.outcome {
        None => sum.number(0_u64),
        Some(v1::reply::Outcome::Computed(computed)) => {
            sum.number(1_u64).rows(computed.rows.as_ref()).numbers(&computed.overflow_rows);
            sum.number(computed.compute_us).number(computed.queue_us)
        }
        Some(v1::reply::Outcome::Failure(failure)) => sum
            .number(2_u64)
            .bytes(failure.code.as_bytes())
            .bytes(failure.reason.as_bytes())
            .bytes(failure.message.as_bytes()),
    };
    sum.0.finish()
}

/// Gives `frame` the checksum of what it now says.
#[must_use]
pub fn seal_frame(mut frame: v1::Frame) -> v1::Frame {
    frame.checksum = of_frame(&frame);
    frame
}

/// Gives `reply` the checksum of what it now says.
#[must_use]
pub fn seal_reply(mut reply: v1::Reply) -> v1::Reply {
    reply.checksum = of_reply(&reply);
    reply
}

pub(crate) fn check_frame(frame: &v1::Frame) -> Result<(), Error> {
    check("frame", frame.id, frame.checksum, of_frame(frame))
}

pub(crate) fn check_reply(reply: &v1::Reply) -> Result<(), Error> {
    check("reply", reply.id, reply.checksum, of_reply(reply))
}

fn check(what: &str, id: u64, carried: u64, computed: u64) -> Result<(), Error> {
    if carried == computed {
        return Ok(());
    }
    let message = format!("{what} {id} carries checksum {carried:016x}, its bytes have {computed:016x}");
    Err(Error::new(Code::Unavailable, "checksum_mismatch", message))
}
