//! Checkpoint folders made on the spot, through the crate's public face.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod answers;
mod control;
mod folder;
mod formats;
mod prompts;
