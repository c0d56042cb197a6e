//! The experts that a process holds, and what a frame becomes with them: [`group`] (rows by expert), the experts' forward,
//! [`combine`] (weighted sums). Synchronous: no clock, no network, so that a server behind a socket and a router beside its own
//! experts give the same bits.

#[cfg(test)]
#[expect(dead_code, reason = "the tests of expert servers use all of it")]
mod checkpoint;
mod combine;
mod group;
mod held;
mod selection;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};

use ids::WeightsHash;
use model::{Input, expert::Expert};
use proto::{
    Code, Error, Frame,
    frame::Combine,
    rows::{Dtype, Rows},
};

pub use combine::Combined;
pub use held::{Held, HoldError, Shard, describe};
pub use selection::{Problems, Selection};

use crate::{
    combine::Sums,
    group::{Group, group},
};

impl Shard {
    /// Computes each expert of `frame` once over all its rows and combines the results, with what is held at its
    /// beginning. The bits of a row follow from that row, its assignments and the mode alone.
    ///
    /// # Errors
    /// The frame asks for what is not held, or in a way that cannot be answered; or a result is not finite.
    pub fn compute(&self, frame: &Frame) -> Result<Combined, Error> {
        let dtype = frame.rows.dtype();
        if matches!(frame.combine, Combine::Exact(_)) && !dtype.is_exact() {
            return Err(Error::invalid(
                "combine",
                format!("exact combine needs F32 rows or blocks, the frame has {dtype:?} rows"),
            ));
        }
        let held = self.held();
        let groups = group(&frame.assignments);
        let work = work(&held, frame, &groups)?;
        if dtype == Dtype::Int8Blocks && !self.reads_blocks() {
            return Err(Error::invalid(
                "rows.dtype",
                "rows.dtype is INT8_BLOCKS, the experts here are not quantized",
            ));
        }
        let rows = input(&frame.rows);
        let mut sums = Sums::new(frame);
        for work in batches(&work) {
            let (groups, experts): (Vec<_>, Vec<_>) = work.iter().copied().unzip();
            let of_groups: Vec<_> = groups.iter().map(|group| group.rows(&frame.assignments)).collect();
            let list: Vec<_> = experts.into_iter().zip(of_groups.iter().map(Vec::as_slice)).collect();
            sums.add(&groups, &Expert::forward(&rows, &list))?;
        }
        sums.finish()
    }
}

/// What `compute` makes of `frame`. A panic is a fault of ours: it fails its frame and not the process.
///
/// # Errors
/// Those of `compute`, and a panic as one of them.
pub fn guarded(
    frame: &Frame,
    compute: impl Fn(&Frame) -> Result<Combined, Error>,
) -> Result<Combined, Error> {
    // Unwind safe: all that is shared with the next frame are weights, which nobody writes.
    let outcome = catch_unwind(AssertUnwindSafe(|| compute(frame))).unwrap_or_else(|_| {
        Err(Error::internal(format!(
            "frame {} (layer {}) panicked while it was computed",
            frame.id, frame.layer
        )))
    });
    if let Err(error) = &outcome
        && error.code == Code::Internal
    {
        tracing::error!(frame = %frame.id, layer = %frame.layer, reason = %error.reason, %error, "frame failed");
    }
    outcome
}

/// `[rows, hidden]`
fn input(rows: &Rows) -> Input<'_> {
    if rows.dtype() == Dtype::Int8Blocks {
        return Input::of_blocks(rows.n_rows(), rows.width(), |row, at| {
            rows.block(row, at).unwrap_or_else(|| unreachable!("every row has all of its blocks"))
        });
    }
    Input::from(rows.to_f32())
}

/// Pairs computed at once: the memory that they take follows.
const PAIRS_MAX: usize = 512;

/// As many groups at once as have at most [`PAIRS_MAX`] members, but one at least.
fn batches<'w, 'g>(
    mut work: &'w [(&'g Group, &'g Expert)],
) -> impl Iterator<Item = &'w [(&'g Group, &'g Expert)]> {
    std::iter::from_fn(move || {
        let mut n_pairs = 0;
        let fit = work.iter().take_while(|(group, _)| {
            n_pairs += group.members.len();
            n_pairs <= PAIRS_MAX
        });
        let n = fit.count().max(1).min(work.len());
        let (batch, rest) = work.split_at(n);
        work = rest;
        (!batch.is_empty()).then_some(batch)
    })
}

/// Each group with its expert, or what is wrong with them: nothing is computed for a frame that cannot be answered.
fn work<'a>(
    held: &'a Held,
    frame: &Frame,
    groups: &'a [Group],
) -> Result<Vec<(&'a Group, &'a Expert)>, Error> {
    let mut work = Vec::with_capacity(groups.len());
    let mut missing = Vec::new();
    let mut weights = WeightsHash::default();
    for group in groups {
        // A gate chooses an expert once a row. What is beyond would only cost memory.
        if group.members.len() > frame.rows.n_rows() {
            return Err(Error::invalid(
                "assignment_expert",
                format!(
                    "expert {} is assigned {} times, the frame has {} rows",
                    group.expert,
                    group.members.len(),
                    frame.rows.n_rows()
                ),
            ));
        }
        match held.experts.get(frame.layer, group.expert) {
            Some(expert) => {
                weights = weights.and(expert.weights());
                work.push((group, expert));
            }
            None => missing.push(group.expert),
        }
    }
    if !missing.is_empty() {
        let missing = cluster::table::describe(&BTreeMap::from([(frame.layer, missing)]));
        let holds = describe(&held.holds);
        return Err(Error::new(
            Code::NotFound,
            "expert_not_held",
            format!("not held here: {missing}; held here: {holds}"),
        ));
    }
    // The replies of this frame's holders would differ: nobody could say which of them is right.
    if weights != frame.weights {
        return Err(Error::new(
            Code::Unavailable,
            "weights_mismatch",
            format!(
                "layer {}: the frame asks for weights {}, its experts have {weights} here",
                frame.layer, frame.weights
            ),
        ));
    }
    Ok(work)
}

#[cfg(test)]
mod tests;
