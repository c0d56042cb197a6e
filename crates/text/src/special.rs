//! Keeps special tokens that a user typed as text. Before a conversation is rendered, a mark (a character that the
//! request does not contain) is put behind the first character of everything in its strings that is, or could become,
//! an added token. In the rendered text only the template's own tokens are whole: they become control tokens, and the
//! rest, without marks, is encoded as plain text.

use serde_json::Value;

use crate::{ChatInput, Error, Tokenizer};

/// Tags that templates look for in an assistant's message. They reach the template whole, and become control tokens
/// only if the template's own text around them says so; see [`Guard::mark`].
const THINK_TAGS: [&str; 2] = ["<think>", "</think>"];

pub(crate) struct Guard<'a> {
    tokenizer: &'a Tokenizer,
    mark: char,
}

impl<'a> Guard<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, input: &ChatInput) -> Self {
        // Noncharacters and private-use characters; a request would have to hold all of them to leave none.
        let free = |mark: &char| {
            let absent = |value: &Value| !any_string(value, &|text| text.contains(*mark));
            absent(&input.messages) && absent(&input.tools) && absent(&Value::Object(input.kwargs.clone()))
        };
        let mark = ('\u{f0000}'..'\u{ffffd}').find(free).unwrap_or('\u{fdd0}');
        Self { tokenizer, mark }
    }

    /// The conversation with marks.
    pub(crate) fn mark(&self, input: &ChatInput) -> ChatInput {
        let mut marked = input.clone();
        if let Value::Array(messages) = &mut marked.messages {
            for message in messages {
                let assistant = message["role"] == "assistant";
                if let Value::Object(fields) = message {
                    for (key, value) in fields.iter_mut().filter(|(key, _)| *key != "role") {
                        self.mark_value(
                            value,
                            assistant && matches!(key.as_str(), "content" | "reasoning_content"),
                        );
                    }
                }
            }
        }
        self.mark_value(&mut marked.tools, false);
        marked.kwargs.values_mut().for_each(|value| self.mark_value(value, false));
        marked
    }

    fn mark_value(&self, value: &mut Value, keep_think_tags: bool) {
        match value {
            Value::String(text) => *text = self.mark_text(text, keep_think_tags),
            Value::Array(items) => items.iter_mut().for_each(|item| self.mark_value(item, keep_think_tags)),
            Value::Object(fields) => {
                let keys_need_it = fields.keys().any(|key| self.mark_text(key, false) != *key);
                if keys_need_it {
                    let old = std::mem::take(fields);
                    fields.extend(old.into_iter().map(|(key, value)| (self.mark_text(&key, false), value)));
                }
                fields.values_mut().for_each(|value| self.mark_value(value, keep_think_tags));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn mark_text(&self, text: &str, keep_think_tags: bool) -> String {
        let mut marked = String::with_capacity(text.len());
        for (at, character) in text.char_indices() {
            marked.push(character);
            let rest = &text[at..];
            let kept = keep_think_tags && THINK_TAGS.iter().any(|tag| rest.starts_with(tag));
            // A token, or the beginning of one that what follows in the prompt could complete.
            let risky = |token: &str| rest.starts_with(token) || token.starts_with(rest);
            if !kept
                && self
                    .tokenizer
                    .added()
                    .iter()
                    .any(|(token, ..)| token.starts_with(character) && risky(token))
            {
                marked.push(self.mark);
            }
        }
        marked
    }

    /// The rendered text without marks, and its ids.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer, marked: &str) -> Result<(String, Vec<u32>), Error> {
        if !marked.contains(self.mark) {
            return Ok((marked.to_owned(), tokenizer.encode_as_given(marked)?));
        }
        let mut ids = Vec::new();
        let mut plain_from = 0;
        let mut at = 0;
        while let Some(character) = marked[at..].chars().next() {
            let token = tokenizer.added().iter().find(|(token, ..)| marked[at..].starts_with(token));
            let Some((token, id, _)) = token else {
                at += character.len_utf8();
                continue;
            };
            self.encode_plain(&marked[plain_from..at], &mut ids)?;
            ids.push(*id);
            at += token.len();
            plain_from = at;
        }
        self.encode_plain(&marked[plain_from..], &mut ids)?;
        Ok((marked.replace(self.mark, ""), ids))
    }

    fn encode_plain(&self, marked: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if !marked.is_empty() {
            ids.extend(self.tokenizer.encode_plain(&marked.replace(self.mark, ""))?);
        }
        Ok(())
    }
}

fn any_string(value: &Value, test: &dyn Fn(&str) -> bool) -> bool {
    match value {
        Value::String(text) => test(text),
        Value::Array(items) => items.iter().any(|item| any_string(item, test)),
        Value::Object(fields) => fields.iter().any(|(key, value)| test(key) || any_string(value, test)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}
