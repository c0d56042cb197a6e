//! One dispatch after the other to one expert server, beside a raw socket that echoes as many bytes.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use ids::{Epoch, ExpertId, FrameId, LayerId, RowIndex, WeightsHash};
use proto::{
    Frame, Reply,
    frame::{Assignment, Combine},
    rows::{Dtype, Rows},
    v1::{self, expert_client::ExpertClient},
};
use tokio::{runtime::Builder, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::now;
use crate::{
    cluster::{LOCAL, channel},
    member::{Member, Spec},
    table,
};

/// About what one row of 2048 bf16 has.
const BYTES: usize = 4096;
const WARM_UP: usize = 500;
const ROUNDS: usize = 10_000;

/// Prints the percentiles. The frames have one assignment, so that an expert computes one row of the model: each time is there
/// without what the server says that this took, too.
pub(super) async fn run(model: &Path, as_json: bool) -> anyhow::Result<()> {
    let tasks = telemetry::Tasks::new();
    let spec = Spec {
        name: "expert1".to_owned(),
        role: "experts".to_owned(),
        program: std::env::current_exe().context("cannot find this program's own file")?,
        args: ["--log-filter=warn", "expert", "--threads=1", "--model"]
            .into_iter()
            .map(str::to_owned)
            .chain([model.display().to_string()])
            .collect(),
        listen: LOCAL,
        quiet: true,
    };
    let server = Member::start(spec, &tasks).await?;
    let address = format!("http://{}", server.address);
    let over_tcp = measure(address.clone()).await?;
    let status = ExpertClient::new(channel(&address).await?).status(v1::ExpertStatusRequest {}).await?;
    let mut figures = vec![("dispatch, TCP", over_tcp.away), ("TCP, without computing", over_tcp.travelling)];
    let name = status.into_inner().unix_socket;
    if !name.is_empty() {
        let trips = measure(format!("unix:\0{name}")).await?;
        figures.extend([
            ("dispatch, Unix socket", trips.away),
            ("Unix socket, without computing", trips.travelling),
        ]);
    }
    server.stop().await;
    tasks.begin_shutdown();
    let n_bytes = over_tcp.n_bytes;
    let echo = tokio::task::spawn_blocking(move || echo(n_bytes)).await?.context("cannot echo")?;
    figures.push(("raw TCP echo", echo));
    print(figures, n_bytes, as_json)
}

struct Trips {
    /// How long each frame was away, and how long of that it was not computed.
    away: Vec<Duration>,
    travelling: Vec<Duration>,
    /// Of a frame's rows.
    n_bytes: usize,
}

/// As in a router: one thread that does everything.
async fn measure(url: String) -> anyhow::Result<Trips> {
    let measure = move || Builder::new_current_thread().enable_all().build()?.block_on(trips(&url));
    tokio::task::spawn_blocking(measure).await?
}

async fn trips(url: &str) -> anyhow::Result<Trips> {
    let mut client =
        ExpertClient::new(channel(url).await?).max_decoding_message_size(proto::MESSAGE_BYTES_MAX);
    let status = client.status(v1::ExpertStatusRequest {}).await?.into_inner();
    let frame = frame(&status)?;
    let (frames, receiver) = mpsc::channel(1);
    let mut replies = client.dispatch(ReceiverStream::new(receiver)).await?.into_inner();
    let (mut away, mut travelling) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for round in 0..WARM_UP + ROUNDS {
        let sent = now();
        frames.send(Frame { id: FrameId(round as u64 + 1), ..frame.clone() }.into_wire()).await?;
        let reply = replies.message().await?.context("the server ended the stream")?;
        let took = sent.elapsed();
        let computed = Reply::from_wire(reply)?.outcome?;
        if round >= WARM_UP {
            away.push(took);
            travelling.push(took.saturating_sub(computed.compute_time));
        }
    }
    Ok(Trips { away, travelling, n_bytes: frame.rows.n_bytes() })
}

/// Rows of [`BYTES`] together, one of them for the first expert held.
fn frame(status: &v1::ExpertStatus) -> anyhow::Result<Frame> {
    let layer = status.holds.first().context("the server holds nothing")?;
    let (expert, weights) =
        layer.experts.first().zip(layer.weights.first()).context("the server holds no expert")?;
    let width = status.hidden_size as usize;
    ensure!(width > 0, "the server has rows of no width");
    let n_rows = (BYTES / Dtype::Bf16.row_bytes(width)).max(1);
    Ok(Frame {
        id: FrameId(0),
        layer: LayerId(layer.layer),
        rows: Rows::encode(Dtype::Bf16, width, vec![0.5; n_rows * width]),
        assignments: vec![Assignment { row: RowIndex(0), expert: ExpertId(*expert), weight: 1.0 }],
        combine: Combine::Fast,
        timeout: None,
        traceparents: Vec::new(),
        epoch: Epoch(status.epoch),
        weights: WeightsHash::default().and(WeightsHash(*weights)),
    })
}

/// Two threads and a socket between them.
fn echo(n_bytes: usize) -> std::io::Result<Vec<Duration>> {
    let listener = TcpListener::bind(LOCAL)?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let answering = thread::spawn(move || {
        let mut bytes = vec![0; n_bytes];
        // Ends with the other end.
        while far.read_exact(&mut bytes).and_then(|()| far.write_all(&bytes)).is_ok() {}
    });
    let mut bytes = vec![0; n_bytes];
    let mut trips = Vec::with_capacity(ROUNDS);
    for round in 0..WARM_UP + ROUNDS {
        let sent = now();
        near.write_all(&bytes)?;
        near.read_exact(&mut bytes)?;
        if round >= WARM_UP {
            trips.push(sent.elapsed());
        }
    }
    drop(near);
    let _ended = answering.join();
    Ok(trips)
}

fn print(figures: Vec<(&str, Vec<Duration>)>, n_bytes: usize, as_json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut rows = vec![["ROUND TRIP", "BYTES", "P50 µs", "P90 µs", "P99 µs"].map(str::to_owned).to_vec()];
    for (name, mut times) in figures {
        times.sort_unstable();
        let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
        if as_json {
            let line = serde_json::json!({ "what": name, "bytes": n_bytes, "p50_us": at(50), "p90_us": at(90), "p99_us": at(99) });
            writeln!(out, "{line}")?;
        }
        let times = [at(50), at(90), at(99)].map(|time| format!("{time:.1}"));
        rows.push([vec![name.to_owned(), n_bytes.to_string()], times.to_vec()].concat());
    }
    if !as_json {
        write!(out, "{}", table::format(&rows))?;
    }
    Ok(())
}
