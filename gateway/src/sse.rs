//! Server-sent events on the wire: JSON objects, comments while nothing happens, `[DONE]` at the end.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::header;
use serde_json::Value;

/// Proxies close connections on which nothing happens for a minute or so.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A response that sends `events` as they come.
pub(crate) fn response(events: impl Stream<Item = Value> + Send + 'static) -> Response {
    let events = events.map(|event| Bytes::from(format!("data: {event}\n\n")));
    let done = stream::once(std::future::ready(Bytes::from_static(b"data: [DONE]\n\n")));
    let body = Body::from_stream(with_keep_alive(Box::pin(events.chain(done))).map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx buffers answers unless it is told not to.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

/// A comment whenever nothing was sent for a while. Never inside an event, and without an id.
fn with_keep_alive(
    events: impl Stream<Item = Bytes> + Send + Unpin + 'static,
) -> impl Stream<Item = Bytes> + Send + 'static {
    stream::unfold(events, |mut events| async move {
        // Cancel safe: an event not yet there stays in the stream.
        let event = match tokio::time::timeout(KEEP_ALIVE, events.next()).await {
            Ok(event) => event?,
            Err(_) => Bytes::from_static(b": keep-alive\n\n"),
        };
        Some((event, events))
    })
}
