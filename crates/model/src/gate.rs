//! hidden → [`Assignments`]: softmax, sigmoid with correction bias, group-limited.
use ids::ExpertId;

/// `[rows, topk]`: the chosen experts of each row in gate order (largest first) with their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignments {
    pub top_k: usize,
    pub experts: Vec<ExpertId>,
    pub weights: Vec<f32>,
}
