//! What a checkpoint is and how it is computed: arithmetic only. Synchronous; no clock, no network.

mod attention;
pub mod backbone;
pub mod checkpoint;
pub mod config;
pub mod expert;
pub mod gate;
mod kernels;
pub mod layer;
pub mod measure;
pub mod pages;
mod rope;
mod storage;
pub mod tune;

pub use backbone::Backbone;
pub use checkpoint::{Checkpoint, memory::huge_bytes, packed::Weights};
pub use config::ModelConfig;
pub use expert::Experts;
pub use gate::Assignments;
pub use kernels::{
    Isa, add, add_on_grid, add_weighted, keep_freed, largest,
    packed::Bits,
    sum_of_exp,
    threads::{self, Threads},
    within,
};
pub use layer::{FeedForward, Layer, Mlp, Moe};
pub use pages::{Pages, Span};
pub use storage::{Blocks, Input};

/// What is wrong with a checkpoint: names the file, the field or the tensor.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    pub(crate) fn new(message: String) -> Self {
        Self(message)
    }
}
