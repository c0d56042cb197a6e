//! The experts this instance holds, and what a frame becomes with them. Synchronous: no clock, no network.

use std::collections::BTreeMap;

use ids::{ExpertId, LayerId};
use model::{Checkpoint, Experts, expert::Expert};
use proto::{Code, Error, Frame, frame::Combine, rows::Dtype};
use rayon::prelude::*;

use crate::{
    combine::{Combined, Sums, weigh},
    group::{Group, gather, group},
};

/// Some routed experts of one checkpoint.
pub(crate) struct Shard {
    experts: Experts,
    holds: BTreeMap<LayerId, Vec<ExpertId>>,
    hidden_size: usize,
    checkpoint: String,
}

impl Shard {
    /// Maps `experts` of every MoE layer and nothing else of the checkpoint.
    pub(crate) fn load(checkpoint: &Checkpoint, experts: &[ExpertId]) -> Result<Self, model::Error> {
        let config = checkpoint.config();
        let holds: BTreeMap<_, _> = config.moe_layers().map(|layer| (layer, experts.to_vec())).collect();
        let held: Vec<_> = holds
            .iter()
            .flat_map(|(&layer, experts)| experts.iter().map(move |&expert| (layer, expert)))
            .collect();
        Ok(Self {
            experts: Experts::load(checkpoint, &held)?,
            holds,
            hidden_size: config.hidden_size,
            checkpoint: checkpoint.fingerprint().to_owned(),
        })
    }

    pub(crate) const fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    pub(crate) const fn holds(&self) -> &BTreeMap<LayerId, Vec<ExpertId>> {
        &self.holds
    }

    /// The checkpoint's fingerprint.
    pub(crate) fn checkpoint(&self) -> &str {
        &self.checkpoint
    }

    pub(crate) const fn experts(&self) -> &Experts {
        &self.experts
    }

    /// Computes each expert of `frame` once over all its rows and combines the results. The bits of a row follow
    /// from that row, its assignments and the mode alone.
    pub(crate) fn compute(&self, frame: &Frame) -> Result<Combined, Error> {
        if matches!(frame.combine, Combine::Exact(_)) && frame.rows.dtype() != Dtype::F32 {
            return Err(Error::invalid(
                "combine",
                format!("exact combine needs F32 rows, the frame has {:?} rows", frame.rows.dtype()),
            ));
        }
        let groups = group(&frame.assignments);
        let work = self.work(frame, &groups)?;
        let rows = frame.rows.to_f32(); // [rows, hidden]
        let mut sums = Sums::new(frame);
        // As many groups at once as there are threads: the outputs held never exceed that many frames.
        for work in work.chunks(rayon::current_num_threads()) {
            let contributions: Vec<_> = work
                .par_iter()
                .map(|&(group, expert)| {
                    let gathered = gather(group, &frame.assignments, &rows, self.hidden_size); // [members, hidden]
                    weigh(frame, group, expert.forward(&gathered))
                })
                .collect();
            for contributions in contributions {
                sums.add(&contributions?);
            }
        }
        sums.finish()
    }

    /// Each group with its expert, or an error that names those not held: nothing is computed for a frame that
    /// cannot be answered.
    fn work<'a>(&'a self, frame: &Frame, groups: &'a [Group]) -> Result<Vec<(&'a Group, &'a Expert)>, Error> {
        let mut work = Vec::with_capacity(groups.len());
        let mut missing = Vec::new();
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
            match self.experts.get(frame.layer, group.expert) {
                Some(expert) => work.push((group, expert)),
                None => missing.push(group.expert),
            }
        }
        if missing.is_empty() {
            return Ok(work);
        }
        let missing = cluster::table::describe(&BTreeMap::from([(frame.layer, missing)]));
        let holds = cluster::table::describe(&self.holds);
        Err(Error::new(
            Code::NotFound,
            "expert_not_held",
            format!("not held here: {missing}; held here: {holds}"),
        ))
    }
}
