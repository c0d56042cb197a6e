//! `/v1/chat/completions`: body → conversation, pieces → choices.

use proto::Error;
use serde_json::{Map, Value, json};
use text::ChatInput;

use super::{
    Head,
    fields::Fields,
    options::{self, Streaming},
    token,
};
use crate::{
    answer::{Delta, Finish, Usage},
    request::Options,
};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A chat request.
pub(crate) struct Request {
    pub(crate) input: ChatInput,
    pub(crate) n: usize,
    pub(crate) options: Options,
    pub(crate) streaming: Streaming,
}

impl Request {
    pub(crate) fn parse(fields: &Fields<'_>) -> Result<Self, Error> {
        let messages = fields.required("messages")?;
        check_messages(messages)?;
        let mut options = options::options(fields)?;
        let wants = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields.whole("top_logprobs", (0, 20))?;
        if top.is_some_and(|top| top > 0) && !wants {
            return Err(Error::invalid("top_logprobs", "top_logprobs goes with logprobs: true only"));
        }
        options.top_logprobs = wants.then(|| top.unwrap_or(0));
        fields.refuse("modalities", |value| *value == json!(["text"]))?;
        fields.refuse("audio", |_| false)?;
        fields.refuse("tool_choice", |value| value == "none" || value == "auto")?;
        fields.refuse("functions", |_| false)?;
        let no_tools = fields.get("tool_choice").is_some_and(|choice| choice == "none");
        let tools = fields.get("tools").filter(|_| !no_tools).cloned().unwrap_or(Value::Null);
        if !(tools.is_null() || tools.is_array()) {
            return Err(Error::invalid("tools", "tools is not a list"));
        }
        Ok(Self {
            input: ChatInput {
                messages: messages.clone(),
                tools,
                kwargs: template_kwargs(fields)?,
                add_generation_prompt: fields.flag("add_generation_prompt")?.unwrap_or(true),
                now: None,
                as_given: false,
            },
            n: options::n(fields)?,
            options,
            streaming: options::streaming(fields)?,
        })
    }
}

fn check_messages(messages: &Value) -> Result<(), Error> {
    let list = messages.as_array().ok_or_else(|| Error::invalid("messages", "messages is not a list"))?;
    if list.is_empty() {
        return Err(Error::invalid("messages", "messages is empty"));
    }
    for (at, message) in list.iter().enumerate() {
        let wrong = |field: &str, what: &str| {
            let param = format!("messages[{at}]{field}");
            let message = format!("{param} {what}");
            Error::invalid("messages", message).with_param(param)
        };
        if !message.is_object() {
            return Err(wrong("", "is not an object"));
        }
        match message["role"].as_str() {
            Some(role) if ROLES.contains(&role) => {}
            Some(role) => {
                return Err(wrong(".role", &format!("is {role:?}, wanted one of {}", ROLES.join(", "))));
            }
            None => return Err(wrong(".role", "is missing")),
        }
        let calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
        match &message["content"] {
            Value::String(_) | Value::Array(_) => {}
            Value::Null if message["role"] == "assistant" && calls => {}
            Value::Null => return Err(wrong(".content", "is missing")),
            _ => return Err(wrong(".content", "is neither a string nor a list of parts")),
        }
    }
    Ok(())
}

/// Variables for the template: the request's own, and the spellings of thinking that APIs have.
fn template_kwargs(fields: &Fields<'_>) -> Result<Map<String, Value>, Error> {
    let mut kwargs = match fields.get("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(kwargs)) => kwargs.clone(),
        Some(_) => {
            return Err(Error::invalid("chat_template_kwargs", "chat_template_kwargs is not an object"));
        }
    };
    let mut thinking = fields.flag("enable_thinking")?;
    match fields.get("thinking") {
        None => {}
        Some(Value::Bool(flag)) => thinking = Some(*flag),
        Some(value) => match value["type"].as_str() {
            Some("enabled") => thinking = Some(true),
            Some("disabled") => thinking = Some(false),
            _ => {
                return Err(Error::invalid(
                    "thinking",
                    "thinking is not {\"type\": \"enabled\" | \"disabled\"}",
                ));
            }
        },
    }
    if let Some(thinking) = thinking {
        for key in ["thinking", "enable_thinking"] {
            kwargs.entry(key).or_insert(json!(thinking));
        }
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        kwargs.entry("reasoning_effort").or_insert(json!(effort));
    }
    Ok(kwargs)
}

const WHOLE: &str = "chat.completion";
const CHUNK: &str = "chat.completion.chunk";

/// One choice as it comes together.
#[derive(Clone, Default)]
pub(crate) struct Choice {
    reasoning: String,
    content: String,
    logprobs: Vec<Value>,
    finish: Option<Finish>,
}

/// A whole answer.
pub(crate) struct Whole {
    choices: Vec<Choice>,
    usage: Usage,
    wants_logprobs: bool,
}

impl Whole {
    pub(crate) fn new(n: usize, wants_logprobs: bool) -> Self {
        Self { choices: vec![Choice::default(); n], usage: Usage::default(), wants_logprobs }
    }

    pub(crate) fn add(&mut self, delta: Delta) {
        let first = self.usage.prompt_tokens == 0;
        let choice = &mut self.choices[delta.choice];
        choice.reasoning.push_str(&delta.reasoning);
        choice.content.push_str(&delta.content);
        choice.logprobs.extend(delta.logprobs.iter().map(token));
        if let Some((finish, usage)) = delta.end {
            choice.finish = Some(finish);
            self.usage.add(usage, !first);
        }
    }

    pub(crate) const fn usage(&self) -> &Usage {
        &self.usage
    }

    pub(crate) fn into_json(self, head: &Head) -> Value {
        let wants_logprobs = self.wants_logprobs;
        let choices = self.choices.into_iter().enumerate().map(|(index, choice)| {
            let mut message = json!({ "role": "assistant", "content": choice.content, "refusal": null });
            if !choice.reasoning.is_empty() {
                // Two names: DeepSeek's and the one that newer servers use.
                message["reasoning_content"] = json!(choice.reasoning);
                message["reasoning"] = json!(choice.reasoning);
            }
            json!({
                "index": index,
                "message": message,
                "logprobs": if wants_logprobs { json!({ "content": choice.logprobs }) } else { Value::Null },
                "finish_reason": choice.finish.map(Finish::as_str),
            })
        });
        head.around_with_usage(WHOLE, choices.collect(), &self.usage)
    }
}

/// The first chunk of a choice: it names the role.
pub(crate) fn role_chunk(head: &Head, index: usize) -> Value {
    head.around(CHUNK, json!([{ "index": index, "delta": { "role": "assistant", "content": "" }, "logprobs": null, "finish_reason": null }]))
}

/// A piece as a chunk.
pub(crate) fn delta_chunk(head: &Head, delta: &Delta) -> Value {
    let mut fields = Map::new();
    if !delta.reasoning.is_empty() {
        fields.insert("reasoning_content".to_owned(), json!(delta.reasoning));
        fields.insert("reasoning".to_owned(), json!(delta.reasoning));
    }
    if !delta.content.is_empty() {
        fields.insert("content".to_owned(), json!(delta.content));
    }
    let logprobs: Vec<Value> = delta.logprobs.iter().map(token).collect();
    let choice = json!({
        "index": delta.choice,
        "delta": fields,
        "logprobs": if logprobs.is_empty() { Value::Null } else { json!({ "content": logprobs }) },
        "finish_reason": delta.end.map(|(finish, _)| finish.as_str()),
    });
    head.around(CHUNK, json!([choice]))
}

/// The extra chunk with usage, and no choice.
pub(crate) fn usage_chunk(head: &Head, total: &Usage) -> Value {
    head.around_with_usage(CHUNK, json!([]), total)
}
