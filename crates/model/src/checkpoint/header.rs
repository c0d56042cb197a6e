//! The header of one safetensors file, checked against the file's length.

use std::{fs::File, io::Read as _, path::Path};

use safetensors::tensor::Metadata;

use super::TensorInfo;
use crate::Error;

/// A header larger than this is not one: the format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;

pub(super) fn read(path: &Path, file_idx: usize) -> Result<Vec<(String, TensorInfo)>, Error> {
    let wrong = |what: String| Error::new(format!("{}: {what}", path.display()));
    let mut file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !metadata.is_file() {
        return Err(wrong("is not a file".to_owned()));
    }
    let n_bytes = metadata.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| wrong(format!("has {n_bytes} bytes, too few for a header")))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX || header_bytes + 8 > n_bytes {
        return Err(wrong(format!("claims a header of {header_bytes} bytes and has {n_bytes} in all")));
    }
    let mut buffer = vec![0; header_bytes as usize];
    file.read_exact(&mut buffer).map_err(|error| wrong(error.to_string()))?;
    // Deserializing checks that the tensors' places follow each other without gaps and fit their shapes.
    let header: Metadata =
        serde_json::from_slice(&buffer).map_err(|error| wrong(format!("its header is corrupt: {error}")))?;
    let data_start = 8 + header_bytes;
    let data_bytes = header.data_len() as u64;
    if data_start + data_bytes != n_bytes {
        return Err(wrong(format!("has {n_bytes} bytes, its header describes {}", data_start + data_bytes)));
    }
    let tensors = header.tensors().into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        let info = TensorInfo {
            dtype: format!("{:?}", info.dtype).to_uppercase(),
            shape: info.shape.clone(),
            n_bytes: (end - start) as u64,
            file: file_idx,
            offset: data_start + start as u64,
        };
        (name, info)
    });
    Ok(tensors.collect())
}
