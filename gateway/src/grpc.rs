//! The gRPC door: `shoal.v1.Chat`, over the same requests as HTTP.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt as _, stream};
use proto::{
    Error,
    v1::{self, chat_server::Chat},
};
use serde_json::{Map, Value, json};
use text::ChatInput;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use tracing::Instrument as _;

use crate::{
    answer::{Delta, Logprob, Usage},
    http::{REQUEST_ID, REQUEST_ID_BYTES_MAX, raw_prompts},
    observe::{Caller, Endpoint, Watch},
    openai::completions::RawPrompt,
    request::{Ask, Deltas, Options, serve},
    service::Gateway,
};

pub(crate) struct Door(pub(crate) Arc<Gateway>);

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Chat for Door {
    type ChatStreamStream = Replies<v1::ChatDelta>;
    type CompleteStreamStream = Replies<v1::CompleteDelta>;

    async fn chat(&self, request: Request<v1::ChatRequest>) -> Result<Response<v1::ChatReply>, Status> {
        let call = self.call(Endpoint::Chat, request, Self::start_chat).await?;
        let mut deltas = call.deltas;
        let mut reply = v1::ChatReply { id: call.id, model: self.0.name.clone(), ..v1::ChatReply::default() };
        while let Some(delta) = deltas.next().await {
            let delta = delta?;
            reply.content.push_str(&delta.content);
            reply.reasoning_content.push_str(&delta.reasoning);
            reply.logprobs.extend(delta.logprobs.into_iter().map(logprob));
            if let Some((finish, total)) = delta.end {
                reply.finish_reason = finish.as_str().to_owned();
                reply.usage = Some(usage(&total));
            }
        }
        Ok(call.watched.respond(reply))
    }

    async fn chat_stream(
        &self,
        request: Request<v1::ChatRequest>,
    ) -> Result<Response<Self::ChatStreamStream>, Status> {
        let Call { id, deltas, watched } = self.call(Endpoint::Chat, request, Self::start_chat).await?;
        let model = self.0.name.clone();
        let replies = deltas.map(move |delta| {
            let Delta { reasoning, content, logprobs, end, .. } = delta?;
            Ok(v1::ChatDelta {
                id: id.clone(),
                model: model.clone(),
                content,
                reasoning_content: reasoning,
                finish_reason: end.map(|(finish, _)| finish.as_str().to_owned()).unwrap_or_default(),
                usage: end.map(|(_, total)| usage(&total)),
                logprobs: logprobs.into_iter().map(logprob).collect(),
            })
        });
        Ok(watched.respond(Box::pin(replies)))
    }

    async fn complete(
        &self,
        request: Request<v1::CompleteRequest>,
    ) -> Result<Response<v1::CompleteReply>, Status> {
        let call = self.call(Endpoint::Completions, request, Self::start_completion).await?;
        let mut deltas = call.deltas;
        let mut reply =
            v1::CompleteReply { id: call.id, model: self.0.name.clone(), ..v1::CompleteReply::default() };
        while let Some(delta) = deltas.next().await {
            let delta = delta?;
            reply.text.push_str(&delta.content);
            reply.token_ids.extend(delta.ids);
            reply.logprobs.extend(delta.logprobs.into_iter().map(logprob));
            if let Some((finish, total)) = delta.end {
                reply.finish_reason = finish.as_str().to_owned();
                reply.usage = Some(usage(&total));
            }
        }
        Ok(call.watched.respond(reply))
    }

    async fn complete_stream(
        &self,
        request: Request<v1::CompleteRequest>,
    ) -> Result<Response<Self::CompleteStreamStream>, Status> {
        let Call { id, deltas, watched } =
            self.call(Endpoint::Completions, request, Self::start_completion).await?;
        let model = self.0.name.clone();
        let replies = deltas.map(move |delta| {
            let Delta { content, ids, logprobs, end, .. } = delta?;
            Ok(v1::CompleteDelta {
                id: id.clone(),
                model: model.clone(),
                text: content,
                token_ids: ids,
                finish_reason: end.map(|(finish, _)| finish.as_str().to_owned()).unwrap_or_default(),
                usage: end.map(|(_, total)| usage(&total)),
                logprobs: logprobs.into_iter().map(logprob).collect(),
            })
        });
        Ok(watched.respond(Box::pin(replies)))
    }

    async fn models(&self, _: Request<v1::ModelsRequest>) -> Result<Response<v1::ModelsReply>, Status> {
        let context_max = self.0.routes.context_max().unwrap_or(0);
        let card = v1::ModelCard { id: self.0.name.clone(), context_max };
        Ok(Response::new(v1::ModelsReply { models: vec![card] }))
    }
}

/// A call that has begun.
struct Call {
    id: String,
    deltas: Replies<Delta>,
    watched: Watched,
}

/// What a response says of its trace.
struct Watched(Arc<Watch>);

impl Watched {
    fn respond<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        self.say(response.metadata_mut());
        response
    }

    fn say(&self, metadata: &mut MetadataMap) {
        // Hexadecimal digits are always a value.
        if let Ok(trace_id) = self.0.trace_id().parse() {
            metadata.insert("x-shoal-trace-id", trace_id);
        }
        if let Some(Ok(url)) = self.0.trace_url().map(|url| url.parse()) {
            metadata.insert("x-shoal-trace-url", url);
        }
    }

    fn refuse(&self, error: Error) -> Status {
        self.0.fail(&error);
        let mut status = Status::from(error);
        self.say(status.metadata_mut());
        status
    }
}

impl Door {
    /// Begins a call with `start`, watched to its last message.
    async fn call<R>(
        &self,
        endpoint: Endpoint,
        request: Request<R>,
        start: impl AsyncFnOnce(&Self, R, String, &Arc<Watch>) -> Result<(String, Deltas), Error>,
    ) -> Result<Call, Status> {
        let header = |name| request.metadata().get(name)?.to_str().ok();
        let caller = Caller::read(header);
        let given = header(REQUEST_ID).filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX);
        let id = given.map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned);
        let watch = Watch::begin(&self.0, endpoint, caller, &id);
        watch.set("rpc.system.name", "grpc");
        let log = watch.log.clone();
        let watched = Watched(Arc::clone(&watch));
        match start(self, request.into_inner(), id, &watch).instrument(log).await {
            Ok((id, deltas)) => {
                let deltas = Box::pin(watch_to_end(deltas, Watched(watch)));
                Ok(Call { id, deltas, watched })
            }
            Err(error) => Err(watched.refuse(error)),
        }
    }

    async fn start_chat(
        &self,
        request: v1::ChatRequest,
        id: String,
        watch: &Arc<Watch>,
    ) -> Result<(String, Deltas), Error> {
        self.check_model(&request.model)?;
        if request.messages.is_empty() {
            return Err(Error::invalid("messages", "messages is empty"));
        }
        let kwargs: Map<String, Value> = match request.template_kwargs_json.as_str() {
            "" => Map::new(),
            text => serde_json::from_str(text).map_err(|error| {
                Error::invalid(
                    "template_kwargs_json",
                    format!("template_kwargs_json is not a JSON object: {error}"),
                )
            })?,
        };
        let message = |message: v1::ChatMessage| {
            let mut value = json!({ "role": message.role, "content": message.content });
            if !message.reasoning_content.is_empty() {
                value["reasoning_content"] = json!(message.reasoning_content);
            }
            value
        };
        let input = ChatInput {
            messages: request.messages.into_iter().map(message).collect(),
            tools: Value::Null,
            kwargs,
            add_generation_prompt: true,
            now: None,
            as_given: false,
        };
        let prompt = self.0.chat_prompt(input).await?;
        self.start(id, prompt, request.options, true, watch).await
    }

    async fn start_completion(
        &self,
        request: v1::CompleteRequest,
        id: String,
        watch: &Arc<Watch>,
    ) -> Result<(String, Deltas), Error> {
        self.check_model(&request.model)?;
        let raw = match request.prompt {
            Some(v1::complete_request::Prompt::Text(text)) => RawPrompt::Text(text),
            Some(v1::complete_request::Prompt::TokenIds(ids)) => RawPrompt::Ids(ids.ids),
            None => return Err(Error::invalid("prompt", "prompt is missing")),
        };
        let prompt = raw_prompts(&self.0, vec![raw])?.swap_remove(0);
        self.start(id, prompt, request.options, false, watch).await
    }

    async fn start(
        &self,
        id: String,
        prompt: text::Prompt,
        options: Option<v1::SamplingOptions>,
        chat: bool,
        watch: &Arc<Watch>,
    ) -> Result<(String, Deltas), Error> {
        let options = checked(options.unwrap_or_default())?;
        self.0.log_prompt(&prompt);
        let prefix = if chat { "chatcmpl" } else { "cmpl" };
        let called = format!("{prefix}-{id}");
        let ask = Ask { id, prompts: vec![prompt], n: 1, options, chat, watch: Arc::clone(watch) };
        watch.asked(&ask, true);
        Ok((called, serve(&self.0, ask).await?.deltas))
    }

    /// No name is any name: one model is served.
    fn check_model(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() { Ok(()) } else { self.0.check_model(Some(name)) }
    }
}

/// Tells the watch how the answer ended.
fn watch_to_end(deltas: Deltas, watched: Watched) -> impl Stream<Item = Result<Delta, Status>> + Send {
    stream::unfold((deltas, watched), |(mut deltas, watched)| async move {
        let log = watched.0.log.clone();
        let delta = match deltas.next().instrument(log).await {
            Some(delta) => delta.map_err(|error| watched.refuse(error)),
            None => {
                watched.0.end();
                return None;
            }
        };
        Some((delta, (deltas, watched)))
    })
}

fn checked(options: v1::SamplingOptions) -> Result<Options, Error> {
    let range = |name: &'static str, value: Option<f32>, (from, to): (f32, f32)| match value {
        Some(value) if !(from..=to).contains(&value) => {
            Err(Error::invalid(name, format!("{name} is {value}, wanted a number from {from} to {to}")))
        }
        value => Ok(value),
    };
    if options.max_tokens == Some(0) {
        return Err(Error::invalid("max_tokens", "max_tokens is 0"));
    }
    Ok(Options {
        temperature: range("temperature", options.temperature, (0.0, 2.0))?,
        top_k: options.top_k,
        top_p: range("top_p", options.top_p, (f32::MIN_POSITIVE, 1.0))?,
        min_p: range("min_p", options.min_p, (0.0, 1.0))?,
        seed: options.seed,
        tokens_max: options.max_tokens,
        tokens_min: 0,
        stop: options.stop,
        stop_token_ids: options.stop_token_ids,
        ignore_eos: options.ignore_eos,
        top_logprobs: options.top_logprobs,
    })
}

fn usage(usage: &Usage) -> v1::TokenUsage {
    v1::TokenUsage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        reasoning_tokens: usage.reasoning_tokens,
        experts: usage.experts,
        servers: usage.servers,
        experts_masked: usage.experts_masked,
    }
}

fn logprob(logprob: Logprob) -> v1::TokenLogprob {
    v1::TokenLogprob {
        token: logprob.token,
        logprob: logprob.logprob,
        bytes: logprob.bytes.into(),
        top: logprob.top.into_iter().map(self::logprob).collect(),
    }
}
