//! `shoal up`: a cluster on this machine until Ctrl-C.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::{
    checkpoint_dir,
    cluster::{Cluster, Plan, Where},
    process::{LogArgs, TraceArgs, WeightsArgs},
    table,
};

/// Start a gateway, a router and expert servers on this machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder [default: the bundled model minnow]
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Expert servers; each holds its part of every layer's experts. 0: every router holds all of them itself
    #[arg(long, env = "SHOAL_UP_EXPERTS", default_value = "2", value_name = "N")]
    experts: usize,
    /// How many expert servers hold each expert
    #[arg(long, env = "SHOAL_REPLICAS", default_value = "1", value_name = "N")]
    replicas: NonZeroUsize,
    /// Routers; an answer whose router dies goes on at another
    #[arg(long, env = "SHOAL_UP_ROUTERS", default_value = "1", value_name = "N")]
    routers: NonZeroUsize,
    /// Register in this etcd, and let the leader of the routers place the experts: etcd://host:2379/prefix
    #[arg(long, env = "SHOAL_REGISTRY", value_name = "URL", value_parser = etcd_url)]
    registry: Option<String>,
    /// The same with an etcd of its own, started from PATH and gone at the end
    #[arg(long, conflicts_with = "registry")]
    etcd: bool,
    /// Where the API listens; port 0 takes a free one
    #[arg(long, env = "SHOAL_LISTEN", default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    listen: SocketAddr,
    /// Print where everybody listens as one JSON line instead of a table
    #[arg(long)]
    json: bool,
    /// Jaeger's page, such as http://localhost:16686: traces go to port 4317 of its host (or to --otlp), and `shoal chat`
    /// prints where the answer's is
    #[arg(long, env = "SHOAL_JAEGER", value_name = "URL")]
    jaeger: Option<String>,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    traces: TraceArgs,
    #[command(flatten)]
    pass: PassOn,
}

/// The collector beside a Jaeger whose page is at `url`.
fn otlp_of(url: &str) -> anyhow::Result<String> {
    let (scheme, rest) = url.split_once("://").context("--jaeger is no URL")?;
    let authority = rest.split('/').next().unwrap_or_default();
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    Ok(format!("{scheme}://{host}:4317"))
}

fn etcd_url(url: &str) -> Result<String, String> {
    match url.parse::<::cluster::Registry>() {
        Ok(::cluster::Registry::Etcd(_)) => Ok(url.to_owned()),
        Ok(::cluster::Registry::Static(_)) => Err("`up` makes its own list; give an etcd:// URL".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Flags handed to the children as they are; see `shoal router --help` and `shoal gateway --help`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct PassOn {
    /// For the router, for example --router-arg=--context-max=2048; may be repeated
    #[arg(long = "router-arg", value_name = "FLAG=VALUE", allow_hyphen_values = true)]
    pub(crate) router: Vec<String>,
    /// For the gateway, for example --gateway-arg=--served-model-name=fish; may be repeated
    #[arg(long = "gateway-arg", value_name = "FLAG=VALUE", allow_hyphen_values = true)]
    pub(crate) gateway: Vec<String>,
    /// For every expert server, or for the Nth only: --expert-arg=2:--chaos-delay=20ms; may be repeated
    #[arg(long = "expert-arg", value_name = "[N:]FLAG=VALUE", allow_hyphen_values = true)]
    pub(crate) expert: Vec<String>,
}

impl PassOn {
    /// The flags for expert server `at`, counted from 0.
    pub(crate) fn for_expert(&self, at: usize) -> Vec<String> {
        let flag = |arg: &String| match arg.split_once(':').map(|(n, flag)| (n.parse::<usize>(), flag)) {
            Some((Ok(n), flag)) => (n == at + 1).then(|| flag.to_owned()),
            Some((Err(_), _)) | None => Some(arg.clone()),
        };
        self.expert.iter().filter_map(flag).collect()
    }
}

pub(crate) async fn run(mut args: Args, log: &LogArgs) -> anyhow::Result<ExitCode> {
    if let (Some(jaeger), None) = (&args.jaeger, &args.traces.otlp) {
        args.traces.otlp = Some(otlp_of(jaeger)?);
    }
    let trace_url = args.jaeger.iter().map(|url| format!("--trace-url={url}"));
    let registry = match (args.registry, args.etcd) {
        (Some(url), _) => Where::Etcd(url),
        (None, true) => Where::OwnEtcd,
        (None, false) => Where::Static,
    };
    ensure!(
        args.experts > 0 || args.replicas.get() == 1,
        "--replicas {} is for expert servers, and --experts 0 starts none",
        args.replicas
    );
    ensure!(
        args.experts > 0 || args.pass.expert.is_empty(),
        "--expert-arg is for expert servers, and --experts 0 starts none"
    );
    let plan = Plan {
        model: checkpoint_dir::find(args.model.as_deref())?,
        experts: match &registry {
            Where::Static => Plan::shards(args.experts, args.replicas.get()),
            Where::Etcd(_) | Where::OwnEtcd => vec![Vec::new(); args.experts],
        },
        registry,
        routers: args.routers.get(),
        router_args: [vec![format!("--replicas={}", args.replicas)], args.pass.router.clone()].concat(),
        expert_args: (0..args.experts).map(|at| args.pass.for_expert(at)).collect(),
        gateway: Some((args.listen, args.pass.gateway.into_iter().chain(trace_url).collect())),
        quiet: false,
        log_args: log.to_args(),
        weights_args: args.weights.to_args(),
        trace_args: args.traces.to_args(),
    };
    let stop = telemetry::tasks::stop_signal();
    tokio::pin!(stop);
    let cluster = tokio::select! {
        cluster = Cluster::start(&plan) => cluster?,
        // Dropped half started: children are killed with it, and etcd by its keeper.
        stopped = &mut stop => return stopped.map(|()| ExitCode::SUCCESS).map_err(Into::into),
    };
    print(&cluster, args.json)?;
    stop.await?;
    cluster.stop().await;
    Ok(ExitCode::SUCCESS)
}

fn print(cluster: &Cluster, as_json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if as_json {
        let members: Vec<_> = cluster
            .members()
            .map(|member| json!({ "name": member.spec.name, "pid": member.pid(), "address": member.address, "role": member.spec.role }))
            .collect();
        writeln!(out, "{}", json!({ "members": members, "registry": cluster.own_registry() }))?;
        return out.flush();
    }
    let mut rows = vec![["NAME", "PID", "ADDRESS", "ROLE"].map(str::to_owned).to_vec()];
    rows.extend(cluster.members().map(|member| {
        vec![
            member.spec.name.clone(),
            member.pid().to_string(),
            member.address.to_string(),
            member.spec.role.clone(),
        ]
    }));
    write!(out, "\n{}", table::format(&rows))?;
    if let Some(gateway) = &cluster.gateway {
        let address = gateway.address;
        writeln!(out, "\nready: http://{address}/v1, gRPC on the same port; stop with Ctrl-C")?;
        if let Some(registry) = cluster.own_registry() {
            writeln!(out, "  shoal ps --registry {registry}")?;
        }
        writeln!(out, "  shoal chat --url http://{address} \"What is 348 + 277?\"")?;
    }
    out.flush()
}
