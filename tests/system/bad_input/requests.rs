//! Requests that cannot be answered.

use proto::{Code, Error, v1};
use serde_json::{Value, json};

use crate::{
    fixtures::Chain,
    harness::{Cluster, Endpoint, ask, clients, http::Response},
};

/// Positions of the context in these tests.
const CONTEXT: &str = "200";

async fn cluster(chain: Chain) -> Cluster {
    Cluster::builder(&chain.write()).router_args(&["--context-max", CONTEXT]).experts(2).start().await
}

/// An error in OpenAI's shape that names the parameter and says the words.
#[track_caller]
fn assert_refused(what: &str, response: &Response, status: u16, param: Option<&str>, words: &[&str]) {
    let body = response.json();
    assert_eq!(response.status, status, "{what}: {body}");
    let error = &body["error"];
    let message = error["message"].as_str().unwrap_or_else(|| panic!("{what}: no message in {body}"));
    for word in words {
        assert!(message.contains(word), "{what}: no {word:?} in {message:?}");
    }
    assert_eq!(error["param"].as_str(), param, "{what}: {body}");
    assert!(error["type"].is_string(), "{what}: {body}");
    assert!(error.get("code").is_some(), "{what}: {body}");
}

/// Nothing is left of what was refused, nobody died of it, and a good request is answered.
async fn assert_unharmed(cluster: &mut Cluster) {
    cluster.idle().await;
    for member in cluster.members() {
        assert!(member.process.exit_status().is_none());
    }
    assert_eq!(ask(&cluster.http(), Endpoint::Chat, ">", &json!({})).await.text, "ok");
}

#[tokio::test]
async fn requests_that_say_something_impossible() {
    let mut cluster = cluster(Chain::new().recites(b'>', "ok").cycles()).await;
    let http = cluster.http();
    let check = async |endpoint: Endpoint, options: Value, status: u16, param: &str, words: &[&str]| {
        let what = format!("{endpoint:?} {}", &options.to_string()[..options.to_string().len().min(120)]);
        for stream in [false, true] {
            let mut body = endpoint.body(">", &options);
            body["stream"] = json!(stream);
            assert_refused(&what, &http.post(endpoint.path(), &body).await, status, Some(param), words);
        }
    };
    use Endpoint::{Chat, Completions};
    let long = "x".repeat(250);
    for endpoint in Endpoint::ALL {
        check(endpoint, json!({"model": "no-such-model"}), 404, "model", &["no-such-model"]).await;
        check(endpoint, json!({"max_tokens": 201}), 400, "max_tokens", &["201", CONTEXT]).await;
        check(endpoint, json!({"temperature": -1}), 400, "temperature", &["-1"]).await;
        check(endpoint, json!({"temperature": "hot"}), 400, "temperature", &[]).await;
        check(endpoint, json!({"top_p": 1.5}), 400, "top_p", &["1.5"]).await;
        check(endpoint, json!({"n": 0}), 400, "n", &[]).await;
        check(endpoint, json!({"n": 100_000}), 400, "n", &["100000"]).await;
        check(endpoint, json!({"stop": [1]}), 400, "stop", &[]).await;
        check(endpoint, json!({"seed": "x"}), 400, "seed", &[]).await;
    }
    check(Chat, json!({"messages": []}), 400, "messages", &[]).await;
    check(Chat, json!({"messages": "hi"}), 400, "messages", &[]).await;
    check(Chat, json!({"messages": null}), 400, "messages", &[]).await;
    check(Chat, json!({"messages": [{"role": "user", "content": 5}]}), 400, "messages[0].content", &[]).await;
    check(Chat, json!({"top_logprobs": 21, "logprobs": true}), 400, "top_logprobs", &["21", "20"]).await;
    check(Completions, json!({"prompt": ""}), 400, "prompt", &[]).await;
    check(Completions, json!({"prompt": [5, 320]}), 400, "prompt", &["320"]).await;
    check(Completions, json!({"prompt": [5, -1]}), 400, "prompt", &[]).await;
    check(Completions, json!({"echo": true}), 400, "echo", &[]).await;
    let too_long = [CONTEXT, "250"];
    check(Chat, json!({"messages": [{"role": "user", "content": long}]}), 400, "messages", &too_long).await;
    check(Completions, json!({"prompt": long}), 400, "prompt", &too_long).await;
    let body = Chat.body("", &json!({"messages": [{"role": "user", "content": long}]}));
    let error = http.post(Chat.path(), &body).await.json();
    assert_eq!(error["error"]["code"], "context_length_exceeded", "{error}");
    assert_unharmed(&mut cluster).await;
}

#[tokio::test]
async fn bodies_that_say_nothing() {
    let mut cluster = cluster(Chain::new().recites(b'>', "ok")).await;
    let http = cluster.http();
    let check = async |what: &str, body: &[u8], status: u16, words: &[&str]| {
        for endpoint in Endpoint::ALL {
            assert_refused(what, &http.post_bytes(endpoint.path(), body).await, status, None, words);
        }
    };
    check("nothing", b"", 400, &[]).await;
    check("half of it", br#"{"messages": [{"role": "#, 400, &["line 1"]).await;
    check("a list", b"[]", 400, &[]).await;
    check(
        "not UTF-8",
        b"{\"prompt\": \"\xff\xfe\", \"messages\": [{\"role\": \"user\", \"content\": \"\xff\"}]}",
        400,
        &[],
    )
    .await;
    check("deeply nested", "[".repeat(100_000).as_bytes(), 400, &[]).await;
    // More than any limit on bodies; the server may stop reading before the end.
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                connection: close\r\ncontent-length: 4000000000\r\n\r\n{";
    let mut connection = http.send(head.as_bytes()).await.expect("it listens");
    let (status, headers) = connection.head().await.expect("an answer before the end of the body");
    let body = connection.body(&headers).await.expect("a whole answer");
    assert_refused("too large", &Response { status, headers, body }, 413, None, &[]);
    for (method, path, status) in
        [("GET", "/v1/chat/completions", 405), ("GET", "/v1/nothing", 404), ("POST", "/v1/models", 405)]
    {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        let (answered, _) =
            http.send(request.as_bytes()).await.expect("it listens").head().await.expect("an answer");
        assert_eq!(answered, status, "{method} {path}");
    }
    assert_unharmed(&mut cluster).await;
}

#[tokio::test]
async fn a_template_that_is_missing_or_refuses() {
    let chain = || Chain::new().recites(b'>', "ok");
    let no_template = cluster(chain().template(None)).await;
    let body = Endpoint::Chat.body(">", &json!({}));
    let response = no_template.http().post(Endpoint::Chat.path(), &body).await;
    assert_refused("no template", &response, 400, Some("messages"), &["template"]);
    let answer = ask(&no_template.http(), Endpoint::Completions, ">", &json!({})).await;
    assert_eq!(answer.text, "ok", "completions need no template");

    let refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}\
                   {% endif %}{{ m.content }}{% endfor %}";
    let mut refusing = cluster(chain().template(Some(refuses))).await;
    let messages = json!([{"role": "system", "content": "be good"}, {"role": "user", "content": ">"}]);
    let body = Endpoint::Chat.body("", &json!({"messages": messages}));
    let response = refusing.http().post(Endpoint::Chat.path(), &body).await;
    assert_refused("refused by the template", &response, 400, Some("messages"), &["no system here"]);
    assert_unharmed(&mut refusing).await;
}

#[tokio::test]
async fn grpc_requests_that_say_something_impossible() {
    let mut cluster = cluster(Chain::new().recites(b'>', "ok")).await;
    let request = |content: &str| v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: "user".into(),
            content: content.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let address = cluster.gateway().address;
    let check = async |request: v1::ChatRequest, code: Code, param: &str| {
        let mut chat = clients::chat(address);
        let plain = chat.chat(request.clone()).await.expect_err("it cannot be answered");
        let streamed = match chat.chat_stream(request).await {
            Err(status) => status,
            Ok(deltas) => deltas.into_inner().message().await.expect_err("it cannot be answered"),
        };
        for status in [plain, streamed] {
            let error = Error::from_status(&status);
            assert_eq!((error.code, error.param.as_deref()), (code, Some(param)), "{status:?}");
        }
    };
    check(v1::ChatRequest::default(), Code::InvalidArgument, "messages").await;
    check(v1::ChatRequest { model: "no-such".into(), ..request(">") }, Code::NotFound, "model").await;
    check(request(&"x".repeat(250)), Code::InvalidArgument, "messages").await;
    let kwargs = v1::ChatRequest { template_kwargs_json: "{".into(), ..request(">") };
    check(kwargs, Code::InvalidArgument, "template_kwargs_json").await;
    let options = v1::SamplingOptions { temperature: Some(f32::NAN), ..Default::default() };
    let nan = v1::ChatRequest { options: Some(options), ..request(">") };
    check(nan, Code::InvalidArgument, "temperature").await;
    assert_unharmed(&mut cluster).await;
}

#[tokio::test]
async fn a_router_refuses_what_a_gateway_would_not_send() {
    let mut cluster = cluster(Chain::new().recites(b'>', "ok")).await;
    let check = async |request: v1::GenerateRequest, param: &str| {
        let status = cluster.router.router().generate(request).await.expect_err("it cannot be answered");
        let error = Error::from_status(&status);
        assert_eq!((error.code, error.param.as_deref()), (Code::InvalidArgument, Some(param)), "{status:?}");
    };
    let good = || v1::GenerateRequest { prompt_ids: vec![62], ..Default::default() };
    check(v1::GenerateRequest::default(), "prompt_ids").await;
    check(v1::GenerateRequest { prompt_ids: vec![320], ..good() }, "prompt_ids").await;
    check(v1::GenerateRequest { top_logprobs: Some(21), ..good() }, "top_logprobs").await;
    check(v1::GenerateRequest { stop_ids: vec![1; 1000], ..good() }, "stop_ids").await;
    let sampling = v1::Sampling { top_p: f32::INFINITY, ..Default::default() };
    check(v1::GenerateRequest { sampling: Some(sampling), ..good() }, "top_p").await;
    assert_unharmed(&mut cluster).await;
}
