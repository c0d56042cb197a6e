//! A Hugging Face folder → mapped tensors by published name. Headers are read when the folder is opened; bytes of
//! tensors are mapped range by range when somebody asks for them, so that a process maps only what it holds.

mod digest;
mod header;
pub(crate) mod memory;
pub(crate) mod packed;
mod settle;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::{Mmap, MmapOptions};

use crate::{
    Error, ModelConfig,
    checkpoint::packed::{Shape, Weights},
    kernels::packed::Bits,
    storage::{Dtype, Linear, Stored},
};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Tensors of a file closer to each other than this share a mapping: a page.
const MERGE_GAP_BYTES: u64 = 4096;

/// What a header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// As the file spells it: `F32`, `BF16`, `F8_E4M3`, …
    pub dtype: String,
    pub shape: Vec<usize>,
    pub n_bytes: u64,
    /// Which of [`Checkpoint::files`].
    pub file: usize,
    offset: u64,
}

/// A checkpoint folder with its tensor headers.
pub struct Checkpoint {
    config: ModelConfig,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Tensors in files that are not here, with the file's name.
    absent: BTreeMap<String, String>,
    fingerprint: String,
    weights: Weights,
    /// Where quantized matrices are kept from one start to the next.
    cache_dir: Option<PathBuf>,
    /// They are meant for huge pages, not to stay in their files' mappings.
    huge_pages: bool,
    unsettled: settle::Unsettled,
}

/// Mapped bytes of some tensors.
#[derive(Default)]
pub(crate) struct Mapped {
    tensors: BTreeMap<String, Stored>,
    maps: Vec<Arc<Mmap>>,
}

impl Checkpoint {
    /// Reads configs and tensor headers; maps nothing yet. Fails if a file is cut short or malformed, naming it. A file
    /// that the index names may be absent, as on a machine that holds some experts only: whoever needs one of its
    /// tensors fails then, naming both.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !dir.is_dir() {
            return Err(Error::new(format!("{} is not a folder", dir.display())));
        }
        let config = ModelConfig::load(dir)?;
        let (files, index) = list_files(dir)?;
        let mut tensors = BTreeMap::new();
        for (file, path) in files.iter().enumerate().filter(|(_, path)| path.is_file()) {
            for (name, info) in header::read(path, file)? {
                if tensors.insert(name.clone(), info).is_some() {
                    return Err(Error::new(format!(
                        "tensor {name} occurs twice, the second time in {}",
                        path.display()
                    )));
                }
            }
        }
        let mut absent = BTreeMap::new();
        for (name, file) in index.iter().flatten() {
            match tensors.get(name) {
                None if !dir.join(file).is_file() => {
                    absent.insert(name.clone(), file.clone());
                }
                None => {
                    return Err(Error::new(format!("tensor {name} is not in {file}, where {INDEX} puts it")));
                }
                Some(info) if files[info.file].file_name().is_none_or(|found| found != file.as_str()) => {
                    let found = files[info.file].display();
                    return Err(Error::new(format!(
                        "tensor {name} is in {found}, {INDEX} puts it into {file}"
                    )));
                }
                Some(_) => {}
            }
        }
        if tensors.is_empty() {
            let names: BTreeSet<&str> = absent.values().map(String::as_str).collect();
            let names: Vec<&str> = names.into_iter().collect();
            return Err(Error::new(format!(
                "{} lacks {}, named in {INDEX}",
                dir.display(),
                names.join(", ")
            )));
        }
        let fingerprint = fingerprint(dir, tensors.keys().chain(absent.keys()).collect())?;
        Ok(Self {
            config,
            files,
            tensors,
            absent,
            fingerprint,
            weights: Weights::Stored,
            cache_dir: None,
            huge_pages: false,
            unsettled: settle::Unsettled::default(),
        })
    }

    /// Its matrices are quantized when they are loaded, or mapped from `cache_dir`, where they are written first.
    #[must_use]
    pub fn with_weights(self, weights: Weights, cache_dir: Option<PathBuf>) -> Self {
        Self { weights, cache_dir, ..self }
    }

    /// Quantized matrices are packed into huge pages where that is true, or moved there by [`Checkpoint::settle`] if they are
    /// found in files. Otherwise they stay in their files' mappings.
    #[must_use]
    pub fn with_huge_pages(self, huge_pages: bool) -> Self {
        Self { huge_pages, ..self }
    }

    #[must_use]
    pub const fn weights(&self) -> Weights {
        self.weights
    }

    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Hash over config.json and the names of the tensor index: equal on every machine with this checkpoint, whether
    /// or not it has all the files.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Tensors in files that are not here, with the file's name.
    #[must_use]
    pub fn absent(&self) -> &BTreeMap<String, String> {
        &self.absent
    }

    /// Every tensor by name.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn info(&self, name: &str, shape: &[usize]) -> Result<(&TensorInfo, Dtype), Error> {
        let info = self.tensors.get(name).ok_or_else(|| match self.absent.get(name) {
            Some(file) => {
                Error::new(format!("tensor {name} is in {file}, which is not in the checkpoint folder"))
            }
            None => Error::new(format!("tensor {name} is missing")),
        })?;
        if info.shape != shape {
            return Err(Error::new(format!("tensor {name} has shape {:?}, wanted {shape:?}", info.shape)));
        }
        let dtype = match info.dtype.as_str() {
            "F32" => Dtype::F32,
            "BF16" => Dtype::Bf16,
            other => {
                return Err(Error::new(format!(
                    "tensor {name} is stored as {other}; supported are F32 and BF16"
                )));
            }
        };
        Ok((info, dtype))
    }

    /// Bytes of the named tensors, whose shapes must be as given.
    pub(crate) fn bytes_of(&self, tensors: &[(String, Vec<usize>)]) -> Result<u64, Error> {
        tensors.iter().map(|(name, shape)| Ok(self.info(name, shape)?.0.n_bytes)).sum()
    }

    /// Maps the named tensors, whose shapes must be as given.
    pub(crate) fn map(&self, wanted: &[(String, Vec<usize>)]) -> Result<Mapped, Error> {
        let mut places = Vec::with_capacity(wanted.len());
        for (name, shape) in wanted {
            let (info, dtype) = self.info(name, shape)?;
            places.push((info.file, info.offset, info.n_bytes, dtype, name));
        }
        places.sort_unstable_by_key(|(file, offset, ..)| (*file, *offset));
        let mut mapped = Mapped { tensors: BTreeMap::new(), maps: Vec::new() };
        let close = |a: &(usize, u64, u64, Dtype, &String), b: &(usize, u64, u64, Dtype, &String)| {
            a.0 == b.0 && b.1 <= a.1 + a.2 + MERGE_GAP_BYTES
        };
        for run in places.chunk_by(close) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let map = Arc::new(map_range(&self.files[first.0], first.1, last.1 + last.2 - first.1)?);
            for (_, offset, n_bytes, dtype, name) in run {
                let start = (offset - first.1) as usize;
                let bytes = start..start + *n_bytes as usize;
                mapped
                    .tensors
                    .insert((*name).clone(), Stored { map: Arc::clone(&map), bytes, dtype: *dtype });
            }
            mapped.maps.push(map);
        }
        Ok(mapped)
    }

    /// One matrix `[outputs, width]` of the backbone as weights are kept.
    pub(crate) fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Linear, Error> {
        match self.weights.of_backbone() {
            None => self.stored(name, shape),
            Some(bits) => self.quantized(name, shape, bits),
        }
    }

    /// One matrix `[outputs, width]` with that many bits.
    pub(crate) fn quantized(
        &self,
        name: &str,
        [outputs, width]: [usize; 2],
        bits: Bits,
    ) -> Result<Linear, Error> {
        let tensors = [(name.to_owned(), vec![outputs, width])];
        let row = |mapped: &Mapped, _, row, out: &mut Vec<f32>| mapped.extend_row(name, width, row, out);
        let mut unit = self.packed(name, bits, &tensors, &[Shape { outputs, width }], row)?;
        unit.matrices.pop().ok_or_else(|| Error::new(format!("tensor {name} is missing")))
    }

    /// One matrix `[outputs, width]` as the file has it.
    pub(crate) fn stored(&self, name: &str, shape: [usize; 2]) -> Result<Linear, Error> {
        let mapped = self.map(&[(name.to_owned(), shape.to_vec())])?;
        mapped.linear(name, shape[1])
    }

    /// One vector, copied.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let mapped = self.map(&[(name.to_owned(), vec![len])])?;
        mapped
            .tensors
            .values()
            .next()
            .map(Stored::to_f32)
            .ok_or_else(|| Error::new(format!("tensor {name} is missing")))
    }

    /// A vector that is there only if the config says so.
    pub(crate) fn bias(&self, name: &str, len: usize, present: bool) -> Result<Option<Vec<f32>>, Error> {
        present.then(|| self.vector(name, len)).transpose()
    }
}

impl Mapped {
    pub(crate) fn linear(&self, name: &str, width: usize) -> Result<Linear, Error> {
        let stored = self.tensors.get(name).ok_or_else(|| Error::new(format!("tensor {name} is missing")))?;
        Ok(Linear::new(stored.clone(), width))
    }

    /// Appends one number of a matrix as f32; nothing if it is not mapped.
    pub(crate) fn extend_number(
        &self,
        name: &str,
        width: usize,
        row: usize,
        column: usize,
        out: &mut Vec<f32>,
    ) {
        if let Some(stored) = self.tensors.get(name) {
            let at = row * width + column;
            stored.extend(at..at + 1, out);
        }
    }

    /// Appends one row of a matrix as f32; nothing if it is not mapped.
    pub(crate) fn extend_row(&self, name: &str, width: usize, row: usize, out: &mut Vec<f32>) {
        if let Some(stored) = self.tensors.get(name) {
            stored.extend(row * width..(row + 1) * width, out);
        }
    }

    /// Bytes of the tensors themselves.
    pub(crate) fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.bytes.len() as u64).sum()
    }

    /// Address ranges of the mappings.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.maps.iter().map(|map| {
            let start = map.as_ptr() as usize;
            start..start + map.len()
        })
    }
}

#[expect(
    unsafe_code,
    reason = "a mapped file is sound as long as nobody writes to it: checkpoints are read-only"
)]
fn map_range(path: &Path, offset: u64, len: u64) -> Result<Mmap, Error> {
    let wrong = |error: std::io::Error| Error::new(format!("cannot map {}: {error}", path.display()));
    let file = File::open(path).map_err(wrong)?;
    let n_bytes = file.metadata().map_err(wrong)?.len();
    if n_bytes < offset + len {
        // It can be mapped all the same, and the first touch beyond its end would kill the process.
        let end = offset + len;
        return Err(Error::new(format!(
            "{}: has {n_bytes} bytes, its header described at least {end}",
            path.display()
        )));
    }
    unsafe { MmapOptions::new().offset(offset).len(len as usize).map(&file) }.map_err(wrong)
}

type Index = BTreeMap<String, String>;

/// The files of a checkpoint, and what the index says where there is one. Files may be links, as in the Hub's cache.
fn list_files(dir: &Path) -> Result<(Vec<PathBuf>, Option<Index>), Error> {
    let index_path = dir.join(INDEX);
    if !index_path.exists() {
        let single = dir.join(SINGLE);
        if !single.exists() {
            return Err(Error::new(format!("{} has neither {INDEX} nor {SINGLE}", dir.display())));
        }
        return Ok((vec![single], None));
    }
    let wrong = |what: String| Error::new(format!("{}: {what}", index_path.display()));
    let bytes = fs::read(&index_path).map_err(|error| wrong(error.to_string()))?;
    #[derive(serde::Deserialize)]
    struct IndexFile {
        weight_map: Index,
    }
    let index: IndexFile = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(name) = names.iter().find(|name| name.contains('/') || name.contains('\\')) {
        return Err(wrong(format!("file name {name:?} leaves the folder")));
    }
    if names.is_empty() {
        return Err(wrong("weight_map is empty".to_owned()));
    }
    Ok((names.into_iter().map(|name| dir.join(name)).collect(), Some(index.weight_map)))
}

/// FNV-1a, 64 bits: the same on every machine and in every version. It tells checkpoints apart, it does not
/// authenticate them.
fn fingerprint(dir: &Path, names: BTreeSet<&String>) -> Result<String, Error> {
    let path = dir.join("config.json");
    let config =
        fs::read(&path).map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))?;
    let parts = std::iter::once(config.as_slice()).chain(names.into_iter().map(|name| name.as_bytes()));
    let hash = parts.fold(0xcbf2_9ce4_8422_2325_u64, |hash, part| {
        // A byte that is in no name ends each part.
        let bytes = part.iter().copied().chain([0xff]);
        bytes.fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
    });
    Ok(format!("{hash:016x}"))
}
