//! What a process tells about itself: log lines, traces, metrics. Also the one place that spawns tasks, so that each
//! has a name and an owner that waits for it.

pub mod log;
pub mod metrics;
pub mod names;
mod otlp;
mod process;
pub mod tasks;
pub mod trace;

pub use metrics::Metrics;
pub use otlp::{BadOptions, Options};
pub use process::Process;
pub use tasks::Tasks;
pub use trace::Tracer;
