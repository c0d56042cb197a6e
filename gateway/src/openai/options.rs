//! The fields that both endpoints share.

use proto::Error;
use serde_json::Value;

use super::fields::Fields;
use crate::request::Options;

/// Answers to one prompt, at most.
const N_MAX: u64 = 16;
/// Stop strings, at most: OpenAI takes 4, other servers more.
const STOPS_MAX: usize = 16;

/// How an answer is sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Streaming {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

pub(crate) fn n(fields: &Fields<'_>) -> Result<usize, Error> {
    Ok(fields.whole("n", (1, N_MAX))?.unwrap_or(1) as usize)
}

pub(crate) fn options(fields: &Fields<'_>) -> Result<Options, Error> {
    refuse_constraints(fields)?;
    let stop = fields.texts("stop", STOPS_MAX)?;
    if stop.iter().any(String::is_empty) {
        return Err(Error::invalid("stop", "stop has an empty string"));
    }
    let tokens = (1, u64::from(u32::MAX));
    let old = fields.whole("max_tokens", tokens)?;
    let new = fields.whole("max_completion_tokens", tokens)?;
    Ok(Options {
        temperature: fields.number("temperature", (0.0, 2.0))?,
        top_k: top_k(fields)?,
        top_p: fields.number("top_p", (f64::MIN_POSITIVE, 1.0))?,
        min_p: fields.number("min_p", (0.0, 1.0))?,
        seed: fields.seed("seed")?,
        // The newer name wins where both are given.
        tokens_max: new.or(old),
        tokens_min: fields.whole("min_tokens", (0, u64::from(u32::MAX)))?.unwrap_or(0),
        stop,
        stop_token_ids: fields.ids("stop_token_ids")?,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        top_logprobs: None,
    })
}

/// -1 and 0 mean all, as elsewhere.
fn top_k(fields: &Fields<'_>) -> Result<Option<u32>, Error> {
    if fields.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(0));
    }
    fields.whole("top_k", (0, u64::from(u32::MAX)))
}

pub(crate) fn streaming(fields: &Fields<'_>) -> Result<Streaming, Error> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let Some(options) = fields.get("stream_options") else {
        return Ok(Streaming { stream, include_usage: false });
    };
    if !stream {
        return Err(Error::invalid("stream_options", "stream_options goes with stream: true only"));
    }
    let inner = Fields::new(options)
        .map_err(|_| Error::invalid("stream_options", "stream_options is not an object"))?;
    Ok(Streaming { stream, include_usage: inner.flag("include_usage")?.unwrap_or(false) })
}

fn refuse_constraints(fields: &Fields<'_>) -> Result<(), Error> {
    let zero = |value: &Value| value.as_f64() == Some(0.0);
    let one = |value: &Value| value.as_f64() == Some(1.0);
    let empty = |value: &Value| {
        value.as_object().is_some_and(serde_json::Map::is_empty)
            || value.as_array().is_some_and(Vec::is_empty)
    };
    fields.refuse("frequency_penalty", zero)?;
    fields.refuse("presence_penalty", zero)?;
    fields.refuse("repetition_penalty", one)?;
    fields.refuse("length_penalty", one)?;
    fields.refuse("logit_bias", empty)?;
    fields.refuse("bad_words", empty)?;
    fields.refuse("allowed_token_ids", empty)?;
    fields.refuse("response_format", |value| value["type"] == "text")?;
    for key in [
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "prompt_logprobs",
    ] {
        fields.refuse(key, |_| false)?;
    }
    fields.refuse("use_beam_search", |value| *value == Value::Bool(false))?;
    fields.refuse("best_of", one)
}
