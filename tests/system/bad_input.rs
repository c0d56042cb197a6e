//! Whatever comes in wrong is refused with what is wrong about it, and everything lives on.

mod checkpoints;
mod frames;
mod requests;
