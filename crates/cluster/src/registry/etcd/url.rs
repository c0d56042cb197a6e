//! `etcd://host:2379,host:2379/prefix?option=value`, read or named.

use std::{path::PathBuf, time::Duration};

use crate::registry::{Error, addresses};

/// Where an etcd is and how to be let in. Holds names of files and no secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// `host:port` each.
    pub(super) endpoints: Vec<String>,
    /// Every key begins with it; starts with a slash and ends without.
    pub(super) prefix: String,
    pub(super) user: Option<String>,
    pub(super) password_file: Option<PathBuf>,
    /// Certificates that the servers' are checked with; its presence means TLS.
    pub(super) ca: Option<PathBuf>,
    pub(super) cert: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
    /// Of leases: how long a process that died stays listed.
    pub(super) ttl: Duration,
}

const PREFIX: &str = "/shoal";
const TTL: Duration = Duration::from_secs(5);
/// etcd grants no shorter leases with its default election timeout.
const TTL_MIN: Duration = Duration::from_secs(2);
const TTL_MAX: Duration = Duration::from_secs(3600);

impl Url {
    pub(in crate::registry) fn parse(url: &str, rest: &str) -> Result<Self, Error> {
        let (place, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, prefix) = place.split_once('/').unwrap_or((place, ""));
        let prefix = prefix.trim_matches('/');
        let mut parsed = Self {
            endpoints: addresses(url, hosts)?,
            prefix: if prefix.is_empty() { PREFIX.to_owned() } else { format!("/{prefix}") },
            user: None,
            password_file: None,
            ca: None,
            cert: None,
            key: None,
            ttl: TTL,
        };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            if value.is_empty() {
                return Err(Error::Option(option.to_owned()));
            }
            let file = || Some(PathBuf::from(value));
            match name {
                "user" => parsed.user = Some(value.to_owned()),
                "password-file" => parsed.password_file = file(),
                "ca" => parsed.ca = file(),
                "cert" => parsed.cert = file(),
                "key" => parsed.key = file(),
                "ttl" => parsed.ttl = ttl(value)?,
                _ => return Err(Error::Option(name.to_owned())),
            }
        }
        for (option, given, needs, needed) in [
            ("password-file", parsed.password_file.is_some(), "user", parsed.user.is_some()),
            ("user", parsed.user.is_some(), "password-file", parsed.password_file.is_some()),
            ("cert", parsed.cert.is_some(), "key", parsed.key.is_some()),
            ("key", parsed.key.is_some(), "cert", parsed.cert.is_some()),
            ("cert", parsed.cert.is_some(), "ca", parsed.ca.is_some()),
        ] {
            if given && !needed {
                return Err(Error::Needs { option, needs });
            }
        }
        Ok(parsed)
    }
}

fn ttl(text: &str) -> Result<Duration, Error> {
    let bad =
        |problem: &str| Error::Value { option: "ttl", value: text.to_owned(), problem: problem.to_owned() };
    let seconds =
        text.strip_suffix('s').unwrap_or(text).parse().map_err(|_| bad("is not a number of seconds"))?;
    let ttl = Duration::from_secs(seconds);
    if (TTL_MIN..=TTL_MAX).contains(&ttl) { Ok(ttl) } else { Err(bad("is not between 2s and 3600s")) }
}

#[cfg(test)]
mod tests {
    use crate::Registry;

    #[track_caller]
    fn check(url: &str, problem: &str) {
        assert_eq!(Registry::parse(url).map_err(|error| error.to_string()), Err(problem.to_owned()));
    }

    #[test]
    fn every_wrong_part_is_named() {
        check("etcd://", "registry \"etcd://\" names no address");
        check("etcd://a/x", "registry address \"a\" is not host:port");
        check("etcd://a:1,a:1", "registry address \"a:1\" occurs twice");
        check(
            "etcd://a:1?tls=1",
            "registry option \"tls\" is not known; known are user, password-file, ca, cert, key, ttl",
        );
        check("etcd://a:1?ttl=1s", "registry option ttl of \"1s\": is not between 2s and 3600s");
        check("etcd://a:1?ttl=soon", "registry option ttl of \"soon\": is not a number of seconds");
        check("etcd://a:1?user=u", "registry option user needs password-file as well");
        check("etcd://a:1?cert=c&key=k", "registry option cert needs ca as well");
    }

    #[test]
    fn defaults_and_options_are_read() {
        let Ok(Registry::Etcd(url)) = Registry::parse("etcd://a:1,b:2") else { panic!("it is right") };
        assert_eq!((url.endpoints.len(), url.prefix.as_str(), url.ttl.as_secs()), (2, "/shoal", 5));
        let url = "etcd://a:1/x/y/?ttl=30s&ca=/c&cert=/d&key=/e&user=u&password-file=/f";
        let Ok(Registry::Etcd(url)) = Registry::parse(url) else { panic!("it is right") };
        assert_eq!((url.prefix.as_str(), url.ttl.as_secs(), url.user.as_deref()), ("/x/y", 30, Some("u")));
    }
}
