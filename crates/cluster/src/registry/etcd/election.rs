//! Who leads: whoever creates the leader's key, for as long as its lease lives. The key's create revision is the term's
//! fencing token, so that being wrong about who leads costs nothing.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp};
use ids::InstanceId;
use telemetry::Tasks;
use tokio::{sync::watch, time::Instant};

use super::{
    connection::{CALL_TIMEOUT, Connection, Retry, jittered, within},
    lease::Lease,
};
use crate::Term;

/// How long resigning may take at the end; the lease does it otherwise.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn campaign(
    connection: Arc<Connection>,
    instance: InstanceId,
    tasks: &Tasks,
) -> watch::Receiver<Option<Term>> {
    let (sender, receiver) = watch::channel(None);
    let candidate = Candidate { connection, instance, term: sender };
    let stop = tasks.clone();
    tasks.spawn("election", async move {
        let mut retry = Retry::new("election");
        loop {
            let error = tokio::select! {
                () = stop.shutting_down() => return,
                error = candidate.stand(&stop, &mut retry) => match error {
                    Ok(()) => return,
                    Err(error) => error,
                },
            };
            candidate.resign();
            tokio::select! {
                () = stop.shutting_down() => return,
                () = retry.pause(&error) => {}
            }
        }
    });
    receiver
}

struct Candidate {
    connection: Arc<Connection>,
    instance: InstanceId,
    term: watch::Sender<Option<Term>>,
}

impl Candidate {
    /// Tries until it leads, and leads until something breaks or the process ends.
    async fn stand(&self, stop: &Tasks, retry: &mut Retry) -> Result<(), etcd_client::Error> {
        let mut client = self.connection.client().await?;
        loop {
            let mut lease = Lease::grant(&mut client, self.connection.ttl).await?;
            let won = self.try_to_win(&mut client, lease.id).await?;
            retry.works();
            if let Some(term) = won {
                tracing::info!(term = term.revision, "this router leads");
                self.term.send_replace(Some(term.clone()));
                let ended = self.lead(&mut client, &mut lease, &term, stop).await;
                self.resign();
                return ended;
            }
            // The lease was for nothing; the next try has its own.
            within(CALL_TIMEOUT, client.lease_revoke(lease.id)).await?;
            self.wait_for_vacancy(&mut client).await?;
        }
    }

    async fn try_to_win(&self, client: &mut Client, lease: i64) -> Result<Option<Term>, etcd_client::Error> {
        let key = self.connection.key("leader");
        let options = PutOptions::new().with_lease(lease);
        let txn = Txn::new()
            .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.as_str(), self.instance.as_str(), Some(options))]);
        let response = within(CALL_TIMEOUT, client.txn(txn)).await?;
        let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(response.succeeded().then_some(Term { revision }))
    }

    /// Asks instead of watching: a watch may lose the one event that matters.
    async fn wait_for_vacancy(&self, client: &mut Client) -> Result<(), etcd_client::Error> {
        let key = self.connection.key("leader");
        loop {
            let pause = self.connection.ttl / 6;
            tokio::time::sleep(pause + jittered(pause)).await;
            if within(CALL_TIMEOUT, client.get(key.as_str(), None)).await?.kvs().is_empty() {
                return Ok(());
            }
        }
    }

    async fn lead(
        &self,
        client: &mut Client,
        lease: &mut Lease,
        term: &Term,
        stop: &Tasks,
    ) -> Result<(), etcd_client::Error> {
        let key = self.connection.key("leader");
        loop {
            tokio::select! {
                () = stop.shutting_down() => {
                    return within(RESIGN_TIMEOUT, client.lease_revoke(lease.id)).await.map(|_| ());
                }
                () = tokio::time::sleep(lease.interval()) => {}
            }
            // From the moment on at which the lease may have ended, another may lead: step down before.
            let lives_until = lease.lives_until;
            let beat = async {
                lease.keep().await?;
                within(CALL_TIMEOUT, client.get(key.as_str(), None)).await
            };
            let Ok(leader) = tokio::time::timeout_at(lives_until, beat).await else {
                return Err(etcd_client::Error::ElectError("the lease may have ended".to_owned()));
            };
            if leader?.kvs().iter().all(|kv| kv.create_revision() != term.revision) {
                return Err(etcd_client::Error::ElectError("the leader's key is gone".to_owned()));
            }
            debug_assert!(lease.lives_until >= Instant::now() || !lease.interval().is_zero());
        }
    }

    fn resign(&self) {
        self.term.send_if_modified(|term| {
            let led = term.take().is_some();
            if led {
                tracing::info!("this router leads no more");
            }
            led
        });
    }
}
