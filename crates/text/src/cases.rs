//! Answers cases of golden text, so that anybody can compare with another engine: a JSON object a line in, one out.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{ChatInput, Detokenizer, Error, TextModel};

/// The answer to one case: `encode` gives `ids`, `decode` gives `text`, `chat` gives `prompt` and `ids`; whatever cannot
/// be done gives `error`.
#[must_use]
pub fn answer(model: &Arc<TextModel>, case: &Value) -> Value {
    let result = match case["kind"].as_str() {
        Some("encode") => encode(model, case),
        Some("decode") => decode(model, case),
        Some("chat") => chat(model, case),
        kind => Err(Error::messages("kind", format!("unknown kind of case {:?}", kind.unwrap_or_default()))),
    };
    result.unwrap_or_else(|error| json!({ "error": error.to_string() }))
}

fn encode(model: &TextModel, case: &Value) -> Result<Value, Error> {
    let text = case["text"].as_str().ok_or_else(|| Error::messages("text", "text is not a string"))?;
    Ok(json!({ "ids": model.tokenizer().encode_as_given(text)? }))
}

/// One id at a time, as an answer is streamed; the pieces must join to what all ids give at once.
fn decode(model: &Arc<TextModel>, case: &Value) -> Result<Value, Error> {
    let wrong = || Error::messages("ids", "ids is not a list of token ids");
    let ids: Vec<u32> = case["ids"]
        .as_array()
        .ok_or_else(wrong)?
        .iter()
        .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong))
        .collect::<Result<_, _>>()?;
    let mut detokenizer = Detokenizer::new(Arc::clone(model), &[], false)?;
    let mut text = String::new();
    for &id in &ids {
        text.push_str(&detokenizer.push(id)?);
    }
    text.push_str(&detokenizer.finish()?);
    let whole = model.tokenizer().decode(&ids)?;
    if text != whole {
        let message = format!("one id at a time gives {text:?}, all at once give {whole:?}");
        return Err(Error::messages("ids", message));
    }
    Ok(json!({ "text": text }))
}

fn chat(model: &TextModel, case: &Value) -> Result<Value, Error> {
    let input = ChatInput {
        messages: case["messages"].clone(),
        tools: case["tools"].clone(),
        kwargs: case["kwargs"].as_object().cloned().unwrap_or_default(),
        add_generation_prompt: true,
        now: case["now"].as_str().map(str::to_owned),
        as_given: true,
    };
    let prompt = model.prompt(&input)?;
    Ok(json!({ "prompt": prompt.text, "ids": prompt.ids }))
}
