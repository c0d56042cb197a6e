//! Frames that cannot be computed: each is answered with what is wrong, and the stream goes on.

use bytes::Bytes;
use ids::{Epoch, WeightsHash};
use proto::{Code, checksum::seal_frame, v1};

use crate::{
    checkpoint::Model,
    harness::{Router, Server, frame},
};

const HIDDEN: usize = 64;

/// A good frame with one thing changed.
async fn check(router: &mut Router, change: impl FnOnce(&mut v1::Frame), reason: &str, message: &str) {
    let mut wire = router.plan(frame(HIDDEN, 2, &[0, 2]));
    change(&mut wire);
    let error = router.ask_wire(seal_frame(wire)).await.unwrap_err();
    assert_eq!((error.reason.as_ref(), error.message.as_str()), (reason, message));
    router.ask(frame(HIDDEN, 1, &[1])).await.expect("the stream lives");
}

fn rows(wire: &mut v1::Frame) -> &mut v1::Rows {
    wire.rows.as_mut().unwrap()
}

#[tokio::test]
async fn each_bad_frame_is_answered_and_the_stream_lives() {
    let model = Model::random(HIDDEN, 16).write();
    let server = Server::start(model.dir.path(), &["--experts", "0-3"]).await;
    let router = &mut server.router().await;
    let held = "held here: layers 1-2: experts 0-3";
    let not_held = "expert_not_held";
    check(router, |wire| wire.layer = 9, not_held, &format!("not held here: layer 9: experts 0,2; {held}"))
        .await;
    check(router, |wire| wire.layer = 0, not_held, &format!("not held here: layer 0: experts 0,2; {held}"))
        .await;
    let far = |wire: &mut v1::Frame| wire.assignment_expert[3] = 7;
    check(router, far, not_held, &format!("not held here: layer 1: expert 7; {held}")).await;
    let unknown = |wire: &mut v1::Frame| wire.assignment_expert[0] = u32::MAX;
    check(router, unknown, not_held, &format!("not held here: layer 1: expert 4294967295; {held}")).await;

    let narrow = |wire: &mut v1::Frame| (rows(wire).width, rows(wire).n_rows) = (32, 4);
    check(router, narrow, "wrong_hidden_size", "rows.width is 32, the model's hidden_size is 64").await;
    let nan = |wire: &mut v1::Frame| {
        let mut data = rows(wire).data.to_vec();
        data[4 * 65..4 * 66].copy_from_slice(&f32::NAN.to_le_bytes());
        rows(wire).data = data.into();
    };
    check(router, nan, "not_finite", "rows.data is not finite at row 1, column 1").await;

    let invalid = "invalid_value";
    check(router, |wire| wire.rows = None, invalid, "rows is missing").await;
    let short = |wire: &mut v1::Frame| rows(wire).data = Bytes::from_static(&[0; 8]);
    check(router, short, invalid, "rows.data has 8 bytes, not 2 rows of 64 F32 in 256 bytes").await;
    let more_rows = |wire: &mut v1::Frame| rows(wire).n_rows = 3;
    check(router, more_rows, invalid, "rows.data has 512 bytes, not 3 rows of 64 F32 in 256 bytes").await;
    check(router, |wire| rows(wire).dtype = 7, invalid, "unknown rows.dtype 7").await;
    check(router, |wire| wire.combine = 0, invalid, "unknown combine 0").await;
    let uneven = |wire: &mut v1::Frame| wire.assignment_expert.truncate(3);
    check(router, uneven, invalid, "assignment_expert has 3 entries, assignment_row has 4").await;
    let uneven = |wire: &mut v1::Frame| wire.assignment_weight.push(1.0);
    check(router, uneven, invalid, "assignment_weight has 5 entries, assignment_row has 4").await;
    let beyond = |wire: &mut v1::Frame| wire.assignment_row[2] = 2;
    check(router, beyond, invalid, "assignment_row[2] is 2, the frame has 2 rows").await;
    let no_assignments = |wire: &mut v1::Frame| {
        (wire.assignment_row, wire.assignment_expert, wire.assignment_weight) = Default::default();
    };
    check(router, no_assignments, invalid, "the frame has no assignments").await;
    check(
        router,
        |wire| *wire = v1::Frame { id: wire.id, ..Default::default() },
        invalid,
        "unknown combine 0",
    )
    .await;
    let repeated = |wire: &mut v1::Frame| wire.assignment_expert.fill(2);
    check(router, repeated, invalid, "expert 2 is assigned 4 times, the frame has 2 rows").await;
    let narrowed = |wire: &mut v1::Frame| {
        // The same bytes read as twice as many rows of bf16; zeros are finite in both.
        rows(wire).data = vec![0; rows(wire).data.len()].into();
        (rows(wire).dtype, rows(wire).n_rows) = (v1::Dtype::Bf16.into(), 4);
        (wire.combine, wire.contribution_max) = (v1::Combine::Exact.into(), 1.0);
    };
    check(router, narrowed, invalid, "exact combine needs F32 rows or blocks, the frame has Bf16 rows").await;

    let status = server.status().await;
    assert_eq!((status.frames, status.frames_failed), (2 * 18, 18));
    assert_eq!((status.rows, status.pairs), (18, 18));
}

#[tokio::test]
async fn codes_tell_the_routers_what_may_help() {
    let model = Model::random(HIDDEN, 16).write();
    let server = Server::start(model.dir.path(), &["--shard", "1/2"]).await;
    let mut router = server.router().await;
    let error = router.ask(frame(HIDDEN, 1, &[5])).await.unwrap_err();
    assert_eq!(error.code, Code::NotFound, "another holder may have it");
    let error = router.ask(frame(32, 1, &[0])).await.unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument, "no holder will take it");
}

#[tokio::test]
async fn a_flipped_bit_fails_its_frame_alone() {
    let model = Model::random(HIDDEN, 16).write();
    let server = Server::start(model.dir.path(), &[]).await;
    let mut router = server.router().await;
    let flips: [fn(&mut v1::Frame); 6] = [
        |wire| {
            let mut data = rows(wire).data.to_vec();
            data[77] ^= 1;
            rows(wire).data = data.into();
        },
        |wire| wire.layer ^= 2,
        |wire| wire.assignment_expert[1] ^= 1,
        |wire| wire.assignment_weight[0] = -wire.assignment_weight[0],
        |wire| wire.epoch ^= 1 << 40,
        |wire| wire.weights ^= 1,
    ];
    for flip in flips {
        let mut wire = router.plan(frame(HIDDEN, 2, &[0, 2]));
        flip(&mut wire);
        let id = wire.id;
        router.send(wire).await;
        let reply = router.reply().await.unwrap();
        assert_eq!((reply.id.0, reply.epoch, reply.weights), (id, Epoch(0), WeightsHash(0)));
        let error = reply.outcome.unwrap_err();
        assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "checksum_mismatch"));
        assert!(router.ask(frame(HIDDEN, 1, &[1])).await.is_ok(), "the stream lives");
    }
    assert_eq!(server.status().await.frames_failed, 6);
}

#[tokio::test]
async fn replies_carry_epoch_and_weights_of_their_frames() {
    let model = Model::random(HIDDEN, 16).write();
    let server = Server::start(model.dir.path(), &["--experts", "0-3"]).await;
    let mut router = server.router().await;
    // An epoch is for the router to compare: experts that are still held are computed whatever was planned with.
    for (expert, epoch, fails) in [(2, 1, false), (2, 77, false), (7, 78, true)] {
        let planned = router.plan(frame(HIDDEN, 2, &[expert]));
        let weights = planned.weights;
        router.send(seal_frame(v1::Frame { epoch, ..planned })).await;
        let reply = router.reply().await.unwrap();
        assert_eq!((reply.epoch.0, reply.weights.0), (epoch, weights));
        assert_eq!(reply.outcome.is_err(), fails);
    }
}

#[tokio::test]
async fn frames_for_other_weights_are_refused() {
    let model = Model::random(HIDDEN, 16).write();
    let other = Model::random(HIDDEN, 16).with(1, 2, |weights| weights.down[3] += 1.0).write();
    let (server, other) =
        (Server::start(model.dir.path(), &[]).await, Server::start(other.dir.path(), &[]).await);
    let (mut router, mut elsewhere) = (server.router().await, other.router().await);
    let (ours, theirs) = (frame(HIDDEN, 2, &[2, 5]), frame(HIDDEN, 2, &[0, 5]));
    let wire = elsewhere.plan(ours.clone());
    let message = format!(
        "layer 1: the frame asks for weights {}, its experts have {} here",
        WeightsHash(wire.weights),
        WeightsHash(router.plan(ours.clone()).weights)
    );
    let error = router.ask_wire(wire).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "weights_mismatch"));
    assert_eq!(error.message, message);
    // What was planned with one server's weights is computed by any server with the same.
    let wire = elsewhere.plan(theirs.clone());
    let (first, second) =
        (router.ask_wire(wire.clone()).await.unwrap(), elsewhere.ask_wire(wire).await.unwrap());
    assert_eq!(first.rows, second.rows);
    assert!(router.ask(ours).await.is_ok());
}
