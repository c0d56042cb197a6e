//! `shoal bench --kernels`: what the kernels reach of what the machine can do.

use std::{
    io::{self, Write as _},
    num::NonZeroUsize,
};

use anyhow::Context as _;
use model::{
    Isa, measure,
    tune::{Tuning, Wanted},
};

use super::now;
use crate::{process, table};

/// With all cores and spinning, as the limits are measured; pages as the start-up test has them.
pub(super) fn run(as_json: bool) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().context("cannot count the cores")?;
    let began = now();
    let wanted = Wanted { threads: Some(cores), spin: Some(true), huge_pages: None };
    let tuning = process::tune(wanted)?;
    let mut out = io::stdout().lock();
    let n_threads = [cores, NonZeroUsize::MIN];
    for n in n_threads.into_iter().take(if cores.get() > 1 { 2 } else { 1 }) {
        let threads = Tuning { threads: n, ..tuning }.start()?;
        let figures = threads.install(|| measure::kernels(&|| began.elapsed(), tuning.huge_pages))?;
        let mut rows =
            vec![["KERNEL", "THREADS", "ISA", "REACHED", "LIMIT", "SHARE"].map(str::to_owned).to_vec()];
        for measure::Figure { name, unit, value, limit } in figures {
            let isa = Isa::detect().name();
            if as_json {
                let line = serde_json::json!({
                    "kernel": name, "threads": n, "isa": isa, "huge_pages": tuning.huge_pages,
                    "unit": unit, "value": value, "limit": limit,
                });
                writeln!(out, "{line}")?;
            }
            rows.push(vec![
                name,
                n.to_string(),
                isa.to_owned(),
                format!("{value:.1} {unit}"),
                format!("{limit:.1}"),
                format!("{:.0} %", value / limit * 100.0),
            ]);
        }
        if !as_json {
            write!(out, "{}", table::format(&rows))?;
        }
    }
    Ok(())
}
