//! The cluster under test: etcd, expert servers, routers and gateways, each a real process that can be hurt.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use proto::v1::{self, expert_client::ExpertClient};
use telemetry::Tasks;
use tokio::process::Command;
use tonic::transport::Endpoint;

use super::{
    etcd::Etcd,
    history::History,
    hosts::{Hosts, Loss},
    load::Gateways,
    process::Process,
    proxy::{Proxy, Toxics},
    scenario::{Action, Event, Topology},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Expert,
    Router,
    Gateway,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Expert => "expert",
            Self::Router => "router",
            Self::Gateway => "gateway",
        }
    }
}

/// One process, over all its lives.
pub(crate) struct Member {
    pub(crate) role: Role,
    pub(crate) index: usize,
    process: Option<Process>,
    /// At which it listens; for an expert server behind a proxy, others see the proxy's.
    pub(crate) address: Option<SocketAddr>,
    proxy: Option<Proxy>,
    pub(crate) frozen: bool,
}

impl Member {
    pub(crate) const fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// As others see it.
    pub(crate) fn advertised(&self) -> Option<SocketAddr> {
        self.proxy.as_ref().map(|proxy| proxy.address).or(self.address)
    }
}

pub(crate) struct Cluster {
    program: PathBuf,
    model: PathBuf,
    dir: PathBuf,
    topology: Topology,
    pub(crate) etcd: Etcd,
    hosts: Option<Hosts>,
    pub(crate) members: Vec<Member>,
    pub(crate) gateways: Gateways,
    seed: u64,
    tasks: Tasks,
    history: Arc<History>,
}

/// Leases of the runs: short, so that a run need not be long.
const TTL: &str = "3s";

impl Cluster {
    pub(crate) async fn start(
        topology: &Topology,
        program: &Path,
        model: &Path,
        dir: &Path,
        seed: u64,
        tasks: &Tasks,
        history: &Arc<History>,
    ) -> anyhow::Result<Self> {
        let hosts = if topology.hosts { Some(Hosts::new(topology.experts as u8)?) } else { None };
        let ip = hosts.as_ref().map_or_else(|| [127, 0, 0, 1].into(), Hosts::ours);
        let mut cluster = Self {
            program: program.to_owned(),
            model: model.to_owned(),
            dir: dir.to_owned(),
            topology: topology.clone(),
            etcd: Etcd::start(ip, dir).await?,
            hosts,
            members: Vec::new(),
            gateways: Gateways::default(),
            seed,
            tasks: tasks.clone(),
            history: Arc::clone(history),
        };
        for (role, n) in [
            (Role::Expert, topology.experts),
            (Role::Router, topology.routers),
            (Role::Gateway, topology.gateways),
        ] {
            for _ in 0..n {
                cluster.add(role).await?;
            }
        }
        Ok(cluster)
    }

    pub(crate) fn registry(&self) -> String {
        format!("etcd://{}/chaos?ttl={TTL}", self.etcd.address())
    }

    pub(crate) async fn add(&mut self, role: Role) -> anyhow::Result<usize> {
        let index = self.members.iter().filter(|member| member.role == role).count();
        let proxy = match role {
            Role::Expert if self.topology.proxied => {
                Some(Proxy::start(self.seed ^ index as u64, &self.tasks).await?)
            }
            Role::Expert | Role::Router | Role::Gateway => None,
        };
        self.members.push(Member { role, index, process: None, address: None, proxy, frozen: false });
        self.up(self.members.len() - 1).await?;
        Ok(self.members.len() - 1)
    }

    /// Starts a member that is down, at a port of its own.
    pub(crate) async fn up(&mut self, at: usize) -> anyhow::Result<()> {
        let registry = self.registry();
        let member = &mut self.members[at];
        let (name, role) = (format!("{}{}", member.role.name(), member.index), member.role);
        let mut args = vec![role.name().to_owned(), "--model".to_owned(), self.model.display().to_string()];
        args.extend(["--registry".to_owned(), registry, "--exit-with-stdin".to_owned()]);
        let space = match (&self.hosts, role) {
            (Some(hosts), Role::Expert) => {
                args.extend(["--listen".to_owned(), format!("{}:0", hosts.ip(member.index as u8))]);
                Some(hosts.space(member.index as u8))
            }
            _ => {
                args.extend(["--listen".to_owned(), "127.0.0.1:0".to_owned()]);
                None
            }
        };
        if role == Role::Router {
            args.extend(["--replicas".to_owned(), self.topology.replicas.to_string()]);
            args.extend(self.topology.router_args.iter().cloned());
        }
        if let Some(proxy) = &member.proxy {
            args.extend(["--advertise".to_owned(), proxy.address.to_string()]);
        }
        let mut command = match space {
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &space]).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        let mut process = Process::start(&name, command.args(&args), &self.dir)?;
        let address = process.address().await?;
        if let Some(proxy) = &member.proxy {
            proxy.forward_to(address);
        }
        member.process = Some(process);
        member.address = Some(address);
        self.history.note("up", &serde_json::json!({ "who": name, "address": address.to_string() }));
        self.tell_clients();
        Ok(())
    }

    fn tell_clients(&self) {
        let up = self.of(Role::Gateway).filter(|member| member.is_up()).filter_map(|member| member.address);
        *self.gateways.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = up.collect();
    }

    pub(crate) fn of(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// Positions that a target names.
    fn targets(&self, target: &str) -> anyhow::Result<Vec<usize>> {
        let all = |role| -> Vec<usize> {
            let of_role = self
                .members
                .iter()
                .enumerate()
                .filter(|(_, member)| Some(member.role) == role || role.is_none());
            of_role.map(|(at, _)| at).collect()
        };
        match target {
            // Experts first: a router that comes back finds them, and a gateway its routers.
            "all" => return Ok(all(None)),
            "experts" => return Ok(all(Some(Role::Expert))),
            _ => {}
        }
        let (role, which) =
            target.split_once(' ').with_context(|| format!("target {target:?} names nobody"))?;
        let role = match role {
            "expert" => Role::Expert,
            "router" => Role::Router,
            "gateway" => Role::Gateway,
            _ => bail!("target {target:?} names no role"),
        };
        let of_role = all(Some(role));
        which
            .split(',')
            .map(|which| {
                let index: usize = which.parse().with_context(|| format!("target {target:?}"))?;
                of_role.get(index).copied().with_context(|| format!("there is no {role:?} {index}"))
            })
            .collect()
    }

    fn down(&self, role: Role) -> Vec<usize> {
        let down = |member: &&Member| member.role == role && !member.is_up();
        (0..self.members.len()).filter(|&at| down(&&self.members[at])).collect()
    }

    /// Half of the expert servers, so chosen that the others hold every expert.
    async fn half(&self) -> anyhow::Result<Vec<usize>> {
        let mut holds: Vec<(usize, BTreeSet<(u32, u32)>)> = Vec::new();
        for (at, member) in self.members.iter().enumerate() {
            if let (Role::Expert, Some(address), true) = (member.role, member.address, member.is_up()) {
                let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
                let status =
                    ExpertClient::new(channel).status(v1::ExpertStatusRequest {}).await?.into_inner();
                let pairs =
                    status.holds.iter().flat_map(|of| of.experts.iter().map(|&expert| (of.layer, expert)));
                holds.push((at, pairs.collect()));
            }
        }
        let n = holds.len();
        let all: BTreeSet<_> = holds.iter().flat_map(|(_, pairs)| pairs).collect();
        (0_u32..1 << n)
            .filter(|chosen| chosen.count_ones() as usize == n / 2)
            .find(|chosen| {
                let left = holds.iter().enumerate().filter(|(at, _)| chosen & (1 << at) == 0);
                left.flat_map(|(_, (_, pairs))| pairs).collect::<BTreeSet<_>>() == all
            })
            .map(|chosen| (0..n).filter(|at| chosen & (1 << at) != 0).map(|at| holds[at].0).collect())
            .context("every half of the expert servers holds some expert alone")
    }

    /// Does it to everybody named, and says in the history when.
    pub(crate) async fn apply(&mut self, event: &Event) -> anyhow::Result<()> {
        let name = serde_json::to_value(event.action)?;
        self.history.note("event", &serde_json::json!({ "do": name, "target": event.target }));
        match event.action {
            Action::EtcdDown => return self.etcd.down().await,
            Action::EtcdUp => return self.etcd.up().await,
            Action::EtcdWipe => {
                self.etcd.down().await?;
                self.etcd.wipe();
                return self.etcd.up().await;
            }
            Action::EtcdFreeze => return self.etcd.signal(Signal::SIGSTOP),
            Action::EtcdThaw => return self.etcd.signal(Signal::SIGCONT),
            Action::Add => return self.add(Role::Expert).await.map(drop),
            _ => {}
        }
        let targets = match (event.target.as_str(), event.action) {
            ("experts half", Action::Start) => self.down(Role::Expert),
            ("experts half", _) => self.half().await?,
            (target, _) => self.targets(target)?,
        };
        for at in targets {
            self.apply_to(at, event).await.with_context(|| format!("{:?} {}", event.action, event.target))?;
        }
        Ok(())
    }

    async fn apply_to(&mut self, at: usize, event: &Event) -> anyhow::Result<()> {
        match event.action {
            Action::Kill => {
                if let Some(mut process) = self.members[at].process.take() {
                    process.kill().await?;
                }
                self.tell_clients();
            }
            Action::Start => {
                if !self.members[at].is_up() {
                    self.up(at).await?;
                }
            }
            Action::Freeze | Action::Thaw => {
                let freeze = event.action == Action::Freeze;
                let signal = if freeze { Signal::SIGSTOP } else { Signal::SIGCONT };
                self.members[at].process.as_ref().context("it is down")?.signal(signal)?;
                self.members[at].frozen = freeze;
            }
            Action::Terminate | Action::Restart => {
                let mut process = self.members[at].process.take().context("it is down")?;
                // A load balancer stops sending to a gateway that is about to go.
                self.tell_clients();
                process.terminate().await?;
                if event.action == Action::Restart {
                    self.up(at).await?;
                }
            }
            Action::Toxic => {
                let proxy = self.members[at].proxy.as_ref().context("`proxied` is off")?;
                proxy.set(event.toxics.clone());
            }
            Action::Lose => {
                let hosts = self.hosts.as_ref().context("`hosts` is off")?;
                let loss = Loss { to_percent: event.lose_to, from_percent: event.lose_from };
                hosts.lose(self.members[at].index as u8, loss)?;
            }
            Action::Add
            | Action::EtcdDown
            | Action::EtcdUp
            | Action::EtcdWipe
            | Action::EtcdFreeze
            | Action::EtcdThaw => {}
        }
        Ok(())
    }

    /// Everything works again, as far as the cluster can be made to.
    pub(crate) fn mend(&self) -> anyhow::Result<()> {
        for member in &self.members {
            if let Some(proxy) = &member.proxy {
                proxy.set(Toxics::default());
            }
            if let (true, Some(process)) = (member.frozen, &member.process) {
                process.signal(Signal::SIGCONT)?;
            }
            if let (Some(hosts), Role::Expert) = (&self.hosts, member.role) {
                hosts.lose(member.index as u8, Loss { to_percent: 0, from_percent: 0 })?;
            }
        }
        Ok(())
    }

    /// Processes that have ended although nobody ended them.
    pub(crate) fn fallen(&mut self) -> Vec<String> {
        let ended = self.members.iter_mut().filter_map(|member| member.process.as_mut());
        ended.filter_map(|process| process.has_ended().then(|| process.name.clone())).collect()
    }
}
