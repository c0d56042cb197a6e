//! The whole system as its users meet it: every test starts real processes on free ports, talks to them over their
//! public APIs, and leaves nothing behind. One module a promise.

#![expect(clippy::panic, reason = "helpers fail a test as its own body does")]

mod fixtures;
mod harness;

mod answers;
mod bad_input;
mod failure;
mod logits;
mod streams;
