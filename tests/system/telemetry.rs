//! What a cluster tells about itself: traces down to the expert server that computed, metrics, log lines.

mod doors;
mod jaeger;
mod metrics;
mod traces;

use serde_json::{Value, json};

use crate::harness::{Endpoint, Http, http::Response};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// The headers of a caller who records everything.
fn full(trace_id: &str) -> Vec<(&'static str, String)> {
    vec![("traceparent", format!("00-{trace_id}-{CALLER}-01")), ("tracestate", "shoal=full".to_owned())]
}

/// A completion of `n` tokens, whatever the model says.
fn body(prompt: &str, n: usize) -> Value {
    Endpoint::Completions.body(prompt, &json!({"max_tokens": n, "ignore_eos": true}))
}

async fn complete(http: &Http, headers: &[(&'static str, String)], n: usize) -> Response {
    http.post_with(Endpoint::Completions.path(), headers, &body("What is 348 + 277?", n)).await
}
