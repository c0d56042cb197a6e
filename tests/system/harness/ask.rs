//! One question, both endpoints, plain and streamed.

use serde_json::{Value, json};

use super::{Http, cluster::MODEL, sse::Answer};

/// The two endpoints of the OpenAI API that generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    pub(crate) const ALL: [Self; 2] = [Self::Chat, Self::Completions];

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }

    /// A greedy request with the fields of `options` on top.
    pub(crate) fn body(self, prompt: &str, options: &Value) -> Value {
        let mut body = json!({"model": MODEL, "temperature": 0});
        match self {
            Self::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
            Self::Completions => body["prompt"] = json!(prompt),
        }
        for (field, value) in options.as_object().expect("options is an object") {
            body[field] = value.clone();
        }
        body
    }
}

/// Asks plainly and as a stream; both must say the same.
#[track_caller]
pub(crate) fn ask<'a>(
    http: &'a Http,
    endpoint: Endpoint,
    prompt: &'a str,
    options: &'a Value,
) -> impl Future<Output = Answer> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let mut body = endpoint.body(prompt, options);
        let plain = Answer::of_response(&http.post(endpoint.path(), &body).await.ok(), 0);
        body["stream"] = json!(true);
        let streamed = Answer::of_chunks(&http.stream(endpoint.path(), &body).await.rest().await, 0);
        assert_eq!(plain, streamed, "{caller}: plain and streamed answers to {body}");
        plain
    }
}
