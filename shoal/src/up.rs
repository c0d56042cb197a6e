//! `shoal up`: a cluster on this machine until Ctrl-C.

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
};

use serde_json::json;

use crate::{
    checkpoint_dir,
    cluster::{Cluster, Plan},
    table,
};

/// Start a gateway, a router and expert servers on this machine.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder [default: the bundled model minnow]
    #[arg(long, env = "SHOAL_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Expert servers; each holds its part of every layer's experts
    #[arg(long, env = "SHOAL_UP_EXPERTS", default_value = "2", value_name = "N")]
    experts: NonZeroUsize,
    /// Where the API listens; port 0 takes a free one
    #[arg(long, env = "SHOAL_LISTEN", default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    listen: SocketAddr,
    /// Print where everybody listens as one JSON line instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pass: PassOn,
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
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let plan = Plan {
        model: checkpoint_dir::find(args.model.as_deref())?,
        shards: Plan::shards(args.experts.get()),
        router_args: args.pass.router,
        gateway: Some((args.listen, args.pass.gateway)),
        quiet: false,
        log_args: Vec::new(),
    };
    let stop = telemetry::tasks::stop_signal();
    tokio::pin!(stop);
    let cluster = tokio::select! {
        cluster = Cluster::start(&plan) => cluster?,
        // Dropped half started: children are killed with it.
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
        writeln!(out, "{}", json!({ "members": members }))?;
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
        writeln!(out, "  shoal chat --url http://{address} \"What is 348 + 277?\"")?;
    }
    out.flush()
}
