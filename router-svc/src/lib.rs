//! The router: everything that has state. It holds the backbone and the KV cache, steps many sequences together, and
//! sends each MoE layer's activations to the servers that hold the chosen experts.
//!
//! Sync core, async edge: [`engine`] is one thread that owns model, pages and scheduler and never does I/O; links and
//! API are tasks; bounded channels lie between. [`forward`] reads straight down, [`flight`] is a pure state machine.

mod api;
mod args;
mod batch;
mod cache;
mod calibrate;
mod combine;
mod dial;
mod dispatch;
mod engine;
mod event_loop;
mod flight;
mod forward;
mod halves;
mod identity;
mod inside;
mod link;
mod meters;
mod placer;
mod remote;
mod sampling;
mod scheduler;
mod sequence;
mod service;
#[cfg(test)]
mod sim;
mod spans;
mod stats;

pub use args::{Args, Combine, Wire};
pub use service::run;
