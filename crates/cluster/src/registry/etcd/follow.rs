//! Follows a folder of keys: list, watch from there, list again on every break and regularly.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, EventType, GetOptions, WatchOptions, WatchResponse};
use telemetry::Tasks;
use tokio::{sync::watch, time::Instant};

use super::{
    GRACE, Placed,
    connection::{CALL_TIMEOUT, Connection, Retry, within},
};
use crate::{
    Member, Membership, Placement, Record, Role,
    registry::listing::{Heard, Listing},
};

/// However quiet the watch is: etcd 3.4 can lose events.
const LIST_INTERVAL: Duration = Duration::from_secs(10);
/// How often members that are kept for a while are looked at.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) fn members(
    connection: Arc<Connection>,
    role: Role,
    tasks: &Tasks,
) -> watch::Receiver<Arc<Membership>> {
    let (sender, receiver) = watch::channel(Arc::new(Membership::default()));
    let (folder, grace) = (connection.key(&format!("{}/", role.folder())), connection.ttl + GRACE);
    follow(connection, Folder { prefix: folder, grace }, tasks, move |listing| {
        let entries =
            listing.entries().filter_map(|(key, value)| Some((key.to_owned(), member(key, value)?)));
        let membership = Membership { revision: listing.revision(), members: entries.collect() };
        sender.send_if_modified(|known| {
            let new = known.members != membership.members || known.revision == 0;
            *known = Arc::new(membership);
            new
        });
    });
    receiver
}

fn member(key: &str, value: &[u8]) -> Option<Member> {
    match serde_json::from_slice::<Record>(value) {
        Ok(record) if record.instance.as_str() == key => {
            Some(Member { address: record.address.clone(), record: Some(record) })
        }
        Ok(record) => {
            tracing::warn!(key, instance = %record.instance, "a record lies under another instance's key: ignored");
            None
        }
        Err(error) => {
            tracing::warn!(key, %error, "a record cannot be read: ignored");
            None
        }
    }
}

pub(super) fn placement(connection: Arc<Connection>, tasks: &Tasks) -> watch::Receiver<Placed> {
    let (sender, receiver) = watch::channel(Placed::default());
    let folder = Folder { prefix: connection.key("placement"), grace: Duration::ZERO };
    let mut newest = ids::Version(0);
    follow(connection, folder, tasks, move |listing| {
        let value = listing.entries().find(|(key, _)| key.is_empty());
        let placement = value.and_then(|(_, value)| {
            serde_json::from_slice::<Placement>(value)
                .inspect_err(|error| tracing::warn!(%error, "the placement cannot be read: ignored"))
                .ok()
        });
        if let Some(placement) = &placement {
            if placement.version < newest {
                let version = placement.version;
                return tracing::warn!(%version, %newest, "a placement older than the last: ignored");
            }
            newest = placement.version;
        }
        let revision = listing.revision_of("");
        sender.send_if_modified(|placed| {
            let new = placed.placement.as_deref() != placement.as_ref();
            *placed = Placed { placement: placement.map(Arc::new), revision };
            new
        });
    });
    receiver
}

struct Folder {
    prefix: String,
    grace: Duration,
}

fn follow(
    connection: Arc<Connection>,
    folder: Folder,
    tasks: &Tasks,
    mut publish: impl FnMut(&Listing) + Send + 'static,
) {
    let stop = tasks.clone();
    tasks.spawn("registry watch", async move {
        let mut listing = Listing::new(folder.grace);
        let mut retry = Retry::new("watch");
        loop {
            let error = tokio::select! {
                () = stop.shutting_down() => return,
                error = follow_once(&connection, &folder, &mut listing, &mut retry, &mut publish) => error,
            };
            connection.hears_nothing();
            tokio::select! {
                () = stop.shutting_down() => return,
                () = retry.pause(&error) => {}
            }
            if listing.expire(now()) {
                publish(&listing);
            }
        }
    });
}

/// Until something breaks.
async fn follow_once(
    connection: &Connection,
    folder: &Folder,
    listing: &mut Listing,
    retry: &mut Retry,
    publish: &mut impl FnMut(&Listing),
) -> etcd_client::Error {
    let watch = async {
        let mut client = connection.client().await?;
        list(&mut client, folder, listing, publish).await?;
        let from = WatchOptions::new().with_prefix().with_start_revision(listing.revision() + 1);
        let mut events = within(CALL_TIMEOUT, client.watch(folder.prefix.as_str(), Some(from))).await?;
        retry.works();
        connection.hears(listing.revision());
        let mut list_at = Instant::now() + LIST_INTERVAL;
        loop {
            let response = tokio::select! {
                response = events.message() => response?,
                () = tokio::time::sleep(EXPIRE_INTERVAL) => {
                    if listing.expire(now()) {
                        publish(listing);
                    }
                    if Instant::now() >= list_at {
                        list(&mut client, folder, listing, publish).await?;
                        list_at = Instant::now() + LIST_INTERVAL;
                        connection.hears(listing.revision());
                    }
                    continue;
                }
            };
            let Some(response) = response else {
                return Err(etcd_client::Error::WatchError("the watch has ended".to_owned()));
            };
            if response.canceled() {
                // Compacted, most likely: what was missed is listed.
                return Err(etcd_client::Error::WatchError(format!(
                    "cancelled: {}",
                    response.cancel_reason()
                )));
            }
            if apply(&response, folder, listing)? {
                publish(listing);
            }
            connection.hears(listing.revision());
        }
    };
    let result: Result<std::convert::Infallible, etcd_client::Error> = Box::pin(watch).await;
    match result {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn list(
    client: &mut Client,
    folder: &Folder,
    listing: &mut Listing,
    publish: &mut impl FnMut(&Listing),
) -> Result<(), etcd_client::Error> {
    let options = GetOptions::new().with_prefix();
    let response = within(CALL_TIMEOUT, client.get(folder.prefix.as_str(), Some(options))).await?;
    let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
    let mut listed = Vec::with_capacity(response.kvs().len());
    for kv in response.kvs() {
        listed.push((name(folder, kv.key_str()?), kv.value().to_vec(), kv.mod_revision()));
    }
    match listing.list(revision, listed, now()) {
        Heard::Changed => publish(listing),
        // The first of all lists may find nothing, which is something to know.
        Heard::Same => publish(listing),
        Heard::DataLost => {
            tracing::warn!(revision, "the registry has lost its data; members get time to register again");
            publish(listing);
        }
        Heard::Stale => {
            let known = listing.revision();
            let why = format!("it answers as of revision {revision}, and {known} has been seen");
            return Err(etcd_client::Error::WatchError(why));
        }
    }
    Ok(())
}

fn apply(
    response: &WatchResponse,
    folder: &Folder,
    listing: &mut Listing,
) -> Result<bool, etcd_client::Error> {
    let mut changed = false;
    for event in response.events() {
        let Some(kv) = event.kv() else { continue };
        let value = match event.event_type() {
            EventType::Put => Some(kv.value().to_vec()),
            EventType::Delete => None,
        };
        changed |= listing.event(kv.mod_revision(), &name(folder, kv.key_str()?), value);
    }
    Ok(changed)
}

fn name(folder: &Folder, key: &str) -> String {
    key.strip_prefix(&folder.prefix).unwrap_or(key).to_owned()
}

#[expect(clippy::disallowed_methods, reason = "the listing takes the clock as an argument; this is its edge")]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}
