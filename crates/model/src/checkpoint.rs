//! A Hugging Face folder → mapped tensors by published name.
use std::path::Path;
use crate::{Error, ModelConfig};

pub struct Checkpoint {
    config: ModelConfig,
}

impl Checkpoint {
    /// Reads configs and tensor headers; maps nothing yet.
    pub fn open(_dir: &Path) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
    /// Hash over config.json and the tensor index (names, dtypes, shapes): equal on every machine with this checkpoint.
    pub fn fingerprint(&self) -> &str {
        unimplemented!()
    }
}
