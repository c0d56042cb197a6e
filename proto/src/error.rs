//! One error for everything that crosses a process border: a closed code, a stable reason fit for a metric label,
//! a message for people, and the parameter at fault. One mapping to gRPC, one to HTTP.

use std::borrow::Cow;

use tonic::metadata::MetadataValue;

/// What kind of thing went wrong. Closed: a new kind needs a mapping below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The caller sent something that can never work.
    InvalidArgument,
    /// The caller named something that is not here.
    NotFound,
    /// More than a limit allows, by size.
    TooLarge,
    /// More load than capacity; try again later.
    Overloaded,
    /// A part of the cluster that this needs is away.
    Unavailable,
    /// Our own deadline passed.
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    /// A fault of ours.
    Internal,
}

impl Code {
    pub const ALL: [Self; 8] = [
        Self::InvalidArgument,
        Self::NotFound,
        Self::TooLarge,
        Self::Overloaded,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::Internal,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::NotFound => "not_found",
            Self::TooLarge => "too_large",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }

    /// The code of a name on the wire; an unknown name is a fault of the other side.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        Self::ALL.into_iter().find(|code| code.as_str() == name).unwrap_or(Self::Internal)
    }

    #[must_use]
    pub const fn grpc(self) -> tonic::Code {
        match self {
            Self::InvalidArgument => tonic::Code::InvalidArgument,
            Self::NotFound => tonic::Code::NotFound,
            Self::TooLarge => tonic::Code::OutOfRange,
            Self::Overloaded => tonic::Code::ResourceExhausted,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            Self::Cancelled => tonic::Code::Cancelled,
            Self::Internal => tonic::Code::Internal,
        }
    }

    /// The nearest code for a gRPC status that did not come from us.
    const fn from_grpc(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument | tonic::Code::FailedPrecondition => Self::InvalidArgument,
            tonic::Code::NotFound | tonic::Code::Unimplemented => Self::NotFound,
            tonic::Code::OutOfRange => Self::TooLarge,
            tonic::Code::ResourceExhausted => Self::Overloaded,
            tonic::Code::Unavailable => Self::Unavailable,
            tonic::Code::DeadlineExceeded => Self::DeadlineExceeded,
            tonic::Code::Cancelled | tonic::Code::Aborted => Self::Cancelled,
            tonic::Code::Ok
            | tonic::Code::Unknown
            | tonic::Code::AlreadyExists
            | tonic::Code::PermissionDenied
            | tonic::Code::Internal
            | tonic::Code::DataLoss
            | tonic::Code::Unauthenticated => Self::Internal,
        }
    }

    #[must_use]
    pub const fn http(self) -> http::StatusCode {
        match self {
            Self::InvalidArgument => http::StatusCode::BAD_REQUEST,
            Self::NotFound => http::StatusCode::NOT_FOUND,
            Self::TooLarge => http::StatusCode::PAYLOAD_TOO_LARGE,
            Self::Overloaded => http::StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::DeadlineExceeded => http::StatusCode::GATEWAY_TIMEOUT,
            // nginx's 499: nobody is left to read it, but the access log tells it from our own faults.
            Self::Cancelled => match http::StatusCode::from_u16(499) {
                Ok(code) => code,
                Err(_) => http::StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Internal => http::StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// An error that another process or a client will read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: Code,
    /// Stable, snake_case, from a closed set in the code: `context_length_exceeded`, `experts_missing`, …
    pub reason: Cow<'static, str>,
    pub message: String,
    /// The request field at fault, as the client spelled it.
    pub param: Option<Cow<'static, str>>,
}

const REASON: &str = "shoal-reason";
const PARAM: &str = "shoal-param";
const CODE: &str = "shoal-code";

impl Error {
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason: Cow::Borrowed(reason), message: message.into(), param: None }
    }

    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, "invalid_value", message).with_param(param)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, "internal", message)
    }

    #[must_use]
    pub fn with_param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Reads back what [`From<Error>`] wrote; for a status made elsewhere (a broken connection) the nearest code.
    #[must_use]
    pub fn from_status(status: &tonic::Status) -> Self {
        let field = |key| {
            status
                .metadata()
                .get(key)
                .and_then(|value| value.to_str().ok())
                .map(|text| Cow::Owned(text.to_owned()))
        };
        Self {
            code: field(CODE).map_or_else(|| Code::from_grpc(status.code()), |name| Code::parse(&name)),
            reason: field(REASON).unwrap_or(Cow::Borrowed("transport")),
            message: status.message().to_owned(),
            param: field(PARAM),
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let mut status = Self::new(error.code.grpc(), error.message);
        let metadata = status.metadata_mut();
        metadata.insert(CODE, MetadataValue::from_static(error.code.as_str()));
        if let Ok(reason) = MetadataValue::try_from(error.reason.as_ref()) {
            metadata.insert(REASON, reason);
        }
        if let Some(param) = error.param.and_then(|param| MetadataValue::try_from(param.as_ref()).ok()) {
            metadata.insert(PARAM, param);
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_wire() {
        for code in Code::ALL {
            let error = Error::new(code, "some_reason", "what failed").with_param("messages[0].content");
            assert_eq!(Error::from_status(&tonic::Status::from(error.clone())), error);
            assert_eq!(Code::parse(code.as_str()), code);
        }
    }

    #[test]
    fn a_foreign_status_gets_the_nearest_code() {
        let error = Error::from_status(&tonic::Status::unavailable("connection refused"));
        assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "transport"));
    }
}
