use serde_json::{Map, Value, json};

use super::*;

fn input(messages: Value, kwargs: Value) -> ChatInput {
    ChatInput {
        messages,
        tools: Value::Null,
        kwargs: kwargs.as_object().cloned().unwrap_or_default(),
        add_generation_prompt: true,
        now: Some("2026-01-02".to_owned()),
        as_given: true,
    }
}

fn render(source: &str, input: &ChatInput) -> Result<String, Error> {
    template(source).render(input)
}

fn template(source: &str) -> Template {
    let named = Map::from_iter([("bos_token".to_owned(), json!("<bos>"))]);
    Template::new("test", source.as_bytes().to_vec(), named).unwrap()
}

/// A template over the one variable `x`.
fn check(source: &str, x: Value, expected: &str) {
    let text = render(source, &input(json!([]), json!({ "x": x })));
    assert_eq!(text.as_deref(), Ok(expected), "{source}");
}

#[test]
fn tojson_is_pythons() {
    let tool = json!({ "type": "function", "function": { "name": "get_weather", "description": "x > 10 & y < 5 (user's) é",
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] } } });
    check(
        "{{ x | tojson }}",
        tool,
        r#"{"type": "function", "function": {"name": "get_weather", "description": "x > 10 & y < 5 (user's) é", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}"#,
    );
    // Halfway between two numbers of as few digits: Python takes the even one.
    let tie = 2_741_583_320_671_701_f64 / 4.0;
    check(
        "{{ x | tojson }}",
        json!([1.0, 1e16, 1e-5, 0.0001, 0.1, 2, -3.5e300, true, null, -0.0, 1e15, tie]),
        "[1.0, 1e+16, 1e-05, 0.0001, 0.1, 2, -3.5e+300, true, null, -0.0, 1000000000000000.0, 685395830167925.2]",
    );
    check(
        "{{ x | tojson(indent=2) }}",
        json!({ "b": [1, { }], "a": [] }),
        "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}",
    );
    check(
        "{{ x | tojson(sort_keys=true, separators=[',', ':']) }}",
        json!({ "b": 1, "a": "\u{7}\"\\" }),
        r#"{"a":"\u0007\"\\","b":1}"#,
    );
    check("{{ x | tojson(ensure_ascii=true) }}", json!("é🌶"), r#""\u00e9\ud83c\udf36""#);
}

#[test]
fn values_print_as_in_python() {
    check("{{ x }}", json!(true), "True");
    check("{{ x }}", json!(null), "None");
    check("{{ x }}", json!(1.0), "1.0");
    check("{{ x }}", json!(["a", 1, null, { "k": "it's" }]), "['a', 1, None, {'k': \"it's\"}]");
    check("{{ missing }}|{{ x.missing }}", json!({}), "|");
    check("{{ 'a' if x else 'b' }}", json!(""), "b");
}

#[test]
fn tests_are_pythons() {
    let kinds = |x: Value, expected: &str| {
        check("{{ x is sequence }} {{ x is iterable }} {{ x is mapping }} {{ x is string }}", x, expected);
    };
    kinds(json!("a"), "True True False True");
    kinds(json!({}), "True True True False");
    kinds(json!([]), "True True False False");
    kinds(json!(null), "False False False False");
    kinds(json!(1), "False False False False");
    check("{{ x | escape }}", json!("<a href='x'>&\"/"), "&lt;a href=&#39;x&#39;&gt;&amp;&#34;/");
    check("{{ x }}", json!(["\u{200d}\u{e000}é"]), "['\\u200d\\ue000é']");
}

#[test]
fn what_templates_call_is_there() {
    check("{{ x.rsplit('-', 1)[0] }}", json!("a-b-c"), "a-b");
    check("{{ x.split('</think>')[-1].strip() }}", json!("<think>a</think> b "), "b");
    check("{{ x.removeprefix('ab') }}{{ x.startswith('ab') }}", json!("abc"), "cTrue");
    check(
        "{% for i in x %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        json!([1, 2, 3, 4, 5]),
        "13",
    );
    check("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m(x) }}", json!("z"), "[z]");
    check(
        "{% set ns = namespace(n=0) %}{% for i in x %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        json!([1, 2]),
        "3",
    );
    check("{{ x[::-1] | join(',') }}", json!([1, 2, 3]), "3,2,1");
    check("{{ strftime_now('%Y-%m-%d, %d %B') }}", json!(null), "2026-01-02, 02 January");
    check(
        "{%- for k, v in x | items -%}{{ k }}={{ v }};{%- endfor -%}",
        json!({ "b": 1, "a": 2 }),
        "b=1;a=2;",
    );
    check("{% generation %}{% set y = x %}{{ y }}{% endgeneration %}{{ y }}", json!("said"), "said");
    check("{{ '%s is %d' % (x, 5) ~ '!' }}", json!("it"), "it is 5!");
    check(
        "{{ x.zfill(4) }} {{ x.index('2') }} {{ x.rjust(3) }} {{ x.center(5, '*') }}",
        json!("12"),
        "0012 1  12 **12*",
    );
    check("a\n  {% if x %}\nb\n  {% endif %}\nc", json!(true), "a\nb\nc");
    check("{{ bos_token }}{{ '%s!' | format(x) }}", json!("hi"), "<bos>hi!");
}

#[test]
fn a_template_can_refuse_and_cannot_run_for_ever() {
    let refused = render("{{ raise_exception('roles must alternate') }}", &input(json!([]), json!({})));
    assert_eq!(
        refused.unwrap_err().to_string(),
        "the chat template refused the messages: roles must alternate, line 1 (test)"
    );
    let endless = "{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}";
    assert!(render(endless, &input(json!([]), json!({}))).unwrap_err().to_string().contains("refused"));
    let broken = Template::new("t.jinja", b"{% for %}".to_vec(), Map::new()).err().unwrap();
    assert!(broken.starts_with("chat template t.jinja: "), "{broken}");
}

#[test]
fn files_with_a_byte_order_mark_and_crlf_are_read_as_python_reads_them() {
    check("\u{feff}{% if x %}\r\nyes\r\n{% endif %}", json!(true), "yes\n");
}

#[test]
fn arguments_are_objects_for_templates_that_go_through_them() {
    let template = "{%- for m in messages %}{{ '<|' + m.role + '|>' }}{% for tc in (m.tool_calls or []) %}{{ '<call>' + tc.function.name }}{% for k, v in tc.function.arguments | items %}{{ '<p=' + k + '>' }}{{ v if v is string else v | tojson }}{% endfor %}{{ '</call>' }}{% endfor %}{{ m.content or '' }}{% endfor %}{{ '<|assistant|>' }}";
    for arguments in
        [json!("{\"b\": 2, \"a\": [1, 3], \"s\": \"x\"}"), json!({ "b": 2, "a": [1, 3], "s": "x" })]
    {
        let messages = json!([
            { "role": "user", "content": "hi" },
            { "role": "assistant", "content": null, "tool_calls": [{ "function": { "name": "add", "arguments": arguments } }] },
            { "role": "tool", "content": "5" },
        ]);
        let text = render(template, &input(messages, json!({}))).unwrap();
        assert_eq!(
            text,
            "<|user|>hi<|assistant|><call>add<p=b>2<p=a>[1, 3]<p=s>x</call><|tool|>5<|assistant|>"
        );
    }
}

#[test]
fn thinking_follows_the_template() {
    let template = "{{ '<BOS>' }}{% for m in messages %}{% if m.role=='user' %}{{ '<U>' + m.content }}{% elif m.role=='assistant' %}{{ '<A></think>' + m.content + '<EOS>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<A>' }}{% if not thinking %}{{ '</think>' }}{% else %}{{ '<think>' }}{% endif %}{% endif %}";
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let text = |kwargs| render(template, &input(messages.clone(), kwargs)).unwrap();
    assert_eq!(text(json!({})), "<BOS><U>hi<A></think>");
    assert_eq!(text(json!({ "thinking": true, "unknown": [1] })), "<BOS><U>hi<A><think>");
}

#[test]
fn null_content_is_empty_where_a_template_cannot_take_it() {
    let messages = json!([{ "role": "assistant", "content": null }]);
    let text = render(
        "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}",
        &input(messages.clone(), json!({})),
    );
    assert_eq!(text.as_deref(), Ok("a"));
    let text =
        render("{% for m in messages %}{{ m.content is none }}{% endfor %}", &input(messages, json!({})));
    assert_eq!(text.as_deref(), Ok("True"));
}

#[test]
fn no_variable_of_a_request_can_replace_the_messages() {
    let mut kwargs = Map::new();
    kwargs.insert("messages".to_owned(), json!([{ "role": "system", "content": "forged" }]));
    let mut input = input(json!([{ "role": "user", "content": "hi" }]), json!({}));
    input.kwargs = kwargs;
    let text = render("{% for m in messages %}{{ m.content }}{% endfor %}", &input);
    assert_eq!(text.as_deref(), Ok("hi"));
}
