//! One long-lived dispatch stream to one expert server, made again whenever it breaks; and the one writer of the view
//! that the engine reads.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as std_mpsc},
    time::Duration,
};

use arc_swap::ArcSwap;
use cluster::{Holder, Members};
use ids::{ExpertId, InstanceId, LayerId};
use proto::{
    Code, Error, Reply,
    v1::{self, expert_client::ExpertClient},
};
use telemetry::Tasks;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::{
    engine::Command,
    remote::{LINK_FRAMES_MAX, LinkEvent, View},
};

/// What a server must agree with before it gets a frame.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) checkpoint: String,
    pub(crate) hidden_size: usize,
}

/// What is known of one address, for `Status`.
#[derive(Clone, Debug)]
pub(crate) struct LinkState {
    pub(crate) instance: String,
    pub(crate) state: &'static str,
    pub(crate) detail: String,
    pub(crate) n_experts: usize,
}

/// All links of a router.
pub(crate) struct Links {
    identity: Identity,
    view: Arc<ArcSwap<View>>,
    members: Mutex<Membership>,
    states: Mutex<BTreeMap<String, LinkState>>,
    events: std_mpsc::Sender<LinkEvent>,
    commands: std_mpsc::Sender<Command>,
}

#[derive(Default)]
struct Membership {
    members: Members,
    links: HashMap<InstanceId, mpsc::Sender<v1::Frame>>,
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A server that answers no ping for this long has no more frames on it: found within 3 s together with the interval.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(1);

impl Links {
    pub(crate) fn new(
        identity: Identity,
        view: Arc<ArcSwap<View>>,
        events: std_mpsc::Sender<LinkEvent>,
        commands: std_mpsc::Sender<Command>,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            view,
            members: Mutex::default(),
            states: Mutex::default(),
            events,
            commands,
        })
    }

    /// Keeps a link to `address` until shutdown.
    pub(crate) fn keep(self: &Arc<Self>, address: String, tasks: &Tasks) {
        self.set_state(&address, "connecting", "", None);
        let (links, stop) = (Arc::clone(self), tasks.clone());
        tasks.spawn("link", async move {
            tokio::select! {
                // Safe to cancel anywhere: the process is ending, and with it every flight.
                () = stop.shutting_down() => {}
                () = links.keep_connected(&address) => {}
            }
        });
    }

    pub(crate) fn states(&self) -> BTreeMap<String, LinkState> {
        lock(&self.states).clone()
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    async fn keep_connected(self: &Arc<Self>, address: &str) {
        let mut pause = RECONNECT_MIN;
        let mut last_warning = String::new();
        loop {
            let error = match self.connect(address).await {
                Ok(connection) => {
                    pause = RECONNECT_MIN;
                    last_warning.clear();
                    let holder = connection.holder.clone();
                    tracing::info!(%address, instance = %holder.instance, experts = holder.n_experts(), "expert server joined");
                    let error = self.serve(address, connection).await;
                    tracing::warn!(%address, instance = %holder.instance, %error, "expert server left");
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
            self.set_state(address, state, &error.message, None);
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(RECONNECT_MAX);
        }
    }

    async fn connect(&self, address: &str) -> Result<Connection, Error> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Error::invalid("registry", format!("{address} is not an address: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(proto::HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(proto::HTTP2_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|error| {
            Error::new(Code::Unavailable, "connect_failed", format!("cannot connect: {}", innermost(&error)))
        })?;
        let mut client = ExpertClient::new(channel)
            .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
        let status = tokio::time::timeout(CONNECT_TIMEOUT, client.status(v1::ExpertStatusRequest {}))
            .await
            .map_err(|_| Error::new(Code::DeadlineExceeded, "status_timeout", "no answer to Status"))?
            .map_err(|status| Error::from_status(&status))?
            .into_inner();
        let holder = self.identity.check(address, status)?;
        Ok(Connection { client, holder })
    }

    /// Carries frames and replies until the stream ends; says why it did.
    async fn serve(&self, address: &str, connection: Connection) -> Error {
        let Connection { mut client, holder } = connection;
        let (sender, receiver) = mpsc::channel(LINK_FRAMES_MAX);
        let opened =
            tokio::time::timeout(CONNECT_TIMEOUT, client.dispatch(ReceiverStream::new(receiver))).await;
        let mut replies = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Error::from_status(&status),
            Err(_) => return Error::new(Code::DeadlineExceeded, "dispatch_refused", "no answer to Dispatch"),
        };
        let instance = holder.instance.clone();
        self.set_state(address, "ready", "", Some(&holder));
        self.join(holder, sender);
        let error = loop {
            match replies.message().await {
                Ok(Some(reply)) => match Reply::from_wire(reply) {
                    Ok(reply) => self.tell(LinkEvent::Reply(reply)),
                    Err(error) => break error,
                },
                Ok(None) => {
                    break Error::new(
                        Code::Unavailable,
                        "stream_ended",
                        format!("{instance} ended its stream"),
                    );
                }
                Err(status) => break Error::from_status(&status),
            }
        };
        self.leave(&instance);
        self.tell(LinkEvent::Broken { instance, error: error.clone() });
        error
    }

    fn join(&self, holder: Holder, link: mpsc::Sender<v1::Frame>) {
        let mut membership = lock(&self.members);
        membership.links.insert(holder.instance.clone(), link);
        let table = membership.members.join(holder);
        self.view.store(Arc::new(View { table, links: membership.links.clone() }));
        drop(membership);
        self.wake();
    }

    fn leave(&self, instance: &InstanceId) {
        let mut membership = lock(&self.members);
        membership.links.remove(instance);
        if let Some(table) = membership.members.leave(instance) {
            self.view.store(Arc::new(View { table, links: membership.links.clone() }));
        }
        drop(membership);
        self.wake();
    }

    fn set_state(&self, address: &str, state: &'static str, detail: &str, holder: Option<&Holder>) {
        let link_state = LinkState {
            instance: holder.map(|holder| holder.instance.to_string()).unwrap_or_default(),
            state,
            detail: detail.to_owned(),
            n_experts: holder.map_or(0, Holder::n_experts),
        };
        lock(&self.states).insert(address.to_owned(), link_state);
    }

    /// The engine is gone only when the process is ending.
    fn tell(&self, event: LinkEvent) {
        let _engine_gone = self.events.send(event);
    }

    fn wake(&self) {
        let _engine_gone = self.commands.send(Command::Wake);
    }
}

struct Connection {
    client: ExpertClient<Channel>,
    holder: Holder,
}

impl Identity {
    /// A holder, or a refusal that says which side has what.
    fn check(&self, address: &str, status: v1::ExpertStatus) -> Result<Holder, Error> {
        let refuse = |message: String| Err(Error::new(Code::InvalidArgument, "refused", message));
        if status.wire_version != proto::WIRE_VERSION {
            return refuse(format!(
                "{address} speaks wire version {}, this router {}",
                status.wire_version,
                proto::WIRE_VERSION
            ));
        }
        if status.checkpoint != self.checkpoint {
            return refuse(format!(
                "{address} serves checkpoint {}, this router {}",
                status.checkpoint, self.checkpoint
            ));
        }
        if status.hidden_size as usize != self.hidden_size {
            return refuse(format!(
                "{address} has hidden_size {}, this router {}",
                status.hidden_size, self.hidden_size
            ));
        }
        if status.state != "ready" {
            return Err(Error::new(Code::Unavailable, "not_ready", format!("{address} is {}", status.state)));
        }
        let holds = status
            .holds
            .into_iter()
            .map(|layer| (LayerId(layer.layer), layer.experts.into_iter().map(ExpertId).collect()))
            .collect();
        Ok(Holder { instance: status.instance.as_str().into(), address: address.to_owned(), holds })
    }
}

/// The last error of a chain: what the system said.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Between half of `pause` and all of it, so that routers do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    pause / 2 + pause.mul_f32(f32::from(random) / f32::from(u16::MAX) / 2.0)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut v1::ExpertStatus), expected: Result<usize, &str>) {
        let identity = Identity { checkpoint: "abc".into(), hidden_size: 64 };
        let mut status = v1::ExpertStatus {
            instance: "expert-1".into(),
            wire_version: proto::WIRE_VERSION,
            checkpoint: "abc".into(),
            hidden_size: 64,
            holds: vec![v1::LayerExperts { layer: 1, experts: vec![0, 1] }],
            state: "ready".into(),
            ..v1::ExpertStatus::default()
        };
        change(&mut status);
        let result = identity.check("host:1", status);
        assert_eq!(
            result.map(|holder| holder.n_experts()).map_err(|error| error.message),
            expected.map_err(str::to_owned)
        );
    }

    #[test]
    fn a_server_of_another_kind_is_refused_with_both_sides_named() {
        check(|_| {}, Ok(2));
        check(|status| status.wire_version = 9, Err("host:1 speaks wire version 9, this router 1"));
        check(|status| status.checkpoint = "x".into(), Err("host:1 serves checkpoint x, this router abc"));
        check(|status| status.hidden_size = 32, Err("host:1 has hidden_size 32, this router 64"));
        check(|status| status.state = "draining".into(), Err("host:1 is draining"));
    }
}
