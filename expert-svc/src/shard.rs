//! The experts this instance holds, and what a frame becomes with them. Synchronous: no clock, no network.

mod held;

use std::collections::BTreeMap;

use ids::WeightsHash;
use model::expert::Expert;
use proto::{Code, Error, Frame, frame::Combine, rows::Dtype};
use rayon::prelude::*;

pub(crate) use held::{Held, Shard, describe};

use crate::{
    combine::{Combined, Sums, weigh},
    group::{Group, gather, group},
};

impl Shard {
    /// Computes each expert of `frame` once over all its rows and combines the results, with what is held at its
    /// beginning. The bits of a row follow from that row, its assignments and the mode alone.
    pub(crate) fn compute(&self, frame: &Frame) -> Result<Combined, Error> {
        if matches!(frame.combine, Combine::Exact(_)) && frame.rows.dtype() != Dtype::F32 {
            return Err(Error::invalid(
                "combine",
                format!("exact combine needs F32 rows, the frame has {:?} rows", frame.rows.dtype()),
            ));
        }
        let held = self.held();
        let groups = group(&frame.assignments);
        let work = work(&held, frame, &groups)?;
        let rows = frame.rows.to_f32(); // [rows, hidden]
        let mut sums = Sums::new(frame);
        // As many groups at once as there are threads: the outputs held never exceed that many frames.
        for work in work.chunks(rayon::current_num_threads()) {
            let contributions: Vec<_> = work
                .par_iter()
                .map(|&(group, expert)| {
                    let gathered = gather(group, &frame.assignments, &rows, self.hidden_size()); // [members, hidden]
                    weigh(frame, group, expert.forward(&gathered))
                })
                .collect();
            for contributions in contributions {
                sums.add(&contributions?);
            }
        }
        sums.finish()
    }
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
