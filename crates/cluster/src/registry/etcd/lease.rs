//! A record kept in etcd under a lease of its own.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, LeaseKeepAliveStream, LeaseKeeper, PutOptions};
use telemetry::Tasks;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::connection::{CALL_TIMEOUT, Connection, Retry, within};
use crate::{Record, Role};

/// A lease that is kept alive. Dropped, it ends by itself.
pub(super) struct Lease {
    pub(super) id: i64,
    ttl: Duration,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    /// Until when it lives for certain, as far as we know.
    pub(super) lives_until: Instant,
}

impl Lease {
    pub(super) async fn grant(client: &mut Client, ttl: Duration) -> Result<Self, etcd_client::Error> {
        let asked_at = Instant::now();
        let granted = within(CALL_TIMEOUT, client.lease_grant(ttl.as_secs() as i64, None)).await?;
        let (keeper, answers) = within(CALL_TIMEOUT, client.lease_keep_alive(granted.id())).await?;
        Ok(Self { id: granted.id(), ttl, keeper, answers, lives_until: asked_at + ttl })
    }

    /// How often it is to be kept.
    pub(super) fn interval(&self) -> Duration {
        self.ttl / 3
    }

    /// Keeps it for another ttl; an error if it has ended meanwhile.
    pub(super) async fn keep(&mut self) -> Result<(), etcd_client::Error> {
        let asked_at = Instant::now();
        within(CALL_TIMEOUT, self.keeper.keep_alive()).await?;
        let answer = within(CALL_TIMEOUT, self.answers.message()).await?;
        let lost = |why: &str| Err(etcd_client::Error::LeaseKeepAliveError(why.to_owned()));
        match answer {
            Some(answer) if answer.ttl() > 0 => {
                self.lives_until = asked_at + Duration::from_secs(answer.ttl() as u64);
                Ok(())
            }
            Some(_) => lost("the lease has ended"),
            None => lost("the keepalive stream has ended"),
        }
    }
}

/// A record that a task keeps in the registry.
pub(crate) struct Announcement {
    record: watch::Sender<Record>,
    revoke: CancellationToken,
    gone: CancellationToken,
}

/// How long leaving may take; the lease does it otherwise.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(2);

impl Announcement {
    pub(super) fn start(connection: Arc<Connection>, role: Role, record: Record, tasks: &Tasks) -> Self {
        let (sender, receiver) = watch::channel(record);
        let (revoke, gone) = (CancellationToken::new(), CancellationToken::new());
        let announcer = Announcer { connection, role, record: receiver, revoke: revoke.clone() };
        let (stop, ended) = (tasks.clone(), gone.clone().drop_guard());
        tasks.spawn("announcement", async move {
            let _says_so = ended;
            tokio::select! {
                () = stop.shutting_down() => {}
                () = announcer.run() => {}
            }
        });
        Self { record: sender, revoke, gone }
    }

    pub(crate) fn update(&self, record: Record) {
        self.record.send_replace(record);
    }

    pub(crate) async fn revoke(self) {
        self.revoke.cancel();
        let _late = tokio::time::timeout(REVOKE_TIMEOUT, self.gone.cancelled()).await;
    }
}

struct Announcer {
    connection: Arc<Connection>,
    role: Role,
    record: watch::Receiver<Record>,
    revoke: CancellationToken,
}

impl Announcer {
    /// Until the record is revoked.
    async fn run(mut self) {
        let mut retry = Retry::new("announcement");
        loop {
            let error = match Box::pin(self.keep(&mut retry)).await {
                Ok(()) => return,
                Err(error) => error,
            };
            tokio::select! {
                () = retry.pause(&error) => {}
                // Nobody to tell: the lease ends by itself.
                () = self.revoke.cancelled() => return,
            }
        }
    }

    /// One lease, as long as it lives. Whatever ends it, the next one is another: an ended lease cannot be put with.
    async fn keep(&mut self, retry: &mut Retry) -> Result<(), etcd_client::Error> {
        let mut client = self.connection.client().await?;
        let mut lease = Lease::grant(&mut client, self.connection.ttl).await?;
        let mut put = self.put(&mut client, lease.id).await?;
        tracing::info!(lease = format!("{:x}", lease.id), revision = put, "registered");
        retry.works();
        let mut beats = tokio::time::interval(lease.interval());
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.revoke.cancelled() => {
                    within(CALL_TIMEOUT, client.lease_revoke(lease.id)).await?;
                    return Ok(());
                }
                changed = self.record.changed() => match changed {
                    Ok(()) => put = self.put(&mut client, lease.id).await?,
                    // The announcement was dropped without a word: the record stays for as long as the process.
                    Err(_) => std::future::pending().await,
                },
                _ = beats.tick() => {
                    lease.keep().await?;
                    // Somebody may have deleted it by hand.
                    let key = self.key();
                    let there = within(CALL_TIMEOUT, client.get(key, None)).await?;
                    if there.kvs().iter().all(|kv| kv.lease() != lease.id || kv.mod_revision() < put) {
                        tracing::warn!("the record is gone from the registry, putting it back");
                        put = self.put(&mut client, lease.id).await?;
                    }
                }
            }
        }
    }

    fn key(&self) -> String {
        let instance = self.record.borrow().instance.clone();
        self.connection.key(&format!("{}/{instance}", self.role.folder()))
    }

    async fn put(&mut self, client: &mut Client, lease: i64) -> Result<i64, etcd_client::Error> {
        let value = serde_json::to_vec(&*self.record.borrow_and_update())
            .map_err(|error| etcd_client::Error::InvalidArgs(error.to_string()))?;
        let options = PutOptions::new().with_lease(lease);
        let response = within(CALL_TIMEOUT, client.put(self.key(), value, Some(options))).await?;
        Ok(response.header().map_or(0, etcd_client::ResponseHeader::revision))
    }
}
