//! Where templates come from, and in which form they get a conversation.

use std::path::Path;

use serde_json::{Value, json};
use text::{Error, Options, TextModel};

use crate::folder::{CHATML, Folder, ask, user};

fn text(folder: &Folder, tools: Value) -> Result<String, Error> {
    let mut input = ask(user(""));
    input.tools = tools;
    folder.load().prompt(&input).map(|prompt| prompt.text)
}

#[test]
fn a_template_is_found_wherever_it_may_be() {
    let none = || Folder::new(&json!({}));
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let check = |folder: Folder, expected: [&str; 2]| {
        let texts = [text(&folder, Value::Null).unwrap(), text(&folder, tools.clone()).unwrap()];
        assert_eq!(texts, expected);
    };
    check(none().with("chat_template.jinja", "A"), ["A", "A"]);
    check(none().with("chat_template.json", r#"{"chat_template": "J"}"#), ["J", "J"]);
    check(Folder::template("B"), ["B", "B"]);
    check(Folder::template("B").with("chat_template.jinja", "A"), ["A", "A"]);
    check(Folder::template("B").with("chat_template.jinja", "\u{feff}A\r\nC\r\n"), ["A\nC", "A\nC"]);
    let list = json!([{ "name": "default", "template": "D" }, { "name": "tool_use", "template": "T" }]);
    check(Folder::new(&json!({ "chat_template": list })), ["D", "T"]);
    let extra = none().with("chat_template.jinja", "A");
    check(extra.with("additional_chat_templates/tool_use.jinja", "T"), ["A", "T"]);
    let v32 = none().with("config.json", r#"{"architectures": ["DeepseekV32ForCausalLM"]}"#);
    assert_eq!(text(&v32, Value::Null).unwrap(), "<｜begin▁of▁sentence｜><｜User｜><｜Assistant｜></think>");
}

#[test]
fn a_checkpoint_without_a_template_serves_all_but_chat() {
    let check = |folder: Folder, what: &str| {
        let model = folder.load();
        assert_eq!(model.tokenizer().encode("hi").unwrap(), [104, 105]);
        let error = model.prompt(&ask(user("hi"))).unwrap_err();
        assert_eq!(model.chat().err().as_ref(), Some(&error));
        assert!(
            matches!(&error, Error::NoTemplate(message) if message.contains(what) && message.contains("--chat-template")),
            "{error}"
        );
    };
    check(Folder::new(&json!({})), "no chat template");
    check(Folder::template("{% for %}"), "tokenizer_config.json: ");
    check(Folder::new(&json!({})).with("chat_template.jinja", "{{ x"), "chat_template.jinja: ");
    let unnamed = json!({ "chat_template": [{ "name": "rag", "template": "R" }] });
    let error = Folder::new(&unnamed).load().chat().err().unwrap();
    assert!(error.to_string().contains("\"default\""), "{error}");
}

#[test]
fn a_template_that_was_asked_for_must_be_one() {
    let folder = Folder::template(CHATML).with("mine.jinja", "M").with("broken.jinja", "{% if %}");
    let load = |file: &str| {
        let options = Options { chat_template: Some(folder.path().join(file)), ..Options::default() };
        TextModel::load(folder.path(), &options).map(|model| model.prompt(&ask(user(""))).unwrap().text)
    };
    assert_eq!(load("mine.jinja").as_deref(), Ok("M"));
    assert!(load("nowhere").unwrap_err().to_string().contains("does not exist"));
    assert!(load("broken.jinja").unwrap_err().to_string().contains("broken.jinja"));
}

#[test]
fn content_parts_are_joined_or_handed_on() {
    let parts = [json!({ "type": "text", "text": "one" }), json!({ "type": "text", "text": "two" })];
    let check = |template: &str, expected: &str| {
        let prompt = Folder::template(template).prompt(user(parts.to_vec()));
        assert_eq!(prompt.text, expected, "{template}");
    };
    check("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", "<|user|>one\ntwo");
    check("{{ messages[0].content | tojson }}", r#""one\ntwo""#);
    check("{{ messages[0].content if messages[0].content is string else '' }}", "one\ntwo");
    check("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", "[one][two]");
    check(
        "{% for m in messages %}{% set content = m['content'] %}{% if content is string %}{{ content }}{% else %}{% for part in content %}{% if part['type'] == 'text' %}({{ part['text'] }}){% endif %}{% endfor %}{% endif %}{% endfor %}",
        "(one)(two)",
    );
    // One role's content is gone through, another's is text.
    let mixed = "{% for m in messages %}{% if m.role == 'user' %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let mixed = Folder::template(mixed)
        .prompt(json!([{ "role": "system", "content": parts }, { "role": "user", "content": parts }]));
    assert_eq!(mixed.text, "one\ntwo[one][two]");
}

#[test]
fn a_wrong_message_is_named() {
    let check = |messages: Value, expected: &str| {
        let error = Folder::template(CHATML).load().prompt(&ask(messages)).unwrap_err();
        assert!(matches!(&error, Error::Messages { param, .. } if param == expected), "{error:?}");
    };
    let image = json!({ "type": "image_url", "image_url": { "url": "x" } });
    check(user(vec![image]), "messages[0].content[0].type");
    check(
        user(vec![json!({ "type": "text", "text": "a" }), json!({ "type": "text" })]),
        "messages[0].content[1].text",
    );
    check(json!([{ "role": "user", "content": "a" }, "b"]), "messages[1]");
    check(json!("hi"), "messages");
}

#[test]
fn arguments_have_the_form_that_the_template_reads() {
    let each = |print: &str| {
        format!(
            "{{% for m in messages %}}{{% for c in m.tool_calls or [] %}}{print}{{% endfor %}}{{% endfor %}}"
        )
    };
    let check = |print: &str, expected: &str| {
        let folder = Folder::template(&each(print));
        for arguments in [json!({ "b": 1, "a": "x" }), json!(r#"{"b": 1, "a": "x"}"#)] {
            let call = json!({ "type": "function", "function": { "name": "f", "arguments": arguments } });
            let message = json!([{ "role": "assistant", "content": null, "tool_calls": [call] }]);
            assert_eq!(folder.prompt(message).text, expected, "{print}");
        }
    };
    check("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", "b=1;a=x;");
    check("{{ c.function.arguments | tojson }}", r#"{"b": 1, "a": "x"}"#);
    check("{{ c.function.name + ' ' + c.function.arguments }}", r#"f {"b": 1, "a": "x"}"#);
    check("{{ c.function.arguments }}", r#"{"b": 1, "a": "x"}"#);
}

#[test]
fn reasoning_goes_by_all_its_names() {
    let template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}";
    for name in ["reasoning_content", "reasoning", "thinking"] {
        let prompt =
            Folder::template(template).prompt(json!([{ "role": "assistant", "content": "", name: "hm" }]));
        assert_eq!(prompt.text, "hmhm", "{name}");
    }
}

#[test]
fn a_template_knows_the_checkpoints_tokens() {
    let config = json!({ "bos_token": { "content": "<bos>" }, "chat_template": "{{ bos_token }}{{ eos_token }}{{ image_token }}",
        "image_token": "<i>" });
    let folder =
        Folder::new(&config).with("special_tokens_map.json", r#"{"eos_token": "<e>", "bos_token": "?"}"#);
    assert_eq!(folder.prompt(user("")).text, "<bos><e><i>");
}

#[test]
fn minnow_reads_its_own_conversations() {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/minnow"));
    let model = TextModel::load(dir, &Options::default()).unwrap();
    let messages = json!([
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": "<think>\nhm</think>Hello!" },
        { "role": "user", "content": "<｜User｜>" },
    ]);
    let prompt = model.prompt(&ask(messages)).unwrap();
    assert!(prompt.starts_in_reasoning);
    assert_eq!(
        prompt.text,
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>Hello!<｜end▁of▁sentence｜><｜User｜><｜User｜><｜Assistant｜><think>\n"
    );
    let user = model.tokenizer().token_to_id("<｜User｜>").unwrap();
    assert_eq!(prompt.ids.iter().filter(|id| **id == user).count(), 2, "the third was typed");
}
