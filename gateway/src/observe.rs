//! What is told of each request: its span and the events on it, metrics, log lines with its ids. One [`Watch`] goes with
//! a request from its first byte to its last, through either door, and tells the rest when it is dropped.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::Instant,
};

use proto::{Code, Error};
use telemetry::{
    Metrics, Tracer,
    metrics::{Counter, Counters, Histogram, Histograms, labels, one},
    names,
    trace::{Context, Span, SpanKind},
};

use crate::{
    answer::{Delta, Finish, Usage},
    request::Ask,
    service::Gateway,
};

/// What a request asks for: the closed set that labels take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    /// Anything else under the doors: paths of no meaning, models, health.
    Other,
}

impl Endpoint {
    /// The last part of an HTTP route.
    pub(crate) fn of_route(route: &str) -> Self {
        match route {
            "/v1/chat/completions" | "/chat/completions" => Self::Chat,
            "/v1/completions" | "/completions" => Self::Completions,
            _ => Self::Other,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Other => "other",
        }
    }

    /// As GenAI conventions name it.
    const fn operation(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions | Self::Other => "text_completion",
        }
    }
}

/// What the whole gateway observes with.
pub(crate) struct Observers {
    pub(crate) tracer: Tracer,
    model: String,
    requests: Counters,
    admit: Histogram,
    first_token: [Histogram; 2],
    inter_token: [Histogram; 2],
    request: [Histogram; 2],
    prompt_tokens: [Counter; 2],
    generation_tokens: [Counter; 2],
    success: [Counter; 2],
    degraded: Counter,
}

/// The one engine that vLLM's names are labelled with.
const ENGINE: &str = "0";

impl Observers {
    pub(crate) fn new(metrics: &Metrics, tracer: Tracer, model: &str) -> Self {
        let of_model = |histograms: Histograms, metric: &names::Metric| {
            histograms.get_or_create_owned(&labels(metric, [model]))
        };
        let histograms = |ours: &names::Metric, vllm: &names::Metric| {
            let compatible = metrics.histograms(vllm).get_or_create_owned(&labels(vllm, [model, ENGINE]));
            [of_model(metrics.histograms(ours), ours), compatible]
        };
        let counters = |ours: &names::Metric, vllm: &names::Metric| {
            let compatible = metrics.counters(vllm).get_or_create_owned(&labels(vllm, [model, ENGINE]));
            [metrics.counters(ours).get_or_create_owned(&labels(ours, [model])), compatible]
        };
        let success = metrics.counters(&names::VLLM_SUCCESS);
        let success =
            |reason| success.get_or_create_owned(&labels(&names::VLLM_SUCCESS, [reason, model, ENGINE]));
        Self {
            tracer,
            model: model.to_owned(),
            requests: metrics.counters(&names::GATEWAY_REQUESTS),
            admit: metrics.histogram(&names::GATEWAY_ADMIT),
            first_token: histograms(&names::GATEWAY_FIRST_TOKEN, &names::VLLM_FIRST_TOKEN),
            inter_token: histograms(&names::GATEWAY_INTER_TOKEN, &names::VLLM_INTER_TOKEN),
            request: histograms(&names::GATEWAY_REQUEST, &names::VLLM_E2E),
            prompt_tokens: counters(&names::GATEWAY_PROMPT_TOKENS, &names::VLLM_PROMPT_TOKENS),
            generation_tokens: counters(&names::GATEWAY_GENERATION_TOKENS, &names::VLLM_GENERATION_TOKENS),
            success: [success(Finish::Stop.as_str()), success(Finish::Length.as_str())],
            degraded: metrics.counter(&names::GATEWAY_DEGRADED),
        }
    }

    /// Metrics that are read where they are kept.
    pub(crate) fn read(metrics: &Metrics, gateway: &Arc<Gateway>) {
        let of = Arc::clone(gateway);
        metrics.read(&names::GATEWAY_RUNNING, move || one(of.requests.load(Relaxed) as f64));
        let of = Arc::clone(gateway);
        metrics.read(&names::GATEWAY_REPAIRS, move || {
            [("done", &of.repairs.done), ("failed", &of.repairs.failed)]
                .map(|(outcome, count)| (labels(&names::GATEWAY_REPAIRS, [outcome]), count.get() as f64))
                .to_vec()
        });
        let of = Arc::clone(gateway);
        metrics.read(&names::GATEWAY_ROUTERS, move || {
            let load = of.routes.load();
            [
                ("ready", load.ready),
                ("unready", load.unready),
                ("draining", load.draining),
                ("silent", load.silent),
            ]
            .map(|(state, n)| (labels(&names::GATEWAY_ROUTERS, [state]), n as f64))
            .to_vec()
        });
        let gauge = |metric: &'static names::Metric, read: fn(&crate::route::Load) -> f64| {
            let of = Arc::clone(gateway);
            metrics.read(metric, move || vec![(labels(metric, [&of.name, ENGINE]), read(&of.routes.load()))]);
        };
        gauge(&names::VLLM_RUNNING, |load| load.running as f64);
        gauge(&names::VLLM_WAITING, |load| load.waiting as f64);
        gauge(&names::VLLM_CACHE_USAGE, |load| load.pages_in_use as f64 / load.pages.max(1) as f64);
        let of = Arc::clone(gateway);
        metrics.read(&names::VLLM_CACHE_CONFIG, move || {
            let load = of.routes.load();
            let (size, pages) = (load.page_positions.to_string(), load.pages.to_string());
            vec![(labels(&names::VLLM_CACHE_CONFIG, [&size, &pages, ENGINE]), 1.0)]
        });
    }
}

/// The headers of a request that say which trace it belongs to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Caller<'a> {
    pub(crate) traceparent: &'a str,
    pub(crate) tracestate: &'a str,
    /// `x-shoal-trace`
    pub(crate) shoal_trace: &'a str,
}

impl<'a> Caller<'a> {
    /// From headers or metadata. What is absent, or no text, says nothing.
    pub(crate) fn read(header: impl Fn(&'static str) -> Option<&'a str>) -> Self {
        let text = |name| header(name).unwrap_or("");
        Self {
            traceparent: text("traceparent"),
            tracestate: text("tracestate"),
            shoal_trace: text("x-shoal-trace"),
        }
    }
}

/// One request, from its first byte to its last.
pub(crate) struct Watch {
    gateway: Arc<Gateway>,
    endpoint: Endpoint,
    context: Context,
    started: Instant,
    /// Log lines of this request are inside it.
    pub(crate) log: tracing::Span,
    state: Mutex<State>,
}

struct State {
    span: Span,
    /// `admit`, until a router has taken the first sequence.
    admit: Option<Span>,
    first_token_at: Option<Instant>,
    /// By choice.
    last_token_at: Vec<Option<Instant>>,
    outcome: Option<&'static str>,
    usage: Usage,
    /// The last byte was handed over, or an error was.
    ended: bool,
}

impl Watch {
    pub(crate) fn begin(
        gateway: &Arc<Gateway>,
        endpoint: Endpoint,
        caller: Caller<'_>,
        request_id: &str,
    ) -> Arc<Self> {
        let observers = &gateway.observers;
        let parent = Context::parse(caller.traceparent, caller.tracestate);
        let context = observers.tracer.accept(parent, caller.shoal_trace.eq_ignore_ascii_case("full"));
        let name = format!("{} {}", endpoint.operation(), observers.model);
        let context =
            if endpoint == Endpoint::Other { Context { sampled: false, ..context } } else { context };
        let mut span = observers.tracer.span(&context, SpanKind::Server, name);
        span.set("gen_ai.operation.name", endpoint.operation());
        span.set("gen_ai.provider.name", "shoal");
        span.set("gen_ai.request.model", observers.model.clone());
        span.set("shoal.request_id", request_id.to_owned());
        let context = span.context();
        let admit = observers.tracer.span(&context, SpanKind::Internal, "admit");
        let log = tracing::info_span!("request", trace_id = %context.trace_id, request_id);
        Arc::new(Self {
            gateway: Arc::clone(gateway),
            endpoint,
            context,
            started: now(),
            log,
            state: Mutex::new(State {
                span,
                admit: Some(admit),
                first_token_at: None,
                last_token_at: Vec::new(),
                outcome: None,
                usage: Usage::default(),
                ended: false,
            }),
        })
    }

    pub(crate) fn trace_id(&self) -> String {
        self.context.trace_id.to_string()
    }

    /// Where the trace can be looked at, if it is recorded and the flags say where.
    pub(crate) fn trace_url(&self) -> Option<String> {
        let base = self.gateway.trace_url.as_ref().filter(|_| self.context.sampled)?;
        Some(format!("{}/trace/{}", base.trim_end_matches('/'), self.context.trace_id))
    }

    pub(crate) fn set(&self, key: &'static str, value: impl Into<telemetry::trace::Value>) {
        self.state().span.set(key, value);
    }

    /// What was asked for.
    pub(crate) fn asked(&self, ask: &Ask, streaming: bool) {
        let mut state = self.state();
        let (span, options) = (&mut state.span, &ask.options);
        if !span.is_recording() {
            return;
        }
        span.set("gen_ai.request.stream", streaming);
        span.set("gen_ai.request.choice.count", ask.n as i64);
        let numbers = [
            ("gen_ai.request.temperature", options.temperature.map(f64::from)),
            ("gen_ai.request.top_p", options.top_p.map(f64::from)),
            ("gen_ai.request.top_k", options.top_k.map(f64::from)),
            ("gen_ai.request.max_tokens", options.tokens_max.map(f64::from)),
            ("gen_ai.request.seed", options.seed.map(|seed| seed as f64)),
        ];
        for (key, value) in numbers {
            match value {
                Some(value) if key.ends_with("max_tokens") || key.ends_with("seed") => {
                    span.set(key, value as i64)
                }
                Some(value) => span.set(key, value),
                None => {}
            }
        }
        span.set("gen_ai.response.id", ask.id.clone());
    }

    /// A router has taken every sequence.
    pub(crate) fn admitted(&self) {
        let mut state = self.state();
        if state.admit.take().is_some() {
            self.gateway.observers.admit.observe(self.started.elapsed().as_secs_f64());
        }
    }

    /// A span for one try at one router.
    pub(crate) fn call(&self, router: &str, choice: usize, n_repairs: u32, emitted: usize) -> Span {
        let mut span =
            self.gateway.observers.tracer.span(&self.context, SpanKind::Client, "shoal.v1.Router/Generate");
        span.set("rpc.system.name", "grpc");
        span.set("shoal.router", router.to_owned());
        span.set("shoal.choice", choice as i64);
        span.set("shoal.repairs", i64::from(n_repairs));
        span.set("shoal.emitted_tokens", emitted as i64);
        span
    }

    /// The answer went on at another router.
    pub(crate) fn repaired(&self, cause: &str, to: &str, emitted: usize) {
        let attributes = [
            ("shoal.cause", cause.to_owned()),
            ("shoal.router", to.to_owned()),
            ("shoal.emitted_tokens", emitted.to_string()),
        ];
        self.state().span.event("repair", attributes);
    }

    /// A piece of a choice is on its way to the client.
    pub(crate) fn piece(&self, delta: &Delta) {
        let observers = &self.gateway.observers;
        let mut state = self.state();
        if !delta.ids.is_empty() {
            let now = now();
            if state.first_token_at.is_none() {
                state.first_token_at = Some(now);
                observers
                    .first_token
                    .iter()
                    .for_each(|seen| seen.observe((now - self.started).as_secs_f64()));
                state.span.event("first_token", []);
            }
            if state.last_token_at.len() <= delta.choice {
                state.last_token_at.resize(delta.choice + 1, None);
            }
            if let Some(before) = state.last_token_at[delta.choice].replace(now) {
                // Pieces of several tokens come when text was held back: their time is shared.
                let each = (now - before).as_secs_f64() / delta.ids.len() as f64;
                for _ in &delta.ids {
                    observers.inter_token.iter().for_each(|seen| seen.observe(each));
                }
            }
            let n = delta.ids.len() as u64;
            observers.generation_tokens.iter().for_each(|count| {
                count.inc_by(n);
            });
        }
        if let Some((finish, usage)) = delta.end {
            let counted = state.usage.prompt_tokens > 0;
            state.usage.add(usage, counted);
            let finished = match finish {
                Finish::Stop => &observers.success[0],
                Finish::Length => &observers.success[1],
            };
            finished.inc();
            state.span.set("gen_ai.response.finish_reasons", finish.as_str());
        }
    }

    /// The request failed.
    pub(crate) fn fail(&self, error: &Error) {
        let mut state = self.state();
        state.ended = true;
        // The first failure is the cause.
        if state.outcome.is_none() {
            state.outcome = Some(error.code.as_str());
            state.span.fail(&error.reason, &error.message);
        }
    }

    /// Everything was handed over.
    pub(crate) fn end(&self) {
        self.state().ended = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let observers = &self.gateway.observers;
        let started = self.started;
        let endpoint = self.endpoint.as_str();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Of a request that no router took: it ends inside the request's span.
        drop(state.admit.take());
        let outcome = match (state.outcome, state.ended) {
            (Some(outcome), _) => outcome,
            (None, true) => "ok",
            (None, false) => {
                state.span.fail(Code::Cancelled.as_str(), "the client went away");
                Code::Cancelled.as_str()
            }
        };
        observers.requests.get_or_create(&labels(&names::GATEWAY_REQUESTS, [endpoint, outcome])).inc();
        if self.endpoint == Endpoint::Other {
            return;
        }
        observers.request.iter().for_each(|seen| seen.observe(started.elapsed().as_secs_f64()));
        let usage = state.usage;
        observers.prompt_tokens.iter().for_each(|count| {
            count.inc_by(u64::from(usage.prompt_tokens));
        });
        if usage.experts_masked > 0 {
            observers.degraded.inc();
        }
        state.span.set("gen_ai.response.model", observers.model.clone());
        state.span.set("gen_ai.usage.input_tokens", i64::from(usage.prompt_tokens));
        state.span.set("gen_ai.usage.output_tokens", i64::from(usage.completion_tokens));
        state.span.set("gen_ai.usage.reasoning.output_tokens", i64::from(usage.reasoning_tokens));
        state.span.set("shoal.experts", i64::from(usage.experts));
        state.span.set("shoal.servers", i64::from(usage.servers));
        state.span.set("shoal.degraded", usage.experts_masked > 0);
    }
}

#[expect(clippy::disallowed_methods, reason = "requests come in and pieces go out here: an edge")]
fn now() -> Instant {
    Instant::now()
}
