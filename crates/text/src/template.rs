//! Jinja templates as transformers renders them: block trimming, loop controls, Python's printing and string methods,
//! `tojson` as `json.dumps(ensure_ascii=False)`. They are a checkpoint's code, so they run with fuel and an output limit.

pub(crate) mod json;
mod python;

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::Serde};
use serde_json::json;

use crate::{ChatInput, Error, chat::parse_arguments, tokenizer::NamedTokens};

/// Instructions a template may run: a conversation of a thousand messages takes about a tenth.
const FUEL: u64 = 10_000_000;
/// Bytes a template may print.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
const NAME: &str = "chat";

pub(crate) struct Template {
    environment: Environment<'static>,
    source: String,
}

impl Template {
    /// `name` is what messages call it.
    pub(crate) fn new(name: &str, source: Vec<u8>) -> Result<Self, Error> {
        let wrong = |what: String| Error::Checkpoint(format!("chat template {name}: {what}"));
        let source = String::from_utf8(source).map_err(|error| wrong(error.to_string()))?;
        // Python reads files with universal newlines and this byte order mark.
        let source = source.trim_start_matches('\u{feff}').replace("\r\n", "\n");
        let source = without_generation_tags(&source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| wrong(error.to_string()))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python::print);
        environment.add_filter("tojson", json::tojson);
        environment.add_filter("string", python::to_string);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, source.clone()).map_err(|error| wrong(describe(&error)))?;
        Ok(Self { environment, source })
    }

    /// True if the template goes through a message's content itself.
    pub(crate) fn iterates_content(&self) -> bool {
        let squeezed = self.squeezed();
        [
            "incontent",
            "inmessage.content",
            "inmessage['content']",
            "inmessage[\"content\"]",
            "inm.content",
            "inm['content']",
            "contentisiterable",
            "contentisstring",
        ]
        .iter()
        .any(|needle| squeezed.contains(needle))
    }

    /// True if the template reads a call's arguments as an object and not as text.
    pub(crate) fn reads_argument_objects(&self) -> bool {
        let squeezed = self.squeezed();
        [
            "arguments|items",
            "arguments.items(",
            "arguments|tojson",
            "arguments'].items(",
            "arguments']|items",
            "arguments']|tojson",
        ]
        .iter()
        .any(|needle| squeezed.contains(needle))
    }

    fn squeezed(&self) -> String {
        self.source.chars().filter(|character| !character.is_whitespace()).collect()
    }

    /// Renders `messages`. A template that cannot take null content gets empty text, and one that cannot take arguments
    /// as text gets objects.
    pub(crate) fn render(
        &self,
        messages: &[serde_json::Value],
        input: &ChatInput,
        named: &NamedTokens,
    ) -> Result<String, Error> {
        let first = match self.render_once(messages, input, named) {
            Ok(text) => return Ok(text),
            Err(error) => error,
        };
        let mut messages = messages.to_vec();
        let has_null = messages.iter().any(|message| message["content"].is_null());
        if has_null {
            for message in &mut messages {
                if message["content"].is_null() {
                    message["content"] = json!("");
                }
            }
            if let Ok(text) = self.render_once(&messages, input, named) {
                return Ok(text);
            }
        }
        for calls in messages.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut()) {
            parse_arguments(calls);
        }
        self.render_once(&messages, input, named).map_err(|_| first)
    }

    fn render_once(
        &self,
        messages: &[serde_json::Value],
        input: &ChatInput,
        named: &NamedTokens,
    ) -> Result<String, Error> {
        let refused = |error: minijinja::Error| Error::Template(describe(&error));
        let now = input.now.clone();
        let mut variables = input.kwargs.clone();
        variables.insert("messages".to_owned(), json!(messages));
        variables.insert("tools".to_owned(), input.tools.clone());
        variables.insert("documents".to_owned(), serde_json::Value::Null);
        variables.insert("add_generation_prompt".to_owned(), json!(input.add_generation_prompt));
        let tokens = [("bos_token", &named.bos), ("eos_token", &named.eos), ("pad_token", &named.pad)];
        for (name, token) in tokens {
            if let Some(token) = token {
                variables.insert(name.to_owned(), json!(token));
            }
        }
        let strftime_now =
            Value::from_function(move |format: String| python::strftime(now.as_deref(), &format));
        let variables = minijinja::context! { strftime_now, ..Value::from(Serde(variables)) };
        let output = Bounded::default();
        let template = self.environment.get_template(NAME).map_err(refused)?;
        template.render_captured_to(variables, output.clone()).map_err(refused)?;
        output.into_text()
    }
}

/// Jinja's `{% generation %}` marks what a model said, for training; it prints nothing.
fn without_generation_tags(source: &str) -> String {
    let mut rest = source;
    let mut out = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + len + 2];
        let word = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        if matches!(word, "generation" | "endgeneration") {
            // The tag's white-space control stays, on a tag that does nothing.
            out.push_str(&tag.replacen(word, "set generation_tag = none", 1));
        } else {
            out.push_str(tag);
        }
        rest = &rest[start + len + 2..];
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// What a person needs of a template's error: what and where, in one line.
fn describe(error: &minijinja::Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line})"),
        None => detail,
    }
}

/// Where a template prints to; shared with the writer that the engine takes.
#[derive(Clone, Default)]
struct Bounded(Arc<std::sync::Mutex<Vec<u8>>>);

impl Bounded {
    fn into_text(self) -> Result<String, Error> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        String::from_utf8(bytes).map_err(|error| Error::Template(error.to_string()))
    }
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut output = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if output.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(std::io::Error::other(format!("it prints more than {OUTPUT_BYTES_MAX} bytes")));
        }
        output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
