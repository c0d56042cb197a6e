//! One sequence's token ids → pieces of text: detokenize, stop strings, reasoning. The order of these three is what
//! makes a streamed answer equal to a plain one.

use std::sync::Arc;

use futures_util::{Stream, stream};
use proto::{Error, v1};
use text::{Detokenizer, Prompt, Reasoning, StopStrings, TextModel};

use crate::{repair::Replies, request::Ask, service::Gateway};

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
}

impl Finish {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A token with its log-probability and the most likely others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Logprob {
    pub(crate) token: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<Logprob>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) reasoning_tokens: u32,
    pub(crate) experts: u32,
    pub(crate) servers: u32,
    /// Experts that had no holder and were left out: the answer is degraded.
    pub(crate) experts_masked: u32,
}

impl Usage {
    /// Of several choices together; `same_prompt` counts once.
    pub(crate) fn add(&mut self, other: Self, same_prompt: bool) {
        self.prompt_tokens += if same_prompt { 0 } else { other.prompt_tokens };
        self.completion_tokens += other.completion_tokens;
        self.reasoning_tokens += other.reasoning_tokens;
        self.experts = self.experts.max(other.experts);
        self.servers = self.servers.max(other.servers);
        self.experts_masked = self.experts_masked.max(other.experts_masked);
    }
}

/// A piece of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    pub(crate) choice: usize,
    pub(crate) reasoning: String,
    pub(crate) content: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<Logprob>,
    /// On the last piece.
    pub(crate) end: Option<(Finish, Usage)>,
}

pub(crate) struct Answer {
    model: Arc<TextModel>,
    choice: usize,
    // Dropping the replies cancels the sequence at its router.
    replies: Option<Replies>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    reasoning: Option<Reasoning>,
    /// Ids whose text is not part of the answer.
    stop_ids: Vec<u32>,
    wants_logprobs: bool,
    usage: Usage,
}

impl Answer {
    pub(crate) fn new(
        gateway: &Gateway,
        ask: &Ask,
        prompt: &Prompt,
        choice: usize,
        (replies, stop_ids): (Replies, Vec<u32>),
    ) -> Result<Self, Error> {
        let detokenizer = Detokenizer::new(Arc::clone(&gateway.model), &prompt.ids, ask.chat)
            .map_err(|error| internal(&error))?;
        Ok(Self {
            model: Arc::clone(&gateway.model),
            choice,
            replies: Some(replies),
            detokenizer,
            stops: StopStrings::new(ask.options.stop.clone()),
            reasoning: ask.chat.then(|| Reasoning::new(prompt.starts_in_reasoning)),
            stop_ids,
            wants_logprobs: ask.options.top_logprobs.is_some(),
            usage: Usage { prompt_tokens: prompt.ids.len() as u32, ..Usage::default() },
        })
    }

    pub(crate) fn into_stream(self) -> impl Stream<Item = Result<Delta, Error>> + Send {
        stream::unfold(Some(self), |answer| async move {
            let mut answer = answer?;
            match answer.next().await {
                Ok(delta) if delta.end.is_some() => Some((Ok(delta), None)),
                Ok(delta) => Some((Ok(delta), Some(answer))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// The next piece that says something. Cancel safe: a dropped answer is a cancelled one.
    async fn next(&mut self) -> Result<Delta, Error> {
        loop {
            let replies = self.replies.as_mut().ok_or_else(|| Error::internal("the answer has ended"))?;
            let reply =
                replies.next().await?.ok_or_else(|| Error::internal("the answer has ended already"))?;
            let mut delta = Delta { choice: self.choice, ..Delta::default() };
            let mut stopped = false;
            for token in &reply.tokens {
                if self.take(token, &mut delta)? {
                    stopped = true;
                    break;
                }
            }
            if let Some(usage) = reply.usage {
                self.usage.experts = usage.experts;
                self.usage.servers = usage.servers;
                self.usage.experts_masked = self.usage.experts_masked.max(usage.experts_masked);
            }
            if stopped {
                // The sequence ends here, whatever the router would say.
                self.replies = None;
                self.flush_reasoning(&mut delta);
                delta.end = Some((Finish::Stop, self.usage));
                return Ok(delta);
            }
            let finish = match reply.finish() {
                v1::Finish::Unspecified => None,
                v1::Finish::Stop => Some(Finish::Stop),
                v1::Finish::Length => Some(Finish::Length),
            };
            if let Some(finish) = finish {
                let finish = if self.flush(&mut delta)? { Finish::Stop } else { finish };
                delta.end = Some((finish, self.usage));
                return Ok(delta);
            }
            if !(delta.content.is_empty() && delta.reasoning.is_empty() && delta.ids.is_empty()) {
                return Ok(delta);
            }
        }
    }

    /// True: a stop string is complete.
    fn take(&mut self, token: &v1::Token, delta: &mut Delta) -> Result<bool, Error> {
        self.usage.completion_tokens += 1;
        if self.reasoning.as_ref().is_some_and(Reasoning::is_reasoning) {
            self.usage.reasoning_tokens += 1;
        }
        delta.ids.push(token.id);
        if self.wants_logprobs {
            delta.logprobs.push(self.logprob(token));
        }
        if self.stop_ids.contains(&token.id) {
            return Ok(false);
        }
        let text = self.detokenizer.push(token.id).map_err(|error| internal(&error))?;
        let outcome = self.stops.push(&text);
        self.split(&outcome.text, delta);
        Ok(outcome.stopped)
    }

    fn split(&mut self, text: &str, delta: &mut Delta) {
        match &mut self.reasoning {
            None => delta.content.push_str(text),
            Some(reasoning) => {
                let split = reasoning.push(text);
                delta.reasoning.push_str(&split.reasoning);
                delta.content.push_str(&split.content);
            }
        }
    }

    /// Everything held back, in the order it came. True: a stop string was among it.
    fn flush(&mut self, delta: &mut Delta) -> Result<bool, Error> {
        let text = self.detokenizer.finish().map_err(|error| internal(&error))?;
        let outcome = self.stops.push(&text);
        self.split(&outcome.text, delta);
        let mut stopped = outcome.stopped;
        if !stopped {
            let outcome = self.stops.finish();
            self.split(&outcome.text, delta);
            stopped = outcome.stopped;
        }
        self.flush_reasoning(delta);
        Ok(stopped)
    }

    fn flush_reasoning(&mut self, delta: &mut Delta) {
        if let Some(reasoning) = &mut self.reasoning {
            let split = reasoning.finish();
            delta.reasoning.push_str(&split.reasoning);
            delta.content.push_str(&split.content);
        }
    }

    fn logprob(&self, token: &v1::Token) -> Logprob {
        let tokenizer = self.model.tokenizer();
        let one = |id: u32, logprob: f32| Logprob {
            token: tokenizer.token_text(id),
            bytes: tokenizer.token_bytes(id),
            logprob,
            top: Vec::new(),
        };
        let top = token.top.iter().map(|candidate| one(candidate.id, candidate.logprob)).collect();
        Logprob { top, ..one(token.id, token.logprob) }
    }
}

fn internal(error: &text::Error) -> Error {
    Error::internal(format!("cannot turn tokens into text: {error}"))
}
