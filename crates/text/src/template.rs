//! Jinja templates as transformers renders them: block trimming, loop controls, Python's printing and string methods,
//! `tojson` as `json.dumps(ensure_ascii=False)`. They are a checkpoint's code, so they run with fuel and an output limit.

mod clock;
pub(crate) mod json;
mod probe;
mod python;
mod syntax;

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::Serde};
use probe::Forms;
use serde_json::{Map, json};

use crate::{ChatInput, Error, chat::parse_arguments};

/// Instructions a template may run: a conversation of a thousand messages takes about a tenth.
const FUEL: u64 = 10_000_000;
/// And for each of the small conversations that find out its forms.
const PROBE_FUEL: u64 = 100_000;
/// Bytes a template may print.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
const NAME: &str = "chat";

pub(crate) struct Template {
    /// What messages call it.
    name: String,
    environment: Environment<'static>,
    source: String,
    /// `bos_token` and its like.
    named_tokens: Map<String, serde_json::Value>,
    forms: Forms,
}

impl Template {
    /// Errors say what is wrong with the template of that `name`.
    pub(crate) fn new(
        name: &str,
        source: Vec<u8>,
        named_tokens: Map<String, serde_json::Value>,
    ) -> Result<Self, String> {
        let wrong = |what: String| format!("chat template {name}: {what}");
        let source = String::from_utf8(source).map_err(|error| wrong(error.to_string()))?;
        // Python reads files with universal newlines.
        let source = source.trim_start_matches('\u{feff}').replace("\r\n", "\n").replace('\r', "\n");
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| wrong(error.to_string()))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(PROBE_FUEL));
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python::print);
        minijinja_contrib::add_to_environment(&mut environment);
        environment.add_filter("tojson", json::tojson);
        environment.add_filter("string", python::to_string);
        environment.add_filter("escape", python::escape);
        environment.add_filter("e", python::escape);
        environment.add_test("sequence", python::is_sequence);
        environment.add_test("iterable", python::is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, syntax::without_extensions(&source))
            .map_err(|error| wrong(describe(&error)))?;
        let mut template =
            Self { name: name.to_owned(), environment, source, named_tokens, forms: Forms::default() };
        template.forms = Forms::probe(&template);
        template.environment.set_fuel(Some(FUEL));
        Ok(template)
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// True if the template goes through the content parts of a message of this role itself.
    pub(crate) fn takes_parts(&self, role: &str) -> bool {
        self.forms.part_roles.contains(&role)
    }

    /// True if the template reads a call's arguments as an object, not as text.
    pub(crate) fn takes_argument_objects(&self) -> bool {
        self.forms.argument_objects
    }

    /// Renders a conversation. A template that cannot take null content gets empty text; one that cannot take arguments
    /// as text gets objects.
    pub(crate) fn render(&self, input: &ChatInput) -> Result<String, Error> {
        let first = match self.render_once(input) {
            Ok(text) => return Ok(text),
            Err(error) => error,
        };
        let mut input = input.clone();
        let mut messages: Vec<&mut serde_json::Value> =
            input.messages.as_array_mut().into_iter().flatten().collect();
        let mut changed = false;
        for message in messages.iter_mut().filter(|message| message["content"].is_null()) {
            message["content"] = json!("");
            changed = true;
        }
        if changed && let Ok(text) = self.render_once(&input) {
            return Ok(text);
        }
        if input.as_given {
            let messages = input.messages.as_array_mut().into_iter().flatten();
            messages
                .filter_map(|message| message.get_mut("tool_calls")?.as_array_mut())
                .for_each(|calls| parse_arguments(calls));
            return self.render_once(&input).map_err(|_| first);
        }
        Err(first)
    }

    fn render_once(&self, input: &ChatInput) -> Result<String, Error> {
        let refused =
            |error: minijinja::Error| Error::Template(format!("{} ({})", describe(&error), self.name));
        let mut variables = input.kwargs.clone();
        variables.entry("documents").or_insert(serde_json::Value::Null);
        variables.extend(self.named_tokens.clone());
        variables.insert("messages".to_owned(), input.messages.clone());
        variables.insert("tools".to_owned(), input.tools.clone());
        variables.insert("add_generation_prompt".to_owned(), json!(input.add_generation_prompt));
        let now = input.now.clone();
        let strftime_now =
            Value::from_function(move |format: String| clock::strftime(now.as_deref(), &format));
        let variables = minijinja::context! { strftime_now, ..Value::from(Serde(variables)) };
        let output = Bounded::default();
        let template = self.environment.get_template(NAME).map_err(refused)?;
        template.render_captured_to(variables, output.clone()).map_err(refused)?;
        output.into_text()
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// What a person needs of a template's error: what and where, in one line.
fn describe(error: &minijinja::Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail}, line {line}"),
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
