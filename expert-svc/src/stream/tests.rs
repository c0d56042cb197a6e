//! Streams without sockets and weights: frames come from a channel, an engine computes them when the test says so,
//! and the clock stands where the test puts it.

use std::{
    sync::{Mutex, mpsc as gate},
    time::{Duration, Instant},
};

use ids::{ExpertId, LayerId, RowIndex};
use proto::{
    frame::Assignment,
    rows::{Dtype, Rows},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use shard::Combined;

use crate::{counters::Counts, engine::Engine};

const WATCHDOG: Duration = Duration::from_secs(60);

const HIDDEN: usize = 1024;

/// Bytes of a row.
const ROW: usize = HIDDEN * 4;

/// The layer whose frames panic.
const CURSED: LayerId = LayerId(13);

/// The server's insides with an engine that computes one frame for each [`Server::release`].
struct Server {
    streams: Streams,
    engine: Engine,
    now: Arc<Mutex<Instant>>,
    gate: gate::Sender<()>,
    /// The frames whose computation began.
    begun: mpsc::UnboundedReceiver<FrameId>,
}

impl Server {
    fn start() -> Self {
        let (gate, opened) = gate::channel();
        let (begin, begun) = mpsc::unbounded_channel();
        let opened = Mutex::new(opened);
        let compute = move |frame: &Frame| {
            begin.send(frame.id).unwrap();
            opened.lock().unwrap().recv().unwrap();
            assert_ne!(frame.layer, CURSED, "on purpose");
            Ok(Combined { rows: frame.rows.clone(), overflow_rows: Vec::new() })
        };
        let now = Arc::new(Mutex::new(tokio::time::Instant::now().into_std()));
        let hand = Arc::clone(&now);
        let clock: Clock = Arc::new(move || *hand.lock().unwrap());
        let threads = model::Threads::start(std::num::NonZeroUsize::MIN, 0).unwrap();
        let engine = Engine::start(threads, Box::new(compute), Arc::clone(&clock), quiet(), 0).unwrap();
        let streams =
            Streams::new(HIDDEN, engine.queue(), Arc::new(Counters::default()), clock, Tasks::new());
        streams.admit();
        Self { streams, engine, now, gate, begun }
    }

    /// One router's ends: where it writes frames, where it reads replies.
    fn connect(&self) -> (mpsc::Sender<Result<v1::Frame, Status>>, Replies) {
        let (frames, receiver) = mpsc::channel(1);
        (frames, self.streams.open(ReceiverStream::new(receiver)).unwrap())
    }

    fn release(&self) {
        self.gate.send(()).unwrap();
    }

    async fn begins(&mut self, id: u64) {
        let begun = tokio::time::timeout(WATCHDOG, self.begun.recv()).await.expect("no frame is computed");
        assert_eq!(begun, Some(FrameId(id)));
    }

    fn counts(&self) -> Counts {
        self.streams.counters.counts()
    }

    /// Waits until so many frames were received.
    async fn has_received(&self, frames: u64) {
        let received = async {
            while self.counts().frames < frames {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WATCHDOG, received).await.expect("frames are not received");
    }

    /// The counters when everything has ended.
    async fn end(self) -> Counts {
        let counters = Arc::clone(&self.streams.counters);
        let ended = async {
            self.streams.closed().await;
            drop((self.streams, self.gate));
            self.engine.end().await;
        };
        tokio::time::timeout(WATCHDOG, ended).await.expect("the server does not end");
        counters.counts()
    }
}

fn quiet() -> crate::observe::Observers {
    crate::observe::Observers::new(&telemetry::Metrics::default(), telemetry::Tracer::off())
}

fn frame(id: u64) -> Frame {
    Frame {
        id: FrameId(id),
        layer: LayerId(3),
        rows: Rows::encode(Dtype::F32, HIDDEN, [1.0; HIDDEN]),
        assignments: vec![Assignment { row: RowIndex(0), expert: ExpertId(0), weight: 1.0 }; 3],
        combine: Combine::Fast,
        timeout: None,
        traceparents: Vec::new(),
        epoch: PLAN.0,
        weights: PLAN.1,
    }
}

fn wire(id: u64) -> Result<v1::Frame, Status> {
    Ok(frame(id).into_wire())
}

/// What the frames here were planned with, and their replies carry back.
const PLAN: (Epoch, WeightsHash) = (Epoch(5), WeightsHash(6));

/// The next reply's frame, and the reason if it is a failure.
async fn next(replies: &mut Replies) -> Option<(u64, Option<String>)> {
    let item = tokio::time::timeout(WATCHDOG, replies.next()).await.expect("no reply comes")?;
    let reply = Reply::from_wire(item.expect("the stream ends with an error")).unwrap();
    let reason = reply.outcome.as_ref().err().map(|error| error.reason.as_ref());
    let plan = if reason == Some("checksum_mismatch") { Default::default() } else { PLAN };
    assert_eq!((reply.epoch, reply.weights), plan, "frame {}: {reason:?}", reply.id);
    Some((reply.id.0, reply.outcome.err().map(|error| error.reason.into_owned())))
}

fn computed(id: u64) -> Option<(u64, Option<String>)> {
    Some((id, None))
}

fn failed(id: u64, reason: &str) -> Option<(u64, Option<String>)> {
    Some((id, Some(reason.to_owned())))
}

#[tokio::test]
async fn a_stream_ends_when_its_router_is_done_and_answered() {
    let server = Server::start();
    let (frames, mut replies) = server.connect();
    for id in [1, 2] {
        frames.send(wire(id)).await.unwrap();
        server.release();
    }
    drop(frames);
    assert_eq!(next(&mut replies).await, computed(1));
    assert_eq!(next(&mut replies).await, computed(2));
    assert_eq!(next(&mut replies).await, None);
    drop(replies);
    assert_eq!(server.streams.n_open(), 0);
    assert_eq!(
        server.end().await,
        Counts { frames: 2, frames_failed: 0, frames_late: 0, frames_computed: 2, rows: 2, pairs: 6 }
    );
}

#[tokio::test]
async fn a_stream_that_breaks_drops_the_frames_it_queued() {
    let mut server = Server::start();
    let (frames, replies) = server.connect();
    for id in [1, 2, 3] {
        frames.send(wire(id)).await.unwrap();
    }
    server.has_received(3).await;
    server.begins(1).await;
    assert_eq!(server.streams.n_open(), 1);
    drop(replies);
    assert_eq!(server.streams.n_open(), 0);
    // One release: if frame 2 or 3 were computed too, the engine would not end.
    server.release();
    assert_eq!(
        server.end().await,
        Counts { frames: 3, frames_failed: 2, frames_late: 0, frames_computed: 1, rows: 1, pairs: 3 }
    );
}

#[tokio::test]
async fn a_frame_past_its_deadline_is_not_computed() {
    let mut server = Server::start();
    let (frames, mut replies) = server.connect();
    let timeout = Duration::from_millis(20);
    frames.send(wire(1)).await.unwrap();
    server.begins(1).await;
    // Both wait behind frame 1 for exactly 20 ms, which only the first allows.
    frames.send(Ok(Frame { timeout: Some(timeout), ..frame(2) }.into_wire())).await.unwrap();
    frames
        .send(Ok(Frame { timeout: Some(timeout - Duration::from_micros(1)), ..frame(3) }.into_wire()))
        .await
        .unwrap();
    server.has_received(3).await;
    *server.now.lock().unwrap() += timeout;
    server.release();
    server.release();
    assert_eq!(next(&mut replies).await, computed(1));
    assert_eq!(next(&mut replies).await, computed(2));
    let reply = replies.next().await.unwrap().unwrap();
    let error = Reply::from_wire(reply).unwrap().outcome.unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
    assert_eq!(error.message, "frame 3 waited 20ms to be computed, its timeout is 19.999ms");
    drop((frames, replies));
    assert_eq!(
        server.end().await,
        Counts { frames: 3, frames_failed: 1, frames_late: 1, frames_computed: 2, rows: 2, pairs: 6 }
    );
}

#[tokio::test]
async fn a_router_that_does_not_read_is_not_read() {
    let server = Server::start();
    let (frames, mut replies) = server.connect();
    let limit = FRAMES_PER_STREAM_MAX as u64;
    let router = async {
        for id in 1..=limit + 3 {
            frames.send(wire(id)).await.unwrap();
            server.release();
        }
        drop(frames);
    };
    let reader = async {
        // All that may be read is read and computed, and not one frame more.
        server.has_received(limit).await;
        while server.counts().pairs < 3 * limit {
            tokio::task::yield_now().await;
        }
        assert_eq!(server.counts().frames, limit);
        for id in 1..=limit + 3 {
            assert_eq!(next(&mut replies).await, computed(id));
        }
        assert_eq!(next(&mut replies).await, None);
        drop(replies);
    };
    tokio::time::timeout(WATCHDOG, async { tokio::join!(router, reader) }).await.expect("stuck");
    assert_eq!(server.end().await.frames, limit + 3);
}

#[tokio::test]
async fn drain_answers_what_was_read_and_ends_the_stream() {
    let mut server = Server::start();
    let (frames, mut replies) = server.connect();
    frames.send(wire(1)).await.unwrap();
    frames.send(wire(2)).await.unwrap();
    server.has_received(2).await;
    server.begins(1).await;
    server.streams.close();
    // The stream stops reading: its end of the channel goes.
    frames.closed().await;
    let error = server.streams.open(tokio_stream::empty()).unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "draining"));
    server.release();
    server.release();
    assert_eq!(next(&mut replies).await, computed(1));
    assert_eq!(next(&mut replies).await, computed(2));
    assert_eq!(next(&mut replies).await, None);
    drop(replies);
    assert_eq!(
        server.end().await,
        Counts { frames: 2, frames_failed: 0, frames_late: 0, frames_computed: 2, rows: 2, pairs: 6 }
    );
}

#[tokio::test]
async fn what_fails_fails_alone() {
    let server = Server::start();
    let (frames, mut replies) = server.connect();
    let rows = Rows::encode(Dtype::F32, HIDDEN, vec![1.0; (FRAME_BYTES_MAX / ROW + 1) * HIDDEN]);
    frames.send(Ok(Frame { rows, ..frame(1) }.into_wire())).await.unwrap();
    let pairs = vec![frame(2).assignments[0]; REPLY_BYTES_MAX / ROW + 1];
    frames
        .send(Ok(Frame { assignments: pairs, combine: Combine::Pairs, ..frame(2) }.into_wire()))
        .await
        .unwrap();
    let empty = v1::Frame { id: 3, epoch: PLAN.0.0, weights: PLAN.1.0, ..v1::Frame::default() };
    frames.send(Ok(proto::checksum::seal_frame(empty))).await.unwrap();
    frames.send(wire(6).map(|wire| v1::Frame { epoch: wire.epoch ^ 1, ..wire })).await.unwrap();
    frames.send(Ok(Frame { layer: CURSED, ..frame(4) }.into_wire())).await.unwrap();
    frames.send(wire(5)).await.unwrap();
    server.release();
    server.release();
    assert_eq!(next(&mut replies).await, failed(1, "frame_too_large"));
    assert_eq!(next(&mut replies).await, failed(2, "reply_too_large"));
    assert_eq!(next(&mut replies).await, failed(3, "invalid_value"));
    assert_eq!(next(&mut replies).await, failed(6, "checksum_mismatch"));
    assert_eq!(next(&mut replies).await, failed(4, "internal"));
    assert_eq!(next(&mut replies).await, computed(5));
    // What the transport cannot read ends the stream, with the transport's reason.
    frames.send(Err(Status::out_of_range("message too large"))).await.unwrap();
    let status = replies.next().await.unwrap().unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::OutOfRange, "message too large"));
    assert_eq!(next(&mut replies).await, None);
    drop(replies);
    assert_eq!(
        server.end().await,
        Counts { frames: 6, frames_failed: 5, frames_late: 0, frames_computed: 1, rows: 1, pairs: 3 }
    );
}

#[tokio::test]
async fn a_server_that_loads_takes_no_stream() {
    let server = Server::start();
    let Server { engine, streams, .. } = &server;
    let loading = Streams::new(
        HIDDEN,
        engine.queue(),
        Arc::clone(&streams.counters),
        Arc::clone(&streams.clock),
        Tasks::new(),
    );
    let error = loading.open(tokio_stream::empty()).unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "loading"));
    loading.admit();
    assert!(loading.open(tokio_stream::empty()).is_ok());
}

#[tokio::test]
async fn one_stream_too_many_is_refused() {
    let server = Server::start();
    let mut open: Vec<_> = (0..STREAMS_MAX).map(|_| server.connect()).collect();
    assert_eq!(server.streams.n_open(), STREAMS_MAX);
    let error = server.streams.open(tokio_stream::empty()).unwrap_err();
    assert_eq!((error.code, error.reason.as_ref()), (Code::Overloaded, "streams_max"));
    open.pop();
    open.push(server.connect());
    drop(open);
    assert_eq!(server.end().await, Counts::default());
}
