//! What a process tells about itself: log lines now, traces and metrics in their time. Also the one place that
//! spawns tasks, so that each has a name and an owner that waits for it.

pub mod log;
pub mod tasks;

pub use tasks::Tasks;
