//! The grids of exact combine. At start, as soon as every expert has a holder, a fixed probe sequence runs through the
//! whole model in pairs, and each layer's grid is chosen from the largest contribution seen. Pairs have the same bits
//! on every placement, so every router of a checkpoint finds the same grids.

use ids::PageIndex;
use model::{Backbone, Pages, Span};
use proto::{Error, frame::Grid};

use crate::{
    batch::Step,
    dispatch::Traced,
    forward::{CombineMode, Fate, forward},
    remote::Remote,
    sequence::Participants,
};

/// Rows of the probe.
const PROBE_ROWS: usize = 64;

/// How far beyond the probe's largest contribution the bound lies. Rows beyond it are answered as pairs, which costs a
/// round trip and no accuracy; each factor of two costs one bit of the grid.
const HEADROOM: f32 = 4.0;

/// Finds the grids, or says why the probe could not run.
pub(crate) fn calibrate(
    backbone: &Backbone,
    remote: &mut Remote,
    mode: &mut CombineMode,
) -> Result<(), Error> {
    let config = backbone.config();
    let n_rows = PROBE_ROWS.min(config.max_position_embeddings);
    let mut pages = Pages::new(backbone, 1, n_rows);
    let mut participants = Participants::default();
    let mut step = Step {
        ids: probe(n_rows, config.vocab_size),
        spans: vec![Span { rows: 0..n_rows, position: 0, pages: &[PageIndex(0)] }],
        participants: vec![&mut participants],
        traced: Traced::default(),
    };
    let result = forward(backbone, &mut step, &mut pages, remote, mode, false);
    match result.fates.into_iter().next() {
        Some(Fate::Missing { last_failure: Some(error), .. }) => return Err(error),
        Some(Fate::Missing { layer, .. }) => {
            return Err(Error::new(
                proto::Code::Unavailable,
                "experts_missing",
                format!("layer {layer} lost an expert"),
            ));
        }
        Some(Fate::NotFinite { layer }) => {
            return Err(Error::internal(format!(
                "hidden states are not finite at layer {layer} in the calibration probe"
            )));
        }
        Some(Fate::Done) | None => {}
    }
    let top_k = config.num_experts_per_tok;
    mode.grids = result
        .contribution_max
        .into_iter()
        .map(|(layer, max)| (layer, Grid::new(max * HEADROOM, top_k)))
        .inspect(|(layer, grid)| tracing::debug!(%layer, bound = grid.contribution_max, exponent = grid.exponent, "grid"))
        .collect();
    Ok(())
}

/// Ids spread over the vocabulary by a full-period step (a fraction of it near the golden ratio).
fn probe(n_rows: usize, vocab_size: usize) -> Vec<u32> {
    let stride = (vocab_size as f64 * 0.618_033_988_75) as usize;
    (0..n_rows).map(|row| ((row + 1) * stride % vocab_size) as u32).collect()
}
