//! hidden → [`Assignments`]: softmax, sigmoid with correction bias, group-limited.

use ids::{ExpertId, RowIndex};

use crate::{
    Error,
    checkpoint::Checkpoint,
    config::{self, Scoring},
    kernels::{is_small, sigmoid, softmax},
    storage::{Input, Linear},
};

/// `[rows, topk]`: the chosen experts of each row in gate order (largest first) with their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignments {
    pub top_k: usize,
    pub experts: Vec<ExpertId>,
    pub weights: Vec<f32>,
}

/// The gate of one MoE layer.
pub(crate) struct Gate {
    weight: Linear,
    /// `[experts]`; zeros for softmax gates.
    e_score_correction_bias: Vec<f32>,
    config: config::Gate,
    top_k: usize,
}

impl Gate {
    pub(crate) fn load(checkpoint: &Checkpoint, prefix: &str) -> Result<Self, Error> {
        let config = checkpoint.config();
        let n = config.n_routed_experts;
        Ok(Self {
            weight: checkpoint.stored(&format!("{prefix}.weight"), [n, config.hidden_size])?,
            e_score_correction_bias: match config.gate.scoring {
                Scoring::Softmax => vec![0.0; n],
                Scoring::Sigmoid => checkpoint.vector(&format!("{prefix}.e_score_correction_bias"), n)?,
            },
            config: config.gate,
            top_k: config.num_experts_per_tok,
        })
    }

    pub(crate) fn n_experts(&self) -> usize {
        self.e_score_correction_bias.len()
    }

    /// True if one thread computes it for so many rows.
    pub(crate) const fn is_small(&self, n_rows: usize) -> bool {
        is_small(self.weight.work(n_rows))
    }

    /// `[rows, hidden]` → `[rows, topk]`
    pub(crate) fn apply(&self, normed: &[f32]) -> Assignments {
        self.apply_without(normed, &[]).0
    }

    /// As if `missing` did not exist; and which of them the rows would have chosen. A row that cannot be given top-k
    /// others keeps its choice.
    pub(crate) fn apply_without(
        &self,
        normed: &[f32],
        missing: &[ExpertId],
    ) -> (Assignments, Vec<(RowIndex, ExpertId)>) {
        let logits = self.weight.apply(&Input::new(normed), None); // [rows, experts]
        let bias = &self.e_score_correction_bias;
        let mut assignments = Assignments { top_k: self.top_k, experts: Vec::new(), weights: Vec::new() };
        let mut masked = Vec::new();
        for (row, logits) in logits.chunks_exact(bias.len()).enumerate() {
            let mut chosen = choose(logits, bias, &self.config, self.top_k, &[]);
            let wanted: Vec<ExpertId> = chosen
                .iter()
                .map(|&(expert, _)| ExpertId(expert as u32))
                .filter(|expert| missing.contains(expert))
                .collect();
            if !wanted.is_empty()
                && let Some(others) = choose_without(logits, bias, &self.config, self.top_k, missing)
            {
                chosen = others;
                masked.extend(wanted.into_iter().map(|expert| (RowIndex(row as u32), expert)));
            }
            for (expert, weight) in chosen {
                assignments.experts.push(ExpertId(expert as u32));
                assignments.weights.push(weight);
            }
        }
        (assignments, masked)
    }
}

/// [`choose`] among the others, from any group if the best ones have too few; None if there are fewer than `top_k`.
fn choose_without(
    logits: &[f32],
    bias: &[f32],
    config: &config::Gate,
    top_k: usize,
    missing: &[ExpertId],
) -> Option<Vec<(usize, f32)>> {
    let of_any_group = config::Gate { topk_group: config.n_group, ..*config };
    [config, &of_any_group].into_iter().map(|config| choose(logits, bias, config, top_k, missing)).find(
        |chosen| chosen.iter().all(|&(expert, _)| missing.iter().all(|missing| missing.index() != expert)),
    )
}

/// One row's experts and weights. Selection scores choose (with bias; outside the best groups and `missing` -inf), the
/// scores themselves weigh. Among equals the lowest expert goes first.
fn choose(
    logits: &[f32],
    bias: &[f32],
    config: &config::Gate,
    top_k: usize,
    missing: &[ExpertId],
) -> Vec<(usize, f32)> {
    let mut scores = logits.to_vec();
    match config.scoring {
        Scoring::Softmax => softmax(&mut scores),
        Scoring::Sigmoid => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
    }
    let mut selection: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    for expert in missing {
        selection[expert.index()] = f32::NEG_INFINITY;
    }
    if config.topk_group < config.n_group {
        let group_size = selection.len() / config.n_group;
        let group_scores: Vec<f32> =
            selection.chunks_exact(group_size).map(|group| group_score(group, config.scoring)).collect();
        let kept = best(&group_scores, config.topk_group);
        for (group, selection) in selection.chunks_exact_mut(group_size).enumerate() {
            if !kept.contains(&group) {
                selection.fill(f32::NEG_INFINITY);
            }
        }
    }
    let chosen = best(&selection, top_k);
    let total: f32 = chosen.iter().map(|&expert| scores[expert]).sum::<f32>() + 1e-20;
    let weigh = |expert: usize| {
        let score = if config.norm_topk_prob { scores[expert] / total } else { scores[expert] };
        (expert, score * config.routed_scaling_factor)
    };
    chosen.into_iter().map(weigh).collect()
}

fn group_score(group: &[f32], scoring: Scoring) -> f32 {
    let n_best = match scoring {
        Scoring::Softmax => 1,
        Scoring::Sigmoid => 2,
    };
    best(group, n_best.min(group.len())).into_iter().map(|at| group[at]).sum()
}

/// Positions of the `n` largest scores, largest first, the lowest position first among equals.
fn best(scores: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(n);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(logits: &[f32], bias: &[f32], gate: config::Gate, expected: &[(usize, f32)]) {
        let chosen = choose(logits, bias, &gate, expected.len(), &[]);
        for ((expert, weight), (wanted, wanted_weight)) in chosen.iter().zip(expected) {
            assert!(
                expert == wanted && (weight - wanted_weight).abs() < 1e-6,
                "{chosen:?}, wanted {expected:?}"
            );
        }
    }

    #[test]
    fn missing_experts_are_left_out_and_the_others_renormalized() {
        let grouped = config::Gate { n_group: 2, topk_group: 1, ..SIGMOID };
        let check = |config: &config::Gate, missing: &[u32], expected: Option<&[usize]>| {
            let missing: Vec<ExpertId> = missing.iter().copied().map(ExpertId).collect();
            let chosen = choose_without(&[0.0, 1.0, 3.0, 2.0], &[0.0; 4], config, 2, &missing);
            let total: f32 = chosen.iter().flatten().map(|(_, weight)| weight).sum();
            assert!(chosen.is_none() || (total - 1.0).abs() < 1e-6);
            let experts =
                chosen.map(|chosen| chosen.into_iter().map(|(expert, _)| expert).collect::<Vec<_>>());
            assert_eq!(experts.as_deref(), expected);
        };
        check(&SIGMOID, &[2], Some(&[3, 1]));
        check(&SIGMOID, &[2, 3], Some(&[1, 0]));
        check(&SIGMOID, &[1, 2, 3], None);
        check(&grouped, &[0], Some(&[2, 3]));
        check(&grouped, &[2], Some(&[1, 0]));
        // No group has two left: any will do.
        check(&grouped, &[2, 0], Some(&[3, 1]));
    }

    const SIGMOID: config::Gate = config::Gate {
        scoring: Scoring::Sigmoid,
        n_group: 1,
        topk_group: 1,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
    };
    const SOFTMAX: config::Gate =
        config::Gate { scoring: Scoring::Softmax, norm_topk_prob: false, ..SIGMOID };

    #[test]
    fn the_bias_chooses_and_does_not_weigh() {
        let logits = [2.0, 1.0, 0.0, -1.0, 0.5, 0.2, -2.0, -3.0];
        let grouped = config::Gate { n_group: 4, topk_group: 2, ..SIGMOID };
        check(&logits, &[-2.0; 8], grouped, &[(0, 0.394_213), (1, 0.327_196), (4, 0.278_591)]);
        let scaled = config::Gate { routed_scaling_factor: 2.5, ..grouped };
        check(&logits, &[-2.0; 8], scaled, &[(0, 0.985_534), (1, 0.817_99), (4, 0.696_477)]);
        check(&[1.0, 0.0, -1.0, -2.0], &[0.0, 0.0, 0.0, 1.0], SIGMOID, &[(3, 0.140_196), (0, 0.859_804)]);
    }

    #[test]
    fn weights_are_normalized_only_when_asked() {
        check(&[2.0, 1.0, 0.0, -1.0], &[0.0; 4], SOFTMAX, &[(0, 0.643_914), (1, 0.236_883)]);
        let normalized = config::Gate { norm_topk_prob: true, ..SOFTMAX };
        check(&[2.0, 1.0, 0.0, -1.0], &[0.0; 4], normalized, &[(0, 0.731_059), (1, 0.268_941)]);
    }

    #[test]
    fn ties_go_to_the_lowest_expert() {
        check(&[1.0, 3.0, 3.0, 3.0], &[0.0; 4], SIGMOID, &[(1, 0.5), (2, 0.5)]);
    }
}
