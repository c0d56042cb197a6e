//! Which forms of a message a template reads, found out by rendering small conversations: what templates do with content
//! parts and arguments cannot be told from their source.

use serde_json::{Map, Value, json};

use super::Template;
use crate::ChatInput;

/// Roles whose content can be a list of parts.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// Words that no template prints by itself.
const FIRST: &str = "qfirstq";
const SECOND: &str = "qsecondq";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Forms {
    /// Roles whose parts the template goes through itself.
    pub(super) part_roles: Vec<&'static str>,
    /// Arguments of tool calls are read as objects.
    pub(super) argument_objects: bool,
}

impl Forms {
    pub(super) fn probe(template: &Template) -> Self {
        let argument_objects = reads(template, call(json!({ FIRST: SECOND }), json!("x")));
        let arguments = if argument_objects { json!({ "a": "b" }) } else { json!("{}") };
        let parts = json!([{ "type": "text", "text": FIRST }, { "type": "text", "text": SECOND }]);
        let user = json!({ "role": "user", "content": "x" });
        let conversation = |role: &str| match role {
            "tool" => call(arguments.clone(), parts.clone()),
            "system" => vec![json!({ "role": role, "content": parts }), user.clone()],
            "assistant" => vec![user.clone(), json!({ "role": role, "content": parts }), user.clone()],
            _ => vec![json!({ "role": role, "content": parts })],
        };
        let part_roles = ROLES.into_iter().filter(|role| reads(template, conversation(role))).collect();
        Self { part_roles, argument_objects }
    }
}

/// A conversation with a tool call and its answer.
fn call(arguments: Value, answer: Value) -> Vec<Value> {
    // Nine characters: some templates insist.
    let id = "call00001";
    let function = json!({ "name": "f", "arguments": arguments });
    vec![
        json!({ "role": "user", "content": "x" }),
        json!({ "role": "assistant", "content": null, "tool_calls": [{ "id": id, "type": "function", "function": function }] }),
        json!({ "role": "tool", "content": answer, "tool_call_id": id, "name": "f" }),
    ]
}

/// True if both words are printed, and not as a list or an object that Python prints.
fn reads(template: &Template, messages: Vec<Value>) -> bool {
    let function =
        json!({ "name": "f", "description": "x", "parameters": { "type": "object", "properties": {} } });
    let input = ChatInput {
        messages: Value::Array(messages),
        tools: json!([{ "type": "function", "function": function }]),
        kwargs: Map::new(),
        add_generation_prompt: true,
        now: Some("2026-01-02".to_owned()),
        as_given: false,
    };
    let Ok(text) = template.render(&input) else { return false };
    let printed = |word: &str| text.contains(word) && !text.contains(&format!("'{word}'"));
    // Parts as JSON are no text either.
    printed(FIRST) && printed(SECOND) && !text.contains(&format!("\"text\": \"{FIRST}\""))
}
