//! The end of a flight: the tree of pieces → every row home once, or lost by name.

use std::collections::{BTreeMap, BTreeSet};

use ids::{ExpertId, InstanceId};
use proto::Error;

use super::{Flight, log::Log, pieces::State};
use crate::dispatch::Slot;

/// A reply with one summed row for each row of its frame.
#[derive(Debug)]
pub(crate) struct Sum {
    pub(crate) frame_rows: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// Every row is home or lost. Only [`crate::combine::combine`] takes it.
#[derive(Debug)]
#[must_use]
pub(crate) struct Landed {
    pub(crate) hidden_size: usize,
    pub(crate) n_rows: usize,
    /// In the order the pieces were made.
    pub(crate) sums: Vec<Sum>,
    /// By row: one weighted contribution for each of the gate's choices. These rows are not read from `sums`.
    pub(crate) pairs: BTreeMap<usize, Vec<Vec<f32>>>,
    /// Rows that could not be computed, with the experts nobody could serve.
    pub(crate) lost: BTreeMap<usize, Vec<ExpertId>>,
    /// Which server worked on which rows.
    pub(crate) served: Vec<(InstanceId, Vec<usize>)>,
    /// Why the last failed frame failed.
    pub(crate) last_failure: Option<Error>,
    pub(crate) log: Log,
}

impl Flight {
    /// Ends the flight. Whatever is still outstanding counts as lost.
    pub(crate) fn land(mut self) -> Landed {
        let (top_k, hidden_size) = (self.activations.top_k(), self.activations.hidden_size);
        let mut landed = Landed {
            hidden_size,
            n_rows: self.activations.n_rows(),
            sums: Vec::new(),
            pairs: BTreeMap::new(),
            lost: BTreeMap::new(),
            served: Vec::new(),
            last_failure: self.last_failure.take(),
            log: std::mem::take(&mut self.log),
        };
        let mut pairs: BTreeMap<Slot, Vec<f32>> = BTreeMap::new();
        let mut lost: BTreeSet<Slot> = BTreeSet::new();
        let mut left = std::mem::take(&mut self.roots);
        left.reverse();
        while let Some(idx) = left.pop() {
            if !matches!(self.pieces[idx].state, State::Home { .. }) {
                match self.pieces.best_cover(idx) {
                    Some(cover) => left.extend(cover.iter().rev()),
                    None => lost.extend(&self.pieces[idx].slots),
                }
                continue;
            }
            let piece = &mut self.pieces[idx];
            let State::Home { holder, frame_rows, values } =
                std::mem::replace(&mut piece.state, State::Failed)
            else {
                continue;
            };
            landed.served.push((holder, frame_rows.clone()));
            if piece.as_pairs {
                let contributions = values.chunks_exact(hidden_size).map(<[f32]>::to_vec);
                pairs.extend(piece.slots.iter().copied().zip(contributions));
            } else {
                landed.sums.push(Sum { frame_rows, values });
            }
        }
        for slot in lost {
            landed.lost.entry(slot.row(top_k)).or_default().push(self.activations.expert(slot));
        }
        for (slot, contribution) in pairs {
            let row = slot.row(top_k);
            if !landed.lost.contains_key(&row) {
                landed.pairs.entry(row).or_default().push(contribution);
            }
        }
        debug_assert!(landed.pairs.values().all(|contributions| contributions.len() == top_k));
        landed
    }
}
