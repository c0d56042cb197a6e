//! Multi-head latent attention (DeepSeek-V2 §2.1), sparse where the model has an indexer (DeepSeek-V3.2 §2).
//!
//! The cache holds one latent a position, shared by all heads. Queries are absorbed through `kv_b_proj`'s key half, so
//! that scores and sums run over latents, and its value half expands only the result: the same form for prompts and
//! for decoding, so that chunks change no bit.

mod indexer;
mod mla;

pub(crate) use mla::Attention;
