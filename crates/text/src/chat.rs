//! Messages → prompt: through the checkpoint's jinja template, or a format that exists only as code.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, FormatName, Options, Tokenizer, formats, read, read_json, reasoning, template::Template};

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
    /// The date that `strftime_now` reads, `2026-01-02`; today where it is absent.
    pub now: Option<String>,
    /// Messages reach the template as they are, as in transformers. Otherwise their arguments and content are brought
    /// into the form that the template reads.
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

impl Prompt {
    pub(crate) fn new(text: String, ids: Vec<u32>) -> Self {
        Self { starts_in_reasoning: reasoning::ends_open(&text), text, ids }
    }
}

/// How a checkpoint's conversations look.
pub struct ChatFormat(Kind);

enum Kind {
    /// For requests without and with tools; often the same.
    Templates {
        plain: Box<Template>,
        with_tools: Option<Box<Template>>,
    },
    Code(FormatName),
}

impl ChatFormat {
    /// In this order: the options, `chat_template.jinja`, `chat_template.json`, `tokenizer_config.json`, the format of
    /// the architecture. [`Error::NoTemplate`] if there is none.
    pub(crate) fn load(dir: &Path, options: &Options) -> Result<Self, Error> {
        if let Some(path) = &options.chat_template {
            let source = read(path)?.ok_or_else(|| {
                Error::Checkpoint(format!("chat template {} does not exist", path.display()))
            })?;
            return Self::single(&path.display().to_string(), source);
        }
        if let Some(format) = options.chat_format {
            return Ok(Self(Kind::Code(format)));
        }
        if let Some(source) = read(&dir.join("chat_template.jinja"))? {
            return Self::single("chat_template.jinja", source);
        }
        for file in ["chat_template.json", "tokenizer_config.json"] {
            let config = read_json(&dir.join(file))?.unwrap_or(Value::Null);
            match &config["chat_template"] {
                Value::String(source) => return Self::single(file, source.clone().into_bytes()),
                Value::Array(list) => return Self::listed(file, list),
                _ => {}
            }
        }
        let config = read_json(&dir.join("config.json"))?.unwrap_or(Value::Null);
        let architecture = config["architectures"][0].as_str().unwrap_or_default();
        FormatName::of_architecture(architecture).map(|format| Self(Kind::Code(format))).ok_or_else(|| {
            Error::NoTemplate("the checkpoint has no chat template; give one with --chat-template".to_owned())
        })
    }

    fn single(name: &str, source: Vec<u8>) -> Result<Self, Error> {
        Ok(Self(Kind::Templates { plain: Box::new(Template::new(name, source)?), with_tools: None }))
    }

    fn listed(file: &str, list: &[Value]) -> Result<Self, Error> {
        let find = |name: &str| {
            list.iter().find(|entry| entry["name"] == name).and_then(|entry| entry["template"].as_str())
        };
        let compile = |name: &str| {
            let source = find(name).map(|source| source.to_owned().into_bytes());
            source
                .map(|source| Template::new(&format!("{file}, template {name}"), source).map(Box::new))
                .transpose()
        };
        let default = compile("default")?;
        let plain =
            default.ok_or_else(|| Error::NoTemplate(format!("{file} has no template named \"default\"")))?;
        Ok(Self(Kind::Templates { plain, with_tools: compile("tool_use")? }))
    }

    /// The prompt's text.
    pub(crate) fn render(&self, input: &ChatInput, tokenizer: &Tokenizer) -> Result<String, Error> {
        let messages =
            input.messages.as_array().ok_or_else(|| Error::messages("messages", "messages is not a list"))?;
        match &self.0 {
            Kind::Code(format) => formats::render(*format, messages, input),
            Kind::Templates { plain, with_tools } => {
                let has_tools = input.tools.as_array().is_some_and(|tools| !tools.is_empty());
                let template = with_tools.as_ref().filter(|_| has_tools).unwrap_or(plain);
                if input.as_given {
                    return template.render(messages, input, &tokenizer.named);
                }
                let messages = messages.iter().enumerate().map(|(at, message)| adapt(at, message, template));
                template.render(&messages.collect::<Result<Vec<_>, _>>()?, input, &tokenizer.named)
            }
        }
    }
}

/// Brings a message into the form that `template` reads.
fn adapt(at: usize, message: &Value, template: &Template) -> Result<Value, Error> {
    let mut message = message.clone();
    if message["content"].is_array() {
        let text = text_of_parts(at, &message["content"])?;
        if !template.iterates_content() {
            message["content"] = Value::String(text);
        }
    }
    if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut)
        && template.reads_argument_objects()
    {
        parse_arguments(calls);
    }
    Ok(message)
}

/// Text parts, joined by line ends.
pub(crate) fn text_of_parts(at: usize, content: &Value) -> Result<String, Error> {
    let parts = content.as_array().map(Vec::as_slice).unwrap_or_default();
    let text = parts.iter().enumerate().map(|(part_idx, part)| {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text),
            (Some("text"), None) => Err(Error::messages(
                format!("messages[{at}].content[{part_idx}].text"),
                "a text part has no text",
            )),
            (kind, _) => Err(Error::messages(
                format!("messages[{at}].content[{part_idx}].type"),
                format!(
                    "content part type {:?} is not supported; only \"text\" is",
                    kind.unwrap_or_default()
                ),
            )),
        }
    });
    Ok(text.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

/// Arguments as JSON text → the object itself. Text that is no JSON stays text.
pub(crate) fn parse_arguments(calls: &mut [Value]) {
    for call in calls {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str(text).ok())
        {
            *arguments = parsed;
        }
    }
}
