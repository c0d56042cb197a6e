//! Where the bundled model is, when nobody names one.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

const MINNOW: &str = "models/minnow";

/// The folder that was named, or minnow: below the working directory or one above it, else in the checkout that this
/// program was built from.
pub(crate) fn find(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(dir) = named {
        return Ok(dir.to_owned());
    }
    let here = std::env::current_dir().context("there is no working directory")?;
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let places = here.ancestors().chain(built_from).map(|place| place.join(MINNOW));
    places.into_iter().find(|dir| dir.join("config.json").is_file()).with_context(|| {
        format!("the bundled model {MINNOW} is not here; name a checkpoint folder with --model")
    })
}
