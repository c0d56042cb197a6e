//! One server in this process behind a real socket, and routers that talk to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use clap::Parser;
use futures_util::Future;
use ids::{Epoch, ExpertId, FrameId, LayerId, RowIndex, WeightsHash};
use proto::{
    Error, Frame, HTTP2_WINDOW_BYTES, MESSAGE_BYTES_MAX, Reply,
    frame::{Assignment, Combine, Computed},
    rows::{Dtype, Rows},
    v1::{self, expert_client::ExpertClient},
};
use telemetry::{Process, Tasks};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use crate::checkpoint::uniform;

/// Servers so far: an instance is another one for every start.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Nothing here takes a second; a machine may be busy.
const WATCHDOG: Duration = Duration::from_secs(60);

/// Ends a test that hangs.
pub(crate) async fn watched<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(WATCHDOG, future).await.unwrap_or_else(|_| panic!("{what}: nothing happens"))
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: expert_svc::Args,
}

pub(crate) fn args(model: &Path, flags: &[&str]) -> expert_svc::Args {
    let model = model.to_str().unwrap();
    Cli::parse_from(["expert", "--model", model].iter().chain(flags)).args
}

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) tasks: Tasks,
    ended: oneshot::Receiver<anyhow::Result<()>>,
}

impl Server {
    /// `flags` beyond `--model` and `--listen`.
    pub(crate) async fn start(model: &Path, flags: &[&str]) -> Self {
        let (ready, address) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let tasks = Tasks::new();
        let args = args(model, flags);
        let instance = format!("tested-{}", STARTED.fetch_add(1, Relaxed));
        let inner = Process::quiet(&instance, tasks.clone());
        tasks.spawn("server", async move {
            let result = expert_svc::run(args, inner, |address| ready.send(address).unwrap()).await;
            // The test may be over.
            let _unheard = end.send(result);
        });
        let address = watched("start", address).await.expect("the server does not start");
        Self { address, tasks, ended }
    }

    /// Waits for the end.
    pub(crate) async fn ended(self) -> anyhow::Result<()> {
        watched("end of the server", self.ended).await.unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address))
            .unwrap()
            .tcp_nodelay(true)
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(4 * HTTP2_WINDOW_BYTES)
            .connect()
            .await
            .unwrap()
    }

    pub(crate) async fn client(&self) -> ExpertClient<Channel> {
        client(self.channel().await)
    }

    pub(crate) async fn status(&self) -> v1::ExpertStatus {
        self.client().await.status(v1::ExpertStatusRequest {}).await.unwrap().into_inner()
    }

    /// A router with a connection of its own.
    pub(crate) async fn router(&self) -> Router {
        Router::open(&mut self.client().await).await
    }
}

pub(crate) fn client(channel: Channel) -> ExpertClient<Channel> {
    ExpertClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX + (1 << 20))
}

/// One dispatch stream.
pub(crate) struct Router {
    /// Of the server's holdings when the stream was opened.
    epoch: Epoch,
    weights: BTreeMap<(LayerId, ExpertId), WeightsHash>,
    pub(crate) frames: mpsc::Sender<v1::Frame>,
    pub(crate) replies: Streaming<v1::Reply>,
}

impl Router {
    pub(crate) async fn open(client: &mut ExpertClient<Channel>) -> Self {
        let status = watched("status", client.status(v1::ExpertStatusRequest {})).await.unwrap().into_inner();
        let weights = status.holds.iter().flat_map(|held| {
            let experts = held.experts.iter().zip(&held.weights);
            experts.map(|(&expert, &hash)| ((LayerId(held.layer), ExpertId(expert)), WeightsHash(hash)))
        });
        let (epoch, weights) = (Epoch(status.epoch), weights.collect());
        let (frames, receiver) = mpsc::channel(1);
        let call = client.dispatch(ReceiverStream::new(receiver));
        let replies = watched("dispatch", call).await.unwrap().into_inner();
        Self { epoch, weights, frames, replies }
    }

    /// The frame as a router sends it: with the epoch and the weights that it planned with.
    pub(crate) fn plan(&self, frame: Frame) -> v1::Frame {
        let experts: BTreeSet<ExpertId> =
            frame.assignments.iter().map(|assignment| assignment.expert).collect();
        let weights = experts.iter().filter_map(|&expert| self.weights.get(&(frame.layer, expert)));
        let weights = weights.fold(WeightsHash::default(), |sum, &hash| sum.and(hash));
        Frame { epoch: self.epoch, weights, ..frame }.into_wire()
    }

    pub(crate) async fn send(&self, frame: v1::Frame) {
        watched("send", self.frames.send(frame)).await.expect("the server does not read");
    }

    /// The next reply; None at a clean end.
    pub(crate) async fn reply(&mut self) -> Option<Reply> {
        let reply = watched("reply", self.replies.message()).await.expect("the stream broke")?;
        Some(Reply::from_wire(reply).unwrap())
    }

    /// Sends a frame and waits for its reply, with no other frame on the way.
    pub(crate) async fn ask_wire(&mut self, frame: v1::Frame) -> Result<Computed, Error> {
        let id = frame.id;
        self.send(frame).await;
        let reply = self.reply().await.expect("the stream ended");
        assert_eq!(reply.id.0, id);
        reply.outcome
    }

    pub(crate) async fn ask(&mut self, frame: Frame) -> Result<Computed, Error> {
        self.ask_wire(self.plan(frame)).await
    }
}

/// `n_rows` rows that look random; each is assigned to `experts`, with weights that differ.
pub(crate) fn frame(hidden: usize, n_rows: usize, experts: &[u32]) -> Frame {
    let mut seed = 77;
    let values: Vec<f32> = (0..n_rows * hidden).map(|_| uniform(&mut seed)).collect();
    let assignments = (0..n_rows as u32).flat_map(|row| {
        experts.iter().enumerate().map(move |(at, &expert)| Assignment {
            row: RowIndex(row),
            expert: ExpertId(expert),
            weight: 0.7 - 0.15 * at as f32 + 0.01 * (row % 8) as f32,
        })
    });
    Frame {
        id: FrameId(42),
        layer: LayerId(1),
        rows: Rows::encode(Dtype::F32, hidden, values),
        assignments: assignments.collect(),
        combine: Combine::Fast,
        timeout: None,
        traceparents: Vec::new(),
        epoch: Epoch::default(),
        weights: WeightsHash::default(),
    }
}

/// The frame with row `row` alone.
pub(crate) fn row_alone(frame: &Frame, row: usize) -> Frame {
    let width = frame.rows.width();
    let values = &frame.rows.to_f32()[row * width..][..width];
    let own = frame.assignments.iter().filter(|assignment| assignment.row.index() == row);
    Frame {
        rows: Rows::encode(frame.rows.dtype(), width, values),
        assignments: own.map(|assignment| Assignment { row: RowIndex(0), ..*assignment }).collect(),
        ..frame.clone()
    }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
