//! One long-lived dispatch stream to one expert server, made again whenever it breaks; and the one writer of the view
//! that the engine reads.
//!
//! The registry says whom to call, the stream says who lives: a server whose stream works is used even when the registry
//! has lost it, and one that is listed is not used before it has answered.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use cluster::{Holder, Member, Members, Membership, State};
use ids::{Epoch, InstanceId};
use proto::{
    Code, Error, Reply,
    v1::{self, expert_client::ExpertClient},
};
use telemetry::Tasks;
use tokio::{
    runtime::Handle,
    sync::{
        Notify,
        mpsc::{self, UnboundedSender},
        watch,
    },
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::{
    dial::{self, CONNECT_TIMEOUT, Transport},
    engine::Command,
    identity::Identity,
    remote::{LINK_FRAMES_MAX, LinkEvent, View, Way, now},
};

/// What is known of one listed server, for `Status`.
#[derive(Clone, Debug)]
pub(crate) struct LinkState {
    pub(crate) address: String,
    pub(crate) instance: String,
    pub(crate) state: &'static str,
    pub(crate) detail: String,
    pub(crate) n_experts: usize,
    pub(crate) epoch: Epoch,
    /// Empty when it is not connected.
    pub(crate) transport: &'static str,
}

/// All links of a router.
pub(crate) struct Links {
    identity: Identity,
    view: Arc<ArcSwap<View>>,
    joined: Mutex<Joined>,
    /// By the registry's key.
    listed: Mutex<HashMap<String, watch::Sender<Option<Member>>>>,
    states: Mutex<BTreeMap<String, LinkState>>,
    events: UnboundedSender<LinkEvent>,
    commands: UnboundedSender<Command>,
    /// Where links live: the engine's own loop.
    event_loop: Handle,
    /// Servers on this host are called through their Unix sockets.
    unix_sockets: bool,
}

#[derive(Default)]
struct Joined {
    members: Members,
    links: HashMap<InstanceId, Way>,
}

/// How frames get to a holder that joins.
enum Through {
    Link(Way, Transport),
    /// They stay in this process.
    Inside,
    /// It has joined already, and holds something else now.
    AsBefore,
}

const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(1);

impl Links {
    pub(crate) fn new(
        identity: Identity,
        view: Arc<ArcSwap<View>>,
        events: UnboundedSender<LinkEvent>,
        commands: UnboundedSender<Command>,
        event_loop: Handle,
        unix_sockets: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            view,
            joined: Mutex::default(),
            listed: Mutex::default(),
            states: Mutex::default(),
            events,
            commands,
            event_loop,
            unix_sockets,
        })
    }

    /// Keeps a link to everybody in `membership`, as it changes, until shutdown.
    pub(crate) fn follow(self: &Arc<Self>, mut membership: watch::Receiver<Arc<Membership>>, tasks: &Tasks) {
        let (links, tasks_of_links) = (Arc::clone(self), tasks.clone());
        tasks.spawn("membership", async move {
            loop {
                let current = Arc::clone(&membership.borrow_and_update());
                links.list(&current, &tasks_of_links);
                tokio::select! {
                    () = tasks_of_links.shutting_down() => return,
                    // A static list has no writer: it never changes.
                    changed = membership.changed() => if changed.is_err() { return },
                }
            }
        });
    }

    fn list(self: &Arc<Self>, membership: &Membership, tasks: &Tasks) {
        let mut listed = lock(&self.listed);
        let _spawned_there = self.event_loop.enter();
        for (key, member) in &membership.members {
            if let Some(known) = listed.get(key) {
                known.send_if_modified(|known| {
                    let new = known.as_ref() != Some(member);
                    *known = Some(member.clone());
                    new
                });
                continue;
            }
            let (sender, receiver) = watch::channel(Some(member.clone()));
            listed.insert(key.clone(), sender);
            self.set_state(key, &member.address, "connecting", "", None);
            let (links, stop, key) = (Arc::clone(self), tasks.clone(), key.clone());
            tasks.spawn("link", async move {
                tokio::select! {
                    // Safe to cancel anywhere: the process is ending, and with it every flight.
                    () = stop.shutting_down() => {}
                    () = links.keep_connected(&key, receiver) => {}
                }
            });
        }
        for (key, known) in listed.iter().filter(|(key, _)| !membership.members.contains_key(*key)) {
            if known.send_if_modified(|known| known.take().is_some()) {
                tracing::info!(member = %key, "no longer listed");
            }
        }
    }

    /// The experts that this router holds itself: nothing is connected to them, and nothing of it breaks.
    pub(crate) fn hold(&self, holder: Holder) -> Result<(), Error> {
        let key = holder.instance.to_string();
        self.join(&key, holder, Through::Inside)
    }

    pub(crate) fn states(&self) -> BTreeMap<String, LinkState> {
        lock(&self.states).clone()
    }

    /// Those that can be sent frames now.
    pub(crate) fn joined(&self) -> BTreeSet<InstanceId> {
        lock(&self.joined).links.keys().cloned().collect()
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// Until the member is neither listed nor connected.
    async fn keep_connected(self: &Arc<Self>, key: &str, mut listed: watch::Receiver<Option<Member>>) {
        let mut pause = RECONNECT_MIN;
        let mut last_warning = String::new();
        loop {
            let Some(member) = listed.borrow_and_update().clone() else {
                if self.forget(key) {
                    return;
                }
                continue;
            };
            let address = &member.address;
            let error = match self.connect(key, &member).await {
                Ok(connection) => {
                    pause = RECONNECT_MIN;
                    last_warning.clear();
                    let instance = connection.holder.instance.clone();
                    tracing::info!(%address, %instance, experts = connection.holder.n_experts(), "expert server joined");
                    let error = self.serve(key, connection, &mut listed).await;
                    tracing::warn!(%address, %instance, %error, "expert server left");
                    error
                }
                Err(error) => {
                    // A server that stays away is one line, not one a second.
                    if error.message != last_warning {
                        tracing::warn!(%address, reason = %error.reason, %error, "cannot use expert server");
                        last_warning.clone_from(&error.message);
                    }
                    error
                }
            };
            let state = if error.reason == "refused" { "refused" } else { "connecting" };
            self.set_state(key, address, state, &error.message, None);
            tokio::select! {
                () = tokio::time::sleep(jittered(pause)) => pause = (pause * 2).min(RECONNECT_MAX),
                // News of it: it may be ready now.
                _ = listed.changed() => pause = RECONNECT_MIN,
            }
        }
    }

    /// Forgets an unlisted member; false if it has been listed again.
    fn forget(&self, key: &str) -> bool {
        let mut listed = lock(&self.listed);
        let gone = listed.get(key).is_none_or(|known| known.borrow().is_none());
        if gone {
            listed.remove(key);
            lock(&self.states).remove(key);
        }
        gone
    }

    async fn connect(&self, key: &str, member: &Member) -> Result<Connection, Error> {
        let address = &member.address;
        if let Some(record) = &member.record
            && record.state == State::Loading
        {
            return Err(Error::new(Code::Unavailable, "not_ready", format!("{address} is loading")));
        }
        let mut client = dial::tcp(address).await?;
        let status = ask(&mut client).await?;
        let mut transport = Transport::Tcp;
        if self.unix_sockets
            && let Some(name) = dial::unix_socket_of(&status, address)
            && let Some(through_it) = through_unix_socket(name, address, &status.instance).await
        {
            (client, transport) = (through_it, Transport::Unix);
        }
        let holder = self.identity.check(address, status)?;
        if member.record.is_some() && holder.instance.as_str() != key {
            let message = format!("{address} is now {}", holder.instance);
            return Err(Error::new(Code::Unavailable, "other_instance", message));
        }
        Ok(Connection { client, transport, holder })
    }

    /// Carries frames and replies until the stream ends; says why it did.
    async fn serve(
        &self,
        key: &str,
        connection: Connection,
        listed: &mut watch::Receiver<Option<Member>>,
    ) -> Error {
        let Connection { mut client, transport, mut holder } = connection;
        let (frames, receiver) = mpsc::channel(LINK_FRAMES_MAX);
        let given_up = Arc::new(Notify::new());
        let opened =
            tokio::time::timeout(CONNECT_TIMEOUT, client.dispatch(ReceiverStream::new(receiver))).await;
        let mut replies = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Error::from_status(&status),
            Err(_) => return Error::new(Code::DeadlineExceeded, "dispatch_refused", "no answer to Dispatch"),
        };
        let elsewhere = transport == Transport::Tcp && dial::is_elsewhere(&holder.address);
        let way = Way { frames, given_up: Arc::clone(&given_up), elsewhere };
        if let Err(error) = self.join(key, holder.clone(), Through::Link(way, transport)) {
            return error;
        }
        let instance = holder.instance.clone();
        let mut hears = true;
        let error = loop {
            tokio::select! {
                // What has come is heard before the way it came is given up.
                biased;
                reply = self.next_reply(&mut replies, &instance) => match reply {
                    Ok(reply) => self.tell(LinkEvent::Reply { instance: instance.clone(), reply, at: now() }),
                    Err(error) => break error,
                },
                // A server that hangs, or a stream that is lost in a connection that lives.
                () = given_up.notified() => {
                    let message = format!("{instance} owes answers and says nothing");
                    break Error::new(Code::DeadlineExceeded, "mute", message);
                }
                changed = listed.changed(), if hears => {
                    hears = changed.is_ok();
                    let record = listed.borrow_and_update().clone().and_then(|member| member.record);
                    let Some(record) = record else { continue };
                    if record.state == State::Draining {
                        self.drain(key, &instance);
                    } else if record.holdings.is_some_and(|holdings| holdings.epoch > holder.epoch) {
                        // The registry says that it holds something else now; what, it says itself. The stream's
                        // replies wait meanwhile, for as long as its own server takes to say it.
                        match ask(&mut client).await.and_then(|status| self.identity.check(&holder.address, status)) {
                            Ok(now) if now.instance == instance => holder = now,
                            Ok(now) => break Error::new(Code::Unavailable, "link_down", format!("{} answers there now", now.instance)),
                            Err(error) => break error,
                        }
                        if let Err(error) = self.join(key, holder.clone(), Through::AsBefore) {
                            break error;
                        }
                        tracing::info!(%instance, experts = holder.n_experts(), epoch = %holder.epoch, "holdings changed");
                    }
                }
            }
        };
        self.leave(&instance);
        self.tell(LinkEvent::Broken { instance, error: error.clone() });
        error
    }

    /// Cancel safe: a message is taken whole or not at all.
    async fn next_reply(
        &self,
        replies: &mut Streaming<v1::Reply>,
        instance: &InstanceId,
    ) -> Result<Reply, Error> {
        match replies.message().await {
            // A damaged reply may carry a damaged id: the way it came is not to be trusted, and is made anew.
            Ok(Some(reply)) => Reply::from_wire(reply),
            Ok(None) => {
                Err(Error::new(Code::Unavailable, "stream_ended", format!("{instance} ended its stream")))
            }
            Err(status) => Err(dial::broken(&status)),
        }
    }

    fn join(&self, key: &str, holder: Holder, through: Through) -> Result<(), Error> {
        let mut joined = lock(&self.joined);
        let instance = holder.instance.clone();
        let table = joined.members.join(holder.clone()).map_err(|error| {
            tracing::error!(%error, "expert server refused");
            Error::new(Code::InvalidArgument, "refused", error.to_string())
        })?;
        let transport = match through {
            Through::Link(link, transport) => {
                joined.links.insert(instance, link);
                Some(transport)
            }
            Through::Inside => Some(Transport::Inside),
            Through::AsBefore => None,
        };
        self.set_state(key, &holder.address, "ready", "", Some((&holder, transport)));
        self.publish(&joined, table);
        Ok(())
    }

    fn drain(&self, key: &str, instance: &InstanceId) {
        let mut joined = lock(&self.joined);
        if let Some(table) = joined.members.drain(instance) {
            tracing::info!(%instance, "expert server drains");
            if let Some(holder) = table.holder(instance) {
                self.set_state(key, &holder.address, "draining", "", Some((holder, None)));
            }
            self.publish(&joined, table);
        }
    }

    fn leave(&self, instance: &InstanceId) {
        let mut joined = lock(&self.joined);
        joined.links.remove(instance);
        if let Some(table) = joined.members.leave(instance) {
            self.publish(&joined, table);
        }
    }

    fn publish(&self, joined: &Joined, table: cluster::RoutingTable) {
        self.view.store(Arc::new(View { table, links: joined.links.clone() }));
        self.tell(LinkEvent::Table);
        let _engine_gone = self.commands.send(Command::Wake);
    }

    fn set_state(
        &self,
        key: &str,
        address: &str,
        state: &'static str,
        detail: &str,
        holder: Option<(&Holder, Option<Transport>)>,
    ) {
        let mut states = lock(&self.states);
        let before = || states.get(key).map_or("", |state| state.transport);
        let link_state = LinkState {
            transport: holder.map_or("", |(_, new)| new.map_or_else(before, Transport::as_str)),
            address: address.to_owned(),
            instance: holder.map(|(holder, _)| holder.instance.to_string()).unwrap_or_default(),
            state,
            detail: detail.to_owned(),
            n_experts: holder.map_or(0, |(holder, _)| holder.n_experts()),
            epoch: holder.map_or(Epoch(0), |(holder, _)| holder.epoch),
        };
        states.insert(key.to_owned(), link_state);
    }

    /// The engine is gone only when the process is ending.
    fn tell(&self, event: LinkEvent) {
        let _engine_gone = self.events.send(event);
    }
}

struct Connection {
    client: ExpertClient<Channel>,
    transport: Transport,
    holder: Holder,
}

async fn ask(client: &mut ExpertClient<Channel>) -> Result<v1::ExpertStatus, Error> {
    let status = tokio::time::timeout(CONNECT_TIMEOUT, client.status(v1::ExpertStatusRequest {}))
        .await
        .map_err(|_| Error::new(Code::DeadlineExceeded, "status_timeout", "no answer to Status"))?
        .map_err(|status| Error::from_status(&status))?;
    Ok(status.into_inner())
}

/// A way to `instance` that costs less, where there is one: in another network namespace, nobody has that name.
async fn through_unix_socket(name: &str, address: &str, instance: &str) -> Option<ExpertClient<Channel>> {
    let refused = |error: &Error| tracing::debug!(name, %error, "not through its Unix socket");
    let mut client = dial::unix(name, address).await.inspect_err(refused).ok()?;
    let status = ask(&mut client).await.inspect_err(refused).ok()?;
    (status.instance == instance).then_some(client)
}

/// Between half of `pause` and all of it, so that routers do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    pause / 2 + pause.mul_f32(f32::from(random) / f32::from(u16::MAX) / 2.0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
