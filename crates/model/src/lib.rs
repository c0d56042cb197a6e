//! What a checkpoint is and how it is computed: arithmetic only. Synchronous; no clock, no network, no global.

pub mod backbone;
pub mod checkpoint;
pub mod config;
pub mod expert;
pub mod gate;
pub mod layer;
pub mod pages;

pub use backbone::Backbone;
pub use checkpoint::Checkpoint;
pub use config::ModelConfig;
pub use expert::Experts;
pub use gate::Assignments;
pub use layer::{FeedForward, Layer, Mlp, Moe};
pub use pages::{Pages, Span};

/// What is wrong with a checkpoint: names the file, the field or the tensor.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);
