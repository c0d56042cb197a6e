//! What a checkpoint is and how it is computed: arithmetic only. Synchronous; no clock, no network, no global.

mod attention;
pub mod backbone;
pub mod checkpoint;
pub mod config;
pub mod expert;
pub mod gate;
mod kernels;
pub mod layer;
pub mod pages;
mod rope;
mod storage;

pub use backbone::Backbone;
pub use checkpoint::{Checkpoint, packed::Weights};
pub use config::ModelConfig;
pub use expert::Experts;
pub use gate::Assignments;
pub use kernels::{Isa, packed::Bits};
pub use layer::{FeedForward, Layer, Mlp, Moe};
pub use pages::{Pages, Span};

/// What is wrong with a checkpoint: names the file, the field or the tensor.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    pub(crate) fn new(message: String) -> Self {
        Self(message)
    }
}

/// Computes with `n` threads from now on; once per process, before anything is computed.
pub fn set_threads(n: usize) -> Result<(), Error> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .thread_name(|index| format!("compute-{index}"))
        .build_global()
        .map_err(|error| Error(format!("cannot start {n} compute threads: {error}")))
}
