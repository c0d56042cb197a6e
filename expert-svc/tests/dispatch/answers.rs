//! What comes back is what the experts compute, the same bits whatever surrounds a row.

use proto::{
    frame::{Combine, Grid},
    rows::{Dtype, Rows},
};

use crate::{
    checkpoint::Model,
    harness::{Server, bits, frame, row_alone},
};

const HIDDEN: usize = 64;

fn exact() -> Combine {
    Combine::Exact(Grid::new(64.0, 4))
}

async fn model_and_server(flags: &[&str]) -> (Model, Server) {
    let model = Model::random(HIDDEN, 16).write();
    let server = Server::start(model.dir.path(), flags).await;
    (model, server)
}

#[tokio::test]
async fn every_mode_gives_the_reference_result() {
    let (model, server) = model_and_server(&[]).await;
    let mut router = server.router().await;
    let frame = frame(HIDDEN, 5, &[6, 0, 3]);
    let rows = frame.rows.to_f32();
    let contributions: Vec<Vec<f64>> = frame
        .assignments
        .iter()
        .map(|assignment| {
            let row = &rows[assignment.row.index() * HIDDEN..][..HIDDEN];
            let output = model.reference(frame.layer.0, assignment.expert.0, row);
            output.into_iter().map(|value| value * f64::from(assignment.weight)).collect()
        })
        .collect();
    let sums: Vec<f64> = contributions
        .chunks(3)
        .flat_map(|row| {
            (0..HIDDEN).map(move |at| row.iter().map(|contribution| contribution[at]).sum::<f64>())
        })
        .collect();
    for (combine, expected) in
        [(Combine::Fast, &sums), (exact(), &sums), (Combine::Pairs, &contributions.concat())]
    {
        let computed = router.ask(proto::Frame { combine, ..frame.clone() }).await.unwrap();
        assert_eq!(computed.overflow_rows, []);
        let values = computed.rows.to_f32();
        assert_eq!(values.len(), expected.len());
        for (at, (value, expected)) in values.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(*value) - expected).abs() < 1e-4,
                "{combine:?} [{at}]: {value}, not {expected}"
            );
        }
    }
}

#[tokio::test]
async fn a_rows_bits_follow_from_the_row_alone() {
    let (model, one) = model_and_server(&["--threads", "1"]).await;
    let three = Server::start(model.dir.path(), &["--threads", "3"]).await;
    let (mut one, mut three) = (one.router().await, three.router().await);
    for combine in [Combine::Fast, exact(), Combine::Pairs] {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
            if dtype != Dtype::F32 && combine == exact() {
                continue;
            }
            let mut frame = frame(HIDDEN, 33, &[1, 7, 2, 5]);
            frame.rows = Rows::encode(dtype, HIDDEN, frame.rows.to_f32());
            frame.combine = combine;
            let together = three.ask(frame.clone()).await.unwrap().rows;
            assert_eq!(together.dtype(), dtype.of_reply());
            let together = together.to_f32();
            assert_eq!(
                bits(&one.ask(frame.clone()).await.unwrap().rows.to_f32()),
                bits(&together),
                "threads"
            );
            if dtype == Dtype::Int8 {
                // A row that is read and written again may have another scale.
                continue;
            }
            let each = together.len() / 33;
            for row in [0, 1, 15, 16, 32] {
                let alone = one.ask(row_alone(&frame, row)).await.unwrap().rows.to_f32();
                let within = &together[row * each..][..each];
                assert_eq!(bits(&alone), bits(within), "{combine:?} {dtype:?} row {row}");
            }
        }
    }
}

/// The router's blocks are what the server would have made of its f32 rows.
#[tokio::test]
async fn quantized_experts_make_the_same_of_blocks_and_of_f32_rows() {
    // The last block of a row is not whole.
    const WIDTH: usize = 80;
    let model = Model::random(WIDTH, 16).write();
    let (dir, cache) = (model.dir.path(), tempfile::tempdir().unwrap());
    // As a router makes them.
    let in_blocks = |frame: &proto::Frame| {
        let input = model::Input::from(frame.rows.to_f32());
        let blocks = input.blocks(WIDTH);
        let rows = Rows::of_blocks(frame.rows.n_rows(), WIDTH, |row, at| blocks.block(row, at));
        assert_eq!(rows, Rows::encode(Dtype::Int8Blocks, WIDTH, frame.rows.to_f32()));
        proto::Frame { rows, ..frame.clone() }
    };
    for weights in ["q8", "q4-experts"] {
        let cache_dir = cache.path().to_str().unwrap();
        let server = Server::start(dir, &["--weights", weights, "--cache-dir", cache_dir]).await;
        assert!(server.status().await.reads_blocks);
        let mut router = server.router().await;
        for (n_rows, combine) in
            [(1, exact()), (33, exact()), (33, Combine::Fast), (3, Combine::Pairs), (5, Combine::Fast)]
        {
            let frame = proto::Frame { combine, ..frame(WIDTH, n_rows, &[1, 7, 2, 5]) };
            let expected = router.ask(frame.clone()).await.unwrap().rows;
            let rows = router.ask(in_blocks(&frame)).await.unwrap().rows;
            assert_eq!(rows.dtype(), Dtype::F32);
            assert_eq!(bits(&rows.to_f32()), bits(&expected.to_f32()), "{weights} {n_rows} rows {combine:?}");
        }
    }
    let stored = Server::start(dir, &[]).await;
    assert!(!stored.status().await.reads_blocks);
    let error = stored.router().await.ask(in_blocks(&frame(WIDTH, 1, &[1]))).await.unwrap_err();
    assert_eq!(error.message, "rows.dtype is INT8_BLOCKS, the experts here are not quantized");
}

#[tokio::test]
async fn exact_sums_do_not_depend_on_the_placement() {
    let (model, whole) = model_and_server(&[]).await;
    let mut whole = whole.router().await;
    let frame = proto::Frame { combine: exact(), ..frame(HIDDEN, 16, &[7, 0, 4, 3]) };
    let expected = whole.ask(frame.clone()).await.unwrap().rows.to_f32();
    for placement in [["0-3", "4-7"], ["0,7", "1-6"], ["3", "0-2,4-7"]] {
        let mut sums = vec![0.0; expected.len()];
        for experts in placement {
            let part = Server::start(model.dir.path(), &["--experts", experts]).await;
            let held = part.status().await.holds[0].experts.clone();
            let mut own = frame.clone();
            own.assignments.retain(|assignment| held.contains(&assignment.expert.0));
            let computed = part.router().await.ask(own).await.unwrap();
            for (sum, value) in sums.iter_mut().zip(computed.rows.to_f32()) {
                *sum += value;
            }
        }
        assert_eq!(bits(&sums), bits(&expected), "{placement:?}");
    }
}

/// A model whose layer 1 is tame but for two experts: each gives the first number of a row that starts with 1 a raw
/// output of 70,000, and one of 3e38 × 20, which no f32 holds.
fn overflowing() -> Model {
    let large = |weights: &mut crate::checkpoint::Weights, gain: f32| {
        for matrix in [&mut weights.gate, &mut weights.up, &mut weights.down] {
            matrix.fill(0.0);
        }
        // silu(20) is 20 to the last bit of f32.
        (weights.gate[0], weights.up[0], weights.down[0]) = (20.0, 1.0, gain);
    };
    Model::random(HIDDEN, 16)
        .with(1, 0, |weights| large(weights, 3500.0))
        .with(1, 1, |weights| large(weights, 3e38))
        .write()
}

fn unit_row(experts: &[u32], weight: f32, dtype: Dtype) -> proto::Frame {
    let mut frame = frame(HIDDEN, 1, experts);
    let mut row = [0.0; HIDDEN];
    row[0] = 1.0;
    frame.rows = Rows::encode(dtype, HIDDEN, row);
    frame.assignments.iter_mut().for_each(|assignment| assignment.weight = weight);
    frame
}

#[tokio::test]
async fn an_output_beyond_half_precision_is_weighted_before_it_is_narrowed() {
    let model = overflowing();
    let server = Server::start(model.dir.path(), &[]).await;
    let mut router = server.router().await;
    let wide = Combine::Exact(Grid::new(1024.0, 4));
    for (dtype, combine) in [
        (Dtype::F32, Combine::Fast),
        (Dtype::F32, Combine::Pairs),
        (Dtype::F32, wide),
        (Dtype::Bf16, Combine::Fast),
        (Dtype::Bf16, Combine::Pairs),
    ] {
        let frame = proto::Frame { combine, ..unit_row(&[0], 0.01, dtype) };
        assert_eq!(router.ask(frame).await.unwrap().rows.to_f32()[0], 700.0, "{dtype:?} {combine:?}");
    }
    // Beyond the grid of exact combine: the row is listed and comes back as pairs.
    let narrow =
        proto::Frame { combine: Combine::Exact(Grid::new(512.0, 4)), ..unit_row(&[0], 0.01, Dtype::F32) };
    let computed = router.ask(narrow).await.unwrap();
    assert_eq!(computed.overflow_rows, [ids::RowIndex(0)]);
    assert_eq!(computed.rows.to_f32(), [0.0; HIDDEN]);
}

#[tokio::test]
async fn an_output_that_is_not_finite_is_an_error_and_not_a_number() {
    let model = overflowing();
    let server = Server::start(model.dir.path(), &[]).await;
    let mut router = server.router().await;
    for combine in [Combine::Fast, Combine::Pairs] {
        let error =
            router.ask(proto::Frame { combine, ..unit_row(&[1], 0.01, Dtype::F32) }).await.unwrap_err();
        assert_eq!(error.reason, "not_finite");
        assert_eq!(error.message, "layer 1 expert 1 gives row 0 a number that is not finite");
    }
    let computed =
        router.ask(proto::Frame { combine: exact(), ..unit_row(&[1], 0.01, Dtype::F32) }).await.unwrap();
    assert_eq!(computed.overflow_rows, [ids::RowIndex(0)]);
    assert!(router.ask(unit_row(&[0], 0.01, Dtype::F32)).await.is_ok(), "the stream lives");
}
