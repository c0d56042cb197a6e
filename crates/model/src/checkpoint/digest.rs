//! XXH3-64 over tensors as they are stored. Read through the file and not through a mapping: what a disk cannot read or a
//! file has lost is an error here, where a mapping would end the process.

use std::{fs::File, hash::Hasher as _, os::unix::fs::FileExt as _};

use ids::WeightsHash;
use twox_hash::XxHash3_64;

use super::Checkpoint;
use crate::Error;

/// Bytes read at once: large enough for a disk, small enough for a core's cache.
const CHUNK_BYTES: usize = 256 << 10;

impl Checkpoint {
    /// Of the named tensors' bytes, one tensor after the other; their shapes must be as given. Reads all of them once.
    pub(crate) fn digest(&self, tensors: &[(String, Vec<usize>)]) -> Result<WeightsHash, Error> {
        let mut hash = XxHash3_64::new();
        let mut buffer = vec![0; CHUNK_BYTES];
        for (name, shape) in tensors {
            let (info, _) = self.info(name, shape)?;
            let path = &self.files[info.file];
            let wrong =
                |error| Error::new(format!("cannot read tensor {name} in {}: {error}", path.display()));
            let file = File::open(path).map_err(wrong)?;
            read(&file, info.offset, info.n_bytes, &mut buffer, |bytes| hash.write(bytes)).map_err(wrong)?;
        }
        Ok(WeightsHash(hash.finish()))
    }
}

/// XXH3-64 over a part of a file.
pub(super) fn of_file(file: &File, offset: u64, n_bytes: u64) -> std::io::Result<u64> {
    let mut hash = XxHash3_64::new();
    read(file, offset, n_bytes, &mut vec![0; CHUNK_BYTES], |bytes| hash.write(bytes))?;
    Ok(hash.finish())
}

/// Fills `bytes` from the file, and hashes them while they are in a core's cache.
pub(super) fn read_into(file: &File, offset: u64, bytes: &mut [u8]) -> std::io::Result<u64> {
    let mut hash = XxHash3_64::new();
    let mut at = offset;
    for chunk in bytes.chunks_mut(CHUNK_BYTES) {
        file.read_exact_at(chunk, at)?;
        hash.write(chunk);
        at += chunk.len() as u64;
    }
    Ok(hash.finish())
}

fn read(
    file: &File,
    offset: u64,
    n_bytes: u64,
    buffer: &mut [u8],
    mut see: impl FnMut(&[u8]),
) -> std::io::Result<()> {
    let (mut at, end) = (offset, offset + n_bytes);
    while at < end {
        let chunk = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..chunk], at)?;
        see(&buffer[..chunk]);
        at += chunk as u64;
    }
    Ok(())
}
