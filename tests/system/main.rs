//! The whole system as its users meet it: every test starts real processes on free ports, talks to them over their
//! public APIs, and leaves nothing behind. One module a promise.

#![expect(clippy::panic, reason = "helpers fail a test as its own body does")]
#![expect(clippy::print_stdout, reason = "a failed test shows the last lines of its processes")]

mod fixtures;
mod harness;

mod answers;
mod bad_input;
mod failure;
mod logits;
mod streams;
mod telemetry;
