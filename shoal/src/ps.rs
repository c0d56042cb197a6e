//! `shoal ps`: who is where, in which state, holding what, how busy; as each process says itself.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use cluster::{Member, Membership, Registry, Role, Session};
use proto::v1::{self, expert_client::ExpertClient, router_client::RouterClient};
use serde_json::{Value, json};
use telemetry::Tasks;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use crate::table;

/// Print who is where, in which state, what it holds and how busy it is.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  shoal ps --registry etcd://127.0.0.1:2379/shoal\n  shoal ps --registry static://127.0.0.1:7001,127.0.0.1:7002"
)]
pub(crate) struct Args {
    /// Where processes are registered; a static list is asked address by address
    #[arg(long, env = "SHOAL_REGISTRY", value_name = "URL")]
    registry: Registry,
    /// One JSON object a process instead of a table
    #[arg(long)]
    json: bool,
}

/// How long the registry may take to say who is there.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(5);
/// And each process to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let tasks = Tasks::new();
    let session = Session::open(&args.registry, &tasks).context("cannot use --registry")?;
    let (routers, experts) =
        tokio::try_join!(heard(session.members(Role::Router)), heard(session.members(Role::Expert)),)?;
    let mut lines = Vec::new();
    if session.is_dynamic() {
        lines.extend(futures_util::future::join_all(routers.members.iter().map(router)).await);
        lines.extend(futures_util::future::join_all(experts.members.iter().map(expert)).await);
    } else {
        // A static list does not say who is what.
        let asked = experts.members.iter().map(|entry| async move {
            let line = router(entry).await;
            if line.answers { line } else { expert(entry).await }
        });
        lines.extend(futures_util::future::join_all(asked).await);
    }
    tasks.begin_shutdown();
    print(&lines, args.json)?;
    Ok(if lines.iter().all(|line| line.answers) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn heard(mut members: watch::Receiver<Arc<Membership>>) -> anyhow::Result<Arc<Membership>> {
    let heard =
        tokio::time::timeout(REGISTRY_TIMEOUT, members.wait_for(|members| members.revision > 0)).await;
    match heard {
        Ok(Ok(members)) => Ok(Arc::clone(&members)),
        Ok(Err(_)) | Err(_) => bail!("the registry does not answer within {REGISTRY_TIMEOUT:?}"),
    }
}

/// One process.
struct Line {
    instance: String,
    role: &'static str,
    address: String,
    state: String,
    holds: String,
    load: String,
    answers: bool,
    /// All it says.
    detail: Value,
}

impl Line {
    fn silent(role: &'static str, (key, member): (&String, &Member)) -> Self {
        let registered = member.record.as_ref().map(|record| record.state.as_str());
        Self {
            instance: key.clone(),
            role,
            address: member.address.clone(),
            state: registered.map_or_else(|| "silent".to_owned(), |state| format!("{state}, silent")),
            holds: String::new(),
            load: String::new(),
            answers: false,
            detail: Value::Null,
        }
    }
}

async fn channel(address: &str) -> Option<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    tokio::time::timeout(ANSWER_TIMEOUT, endpoint.connect()).await.ok()?.ok()
}

async fn router(entry: (&String, &Member)) -> Line {
    let silent = Line::silent("router", entry);
    let Some(channel) = channel(&silent.address).await else { return silent };
    let mut client = RouterClient::new(channel);
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, client.status(v1::RouterStatusRequest {})).await;
    let Ok(Ok(response)) = asked else { return silent };
    let status = response.into_inner();
    let leads =
        if status.leader { format!(", leads (placement {})", status.placement) } else { String::new() };
    let missing: usize = status.missing.iter().map(|layer| layer.experts.len()).sum();
    let not_ready = status.servers.iter().filter(|server| server.state != "ready");
    let not_ready: Vec<String> =
        not_ready.map(|server| format!("{} {}", server.address, server.state)).collect();
    let mut holds = match (missing, status.under_replicated) {
        (0, 0) => "every expert is held".to_owned(),
        (0, n) => format!("{n} experts have too few holders"),
        (n, _) => format!("{n} experts have no holder"),
    };
    for inside in status.servers.iter().filter(|server| server.transport == "inside") {
        holds = format!("{holds}, {} inside", inside.n_experts);
    }
    if !not_ready.is_empty() {
        holds = format!("{holds}; {}", not_ready.join(", "));
    }
    Line {
        instance: status.instance.clone(),
        state: format!("{}{leads}", status.state),
        holds,
        load: format!(
            "{} running, {} waiting, {} of {} pages",
            status.running, status.waiting, status.pages_in_use, status.pages
        ),
        answers: true,
        detail: json!({
            "frames": status.frames, "hedges": status.hedges, "failovers": status.failovers,
            "ejections": status.ejections, "stale_replies": status.stale_replies, "failures": status.failures,
            "tokens_out": status.tokens_out, "steps": status.steps, "leader": status.leader,
            "placement": status.placement, "missing": missing, "under_replicated": status.under_replicated,
            "unsettled_bytes": status.unsettled_bytes,
        }),
        ..silent
    }
}

async fn expert(entry: (&String, &Member)) -> Line {
    let silent = Line::silent("expert", entry);
    let Some(channel) = channel(&silent.address).await else { return silent };
    let mut client = ExpertClient::new(channel);
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, client.status(v1::ExpertStatusRequest {})).await;
    let Ok(Ok(response)) = asked else { return silent };
    let status = response.into_inner();
    let pairs = status.holds.iter().flat_map(|layer| {
        layer.experts.iter().map(move |&expert| (ids::LayerId(layer.layer), ids::ExpertId(expert)))
    });
    let holds: cluster::Holds = pairs.collect();
    Line {
        instance: status.instance.clone(),
        state: status.state.clone(),
        holds: match holds.is_empty() {
            true => "nothing".to_owned(),
            false => format!("{} experts ({}), {} MiB", holds.len(), short(&holds), status.shard_bytes >> 20),
        },
        load: format!("{} frames, {} streams", status.frames, status.open_streams),
        answers: true,
        detail: json!({
            "holds": holds.to_string(), "epoch": status.epoch, "device": status.device,
            "shard_bytes": status.shard_bytes, "memory_bytes_max": status.memory_bytes_max,
            "placement": status.placement, "frames": status.frames, "frames_failed": status.frames_failed,
            "frames_late": status.frames_late, "rows": status.rows, "open_streams": status.open_streams,
            "unsettled_bytes": status.unsettled_bytes,
        }),
        ..silent
    }
}

/// The beginning of a long list; all of it is in the JSON.
fn short(holds: &cluster::Holds) -> String {
    const CHARS_MAX: usize = 32;
    let text = holds.to_string();
    if text.chars().count() <= CHARS_MAX {
        return text;
    }
    format!("{}…", text.chars().take(CHARS_MAX).collect::<String>())
}

fn print(lines: &[Line], as_json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if as_json {
        for line in lines {
            let Line { instance, role, address, state, detail, .. } = line;
            let line = json!({ "instance": instance, "role": role, "address": address, "state": state, "status": detail });
            writeln!(out, "{line}")?;
        }
        return out.flush();
    }
    let mut rows =
        vec![["ROLE", "INSTANCE", "ADDRESS", "STATE", "EXPERTS", "LOAD"].map(str::to_owned).to_vec()];
    rows.extend(lines.iter().map(|line| {
        // Enough of an instance to tell it from the others.
        let short: String = line.instance.trim_start_matches("router-").chars().take(8).collect();
        vec![
            line.role.to_owned(),
            short,
            line.address.clone(),
            line.state.clone(),
            line.holds.clone(),
            line.load.clone(),
        ]
    }));
    write!(out, "{}", table::format(&rows))?;
    out.flush()
}
