//! Holders of the same weights agree on each expert's hash, and a flipped byte changes the hash of the expert that it
//! belongs to.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use ids::{ExpertId, LayerId, WeightsHash};
use model::{Checkpoint, Experts};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/odd/v3-one-group-no-norm");

type Pair = (LayerId, ExpertId);

fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(FIXTURE).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn pairs(checkpoint: &Checkpoint) -> Vec<Pair> {
    let n_experts = checkpoint.config().n_routed_experts as u32;
    let layers = checkpoint.config().moe_layers();
    layers.flat_map(|layer| (0..n_experts).map(move |expert| (layer, ExpertId(expert)))).collect()
}

fn hashes(dir: &Path) -> BTreeMap<Pair, WeightsHash> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let pairs = pairs(&checkpoint);
    let experts = Experts::load(&checkpoint, &pairs).unwrap();
    pairs.into_iter().map(|pair| (pair, experts.weights(pair.0, pair.1).unwrap())).collect()
}

/// The file and the place in it of the first byte of one of an expert's tensors.
fn place(dir: &Path, (layer, expert): Pair, part: &str) -> (PathBuf, usize) {
    let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
    let checkpoint = Checkpoint::open(dir).unwrap();
    let file = checkpoint.files()[checkpoint.tensors()[&name].file].clone();
    let bytes = fs::read(&file).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    (file, start + header[&name]["data_offsets"][0].as_u64().unwrap() as usize)
}

#[test]
fn holders_of_the_same_weights_agree() {
    let all = hashes(Path::new(FIXTURE));
    assert_eq!(all, hashes(copy().path()));
    let different: std::collections::BTreeSet<u64> = all.values().map(|hash| hash.0).collect();
    assert_eq!(different.len(), all.len(), "every expert has weights of its own");
    let checkpoint = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let one = *all.keys().nth(3).unwrap();
    let alone = Experts::load(&checkpoint, &[one]).unwrap();
    assert_eq!(alone.weights(one.0, one.1), Some(all[&one]));
    assert_eq!(alone.weights(one.0, ExpertId(one.1.0 + 1)), None);
}

#[test]
fn a_flipped_byte_changes_the_hash_of_its_expert_alone() {
    let before = hashes(Path::new(FIXTURE));
    let damaged = *before.keys().nth(7).unwrap();
    for part in ["gate_proj", "up_proj", "down_proj"] {
        let dir = copy();
        let (file, at) = place(dir.path(), damaged, part);
        let mut bytes = fs::read(&file).unwrap();
        bytes[at] ^= 1;
        fs::write(&file, bytes).unwrap();
        let after = hashes(dir.path());
        let changed: Vec<_> = before.keys().filter(|pair| before[*pair] != after[*pair]).collect();
        assert_eq!(changed, [&damaged], "{part}");
    }
}

#[test]
fn what_is_held_already_is_not_read_again() {
    let checkpoint = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let pairs = pairs(&checkpoint);
    let (some, more) = (&pairs[..4], &pairs[2..9]);
    let before = Experts::load(&checkpoint, some).unwrap();
    let read = AtomicUsize::new(0);
    let count = || read.fetch_add(1, Ordering::Relaxed) < usize::MAX;
    let after = Experts::load_after(&before, &checkpoint, more, &count).unwrap();
    assert_eq!(read.into_inner(), 5);
    let fresh = Experts::load(&checkpoint, more).unwrap();
    for &(layer, expert) in &pairs {
        assert_eq!(after.weights(layer, expert), fresh.weights(layer, expert), "{layer} {expert}");
    }
    assert_eq!(after.shard_bytes(), Experts::bytes_of(&checkpoint, more.iter().copied()).unwrap());
    let stopped = Experts::load_after(&before, &checkpoint, more, &|| false).err().unwrap();
    assert_eq!(stopped.to_string(), "loading was stopped");
}

#[test]
fn a_file_cut_after_it_was_opened_is_an_error() {
    let dir = copy();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let pairs = pairs(&checkpoint);
    let before = Experts::load(&checkpoint, &pairs[..1]).unwrap();
    for file in checkpoint.files() {
        fs::File::options().write(true).open(file).unwrap().set_len(9).unwrap();
    }
    let error = Experts::load_after(&before, &checkpoint, &pairs[1..], &|| true).err().unwrap().to_string();
    assert!(error.contains(".safetensors: has 9 bytes, its header described at least "), "{error}");
}
