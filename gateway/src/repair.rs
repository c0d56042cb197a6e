//! One sequence's replies, whatever becomes of its router: when it dies, prompt and emitted tokens are replayed to
//! another one and the stream goes on. Draws are numbered by position, and a router computes the same bits from a prompt
//! as token by token, so that nobody can tell.

use std::{sync::Arc, time::Duration};

use proto::{Code, Error, v1};
use telemetry::trace::Span;
use tokio::time::Instant;
use tonic::Streaming;

use crate::{
    observe::Watch,
    route::{Routed, failure},
    service::Gateway,
};

/// A router from which no token comes for this long, and which does not answer when it is asked, is given up.
const SILENT_MAX: Duration = Duration::from_secs(1);
/// How often a waiting stream looks at that, and a repair for a router.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// How much is done for one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) repairs_max: u32,
    /// How long a repair waits for a router.
    pub(crate) wait: Duration,
}

pub(crate) struct Replies {
    gateway: Arc<Gateway>,
    watch: Arc<Watch>,
    choice: usize,
    /// With the ids emitted so far.
    request: v1::GenerateRequest,
    current: Option<Call>,
    /// Routers that have failed this sequence.
    failed: Vec<String>,
    n_repairs: u32,
    ended: bool,
    /// Ids that end the sequence, beside the request's own.
    pub(crate) eos_ids: Vec<u32>,
    /// The router said beforehand that experts are missing and will be left out.
    pub(crate) degraded: bool,
}

/// A sequence at one router. The span ends with it.
struct Call {
    routed: Routed,
    stream: Streaming<v1::GenerateReply>,
    span: Span,
}

/// What a failure calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remedy {
    /// The same anywhere: the client is told.
    None,
    /// The router is gone or going.
    Repair,
    /// It is full; another may not be.
    Elsewhere,
}

fn remedy(error: &Error) -> Remedy {
    match &*error.reason {
        "router_gone" | "draining" | "engine_stopped" | "stream_cut" | "router_silent" => Remedy::Repair,
        "queue_full" => Remedy::Elsewhere,
        _ => Remedy::None,
    }
}

impl Replies {
    /// Finds a router that takes the sequence. `request` is made for the router chosen first; all are alike.
    pub(crate) async fn start(
        gateway: &Arc<Gateway>,
        watch: &Arc<Watch>,
        choice: usize,
        prompt: &[u32],
        request: impl FnOnce(&v1::RouterStatus) -> Result<v1::GenerateRequest, Error>,
    ) -> Result<Self, Error> {
        gateway.routes.listen_to_new().await;
        let routed = gateway.routes.choose(prompt, &[])?;
        let mut replies = Self {
            gateway: Arc::clone(gateway),
            watch: Arc::clone(watch),
            choice,
            request: request(&routed.status)?,
            current: None,
            failed: Vec::new(),
            n_repairs: 0,
            ended: false,
            eos_ids: routed.status.eos_ids.clone(),
            degraded: routed.status.ready && !routed.status.missing.is_empty(),
        };
        if let Err(error) = replies.open(routed).await {
            replies.recover(error).await?;
        }
        Ok(replies)
    }

    /// The next reply; None after the one that says how the sequence ended. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<v1::GenerateReply>, Error> {
        loop {
            if self.ended {
                return Ok(None);
            }
            match self.receive().await {
                Ok(reply) => {
                    self.request.emitted_ids.extend(reply.tokens.iter().map(|token| token.id));
                    self.ended = reply.finish() != v1::Finish::Unspecified;
                    return Ok(Some(reply));
                }
                Err(error) => {
                    self.fail_current(&error);
                    self.recover(error).await?;
                }
            }
        }
    }

    async fn receive(&mut self) -> Result<v1::GenerateReply, Error> {
        let Some(Call { routed, stream, .. }) = &mut self.current else {
            // A repair was under way when the one who waited for it gave up.
            return Err(Error::new(Code::Unavailable, "router_gone", "the router is gone"));
        };
        let mut silent_since = Instant::now();
        loop {
            tokio::select! {
                message = stream.message() => {
                    return message.map_err(|status| failure(&status))?.ok_or_else(|| {
                        let message = "the router ended the stream before the answer ended";
                        Error::new(Code::Unavailable, "stream_cut", message)
                    });
                }
                () = tokio::time::sleep(LOOK_INTERVAL) => {
                    if !routed.route.is_silent() {
                        silent_since = Instant::now();
                    } else if silent_since.elapsed() >= SILENT_MAX {
                        let message = format!("router {} has fallen silent", routed.route.key);
                        return Err(Error::new(Code::Unavailable, "router_silent", message));
                    }
                }
            }
        }
    }

    fn fail_current(&mut self, error: &Error) {
        if let Some(Call { routed, mut span, .. }) = self.current.take() {
            span.fail(&error.reason, &error.message);
            if !self.failed.contains(&routed.route.key) {
                self.failed.push(routed.route.key.clone());
            }
        }
    }

    async fn open(&mut self, routed: Routed) -> Result<(), Error> {
        let emitted = self.request.emitted_ids.len();
        let mut span = self.watch.call(&routed.route.key, self.choice, self.n_repairs, emitted);
        let mut request = tonic::Request::new(self.request.clone());
        let context = span.context();
        let headers =
            [("traceparent", context.traceparent()), ("tracestate", context.tracestate().to_owned())];
        for (name, value) in headers.into_iter().filter(|(_, value)| !value.is_empty()) {
            // Hexadecimal digits and such: always a value.
            if let Ok(value) = value.parse() {
                request.metadata_mut().insert(name, value);
            }
        }
        match routed.route.client().generate(request).await {
            Ok(response) => {
                self.current = Some(Call { routed, stream: response.into_inner(), span });
                Ok(())
            }
            Err(status) => {
                let error = failure(&status);
                span.fail(&error.reason, &error.message);
                if !self.failed.contains(&routed.route.key) {
                    self.failed.push(routed.route.key.clone());
                }
                Err(error)
            }
        }
    }

    /// Gets the sequence going again after `error`, or says why it cannot.
    async fn recover(&mut self, mut error: Error) -> Result<(), Error> {
        let gateway = Arc::clone(&self.gateway);
        let repairs = &gateway.repairs;
        let Limits { repairs_max, wait } = repairs.limits;
        let deadline = Instant::now() + wait;
        loop {
            match remedy(&error) {
                Remedy::None => return Err(error),
                Remedy::Repair => {}
                // Every other router once, and no waiting: a client that is told can come back.
                Remedy::Elsewhere => {
                    let routed = gateway.routes.choose(&self.request.prompt_ids, &self.failed)?;
                    if self.failed.contains(&routed.route.key) {
                        return Err(error);
                    }
                    match self.open(routed).await {
                        Ok(()) => return Ok(()),
                        Err(next) => error = next,
                    }
                    continue;
                }
            }
            if self.n_repairs >= repairs_max {
                repairs.failed.count();
                let message = format!(
                    "the answer lost its router {repairs_max} times; the last time: {}",
                    error.message
                );
                return Err(Error::new(Code::Unavailable, "repairs_max", message));
            }
            let routed = match gateway.routes.choose(&self.request.prompt_ids, &self.failed) {
                // One that has failed is asked again when nobody else is there, once it says that it is ready.
                Ok(routed) if routed.status.ready && routed.status.state != "draining" => routed,
                Ok(_) | Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_INTERVAL).await;
                    continue;
                }
                Ok(_) | Err(_) => {
                    repairs.failed.count();
                    return Err(error);
                }
            };
            let (to, known_to_fail) = (routed.route.key.clone(), self.failed.contains(&routed.route.key));
            let reason = error.reason.clone();
            match self.open(routed).await {
                Ok(()) => {
                    self.n_repairs += 1;
                    repairs.done.count();
                    self.watch.repaired(&reason, &to, self.request.emitted_ids.len());
                    tracing::info!(
                        request = %self.request.request_id,
                        %to,
                        after = %reason,
                        emitted = self.request.emitted_ids.len(),
                        "answer goes on at another router"
                    );
                    return Ok(());
                }
                Err(next) => error = next,
            }
            if known_to_fail {
                // What it last said of itself is older than its end.
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            if Instant::now() >= deadline && remedy(&error) == Remedy::Repair {
                repairs.failed.count();
                return Err(error);
            }
        }
    }
}
