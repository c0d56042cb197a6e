//! Checkpoints made on the spot, changed copies of others, and the ones that lie in the tree.

pub(crate) mod byte_tokenizer;
pub(crate) mod chain;
pub(crate) mod expected;
pub(crate) mod variant;

use std::path::PathBuf;

pub(crate) use chain::Chain;
pub(crate) use expected::{Case, Expected, write_prompts};
pub(crate) use variant::Variant;

/// The trained model of the repository.
pub(crate) fn minnow() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/minnow"))
}

/// A tiny random checkpoint with the outputs of another implementation beside it.
pub(crate) fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures")).join(name)
}

/// A number in -1..1 that looks random and is the same every time (splitmix64).
pub(crate) fn uniform(seed: &mut u64) -> f32 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *seed;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
