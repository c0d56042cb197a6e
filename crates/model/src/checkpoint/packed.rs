//! Quantized matrices: packed from a checkpoint's tensors, or mapped from the file that an earlier start wrote.
//!
//! A **unit** is what is packed, hashed and cached together: an expert, one matrix of attention. Its file has a page of
//! JSON, filled with blanks, and then the packed matrices, each at a multiple of 64 bytes. It is written under another
//! name first, so that nobody ever sees half of it, and read against its own hash, so that what a disk has lost is made
//! anew and never computed with. What is found in such a file is computed with where it is mapped; `settle` moves it from
//! there.

use std::{
    fs::{self, File},
    hash::Hasher as _,
    io::{self, Write as _},
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use ids::WeightsHash;
use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::{
    Checkpoint, Mapped, digest,
    memory::{self, Memory},
};
use crate::{
    Error,
    kernels::packed::{Bits, OUTPUTS, pack},
    storage::Linear,
};

/// Of the layout: a file of another one is made anew.
const VERSION: u32 = 3;
pub(super) const HEADER_BYTES: usize = 4096;
const ALIGNMENT: usize = 64;

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Weights {
    /// As the checkpoint has them, mapped.
    #[default]
    Stored,
    /// Quantized to int8 or int4 in blocks of 32, all but embedding, gate and norms. The head is never less than int8.
    Quantized(Bits),
    /// Routed and shared experts alone: nearly all the bytes of a large model, and the least of what rounding does to it.
    Experts(Bits),
}

impl Weights {
    const ALL: [Self; 5] = [
        Self::Stored,
        Self::Quantized(Bits::Eight),
        Self::Quantized(Bits::Four),
        Self::Experts(Bits::Eight),
        Self::Experts(Bits::Four),
    ];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stored => "bf16",
            Self::Quantized(bits) => name(bits),
            Self::Experts(Bits::Eight) => "q8-experts",
            Self::Experts(Bits::Four) => "q4-experts",
        }
    }

    /// What routed and shared experts are quantized to.
    #[must_use]
    pub const fn of_experts(self) -> Option<Bits> {
        match self {
            Self::Stored => None,
            Self::Quantized(bits) | Self::Experts(bits) => Some(bits),
        }
    }

    /// What all else is: attention, dense layers' feed-forward networks and, with 8 bits at least, the head.
    #[must_use]
    pub const fn of_backbone(self) -> Option<Bits> {
        match self {
            Self::Stored | Self::Experts(_) => None,
            Self::Quantized(bits) => Some(bits),
        }
    }
}

impl std::str::FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::ALL;
        let named = all.into_iter().find(|weights| weights.name() == text);
        named.ok_or_else(|| format!("not one of {}", all.map(Self::name).join(", ")))
    }
}

/// Shape of one packed matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) outputs: usize,
    pub(crate) width: usize,
}

/// Bytes of a unit's matrices.
#[derive(Debug)]
pub(crate) enum Blob {
    Memory(Memory),
    /// The file's bytes behind its header, and a copy of them that is read instead once there is one.
    Mapped(Mmap, OnceLock<Memory>),
}

impl Blob {
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Mapped(map, copy) => copy.get().map_or(map, |copy| copy),
        }
    }

    /// Where they are, with what is lost behind them.
    pub(crate) fn addresses(&self) -> Range<usize> {
        match self {
            Self::Memory(memory) => memory.addresses(),
            Self::Mapped(map, copy) => copy.get().map_or_else(
                || {
                    let start = map.as_ptr() as usize;
                    start..start + map.len()
                },
                Memory::addresses,
            ),
        }
    }
}

/// What stands at the front of a unit's file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    version: u32,
    unit: String,
    bits: String,
    /// Of names, lengths, times and places of the tensors' files.
    source: String,
    n_bytes: usize,
    /// XXH3-64 over everything behind the header.
    hash: String,
}

/// A unit in memory.
pub(crate) struct Unit {
    pub(crate) matrices: Vec<Linear>,
    pub(crate) hash: WeightsHash,
}

impl Checkpoint {
    /// The unit's matrices, one a shape. `rows` appends one row of one of them as f32, from `tensors` mapped.
    pub(crate) fn packed(
        &self,
        unit: &str,
        bits: Bits,
        tensors: &[(String, Vec<usize>)],
        shapes: &[Shape],
        rows: impl Fn(&Mapped, usize, usize, &mut Vec<f32>) + Sync,
    ) -> Result<Unit, Error> {
        let places = places(bits, shapes);
        let n_bytes = places.last().map_or(0, |(start, n)| start + n);
        let path = self.cache_dir.as_ref().map(|dir| self.unit_path(dir, unit, bits));
        let mut wanted = Header {
            version: VERSION,
            unit: unit.to_owned(),
            bits: name(bits).to_owned(),
            source: self.source(tensors)?,
            n_bytes,
            hash: String::new(),
        };
        let found = path.as_deref().and_then(|path| read(path, &mut wanted));
        let (blob, hash) = match found {
            Some((map, hash)) => (Blob::Mapped(map, OnceLock::new()), hash),
            None => {
                let mapped = self.map(tensors)?;
                let mut bytes = Memory::new(n_bytes, self.huge_pages)
                    .map_err(|error| Error::new(format!("no memory for {unit}: {error}")))?;
                for (matrix, (shape, (start, n))) in shapes.iter().zip(&places).enumerate() {
                    let panels = bytes[*start..start + n].par_chunks_mut(bits.panel_bytes(shape.width));
                    panels.enumerate().for_each(|(panel, packed)| {
                        let mut w = Vec::with_capacity(OUTPUTS * shape.width);
                        for row in (panel * OUTPUTS..shape.outputs).take(OUTPUTS) {
                            rows(&mapped, matrix, row, &mut w);
                        }
                        pack(bits, &w, shape.width, packed);
                    });
                }
                let hash = XxHash3_64::oneshot(&bytes);
                if let Some(path) = &path {
                    wanted.hash = format!("{hash:016x}");
                    write(path, &wanted, &bytes).map_err(|error| {
                        Error::new(format!("cannot write cache file {}: {error}", path.display()))
                    })?;
                }
                match &path {
                    Some(path) if !self.huge_pages => {
                        let map = File::open(path).and_then(|file| map(&file)).map_err(|error| {
                            Error::new(format!("cannot map cache file {}: {error}", path.display()))
                        })?;
                        (Blob::Mapped(map, OnceLock::new()), hash)
                    }
                    Some(_) | None => (Blob::Memory(bytes), hash),
                }
            }
        };
        let blob = Arc::new(blob);
        if let (true, Some(path)) = (self.huge_pages, path) {
            self.unsettled.add(&blob, path, hash);
        }
        let matrix = |(shape, (start, n)): (&Shape, &(usize, usize))| {
            Linear::packed(Arc::clone(&blob), *start..start + n, bits, shape.outputs, shape.width)
        };
        Ok(Unit { matrices: shapes.iter().zip(&places).map(matrix).collect(), hash: WeightsHash(hash) })
    }

    /// Bytes of memory that a unit's matrices take.
    pub(crate) fn packed_bytes(&self, bits: Bits, shapes: &[Shape]) -> u64 {
        let n_bytes = places(bits, shapes).last().map_or(0, |(start, n)| start + n);
        memory::taken(n_bytes, self.huge_pages) as u64
    }

    fn unit_path(&self, dir: &Path, unit: &str, bits: Bits) -> PathBuf {
        dir.join(&self.fingerprint).join(format!("{unit}.{}", name(bits)))
    }

    /// Which bytes of which files the tensors are: a file that was written anew has another time.
    fn source(&self, tensors: &[(String, Vec<usize>)]) -> Result<String, Error> {
        let mut hash = XxHash3_64::new();
        for (name, shape) in tensors {
            let (info, _) = self.info(name, shape)?;
            let path = &self.files[info.file];
            let metadata = fs::metadata(path)
                .map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))?;
            hash.write(name.as_bytes());
            for number in [info.offset, info.n_bytes, metadata.len()] {
                hash.write(&number.to_le_bytes());
            }
            for number in [metadata.mtime(), metadata.mtime_nsec()] {
                hash.write(&number.to_le_bytes());
            }
        }
        Ok(format!("{:016x}", hash.finish()))
    }
}

/// As `--weights` spells it.
pub(crate) const fn name(bits: Bits) -> &'static str {
    match bits {
        Bits::Eight => "q8",
        Bits::Four => "q4",
    }
}

/// Where each matrix begins behind the header, and its length.
fn places(bits: Bits, shapes: &[Shape]) -> Vec<(usize, usize)> {
    let mut start = 0;
    let mut place = |shape: &Shape| {
        let n = bits.matrix_bytes(shape.outputs, shape.width);
        let at = start;
        start = (at + n).next_multiple_of(ALIGNMENT);
        (at, n)
    };
    shapes.iter().map(&mut place).collect()
}

/// None: there is none, or it is not what is wanted, or it was damaged; all of them are made anew.
fn read(path: &Path, wanted: &mut Header) -> Option<(Mmap, u64)> {
    let file = File::open(path).ok()?;
    if file.metadata().ok()?.len() != (HEADER_BYTES + wanted.n_bytes) as u64 {
        return None;
    }
    let mut header = vec![0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).ok()?;
    let header: Header = serde_json::from_slice(&header).ok()?;
    wanted.hash.clone_from(&header.hash);
    if header != *wanted {
        return None;
    }
    // Through the file: what the disk cannot read is an error here, and would end the process in a mapping.
    let hash = digest::of_file(&file, HEADER_BYTES as u64, wanted.n_bytes as u64).ok()?;
    (header.hash == format!("{hash:016x}")).then_some((map(&file).ok()?, hash))
}

#[expect(
    unsafe_code,
    reason = "a mapped file is sound as long as nobody writes to it: cache files are only ever replaced"
)]
fn map(file: &File) -> io::Result<Mmap> {
    unsafe { MmapOptions::new().offset(HEADER_BYTES as u64).map(file) }
}

fn write(path: &Path, header: &Header, bytes: &[u8]) -> io::Result<()> {
    let mut json = serde_json::to_vec(header)?;
    json.resize(HEADER_BYTES, b' ');
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&json)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}
