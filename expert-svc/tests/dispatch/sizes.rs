//! Large frames, large replies, and several streams on one connection.

use ids::{FrameId, LayerId};
use proto::{
    Code, Frame, MESSAGE_BYTES_MAX,
    frame::{Combine, FRAME_BYTES_MAX},
    rows::Rows,
    v1,
};

use crate::{
    checkpoint::Model,
    harness::{Router, Server, bits, client, frame, watched},
};

const HIDDEN: usize = 64;

/// Rows in the largest frame: their bytes alone are gRPC's default limit for a message, 4 MiB.
const ROWS_MAX: usize = FRAME_BYTES_MAX / (HIDDEN * 4);

async fn server() -> (Model, Server) {
    let model = Model::random(HIDDEN, 8).write();
    let server = Server::start(model.dir.path(), &[]).await;
    (model, server)
}

/// The rows `from..to` of a frame as a frame of their own.
fn cut(whole: &Frame, from: usize, to: usize) -> Frame {
    let values = &whole.rows.to_f32()[from * HIDDEN..to * HIDDEN];
    let mut part = whole.clone();
    part.rows = Rows::encode(whole.rows.dtype(), HIDDEN, values);
    part.assignments.retain(|assignment| (from..to).contains(&assignment.row.index()));
    part.assignments.iter_mut().for_each(|assignment| assignment.row.0 -= from as u32);
    part
}

#[tokio::test]
async fn frames_around_the_limit_give_the_rows_of_frames_cut_by_hand() {
    let (_model, server) = server().await;
    let mut router = server.router().await;
    let large = frame(HIDDEN, ROWS_MAX + 1, &[3]);
    let mut expected = Vec::new();
    for from in (0..=ROWS_MAX).step_by(ROWS_MAX / 4) {
        let part = cut(&large, from, (from + ROWS_MAX / 4).min(ROWS_MAX + 1));
        expected.extend(router.ask(part).await.unwrap().rows.to_f32());
    }
    for n_rows in [ROWS_MAX - 1, ROWS_MAX] {
        let computed = router.ask(cut(&large, 0, n_rows)).await.unwrap();
        assert_eq!(bits(&computed.rows.to_f32()), bits(&expected[..n_rows * HIDDEN]), "{n_rows} rows");
    }
    let error = router.ask(large).await.unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::TooLarge, "frame_too_large"));
    assert_eq!(error.message, "the frame has 16385 rows of 256 bytes, its limit is 4194304 bytes");
    assert!(router.ask(frame(HIDDEN, 1, &[3])).await.is_ok(), "the stream lives");
}

#[tokio::test]
async fn a_reply_may_be_larger_than_its_request() {
    let (_model, server) = server().await;
    let mut router = server.router().await;
    let frame = Frame { combine: Combine::Pairs, ..frame(HIDDEN, ROWS_MAX, &[0, 2, 5, 7]) };
    let computed = router.ask(frame).await.unwrap();
    assert_eq!(computed.rows.n_bytes(), 4 * FRAME_BYTES_MAX);
}

#[tokio::test]
async fn a_message_beyond_the_limit_ends_its_stream_alone() {
    let (_model, server) = server().await;
    let mut client = server.client().await;
    let (mut large, mut other) = (Router::open(&mut client).await, Router::open(&mut client).await);
    let mut wire = frame(HIDDEN, 1, &[0]).into_wire();
    wire.rows = Some(v1::Rows { data: vec![0; MESSAGE_BYTES_MAX].into(), ..Default::default() });
    large.send(wire).await;
    let status = watched("end", large.replies.message()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange);
    assert!(status.message().contains("67108864"), "the limit is named: {}", status.message());
    assert!(other.ask(frame(HIDDEN, 1, &[0])).await.is_ok(), "the other stream lives");
}

#[tokio::test]
async fn a_stream_that_is_not_read_stops_no_other() {
    let (_model, server) = server().await;
    let mut client = server.client().await;
    let (mut first, mut second) = (Router::open(&mut client).await, Router::open(&mut client).await);
    // Replies of 12 MiB: more than a stream's window.
    let frame = Frame { combine: Combine::Pairs, ..frame(HIDDEN, ROWS_MAX, &[0, 4, 6]) };
    first.send(first.plan(frame.clone())).await;
    second.send(second.plan(frame)).await;
    for router in [&mut second, &mut first] {
        let reply = router.reply().await.unwrap();
        assert_eq!(reply.outcome.unwrap().rows.n_bytes(), 3 * FRAME_BYTES_MAX);
    }
}

#[tokio::test]
async fn a_router_that_only_writes_stops_no_other() {
    let (_model, server) = server().await;
    let mut client = server.client().await;
    let (deaf, mut other) = (Router::open(&mut client).await, Router::open(&mut client).await);
    let large = deaf.plan(frame(HIDDEN, ROWS_MAX, &[0]));
    let (mut sent, mut asked) = (0, 0);
    // Its replies fill its slots, then its frames fill its window, while the other is answered over the same
    // connection. On the way between them are two frames in the window and a few in the client's own buffers.
    let filled = async {
        loop {
            while deaf.frames.try_send(large.clone()).is_ok() {
                sent += 1;
            }
            assert!(other.ask(frame(HIDDEN, 1, &[1])).await.is_ok());
            asked += 1;
            let status = client.status(v1::ExpertStatusRequest {}).await.unwrap().into_inner();
            if asked >= 200 && status.frames - asked >= expert_svc::FRAMES_PER_STREAM_MAX as u64 {
                return status.frames - asked;
            }
        }
    };
    let read = watched("fill", filled).await;
    // A place is free again when the transport takes a reply: two fit the router's window, a third is on its way.
    let most = expert_svc::FRAMES_PER_STREAM_MAX + 3;
    assert!(read <= most as u64, "{read} frames were read");
    assert!(sent <= most + 8, "{sent} frames were taken from the router");
}

#[tokio::test]
async fn many_streams_that_are_read_late_are_all_answered() {
    let (_model, server) = server().await;
    let mut client = client(server.channel().await);
    let mut routers = Vec::new();
    for id in 0..64 {
        let router = Router::open(&mut client).await;
        for layer in [1, 2] {
            let small = frame(HIDDEN, 64, &[id % 8, (id + 3) % 8]);
            let frame = Frame { id: FrameId(u64::from(id)), layer: LayerId(layer), ..small };
            router.send(router.plan(frame)).await;
        }
        routers.push(router);
    }
    assert_eq!(server.status().await.open_streams, 64);
    // Nothing was read so far; the last opened is read first.
    for (id, router) in routers.iter_mut().enumerate().rev() {
        for _ in [1, 2] {
            let reply = router.reply().await.unwrap();
            assert_eq!(reply.id.0, id as u64);
            assert_eq!(reply.outcome.unwrap().rows.n_rows(), 64);
        }
    }
}
