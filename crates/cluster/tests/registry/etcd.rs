//! A real etcd of one member, on ports of its own.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use cluster::Port;
use etcd_client::{Client, GetOptions};

pub(crate) struct Etcd {
    /// Kept while it is down.
    client: Port,
    peer: Port,
    data: tempfile::TempDir,
    n_wipes: usize,
    flags: Vec<String>,
    process: Option<Child>,
}

impl Etcd {
    /// None where there is no etcd; that is a failure where all tools must be there (`CI=true`).
    #[expect(clippy::disallowed_methods, reason = "the tests' surroundings, not a program's configuration")]
    pub(crate) async fn start(flags: &[String]) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            let how = "etcd is not on PATH; on Debian: apt-get install etcd-server, elsewhere: https://etcd.io/docs";
            assert!(std::env::var("CI").as_deref() != Ok("true"), "{how}");
            println!("skipped: {how}");
            return None;
        }
        let mut etcd = Self {
            client: Port::reserve(Ipv4Addr::LOCALHOST).unwrap(),
            peer: Port::reserve(Ipv4Addr::LOCALHOST).unwrap(),
            data: tempfile::tempdir().unwrap(),
            n_wipes: 0,
            flags: flags.to_vec(),
            process: None,
        };
        etcd.up().await;
        Some(etcd)
    }

    fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// For leases as short as they may be.
    pub(crate) fn url(&self) -> String {
        format!("etcd://{}/shoal?ttl=2s", self.address())
    }

    pub(crate) async fn up(&mut self) {
        let scheme = if self.flags.is_empty() { "http" } else { "https" };
        let (client, peer) =
            (format!("{scheme}://{}", self.address()), format!("http://{}", self.peer.address()));
        let dir: PathBuf = self.data.path().join(self.n_wipes.to_string());
        let log = self.data.path().join("log");
        let log_file = File::create(&log).unwrap();
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .args(["--heartbeat-interval", "50", "--election-timeout", "250"])
            .args(&self.flags)
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .unwrap();
        self.process = Some(process);
        while tokio::net::TcpStream::connect(self.address()).await.is_err() {
            let ended = self.process.as_mut().and_then(|process| process.try_wait().unwrap());
            assert!(ended.is_none(), "etcd ended with {ended:?}: {}", fs::read_to_string(&log).unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGKILL.
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Its data is gone when it comes up again.
    pub(crate) fn wipe(&mut self) {
        self.n_wipes += 1;
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect([self.address().to_string()], None).await.unwrap()
    }

    /// Waits until exactly these keys lie below `prefix`.
    pub(crate) async fn wait_for_keys(&self, prefix: &str, expected: &[&str], deadline: Duration) {
        let mut keys = Vec::new();
        let matches = async {
            loop {
                if let Ok(mut client) = Client::connect([self.address().to_string()], None).await
                    && let Ok(listed) = client.get(prefix, Some(GetOptions::new().with_prefix())).await
                {
                    keys = listed
                        .kvs()
                        .iter()
                        .map(|kv| kv.key_str().unwrap().strip_prefix(prefix).unwrap().to_owned())
                        .collect();
                    if keys == expected {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let found = tokio::time::timeout(deadline, matches).await;
        assert!(found.is_ok(), "not {expected:?} but {keys:?}");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An authority, a server's certificate and a client's, as files.
pub(crate) struct Certificates(tempfile::TempDir);

impl Certificates {
    pub(crate) fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        write("ca.pem", &authority.self_signed(&key).unwrap().pem());
        let issuer = rcgen::Issuer::new(authority, key);
        for name in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            params.extended_key_usages =
                vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            write(&format!("{name}.pem"), &params.signed_by(&key, &issuer).unwrap().pem());
            write(&format!("{name}.key"), &key.serialize_pem());
        }
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// For etcd.
    pub(crate) fn flags(&self) -> Vec<String> {
        let flag = |flag: &str, file: &str| format!("--{flag}={}", self.path(file));
        vec![
            flag("cert-file", "server.pem"),
            flag("key-file", "server.key"),
            flag("trusted-ca-file", "ca.pem"),
            "--client-cert-auth".to_owned(),
        ]
    }

    /// For the registry's URL.
    pub(crate) fn options(&self) -> String {
        format!("ca={}&cert={}&key={}", self.path("ca.pem"), self.path("client.pem"), self.path("client.key"))
    }
}
