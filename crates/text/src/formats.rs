//! Prompt formats that exist only as code: DeepSeek-V3.2 and V4 ship no chat template. What they share is here: DSML, the
//! markup of tool calls.

mod deepseek_v32;
mod deepseek_v4;

use serde_json::{Map, Value};

use crate::{ChatInput, Error, template::json};

/// A format by name, as `--chat-format` takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatName {
    DeepSeekV32,
    DeepSeekV4,
}

impl FormatName {
    pub const ALL: [Self; 2] = [Self::DeepSeekV32, Self::DeepSeekV4];

    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeepSeekV32 => "deepseek-v3.2",
            Self::DeepSeekV4 => "deepseek-v4",
        }
    }

    pub(crate) fn of_architecture(architecture: &str) -> Option<Self> {
        match architecture {
            "DeepseekV32ForCausalLM" => Some(Self::DeepSeekV32),
            "DeepseekV4ForCausalLM" => Some(Self::DeepSeekV4),
            _ => None,
        }
    }
}

impl std::str::FromStr for FormatName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            format!("unknown chat format {name:?}; known are {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

impl std::fmt::Display for FormatName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Words of the formats that are added tokens and look like text.
pub(crate) const LITERALS: [&str; 2] = [THINK, END_THINK];

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
const THINK: &str = "<think>";
const END_THINK: &str = "</think>";

/// What stands between text parts of one message.
pub(crate) const fn part_separator(format: FormatName) -> &'static str {
    match format {
        FormatName::DeepSeekV32 => "\n",
        FormatName::DeepSeekV4 => "\n\n",
    }
}

/// Renders a conversation; tools, thinking and reasoning effort come from the request's other fields.
pub(crate) fn render(format: FormatName, input: &ChatInput) -> Result<String, Error> {
    // The V3.2 encoder itself knows a message's reasoning as `reasoning` alone; clients send `reasoning_content`.
    let reads_content_name = format == FormatName::DeepSeekV4 || !input.as_given;
    let messages = input.messages.as_array().map(Vec::as_slice).unwrap_or_default();
    let messages: Vec<Message> = messages
        .iter()
        .enumerate()
        .map(|(at, message)| Message::read(at, message, reads_content_name))
        .collect::<Result<_, _>>()?;
    match format {
        FormatName::DeepSeekV32 => deepseek_v32::render(messages, input),
        FormatName::DeepSeekV4 => deepseek_v4::render(messages, input),
    }
}

/// A message as the formats see it. Null and absent content are empty.
#[derive(Clone, Debug, Default)]
struct Message {
    /// Position in the request, for errors.
    at: usize,
    role: String,
    content: String,
    reasoning: String,
    tool_calls: Vec<ToolCall>,
    tool_call_id: String,
    tools: Vec<Value>,
    /// A schema that the answer must keep to.
    response_format: Option<Value>,
    /// What V4 shall do with the turn instead of answering it.
    task: Option<String>,
    /// An assistant's turn that is not over: the answer continues it.
    is_open: bool,
}

#[derive(Clone, Debug)]
struct ToolCall {
    id: String,
    name: String,
    arguments: Map<String, Value>,
}

impl Message {
    fn read(at: usize, message: &Value, reads_content_name: bool) -> Result<Self, Error> {
        let text = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
        let names = if reads_content_name { &["reasoning_content", "reasoning"][..] } else { &["reasoning"] };
        let reasoning = names.iter().find(|name| message[**name].is_string()).map(|name| text(name));
        let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Self {
            at,
            role: text("role"),
            content: text("content"),
            reasoning: reasoning.unwrap_or_default(),
            tool_calls: calls
                .iter()
                .enumerate()
                .map(|(i, call)| ToolCall::read(at, i, call))
                .collect::<Result<_, _>>()?,
            tool_call_id: text("tool_call_id"),
            tools: message["tools"].as_array().cloned().unwrap_or_default(),
            response_format: message.get("response_format").filter(|format| is_truthy(format)).cloned(),
            task: message["task"].as_str().map(str::to_owned),
            is_open: ["prefix", "wo_eos"].iter().any(|key| message[*key] == true),
        })
    }

    fn refuse(&self, why: &str) -> Error {
        Error::messages(
            format!("messages[{}]", self.at),
            format!("messages[{}] ({}): {why}", self.at, self.role),
        )
    }

    fn is_user(&self) -> bool {
        matches!(self.role.as_str(), "user" | "developer")
    }

    /// Tools and answer format, each behind an empty line.
    fn appendix(&self, tools_text: fn(&[Value]) -> String) -> String {
        let mut appendix = String::new();
        if !self.tools.is_empty() {
            appendix.push_str("\n\n");
            appendix.push_str(&tools_text(&self.tools));
        }
        if let Some(schema) = &self.response_format {
            appendix.push_str(
                "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n",
            );
            appendix.push_str(&json::dumps(schema));
        }
        appendix
    }
}

/// `bool(value)` in Python.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

impl ToolCall {
    fn read(at: usize, call_idx: usize, call: &Value) -> Result<Self, Error> {
        let param = format!("messages[{at}].tool_calls[{call_idx}].function");
        let name = call["function"]["name"].as_str();
        let name =
            name.ok_or_else(|| Error::messages(format!("{param}.name"), "a tool call has no function name"))?;
        let wrong = || Error::messages(format!("{param}.arguments"), "arguments are not a JSON object");
        let arguments = call["function"]["arguments"].as_object().ok_or_else(wrong)?.clone();
        let id = call["id"].as_str().unwrap_or_default().to_owned();
        Ok(Self { id, name: name.to_owned(), arguments })
    }
}

/// The calls in DSML, in a block of that name.
fn dsml(calls: &[ToolCall], block: &str) -> String {
    let parameter = |(key, value): (&String, &Value)| {
        let (is_string, text) = match value {
            Value::String(text) => (true, text.clone()),
            other => (false, json::dumps(other)),
        };
        format!("<｜DSML｜parameter name=\"{key}\" string=\"{is_string}\">{text}</｜DSML｜parameter>")
    };
    let call = |call: &ToolCall| {
        let parameters: Vec<String> = call.arguments.iter().map(parameter).collect();
        format!("<｜DSML｜invoke name=\"{}\">\n{}\n</｜DSML｜invoke>", call.name, parameters.join("\n"))
    };
    let calls: Vec<String> = calls.iter().map(call).collect();
    format!("<｜DSML｜{block}>\n{}\n</｜DSML｜{block}>", calls.join("\n"))
}

/// The functions of OpenAI's tools, a JSON line each.
fn schemas(tools: &[Value]) -> String {
    let lines: Vec<String> = tools.iter().map(|tool| json::dumps(&tool["function"])).collect();
    lines.join("\n")
}

fn last_user(messages: &[Message]) -> Option<usize> {
    messages.iter().rposition(Message::is_user)
}

/// Whether the request wants the answer to begin with reasoning; None if it does not say.
fn thinking_of(input: &ChatInput) -> Option<bool> {
    ["thinking", "enable_thinking"].iter().find_map(|key| input.kwargs.get(*key)?.as_bool())
}

/// The request's own tools, if it has any.
fn tools_of(input: &ChatInput) -> Vec<Value> {
    input.tools.as_array().cloned().unwrap_or_default()
}
