//! From cache files into huge pages, while the model already serves. A copy is the faster place for weights, but it takes
//! as much fresh memory as they have, which the system may take seconds to give: nobody's first token waits for that.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    path::PathBuf,
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
    list: Mutex<VecDeque<Waiting>>,
    /// Whoever has it moves them, and nobody else takes one off the list.
    settling: Mutex<()>,
}

/// A unit that waits for its copy.
#[derive(Clone)]
struct Waiting {
    blob: Weak<Blob>,
    n_bytes: u64,
    path: PathBuf,
    /// XXH3-64 over the matrices.
    hash: u64,
    /// It stays mapped until somebody settles again.
    has_failed: bool,
}

impl Unsettled {
    /// Nothing if it is in memory already.
    pub(super) fn add(&self, blob: &Arc<Blob>, path: PathBuf, hash: u64) {
        if let Blob::Mapped(map, _) = &**blob {
            let (blob, n_bytes) = (Arc::downgrade(blob), map.len() as u64);
            lock(&self.list).push_back(Waiting { blob, n_bytes, path, hash, has_failed: false });
        }
    }
}

impl Checkpoint {
    /// Bytes of quantized matrices that are held and read where their files are mapped, though meant for huge pages.
    #[must_use]
    pub fn unsettled_bytes(&self) -> u64 {
        let list = lock(&self.unsettled.list);
        list.iter().filter(|unit| unit.blob.strong_count() > 0).map(|unit| unit.n_bytes).sum()
    }

    /// Copies into huge pages what was loaded from cache files so far, on the caller's thread, unit by unit; whoever computes
    /// with one uses the copy from then on. Gives up when `go_on` is false. Returns how many bytes it moved.
    ///
    /// # Errors
    /// Files that cannot be read any more, or have other bytes than when they were mapped: all others are moved, and these
    /// are tried again the next time.
    pub fn settle(&self, go_on: &dyn Fn() -> bool) -> Result<u64, Error> {
        let _one = lock(&self.unsettled.settling);
        let list = || lock(&self.unsettled.list);
        list().iter_mut().for_each(|unit| unit.has_failed = false);
        let (mut n_bytes, mut first_error) = (0, None);
        while go_on() {
            // The list grows meanwhile, at its end.
            let next = list().iter().position(|unit| !unit.has_failed);
            let Some((at, unit)) = next.and_then(|at| Some((at, list().get(at)?.clone()))) else { break };
            match unit.copy() {
                Ok(copied) => {
                    n_bytes += copied;
                    list().remove(at);
                }
                Err(error) => {
                    list()[at].has_failed = true;
                    first_error.get_or_insert(format!("cannot copy {}: {error}", unit.path.display()));
                }
            }
        }
        match first_error {
            None => Ok(n_bytes),
            Some(error) => Err(Error::new(format!(
                "{error} ({n_bytes} bytes were copied, {} are not)",
                self.unsettled_bytes()
            ))),
        }
    }
}

impl Waiting {
    /// Through the file, as when it was found: what the disk cannot read is an error. What nobody holds needs no copy.
    fn copy(&self) -> io::Result<u64> {
        let blob = self.blob.upgrade();
        let Some(Blob::Mapped(map, copy)) = blob.as_deref() else { return Ok(0) };
        let mut bytes = Memory::new(map.len(), true)?;
        if digest::read_into(&File::open(&self.path)?, HEADER_BYTES as u64, &mut bytes)? != self.hash {
            return Err(io::Error::other("its bytes are not those that were mapped"));
        }
        let _only_here = copy.set(bytes);
        leave(map);
        Ok(self.n_bytes)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Neither guards anything that a panic could leave half written.
    of.lock().unwrap_or_else(PoisonError::into_inner)
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
