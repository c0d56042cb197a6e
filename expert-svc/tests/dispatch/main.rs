//! An expert server as its routers see it: real sockets, tiny checkpoints made on the spot.

mod checkpoint;
mod harness;

mod answers;
mod bad_frames;
mod lifecycle;
mod sizes;
mod status;
