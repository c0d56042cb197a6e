//! One request's tokens, pages and limits.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    time::Instant,
};

use cluster::table;
use ids::{ExpertId, InstanceId, LayerId, PageIndex};
use proto::{Code, Error};
use telemetry::trace::Context;
use tokio::sync::mpsc::UnboundedSender;

use crate::{
    sampling::{Drawn, Sampling},
    spans::Trail,
};

/// What a caller asked for, already checked against the limits.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: String,
    /// At least one token, each below the vocabulary's size.
    pub(crate) prompt: Vec<u32>,
    /// What another router has emitted already: the answer goes on after it.
    pub(crate) emitted: Vec<u32>,
    /// At least 1.
    pub(crate) tokens_max: usize,
    /// Stop ids are not drawn before so many tokens.
    pub(crate) tokens_min: usize,
    pub(crate) sampling: Sampling,
    /// Ids that end the answer.
    pub(crate) stop_ids: Vec<u32>,
    /// Log-probabilities of the drawn token and of so many others.
    pub(crate) top_logprobs: usize,
    pub(crate) prompt_logits: bool,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
}

/// What the engine tells the caller. Unbounded channels carry it, bounded by the sequence's own limits: one event a
/// token and one for the end.
#[derive(Debug)]
pub(crate) enum Event {
    Token {
        drawn: Drawn,
        /// Experts were left out for it or for what came before.
        degraded: bool,
    },
    /// Logits `[positions, vocab]` of the prompt from `first_position` on.
    PromptLogits {
        first_position: usize,
        values: Vec<f32>,
    },
    Finished {
        finish: Finish,
        usage: Usage,
    },
    Failed(Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) experts: usize,
    pub(crate) servers: usize,
    pub(crate) experts_masked: usize,
}

/// Who worked on a sequence.
#[derive(Debug, Default)]
pub(crate) struct Participants {
    pub(crate) experts: HashSet<(LayerId, ExpertId)>,
    pub(crate) servers: BTreeSet<InstanceId>,
    /// Experts that nobody held and that the gate left out: the answer is degraded.
    pub(crate) masked: HashSet<(LayerId, ExpertId)>,
}

/// A sequence that waits for experts nobody holds.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) missing: BTreeMap<LayerId, Vec<ExpertId>>,
    pub(crate) last_failure: Option<Error>,
    /// Not before: a holder that is listed but fails must not be asked in a tight loop.
    pub(crate) retry_at: Instant,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) request: Request,
    pub(crate) out: UnboundedSender<Event>,
    /// Prompt and answer so far.
    pub(crate) tokens: Vec<u32>,
    /// Positions whose rows are in the cache.
    pub(crate) n_computed: usize,
    pub(crate) pages: Vec<PageIndex>,
    /// Prompt positions whose logits were sent.
    pub(crate) n_logits_sent: usize,
    pub(crate) participants: Participants,
    pub(crate) parked: Option<Parked>,
    /// When it was submitted, or last went on.
    pub(crate) progress_at: Instant,
    pub(crate) trail: Trail,
}

impl Sequence {
    pub(crate) fn new(request: Request, trace: Context, out: UnboundedSender<Event>, now: Instant) -> Self {
        Self {
            trail: Trail::new(trace, now),
            tokens: [request.prompt.as_slice(), &request.emitted].concat(),
            request,
            out,
            n_computed: 0,
            pages: Vec::new(),
            n_logits_sent: 0,
            participants: Participants::default(),
            parked: None,
            progress_at: now,
        }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.out.is_closed()
    }

    /// Rows to compute before the next token can be drawn.
    pub(crate) fn n_pending(&self) -> usize {
        self.tokens.len() - self.n_computed
    }

    /// Position of the next token in the answer.
    pub(crate) fn n_generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Ids that the next token must not be.
    pub(crate) fn banned_ids(&self) -> &[u32] {
        if self.n_generated() < self.request.tokens_min { &self.request.stop_ids } else { &[] }
    }

    /// A closed receiver is an ordinary cancellation: the scheduler sees it at the next step.
    pub(crate) fn send(&self, event: Event) {
        let _cancelled = self.out.send(event);
    }

    /// Adds a drawn token and tells the caller. Some: it was the last.
    pub(crate) fn push(&mut self, drawn: Drawn) -> Option<Finish> {
        self.tokens.push(drawn.id);
        self.send(Event::Token { drawn, degraded: self.is_degraded() });
        self.end()
    }

    /// Why the sequence ends with the tokens it has, if it does.
    pub(crate) fn end(&self) -> Option<Finish> {
        let last = self.tokens.last().filter(|_| self.n_generated() > 0)?;
        if self.request.stop_ids.contains(last) {
            Some(Finish::Stop)
        } else if self.n_generated() >= self.request.tokens_max {
            Some(Finish::Length)
        } else {
            None
        }
    }

    pub(crate) fn is_degraded(&self) -> bool {
        !self.participants.masked.is_empty()
    }

    pub(crate) fn finish(&self, finish: Finish) {
        let usage = Usage {
            prompt_tokens: self.request.prompt.len(),
            completion_tokens: self.n_generated(),
            experts: self.participants.experts.len(),
            servers: self.participants.servers.len(),
            experts_masked: self.participants.masked.len(),
        };
        self.send(Event::Finished { finish, usage });
    }
}

/// The error of a request whose experts did not come back in time.
pub(crate) fn experts_missing(
    missing: &BTreeMap<LayerId, Vec<ExpertId>>,
    last_failure: Option<&Error>,
) -> Error {
    let mut message = format!("no live server answers for {}", table::describe(missing));
    if let Some(failure) = last_failure {
        message = format!("{message} (last failure: {failure})");
    }
    Error::new(Code::Unavailable, "experts_missing", message)
}
