//! An etcd for the time of a cluster on this machine: in memory as far as etcd can, gone with its parent.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use cluster::Port;
use tokio::{
    net::TcpStream,
    process::{Child, ChildStdin, Command},
};

const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Ends etcd when this program does, however it ends: the shell waits for the end of its stdin.
const KEEPER: &str = "\"$@\" & pid=$!; trap 'kill $pid' TERM; cat >/dev/null; kill $pid; wait $pid";

pub(crate) struct Etcd {
    client: Port,
    _peer: Port,
    child: Child,
    stdin: Option<ChildStdin>,
    _data: tempfile::TempDir,
}

impl Etcd {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let (client, peer) = (Port::reserve(Ipv4Addr::LOCALHOST)?, Port::reserve(Ipv4Addr::LOCALHOST)?);
        let address = client.address();
        let data = tempfile::Builder::new().prefix("shoal-etcd-").tempdir()?;
        let (client_url, peer_url) = (format!("http://{address}"), format!("http://{}", peer.address()));
        let mut child = Command::new("sh")
            // Ctrl-C reaches whoever ends it after all that need it.
            .process_group(0)
            .args(["-c", KEEPER, "sh", "etcd", "--data-dir"])
            .arg(data.path())
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("default={peer_url}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Not killed when it is dropped: the end of its stdin lets it end etcd first.
            .spawn()
            .context("cannot start a shell for etcd")?;
        let stdin = child.stdin.take();
        let mut etcd = Self { client, _peer: peer, child, stdin, _data: data };
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        while TcpStream::connect(address).await.is_err() {
            if let Some(status) = etcd.child.try_wait()? {
                bail!(
                    "etcd ended with {status}; is it installed? On Debian: apt-get install etcd-server; elsewhere: \
                     https://etcd.io/docs/latest/install"
                );
            }
            if tokio::time::Instant::now() > deadline {
                bail!("etcd does not listen on {address} within {START_TIMEOUT:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(etcd)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.client.address()
    }

    pub(crate) async fn stop(mut self) {
        drop(self.stdin.take());
        let _gone_already = self.child.wait().await;
    }
}
