//! The HTTP door: paths, bodies, headers. What requests mean is in `openai`, what happens with them in `request`.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Path, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body::{Frame, SizeHint};
use proto::{Code, Error};
use serde_json::{Value, json};
use text::Prompt;
use tracing::Instrument as _;

use crate::{
    answer::{Delta, Usage},
    observe::{Caller, Endpoint, Watch},
    openai::{
        self, Head, chat,
        completions::{self, RawPrompt},
        fields::Fields,
    },
    request::{Ask, Deltas, Served, serve},
    service::Gateway,
    sse,
};

pub(crate) const REQUEST_ID: &str = "x-request-id";
const TRACE_ID: &str = "x-shoal-trace-id";
/// Where the trace can be looked at.
const TRACE_URL: &str = "x-shoal-trace-url";
/// On answers for which experts were left out.
const DEGRADED: &str = "x-shoal-degraded";
/// A client's own request id is taken up to this length.
pub(crate) const REQUEST_ID_BYTES_MAX: usize = 128;

/// An error as a response.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    /// Headers only: [`watched`] knows the request's ids and writes the body.
    fn into_response(self) -> Response {
        let Self(error) = self;
        let mut response = error.code.http().into_response();
        let headers = response.headers_mut();
        if matches!(error.code, Code::Overloaded | Code::Unavailable) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            headers.insert("retry-after-ms", HeaderValue::from_static("500"));
        }
        let again = matches!(error.code, Code::Overloaded | Code::Unavailable | Code::DeadlineExceeded);
        headers.insert("x-should-retry", HeaderValue::from_static(if again { "true" } else { "false" }));
        if error.code.http().is_server_error() {
            tracing::warn!(code = error.code.as_str(), reason = %error.reason, %error, "request failed");
        }
        response.extensions_mut().insert(error);
        response
    }
}

pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    let api = Router::new()
        .route("/chat/completions", post(chat_completions))
        .route("/completions", post(text_completions))
        .route("/models", get(models))
        .route("/models/{*id}", get(model));
    Router::new()
        .nest("/v1", api.clone())
        .merge(api)
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/version", get(version))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), watched))
        .with_state(gateway)
}

/// Takes the client's request id or makes one, watches the request to its last byte, and says which trace it is in.
async fn watched(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
    // One that is too long or no text is replaced: it goes into log lines.
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let given = given.filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX).map(str::to_owned);
    let id = given.unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let watch = watch(&gateway, &request, &id);
    let Ok(id) = HeaderValue::from_str(&id) else { return next.run(request).await };
    request.headers_mut().insert(REQUEST_ID, id.clone());
    request.extensions_mut().insert(Arc::clone(&watch));
    let mut response = next.run(request).instrument(watch.log.clone()).await;
    watch.set("http.response.status_code", i64::from(response.status().as_u16()));
    if let Some(error) = response.extensions_mut().remove::<Error>() {
        watch.fail(&error);
        let (parts, _) = response.into_parts();
        response = (parts.status, parts.headers, Json(openai::error::body(&error, &watch.trace_id())))
            .into_response();
    }
    if response.body().is_end_stream() {
        watch.end();
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    if let Ok(trace_id) = HeaderValue::from_str(&watch.trace_id()) {
        headers.insert(TRACE_ID, trace_id);
    }
    if let Some(Ok(url)) = watch.trace_url().map(|url| HeaderValue::from_str(&url)) {
        headers.insert(TRACE_URL, url);
    }
    response.map(|body| Body::new(Watched { body, watch }))
}

/// The watch on a request that has come in.
fn watch(gateway: &Arc<Gateway>, request: &Request, id: &str) -> Arc<Watch> {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let caller = Caller::read(|name| request.headers().get(name)?.to_str().ok());
    let watch = Watch::begin(gateway, Endpoint::of_route(route), caller, id);
    watch.set("http.request.method", request.method().to_string());
    watch.set("http.route", route.to_owned());
    watch
}

/// A body that keeps the watch on its request until its last byte.
struct Watched {
    body: Body,
    watch: Arc<Watch>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, watch } = &mut *self;
        let _in_request = watch.log.enter();
        let frame = std::task::ready!(Pin::new(&mut *body).poll_frame(context));
        if frame.is_none() || body.is_end_stream() {
            watch.end();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn chat_completions(
    State(gateway): State<Arc<Gateway>>,
    Extension(watch): Extension<Arc<Watch>>,
    request: Request,
) -> Result<Response, Refusal> {
    let (id, body) = read(&gateway, request).await?;
    let fields = Fields::new(&body)?;
    gateway.check_model(fields.text("model")?)?;
    let request = chat::Request::parse(&fields)?;
    let prompt = gateway.chat_prompt(request.input).await?;
    gateway.log_prompt(&prompt);
    let head = head(&gateway, "chatcmpl", &id);
    let wants_logprobs = request.options.top_logprobs.is_some();
    let ask = Ask {
        id,
        prompts: vec![prompt],
        n: request.n,
        options: request.options,
        chat: true,
        watch: Arc::clone(&watch),
    };
    watch.asked(&ask, request.streaming.stream);
    let Served { deltas, degraded } = serve(&gateway, ask).await?;
    if request.streaming.stream {
        let response = stream_chat(head, deltas, watch, request.n, request.streaming.include_usage);
        return Ok(mark_degraded(response, degraded));
    }
    let mut whole = chat::Whole::new(request.n, wants_logprobs);
    collect(deltas, |delta| whole.add(delta)).await?;
    let degraded = whole.usage().experts_masked > 0;
    Ok(mark_degraded(Json(whole.into_json(&head)).into_response(), degraded))
}

fn stream_chat(head: Head, deltas: Deltas, watch: Arc<Watch>, n: usize, include_usage: bool) -> Response {
    let roles: Vec<Value> = (0..n).map(|index| chat::role_chunk(&head, index)).collect();
    let mut total = Total::default();
    let events = events(deltas, watch, move |event| match event {
        Event::Delta(delta) => {
            total.add(&delta, |_| 0);
            Some(chat::delta_chunk(&head, &delta))
        }
        Event::End => include_usage.then(|| chat::usage_chunk(&head, &total.usage)),
    });
    sse::response(stream::iter(roles).chain(events))
}

async fn text_completions(
    State(gateway): State<Arc<Gateway>>,
    Extension(watch): Extension<Arc<Watch>>,
    request: Request,
) -> Result<Response, Refusal> {
    let (id, body) = read(&gateway, request).await?;
    let fields = Fields::new(&body)?;
    gateway.check_model(fields.text("model")?)?;
    let request = completions::Request::parse(&fields)?;
    let prompts = raw_prompts(&gateway, request.prompts)?;
    prompts.iter().for_each(|prompt| gateway.log_prompt(prompt));
    let (n_prompts, n) = (prompts.len(), request.n);
    let head = head(&gateway, "cmpl", &id);
    let wants_logprobs = request.options.top_logprobs.is_some();
    let ask = Ask { id, prompts, n, options: request.options, chat: false, watch: Arc::clone(&watch) };
    watch.asked(&ask, request.streaming.stream);
    let Served { deltas, degraded } = serve(&gateway, ask).await?;
    let mut whole = completions::Whole::new(n_prompts, n, wants_logprobs);
    if request.streaming.stream {
        let include_usage = request.streaming.include_usage;
        let response = sse::response(events(deltas, watch, move |event| match event {
            Event::Delta(delta) => {
                let chunk = completions::delta_chunk(&head, &delta);
                whole.add(delta);
                Some(chunk)
            }
            Event::End => include_usage.then(|| completions::usage_chunk(&head, whole.usage())),
        }));
        return Ok(mark_degraded(response, degraded));
    }
    collect(deltas, |delta| whole.add(delta)).await?;
    let degraded = whole.usage().experts_masked > 0;
    Ok(mark_degraded(Json(whole.into_json(&head)).into_response(), degraded))
}

/// Says in a header that experts were left out, or, before a stream, that they will be.
fn mark_degraded(mut response: Response, degraded: bool) -> Response {
    if degraded {
        response.headers_mut().insert(DEGRADED, HeaderValue::from_static("experts"));
    }
    response
}

pub(crate) fn raw_prompts(gateway: &Gateway, prompts: Vec<RawPrompt>) -> Result<Vec<Prompt>, Error> {
    let prompt = |prompt| {
        let ids = match prompt {
            RawPrompt::Ids(ids) => ids,
            RawPrompt::Text(text) => {
                let ids = gateway.model.tokenizer().encode(&text);
                ids.map_err(|error| Error::invalid("prompt", error.to_string()))?
            }
        };
        if ids.is_empty() {
            return Err(Error::invalid("prompt", "prompt is empty"));
        }
        Ok(Prompt { text: String::new(), ids, starts_in_reasoning: false })
    };
    prompts.into_iter().map(prompt).collect()
}

/// Usage of a streamed answer: a prompt counts with its first choice.
#[derive(Default)]
struct Total {
    usage: Usage,
    counted: Vec<usize>,
}

impl Total {
    fn add(&mut self, delta: &Delta, prompt_of: impl Fn(usize) -> usize) {
        if let Some((_, usage)) = delta.end {
            let prompt = prompt_of(delta.choice);
            self.usage.add(usage, self.counted.contains(&prompt));
            self.counted.push(prompt);
        }
    }
}

enum Event {
    Delta(Delta),
    /// Every choice has ended.
    End,
}

/// Pieces → events; a failure becomes an error event, never a silent end.
fn events(
    deltas: Deltas,
    watch: Arc<Watch>,
    mut write: impl FnMut(Event) -> Option<Value> + Send + 'static,
) -> impl futures_util::Stream<Item = Value> + Send + 'static {
    let ended = stream::once(std::future::ready(None));
    let mut failed = false;
    deltas.map(Some).chain(ended).filter_map(move |item| {
        let event = match item {
            _ if failed => None,
            Some(Ok(delta)) => write(Event::Delta(delta)),
            Some(Err(error)) => {
                failed = true;
                tracing::warn!(code = error.code.as_str(), reason = %error.reason, %error, "stream failed");
                watch.fail(&error);
                Some(openai::error::body(&error, &watch.trace_id()))
            }
            None => write(Event::End),
        };
        std::future::ready(event)
    })
}

async fn collect(mut deltas: Deltas, mut add: impl FnMut(Delta) + Send) -> Result<(), Error> {
    while let Some(delta) = deltas.next().await {
        add(delta?);
    }
    Ok(())
}

fn head(gateway: &Gateway, prefix: &str, id: &str) -> Head {
    Head { id: format!("{prefix}-{id}"), created: gateway.now_seconds(), model: gateway.name.clone() }
}

/// The request's id and its JSON body.
async fn read(gateway: &Gateway, request: Request) -> Result<(String, Value), Error> {
    let id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    check_content_type(request.headers())?;
    let body = read_body(request.into_body(), gateway.body_bytes_max).await?;
    let invalid = |what: String| Error::new(Code::InvalidArgument, "invalid_json", what);
    let text = std::str::from_utf8(&body).map_err(|error| {
        invalid(format!("the request body is not UTF-8: byte {} is wrong", error.valid_up_to()))
    })?;
    let value = serde_json::from_str(text)
        .map_err(|error| invalid(format!("the request body is not JSON: {error}")))?;
    Ok((id, value))
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    match headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes) {
        None => Ok(()),
        Some(kind) if kind.to_ascii_lowercase().starts_with(b"application/json") => Ok(()),
        Some(kind) => {
            let kind = String::from_utf8_lossy(kind).into_owned();
            Err(Error::invalid("content-type", format!("content-type is {kind:?}, wanted application/json")))
        }
    }
}

async fn read_body(body: Body, most: usize) -> Result<Bytes, Error> {
    let too_large = || {
        Error::new(Code::TooLarge, "body_too_large", format!("the request body has more than {most} bytes"))
    };
    // Announced or not: a client that announces too much need not send it first.
    if axum::body::HttpBody::size_hint(&body).lower() > most as u64 {
        return Err(too_large());
    }
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|error| Error::new(Code::InvalidArgument, "broken_body", error.to_string()))?;
        if bytes.len() + chunk.len() > most {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.into())
}

async fn models(State(gateway): State<Arc<Gateway>>) -> Response {
    Json(json!({ "object": "list", "data": [card(&gateway)] })).into_response()
}

async fn model(State(gateway): State<Arc<Gateway>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    gateway.check_model(Some(&id))?;
    Ok(Json(card(&gateway)).into_response())
}

fn card(gateway: &Gateway) -> Value {
    openai::model(&gateway.name, gateway.started_seconds, gateway.routes.context_max())
}

/// Alive: this process answers.
async fn health(State(gateway): State<Arc<Gateway>>) -> Response {
    let repairs = &gateway.repairs;
    Json(json!({ "repairs": repairs.done.get(), "repairs_failed": repairs.failed.get() })).into_response()
}

/// Ready: a request that comes in now can be answered.
async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    let draining = gateway.tasks.is_shutting_down();
    if gateway.routes.is_ready() && !draining {
        return Json(json!({ "ready": true })).into_response();
    }
    let detail = if draining { "shutting down".to_owned() } else { gateway.routes.describe() };
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "detail": detail }))).into_response()
}

async fn version() -> Response {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") })).into_response()
}

async fn not_found(request: Request) -> Refusal {
    let path = request.uri().path();
    Error::new(Code::NotFound, "unknown_url", format!("there is nothing at {} {path}", request.method()))
        .into()
}

async fn not_allowed(request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    let mut response = StatusCode::METHOD_NOT_ALLOWED.into_response();
    response.extensions_mut().insert(Error::new(Code::InvalidArgument, "method_not_allowed", message));
    response
}
