//! The gateway: where text becomes token ids and back. It takes requests over HTTP (OpenAI's API) and gRPC on one port,
//! and sends token ids to routers. Stateless: any number of gateways may stand side by side.

mod admit;
mod answer;
mod args;
mod choose;
mod grpc;
mod http;
mod observe;
mod openai;
mod repair;
mod request;
mod route;
mod service;
mod sse;

pub use args::Args;
pub use service::run;
