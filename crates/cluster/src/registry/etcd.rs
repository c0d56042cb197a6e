//! Registration, watch, election and placement in etcd. Each has a task of its own that begins anew, with jitter,
//! whenever anything breaks; none of them ever gives up, and none is on the path of a request.

mod connection;
mod election;
mod follow;
mod lease;
mod url;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Compare, CompareOp, Txn, TxnOp};
use ids::{InstanceId, Version};
use telemetry::Tasks;
use tokio::sync::watch;

pub use self::url::Url;
pub(crate) use lease::Announcement;

use self::connection::{CALL_TIMEOUT, Connection, within};
use crate::{Membership, Placement, Record, Refused, Role, Term, registry::Error};

/// After data was lost, members that the registry has forgotten are kept for a lease and this much.
const GRACE: Duration = Duration::from_secs(5);

pub(crate) struct Session {
    connection: Arc<Connection>,
    tasks: Tasks,
    members: Mutex<HashMap<Role, watch::Receiver<Arc<Membership>>>>,
    placement: Mutex<Option<watch::Receiver<Placed>>>,
}

/// The placement in force, and the revision at which it was written.
#[derive(Clone, Debug, Default)]
struct Placed {
    placement: Option<Arc<Placement>>,
    revision: i64,
}

impl Session {
    pub(crate) fn open(url: &Url, tasks: &Tasks) -> Result<Self, Error> {
        Ok(Self {
            connection: Arc::new(Connection::new(url)?),
            tasks: tasks.clone(),
            members: Mutex::default(),
            placement: Mutex::default(),
        })
    }

    /// Whether the registry answers, and the latest of its revisions seen.
    pub(crate) fn standing(&self) -> (bool, i64) {
        (self.connection.answers(), self.connection.revision())
    }

    pub(crate) fn announce(&self, role: Role, record: Record) -> Announcement {
        Announcement::start(Arc::clone(&self.connection), role, record, &self.tasks)
    }

    pub(crate) fn members(&self, role: Role) -> watch::Receiver<Arc<Membership>> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let start = || follow::members(Arc::clone(&self.connection), role, &self.tasks);
        members.entry(role).or_insert_with(start).clone()
    }

    fn placed(&self) -> watch::Receiver<Placed> {
        let mut placement = self.placement.lock().unwrap_or_else(PoisonError::into_inner);
        let start = || follow::placement(Arc::clone(&self.connection), &self.tasks);
        placement.get_or_insert_with(start).clone()
    }

    pub(crate) fn placement(&self) -> watch::Receiver<Option<Arc<Placement>>> {
        let mut placed = self.placed();
        let (sender, receiver) = watch::channel(placed.borrow().placement.clone());
        let stop = self.tasks.clone();
        self.tasks.spawn("placement", async move {
            loop {
                tokio::select! {
                    () = stop.shutting_down() => return,
                    () = sender.closed() => return,
                    changed = placed.changed() => if changed.is_err() { return },
                }
                let current = placed.borrow_and_update().placement.clone();
                let _nobody_listens = sender.send(current);
            }
        });
        receiver
    }

    pub(crate) fn campaign(&self, instance: InstanceId) -> watch::Receiver<Option<Term>> {
        election::campaign(Arc::clone(&self.connection), instance, &self.tasks)
    }

    pub(crate) async fn propose(
        &self,
        term: &Term,
        before: Version,
        placement: Placement,
    ) -> Result<(), Refused> {
        let placed = self.placed().borrow().clone();
        let seen = placed.placement.as_ref().map_or(Version(0), |placement| placement.version);
        if seen != before || placement.version <= seen {
            return Err(Refused::Conflict);
        }
        let (leader, key) = (self.connection.key("leader"), self.connection.key("placement"));
        let value =
            serde_json::to_vec(&placement).map_err(|error| Refused::Unreachable(error.to_string()))?;
        let leads = Compare::create_revision(leader.as_str(), CompareOp::Equal, term.revision);
        let unchanged = Compare::mod_revision(key.as_str(), CompareOp::Equal, placed.revision);
        let txn = Txn::new()
            .when([leads, unchanged])
            .and_then([TxnOp::put(key.as_str(), value, None)])
            .or_else([TxnOp::get(leader.as_str(), None)]);
        let write = async {
            let mut client = self.connection.client().await?;
            client.txn(txn).await
        };
        let response = within(CALL_TIMEOUT, Box::pin(write))
            .await
            .map_err(|error| Refused::Unreachable(error.to_string()))?;
        if response.succeeded() {
            return Ok(());
        }
        let still_leads = response.op_responses().into_iter().any(|response| {
            matches!(response, etcd_client::TxnOpResponse::Get(leader)
                if leader.kvs().iter().any(|kv| kv.create_revision() == term.revision))
        });
        Err(if still_leads { Refused::Conflict } else { Refused::NotLeader })
    }
}
