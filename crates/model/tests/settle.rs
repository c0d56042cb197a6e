//! Quantized weights that were found in their cache files move into huge pages, and nobody who computes with them sees it.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    thread,
};

use ids::{ExpertId, LayerId};
use model::{Checkpoint, Experts, Input, expert::Expert};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/odd/v3-one-group-no-norm");

type Pair = (LayerId, ExpertId);

fn open(cache: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    checkpoint.with_weights("q8".parse().unwrap(), Some(cache.to_owned())).with_huge_pages(true)
}

fn pairs(checkpoint: &Checkpoint) -> Vec<Pair> {
    let experts = (0..checkpoint.config().n_routed_experts as u32).map(ExpertId);
    let layers = checkpoint.config().moe_layers();
    layers.flat_map(|layer| experts.clone().map(move |expert| (layer, expert))).collect()
}

/// What each of them makes of a row.
fn outputs(checkpoint: &Checkpoint, experts: &Experts) -> Vec<Vec<u32>> {
    let row = vec![0.5; checkpoint.config().hidden_size];
    let output = |(layer, expert)| {
        let of_it = Expert::forward(&Input::from(row.clone()), &[(experts.get(layer, expert)?, &[0])]);
        Some(of_it[0].iter().map(|value| value.to_bits()).collect())
    };
    pairs(checkpoint).into_iter().filter_map(output).collect()
}

/// A cache folder with every expert, its files, and what the experts make of a row.
fn cached() -> (tempfile::TempDir, Vec<PathBuf>, Vec<Vec<u32>>) {
    let cache = tempfile::tempdir().unwrap();
    let checkpoint = open(cache.path());
    let experts = Experts::load(&checkpoint, &pairs(&checkpoint)).unwrap();
    assert_eq!(checkpoint.unsettled_bytes(), 0, "what was just made is in memory already");
    assert_eq!(checkpoint.settle(&|| true).unwrap(), 0);
    let folder = fs::read_dir(cache.path()).unwrap().next().unwrap().unwrap().path();
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let outputs = outputs(&checkpoint, &experts);
    (cache, files, outputs)
}

#[test]
fn what_was_found_in_files_is_moved_once() {
    let (cache, _, expected) = cached();
    let checkpoint = open(cache.path());
    let all = pairs(&checkpoint);
    let some = Experts::load(&checkpoint, &all[..3]).unwrap();
    let bytes = some.shard_bytes();
    assert_eq!(checkpoint.unsettled_bytes(), bytes);
    assert_eq!(outputs(&checkpoint, &some), expected[..3], "it computes before it is moved");
    assert_eq!(checkpoint.settle(&|| false).unwrap(), 0, "nobody waits for it");
    assert_eq!((checkpoint.settle(&|| true).unwrap(), checkpoint.unsettled_bytes()), (bytes, 0));
    assert_eq!(outputs(&checkpoint, &some), expected[..3]);
    assert_eq!(some.mapped_bytes(), some.shard_bytes(), "where it is now");

    // Two of these are new, and two more are dropped before their turn comes.
    let more = Experts::load_after(&some, &checkpoint, &all[1..5], &|| true).unwrap();
    let dropped = Experts::load(&checkpoint, &all[6..8]).unwrap();
    assert_eq!(checkpoint.unsettled_bytes(), more.shard_bytes());
    drop(dropped);
    let moved = checkpoint.settle(&|| true).unwrap();
    assert_eq!((moved, checkpoint.unsettled_bytes()), (more.shard_bytes() / 4 * 2, 0));
    assert_eq!(outputs(&checkpoint, &more), expected[1..5]);
}

#[test]
fn experts_compute_while_they_are_moved() {
    let (cache, _, expected) = cached();
    for _ in 0..20 {
        let checkpoint = open(cache.path());
        let experts = Experts::load(&checkpoint, &pairs(&checkpoint)).unwrap();
        thread::scope(|scope| {
            // Two at a time, as after a second placement.
            let moves = [(); 2].map(|()| scope.spawn(|| checkpoint.settle(&|| true).unwrap()));
            loop {
                let last = moves.iter().all(thread::ScopedJoinHandle::is_finished);
                assert_eq!(outputs(&checkpoint, &experts), expected);
                if last {
                    break;
                }
            }
            let moved = moves.map(|moved| moved.join().unwrap());
            assert_eq!(moved.iter().sum::<u64>(), experts.shard_bytes());
        });
    }
}

#[test]
fn whoever_stops_in_the_middle_can_go_on() {
    let (cache, files, expected) = cached();
    let checkpoint = open(cache.path());
    let experts = Experts::load(&checkpoint, &pairs(&checkpoint)).unwrap();
    let (asked, bytes) = (Cell::new(0), experts.shard_bytes() / files.len() as u64);
    let moved = checkpoint.settle(&|| asked.replace(asked.get() + 1) < 3).unwrap();
    assert_eq!((moved, checkpoint.unsettled_bytes()), (3 * bytes, experts.shard_bytes() - 3 * bytes));
    assert_eq!(outputs(&checkpoint, &experts), expected);
    assert_eq!(checkpoint.settle(&|| true).unwrap(), experts.shard_bytes() - 3 * bytes);
    assert_eq!(outputs(&checkpoint, &experts), expected);
}

/// Cache files are replaced, never changed: the old one is still mapped.
#[test]
fn a_file_that_cannot_be_copied_stays_mapped_and_no_other_does() {
    let (cache, files, expected) = cached();
    let whole = fs::read(&files[3]).unwrap();
    let bytes = whole.len() as u64 - 4096;
    for damage in [None, Some(9), Some(usize::MAX)] {
        let checkpoint = open(cache.path());
        let experts = Experts::load(&checkpoint, &pairs(&checkpoint)).unwrap();
        fs::remove_file(&files[3]).unwrap();
        if let Some(len) = damage {
            let mut other = whole.clone();
            other.truncate(len);
            *other.last_mut().unwrap() ^= 1;
            fs::write(&files[3], other).unwrap();
        }
        let error = checkpoint.settle(&|| true).unwrap_err().to_string();
        let moved = experts.shard_bytes() - bytes;
        let counts = format!("({moved} bytes were copied, {bytes} are not)");
        assert!(error.starts_with(&format!("cannot copy {}: ", files[3].display())), "{error}");
        assert!(error.ends_with(&counts), "{error}, not {counts}");
        assert_eq!(checkpoint.unsettled_bytes(), bytes);
        assert_eq!(outputs(&checkpoint, &experts), expected, "{error}");

        fs::remove_file(&files[3]).ok();
        fs::write(&files[3], &whole).unwrap();
        assert_eq!((checkpoint.settle(&|| true).unwrap(), checkpoint.unsettled_bytes()), (bytes, 0));
        assert_eq!(outputs(&checkpoint, &experts), expected);
    }
}

#[test]
fn what_was_loaded_for_nothing_does_not_wait() {
    let (cache, files, _) = cached();
    let checkpoint = open(cache.path());
    // The last one has to be made again, and cannot be written.
    fs::remove_file(&files[files.len() - 1]).unwrap();
    fs::create_dir(&files[files.len() - 1]).unwrap();
    Experts::load(&checkpoint, &pairs(&checkpoint)).err().expect("a file that is a folder");
    assert_eq!((checkpoint.unsettled_bytes(), checkpoint.settle(&|| true).unwrap()), (0, 0));
}
