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

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
const THINK: &str = "<think>";
const END_THINK: &str = "</think>";

/// Renders `messages`; tools, thinking and reasoning effort come from the request's other fields.
pub(crate) fn render(format: FormatName, messages: &[Value], input: &ChatInput) -> Result<String, Error> {
    // The V3.2 encoder itself knows a message's reasoning as `reasoning` alone; clients send `reasoning_content`.
    let reads_content_name = format == FormatName::DeepSeekV4 || !input.as_given;
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
        let content = match &message["content"] {
            Value::Array(_) => crate::chat::text_of_parts(at, &message["content"])?,
            _ => text("content"),
        };
        let mut reasoning = text("reasoning");
        if reasoning.is_empty() && reads_content_name {
            reasoning = text("reasoning_content");
        }
        let calls = message["tool_calls"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(Self {
            at,
            role: text("role"),
            content,
            reasoning,
            tool_calls: calls
                .iter()
                .enumerate()
                .map(|(i, call)| ToolCall::read(at, i, call))
                .collect::<Result<_, _>>()?,
            tool_call_id: text("tool_call_id"),
            tools: message["tools"].as_array().cloned().unwrap_or_default(),
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
}

impl ToolCall {
    fn read(at: usize, call_idx: usize, call: &Value) -> Result<Self, Error> {
        let param = format!("messages[{at}].tool_calls[{call_idx}].function");
        let name = call["function"]["name"].as_str();
        let name =
            name.ok_or_else(|| Error::messages(format!("{param}.name"), "a tool call has no function name"))?;
        let wrong = || Error::messages(format!("{param}.arguments"), "arguments are not a JSON object");
        let arguments = match &call["function"]["arguments"] {
            Value::String(text) => serde_json::from_str(text).map_err(|_| wrong())?,
            Value::Object(arguments) => arguments.clone(),
            _ => return Err(wrong()),
        };
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

/// The request's own tools, if it has any.
fn tools_of(input: &ChatInput) -> Vec<Value> {
    input.tools.as_array().cloned().unwrap_or_default()
}
