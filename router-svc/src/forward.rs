//! The layer loop. Reads like the paper: attend, gate, dispatch, shared experts meanwhile, combine.

use std::{collections::BTreeMap, sync::Arc};

use cluster::table;
use ids::{ExpertId, LayerId, RowIndex};
use model::{Assignments, Backbone, FeedForward, Moe, Pages, Span, threads};
use proto::{
    Error,
    frame::{self, Grid},
    rows::Dtype,
};

use crate::{
    args::{Combine, Limits, OnMissingExpert},
    combine::{Combined, combine},
    dispatch::{Activations, Traced},
    remote::Remote,
    sequence::Participants,
    spans::{DispatchLog, LayerLog},
};

/// How the router combines, with the grid of each layer where it needs one.
#[derive(Clone, Debug)]
pub(crate) struct CombineMode {
    pub(crate) mode: frame::Combine,
    /// By layer, for exact combine.
    pub(crate) grids: BTreeMap<LayerId, Grid>,
    pub(crate) dtype: Dtype,
    /// Experts without a holder are left out by the gate, and the answer says so; otherwise their rows wait.
    pub(crate) skip_missing: bool,
}

impl CombineMode {
    /// Before calibration there are no grids, and exact combine falls back to pairs: the calibration itself uses it.
    pub(crate) fn new(limits: &Limits) -> Self {
        let mode = match limits.combine {
            Combine::Exact | Combine::Pairs => frame::Combine::Pairs,
            Combine::Fast => frame::Combine::Fast,
        };
        Self {
            mode,
            grids: BTreeMap::new(),
            dtype: limits.wire.dtype(),
            skip_missing: limits.on_missing_expert == OnMissingExpert::Skip,
        }
    }

    fn of(&self, layer: LayerId) -> frame::Combine {
        self.grids.get(&layer).map_or(self.mode, |&grid| frame::Combine::Exact(grid))
    }
}

/// What became of the rows of one span.
#[derive(Debug)]
pub(crate) enum Fate {
    Done,
    /// Nobody could compute these experts. The step can be repeated: it writes the same cache rows again.
    Missing {
        layer: LayerId,
        experts: Vec<ExpertId>,
        last_failure: Option<Error>,
    },
    /// The hidden state itself went wrong, which no other server can mend.
    NotFinite {
        layer: LayerId,
    },
}

impl Fate {
    /// For a span: an error type of a closed set, and what happened.
    pub(crate) fn failure(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Done => None,
            Self::Missing { layer, experts, last_failure } => {
                let missing = table::describe(&BTreeMap::from([(*layer, experts.clone())]));
                let why = last_failure.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
                Some(("experts_missing", format!("no server answered for {missing}{why}")))
            }
            Self::NotFinite { layer } => {
                Some(("not_finite", format!("hidden states are not finite at layer {layer}")))
            }
        }
    }
}

/// One step's rows, the sequences' spans over them and who worked on each.
pub(crate) struct Step<'a> {
    pub(crate) ids: Vec<u32>,
    pub(crate) spans: Vec<Span<'a>>,
    pub(crate) participants: Vec<&'a mut Participants>,
    /// Whose servers record it.
    pub(crate) traced: Traced,
}

pub(crate) struct Forward {
    /// `[rows, hidden]` after the last layer, before the final norm.
    pub(crate) hidden: Vec<f32>,
    /// One for each span.
    pub(crate) fates: Vec<Fate>,
    /// By layer: the largest weighted contribution of an expert. Only pairs show it.
    pub(crate) contribution_max: BTreeMap<LayerId, f32>,
    pub(crate) layers: Vec<LayerLog>,
}

pub(crate) fn forward(
    backbone: &Backbone,
    step: &mut Step<'_>,
    pages: &mut Pages,
    remote: &mut Remote,
    mode: &CombineMode,
) -> Forward {
    let mut fates: Vec<Fate> = step.spans.iter().map(|_| Fate::Done).collect();
    let mut contribution_max = BTreeMap::new();
    let mut layers = Vec::with_capacity(backbone.layers().len());
    let mut hidden = backbone.embed(&step.ids); // [rows, hidden]
    for layer in backbone.layers() {
        let started = remote.now();
        let awake = threads::stay_awake();
        layer.attend(&mut hidden, &step.spans, pages);
        let attended = remote.now();
        let normed = Arc::new(layer.post_attention_layernorm(&hidden));
        let (update, dispatch) = match layer.feed_forward() {
            FeedForward::Dense(mlp) => (mlp.apply(&normed), None),
            FeedForward::Routed(moe) => {
                // Other threads begin with the shared experts while this one dispatches; it joins them while the experts
                // work. A gate that is worth all threads goes before: the experts wait for it.
                let alone = moe.gates_alone(step.ids.len());
                let gated = (!alone).then(|| gate(layer.id(), moe, &normed, step, remote, mode));
                let ((flight, dispatched), shared) = moe.shared_beside(&normed, || {
                    drop(awake);
                    let assignments =
                        gated.unwrap_or_else(|| gate(layer.id(), moe, &normed, step, remote, mode)); // [rows, topk]
                    let activations = Activations {
                        layer: layer.id(),
                        hidden_size: backbone.config().hidden_size,
                        dtype: mode.dtype,
                        assignments,
                        normed: Arc::clone(&normed),
                        traced: Arc::clone(&step.traced),
                    };
                    let rows = live_rows(&activations, step, &mut fates);
                    let dispatched = remote.now();
                    (remote.dispatch(activations, rows, mode.of(layer.id())), dispatched)
                });
                let shared_at = remote.now();
                note_participants(flight.activations(), step);
                let rows_by_expert = rows_by_expert(flight.activations(), backbone.config().n_routed_experts);
                let landed = remote.land(flight);
                let landed_at = remote.now();
                note_contributions(layer.id(), &landed.pairs, &mut contribution_max);
                let combined = combine(landed, shared);
                settle(layer.id(), &combined, step, &mut fates);
                let log = combined.log;
                let dispatch =
                    DispatchLog { dispatched, shared: shared_at, landed: landed_at, rows_by_expert, log };
                (combined.update, Some(dispatch))
            }
        };
        model::add(&mut hidden, &update);
        layers.push(LayerLog { layer: layer.id(), started, attended, dispatch, ended: remote.now() });
    }
    Forward { hidden, fates, contribution_max, layers }
}

/// The gate's choice, of those that somebody holds if missing ones are to be left out.
fn gate(
    layer: LayerId,
    moe: &Moe,
    normed: &[f32],
    step: &mut Step<'_>,
    remote: &Remote,
    mode: &CombineMode,
) -> Assignments {
    if !mode.skip_missing {
        return moe.gate(normed);
    }
    let missing = remote.missing(layer, moe.n_experts());
    let (assignments, masked) = moe.gate_without(normed, &missing);
    note_masked(layer, &masked, step);
    assignments
}

/// The rows worth sending: of spans that are still whole, with finite numbers.
fn live_rows(activations: &Activations, step: &Step<'_>, fates: &mut [Fate]) -> Vec<usize> {
    let mut rows = Vec::with_capacity(activations.n_rows());
    for (span, fate) in step.spans.iter().zip(fates) {
        if !matches!(fate, Fate::Done) {
            continue;
        }
        if span.rows.clone().any(|row| !model::within(activations.row(row), f32::MAX)) {
            *fate = Fate::NotFinite { layer: activations.layer };
        } else {
            rows.extend(span.rows.clone());
        }
    }
    rows
}

fn rows_by_expert(activations: &Activations, n_experts: usize) -> Vec<u32> {
    let mut rows = vec![0; n_experts];
    for expert in &activations.assignments.experts {
        rows[expert.index()] += 1;
    }
    rows
}

fn note_participants(activations: &Activations, step: &mut Step<'_>) {
    let top_k = activations.top_k();
    for (span, participants) in step.spans.iter().zip(&mut step.participants) {
        let chosen = &activations.assignments.experts[span.rows.start * top_k..span.rows.end * top_k];
        participants.experts.extend(chosen.iter().map(|&expert| (activations.layer, expert)));
    }
}

fn note_masked(layer: LayerId, masked: &[(RowIndex, ExpertId)], step: &mut Step<'_>) {
    for (span, participants) in step.spans.iter().zip(&mut step.participants) {
        let of_span = masked.iter().filter(|(row, _)| span.rows.contains(&row.index()));
        participants.masked.extend(of_span.map(|&(_, expert)| (layer, expert)));
    }
}

fn note_contributions(
    layer: LayerId,
    pairs: &BTreeMap<usize, Vec<Vec<f32>>>,
    contribution_max: &mut BTreeMap<LayerId, f32>,
) {
    let values = pairs.values().flatten().flatten();
    if let Some(max) = values.map(|value| value.abs()).reduce(f32::max) {
        contribution_max.insert(layer, max);
    }
}

/// Marks the spans that lost a row, and notes who served the others.
fn settle(layer: LayerId, combined: &Combined, step: &mut Step<'_>, fates: &mut [Fate]) {
    for ((span, participants), fate) in step.spans.iter().zip(&mut step.participants).zip(fates) {
        for (holder, rows) in &combined.served {
            if !participants.servers.contains(holder) && rows.iter().any(|row| span.rows.contains(row)) {
                participants.servers.insert(holder.clone());
            }
        }
        let mut experts: Vec<ExpertId> =
            combined.lost.range(span.rows.clone()).flat_map(|(_, experts)| experts.iter().copied()).collect();
        if !experts.is_empty() {
            experts.sort_unstable();
            experts.dedup();
            *fate = Fate::Missing { layer, experts, last_failure: combined.last_failure.clone() };
        }
    }
}
