//! The words of the OpenAI API and nothing else: a foreign language at the door.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod options;

use serde_json::{Value, json};

use crate::answer::{Logprob, Usage};

/// What every object of one answer repeats.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
}

impl Head {
    /// An answer, or a chunk of one.
    fn around(&self, object: &str, choices: Value) -> Value {
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    /// The same with usage: a whole answer, or the extra chunk without a choice.
    fn around_with_usage(&self, object: &str, choices: Value, total: &Usage) -> Value {
        let mut value = self.around(object, choices);
        value["usage"] = usage(total);
        value
    }
}

/// `usage`, with the cluster's share in the answer beside it.
fn usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens_details": { "reasoning_tokens": usage.reasoning_tokens },
        "shoal": { "experts": usage.experts, "servers": usage.servers, "experts_masked": usage.experts_masked },
    })
}

/// One token of a chat's `logprobs.content`.
fn token(logprob: &Logprob) -> Value {
    let mut value = candidate(logprob);
    value["top_logprobs"] = logprob.top.iter().map(candidate).collect();
    value
}

fn candidate(logprob: &Logprob) -> Value {
    json!({ "token": logprob.token, "logprob": logprob.logprob, "bytes": logprob.bytes })
}

/// A model's card.
pub(crate) fn model(id: &str, created: u64, context_max: Option<u32>) -> Value {
    json!({ "id": id, "object": "model", "created": created, "owned_by": "shoal", "max_model_len": context_max })
}
