//! What a server says about itself.

use std::collections::BTreeMap;

use ids::LayerId;
use proto::{Frame, WIRE_VERSION, v1};

use crate::{
    checkpoint::{Model, N_EXPERTS},
    harness::{Server, frame, watched},
};

fn holds(status: &v1::ExpertStatus) -> Vec<(u32, Vec<u32>)> {
    status.holds.iter().map(|layer| (layer.layer, layer.experts.clone())).collect()
}

#[tokio::test]
async fn status_says_what_is_held_and_done() {
    let model = Model::random(64, 16).write();
    let server = Server::start(model.dir.path(), &["--shard", "2/4"]).await;
    let status = server.status().await;
    assert_eq!(status.address, server.address.to_string());
    assert_eq!((status.wire_version, status.hidden_size), (WIRE_VERSION, 64));
    assert_eq!(holds(&status), [(1, vec![2, 3]), (2, vec![2, 3])]);
    assert_eq!((status.state.as_str(), status.open_streams), ("ready", 0));
    assert_eq!((status.frames, status.frames_failed, status.rows, status.pairs), (0, 0, 0, 0));
    assert_eq!(status.shard_bytes, 4 * model.expert_bytes());
    assert!(status.device.starts_with("cpu "), "{}", status.device);
    assert!(!status.checkpoint.is_empty() && !status.version.is_empty());

    assert_eq!((status.epoch, status.placement, status.frames_late), (1, 0, 0));
    assert!(status.memory_bytes_max > status.shard_bytes, "{}", status.memory_bytes_max);

    let mut router = server.router().await;
    router.ask(frame(64, 5, &[2, 3])).await.unwrap();
    router.ask(frame(64, 1, &[0])).await.unwrap_err();
    let status = server.status().await;
    assert_eq!(status.open_streams, 1);
    assert_eq!((status.frames, status.frames_failed, status.rows, status.pairs), (2, 1, 5, 10));
}

#[tokio::test]
async fn instances_differ_and_checkpoints_agree() {
    let model = Model::random(64, 16).write();
    let other_model = Model::random(64, 8).write();
    let first = Server::start(model.dir.path(), &["--shard", "1/2"]).await.status().await;
    let second = Server::start(model.dir.path(), &["--shard", "2/2"]).await.status().await;
    let other = Server::start(other_model.dir.path(), &[]).await.status().await;
    assert_ne!(first.instance, second.instance);
    assert_eq!(first.checkpoint, second.checkpoint);
    assert_ne!(first.checkpoint, other.checkpoint);
}

#[tokio::test]
async fn holders_of_an_expert_agree_on_its_weights() {
    let model = Model::random(64, 16).write();
    let changed = Model::random(64, 16).with(2, 3, |weights| weights.up[0] += 1.0).write();
    let weights = async |model: &Model, flags: &[&str]| -> BTreeMap<(u32, u32), u64> {
        let status = Server::start(model.dir.path(), flags).await.status().await;
        let layers = status.holds.into_iter().flat_map(|held| {
            assert_eq!(held.experts.len(), held.weights.len());
            let ids = held.experts.into_iter().map(move |expert| (held.layer, expert));
            ids.zip(held.weights)
        });
        layers.collect()
    };
    let all = weights(&model, &[]).await;
    assert_eq!(all.len(), 16);
    let part = weights(&model, &["--shard", "1/8,4/8"]).await;
    assert_eq!(part.keys().copied().collect::<Vec<_>>(), [(1, 0), (1, 3), (2, 0), (2, 3)]);
    assert!(part.iter().all(|(id, hash)| all[id] == *hash));
    let changed = weights(&changed, &[]).await;
    let differ: Vec<_> = all.keys().filter(|id| all[*id] != changed[*id]).collect();
    assert_eq!(differ, [&(2, 3)]);
}

#[tokio::test]
async fn a_static_registry_registers_nobody() {
    let model = Model::random(64, 16).write();
    let flags =
        ["--registry", "static://127.0.0.1:7001", "--memory-max", "3GiB", "--advertise", "expert-1:7001"];
    let status = Server::start(model.dir.path(), &flags).await.status().await;
    assert_eq!(holds(&status).len(), 2, "all is held, as without a registry");
    assert_eq!((status.memory_bytes_max, status.address.as_str()), (3 << 30, "expert-1:7001"));
}

#[tokio::test]
async fn half_the_experts_map_half_the_bytes() {
    // Experts of 768 KiB: pages at their ends weigh little.
    let model = Model::random(256, 256).write();
    let whole = Server::start(model.dir.path(), &[]).await.status().await;
    let half = Server::start(model.dir.path(), &["--shard", "1/2"]).await.status().await;
    assert_eq!(whole.shard_bytes, 2 * u64::from(N_EXPERTS) * model.expert_bytes());
    assert_eq!(half.shard_bytes * 2, whole.shard_bytes);
    for status in [&whole, &half] {
        let mapped = status.mapped_bytes as f64 / status.shard_bytes as f64;
        assert!((1.0..1.05).contains(&mapped), "{} mapped for {}", status.mapped_bytes, status.shard_bytes);
        assert!(status.resident_bytes <= status.mapped_bytes);
    }

    let server = Server::start(model.dir.path(), &["--shard", "1/2"]).await;
    let mut router = server.router().await;
    for layer in [1, 2] {
        let frame = Frame { layer: LayerId(layer), ..frame(256, 2, &[0, 1, 2, 3]) };
        router.ask(frame).await.unwrap();
    }
    let used = server.status().await;
    assert!(used.resident_bytes >= used.shard_bytes, "{} of {}", used.resident_bytes, used.shard_bytes);
}

#[tokio::test]
async fn cached_experts_serve_where_they_are_mapped_and_move_into_huge_pages() {
    let model = Model::random(256, 256).write();
    let cache = tempfile::tempdir().unwrap();
    let flags = ["--weights", "q8", "--cache-dir", cache.path().to_str().unwrap(), "--huge-pages", "true"];
    let frame = frame(256, 2, &[0, 1, 2, 3]);
    let first = Server::start(model.dir.path(), &flags).await;
    assert_eq!(first.status().await.unsettled_bytes, 0, "what was just quantized is in memory");
    let expected = first.router().await.ask(frame.clone()).await.unwrap().rows.to_f32();

    let server = Server::start(model.dir.path(), &flags).await;
    let mut router = server.router().await;
    assert_eq!(router.ask(frame.clone()).await.unwrap().rows.to_f32(), expected);
    let status = watched("moving the experts", async {
        loop {
            let status = server.status().await;
            assert!(status.unsettled_bytes <= status.shard_bytes);
            if status.unsettled_bytes == 0 {
                return status;
            }
        }
    });
    let status = status.await;
    assert!(status.resident_bytes >= status.shard_bytes, "copied: {status:?}");
    assert_eq!(router.ask(frame).await.unwrap().rows.to_f32(), expected);
}
