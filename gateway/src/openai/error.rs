//! Errors in OpenAI's shape.

use proto::{Code, Error};
use serde_json::{Value, json};

/// `{"error": {…}}`, with the trace that the failure is in.
pub(crate) fn body(error: &Error, trace_id: &str) -> Value {
    let kind = match error.code {
        Code::InvalidArgument | Code::NotFound | Code::TooLarge => "invalid_request_error",
        Code::Overloaded => "rate_limit_error",
        Code::Unavailable | Code::DeadlineExceeded => "service_unavailable_error",
        Code::Cancelled | Code::Internal => "server_error",
    };
    json!({ "error": {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.reason,
        "trace_id": trace_id,
    } })
}
