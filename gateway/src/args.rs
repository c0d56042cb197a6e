//! Flags of the gateway.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use cluster::Registry;
use text::FormatName;

/// Run a gateway: the OpenAI HTTP API and a gRPC API, on one port.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Checkpoint folder: the tokenizer and the chat template are read, no weights
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    pub model: PathBuf,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, env = "SHOAL_LISTEN", default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    pub listen: SocketAddr,
    /// Where the routers are: static://host:port,host:port or etcd://host:2379/prefix
    #[arg(long, env = "SHOAL_REGISTRY", value_name = "URL")]
    pub registry: Registry,
    /// What clients call the model [default: the checkpoint folder's name]
    #[arg(long, env = "SHOAL_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// A jinja template that goes before the checkpoint's own
    #[arg(long, env = "SHOAL_CHAT_TEMPLATE", value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// A chat format that exists only as code: deepseek-v3.2, deepseek-v4
    #[arg(long, env = "SHOAL_CHAT_FORMAT", value_name = "NAME")]
    pub chat_format: Option<FormatName>,
    /// Let special tokens in a request become control tokens, as in transformers; otherwise they stay text
    #[arg(long, env = "SHOAL_ALLOW_SPECIAL")]
    pub allow_special: bool,
    /// Largest request body
    #[arg(long, env = "SHOAL_BODY_BYTES_MAX", default_value_t = 8 << 20, value_name = "BYTES")]
    pub body_bytes_max: usize,
    /// Most requests at once; one more is refused with 429
    #[arg(long, env = "SHOAL_REQUESTS_MAX", default_value_t = 1024)]
    pub requests_max: usize,
    /// How often an answer may go on at another router because its own has died
    #[arg(long, env = "SHOAL_REPAIRS_MAX", default_value_t = 8)]
    pub repairs_max: u32,
    /// How long an answer that lost its router waits for another one
    #[arg(long, env = "SHOAL_REPAIR_WAIT", default_value = "10s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub repair_wait: Duration,
    /// Page for traces, such as Jaeger's http://host:16686: answers then say where their trace is
    #[arg(long, env = "SHOAL_TRACE_URL", value_name = "URL")]
    pub trace_url: Option<String>,
    /// Write prompts to the log; otherwise no text of a request is ever written anywhere
    #[arg(long, env = "SHOAL_LOG_PROMPTS")]
    pub log_prompts: bool,
    /// How long running answers may take to finish after SIGTERM
    #[arg(long, env = "SHOAL_DRAIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub drain_timeout: Duration,
}
