//! Errors in OpenAI's shape.

use proto::{Code, Error};
use serde_json::{Value, json};

/// `{"error": {…}}`
pub(crate) fn body(error: &Error) -> Value {
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
    } })
}
