//! The routers: who is listed, what each last said of itself, and which one gets a sequence.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use cluster::{Member, Membership, State};
use proto::{
    Code, Error,
    v1::{self, router_client::RouterClient},
};
use telemetry::Tasks;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::choose::{Candidate, choose};

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
    /// It was listed a moment ago.
    NotAsked,
}

/// One router.
pub(crate) struct Route {
    /// The registry's: an instance, or an address of a static list.
    pub(crate) key: String,
    address: String,
    client: RouterClient<Channel>,
    heard: Mutex<Heard>,
    outstanding: AtomicUsize,
    listed: AtomicBool,
    /// As the registry says; the router's own word may come sooner or later.
    draining: AtomicBool,
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
    fn new(key: &str, member: &Member) -> Result<Self, Error> {
        let address = &member.address;
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
        Ok(Self {
            key: key.to_owned(),
            address: address.clone(),
            client,
            heard: Mutex::new(Heard::NotAsked),
            outstanding: AtomicUsize::new(0),
            listed: AtomicBool::new(true),
            draining: AtomicBool::new(false),
        })
    }

    pub(crate) fn client(&self) -> RouterClient<Channel> {
        self.client.clone()
    }

    fn heard(&self) -> Heard {
        lock(&self.heard).clone()
    }

    fn status(&self) -> Option<Box<v1::RouterStatus>> {
        match self.heard() {
            Heard::Status(status) => Some(status),
            Heard::Nothing(_) | Heard::NotAsked => None,
        }
    }

    /// It did not answer when it was last asked.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(*lock(&self.heard), Heard::Nothing(_) | Heard::NotAsked)
    }

    /// Asks, and remembers what was heard.
    async fn listen(&self) -> Heard {
        let heard = self.ask().await;
        *lock(&self.heard) = heard.clone();
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

    /// Until it is neither listed nor answers: a registry that has lost it does not end it.
    async fn keep_asking(&self) {
        let mut ready = false;
        loop {
            let heard = self.listen().await;
            let now_ready = matches!(&heard, Heard::Status(status) if status.ready);
            if now_ready != ready {
                tracing::info!(router = %self.address, ready = now_ready, "router changed");
                ready = now_ready;
            }
            if !self.listed.load(Relaxed) && matches!(heard, Heard::Nothing(_)) {
                return;
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

/// How busy the routers are, as they last said; and how many of them are in which state.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) ready: usize,
    pub(crate) unready: usize,
    pub(crate) draining: usize,
    pub(crate) silent: usize,
    pub(crate) running: u64,
    pub(crate) waiting: u64,
    pub(crate) pages: u64,
    pub(crate) pages_in_use: u64,
    pub(crate) page_positions: u32,
}

/// Every router known.
pub(crate) struct Routes {
    /// By key, in its order.
    routes: ArcSwap<Vec<Arc<Route>>>,
    /// Held by whoever changes the list.
    changing: Mutex<()>,
}

impl Routes {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { routes: ArcSwap::default(), changing: Mutex::default() })
    }

    /// Keeps the list as `membership` has it, until shutdown.
    pub(crate) fn follow(self: &Arc<Self>, mut membership: watch::Receiver<Arc<Membership>>, tasks: &Tasks) {
        self.list(&Arc::clone(&membership.borrow_and_update()), tasks);
        let (routes, tasks_of_routes) = (Arc::clone(self), tasks.clone());
        tasks.spawn("routers", async move {
            loop {
                tokio::select! {
                    () = tasks_of_routes.shutting_down() => return,
                    // A static list has no writer: it never changes.
                    changed = membership.changed() => if changed.is_err() { return },
                }
                let current = Arc::clone(&membership.borrow_and_update());
                routes.list(&current, &tasks_of_routes);
            }
        });
    }

    fn list(self: &Arc<Self>, membership: &Membership, tasks: &Tasks) {
        let _one = lock(&self.changing);
        let known: HashMap<String, Arc<Route>> =
            self.routes.load().iter().map(|route| (route.key.clone(), Arc::clone(route))).collect();
        let mut routes: BTreeMap<String, Arc<Route>> = BTreeMap::new();
        for (key, route) in &known {
            route.listed.store(membership.members.contains_key(key), Relaxed);
            routes.insert(key.clone(), Arc::clone(route));
        }
        for (key, member) in &membership.members {
            let route = match known.get(key) {
                Some(route) => Arc::clone(route),
                None => match Route::new(key, member) {
                    Ok(route) => self.keep(route, tasks),
                    Err(error) => {
                        tracing::warn!(router = %key, %error, "cannot use router");
                        continue;
                    }
                },
            };
            let draining = member.record.as_ref().is_some_and(|record| record.state == State::Draining);
            route.draining.store(draining, Relaxed);
            routes.insert(key.clone(), route);
        }
        self.routes.store(Arc::new(routes.into_values().collect()));
    }

    fn keep(self: &Arc<Self>, route: Route, tasks: &Tasks) -> Arc<Route> {
        let route = Arc::new(route);
        let (routes, asked, stop) = (Arc::clone(self), Arc::clone(&route), tasks.clone());
        tasks.spawn("router status", async move {
            tokio::select! {
                () = stop.shutting_down() => {}
                () = asked.keep_asking() => routes.forget(&asked),
            }
        });
        route
    }

    fn forget(&self, gone: &Arc<Route>) {
        let _one = lock(&self.changing);
        tracing::info!(router = %gone.address, "router forgotten");
        let left = self.routes.load().iter().filter(|route| !Arc::ptr_eq(route, gone)).cloned().collect();
        self.routes.store(Arc::new(left));
    }

    /// Asks every router once, so that the first request finds something known.
    pub(crate) async fn listen(&self) {
        let routes = self.routes.load_full();
        futures_util::future::join_all(routes.iter().map(|route| route.listen())).await;
    }

    /// Asks those that were listed a moment ago, if nobody else has answered: a gateway that has just started may hear of its
    /// routers after its first request.
    pub(crate) async fn listen_to_new(&self) {
        let routes = self.routes.load_full();
        if routes.iter().any(|route| !route.is_silent()) {
            return;
        }
        let new = routes.iter().filter(|route| matches!(route.heard(), Heard::NotAsked));
        futures_util::future::join_all(new.map(|route| route.listen())).await;
    }

    /// The router for a prompt, by prefix and load, among the best there are: ready ones, else ones that answer (they
    /// know how long to wait for what they miss); of them those not in `avoid`, if any.
    pub(crate) fn choose(&self, prompt: &[u32], avoid: &[String]) -> Result<Routed, Error> {
        let routes = self.routes.load_full();
        let answering: Vec<(&Arc<Route>, Box<v1::RouterStatus>)> =
            routes.iter().filter_map(|route| Some((route, route.status()?))).collect();
        let rank = |(route, status): &(&Arc<Route>, Box<v1::RouterStatus>)| {
            let draining = route.draining.load(Relaxed) || status.state == State::Draining.as_str();
            (avoid.contains(&route.key), draining, !status.ready)
        };
        let best = answering.iter().map(rank).min().ok_or_else(|| self.no_router())?;
        let best: Vec<_> = answering.iter().filter(|candidate| rank(candidate) == best).collect();
        let candidates: Vec<Candidate<'_>> = best
            .iter()
            .map(|(route, _)| Candidate { key: &route.key, outstanding: route.outstanding.load(Relaxed) })
            .collect();
        let (route, status) =
            choose(prompt, &candidates).and_then(|at| best.get(at)).ok_or_else(|| self.no_router())?;
        route.outstanding.fetch_add(1, Relaxed);
        Ok(Routed { route: Arc::clone(route), status: status.clone() })
    }

    fn no_router(&self) -> Error {
        Error::new(Code::Unavailable, "no_router", format!("no router answers: {}", self.describe()))
    }

    /// What all routers together say of themselves.
    pub(crate) fn load(&self) -> Load {
        let mut load = Load::default();
        for route in self.routes.load().iter() {
            let Some(status) = route.status() else {
                load.silent += 1;
                continue;
            };
            let draining = route.draining.load(Relaxed) || status.state == State::Draining.as_str();
            match (draining, status.ready) {
                (true, _) => load.draining += 1,
                (false, true) => load.ready += 1,
                (false, false) => load.unready += 1,
            }
            load.running += u64::from(status.running);
            load.waiting += u64::from(status.waiting);
            load.pages += u64::from(status.pages);
            load.pages_in_use += u64::from(status.pages_in_use);
            load.page_positions = status.page_positions;
        }
        load
    }

    /// Any router's last word, for the model's card.
    pub(crate) fn context_max(&self) -> Option<u32> {
        self.routes.load().iter().find_map(|route| route.status()).map(|status| status.context_max)
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.routes.load().iter().any(|route| route.status().is_some_and(|status| status.ready))
    }

    /// What each router lacks, for people.
    pub(crate) fn describe(&self) -> String {
        let routes = self.routes.load_full();
        let parts: Vec<String> = routes.iter().map(|route| describe(route)).collect();
        if parts.is_empty() { "none is registered".to_owned() } else { parts.join("; ") }
    }
}

fn describe(route: &Route) -> String {
    let address = &route.address;
    match route.heard() {
        Heard::Nothing(why) => format!("{address}: {why}"),
        Heard::NotAsked => format!("{address}: not asked yet"),
        Heard::Status(status) if status.ready => format!("{address}: ready"),
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
                true => format!("{address}: not ready"),
                false => format!("{address}: waits for {missing}"),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody listens there: it is asked, and says so.
    #[tokio::test]
    async fn a_router_that_was_just_listed_is_asked_for_the_first_request() {
        let member = Member { address: "127.0.0.1:1".to_owned(), record: None };
        let routes = Routes::new();
        routes.routes.store(Arc::new(vec![Arc::new(Route::new("a", &member).unwrap())]));
        assert_eq!(routes.describe(), "127.0.0.1:1: not asked yet");
        routes.listen_to_new().await;
        assert!(!routes.describe().contains("not asked yet"), "{}", routes.describe());
    }
}
