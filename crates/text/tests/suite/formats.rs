//! The formats that exist only as code: what their encoders give.

use std::path::Path;

use serde_json::{Map, Value, json};
use text::{ChatInput, FormatName, Options, TextModel};

use crate::folder::{Folder, ask};

fn model(format: FormatName) -> TextModel {
    let options = Options { chat_format: Some(format), ..Options::default() };
    TextModel::load(Folder::new(&Value::Null).path(), &options).unwrap()
}

/// Every prompt of the golden cases; their ids need the real tokenizers.
fn check_cases(format: FormatName, n_cases: usize) {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/text/cases"));
    let cases = std::fs::read_to_string(dir.join(format!("{format}.jsonl"))).unwrap();
    let cases = cases.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let chats: Vec<Value> = cases.filter(|case| case["kind"] == "chat").collect();
    assert_eq!(chats.len(), n_cases);
    let model = model(format);
    for case in chats {
        let input = ChatInput {
            messages: case["messages"].clone(),
            tools: case["tools"].clone(),
            kwargs: case["kwargs"].as_object().cloned().unwrap_or_default(),
            as_given: true,
            ..ask(Value::Null)
        };
        match model.prompt(&input) {
            Ok(prompt) => assert_eq!(json!(prompt.text), case["prompt"], "{case}"),
            Err(error) => assert_eq!(case["error"], true, "{error}: {case}"),
        }
    }
}

#[test]
fn deepseek_v32_agrees_with_its_golden_cases() {
    check_cases(FormatName::DeepSeekV32, 26);
}

#[test]
fn deepseek_v4_agrees_with_its_golden_cases() {
    check_cases(FormatName::DeepSeekV4, 52);
}

/// What stands behind the beginning of sequence.
fn prompt(format: FormatName, messages: Value, kwargs: Value) -> Result<String, String> {
    let kwargs: Map<String, Value> = kwargs.as_object().cloned().unwrap();
    let prompt = model(format).prompt(&ChatInput { kwargs, ..ask(messages) });
    let prompt = prompt.map_err(|error| error.to_string())?;
    Ok(prompt.text.strip_prefix("<｜begin▁of▁sentence｜>").unwrap().to_owned())
}

fn check(format: FormatName, messages: Value, kwargs: Value, expected: &str) {
    assert_eq!(prompt(format, messages.clone(), kwargs).as_deref(), Ok(expected), "{messages}");
}

#[test]
fn deepseek_v32_knows_more_than_the_cases() {
    let check = |messages, kwargs, expected| check(FormatName::DeepSeekV32, messages, kwargs, expected);
    let schema = json!({ "type": "object" });
    check(
        json!([{ "role": "system", "content": "S", "response_format": schema }, { "role": "user", "content": "a" }]),
        json!({}),
        "S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{\"type\": \"object\"}<｜User｜>a<｜Assistant｜></think>",
    );
    check(
        json!([{ "role": "developer", "content": "a" }]),
        json!({ "thinking": true }),
        "<｜User｜>\n\n# The user's message is: a<｜Assistant｜><think>",
    );
    // An answer that the client has begun.
    check(
        json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b", "prefix": true }]),
        json!({}),
        "<｜User｜>a<｜Assistant｜></think>b",
    );
    // Clients call reasoning by another name than the encoder.
    check(
        json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b", "reasoning_content": "r" }]),
        json!({ "enable_thinking": true }),
        "<｜User｜>a<｜Assistant｜><think>r</think>b<｜end▁of▁sentence｜>",
    );
    check(
        json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]),
        json!({}),
        "<｜User｜>a\nb<｜Assistant｜></think>",
    );
}

#[test]
fn deepseek_v4_knows_more_than_the_cases() {
    let check = |messages, kwargs, expected| check(FormatName::DeepSeekV4, messages, kwargs, expected);
    let off = || json!({ "thinking": false });
    check(json!([{ "role": "user", "content": "a", "task": "title" }]), off(), "<｜User｜>a<｜title｜>");
    check(
        json!([{ "role": "user", "content": "a", "task": "action" }, { "role": "assistant", "content": "b" }, { "role": "user", "content": "c" }]),
        off(),
        "<｜User｜>a<｜Assistant｜></think><｜action｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜></think>",
    );
    check(
        json!([{ "role": "user", "content": "a" }, { "role": "latest_reminder", "content": "today" }]),
        off(),
        "<｜User｜>a<｜Assistant｜></think><｜latest_reminder｜>today",
    );
    check(
        json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b", "wo_eos": true }]),
        off(),
        "<｜User｜>a<｜Assistant｜></think>b",
    );
    check(
        json!([{ "role": "developer", "content": "D" }, { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]),
        json!({ "reasoning_effort": "none" }),
        "<｜User｜>D<｜User｜>a\n\nb<｜Assistant｜></think>",
    );
}

#[test]
fn a_message_that_has_no_place_is_named() {
    let check = |format, messages: Value, what: &str| {
        let error = prompt(format, messages, json!({})).unwrap_err();
        assert!(error.contains(what), "{error}");
    };
    for format in FormatName::ALL {
        check(format, json!([{ "role": "judge", "content": "a" }]), "messages[0] (judge): unknown role");
        let call = json!([{ "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f", "arguments": "[1]" } }] }]);
        check(format, call, "arguments are not a JSON object");
    }
    check(FormatName::DeepSeekV32, json!([{ "role": "tool", "content": "a" }]), "without a tool call");
    check(
        FormatName::DeepSeekV4,
        json!([{ "role": "user", "content": "a", "task": "sing" }]),
        "unknown task \"sing\"",
    );
}
