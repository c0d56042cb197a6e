//! What was typed.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use cluster::Registry;
use model::Weights;
use shard::{Problems, Selection};

use crate::memory;

/// Flags of an expert server.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Checkpoint: a Hugging Face folder with config.json and safetensors files
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    pub model: PathBuf,

    /// How matrices are kept in memory: bf16 as the checkpoint has them, q8 or q4 quantized to int8 or int4 in blocks of
    /// 32 (not: embedding, gate, norms; the head has int8 at least),
    /// q8-experts or q4-experts the same for routed and shared experts only
    #[arg(
        long,
        env = "SHOAL_WEIGHTS",
        value_name = "bf16|q8|q4|q8-experts|q4-experts",
        default_value = "bf16"
    )]
    pub weights: Weights,

    /// Where quantized weights are kept: the next start maps them instead of making them [default: nowhere]
    #[arg(long, env = "SHOAL_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Address to serve on; port 0 takes a free one
    #[arg(long, env = "SHOAL_LISTEN", value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    pub listen: String,

    /// Registry to be found in, such as etcd://host:2379/prefix. With none, or static://, routers are told the address
    #[arg(long, env = "SHOAL_REGISTRY", value_name = "URL")]
    pub registry: Option<Registry>,

    /// Address at which others reach this server. Default: the one it listens on
    #[arg(long, env = "SHOAL_ADVERTISE", value_name = "HOST:PORT", value_parser = host_port)]
    pub advertise: Option<String>,

    /// The parts of every layer's experts to hold, such as 1/4 or 1/4,3/4. Without --shard and --experts: all, or with
    /// an etcd registry what the placement gives this server
    #[arg(long, env = "SHOAL_SHARD", value_name = "I/N")]
    pub shard: Option<String>,

    /// The experts of every layer to hold, such as 0-7,12
    #[arg(long, env = "SHOAL_EXPERTS", value_name = "LIST")]
    pub experts: Option<String>,

    /// Compute threads [default: what a test at the start finds best, all cores or half of them]
    #[arg(long, env = "SHOAL_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// Compute threads spin for a moment between steps before they sleep: they wake sooner where each has a core for
    /// itself [default: by the same test]
    #[arg(long, env = "SHOAL_SPIN", value_name = "true|false")]
    pub spin: Option<bool>,

    /// Quantized weights are copied into huge pages, while it serves already, instead of staying in mapped files [default: by
    /// the same test]
    #[arg(long, env = "SHOAL_HUGE_PAGES", value_name = "true|false")]
    pub huge_pages: Option<bool>,

    /// Most bytes of experts that a placement may have this server hold, such as 48GiB. Default: 80 % of the memory
    /// that is available at the start
    #[arg(long, env = "SHOAL_MEMORY_MAX", value_name = "BYTES", value_parser = memory::parse_bytes)]
    pub memory_max: Option<u64>,

    /// Fault injection: compute each frame this much later
    #[arg(long, env = "SHOAL_CHAOS_DELAY", value_name = "TIME", value_parser = humantime::parse_duration)]
    pub chaos_delay: Option<Duration>,

    /// How long to wait at shutdown until other servers hold what this one does, while a router is registered
    #[arg(long, env = "SHOAL_HANDOVER_TIMEOUT", value_name = "TIME", default_value = "10s",
          value_parser = humantime::parse_duration)]
    pub handover_timeout: Duration,

    /// How long frames in flight may take to be answered at shutdown, before their streams are cut. Default: well
    /// above the seconds that a full queue takes
    #[arg(long, env = "SHOAL_DRAIN_TIMEOUT", value_name = "TIME", default_value = "30s",
          value_parser = humantime::parse_duration)]
    pub drain_timeout: Duration,
}

impl Args {
    pub(crate) fn selection(&self) -> Result<Selection, Problems> {
        Selection::parse(self.shard.as_deref(), self.experts.as_deref(), self.is_registered())
    }

    /// Others look for this server in a registry, and a leader places experts.
    pub(crate) fn is_registered(&self) -> bool {
        matches!(self.registry, Some(Registry::Etcd(_)))
    }

    /// The address that others are told, of a server that listens on `address`.
    pub(crate) fn advertised(&self, address: SocketAddr) -> Result<String, String> {
        advertised(self.advertise.as_deref(), address, self.is_registered())
    }
}

fn advertised(advertise: Option<&str>, address: SocketAddr, registered: bool) -> Result<String, String> {
    match advertise {
        Some(advertise) => Ok(advertise.to_owned()),
        None if registered && address.ip().is_unspecified() => Err(format!(
            "nobody can connect to {address}, on which this server listens; \
             say with --advertise HOST:PORT how others reach it"
        )),
        None => Ok(address.to_string()),
    }
}

fn host_port(text: &str) -> Result<String, String> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse());
    match port {
        Some(Ok(1_u16..)) => Ok(text.to_owned()),
        Some(Ok(0) | Err(_)) | None => Err("not of the form HOST:PORT".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_told_an_address_that_they_can_use() {
        let check = |advertise, listening: &str, registered, expected: Result<&str, ()>| {
            let told = advertised(advertise, listening.parse().unwrap(), registered);
            assert_eq!(told.as_deref().map_err(|_| ()), expected, "{advertise:?} {listening} {registered}");
        };
        check(None, "127.0.0.1:7001", true, Ok("127.0.0.1:7001"));
        check(Some("expert-1:7001"), "0.0.0.0:7001", true, Ok("expert-1:7001"));
        check(None, "0.0.0.0:7001", true, Err(()));
        check(None, "[::]:7001", true, Err(()));
        check(None, "0.0.0.0:7001", false, Ok("0.0.0.0:7001"));
        let error = advertised(None, ([0, 0, 0, 0], 7001).into(), true).unwrap_err();
        assert!(error.contains("0.0.0.0:7001") && error.contains("--advertise HOST:PORT"), "{error}");
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for good in ["a:1", "[::1]:7001", "10.0.0.1:65535"] {
            assert_eq!(host_port(good).as_deref(), Ok(good));
        }
        for bad in ["a", ":1", "a:", "a:0", "a:65536", ""] {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }
}
