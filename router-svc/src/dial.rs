//! How an expert server is called: at its address, or through a Unix socket when it is on this host.

use std::{
    error::Error as _,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use cluster::LocalStream;
use hyper_util::rt::TokioIo;
use proto::{
    Code, Error,
    v1::{self, expert_client::ExpertClient},
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A server that answers no ping for this long has no more frames on it: found within 3 s together with the interval.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// What frames travel over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
    /// None: the experts are in this process.
    Inside,
}

impl Transport {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Inside => "inside",
        }
    }
}

pub(crate) async fn tcp(address: &str) -> Result<ExpertClient<Channel>, Error> {
    client(endpoint(address)?.connect().await)
}

/// `name` is an abstract one, of a server that was called at `address` before.
pub(crate) async fn unix(name: &str, address: &str) -> Result<ExpertClient<Channel>, Error> {
    let name = name.to_owned();
    let connect = move |_| {
        let name = name.clone();
        async move { LocalStream::connect(&name).await.map(TokioIo::new) }
    };
    client(endpoint(address)?.connect_with_connector(tower::service_fn(connect)).await)
}

fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Error::invalid("registry", format!("{address} is not an address: {error}")))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(proto::HTTP2_WINDOW_BYTES)
        .initial_connection_window_size(proto::HTTP2_WINDOW_BYTES)
        .max_frame_size(proto::HTTP2_FRAME_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

fn client(channel: Result<Channel, tonic::transport::Error>) -> Result<ExpertClient<Channel>, Error> {
    let channel = channel.map_err(|error| {
        Error::new(Code::Unavailable, "connect_failed", format!("cannot connect: {}", innermost(&error)))
    })?;
    Ok(ExpertClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX))
}

/// The Unix socket of the server that answered at `address`, if it was itself who did, on this host: what lies between on
/// purpose, a proxy, stays in between, and whoever here takes the name of a server elsewhere is not called.
pub(crate) fn unix_socket_of<'a>(status: &'a v1::ExpertStatus, address: &str) -> Option<&'a str> {
    let bound: SocketAddr = status.listen.parse().ok()?;
    let dialed: SocketAddr = address.parse().ok()?;
    let itself = dialed.port() == bound.port() && (bound.ip() == dialed.ip() || bound.ip().is_unspecified());
    let has_one = !status.unix_socket.is_empty();
    (itself && has_one && is_of_this_host(dialed.ip())).then_some(&status.unix_socket)
}

/// Whether what is sent to this address may leave this host. Names are not looked up: they may.
pub(crate) fn is_elsewhere(address: &str) -> bool {
    address.parse().map_or(true, |address: SocketAddr| !is_of_this_host(address.ip()))
}

/// Only to addresses of its own does a host bind (but where `ip_nonlocal_bind` lets it: there the name and its user decide).
fn is_of_this_host(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// Why an open stream broke: what the server said, or what happened to the connection.
pub(crate) fn broken(status: &Status) -> Error {
    match status.source() {
        None => Error::from_status(status),
        Some(cause) => {
            Error::new(Code::Unavailable, "transport", format!("the connection broke: {}", innermost(cause)))
        }
    }
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
    fn a_stream_breaks_by_what_the_server_said_or_by_its_connection() {
        let said = Error::new(Code::Unavailable, "draining", "this expert server is draining");
        assert_eq!(broken(&said.clone().into()), said);
        let reset = std::io::Error::other(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        let error = broken(&Status::from_error(Box::new(reset)));
        assert_eq!((error.code, error.reason.as_ref()), (Code::Unavailable, "transport"));
        assert_eq!(error.message, "the connection broke: connection reset");
    }

    #[test]
    fn a_unix_socket_is_of_who_answered_at_the_address() {
        check("127.0.0.1:7001", "it", "127.0.0.1:7001", Some("it"));
        check("0.0.0.0:7001", "it", "127.0.0.1:7001", Some("it"));
        // An address for documentation: never of this host.
        check("0.0.0.0:7001", "it", "192.0.2.5:7001", None);
        check("192.0.2.5:7001", "it", "192.0.2.5:7001", None);
        check("127.0.0.1:7001", "it", "127.0.0.1:7002", None);
        check("10.0.0.5:7001", "it", "10.0.0.6:7001", None);
        check("127.0.0.1:7001", "it", "host:7001", None);
        check("127.0.0.1:7001", "", "127.0.0.1:7001", None);
        check("", "it", "127.0.0.1:7001", None);
    }
}
