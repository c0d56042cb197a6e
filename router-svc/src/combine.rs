//! Replies and shared experts → the layer's update. The order of every sum is fixed: with exact combine any order
//! gives the same bits, pairs are summed in gate order, and fast sums follow the order of the frames.

use std::collections::BTreeMap;

use ids::{ExpertId, InstanceId};
use model::threads;
use proto::Error;

use crate::flight::{Landed, log::Log};

/// One layer's update to the hidden states.
#[derive(Debug)]
pub(crate) struct Combined {
    /// `[rows, hidden]`: routed plus shared experts. Rows in `lost` hold no meaning.
    pub(crate) update: Vec<f32>,
    pub(crate) lost: BTreeMap<usize, Vec<ExpertId>>,
    pub(crate) served: Vec<(InstanceId, Vec<usize>)>,
    pub(crate) last_failure: Option<Error>,
    pub(crate) log: Log,
}

/// Rows that one thread sums at a time.
const ROWS_PART: usize = 8;

/// Adds the routed experts' contributions and `shared` `[rows, hidden]`.
pub(crate) fn combine(landed: Landed, shared: Vec<f32>) -> Combined {
    let hidden_size = landed.hidden_size;
    debug_assert_eq!(shared.len(), landed.n_rows * hidden_size);
    // By row, in the order in which they are summed.
    let mut contributions: Vec<Vec<&[f32]>> = vec![Vec::new(); landed.n_rows];
    for sum in &landed.sums {
        for (&row, values) in sum.frame_rows.iter().zip(sum.values.chunks_exact(hidden_size)) {
            if !landed.pairs.contains_key(&row) {
                contributions[row].push(values);
            }
        }
    }
    for (&row, of_experts) in &landed.pairs {
        contributions[row].extend(of_experts.iter().map(Vec::as_slice));
    }
    let mut update = shared;
    let parts = update.chunks_mut(ROWS_PART * hidden_size).zip(contributions.chunks(ROWS_PART)).collect();
    threads::for_each(parts, |(update, contributions): (&mut [f32], &[Vec<&[f32]>])| {
        let mut routed = vec![0.0; hidden_size];
        for (update, contributions) in update.chunks_exact_mut(hidden_size).zip(contributions) {
            routed.fill(0.0);
            contributions.iter().for_each(|values| model::add(&mut routed, values));
            model::add(update, &routed);
        }
    });
    Combined {
        update,
        lost: landed.lost,
        served: landed.served,
        last_failure: landed.last_failure,
        log: landed.log,
    }
}
