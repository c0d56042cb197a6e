//! What this instance says of itself: the same to whoever asks and to the registry.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster::{Announcement, Holdings, Record, Role, Session, State};
use ids::{InstanceId, Version};
use proto::WIRE_VERSION;

use shard::Shard;

/// One instance, from its start to its end.
pub(crate) struct Presence {
    instance: InstanceId,
    /// `host:port` at which others reach it.
    address: String,
    shard: Arc<Shard>,
    now: Mutex<Now>,
}

struct Now {
    state: State,
    /// Applied last.
    placement: Version,
    announcement: Option<Announcement>,
}

impl Presence {
    /// Of an instance that loads and that no registry knows yet.
    pub(crate) fn new(instance: InstanceId, address: String, shard: Arc<Shard>) -> Self {
        let now = Now { state: State::Loading, placement: Version::default(), announcement: None };
        Self { instance, address, shard, now: Mutex::new(now) }
    }

    /// Keeps the record in the registry of `session` from now on.
    pub(crate) fn announce(&self, session: &Session) {
        let mut now = self.now();
        now.announcement = Some(session.announce(Role::Expert, self.describe(&now)));
    }

    pub(crate) fn enter(&self, state: State) {
        self.change(|now| now.state = state);
    }

    /// What placement `version` wants is held.
    pub(crate) fn applied(&self, version: Version) {
        self.change(|now| now.placement = version);
    }

    /// Takes the record out of the registry.
    pub(crate) async fn revoke(&self) {
        let announcement = self.now().announcement.take();
        if let Some(announcement) = announcement {
            announcement.revoke().await;
        }
    }

    pub(crate) fn record(&self) -> Record {
        self.describe(&self.now())
    }

    pub(crate) const fn instance(&self) -> &InstanceId {
        &self.instance
    }

    pub(crate) const fn shard(&self) -> &Arc<Shard> {
        &self.shard
    }

    /// Published under the lock: of two changes at once, the later record has both.
    fn change(&self, change: impl FnOnce(&mut Now)) {
        let mut now = self.now();
        change(&mut now);
        if let Some(announcement) = &now.announcement {
            announcement.update(self.describe(&now));
        }
    }

    fn describe(&self, now: &Now) -> Record {
        let held = self.shard.held();
        Record {
            instance: self.instance.clone(),
            address: self.address.clone(),
            state: now.state,
            checkpoint: self.shard.checkpoint().to_owned(),
            wire_version: WIRE_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            holdings: Some(Holdings {
                epoch: held.epoch,
                holds: held.holds.clone(),
                pinned: self.shard.pinned().clone(),
                device: device(),
                bytes: held.experts.shard_bytes(),
                memory_bytes_max: self.shard.memory_bytes_max(),
                expert_bytes: self.shard.expert_bytes(),
                placement: now.placement,
            }),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Each change is a single write: a panic leaves none half done.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn device() -> String {
    format!("cpu {}", model::Isa::detect().name())
}
