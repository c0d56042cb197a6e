//! Where a process looks for the others. `static://` names them once and for all; `etcd://` names the etcd that they
//! register in.

use std::{net::SocketAddr, path::PathBuf};

pub mod etcd;
pub mod listing;

/// A registry that cannot be used as it is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "registry {0:?} has no known scheme; use static://host:port,host:port or etcd://host:2379/prefix"
    )]
    Scheme(String),
    #[error("registry {0:?} names no address")]
    Empty(String),
    #[error("registry address {0:?} is not host:port")]
    Address(String),
    #[error("registry address {0:?} occurs twice")]
    Twice(String),
    #[error(
        "{0} is no address that others can be told; say with --advertise HOST:PORT where they reach this process"
    )]
    Unspecified(SocketAddr),
    #[error("registry option {0:?} is not known; known are user, password-file, ca, cert, key, ttl")]
    Option(String),
    #[error("registry option {option} of {value:?}: {problem}")]
    Value { option: &'static str, value: String, problem: String },
    #[error("registry option {option} needs {needs} as well")]
    Needs { option: &'static str, needs: &'static str },
    #[error("registry option {option}: {} {problem}", path.display())]
    File { option: &'static str, path: PathBuf, problem: String },
}

/// `--registry`: the processes this one talks to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registry {
    /// The same addresses for the life of the process; each may be up or down.
    Static(Vec<String>),
    Etcd(etcd::Url),
}

impl Registry {
    /// Reads `static://host:port,host:port` or `etcd://host:2379,host:2379/prefix?option=value`.
    pub fn parse(url: &str) -> Result<Self, Error> {
        if let Some(rest) = url.strip_prefix("etcd://") {
            return etcd::Url::parse(url, rest).map(Self::Etcd);
        }
        let list = url.strip_prefix("static://").ok_or_else(|| Error::Scheme(url.to_owned()))?;
        let addresses = addresses(url, list)?;
        Ok(Self::Static(addresses))
    }
}

/// `host:port,host:port`, each once.
fn addresses(url: &str, list: &str) -> Result<Vec<String>, Error> {
    let mut addresses: Vec<String> = Vec::new();
    for address in list.split(',').map(str::trim).filter(|address| !address.is_empty()) {
        let port =
            address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse());
        match port {
            Some(Ok(1_u16..)) => {}
            Some(Ok(0) | Err(_)) | None => return Err(Error::Address(address.to_owned())),
        }
        if addresses.iter().any(|seen| seen == address) {
            return Err(Error::Twice(address.to_owned()));
        }
        addresses.push(address.to_owned());
    }
    if addresses.is_empty() {
        return Err(Error::Empty(url.to_owned()));
    }
    Ok(addresses)
}

/// The address that others are told: `advertise`, else the one listened on.
///
/// # Errors
/// `advertise` is not host:port, or the address listened on is that of every interface and none can be told.
pub fn advertised(
    advertise: Option<&str>,
    listening: SocketAddr,
    registry: &Registry,
) -> Result<String, Error> {
    match advertise {
        Some(address) => {
            addresses("", address)?;
            Ok(address.to_owned())
        }
        None if listening.ip().is_unspecified() && matches!(registry, Registry::Etcd(_)) => {
            Err(Error::Unspecified(listening))
        }
        None => Ok(listening.to_string()),
    }
}

impl std::str::FromStr for Registry {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self, Error> {
        Self::parse(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url: &str, expected: Result<&[&str], Error>) {
        let expected = expected.map(|list| list.iter().map(|&address| address.to_owned()).collect());
        assert_eq!(Registry::parse(url), expected.map(Registry::Static), "{url}");
    }

    #[test]
    fn addresses_are_read_or_named() {
        check("static://a:1", Ok(&["a:1"]));
        check("static://127.0.0.1:7001, [::1]:7002,", Ok(&["127.0.0.1:7001", "[::1]:7002"]));
        check("static://", Err(Error::Empty("static://".into())));
        check("static://a", Err(Error::Address("a".into())));
        check("static://:80", Err(Error::Address(":80".into())));
        check("static://a:0", Err(Error::Address("a:0".into())));
        check("static://a:70000", Err(Error::Address("a:70000".into())));
        check("static://a:1,b:1,a:1", Err(Error::Twice("a:1".into())));
        check("zookeeper://a:1", Err(Error::Scheme("zookeeper://a:1".into())));
    }
}
