//! The gRPC Router service ↔ the engine's inbox. Every value of a request is checked here; the engine trusts it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Instant,
};

use cluster::{RoutingTable, State};
use futures_util::{Stream, StreamExt as _, stream};
use ids::{ExpertId, InstanceId};
use model::{Checkpoint, ModelConfig};
use proto::{
    Code, Error,
    frame::FRAME_BYTES_MAX,
    rows::{Dtype, Rows},
    v1::{self, router_server::Router},
};
use telemetry::{
    Tasks, Tracer,
    trace::{self, Span, SpanKind},
};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tonic::{Request, Response, Status};

use crate::{
    args::{Combine, Limits, OnMissingExpert, Wire},
    engine::Command,
    link::Links,
    placer::PlacerState,
    sampling::{Drawn, Sampling, TOP_LOGPROBS_MAX},
    sequence::{self, Event, Finish, Sequence},
    stats::Stats,
};

/// Ids that may end one request, beyond the checkpoint's own.
const STOP_IDS_MAX: usize = 256;

pub(crate) struct Api {
    pub(crate) instance: String,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) config: ModelConfig,
    pub(crate) limits: Limits,
    pub(crate) stats: Arc<Stats>,
    pub(crate) placer: Arc<PlacerState>,
    pub(crate) replicas: usize,
    /// A leader places experts on servers.
    pub(crate) is_placed: bool,
    pub(crate) links: Arc<Links>,
    pub(crate) commands: UnboundedSender<Command>,
    pub(crate) open_streams: Arc<AtomicUsize>,
    pub(crate) tasks: Tasks,
    pub(crate) tracer: Tracer,
}

#[tonic::async_trait]
impl Router for Api {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateReply, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let mut span = self.span(&request);
        let (request, open) = self.admit(request.into_inner()).inspect_err(|error| {
            span.fail(&error.reason, &error.message);
        })?;
        span.set("shoal.request_id", request.id.clone());
        span.set("gen_ai.usage.input_tokens", request.prompt.len() as i64);
        span.set("shoal.emitted_tokens", request.emitted.len() as i64);
        let vocab_size = self.config.vocab_size;
        let (out, events) = mpsc::unbounded_channel();
        let sequence = Sequence::new(request, span.context(), out, now());
        match sequence.end() {
            // The router that died had emitted the last token, and could not say so any more.
            Some(finish) => sequence.finish(finish),
            None => self
                .commands
                .send(Command::Submit(Box::new(sequence)))
                .map_err(|_| Status::from(Error::internal("the engine has stopped")))?,
        }
        let replies = Events { events, n_tokens: 0, span: Some(span), _open: open }
            .flat_map(move |event| stream::iter(replies(event, vocab_size)));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn status(
        &self,
        _: Request<v1::RouterStatusRequest>,
    ) -> Result<Response<v1::RouterStatus>, Status> {
        Ok(Response::new(self.report(now())))
    }
}

impl Api {
    /// The router's span for a call, under the caller's.
    fn span(&self, request: &Request<v1::GenerateRequest>) -> Span {
        // What is absent, or no text, is as if it were malformed: it counts for nothing.
        let header = |name| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let caller = trace::Context::parse(header("traceparent"), header("tracestate"));
        let context = self.tracer.accept(caller, false);
        let mut span = self.tracer.span(&context, SpanKind::Server, "shoal.v1.Router/Generate");
        span.set("rpc.system.name", "grpc");
        span.set("shoal.router", self.instance.clone());
        span
    }

    fn admit(&self, request: v1::GenerateRequest) -> Result<(sequence::Request, OpenStream), Error> {
        let request = self.check(request)?;
        if self.tasks.is_shutting_down() {
            return Err(Error::new(Code::Unavailable, "draining", "this router is draining"));
        }
        Ok((request, OpenStream::admit(self)?))
    }

    fn check(&self, request: v1::GenerateRequest) -> Result<sequence::Request, Error> {
        let n_prompt = request.prompt_ids.len();
        if n_prompt == 0 {
            return Err(Error::invalid("prompt_ids", "the prompt is empty"));
        }
        for (field, ids) in [("prompt_ids", &request.prompt_ids), ("emitted_ids", &request.emitted_ids)] {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
                let message =
                    format!("{field} has {id}, not below the vocabulary size {}", self.config.vocab_size);
                return Err(Error::invalid(field, message));
            }
        }
        if request.prompt_logits && !request.emitted_ids.is_empty() {
            return Err(Error::invalid("emitted_ids", "a request for prompt_logits cannot be repaired"));
        }
        let room = self.limits.tokens_max(n_prompt);
        if room == 0 {
            let (what, limit) = if n_prompt >= self.limits.context_max {
                ("maximum context length", self.limits.context_max)
            } else {
                ("KV cache", self.limits.capacity())
            };
            let message = format!(
                "the prompt has {n_prompt} tokens, the {what} is {limit} tokens, the answer included"
            );
            return Err(Error::new(Code::InvalidArgument, "context_length_exceeded", message)
                .with_param("prompt_ids"));
        }
        if request.stop_ids.len() > STOP_IDS_MAX {
            let message = format!("{} stop ids, {STOP_IDS_MAX} are allowed", request.stop_ids.len());
            return Err(Error::invalid("stop_ids", message));
        }
        let top_logprobs = request.top_logprobs.unwrap_or(0);
        if top_logprobs > TOP_LOGPROBS_MAX {
            let message = format!("top_logprobs is {top_logprobs}, {TOP_LOGPROBS_MAX} are allowed");
            return Err(Error::invalid("top_logprobs", message));
        }
        let mut stop_ids = request.stop_ids;
        if !request.ignore_eos {
            stop_ids.extend(&self.config.eos_token_ids);
        }
        let tokens_max = match request.tokens_max as usize {
            0 => room,
            wanted => wanted.min(room),
        };
        Ok(sequence::Request {
            id: request.request_id,
            prompt: request.prompt_ids,
            emitted: request.emitted_ids,
            tokens_max,
            tokens_min: request.tokens_min as usize,
            sampling: checked_sampling(request.sampling.unwrap_or_default())?,
            stop_ids,
            top_logprobs: top_logprobs as usize,
            prompt_logits: request.prompt_logits,
        })
    }

    /// (layer, expert) pairs with fewer holders than wanted. Where a leader places experts, those are servers: it knows of
    /// nobody else.
    fn under_replicated(&self, table: &RoutingTable) -> u32 {
        let inside = table.holders().find(|holder| holder.inside && self.is_placed);
        let experts = || (0..self.config.n_routed_experts as u32).map(ExpertId);
        let pairs = self.config.moe_layers().flat_map(|layer| experts().map(move |expert| (layer, expert)));
        let counted = |(layer, expert)| {
            let holders = table.holders_of(layer, expert).iter();
            holders.filter(|holder| inside.is_none_or(|inside| inside.instance != **holder)).count()
        };
        pairs.filter(|&pair| counted(pair) < self.replicas).count() as u32
    }

    pub(crate) fn report(&self, now: Instant) -> v1::RouterStatus {
        let view = self.links.view();
        let missing = view.table.missing(self.config.moe_layers(), self.config.n_routed_experts);
        let calibrated = self.limits.combine != Combine::Exact || self.stats.is_calibrated();
        let complete = missing.is_empty() || self.limits.on_missing_expert == OnMissingExpert::Skip;
        let ready = complete && calibrated && !self.stats.hangs(now) && !self.tasks.is_shutting_down();
        let dispatch = self.stats.dispatch();
        let servers = self.links.states().into_values().map(|link| {
            let instance = InstanceId::from(link.instance.as_str());
            let summary = dispatch.servers.get(&instance).copied().unwrap_or_default();
            let queued =
                view.links.get(&instance).map_or(0, |way| way.frames.max_capacity() - way.frames.capacity());
            v1::ExpertServer {
                frames_in_flight: (queued + summary.n_owed) as u64,
                state: if link.state == "ready" && summary.ejected { "ejected" } else { link.state }
                    .to_owned(),
                instance: link.instance,
                address: link.address,
                detail: link.detail,
                n_experts: link.n_experts as u32,
                latency_us: summary.latency.as_micros() as u64,
                ejections: summary.n_ejections,
                epoch: link.epoch.0,
                transport: link.transport.to_owned(),
            }
        });
        v1::RouterStatus {
            instance: self.instance.clone(),
            wire_version: proto::WIRE_VERSION,
            checkpoint: self.checkpoint.fingerprint().to_owned(),
            architecture: self.config.architecture.clone(),
            vocab_size: self.config.vocab_size as u32,
            context_max: self.limits.context_max as u32,
            page_positions: self.limits.page_positions as u32,
            pages: self.limits.n_pages as u32,
            pages_in_use: self.stats.pages_in_use.load(Relaxed) as u32,
            running: self.stats.running.load(Relaxed) as u32,
            waiting: self.stats.waiting.load(Relaxed) as u32,
            open_streams: self.open_streams.load(Relaxed) as u32,
            ready,
            missing: missing
                .into_iter()
                .map(|(layer, experts)| v1::MissingExperts {
                    layer: layer.0,
                    experts: experts.into_iter().map(|expert| expert.0).collect(),
                })
                .collect(),
            servers: servers.collect(),
            eos_ids: self.config.eos_token_ids.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            steps: self.stats.steps.load(Relaxed),
            tokens_out: self.stats.tokens_out.load(Relaxed),
            preemptions: self.stats.preemptions.load(Relaxed),
            stale_replies: dispatch.counts.stale_replies,
            frames: dispatch.counts.frames,
            hedges: dispatch.hedges,
            failovers: dispatch.failovers,
            ejections: dispatch.ejections,
            failures: dispatch.counts.failures.into_iter().collect(),
            state: match (self.tasks.is_shutting_down(), ready) {
                (true, _) => State::Draining,
                (false, true) => State::Ready,
                (false, false) => State::Loading,
            }
            .as_str()
            .to_owned(),
            leader: self.placer.leads(),
            placement: self.placer.version(),
            under_replicated: self.under_replicated(&view.table),
            sequences_degraded: self.stats.sequences_degraded.load(Relaxed),
            unsettled_bytes: self.checkpoint.unsettled_bytes(),
            combine: match self.limits.combine {
                Combine::Exact => "exact",
                Combine::Pairs => "pairs",
                Combine::Fast => "fast",
            }
            .to_owned(),
            wire: match self.limits.wire {
                Wire::F32 => "f32",
                Wire::Bf16 => "bf16",
                Wire::Int8 => "int8",
            }
            .to_owned(),
        }
    }
}

fn checked_sampling(wire: v1::Sampling) -> Result<Sampling, Error> {
    for (name, value, max) in
        [("temperature", wire.temperature, f32::MAX), ("top_p", wire.top_p, 1.0), ("min_p", wire.min_p, 1.0)]
    {
        if !(0.0..=max).contains(&value) {
            return Err(Error::invalid(name, format!("{name} is {value}, not in 0..={max}")));
        }
    }
    Ok(Sampling {
        temperature: wire.temperature,
        top_k: wire.top_k as usize,
        top_p: if wire.top_p == 0.0 { 1.0 } else { wire.top_p },
        min_p: wire.min_p,
        seed: wire.seed,
    })
}

/// Counts one open call. When it is dropped, whether the answer ended or the caller went away, the engine is woken so
/// that the sequence's pages are free within one step.
struct OpenStream {
    open_streams: Arc<AtomicUsize>,
    commands: UnboundedSender<Command>,
}

impl OpenStream {
    fn admit(api: &Api) -> Result<Self, Error> {
        let most = api.limits.running_max + api.limits.queue_max;
        api.open_streams.fetch_update(Relaxed, Relaxed, |open| (open < most).then_some(open + 1)).map_err(
            |open| {
                let message = format!("{open} requests are running or waiting, {most} are the limit");
                Error::new(Code::Overloaded, "queue_full", message)
            },
        )?;
        Ok(Self { open_streams: Arc::clone(&api.open_streams), commands: api.commands.clone() })
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.open_streams.fetch_sub(1, Relaxed);
        let _engine_gone = self.commands.send(Command::Wake);
    }
}

/// A sequence's events; one that ends without its last event had its engine die.
struct Events {
    // Dropped before `_open`: the engine woken by it must see the channel closed.
    events: UnboundedReceiver<Event>,
    n_tokens: i64,
    /// Until the last event is taken: the caller's span, which ends when it has that, is longer.
    span: Option<Span>,
    _open: OpenStream,
}

impl Events {
    fn end(&mut self, say: impl FnOnce(&mut Span)) {
        if let Some(mut span) = self.span.take() {
            span.set("gen_ai.usage.output_tokens", self.n_tokens);
            say(&mut span);
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.end(|span| span.fail("cancelled", "the caller went away"));
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.span.is_none() {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.events.poll_recv(context));
        let event = event.unwrap_or_else(|| {
            Event::Failed(Error::new(
                Code::Unavailable,
                "engine_stopped",
                "the router stopped before the answer ended",
            ))
        });
        match &event {
            Event::Token { .. } => self.n_tokens += 1,
            Event::PromptLogits { .. } => {}
            Event::Finished { finish, .. } => {
                let reason = match finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                };
                self.end(|span| span.set("gen_ai.response.finish_reasons", reason));
            }
            Event::Failed(error) => self.end(|span| span.fail(&error.reason, &error.message)),
        }
        Poll::Ready(Some(event))
    }
}

/// The replies that tell of `event`. Logits of many positions are cut into messages of a moderate size.
fn replies(event: Event, vocab_size: usize) -> Vec<Result<v1::GenerateReply, Status>> {
    let reply = v1::GenerateReply::default();
    match event {
        Event::Token { drawn, degraded } => {
            vec![Ok(v1::GenerateReply { tokens: vec![token(drawn)], degraded, ..reply })]
        }
        Event::PromptLogits { first_position, values } => {
            let positions = (FRAME_BYTES_MAX / (vocab_size * 4)).max(1);
            let parts = values.chunks(positions * vocab_size).enumerate().map(|(part, values)| {
                let logits = v1::LogitRows {
                    first_position: (first_position + part * positions) as u32,
                    rows: Some(Rows::encode(Dtype::F32, vocab_size, values).into_wire()),
                };
                Ok(v1::GenerateReply { prompt_logits: Some(logits), ..v1::GenerateReply::default() })
            });
            parts.collect()
        }
        Event::Finished { finish, usage } => {
            let finish = match finish {
                Finish::Stop => v1::Finish::Stop,
                Finish::Length => v1::Finish::Length,
            };
            let usage = v1::Usage {
                prompt_tokens: usage.prompt_tokens as u32,
                completion_tokens: usage.completion_tokens as u32,
                experts: usage.experts as u32,
                servers: usage.servers as u32,
                experts_masked: usage.experts_masked as u32,
            };
            let degraded = usage.experts_masked > 0;
            vec![Ok(v1::GenerateReply { finish: finish.into(), usage: Some(usage), degraded, ..reply })]
        }
        Event::Failed(error) => vec![Err(error.into())],
    }
}

fn token(drawn: Drawn) -> v1::Token {
    v1::Token {
        id: drawn.id,
        logprob: drawn.logprob,
        top: drawn.top.into_iter().map(|(id, logprob)| v1::Candidate { id, logprob }).collect(),
    }
}

#[expect(clippy::disallowed_methods, reason = "requests arrive here: an edge")]
fn now() -> Instant {
    Instant::now()
}
