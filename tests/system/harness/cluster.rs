//! Expert servers, a router and a gateway, each a process on a free port.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use cluster::Port;
use proto::v1::{self, expert_client::ExpertClient, router_client::RouterClient};
use tonic::transport::Channel;

use super::{Http, Process, clients, wait_for};

/// What gateways call their model.
pub(crate) const MODEL: &str = "tested";

/// A checkpoint's folder, which may be gone when its last owner is.
type Model = Box<dyn AsRef<Path> + Send + Sync>;

/// What to start.
pub(crate) struct Builder {
    model: Model,
    /// The flags that say which experts each server holds.
    holds: Vec<[String; 2]>,
    /// Further expert servers, which the test runs itself.
    other_experts: Vec<SocketAddr>,
    router_args: Vec<OsString>,
    /// By server.
    expert_args: Vec<(usize, Vec<OsString>)>,
    /// For every process.
    all_args: Vec<OsString>,
    gateway_args: Option<Vec<OsString>>,
}

pub(crate) struct Cluster {
    builder: Builder,
    ports: Ports,
    pub(crate) experts: Vec<Member>,
    pub(crate) router: Member,
    gateway: Option<Member>,
}

/// Where who may be started again listens, kept while it is down.
struct Ports {
    experts: Vec<Port>,
    router: Port,
}

fn reserve() -> Port {
    Port::reserve(Ipv4Addr::LOCALHOST).expect("a free port")
}

/// A process and where it listens.
pub(crate) struct Member {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
    channel: Channel,
}

impl Member {
    pub(crate) async fn start(name: &str, args: Vec<OsString>) -> Self {
        Self::of(Process::spawn_service(name, args)).await
    }

    async fn of(mut process: Process) -> Self {
        let address = process.address().await;
        Self { process, address, channel: clients::channel(address) }
    }

    /// A client, if this is a router. All clients of a member share a connection.
    pub(crate) fn router(&self) -> RouterClient<Channel> {
        clients::router(self.channel.clone())
    }

    /// A client, if this is an expert server.
    pub(crate) fn expert(&self) -> ExpertClient<Channel> {
        clients::expert(self.channel.clone())
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }
}

fn os(args: &[&str]) -> Vec<OsString> {
    args.iter().map(OsString::from).collect()
}

impl Builder {
    /// `n` servers, each with an equal share of every layer's experts.
    pub(crate) fn experts(mut self, n: usize) -> Self {
        self.holds = (1..=n).map(|index| ["--shard".to_owned(), format!("{index}/{n}")]).collect();
        self
    }

    /// A server for each list of experts, such as `0-2,5`.
    pub(crate) fn placement(mut self, lists: &[&str]) -> Self {
        self.holds = lists.iter().map(|list| ["--experts".to_owned(), (*list).to_owned()]).collect();
        self
    }

    /// No expert server: the router holds every expert.
    pub(crate) fn inside(self) -> Self {
        self.experts(0).router_args(&["--shard", "1/1"])
    }

    /// One more expert server that the router is told of.
    pub(crate) fn also_expert_at(mut self, address: SocketAddr) -> Self {
        self.other_experts.push(address);
        self
    }

    pub(crate) fn router_args(mut self, args: &[&str]) -> Self {
        self.router_args.extend(os(args));
        self
    }

    /// For expert server `index`.
    pub(crate) fn expert_args(mut self, index: usize, args: &[&str]) -> Self {
        self.expert_args.push((index, os(args)));
        self
    }

    /// For every process.
    pub(crate) fn all_args(mut self, args: &[&str]) -> Self {
        self.all_args.extend(os(args));
        self
    }

    pub(crate) fn gateway_args(mut self, args: &[&str]) -> Self {
        self.gateway_args.get_or_insert_default().extend(os(args));
        self
    }

    /// For tests of routers: they take token ids, so that a checkpoint needs no tokenizer.
    pub(crate) fn without_gateway(mut self) -> Self {
        self.gateway_args = None;
        self
    }

    /// Starts all processes and waits until they serve requests.
    pub(crate) async fn start(self) -> Cluster {
        let cluster = self.launch().await;
        cluster.ready().await;
        cluster
    }

    /// Starts all processes and waits until they listen; whether they are ready is for the test to find out.
    pub(crate) async fn launch(self) -> Cluster {
        let ports = Ports { experts: self.holds.iter().map(|_| reserve()).collect(), router: reserve() };
        let starting: Vec<Process> = (0..self.holds.len())
            .map(|index| {
                let args = self.args_of_expert(index, &ports.experts[index]);
                Process::spawn_service(format!("expert {index}"), args)
            })
            .collect();
        let mut experts = Vec::new();
        for process in starting {
            experts.push(Member::of(process).await);
        }
        let addresses = experts.iter().map(|expert| &expert.address).chain(&self.other_experts);
        let addresses: Vec<String> = addresses.map(SocketAddr::to_string).collect();
        let router = Member::start("router", self.args_of_router(&addresses, &ports.router)).await;
        let gateway = match &self.gateway_args {
            None => None,
            Some(extra) => {
                let registry = format!("static://{}", router.address);
                let fixed =
                    ["--listen", "127.0.0.1:0", "--served-model-name", MODEL, "--registry", &registry];
                let args = self.service("gateway").chain(os(&fixed));
                Some(Member::start("gateway", args.chain(extra.iter().cloned()).collect()).await)
            }
        };
        Cluster { builder: self, ports, experts, router, gateway }
    }

    fn service(&self, name: &str) -> impl Iterator<Item = OsString> + use<> {
        let model = [name.into(), "--model".into(), (*self.model).as_ref().into()];
        model.into_iter().chain(self.all_args.clone())
    }

    fn args_of_router(&self, experts: &[String], port: &Port) -> Vec<OsString> {
        let listen = port.address().to_string();
        let registry = (!experts.is_empty()).then(|| format!("--registry=static://{}", experts.join(",")));
        let args = self.service("router").chain(os(&["--listen", &listen]));
        args.chain(registry.map(OsString::from)).chain(self.router_args.iter().cloned()).collect()
    }

    fn args_of_expert(&self, index: usize, port: &Port) -> Vec<OsString> {
        let listen = port.address().to_string();
        let holds = self.holds[index].iter().map(OsString::from);
        let own = self.expert_args.iter().filter(|(of, _)| *of == index).flat_map(|(_, args)| args.clone());
        self.service("expert").chain(os(&["--listen", &listen])).chain(holds).chain(own).collect()
    }
}

impl Cluster {
    /// One expert server with everything, a router and a gateway, all with their defaults.
    pub(crate) fn builder(model: &(impl AsRef<Path> + Clone + Send + Sync + 'static)) -> Builder {
        Builder {
            model: Box::new(model.clone()),
            holds: vec![["--shard".to_owned(), "1/1".to_owned()]],
            other_experts: Vec::new(),
            router_args: Vec::new(),
            expert_args: Vec::new(),
            all_args: Vec::new(),
            gateway_args: Some(Vec::new()),
        }
    }

    /// Waits until a request would be answered.
    pub(crate) async fn ready(&self) {
        wait_for("ready router", async || {
            let status = self.router_status().await;
            if status.ready { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
        if self.gateway.is_some() {
            self.wait_for_ready(200).await;
        }
    }

    /// Waits until the router sends frames to every expert server that it knows.
    pub(crate) async fn servers_ready(&self) {
        wait_for("expert servers, all ready", async || {
            let servers = self.router_status().await.servers;
            let ready = servers.iter().all(|server| server.state == "ready");
            if ready { Ok(()) } else { Err(format!("{servers:?}")) }
        })
        .await;
    }

    /// Waits until the gateway's `/ready` answers with `status`; gives its body.
    pub(crate) async fn wait_for_ready(&self, status: u16) -> String {
        let http = self.http();
        wait_for(&format!("/ready with {status}"), async || {
            let response = http.get("/ready").await;
            let body = String::from_utf8_lossy(&response.body).into_owned();
            if response.status == status { Ok(body) } else { Err(format!("{} {body}", response.status)) }
        })
        .await
    }

    pub(crate) fn members(&mut self) -> impl Iterator<Item = &mut Member> {
        self.experts.iter_mut().chain([&mut self.router]).chain(&mut self.gateway)
    }

    pub(crate) fn gateway(&self) -> &Member {
        self.gateway.as_ref().expect("the test started a gateway")
    }

    pub(crate) fn gateway_mut(&mut self) -> &mut Member {
        self.gateway.as_mut().expect("the test started a gateway")
    }

    pub(crate) fn http(&self) -> Http {
        Http { address: self.gateway().address }
    }

    pub(crate) async fn router_status(&self) -> v1::RouterStatus {
        let status = self.router.router().status(v1::RouterStatusRequest {}).await;
        status.expect("a router answers Status").into_inner()
    }

    pub(crate) async fn expert_status(&self, index: usize) -> v1::ExpertStatus {
        let status = self.experts[index].expert().status(v1::ExpertStatusRequest {}).await;
        status.expect("an expert server answers Status").into_inner()
    }

    /// Starts expert server `index` again, where it was.
    pub(crate) async fn restart_expert(&mut self, index: usize) {
        let args = self.builder.args_of_expert(index, &self.ports.experts[index]);
        self.experts[index] = Member::start(&format!("expert {index}, again"), args).await;
    }

    /// Starts the router again, where it was.
    pub(crate) async fn restart_router(&mut self) {
        let addresses = self.experts.iter().map(|expert| &expert.address).chain(&self.builder.other_experts);
        let addresses: Vec<String> = addresses.map(SocketAddr::to_string).collect();
        let args = self.builder.args_of_router(&addresses, &self.ports.router);
        self.router = Member::start("router, again", args).await;
    }

    /// Waits until nothing is left of any request: no sequence, no page, no call, no frame.
    pub(crate) async fn idle(&self) {
        wait_for("idle router", async || {
            let status = self.router_status().await;
            let left = (status.pages_in_use, status.running, status.waiting, status.open_streams);
            let in_flight: u64 = status.servers.iter().map(|server| server.frames_in_flight).sum();
            if left == (0, 0, 0, 0) && in_flight == 0 { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
    }
}
