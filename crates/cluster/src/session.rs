//! A process's connection to its registry: it says who it is, hears who else is there, and what the leader wants.
//! The same four verbs for every kind of registry; with a static list three of them have nothing to do.

use std::{collections::BTreeMap, sync::Arc};

use ids::{InstanceId, Version};
use telemetry::{Metrics, Tasks, metrics::one, names};
use tokio::sync::watch;

use crate::{
    Placement, Record, Registry, Role,
    registry::{Error, etcd},
};

/// Who is there, at one revision. Published as a whole; readers keep the one they have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// The registry's own count of changes; 0: nothing heard yet.
    pub revision: i64,
    /// By instance; for a static list, by address.
    pub members: BTreeMap<String, Member>,
}

/// One process that the registry lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `host:port`
    pub address: String,
    /// A static list has none: the process itself must be asked.
    pub record: Option<Record>,
}

/// The right to write placements, from an election won. Writes of an earlier term fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// Revision at which the leader's key was created: the fencing token.
    pub revision: i64,
}

/// Why a placement was not written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("another leader has been elected")]
    NotLeader,
    #[error("the placement has changed meanwhile")]
    Conflict,
    #[error("the registry does not answer: {0}")]
    Unreachable(String),
}

/// Cloned freely; lives until its tasks shut down.
#[derive(Clone)]
pub struct Session(Kind);

#[derive(Clone)]
enum Kind {
    Static(Vec<String>),
    Etcd(Arc<etcd::Session>),
}

impl Session {
    /// Never waits for the registry: one that is away is looked for until it is there.
    ///
    /// # Errors
    /// What the URL names and cannot be read: certificate, key, password file.
    pub fn open(registry: &Registry, tasks: &Tasks) -> Result<Self, Error> {
        Ok(Self(match registry {
            Registry::Static(addresses) => Kind::Static(addresses.clone()),
            Registry::Etcd(url) => Kind::Etcd(Arc::new(etcd::Session::open(url, tasks)?)),
        }))
    }

    /// Adds the registry's state to a process's metrics.
    pub fn observe(&self, metrics: &Metrics) {
        let standing = |session: &Self| match &session.0 {
            Kind::Static(_) => (true, 1),
            Kind::Etcd(session) => session.standing(),
        };
        let (connected, revision) = (self.clone(), self.clone());
        metrics.read(&names::REGISTRY_CONNECTED, move || one(f64::from(u8::from(standing(&connected).0))));
        metrics.read(&names::REGISTRY_REVISION, move || one(standing(&revision).1 as f64));
    }

    /// True if members come and go by themselves and a leader places experts.
    #[must_use]
    pub fn is_dynamic(&self) -> bool {
        matches!(self.0, Kind::Etcd(_))
    }

    /// Keeps `record` in the registry until [`Announcement::revoke`], through outages of the registry.
    #[must_use]
    pub fn announce(&self, role: Role, record: Record) -> Announcement {
        match &self.0 {
            Kind::Static(_) => Announcement(None),
            Kind::Etcd(session) => Announcement(Some(session.announce(role, record))),
        }
    }

    /// Everybody in `role`, now and with every change.
    #[must_use]
    pub fn members(&self, role: Role) -> watch::Receiver<Arc<Membership>> {
        match &self.0 {
            Kind::Static(addresses) => {
                let member =
                    |address: &String| (address.clone(), Member { address: address.clone(), record: None });
                let members = addresses.iter().map(member).collect();
                // The sender is gone: nothing will ever change.
                watch::channel(Arc::new(Membership { revision: 1, members })).1
            }
            Kind::Etcd(session) => session.members(role),
        }
    }

    /// The placement in force, and every later one.
    #[must_use]
    pub fn placement(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        match &self.0 {
            Kind::Static(_) => watch::channel(None).1,
            Kind::Etcd(session) => session.placement(),
        }
    }

    /// Takes part in the election of the leader from now on. None while another instance leads.
    #[must_use]
    pub fn campaign(&self, instance: InstanceId) -> watch::Receiver<Option<Term>> {
        match &self.0 {
            Kind::Static(_) => watch::channel(None).1,
            Kind::Etcd(session) => session.campaign(instance),
        }
    }

    /// Writes `placement` in place of version `before` (0: of none), if `term` is still the leader's.
    pub async fn propose(&self, term: &Term, before: Version, placement: Placement) -> Result<(), Refused> {
        match &self.0 {
            Kind::Static(_) => Err(Refused::NotLeader),
            Kind::Etcd(session) => session.propose(term, before, placement).await,
        }
    }
}

/// A record kept in the registry.
pub struct Announcement(Option<etcd::Announcement>);

impl Announcement {
    /// Replaces the record.
    pub fn update(&self, record: Record) {
        if let Some(announcement) = &self.0 {
            announcement.update(record);
        }
    }

    /// Takes the record out, waiting for the registry a little while; after that its lease does it.
    pub async fn revoke(self) {
        if let Some(announcement) = self.0 {
            announcement.revoke().await;
        }
    }
}
