//! Which router gets a request. One task a router asks for its status; requests read what was last heard.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use proto::{
    Code, Error,
    v1::{self, router_client::RouterClient},
};
use telemetry::Tasks;
use tonic::transport::{Channel, Endpoint};

/// How often a router is asked. A dead one is noticed within this and the timeout.
const STATUS_INTERVAL: Duration = Duration::from_millis(250);
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Tokens are small: what one sequence may have under way before its client reads.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// The most that HTTP/2 allows, over 30,000 streams' windows: clients that read nothing fill their own streams, and
/// never the connection that all share.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// What was last heard of one router.
#[derive(Clone, Debug)]
enum Heard {
    Status(Box<v1::RouterStatus>),
    Nothing(String),
}

pub(crate) struct Route {
    address: String,
    client: RouterClient<Channel>,
    heard: Mutex<Heard>,
    outstanding: AtomicUsize,
}

/// A router chosen for one sequence; counts as work there until it is dropped.
pub(crate) struct Routed {
    pub(crate) route: Arc<Route>,
    pub(crate) status: Box<v1::RouterStatus>,
}

impl Drop for Routed {
    fn drop(&mut self) {
        self.route.outstanding.fetch_sub(1, Relaxed);
    }
}

impl Route {
    pub(crate) fn client(&self) -> RouterClient<Channel> {
        self.client.clone()
    }

    fn heard(&self) -> Heard {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn status(&self) -> Option<Box<v1::RouterStatus>> {
        match self.heard() {
            Heard::Status(status) => Some(status),
            Heard::Nothing(_) => None,
        }
    }

    /// Asks, and remembers what was heard.
    async fn listen(&self) -> Heard {
        let heard = self.ask().await;
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = heard.clone();
        heard
    }

    async fn ask(&self) -> Heard {
        let mut client = self.client();
        match tokio::time::timeout(STATUS_TIMEOUT, client.status(v1::RouterStatusRequest {})).await {
            Ok(Ok(response)) => Heard::Status(Box::new(response.into_inner())),
            Ok(Err(status)) => Heard::Nothing(status.message().to_owned()),
            Err(_) => Heard::Nothing(format!("no answer within {STATUS_TIMEOUT:?}")),
        }
    }

    async fn keep_asking(&self) {
        let mut ready = false;
        loop {
            let now_ready = matches!(self.listen().await, Heard::Status(status) if status.ready);
            if now_ready != ready {
                tracing::info!(router = %self.address, ready = now_ready, "router changed");
                ready = now_ready;
            }
            tokio::time::sleep(STATUS_INTERVAL).await;
        }
    }
}

/// What a failed call to a router means for our client. A status that the router did not write is a connection that
/// broke, whatever HTTP/2 calls it: the client is still there, so it is no cancel.
pub(crate) fn failure(status: &tonic::Status) -> Error {
    let error = Error::from_status(status);
    if error.reason != "transport" {
        return error;
    }
    let message = format!("the connection to the router broke: {}", error.message);
    Error::new(Code::Unavailable, "router_gone", message)
}

pub(crate) struct Routes(Vec<Arc<Route>>);

impl Routes {
    pub(crate) fn new(addresses: &[String], tasks: &Tasks) -> Result<Self, Error> {
        let mut routes = Vec::with_capacity(addresses.len());
        for address in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| Error::invalid("registry", format!("{address} is not an address: {error}")))?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT);
            let client = RouterClient::new(endpoint.connect_lazy())
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX);
            let route = Arc::new(Route {
                address: address.clone(),
                client,
                heard: Mutex::new(Heard::Nothing("not asked yet".to_owned())),
                outstanding: AtomicUsize::new(0),
            });
            let (asked, stop) = (Arc::clone(&route), tasks.clone());
            tasks.spawn("router status", async move {
                tokio::select! {
                    () = stop.shutting_down() => {}
                    () = asked.keep_asking() => {}
                }
            });
            routes.push(route);
        }
        Ok(Self(routes))
    }

    /// Asks every router once, so that the first request finds something known.
    pub(crate) async fn listen(&self) {
        futures_util::future::join_all(self.0.iter().map(|route| route.listen())).await;
    }

    /// The router with the least of our work: among the ready ones, else among those that answer (they know how long to
    /// wait for what they miss).
    pub(crate) fn choose(&self) -> Result<Routed, Error> {
        let answering = || self.0.iter().filter_map(|route| Some((route, route.status()?)));
        let least = |route: &&Arc<Route>| route.outstanding.load(Relaxed);
        let ready = answering().filter(|(_, status)| status.ready).min_by_key(|(route, _)| least(route));
        let (route, status) =
            ready.or_else(|| answering().min_by_key(|(route, _)| least(route))).ok_or_else(|| {
                Error::new(Code::Unavailable, "no_router", format!("no router answers: {}", self.describe()))
            })?;
        route.outstanding.fetch_add(1, Relaxed);
        Ok(Routed { route: Arc::clone(route), status })
    }

    /// Any router's last word, for the model's card.
    pub(crate) fn context_max(&self) -> Option<u32> {
        self.0.iter().find_map(|route| route.status()).map(|status| status.context_max)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.0.iter().any(|route| route.status().is_some_and(|status| status.ready))
    }

    /// What each router lacks, for people.
    pub(crate) fn describe(&self) -> String {
        let parts = self.0.iter().map(|route| match route.heard() {
            Heard::Nothing(why) => format!("{}: {why}", route.address),
            Heard::Status(status) if status.ready => format!("{}: ready", route.address),
            Heard::Status(status) => {
                let missing = status
                    .missing
                    .iter()
                    .map(|layer| {
                        let experts = layer.experts.iter().copied().map(ids::ExpertId).collect();
                        (ids::LayerId(layer.layer), experts)
                    })
                    .collect();
                let missing = cluster::table::describe(&missing);
                match missing.is_empty() {
                    true => format!("{}: not ready", route.address),
                    false => format!("{}: waits for {missing}", route.address),
                }
            }
        });
        parts.collect::<Vec<_>>().join("; ")
    }
}
