//! An expert server as its routers see it: real sockets, tiny checkpoints made on the spot.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

#[path = "../../../crates/shard/src/checkpoint.rs"]
mod checkpoint;
mod harness;

mod answers;
mod bad_frames;
mod lifecycle;
mod sizes;
mod status;
