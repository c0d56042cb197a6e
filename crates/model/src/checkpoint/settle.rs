//! From cache files into huge pages, while the model already serves. A copy is the faster place for weights, but it takes
//! as much fresh memory as they have, which the system may take seconds to give: nobody's first token waits for that.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use memmap2::{Mmap, UncheckedAdvice};

use super::{
    Checkpoint, digest,
    memory::Memory,
    packed::{Blob, HEADER_BYTES},
};
use crate::Error;

/// Units that are still read where their files are mapped.
#[derive(Default)]
pub(super) struct Unsettled {
    units: Mutex<VecDeque<Unit>>,
    /// Whoever has it moves them, from the front.
    settling: Mutex<()>,
}

struct Unit {
    blob: Weak<Blob>,
    n_bytes: u64,
    path: PathBuf,
    /// XXH3-64 over the matrices.
    hash: u64,
}

impl Unsettled {
    /// Nothing if it is in memory already.
    pub(super) fn add(&self, blob: &Arc<Blob>, path: PathBuf, hash: u64) {
        if let Blob::Mapped(map, _) = &**blob {
            let unit = Unit { blob: Arc::downgrade(blob), n_bytes: map.len() as u64, path, hash };
            lock(&self.units).push_back(unit);
        }
    }
}

impl Checkpoint {
    /// Bytes of quantized matrices that were found in their files and wait for [`Checkpoint::settle`].
    #[must_use]
    pub fn unsettled_bytes(&self) -> u64 {
        lock(&self.unsettled.units).iter().map(|unit| unit.n_bytes).sum()
    }

    /// Copies into huge pages what was loaded from cache files so far, on the caller's thread, matrix by matrix; whoever
    /// computes with one uses the copy from then on. Gives up when `go_on` is false. Returns how many bytes it moved.
    ///
    /// # Errors
    /// A file that cannot be read any more, or has other bytes than when it was mapped. It and all that were not moved yet
    /// stay mapped for good.
    pub fn settle(&self, go_on: &dyn Fn() -> bool) -> Result<u64, Error> {
        let _one = lock(&self.unsettled.settling);
        let units = || lock(&self.unsettled.units);
        let mut n_bytes = 0;
        while go_on() {
            let first = units().front().map(|unit| (unit.blob.clone(), unit.path.clone(), unit.hash));
            let Some((blob, path, hash)) = first else { break };
            // What nobody holds any more needs no place.
            if let Some(Blob::Mapped(map, place)) = blob.upgrade().as_deref() {
                match copy(&path, map.len(), hash) {
                    Ok(copy) => {
                        n_bytes += map.len() as u64;
                        place.get_or_init(|| copy);
                        leave(map);
                    }
                    Err(error) => {
                        units().clear();
                        return Err(Error::new(format!("cannot copy {}: {error}", path.display())));
                    }
                }
            }
            units().pop_front();
        }
        Ok(n_bytes)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Neither guards anything that a panic could leave half written.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Through the file, as when it was found: what the disk cannot read is an error.
fn copy(path: &Path, n_bytes: usize, hash: u64) -> io::Result<Memory> {
    let mut bytes = Memory::new(n_bytes, true)?;
    if digest::read_into(&File::open(path)?, HEADER_BYTES as u64, &mut bytes)? != hash {
        return Err(io::Error::other("its bytes are not those that were mapped"));
    }
    Ok(bytes)
}

/// Its pages need not be in this process's memory any more.
#[expect(
    unsafe_code,
    reason = "a file's mapping that is only read is read from the file again: whoever still does sees the same bytes"
)]
fn leave(map: &Mmap) {
    // Advice: where it is not taken, the system takes the pages itself when it is short of memory.
    let _not_taken = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
}
