//! Frames that an expert server cannot compute, sent to a real one; and messages larger than gRPC's defaults.

use bytes::Bytes;
use proto::v1::{self, expert_client::ExpertClient};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;

use crate::{
    fixtures::{Chain, chain::MOE_LAYER},
    harness::{Cluster, clients, wait_for::DEADLINE, within},
};

const HIDDEN: u32 = 320;

/// `n_rows` rows of ones for experts 0 and 1.
fn frame(hidden: u32, n_rows: u32) -> v1::Frame {
    let rows = v1::Rows {
        dtype: v1::Dtype::F32.into(),
        n_rows,
        width: hidden,
        data: 1_f32.to_le_bytes().repeat((n_rows * hidden) as usize).into(),
    };
    v1::Frame {
        id: 7,
        layer: MOE_LAYER,
        rows: Some(rows),
        assignment_row: (0..n_rows).flat_map(|row| [row, row]).collect(),
        assignment_expert: [0, 1].repeat(n_rows as usize),
        assignment_weight: [0.5, 0.25].repeat(n_rows as usize),
        combine: v1::Combine::Pairs.into(),
        ..Default::default()
    }
}

/// Sends frames on a stream of their own, and gives what comes back.
async fn dispatch(channel: Channel, frames: Vec<v1::Frame>) -> Result<Vec<v1::Reply>, tonic::Status> {
    let mut expert = clients::expert(channel);
    within(DEADLINE, "replies", async {
        let status = expert.status(v1::ExpertStatusRequest {}).await?.into_inner();
        let frames: Vec<_> = frames.into_iter().map(|frame| clients::planned(frame, &status)).collect();
        let mut replies = expert.dispatch(tokio_stream::iter(frames)).await?.into_inner();
        let mut received = Vec::new();
        while let Some(reply) = replies.next().await {
            received.push(reply?);
        }
        Ok(received)
    })
    .await
}

fn n_bytes(reply: &v1::Reply) -> usize {
    match &reply.outcome {
        Some(v1::reply::Outcome::Computed(computed)) => computed.rows.as_ref().expect("rows").data.len(),
        other => panic!("not computed: {other:?}"),
    }
}

#[tokio::test]
async fn frames_that_cannot_be_computed_are_answered() {
    let model = Chain::new().write();
    let mut cluster = Cluster::builder(&model).placement(&["0-2", "3"]).without_gateway().start().await;
    let channel = cluster.experts[0].channel();
    let check = async |bad: v1::Frame, reason: &str, words: &[&str]| {
        // The stream goes on: the frame after it is computed.
        let good = v1::Frame { id: 8, ..frame(HIDDEN, 2) };
        let mut replies = dispatch(channel.clone(), vec![bad, good]).await.expect("the stream lives");
        replies.sort_by_key(|reply| reply.id);
        assert_eq!((replies[0].id, replies[1].id, replies.len()), (7, 8, 2));
        let Some(v1::reply::Outcome::Failure(failure)) = &replies[0].outcome else { panic!("{replies:?}") };
        assert_eq!(failure.reason, reason, "{failure:?}");
        for word in words {
            assert!(failure.message.contains(word), "no {word:?} in {failure:?}");
        }
        n_bytes(&replies[1]);
    };
    check(frame(64, 2), "wrong_hidden_size", &["64", "320"]).await;
    let unknown = v1::Frame { assignment_expert: vec![0, 9, 0, 1], ..frame(HIDDEN, 2) };
    check(unknown, "expert_not_held", &["layer 1", "expert 9"]).await;
    let elsewhere = v1::Frame { assignment_expert: vec![0, 3, 0, 1], ..frame(HIDDEN, 2) };
    check(elsewhere, "expert_not_held", &["layer 1", "expert 3"]).await;
    check(v1::Frame { layer: 0, ..frame(HIDDEN, 2) }, "expert_not_held", &["layer 0"]).await;
    for not_finite in [f32::NAN, f32::NEG_INFINITY] {
        let mut bad = frame(HIDDEN, 2);
        let rows = bad.rows.as_mut().expect("rows");
        let mut data = rows.data.to_vec();
        data[4 * 325..4 * 326].copy_from_slice(&not_finite.to_le_bytes());
        rows.data = Bytes::from(data);
        check(bad, "not_finite", &["row 1", "column 5"]).await;
    }
    let weight = v1::Frame { assignment_weight: vec![f32::NAN; 4], ..frame(HIDDEN, 2) };
    check(weight, "invalid_value", &["assignment_weight[0]"]).await;
    check(
        v1::Frame { assignment_row: vec![0, 0, 5, 1], ..frame(HIDDEN, 2) },
        "invalid_value",
        &["5", "2 rows"],
    )
    .await;
    assert!(cluster.experts[0].process.exit_status().is_none());
    cluster.ready().await;
}

/// gRPC's own limit on a message is 4 MiB: a frame of rows may have that much, and its reply more.
#[tokio::test]
async fn frames_around_the_limit() {
    const HIDDEN: u32 = 7168;
    let model = Chain::new().hidden_size(HIDDEN as usize).experts_add().write();
    let cluster = Cluster::builder(&model).without_gateway().start().await;
    let channel = cluster.experts[0].channel();
    // 28 KiB a row: 146 rows are just below the limit. A pairs reply has twice the rows.
    for n_rows in [73, 74, 145, 146] {
        let replies = dispatch(channel.clone(), vec![frame(HIDDEN, n_rows)]).await.expect("it fits");
        assert_eq!(replies.iter().map(n_bytes).collect::<Vec<_>>(), [2 * n_rows as usize * 7168 * 4]);
    }
    let replies = dispatch(channel.clone(), vec![frame(HIDDEN, 147), frame(HIDDEN, 1)]).await;
    let replies = replies.expect("the stream lives");
    let refused = replies.iter().find_map(|reply| match &reply.outcome {
        Some(v1::reply::Outcome::Failure(failure)) => Some(failure),
        _ => None,
    });
    let refused = refused.expect("one is too large");
    assert_eq!((refused.code.as_str(), replies.len()), ("too_large", 2), "{refused:?}");
    assert!(refused.message.contains("147 rows") && refused.message.contains("4194304"), "{refused:?}");
    // Far beyond what both ends agree on: that call fails, and nothing else.
    let mut careless = ExpertClient::new(channel.clone());
    let calling = careless.dispatch(tokio_stream::once(frame(HIDDEN, 3000)));
    let status = match within(DEADLINE, "refusal", calling).await {
        Err(status) => status,
        Ok(replies) => replies.into_inner().message().await.expect_err("it does not fit"),
    };
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status:?}");
    dispatch(channel, vec![frame(HIDDEN, 1)]).await.expect("the server lives");
}
