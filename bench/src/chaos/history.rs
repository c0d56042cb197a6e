//! What happened, as JSON lines: first the plan, then every event, observation, answer and verdict with its time.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::scenario::Plan;

pub(crate) struct History {
    file: Mutex<File>,
    began: Instant,
}

impl History {
    pub(crate) fn begin(path: &Path, plan: &Plan) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let history = Self { file: Mutex::new(file), began: Instant::now() };
        history.note("plan", &serde_json::to_value(plan)?);
        Ok(history)
    }

    /// A full disk costs the rest of the history and not the run.
    pub(crate) fn note(&self, what: &str, detail: &Value) {
        let line = json!({ "t": self.began.elapsed().as_secs_f64(), "what": what, "detail": detail });
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _best_effort = writeln!(file, "{line}");
    }
}

/// The plan that a history begins with.
pub(crate) fn plan_of(path: &Path) -> anyhow::Result<Plan> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let first = BufReader::new(file).lines().next().context("the history is empty")??;
    let line: Value = serde_json::from_str(&first)?;
    serde_json::from_value(line["detail"].clone())
        .with_context(|| format!("{} does not begin with a plan", path.display()))
}
