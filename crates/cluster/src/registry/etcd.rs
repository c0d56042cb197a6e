//! Registration, watch, election and placement in etcd.

use std::sync::Arc;

use ids::{InstanceId, Version};
use telemetry::Tasks;
use tokio::sync::watch;

use crate::{Membership, Placement, Record, Refused, Role, Term, registry::Error};

/// `etcd://host:2379,host:2379/prefix?user=…&password-file=…&ca=…&cert=…&key=…&ttl=5s`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {}

impl Url {
    pub(crate) fn parse(_url: &str, _rest: &str) -> Result<Self, Error> {
        todo!()
    }
}

pub(crate) struct Session {}

impl Session {
    pub(crate) fn open(_url: &Url, _tasks: &Tasks) -> Result<Self, Error> {
        todo!()
    }

    pub(crate) fn announce(&self, _role: Role, _record: Record) -> Announcement {
        todo!()
    }

    pub(crate) fn members(&self, _role: Role) -> watch::Receiver<Arc<Membership>> {
        todo!()
    }

    pub(crate) fn placement(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        todo!()
    }

    pub(crate) fn campaign(&self, _instance: InstanceId) -> watch::Receiver<Option<Term>> {
        todo!()
    }

    pub(crate) async fn propose(
        &self,
        _term: &Term,
        _before: Version,
        _placement: Placement,
    ) -> Result<(), Refused> {
        todo!()
    }
}

pub(crate) struct Announcement {}

impl Announcement {
    pub(crate) fn update(&self, _record: Record) {}

    pub(crate) async fn revoke(self) {}
}
