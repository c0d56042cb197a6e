//! Log lines: one per event worth waking for, to stderr, as text or JSON. Never a prompt.

use std::io;

use tracing_subscriber::{EnvFilter, fmt};

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// A filter that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read log filter {filter:?}")]
pub struct BadFilter {
    filter: String,
    source: tracing_subscriber::filter::ParseError,
}

/// Sends this process's log lines to stderr. `filter` is in the form of `RUST_LOG`: `info`, `router_svc=debug,info`.
/// A second call in one process (tests) changes nothing.
pub fn init(format: Format, filter: &str) -> Result<(), BadFilter> {
    let parsed =
        EnvFilter::try_new(filter).map_err(|source| BadFilter { filter: filter.to_owned(), source })?;
    let lines = fmt()
        .with_env_filter(parsed)
        .with_writer(io::stderr)
        .with_target(true)
        // Whoever read stderr may be gone. Complaining there, as is the default, panics.
        .log_internal_errors(false);
    // The only way this fails is that another subscriber is in place already.
    let _already_set = match format {
        Format::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    };
    Ok(())
}
