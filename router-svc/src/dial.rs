//! How an expert server is called: at its address, or through a Unix socket when it is on this host.

use std::{net::SocketAddr, time::Duration};

use proto::{
    Code, Error,
    v1::{self, expert_client::ExpertClient},
};
use tonic::transport::{Channel, Endpoint};

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A server that answers no ping for this long has no more frames on it: found within 3 s together with the interval.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// What frames travel over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

impl Transport {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
}

pub(crate) async fn tcp(address: &str) -> Result<ExpertClient<Channel>, Error> {
    connect(format!("http://{address}")).await
}

/// `name` is an abstract one.
pub(crate) async fn unix(name: &str) -> Result<ExpertClient<Channel>, Error> {
    connect(format!("unix:\0{name}")).await
}

async fn connect(to: String) -> Result<ExpertClient<Channel>, Error> {
    let endpoint = Endpoint::from_shared(to.clone())
        .map_err(|error| Error::invalid("registry", format!("{to} is not an address: {error}")))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(proto::HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(proto::HTTP2_WINDOW_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let channel = endpoint.connect().await.map_err(|error| {
        Error::new(Code::Unavailable, "connect_failed", format!("cannot connect: {}", innermost(&error)))
    })?;
    Ok(ExpertClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX))
}

/// The Unix socket of the server that answered at `address`, if it was itself who did: what lies between on purpose, a
/// proxy, stays in between.
pub(crate) fn unix_socket_of<'a>(status: &'a v1::ExpertStatus, address: &str) -> Option<&'a str> {
    let bound: SocketAddr = status.listen.parse().ok()?;
    let dialed: SocketAddr = address.parse().ok()?;
    let itself = dialed.port() == bound.port() && (bound.ip() == dialed.ip() || bound.ip().is_unspecified());
    (itself && !status.unix_socket.is_empty()).then_some(&status.unix_socket)
}

/// The last error of a chain: what the system said.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(listen: &str, unix_socket: &str, address: &str, expected: Option<&str>) {
        let status = v1::ExpertStatus {
            listen: listen.to_owned(),
            unix_socket: unix_socket.to_owned(),
            ..v1::ExpertStatus::default()
        };
        assert_eq!(unix_socket_of(&status, address), expected, "{listen} {unix_socket} {address}");
    }

    #[test]
    fn a_unix_socket_is_of_who_answered_at_the_address() {
        check("127.0.0.1:7001", "it", "127.0.0.1:7001", Some("it"));
        check("0.0.0.0:7001", "it", "10.0.0.5:7001", Some("it"));
        check("127.0.0.1:7001", "it", "127.0.0.1:7002", None);
        check("10.0.0.5:7001", "it", "10.0.0.6:7001", None);
        check("127.0.0.1:7001", "it", "host:7001", None);
        check("127.0.0.1:7001", "", "127.0.0.1:7001", None);
        check("", "it", "127.0.0.1:7001", None);
    }
}
