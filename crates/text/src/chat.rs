//! Messages → prompt: through the checkpoint's jinja template, or a format that exists only as code.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    Error, FormatName, Options, formats, read, read_json,
    template::{Template, json},
    tokenizer::named_tokens,
};

/// A conversation in OpenAI's form.
#[derive(Clone, Debug)]
pub struct ChatInput {
    /// An array of messages.
    pub messages: Value,
    /// An array of tools, or null.
    pub tools: Value,
    /// Further variables of the template: `thinking`, `enable_thinking`, …
    pub kwargs: Map<String, Value>,
    pub add_generation_prompt: bool,
    /// The date that `strftime_now` reads, `2026-01-02`; now, in UTC, where it is absent.
    pub now: Option<String>,
    /// Arguments of tool calls and names of fields reach the format as they are, as in transformers. Otherwise arguments
    /// are brought into the form that the format reads, and reasoning goes by all the names that it has.
    pub as_given: bool,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    pub ids: Vec<u32>,
    /// The answer begins inside `<think>`.
    pub starts_in_reasoning: bool,
}

/// How a checkpoint's conversations look.
pub struct ChatFormat(Kind);

enum Kind {
    Templates(Box<Templates>),
    Code(FormatName),
}

struct Templates {
    plain: Template,
    /// Another one for requests with tools.
    with_tools: Option<Template>,
}

impl Templates {
    fn of(&self, input: &ChatInput) -> &Template {
        let has_tools = input.tools.as_array().is_some_and(|tools| !tools.is_empty());
        self.with_tools.as_ref().filter(|_| has_tools).unwrap_or(&self.plain)
    }
}

impl ChatFormat {
    /// In this order: the options, `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`, the format of
    /// the architecture. [`Error::NoTemplate`] if there is none, or one of the checkpoint's that is no template.
    pub(crate) fn load(dir: &Path, options: &Options) -> Result<Self, Error> {
        let named = named_tokens(dir)?;
        if let Some(path) = &options.chat_template {
            let name = path.display().to_string();
            let source = read(path)?
                .ok_or_else(|| Error::Checkpoint(format!("chat template {name} does not exist")))?;
            let template = Template::new(&name, source, named).map_err(Error::Checkpoint)?;
            return Ok(Self::templates(template, None));
        }
        if let Some(format) = options.chat_format {
            return Ok(Self(Kind::Code(format)));
        }
        let compile = |name: &str, source: Vec<u8>| {
            Template::new(name, source, named.clone()).map_err(|what| {
                Error::NoTemplate(format!("{what}; give another template with --chat-template"))
            })
        };
        if let Some(source) = read(&dir.join("chat_template.jinja"))? {
            let with_tools = "additional_chat_templates/tool_use.jinja";
            let with_tools =
                read(&dir.join(with_tools))?.map(|source| compile(with_tools, source)).transpose()?;
            return Ok(Self::templates(compile("chat_template.jinja", source)?, with_tools));
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            let config = read_json(&dir.join(file))?.unwrap_or(Value::Null);
            match &config["chat_template"] {
                Value::String(source) => {
                    return Ok(Self::templates(compile(file, source.clone().into_bytes())?, None));
                }
                Value::Array(list) => {
                    let find = |name: &str| {
                        let entry = list.iter().find(|entry| entry["name"] == name)?;
                        let source = entry["template"].as_str()?.to_owned().into_bytes();
                        Some(compile(&format!("{file}, {name}"), source))
                    };
                    let default = find("default").transpose()?.ok_or_else(|| {
                        Error::NoTemplate(format!("{file} has no template named \"default\""))
                    })?;
                    return Ok(Self::templates(default, find("tool_use").transpose()?));
                }
                _ => {}
            }
        }
        let config = read_json(&dir.join("config.json"))?.unwrap_or(Value::Null);
        let architecture = config["architectures"][0].as_str().unwrap_or_default();
        FormatName::of_architecture(architecture).map(|format| Self(Kind::Code(format))).ok_or_else(|| {
            Error::NoTemplate("the checkpoint has no chat template; give one with --chat-template".to_owned())
        })
    }

    fn templates(plain: Template, with_tools: Option<Template>) -> Self {
        Self(Kind::Templates(Box::new(Templates { plain, with_tools })))
    }

    /// Text that the format itself writes, among other text.
    pub(crate) fn literals(&self) -> String {
        match &self.0 {
            Kind::Code(_) => formats::LITERALS.concat(),
            Kind::Templates(templates) => {
                let with_tools = templates.with_tools.as_ref().map_or("", Template::source);
                format!("{}\0{with_tools}", templates.plain.source())
            }
        }
    }

    /// The conversation in the form that the format reads. Nothing in it is JSON text that is parsed later: what a request
    /// spells shows from here on.
    pub(crate) fn prepare(&self, input: &ChatInput) -> Result<ChatInput, Error> {
        let mut input = input.clone();
        let (template, separator) = match &self.0 {
            Kind::Templates(templates) => (Some(templates.of(&input)), "\n"),
            Kind::Code(format) => (None, formats::part_separator(*format)),
        };
        let as_given = input.as_given;
        let messages = input.messages.as_array_mut();
        let messages = messages.ok_or_else(|| Error::messages("messages", "messages is not a list"))?;
        for (at, message) in messages.iter_mut().enumerate() {
            if !message.is_object() {
                return Err(Error::messages(format!("messages[{at}]"), "a message is not an object"));
            }
            if message["content"].is_array() {
                let text = text_of_parts(at, &message["content"], separator)?;
                let role = message["role"].as_str().unwrap_or_default();
                if !template.is_some_and(|template| template.takes_parts(role)) {
                    message["content"] = Value::String(text);
                }
            }
            let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
            let calls = calls.map(Vec::as_mut_slice).unwrap_or_default();
            match template {
                None => parse_arguments(calls),
                Some(_) if as_given => {}
                Some(template) if template.takes_argument_objects() => parse_arguments(calls),
                Some(_) => print_arguments(calls),
            }
            if template.is_some() && !as_given {
                name_reasoning(message);
            }
        }
        Ok(input)
    }

    /// The prompt's text, of a prepared conversation.
    pub(crate) fn render(&self, input: &ChatInput) -> Result<String, Error> {
        match &self.0 {
            Kind::Templates(templates) => templates.of(input).render(input),
            Kind::Code(format) => formats::render(*format, input),
        }
    }
}

/// The text of text parts.
fn text_of_parts(at: usize, content: &Value, separator: &str) -> Result<String, Error> {
    let parts = content.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = parts.iter().enumerate().map(|(part_idx, part)| {
        let param = |field: &str| format!("messages[{at}].content[{part_idx}].{field}");
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text),
            (Some("text"), None) => Err(Error::messages(param("text"), "a text part has no text")),
            (kind, _) => {
                let kind = kind.unwrap_or_default();
                let message = format!("content part type {kind:?} is not supported; only \"text\" is");
                Err(Error::messages(param("type"), message))
            }
        }
    });
    Ok(text.collect::<Result<Vec<_>, _>>()?.join(separator))
}

/// Arguments as JSON text → the object itself. Text that is no JSON stays text.
pub(crate) fn parse_arguments(calls: &mut [Value]) {
    for arguments in calls.iter_mut().filter_map(|call| call.pointer_mut("/function/arguments")) {
        match arguments.as_str() {
            Some("") => *arguments = Value::Object(Map::new()),
            Some(text) => {
                if let Ok(parsed) = serde_json::from_str(text) {
                    *arguments = parsed;
                }
            }
            None => {}
        }
    }
}

/// Arguments as an object → JSON text, for templates that print text.
fn print_arguments(calls: &mut [Value]) {
    for arguments in calls.iter_mut().filter_map(|call| call.pointer_mut("/function/arguments")) {
        if arguments.is_object() {
            *arguments = Value::String(json::dumps(arguments));
        }
    }
}

/// A message's reasoning under the names that templates read, whichever of its names the client used.
fn name_reasoning(message: &mut Value) {
    let names = ["reasoning_content", "reasoning", "thinking"];
    let reasoning = names.iter().map(|name| &message[*name]).find(|reasoning| !reasoning.is_null()).cloned();
    if let (Some(reasoning), Some(fields)) = (reasoning, message.as_object_mut()) {
        for name in ["reasoning_content", "thinking"] {
            if fields.get(name).is_none_or(Value::is_null) {
                fields.insert(name.to_owned(), reasoning.clone());
            }
        }
    }
}
