//! One network namespace a host, joined by a bridge, so that packets can be lost between any of them and us.

use std::{
    net::{IpAddr, Ipv4Addr},
    process::Command,
    sync::atomic::{AtomicU8, Ordering::Relaxed},
};

use anyhow::{Context as _, bail};

/// Runs on one machine at a time may each have hosts.
static N_NETS: AtomicU8 = AtomicU8::new(0);

pub(crate) struct Hosts {
    name: String,
    subnet: [u8; 2],
    n_hosts: u8,
}

/// Which packets of a host are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    pub(crate) to_percent: u8,
    pub(crate) from_percent: u8,
}

impl Hosts {
    /// Needs root, `ip` and `nft`; the error says what is missing.
    pub(crate) fn new(n_hosts: u8) -> anyhow::Result<Self> {
        let id = std::process::id();
        let subnet = [(id % 200) as u8 + 20, N_NETS.fetch_add(1, Relaxed)];
        let hosts = Self { name: format!("sh{}x{}", id % 100_000, subnet[1]), subnet, n_hosts };
        hosts.build().context(
            "this machine gives no network namespaces: it takes root, iproute2 and nftables \
             (Debian: apt-get install iproute2 nftables)",
        )?;
        Ok(hosts)
    }

    fn build(&self) -> anyhow::Result<()> {
        run("nft", &["--version"])?;
        let bridge = &self.name;
        run("ip", &["link", "add", bridge, "type", "bridge"])?;
        run("ip", &["addr", "add", &format!("{}/24", self.ours()), "dev", bridge])?;
        run("ip", &["link", "set", bridge, "up"])?;
        for host in 0..self.n_hosts {
            let (space, ours, theirs) =
                (self.space(host), format!("{bridge}h{host}"), format!("{bridge}e{host}"));
            run("ip", &["netns", "add", &space])?;
            run("ip", &["link", "add", &ours, "type", "veth", "peer", "name", &theirs])?;
            run("ip", &["link", "set", &ours, "master", bridge, "up"])?;
            run("ip", &["link", "set", &theirs, "netns", &space])?;
            let inside = |args: &[&str]| run("ip", &[&["netns", "exec", &space, "ip"], args].concat());
            inside(&["link", "set", "lo", "up"])?;
            inside(&["addr", "add", &format!("{}/24", self.ip(host)), "dev", &theirs])?;
            inside(&["link", "set", &theirs, "up"])?;
        }
        Ok(())
    }

    /// Our own end of the bridge.
    pub(crate) fn ours(&self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, self.subnet[0], self.subnet[1], 1))
    }

    pub(crate) fn ip(&self, host: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, self.subnet[0], self.subnet[1], host + 2))
    }

    pub(crate) fn space(&self, host: u8) -> String {
        format!("{}n{host}", self.name)
    }

    /// Sets what is lost of a host's packets; zeros mend it.
    pub(crate) fn lose(&self, host: u8, loss: Loss) -> anyhow::Result<()> {
        let rule = |percent: u8| match percent {
            0 => String::new(),
            100.. => "drop".to_owned(),
            _ => format!("numgen random mod 100 < {percent} drop"),
        };
        let rules = format!(
            "table inet chaos {{}}\nflush table inet chaos\ndelete table inet chaos\ntable inet chaos {{\n\
             chain in {{ type filter hook input priority 0; {} ; }}\n\
             chain out {{ type filter hook output priority 0; {} ; }}\n}}\n",
            rule(loss.to_percent),
            rule(loss.from_percent)
        );
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), rules)?;
        run("ip", &["netns", "exec", &self.space(host), "nft", "-f", &file.path().to_string_lossy()])
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 0..self.n_hosts {
            let _gone_already = run("ip", &["netns", "del", &self.space(host)]);
        }
        let _gone_already = run("ip", &["link", "del", &self.name]);
    }
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
