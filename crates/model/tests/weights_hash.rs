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

/// Quantized weights from a cache folder: made once, mapped afterwards, made anew when the file is not what it should be.
#[test]
fn cached_weights_are_mapped_and_a_damaged_file_is_made_anew() {
    let dir = copy();
    let cache = tempfile::tempdir().unwrap();
    for weights in ["q8", "q4"] {
        let hash = |cache: Option<&Path>| {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let checkpoint = checkpoint.with_weights(weights.parse().unwrap(), cache.map(Path::to_owned));
            let pair = pairs(&checkpoint)[3];
            let experts = Experts::load(&checkpoint, &[pair]).unwrap();
            assert!(experts.shard_bytes() > 0 && experts.mapped_bytes() >= experts.shard_bytes());
            experts.weights(pair.0, pair.1).unwrap()
        };
        let wanted = hash(None);
        assert_ne!(wanted, hashes(dir.path())[&pairs(&Checkpoint::open(dir.path()).unwrap())[3]]);
        assert_eq!(hash(Some(cache.path())), wanted);
        let files = || {
            let folder = fs::read_dir(cache.path()).unwrap().next().unwrap().unwrap().path();
            let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            files.filter(|path| path.extension().unwrap() == weights).collect::<Vec<_>>()
        };
        let [file] = &files()[..] else { panic!("one file an expert: {:?}", files()) };
        let whole = fs::read(file).unwrap();
        let made = || fs::metadata(file).unwrap().modified().unwrap();
        let at_first = made();
        assert_eq!(hash(Some(cache.path())), wanted);
        assert_eq!(made(), at_first, "mapped, not made again");
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let mut other_header = whole.clone();
        other_header[2] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &flipped, &other_header, &[]] {
            fs::write(file, damaged).unwrap();
            assert_eq!(hash(Some(cache.path())), wanted);
            assert_eq!(fs::read(file).unwrap(), whole, "made anew");
        }
    }
    // What cannot be written is an error that names the file.
    let no_folder = dir.path().join("config.json");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let checkpoint = checkpoint.with_weights("q8".parse().unwrap(), Some(no_folder.clone()));
    let error = Experts::load(&checkpoint, &pairs(&checkpoint)[..1]).err().unwrap().to_string();
    assert!(error.contains("cannot write cache file") && error.contains("config.json"), "{error}");
}

/// A checkpoint that was written anew under the same names has other cache files' contents.
#[test]
fn another_checkpoint_of_the_same_names_is_quantized_again() {
    let dir = copy();
    let cache = tempfile::tempdir().unwrap();
    let load = || {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let checkpoint = checkpoint.with_weights("q8".parse().unwrap(), Some(cache.path().to_owned()));
        let pair = pairs(&checkpoint)[0];
        (Experts::load(&checkpoint, &[pair]).unwrap().weights(pair.0, pair.1).unwrap(), pair)
    };
    let (before, pair) = load();
    let (file, at) = place(dir.path(), pair, "up_proj");
    let mut bytes = fs::read(&file).unwrap();
    bytes[at + 3] ^= 0x01;
    fs::write(&file, &bytes).unwrap();
    assert_ne!(load().0, before);
}
