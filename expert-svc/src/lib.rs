//! An expert server: holds some routed experts of a checkpoint and computes them for routers.
//!
//! A frame's way, in order: [`stream`] receives it, [`engine`] queues it, [`shard`] computes it, [`slot`] carries the reply
//! back. Frames are stateless: nothing
//! is kept between two of them, so any holder of the same experts gives the same bits.
//!
//! Its life, in order: [`service`] assembles it, [`lifecycle`] loads, serves and leaves, [`presence`] tells others what
//! it is meanwhile, [`placed`] holds what the placement asks for, and [`handover`] says when it is missed no more.

mod api;
mod args;
mod counters;
mod engine;
mod handover;
mod lifecycle;
mod memory;
mod observe;
mod placed;
mod presence;
mod service;
mod settle;
mod slot;
mod stream;

pub use args::Args;
pub use service::run;
pub use stream::FRAMES_PER_STREAM_MAX;

#[cfg(test)]
#[path = "../../crates/shard/src/checkpoint.rs"]
#[expect(dead_code, reason = "the tests behind a socket use all of it")]
mod checkpoint;
