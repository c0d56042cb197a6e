//! `/v1/completions`: raw prompts, as text or token ids.

use proto::Error;
use serde_json::{Value, json};

use super::{
    Head,
    fields::{Fields, token_ids},
    options::{self, Streaming},
};
use crate::{
    answer::{Delta, Finish, Logprob, Usage},
    request::Options,
};

/// Whole answers and chunks have one name here.
const OBJECT: &str = "text_completion";
/// OpenAI's default length.
const TOKENS_DEFAULT: u32 = 16;
/// Prompts of one request, at most.
const PROMPTS_MAX: usize = 64;

/// A prompt as it was sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RawPrompt {
    Text(String),
    Ids(Vec<u32>),
}

pub(crate) struct Request {
    pub(crate) prompts: Vec<RawPrompt>,
    pub(crate) n: usize,
    pub(crate) options: Options,
    pub(crate) streaming: Streaming,
}

impl Request {
    pub(crate) fn parse(fields: &Fields<'_>) -> Result<Self, Error> {
        let mut options = options::options(fields)?;
        options.tokens_max = Some(options.tokens_max.unwrap_or(TOKENS_DEFAULT));
        options.top_logprobs = fields.whole("logprobs", (0, 20))?;
        fields.refuse("echo", |value| *value == Value::Bool(false))?;
        fields.refuse("suffix", |value| value == "")?;
        Ok(Self {
            prompts: prompts(fields.required("prompt")?)?,
            n: options::n(fields)?,
            options,
            streaming: options::streaming(fields)?,
        })
    }
}

fn prompts(value: &Value) -> Result<Vec<RawPrompt>, Error> {
    let wrong = |what: String| Error::invalid("prompt", what);
    if let Some(ids) = token_ids(value).filter(|ids| !ids.is_empty()) {
        return Ok(vec![RawPrompt::Ids(ids)]);
    }
    let one = |item: &Value| match item {
        Value::String(text) => Some(RawPrompt::Text(text.clone())),
        other => token_ids(other).filter(|ids| !ids.is_empty()).map(RawPrompt::Ids),
    };
    match value {
        Value::String(text) => Ok(vec![RawPrompt::Text(text.clone())]),
        Value::Array(items) if items.is_empty() => Err(wrong("prompt is empty".to_owned())),
        Value::Array(items) if items.len() > PROMPTS_MAX => {
            Err(wrong(format!("prompt has {} entries, {PROMPTS_MAX} are allowed", items.len())))
        }
        Value::Array(items) => items
            .iter()
            .map(|item| one(item).ok_or_else(|| wrong("prompt is neither text nor token ids".to_owned())))
            .collect(),
        _ => Err(wrong("prompt is neither text nor token ids".to_owned())),
    }
}

#[derive(Clone, Default)]
struct Choice {
    text: String,
    logprobs: Vec<Logprob>,
    finish: Option<Finish>,
}

pub(crate) struct Whole {
    choices: Vec<Choice>,
    /// Answers to each prompt: the prompt's tokens count once for all of them.
    n: usize,
    counted: Vec<bool>,
    usage: Usage,
    wants_logprobs: bool,
}

impl Whole {
    pub(crate) fn new(n_prompts: usize, n: usize, wants_logprobs: bool) -> Self {
        let choices = vec![Choice::default(); n_prompts * n];
        Self { choices, n, counted: vec![false; n_prompts], usage: Usage::default(), wants_logprobs }
    }

    pub(crate) fn add(&mut self, delta: Delta) {
        let choice = &mut self.choices[delta.choice];
        choice.text.push_str(&delta.content);
        choice.logprobs.extend(delta.logprobs);
        if let Some((finish, usage)) = delta.end {
            choice.finish = Some(finish);
            let prompt_idx = delta.choice / self.n;
            self.usage.add(usage, self.counted[prompt_idx]);
            self.counted[prompt_idx] = true;
        }
    }

    pub(crate) fn usage(&self) -> &Usage {
        &self.usage
    }

    pub(crate) fn into_json(self, head: &Head) -> Value {
        let wants_logprobs = self.wants_logprobs;
        let choices = self.choices.into_iter().enumerate().map(|(index, choice)| {
            json!({
                "index": index,
                "text": choice.text,
                "logprobs": if wants_logprobs { logprobs(&choice.logprobs) } else { Value::Null },
                "finish_reason": choice.finish.map(Finish::as_str),
            })
        });
        head.around_with_usage(OBJECT, choices.collect(), &self.usage)
    }
}

/// The legacy form: parallel lists.
fn logprobs(tokens: &[Logprob]) -> Value {
    let offsets = tokens.iter().scan(0, |offset, token| {
        let start = *offset;
        *offset += token.token.chars().count();
        Some(start)
    });
    let top = tokens.iter().map(|token| {
        let pairs = token.top.iter().map(|candidate| (candidate.token.clone(), json!(candidate.logprob)));
        pairs.collect::<serde_json::Map<_, _>>()
    });
    json!({
        "tokens": tokens.iter().map(|token| &token.token).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets.collect::<Vec<_>>(),
    })
}

pub(crate) fn delta_chunk(head: &Head, delta: &Delta) -> Value {
    let choice = json!({
        "index": delta.choice,
        "text": delta.content,
        "logprobs": if delta.logprobs.is_empty() { Value::Null } else { logprobs(&delta.logprobs) },
        "finish_reason": delta.end.map(|(finish, _)| finish.as_str()),
    });
    head.around(OBJECT, json!([choice]))
}

pub(crate) fn usage_chunk(head: &Head, total: &Usage) -> Value {
    head.around_with_usage(OBJECT, json!([]), total)
}
