//! A whole cluster on this machine: expert servers, a router, a gateway, each a child process.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use model::{
    Weights,
    tune::{Tuning, Wanted},
};
use proto::v1::{self, expert_client::ExpertClient, router_client::RouterClient};
use telemetry::Tasks;
use tonic::transport::{Channel, Endpoint};

use crate::{
    etcd::Etcd,
    member::{Member, Spec},
    process,
};

/// What to start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) model: PathBuf,
    /// The flags that say what each expert server holds; with etcd none: the placement says it. Without a server, routers hold
    /// every expert.
    pub(crate) experts: Vec<Vec<String>>,
    pub(crate) registry: Where,
    pub(crate) routers: usize,
    pub(crate) router_args: Vec<String>,
    /// Where the gateway listens and its further flags; None: no gateway.
    pub(crate) gateway: Option<(SocketAddr, Vec<String>)>,
    pub(crate) quiet: bool,
    pub(crate) log_args: Vec<String>,
    /// By expert server; fewer lists than servers leave the others without.
    pub(crate) expert_args: Vec<Vec<String>>,
    /// For every router and expert server.
    pub(crate) weights_args: Vec<String>,
    /// For every service.
    pub(crate) trace_args: Vec<String>,
}

/// How the processes find each other.
#[derive(Clone, Debug)]
pub(crate) enum Where {
    /// They are told each other's addresses.
    Static,
    /// They register in an etcd that runs already.
    Etcd(String),
    /// They register in an etcd that is started with them.
    OwnEtcd,
}

impl Plan {
    /// `n` contiguous shards, each on `replicas` servers.
    pub(crate) fn shards(n: usize, replicas: usize) -> Vec<Vec<String>> {
        let part = |at: usize| format!("{}/{n}", at % n + 1);
        let parts = |first: usize| (first..first + replicas.min(n)).map(part).collect::<Vec<_>>().join(",");
        (0..n).map(|server| vec!["--shard".to_owned(), parts(server)]).collect()
    }
}

/// A free port of this machine only.
pub(crate) const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// How long a router may take to find its experts and calibrate.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// How long weights may take to get into huge pages without any progress.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
const READY_POLL: Duration = Duration::from_millis(20);

pub(crate) struct Cluster {
    pub(crate) experts: Vec<Member>,
    pub(crate) routers: Vec<Member>,
    etcd: Option<Etcd>,
    pub(crate) gateway: Option<Member>,
    tasks: Tasks,
}

impl Cluster {
    /// Starts everything and waits until requests can be answered.
    pub(crate) async fn start(plan: &Plan) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let tasks = Tasks::new();
        let tuned = tune(plan)?;
        let spec = |name: String, role: String, service: &str, listen: SocketAddr, args: Vec<String>| Spec {
            name,
            role,
            program: program.clone(),
            args: [
                plan.log_args.clone(),
                vec![service.to_owned(), "--model".to_owned(), plan.model.display().to_string()],
                plan.trace_args.clone(),
                if service == "gateway" { Vec::new() } else { compute_args(plan, &tuned, &args) },
                args,
            ]
            .concat(),
            listen,
            quiet: plan.quiet,
        };
        let etcd = match plan.registry {
            Where::OwnEtcd => Some(Etcd::start().await?),
            Where::Static | Where::Etcd(_) => None,
        };
        let in_etcd = match &plan.registry {
            Where::Static => None,
            Where::Etcd(url) => Some(url.clone()),
            Where::OwnEtcd => etcd.as_ref().map(|etcd| format!("etcd://{}/shoal", etcd.address())),
        };
        let registry = |members: &[Member]| {
            let list =
                || members.iter().map(|member| member.address.to_string()).collect::<Vec<_>>().join(",");
            vec!["--registry".to_owned(), in_etcd.clone().unwrap_or_else(|| format!("static://{}", list()))]
        };
        // Expert servers load side by side.
        let starts = plan.experts.iter().enumerate().map(|(i, flags)| {
            let role = match flags.as_slice() {
                [] => "experts as placed".to_owned(),
                [flag, rest @ ..] => format!("{} {}", flag.trim_start_matches('-'), rest.join(" ")),
            };
            let registry = if in_etcd.is_some() { registry(&[]) } else { Vec::new() };
            let own = plan.expert_args.get(i).cloned().unwrap_or_default();
            let args = [flags.clone(), registry, own].concat();
            Member::start(spec(format!("expert{}", i + 1), role, "expert", LOCAL, args), &tasks)
        });
        let experts: Vec<Member> = futures_util::future::try_join_all(starts).await?;
        let starts = (0..plan.routers).map(|i| {
            let name = if plan.routers == 1 { "router".to_owned() } else { format!("router{}", i + 1) };
            let (args, role) = if plan.experts.is_empty() {
                let others = if in_etcd.is_some() { registry(&[]) } else { Vec::new() };
                ([others, vec!["--shard=1/1".to_owned()]].concat(), "attention, gate, KV cache, experts")
            } else {
                (registry(&experts), "attention, gate, KV cache")
            };
            let (args, role) = ([args, plan.router_args.clone()].concat(), role.to_owned());
            Member::start(spec(name, role, "router", LOCAL, args), &tasks)
        });
        let routers: Vec<Member> = futures_util::future::try_join_all(starts).await?;
        for router in &routers {
            wait_until_ready(router.address).await?;
        }
        let gateway = match &plan.gateway {
            None => None,
            Some((listen, args)) => {
                let args = [registry(&routers), args.clone()].concat();
                let role = "OpenAI and gRPC API".to_owned();
                let spec = spec("gateway".to_owned(), role, "gateway", *listen, args);
                Some(Member::start(spec, &tasks).await?)
            }
        };
        Ok(Self { experts, routers, gateway, etcd, tasks })
    }

    /// Waits until weights are where they stay: for whoever measures. Requests are answered before that.
    pub(crate) async fn settled(&self) -> anyhow::Result<()> {
        let mut left = self.unsettled_bytes().await?;
        while left > 0 {
            let less = async {
                loop {
                    tokio::time::sleep(READY_POLL).await;
                    let now = self.unsettled_bytes().await?;
                    if now < left {
                        return anyhow::Ok(now);
                    }
                }
            };
            left = tokio::time::timeout(SETTLE_TIMEOUT, less).await.with_context(|| {
                format!("{left} bytes of weights do not get into huge pages; --huge-pages=false leaves them mapped")
            })??;
        }
        Ok(())
    }

    async fn unsettled_bytes(&self) -> anyhow::Result<u64> {
        let mut n_bytes = 0;
        for member in &self.experts {
            let mut client = ExpertClient::new(channel(&format!("http://{}", member.address)).await?);
            n_bytes += client.status(v1::ExpertStatusRequest {}).await?.into_inner().unsettled_bytes;
        }
        for member in &self.routers {
            let mut client = router_client(member.address).await?;
            n_bytes += client.status(v1::RouterStatusRequest {}).await?.into_inner().unsettled_bytes;
        }
        Ok(n_bytes)
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = &Member> {
        self.gateway.iter().chain(&self.routers).chain(&self.experts)
    }

    /// Ends it in order: nobody loses the ones it needs.
    pub(crate) async fn stop(self) {
        if let Some(gateway) = &self.gateway {
            gateway.stop().await;
        }
        futures_util::future::join_all(self.routers.iter().map(Member::stop)).await;
        futures_util::future::join_all(self.experts.iter().map(Member::stop)).await;
        if let Some(etcd) = self.etcd {
            etcd.stop().await;
        }
        self.tasks.begin_shutdown();
    }

    /// Where everybody is registered, if that is an etcd of the cluster's own.
    pub(crate) fn own_registry(&self) -> Option<String> {
        self.etcd.as_ref().map(|etcd| format!("etcd://{}/shoal", etcd.address()))
    }
}

/// How every process of the cluster computes. Tried here, once: tests of many processes that start together would
/// disturb each other. They share their cores, so none of them spins between steps, unless it is one alone.
fn tune(plan: &Plan) -> anyhow::Result<Vec<String>> {
    let quantized = !plan.weights_args.iter().any(|arg| arg.ends_with(Weights::Stored.name()));
    let alone = plan.experts.is_empty() && plan.routers == 1;
    let wanted =
        Wanted { spin: (!alone).then_some(false), huge_pages: (!quantized).then_some(false), threads: None };
    let Tuning { threads, spins, huge_pages } = process::tune(wanted)?;
    Ok(vec![
        format!("--threads={threads}"),
        format!("--spin={}", spins > 0),
        format!("--huge-pages={huge_pages}"),
    ])
}

/// `found` but for the flags that are given already, and those of the weights.
fn compute_args(plan: &Plan, found: &[String], own: &[String]) -> Vec<String> {
    let flag = |arg: &str| arg.split('=').next().unwrap_or_default().to_owned();
    let given: Vec<String> = own.iter().map(|arg| flag(arg)).collect();
    plan.weights_args.iter().chain(found.iter().filter(|arg| !given.contains(&flag(arg)))).cloned().collect()
}

/// A client of a router of ours.
pub(crate) async fn router_client(address: SocketAddr) -> anyhow::Result<RouterClient<Channel>> {
    let channel = channel(&format!("http://{address}")).await?;
    Ok(RouterClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX))
}

/// A connection to `url`.
pub(crate) async fn channel(url: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned()).with_context(|| format!("{url:?} is not a URL"))?;
    let endpoint = endpoint
        .tcp_nodelay(true)
        .initial_stream_window_size(proto::HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(proto::HTTP2_WINDOW_BYTES)
        .max_frame_size(proto::HTTP2_FRAME_BYTES);
    endpoint.connect().await.with_context(|| format!("cannot connect to {url}"))
}

async fn wait_until_ready(router: SocketAddr) -> anyhow::Result<()> {
    let mut client = router_client(router).await?;
    let mut last = v1::RouterStatus::default();
    let wait = async {
        loop {
            last = client.status(v1::RouterStatusRequest {}).await?.into_inner();
            if last.ready {
                return Ok::<_, tonic::Status>(());
            }
            tokio::time::sleep(READY_POLL).await;
        }
    };
    match tokio::time::timeout(READY_TIMEOUT, wait).await {
        Ok(result) => result.context("the router does not answer"),
        Err(_) => {
            let details = last
                .servers
                .iter()
                .map(|server| format!("{} {}: {}", server.address, server.state, server.detail));
            bail!("the router is not ready: {}", details.collect::<Vec<_>>().join("; "))
        }
    }
}
