//! Ports of this machine for processes that cannot say which one they took, or that come back where they were.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpSocket;

/// A free port that the system gives to nobody while this lives, whether its process listens or is down for now.
///
/// Bound, but not listened on: on Linux, who asks for any port, or connects from one, gets another. Who asks for this one by
/// its number, as its process does, may listen there, as long as both reuse addresses, which Go and Rust do: it is kept from
/// being handed out, not from being taken. Without this, a process that was down for a moment may find its port in use.
/// Elsewhere the port is only one that was free a moment ago.
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
            let port = match Port::reserve(ip) {
                Ok(port) => port,
                Err(_no_ipv6) if ip.is_ipv6() => continue,
                Err(error) => panic!("{error}"),
            };
            for _ in 0..3 {
                let listener = TcpListener::bind(port.address()).unwrap();
                let client = TcpStream::connect(port.address()).unwrap();
                let served = listener.accept().unwrap();
                // Who closes first waits.
                drop(served);
                drop(client);
            }
        }
    }

    /// Asked for more often than there are ports to give: without the hold it was among them each time that it was tried.
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
