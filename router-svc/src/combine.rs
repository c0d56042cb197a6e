//! Replies and shared experts → the layer's update. The order of every sum is fixed: with exact combine any order
//! gives the same bits, pairs are summed in gate order, and fast sums follow the order of the frames.

use std::collections::BTreeMap;

use ids::{ExpertId, InstanceId};
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

/// Adds the routed experts' contributions and `shared` `[rows, hidden]`.
pub(crate) fn combine(landed: Landed, shared: Vec<f32>) -> Combined {
    let hidden_size = landed.hidden_size;
    debug_assert_eq!(shared.len(), landed.n_rows * hidden_size);
    let mut routed = vec![0.0_f32; shared.len()];
    for sum in &landed.sums {
        for (&row, values) in sum.frame_rows.iter().zip(sum.values.chunks_exact(hidden_size)) {
            if !landed.pairs.contains_key(&row) {
                add(&mut routed[row * hidden_size..][..hidden_size], values);
            }
        }
    }
    for (&row, contributions) in &landed.pairs {
        for contribution in contributions {
            add(&mut routed[row * hidden_size..][..hidden_size], contribution);
        }
    }
    let mut update = shared;
    add(&mut update, &routed);
    Combined {
        update,
        lost: landed.lost,
        served: landed.served,
        last_failure: landed.last_failure,
        log: landed.log,
    }
}

/// `sum += values`, element by element.
pub(crate) fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}
