//! What is wrong with a checkpoint folder is said with the file or tensor named, before a weight is used.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use model::{Backbone, Checkpoint, Experts};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/odd/v3-one-group-no-norm");
const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";

fn copy() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(FIXTURE).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// The error of opening and loading everything, after `damage`.
fn error_after(damage: impl FnOnce(&Path)) -> String {
    let dir = copy();
    damage(dir.path());
    let load = || -> Result<(), model::Error> {
        let checkpoint = Checkpoint::open(dir.path())?;
        Backbone::load(&checkpoint)?;
        let held: Vec<_> = checkpoint
            .config()
            .moe_layers()
            .flat_map(|layer| {
                (0..checkpoint.config().n_routed_experts as u32).map(move |e| (layer, ids::ExpertId(e)))
            })
            .collect();
        Experts::load(&checkpoint, &held)?;
        Ok(())
    };
    let error = load().expect_err("a damaged checkpoint must be refused").to_string();
    error.replace(&format!("{}/", dir.path().display()), "").replace(&dir.path().display().to_string(), "DIR")
}

/// Rewrites a header's JSON text; offsets stay, so `change` must not move data.
fn edit_header(path: &Path, change: impl FnOnce(String) -> String) {
    let bytes = fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = change(String::from_utf8(bytes[8..8 + n].to_vec()).unwrap());
    let mut new = (header.len() as u64).to_le_bytes().to_vec();
    new.extend(header.as_bytes());
    new.extend(&bytes[8 + n..]);
    fs::write(path, new).unwrap();
}

fn edit(path: PathBuf, change: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, change(text)).unwrap();
}

#[test]
fn missing_files_are_named() {
    let one = error_after(|dir| fs::remove_file(dir.join(SHARD_2)).unwrap());
    assert!(one.ends_with(&format!(" is in {SHARD_2}, which is not in the checkpoint folder")), "{one}");
    let both = error_after(|dir| {
        fs::remove_file(dir.join(SHARD_1)).unwrap();
        fs::remove_file(dir.join(SHARD_2)).unwrap();
    });
    assert_eq!(both, format!("DIR lacks {SHARD_1}, {SHARD_2}, named in model.safetensors.index.json"));
    assert_eq!(
        error_after(|dir| fs::remove_file(dir.join("config.json")).unwrap()),
        "config.json does not exist"
    );
    let empty = error_after(|dir| {
        for file in ["model.safetensors.index.json", SHARD_1, SHARD_2] {
            fs::remove_file(dir.join(file)).unwrap();
        }
    });
    assert_eq!(empty, "DIR has neither model.safetensors.index.json nor model.safetensors");
    let folder = error_after(|dir| {
        fs::remove_file(dir.join(SHARD_2)).unwrap();
        fs::create_dir(dir.join(SHARD_2)).unwrap();
    });
    assert!(
        folder.ends_with(&format!(" is in {SHARD_2}, which is not in the checkpoint folder")),
        "{folder}"
    );
}

#[test]
fn cut_and_corrupt_files_are_named() {
    let cut = error_after(|dir| {
        let bytes = fs::read(dir.join(SHARD_1)).unwrap();
        fs::write(dir.join(SHARD_1), &bytes[..bytes.len() - 100]).unwrap();
    });
    assert!(cut.starts_with(&format!("{SHARD_1}: has ")) && cut.contains("its header describes"), "{cut}");
    assert_eq!(
        error_after(|dir| fs::write(dir.join(SHARD_1), [1, 2, 3]).unwrap()),
        format!("{SHARD_1}: has 3 bytes, too few for a header")
    );
    let huge = error_after(|dir| fs::write(dir.join(SHARD_1), [255; 64]).unwrap());
    assert!(huge.starts_with(&format!("{SHARD_1}: claims a header of")), "{huge}");
    let garbage = error_after(|dir| edit_header(&dir.join(SHARD_1), |header| header.replace(':', ";")));
    assert!(garbage.starts_with(&format!("{SHARD_1}: its header is corrupt")), "{garbage}");
    let json = error_after(|dir| fs::write(dir.join("config.json"), "{").unwrap());
    assert!(json.starts_with("config.json is not JSON"), "{json}");
}

#[test]
fn missing_and_misplaced_tensors_are_named() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let renamed = |dir: &Path| {
        for shard in [SHARD_1, SHARD_2] {
            edit_header(&dir.join(shard), |header| header.replace(name, &name.replace("up", "ux")));
        }
    };
    let listed = error_after(renamed);
    assert!(listed.starts_with(&format!("tensor {name} is not in model-0000")), "{listed}");
    let unlisted = error_after(|dir| {
        renamed(dir);
        edit(dir.join("model.safetensors.index.json"), |text| text.replace(name, &name.replace("up", "ux")));
    });
    assert_eq!(unlisted, format!("tensor {name} is missing"));
    let swapped = error_after(|dir| {
        edit(dir.join("model.safetensors.index.json"), |text| {
            let (a, b) = text.split_once("\"model.norm.weight\"").unwrap();
            let other = if b[..b.find(".safetensors").unwrap()].contains("00001") {
                ("00001", "00002")
            } else {
                ("00002", "00001")
            };
            format!(
                "{a}\"model.norm.weight\"{}",
                b.replacen(&format!("model-{}", other.0), &format!("model-{}", other.1), 1)
            )
        });
    });
    assert!(swapped.starts_with("tensor model.norm.weight is "), "{swapped}");
    let shape = error_after(|dir| {
        edit(dir.join("config.json"), |text| {
            text.replace("\"intermediate_size\": 56", "\"intermediate_size\": 55")
        });
    });
    assert_eq!(shape, "tensor model.layers.0.mlp.gate_proj.weight has shape [56, 40], wanted [55, 40]");
    let untied = error_after(|dir| {
        for shard in [SHARD_1, SHARD_2] {
            edit_header(&dir.join(shard), |header| header.replace("lm_head.weight", "lm_heed.weight"));
        }
        edit(dir.join("model.safetensors.index.json"), |text| {
            text.replace("lm_head.weight", "lm_heed.weight")
        });
    });
    assert_eq!(untied, "tensor lm_head.weight is missing and tie_word_embeddings is false");
}

#[test]
fn a_machine_needs_only_the_files_of_what_it_holds() {
    let dir = copy();
    let whole = Checkpoint::open(dir.path()).unwrap();
    fs::remove_file(dir.path().join(SHARD_2)).unwrap();
    let part = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(part.fingerprint(), whole.fingerprint());
    let mut pairs =
        (1..3).flat_map(|layer| (0..12).map(move |expert| (ids::LayerId(layer), ids::ExpertId(expert))));
    assert!(
        pairs.any(|pair| Experts::load(&part, &[pair]).is_ok()),
        "some expert lies in the first shard alone"
    );
}

#[test]
fn a_snapshot_of_links_and_one_file_are_checkpoints_too() {
    let dir = copy();
    let links = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        std::os::unix::fs::symlink(&path, links.path().join(path.file_name().unwrap())).unwrap();
    }
    let checkpoint = Checkpoint::open(links.path()).unwrap();
    assert_eq!(checkpoint.fingerprint(), Checkpoint::open(dir.path()).unwrap().fingerprint());
    Backbone::load(&checkpoint).unwrap();
}

#[test]
fn an_expert_server_maps_only_what_it_holds() {
    let checkpoint =
        Checkpoint::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/minnow"))).unwrap();
    let load = |experts: std::ops::Range<u32>| {
        let held: Vec<_> = checkpoint
            .config()
            .moe_layers()
            .flat_map(|layer| experts.clone().map(move |expert| (layer, ids::ExpertId(expert))))
            .collect();
        Experts::load(&checkpoint, &held).unwrap()
    };
    let (half, all) = (load(0..8), load(0..16));
    assert_eq!(half.shard_bytes() * 2, all.shard_bytes());
    assert!(half.mapped_bytes() < half.shard_bytes() * 11 / 10, "{} mapped", half.mapped_bytes());
}
