//! The layer loop. Reads like the paper: attend, gate, dispatch, shared experts meanwhile, combine. In two half-batches the one
//! attends while the other's experts work.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use cluster::table;
use ids::{ExpertId, LayerId};
use model::{Assignments, Backbone, FeedForward, Layer, Moe, Pages, threads};
use proto::{
    Error,
    frame::{self, Grid},
    rows::Dtype,
};

use crate::{
    args::{Combine, Limits, OnMissingExpert},
    batch::{Batch, Step},
    combine::combine,
    dispatch::Activations,
    flight::aloft::Ticket,
    remote::Remote,
    spans::{DispatchLog, LayerLog, PassLog},
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

pub(crate) struct Forward {
    /// `[rows, hidden]` after the last layer, before the final norm.
    pub(crate) hidden: Vec<f32>,
    /// One for each span.
    pub(crate) fates: Vec<Fate>,
    /// By layer: the largest weighted contribution of an expert. Only pairs show it.
    pub(crate) contribution_max: BTreeMap<LayerId, f32>,
    pub(crate) pass: PassLog,
}

/// All layers, with the step's rows in one batch or in two that take turns. The bits are the same: a row's do not depend on
/// which others are computed with it, and what it attends to was written before.
pub(crate) fn forward(
    backbone: &Backbone,
    step: &mut Step<'_>,
    pages: &mut Pages,
    remote: &mut Remote,
    mode: &CombineMode,
    in_halves: bool,
) -> Forward {
    let mut batches = step.batches(if in_halves { 2 } else { 1 }, |ids| backbone.embed(ids));
    let mut pass = Pass {
        backbone,
        pages,
        remote,
        mode,
        fates: step.spans.iter().map(|_| Fate::Done).collect(),
        contribution_max: BTreeMap::new(),
        layers: Vec::with_capacity(batches.len() * backbone.layers().len()),
    };
    let mut flying: Vec<Option<Flying>> = batches.iter().map(|_| None).collect();
    for layer in backbone.layers() {
        for (batch, flying) in batches.iter_mut().zip(&mut flying) {
            // Its last layer's experts have worked while the other batch attended.
            if let Some(flying) = flying.take() {
                pass.finish(flying, batch, step);
            }
            *flying = pass.begin(layer, batch, step);
        }
    }
    for (batch, flying) in batches.iter_mut().zip(flying) {
        if let Some(flying) = flying {
            pass.finish(flying, batch, step);
        }
    }
    let Pass { fates, contribution_max, layers, .. } = pass;
    let mut hidden = Vec::new();
    for batch in batches {
        // All rows of most steps: moved.
        if hidden.is_empty() { hidden = batch.hidden } else { hidden.extend(batch.hidden) }
    }
    Forward { hidden, fates, contribution_max, pass: PassLog { in_halves, layers } }
}

struct Pass<'a> {
    backbone: &'a Backbone,
    pages: &'a mut Pages,
    remote: &'a mut Remote,
    mode: &'a CombineMode,
    fates: Vec<Fate>,
    contribution_max: BTreeMap<LayerId, f32>,
    layers: Vec<LayerLog>,
}

/// A batch whose rows are with the experts of a layer.
struct Flying {
    ticket: Ticket,
    layer: LayerId,
    /// `[rows, hidden]`: the shared experts' sum.
    shared: Vec<f32>,
    rows_by_expert: Vec<u32>,
    started: Instant,
    attended: Instant,
    dispatched: Instant,
    shared_at: Instant,
}

impl Pass<'_> {
    /// Attention, and a dense layer's feed-forward; or what a routed one's experts are asked for, and the shared experts.
    fn begin(&mut self, layer: &Layer, batch: &mut Batch<'_>, step: &mut Step<'_>) -> Option<Flying> {
        let started = self.remote.now();
        let awake = threads::stay_awake();
        layer.attend(&mut batch.hidden, &batch.spans, self.pages);
        let attended = self.remote.now();
        let normed = Arc::new(layer.post_attention_layernorm(&batch.hidden));
        let moe = match layer.feed_forward() {
            FeedForward::Dense(mlp) => {
                model::add(&mut batch.hidden, &mlp.apply(&normed));
                let (rows, ended) = (batch.rows.clone(), self.remote.now());
                self.layers.push(LayerLog {
                    layer: layer.id(),
                    rows,
                    started,
                    attended,
                    dispatch: None,
                    ended,
                });
                return None;
            }
            FeedForward::Routed(moe) => moe,
        };
        // Other threads begin with the shared experts while this one dispatches; it joins them while the experts work. A
        // gate that is worth all threads goes before: the experts wait for it.
        let alone = moe.gates_alone(batch.rows.len());
        let gated = (!alone).then(|| self.gate(layer.id(), moe, &normed, batch, step));
        let ((ticket, dispatched), shared) = moe.shared_beside(&normed, || {
            drop(awake);
            let assignments = gated.unwrap_or_else(|| self.gate(layer.id(), moe, &normed, batch, step)); // [rows, topk]
            let activations = Activations {
                layer: layer.id(),
                hidden_size: self.backbone.config().hidden_size,
                dtype: self.mode.dtype,
                assignments,
                normed: Arc::clone(&normed),
                traced: Arc::clone(&batch.traced),
            };
            let rows = batch.live_rows(&activations, &mut self.fates);
            let dispatched = self.remote.now();
            (self.remote.dispatch(activations, rows, self.mode.of(layer.id())), dispatched)
        });
        let shared_at = self.remote.now();
        let activations = self.remote.activations(&ticket);
        batch.note_participants(activations, step);
        let rows_by_expert = rows_by_expert(activations, self.backbone.config().n_routed_experts);
        let layer = layer.id();
        Some(Flying { ticket, layer, shared, rows_by_expert, started, attended, dispatched, shared_at })
    }

    /// Waits for the routed experts.
    fn finish(&mut self, flying: Flying, batch: &mut Batch<'_>, step: &mut Step<'_>) {
        let Flying { ticket, layer, shared, rows_by_expert, started, attended, dispatched, shared_at } =
            flying;
        let landed = self.remote.land(ticket);
        let landed_at = self.remote.now();
        self.note_contributions(layer, &landed.pairs);
        let combined = combine(landed, shared);
        batch.settle(layer, &combined, step, &mut self.fates);
        model::add(&mut batch.hidden, &combined.update);
        let mut log = combined.log;
        log.of_rows_from(batch.rows.start);
        let dispatch = DispatchLog { dispatched, shared: shared_at, landed: landed_at, rows_by_expert, log };
        self.layers.push(LayerLog {
            layer,
            rows: batch.rows.clone(),
            started,
            attended,
            dispatch: Some(dispatch),
            ended: self.remote.now(),
        });
    }

    /// The gate's choice, of those that somebody holds if missing ones are to be left out.
    fn gate(
        &self,
        layer: LayerId,
        moe: &Moe,
        normed: &[f32],
        batch: &Batch<'_>,
        step: &mut Step<'_>,
    ) -> Assignments {
        if !self.mode.skip_missing {
            return moe.gate(normed);
        }
        let missing = self.remote.missing(layer, moe.n_experts());
        let (assignments, masked) = moe.gate_without(normed, &missing);
        batch.note_masked(layer, &masked, step);
        assignments
    }

    fn note_contributions(&mut self, layer: LayerId, pairs: &BTreeMap<usize, Vec<Vec<f32>>>) {
        let values = pairs.values().flatten().flatten();
        if let Some(max) = values.map(|value| value.abs()).reduce(f32::max) {
            let noted = self.contribution_max.entry(layer).or_insert(max);
            *noted = noted.max(max);
        }
    }
}

fn rows_by_expert(activations: &Activations, n_experts: usize) -> Vec<u32> {
    let mut rows = vec![0; n_experts];
    for expert in &activations.assignments.experts {
        rows[expert.index()] += 1;
    }
    rows
}
