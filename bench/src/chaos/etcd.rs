//! A real etcd of one member, that can be stopped, frozen, and started with its data or without.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use cluster::Port;
use nix::sys::signal::Signal;
use tokio::{net::TcpStream, process::Command};

use super::process::Process;

const START_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) struct Etcd {
    /// Kept while it is down.
    client: Port,
    peer: Port,
    dir: PathBuf,
    n_wipes: usize,
    process: Option<Process>,
}

impl Etcd {
    pub(crate) async fn start(ip: IpAddr, dir: &Path) -> anyhow::Result<Self> {
        let mut etcd = Self {
            client: Port::reserve(ip)?,
            peer: Port::reserve(ip)?,
            dir: dir.to_owned(),
            n_wipes: 0,
            process: None,
        };
        etcd.up().await?;
        Ok(etcd)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// With the data that it had.
    pub(crate) async fn up(&mut self) -> anyhow::Result<()> {
        let (client, peer) =
            (format!("http://{}", self.address()), format!("http://{}", self.peer.address()));
        let data = self.dir.join(format!("etcd-data-{}", self.n_wipes));
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            // Short, so that short leases are granted.
            .args(["--heartbeat-interval", "50", "--election-timeout", "250"]);
        self.process = Some(Process::start("etcd", &mut command, &self.dir).context(
            "etcd is needed: on Debian `apt-get install etcd-server`, else put the etcd binary on PATH",
        )?);
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        while TcpStream::connect(self.address()).await.is_err() {
            if tokio::time::Instant::now() > deadline {
                bail!("etcd does not listen on {} within {START_TIMEOUT:?}", self.address());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub(crate) async fn down(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Its data is gone when it starts the next time.
    pub(crate) fn wipe(&mut self) {
        self.n_wipes += 1;
    }

    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.process.as_ref().context("etcd is down")?.signal(signal)
    }
}
