//! Ports of this machine for processes that cannot say which one they took, or that come back where they were.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpSocket;

/// A free port that nobody else is given while this lives, whether its process listens or is down for now.
///
/// Bound, but not listened on: on Linux, who asks for that address by name may listen there, as long as both reuse
/// addresses, which Go and Rust do; who asks for any port, or connects from one, gets another. Without this, a process
/// that was down for a moment may find its port taken. Elsewhere the port is only one that was free a moment ago.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    _held: Option<TcpSocket>,
}

impl Port {
    /// # Errors
    /// If `ip` is not an address of this machine, or has no port left.
    pub fn reserve(ip: impl Into<IpAddr>) -> io::Result<Self> {
        let ip = ip.into();
        let socket = if ip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind((ip, 0).into())?;
        Ok(Self { address: socket.local_addr()?, _held: cfg!(target_os = "linux").then_some(socket) })
    }

    /// Where its process should listen.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use super::*;

    /// Even while a connection that it closed waits out its minute at that port.
    #[test]
    fn who_was_there_comes_back_there() {
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let Ok(port) = Port::reserve(ip) else { continue };
            for _ in 0..3 {
                let listener = TcpListener::bind(port.address()).unwrap();
                let _client = TcpStream::connect(port.address()).unwrap();
                let _served = listener.accept().unwrap();
            }
        }
    }

    /// More asked for than there are to give.
    #[cfg(target_os = "linux")]
    #[test]
    fn nobody_else_is_given_it() {
        let port = Port::reserve(Ipv4Addr::LOCALHOST).unwrap();
        for _ in 0..60_000 {
            let another = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            assert_ne!(another.local_addr().unwrap(), port.address());
        }
        assert!(TcpStream::connect(port.address()).is_err(), "nobody listens");
    }
}
