//! Sets of experts that change, and frames that were planned with one of them.

use std::{fs, path::Path, sync::Arc};

use cluster::Holds;
use ids::{Epoch, ExpertId, FrameId, LayerId, RowIndex};
use proto::{frame::Assignment, rows::Rows};

use super::{held::HoldError, *};
use crate::checkpoint::Model;

const HIDDEN: usize = 16;

fn model() -> Model {
    Model::random(HIDDEN, 8).write()
}

fn shard(model: &Path, pinned: &[u32], memory_bytes_max: u64) -> Shard {
    let pinned: Vec<_> = pinned.iter().copied().map(ExpertId).collect();
    Shard::new(Arc::new(model::Checkpoint::open(model).unwrap()), &pinned, memory_bytes_max)
}

fn holds(text: &str) -> Holds {
    text.parse().unwrap()
}

/// A frame of layer 1 planned with what is held.
fn frame(shard: &Shard, experts: &[u32]) -> Frame {
    let held = shard.held();
    let weights = experts.iter().filter_map(|&expert| held.experts.weights(LayerId(1), ExpertId(expert)));
    let assignment = |&expert: &u32| Assignment { row: RowIndex(0), expert: ExpertId(expert), weight: 0.5 };
    Frame {
        id: FrameId(1),
        layer: LayerId(1),
        rows: Rows::encode(Dtype::F32, HIDDEN, [0.25; HIDDEN]),
        assignments: experts.iter().map(assignment).collect(),
        combine: Combine::Fast,
        timeout: None,
        traceparents: Vec::new(),
        epoch: held.epoch,
        weights: weights.fold(WeightsHash::default(), WeightsHash::and),
    }
}

/// What is held now: epoch, experts, bytes in experts.
#[track_caller]
fn check(shard: &Shard, model: &Model, epoch: u64, expected: &str) {
    let held = shard.held();
    assert_eq!((held.epoch, held.holds.to_string()), (Epoch(epoch), expected.to_owned()));
    assert_eq!(held.experts.shard_bytes(), held.holds.len() as u64 * model.expert_bytes());
    assert!(held.holds.iter().all(|(layer, expert)| held.experts.weights(layer, expert).is_some()));
}

#[test]
fn what_is_held_follows_what_is_wanted_and_keeps_what_is_pinned() {
    let model = model();
    let shard = shard(model.dir.path(), &[0], u64::MAX);
    check(&shard, &model, 0, "");
    shard.hold(&holds("")).unwrap();
    check(&shard, &model, 1, "1-2:0");
    shard.hold(&holds("1:3-4;2:0")).unwrap();
    check(&shard, &model, 2, "1:0,3-4;2:0");
    shard.hold(&holds("1:0,3-4")).unwrap();
    check(&shard, &model, 2, "1:0,3-4;2:0");
    shard.hold(&holds("")).unwrap();
    check(&shard, &model, 3, "1-2:0");
}

#[test]
fn nothing_may_be_held() {
    let model = model();
    let shard = shard(model.dir.path(), &[], u64::MAX);
    shard.hold(&holds("")).unwrap();
    check(&shard, &model, 1, "");
    let error = shard.compute(&frame(&shard, &[2])).unwrap_err();
    assert_eq!(error.reason, "expert_not_held");
    assert_eq!(error.message, "not held here: layer 1: expert 2; held here: nothing");
}

#[test]
fn frames_planned_with_an_earlier_set_are_computed_while_their_experts_are_held() {
    let model = model();
    let shard = shard(model.dir.path(), &[], u64::MAX);
    shard.hold(&holds("1:2,5")).unwrap();
    let (kept, gone) = (frame(&shard, &[2]), frame(&shard, &[2, 5]));
    let before = shard.compute(&kept).unwrap();
    let under_way = shard.held();
    shard.hold(&holds("1:2,6")).unwrap();
    assert_eq!(shard.compute(&kept).unwrap(), before, "the same bits");
    assert_eq!(shard.compute(&gone).unwrap_err().reason, "expert_not_held");
    // What a frame began with stays until it is done.
    assert!(under_way.experts.get(LayerId(1), ExpertId(5)).is_some());
    assert!(shard.compute(&frame(&shard, &[6])).is_ok());
}

#[test]
fn weights_are_those_of_the_distinct_experts() {
    let model = model();
    let shard = shard(model.dir.path(), &[1, 2], u64::MAX);
    shard.hold(&holds("")).unwrap();
    let mut two = frame(&shard, &[1, 2]);
    two.rows = Rows::encode(Dtype::F32, HIDDEN, [0.25; 2 * HIDDEN]);
    let again = two.assignments.iter().map(|assignment| Assignment { row: RowIndex(1), ..*assignment });
    two.assignments = two.assignments.iter().copied().chain(again).collect();
    assert!(shard.compute(&two).is_ok(), "each counts once");
    two.weights.0 ^= 1;
    let error = shard.compute(&two).unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "weights_mismatch"));
}

#[test]
fn more_than_the_memory_is_refused_as_a_whole() {
    let model = model();
    let shard = shard(model.dir.path(), &[0], 4 * model.expert_bytes());
    shard.hold(&holds("")).unwrap();
    shard.hold(&holds("1:1-2")).unwrap();
    check(&shard, &model, 2, "1:0-2;2:0");
    let error = shard.hold(&holds("1-2:7;1:1")).err().unwrap();
    let (needed, max) = (5 * model.expert_bytes(), 4 * model.expert_bytes());
    assert_eq!(
        error.to_string(),
        format!("they have {needed} bytes with what is pinned, at most {max} bytes may be held here")
    );
    assert!(matches!(error, HoldError::TooLarge { .. }));
    check(&shard, &model, 2, "1:0-2;2:0");
}

#[test]
fn what_is_pinned_is_held_whatever_its_size() {
    let model = model();
    let shard = shard(model.dir.path(), &[0, 1], 1);
    shard.hold(&holds("")).unwrap();
    check(&shard, &model, 1, "1-2:0-1");
    shard.hold(&holds("2:1")).unwrap();
    check(&shard, &model, 1, "1-2:0-1");
    shard.hold(&holds("2:2")).err().unwrap();
    check(&shard, &model, 1, "1-2:0-1");
}

/// After `damage` to the file, new experts cannot be loaded, and `expected` is said.
fn check_damage(damage: impl FnOnce(&Path), expected: &str) {
    let model = model();
    let shard = shard(model.dir.path(), &[1], u64::MAX);
    shard.hold(&holds("")).unwrap();
    let frame = frame(&shard, &[1]);
    let before = shard.compute(&frame).unwrap();
    damage(&model.dir.path().join("model.safetensors"));
    let error = shard.hold(&holds("1-2:0-7")).err().unwrap().to_string();
    assert!(error.contains("model.safetensors") && error.contains(expected), "{error}");
    check(&shard, &model, 1, "1-2:1");
    assert_eq!(shard.compute(&frame).unwrap(), before);
}

#[test]
fn a_damaged_file_keeps_what_was_held() {
    check_damage(|file| fs::remove_file(file).unwrap(), "cannot map");
    // What is mapped of the old file lives on: its name is given to another one.
    let cut = |file: &Path| {
        let bytes = fs::read(file).unwrap();
        fs::remove_file(file).unwrap();
        fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    };
    check_damage(cut, "its header described at least");
}

#[test]
fn an_expert_that_is_not_in_the_model_keeps_what_was_held() {
    let model = model();
    let shard = shard(model.dir.path(), &[1], u64::MAX);
    shard.hold(&holds("")).unwrap();
    let error = shard.hold(&holds("1:0,99")).err().unwrap().to_string();
    assert!(error.starts_with("tensor model.layers.1.mlp.experts.99."), "{error}");
    check(&shard, &model, 1, "1-2:1");
}

#[test]
fn loading_stops_when_nobody_waits_for_it() {
    let model = model();
    let shard = shard(model.dir.path(), &[], u64::MAX);
    shard.hold(&holds("1:0")).unwrap();
    shard.stop_loading();
    assert_eq!(shard.hold(&holds("1:0-1")).err().unwrap().to_string(), "loading was stopped");
    check(&shard, &model, 1, "1:0");
}
