//! Placements as a leader publishes them, and frames that stream meanwhile. Without a registry: a channel stands for it.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use cluster::State;
use ids::{Epoch, ExpertId, FrameId, LayerId, RowIndex, WeightsHash};
use proto::{
    Frame, Reply,
    frame::{Assignment, Combine},
    rows::{Dtype, Rows},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};

use super::*;
use shard::Shard;

use crate::{checkpoint::Model, counters::Counters, engine::Engine, stream::Streams};

const WATCHDOG: Duration = Duration::from_secs(60);

const HIDDEN: usize = 16;

fn placement(version: u64, wanted: &[(&str, &str)]) -> Placement {
    let wanted = wanted.iter().map(|&(instance, holds)| (instance.to_owned(), holds.parse().unwrap()));
    Placement { version: Version(version), leader: "router".into(), wanted: wanted.collect() }
}

/// An instance called "me" that follows what the test publishes.
struct Follower {
    /// Keeps the checkpoint's files.
    model: Model,
    presence: Arc<Presence>,
    publish: watch::Sender<Option<Arc<Placement>>>,
    tasks: Tasks,
}

impl Follower {
    async fn start(pinned: &[u32], experts_max: u64) -> Self {
        let model = Model::random(HIDDEN, 8).write();
        let checkpoint = Arc::new(model::Checkpoint::open(model.dir.path()).unwrap());
        let pinned: Vec<_> = pinned.iter().copied().map(ExpertId).collect();
        let shard = Arc::new(Shard::new(checkpoint, &pinned, experts_max * model.expert_bytes()));
        let loading = Arc::clone(&shard);
        tokio::task::spawn_blocking(move || loading.hold(&Holds::default()).map(drop))
            .await
            .unwrap()
            .unwrap();
        let presence = Arc::new(Presence::new("me".into(), "me:1".to_owned(), shard));
        presence.enter(State::Ready);
        let (publish, placements) = watch::channel(None);
        let tasks = Tasks::new();
        tasks.spawn("placement", follow(placements, Arc::clone(&presence), tasks.clone()));
        Self { model, presence, publish, tasks }
    }

    fn publish(&self, version: u64, wanted: &[(&str, &str)]) {
        self.publish.send_replace(Some(Arc::new(placement(version, wanted))));
    }

    /// On a runtime with one thread: the follower has seen what was published and is at it.
    async fn takes_it_up(&self) {
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }

    /// The record when it says that `version` is applied: epoch and experts.
    async fn applied(&self, version: u64) -> (u64, String) {
        let applied = async {
            loop {
                let holdings = self.presence.record().holdings.unwrap();
                if holdings.placement == Version(version) {
                    return (holdings.epoch.0, holdings.holds.to_string());
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WATCHDOG, applied).await.expect("the placement is not applied")
    }

    async fn end(self) {
        self.tasks.begin_shutdown();
        assert!(self.tasks.join(WATCHDOG).await);
    }
}

fn quiet() -> crate::observe::Observers {
    crate::observe::Observers::new(&telemetry::Metrics::default(), telemetry::Tracer::off())
}

#[tokio::test]
async fn the_record_says_what_is_held_and_which_placement_that_is() {
    let follower = Follower::start(&[0], 5).await;
    let record = follower.presence.record();
    assert_eq!((record.state, record.address.as_str()), (State::Ready, "me:1"));
    let holdings = record.holdings.unwrap();
    assert_eq!(holdings.holds.to_string(), "1-2:0");
    assert_eq!(holdings.pinned, holdings.holds);
    assert_eq!((holdings.epoch, holdings.placement), (Epoch(1), Version(0)));
    assert_eq!(holdings.bytes, 2 * follower.model.expert_bytes());
    assert_eq!(holdings.memory_bytes_max, 5 * follower.model.expert_bytes());
    follower.publish(3, &[("me", "1:2-3"), ("other", "2:4")]);
    assert_eq!(follower.applied(3).await, (2, "1:0,2-3;2:0".to_owned()));
    // A newer placement that changes nothing here is applied too.
    follower.publish(4, &[("me", "1:2-3")]);
    assert_eq!(follower.applied(4).await, (2, "1:0,2-3;2:0".to_owned()));
    follower.publish(6, &[("me", "")]);
    assert_eq!(follower.applied(6).await, (3, "1-2:0".to_owned()));
    follower.end().await;
}

#[tokio::test]
async fn a_placement_that_cannot_be_applied_changes_nothing() {
    let follower = Follower::start(&[], 3).await;
    follower.publish(1, &[("me", "1:0-2")]);
    assert_eq!(follower.applied(1).await, (2, "1:0-2".to_owned()));
    let mut version = 1;
    // Too large, and not in the model.
    for refused in ["1:0-3", "9:0"] {
        version += 1;
        follower.publish(version, &[("me", refused)]);
        follower.takes_it_up().await;
        version += 1;
        follower.publish(version, &[("me", "1:0-2")]);
        assert_eq!(follower.applied(version).await, (2, "1:0-2".to_owned()), "{refused}");
    }
    // Of a leader that has been replaced.
    follower.publish(version - 1, &[("me", "1:7")]);
    follower.takes_it_up().await;
    assert_eq!(follower.applied(version).await, (2, "1:0-2".to_owned()));
    follower.publish(version + 1, &[("me", "1:0")]);
    assert_eq!(follower.applied(version + 1).await, (3, "1:0".to_owned()));
    follower.end().await;
}

fn frame(id: u64, expert: u32, weights: WeightsHash) -> Frame {
    Frame {
        id: FrameId(id),
        layer: LayerId(1),
        rows: Rows::encode(Dtype::F32, HIDDEN, [0.25; HIDDEN]),
        assignments: vec![Assignment { row: RowIndex(0), expert: ExpertId(expert), weight: 0.5 }],
        combine: Combine::Fast,
        timeout: None,
        traceparents: Vec::new(),
        epoch: Epoch(id),
        weights,
    }
}

/// Expert 0 is pinned, expert 5 comes and goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holdings_that_change_under_load_lose_no_frame() {
    let follower = Follower::start(&[0], 16).await;
    follower.publish(1, &[("me", "1:5")]);
    follower.applied(1).await;
    let shard = follower.presence.shard();
    let weights = |expert| shard.held().experts.weights(LayerId(1), ExpertId(expert)).unwrap();
    let weights = HashMap::from([(0, weights(0)), (5, weights(5))]);

    let compute = Arc::clone(shard);
    let threads = model::Threads::start(std::num::NonZeroUsize::MIN, 0).unwrap();
    let clock: crate::engine::Clock = Arc::new(|| tokio::time::Instant::now().into_std());
    let engine = Engine::start(
        threads,
        Box::new(move |frame: &_| compute.compute(frame)),
        Arc::clone(&clock),
        quiet(),
        64,
    )
    .unwrap();
    let streams =
        Streams::new(HIDDEN, engine.queue(), Arc::new(Counters::default()), clock, follower.tasks.clone());
    streams.admit();
    let (frames, receiver) = tokio::sync::mpsc::channel(4);
    let mut replies = streams.open(ReceiverStream::new(receiver)).unwrap();

    let changes = 40;
    let changing = async {
        for version in 2..changes {
            let wanted = if version % 2 == 0 { "" } else { "1:5" };
            follower.publish(version, &[("me", wanted)]);
            follower.applied(version).await;
            // A frame of each kind, received now, is computed with what is held now.
            let received = streams.counters.counts().frames;
            while streams.counters.counts().frames < received + 2 {
                tokio::task::yield_now().await;
            }
        }
    };
    let (done, mut changed) = watch::channel(false);
    let sending = async {
        let mut sent = 0;
        // Until the holdings have changed for the last time, and once more of both kinds.
        let mut rest = 2;
        while rest > 0 {
            rest -= u64::from(*changed.borrow_and_update());
            let expert = if sent % 2 == 0 { 0 } else { 5 };
            sent += 1;
            frames.send(Ok(frame(sent, expert, weights[&expert]).into_wire())).await.unwrap();
        }
        drop(frames);
        sent
    };
    let reading = async {
        let mut answers: BTreeMap<(u32, Option<String>), Vec<Rows>> = BTreeMap::new();
        let mut n = 0;
        while let Some(reply) = replies.next().await {
            n += 1;
            let Reply { id, epoch, outcome, .. } = Reply::from_wire(reply.unwrap()).unwrap();
            assert_eq!((id.0, epoch.0), (n, n), "every frame is answered, in order");
            let expert = if n % 2 == 1 { 0 } else { 5 };
            let (reason, rows) = match outcome {
                Ok(computed) => (None, Some(computed.rows)),
                Err(error) => (Some(error.reason.into_owned()), None),
            };
            let of_this_kind = answers.entry((expert, reason)).or_default();
            // One of each is enough to compare.
            match (of_this_kind.first(), rows) {
                (Some(first), Some(rows)) => assert_eq!(*first, rows, "the same bits"),
                (None, Some(rows)) => of_this_kind.push(rows),
                (_, None) => {}
            }
        }
        (n, answers)
    };
    let all = async {
        let changing = async {
            changing.await;
            done.send_replace(true);
        };
        tokio::join!(changing, sending, reading)
    };
    let ((), sent, (answered, answers)) = tokio::time::timeout(WATCHDOG, all).await.expect("stuck");
    assert_eq!(sent, answered);
    let kinds: Vec<_> = answers.keys().map(|(expert, reason)| (*expert, reason.as_deref())).collect();
    assert_eq!(kinds, [(0, None), (5, None), (5, Some("expert_not_held"))]);
    assert!(shard.compute(&frame(0, 5, weights[&5])).is_ok(), "held again at the end");
    drop((replies, streams));
    engine.end().await;
    follower.end().await;
}
