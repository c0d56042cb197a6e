//! hidden → [`Assignments`]: softmax, sigmoid with correction bias, group-limited.

use ids::ExpertId;

use crate::{
    Error,
    checkpoint::Checkpoint,
    config::{self, Scoring},
    kernels::{sigmoid, softmax},
    storage::Linear,
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
            weight: checkpoint.linear(&format!("{prefix}.weight"), [n, config.hidden_size])?,
            e_score_correction_bias: match config.gate.scoring {
                Scoring::Softmax => vec![0.0; n],
                Scoring::Sigmoid => checkpoint.vector(&format!("{prefix}.e_score_correction_bias"), n)?,
            },
            config: config.gate,
            top_k: config.num_experts_per_tok,
        })
    }

    /// `[rows, hidden]` → `[rows, topk]`
    pub(crate) fn apply(&self, normed: &[f32]) -> Assignments {
        let logits = self.weight.apply(normed, None); // [rows, experts]
        let mut assignments = Assignments { top_k: self.top_k, experts: Vec::new(), weights: Vec::new() };
        for logits in logits.chunks_exact(self.e_score_correction_bias.len()) {
            for (expert, weight) in choose(logits, &self.e_score_correction_bias, &self.config, self.top_k) {
                assignments.experts.push(ExpertId(expert as u32));
                assignments.weights.push(weight);
            }
        }
        assignments
    }
}

/// One row's experts and weights. Selection scores choose (with bias, outside the best groups -inf), the scores
/// themselves weigh. Among equals the lowest expert goes first.
fn choose(logits: &[f32], bias: &[f32], config: &config::Gate, top_k: usize) -> Vec<(usize, f32)> {
    let mut scores = logits.to_vec();
    match config.scoring {
        Scoring::Softmax => softmax(&mut scores),
        Scoring::Sigmoid => scores.iter_mut().for_each(|score| *score = sigmoid(*score)),
    }
    let mut selection: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
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
        let chosen = choose(logits, bias, &gate, expected.len());
        for ((expert, weight), (wanted, wanted_weight)) in chosen.iter().zip(expected) {
            assert!(
                expert == wanted && (weight - wanted_weight).abs() < 1e-6,
                "{chosen:?}, wanted {expected:?}"
            );
        }
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
