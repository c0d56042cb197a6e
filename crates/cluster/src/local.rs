//! Connections between processes of one host: Unix sockets of abstract names, which are in no folder and gone with whoever
//! listens. They have no permissions either, so both ends look who the other is.

use std::{
    fmt,
    io::{self, IoSlice, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream as Socket,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::UnixStream,
    task::coop,
};
use tonic::transport::server::Connected;

/// Read at once, at most: what a socket holds with Linux's defaults. HTTP/2 asks for 8 KiB while it does not know how long a
/// frame is, and again for the rest.
const AHEAD_BYTES: usize = 256 << 10;

/// A connection to another process of this host and user.
///
/// Whoever waits for data, or computes, is left alone when the other end has read what was written: such a socket then says
/// that there is room again, which tokio's own stream listens for, and each time a thread wakes for nothing. This one
/// listens for it when there was none.
pub struct LocalStream {
    socket: AsyncFd<Arc<Socket>>,
    ahead: Box<[u8]>,
    /// Of `ahead`: what was read and not yet asked for.
    unread: std::ops::Range<usize>,
    /// The same socket by another descriptor, since one is registered once.
    for_room: Arc<Socket>,
    /// That one, while a write waits for room.
    waiting: Option<AsyncFd<Arc<Socket>>>,
}

impl LocalStream {
    /// Whoever of this user may answer: abstract names belong to whoever takes them first.
    ///
    /// # Errors
    /// If nobody listens at `name`, or another user does.
    ///
    /// # Panics
    /// Outside of a runtime, as do its reads and writes.
    pub async fn connect(name: &str) -> io::Result<Self> {
        Self::checked(UnixStream::connect(format!("\0{name}")).await?)
    }

    /// # Errors
    /// If the other end is another user's (`PermissionDenied`), or there are no descriptors left.
    ///
    /// # Panics
    /// Outside of a runtime, as do its reads and writes.
    pub fn checked(stream: UnixStream) -> io::Result<Self> {
        if stream.peer_cred()?.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the other end is another user's"));
        }
        let socket = stream.into_std()?;
        let for_room = Arc::new(socket.try_clone()?);
        Ok(Self {
            socket: registered(Arc::new(socket), Interest::READABLE)?,
            ahead: vec![0; AHEAD_BYTES].into(),
            unread: 0..0,
            for_room,
            waiting: None,
        })
    }

    /// Reads what there is.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            match guard.get_inner().as_ref().read(&mut self.ahead) {
                Ok(n) => {
                    // Less than there was place for, but not the end: nothing is left, and another look at it is saved.
                    // What comes from now on is told anew.
                    if (1..AHEAD_BYTES).contains(&n) {
                        guard.clear_ready();
                    }
                    self.unread = 0..n;
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

#[expect(unsafe_code, reason = "tokio has no safe way to ask for one of the two alone")]
fn registered(socket: Arc<Socket>, interest: Interest) -> io::Result<AsyncFd<Arc<Socket>>> {
    // SAFETY: the standard library's socket is one open descriptor for all of its life, and lives as long as this does.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

impl AsyncRead for LocalStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.unread.is_empty() && buffer.remaining() > 0 {
            ready!(this.poll_fill(cx))?;
        }
        let n = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.ahead[this.unread.start..][..n]);
        this.unread.start += n;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // A task that always finds room gives way to others all the same.
        let turn = ready!(coop::poll_proceed(cx));
        loop {
            if let Some(waiting) = &this.waiting {
                ready!(waiting.poll_write_ready(cx))?.retain_ready();
                this.waiting = None;
            }
            match this.socket.get_ref().as_ref().write_vectored(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    this.waiting = Some(registered(Arc::clone(&this.for_room), Interest::WRITABLE)?);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => {
                    turn.made_progress();
                    return Poll::Ready(written);
                }
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.socket.get_ref().shutdown(Shutdown::Write) {
            // The other end was faster, as some systems say.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            shut => Poll::Ready(shut),
        }
    }
}

impl Connected for LocalStream {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl fmt::Debug for LocalStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalStream").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair() -> (LocalStream, LocalStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (LocalStream::checked(a).unwrap(), LocalStream::checked(b).unwrap())
    }

    /// Different at every place of the longest message.
    fn message(n_bytes: usize) -> Vec<u8> {
        (0..n_bytes).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
    }

    /// What the kernel is to tell of this socket, as `epoll_ctl` has it, wherever it is registered.
    #[cfg(target_os = "linux")]
    fn told_of(stream: &LocalStream) -> Vec<u32> {
        use std::{
            fs,
            os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
        };

        let socket = format!("/proc/self/fd/{}", stream.socket.get_ref().as_raw_fd());
        let socket = format!("ino:{:x}", fs::metadata(socket).unwrap().ino());
        let fds = fs::read_dir("/proc/self/fdinfo").unwrap().filter_map(Result::ok);
        // Of files that are closed meanwhile, nothing.
        let infos: Vec<String> = fds.filter_map(|info| fs::read_to_string(info.path()).ok()).collect();
        let lines = infos.iter().flat_map(|info| info.lines()).filter(|line| line.starts_with("tfd:"));
        let ours = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = ours.filter(|words| words.contains(&socket.as_str()));
        ours.map(|words| u32::from_str_radix(words[3], 16).unwrap()).collect()
    }

    async fn send(stream: &mut LocalStream, message: &[u8], piece: usize) {
        for piece in message.chunks(piece) {
            stream.write_all(piece).await.unwrap();
        }
        stream.shutdown().await.unwrap();
    }

    async fn receive(stream: &mut LocalStream, asked: usize) -> Vec<u8> {
        let mut received = Vec::new();
        let mut buffer = vec![0; asked];
        loop {
            match stream.read(&mut buffer).await.unwrap() {
                0 => return received,
                n => received.extend_from_slice(&buffer[..n]),
            }
        }
    }

    #[tokio::test]
    async fn every_byte_arrives_once_and_the_end_after_it() {
        for (n_bytes, piece, asked) in [
            (0, 1, 1),
            (1, 1, 8192),
            (8300, 8300, 8192),
            (8192 + 131_100, 8192 + 131_100, 8192),
            (AHEAD_BYTES, AHEAD_BYTES, 8192),
            (100_000, 7, 5),
            // More than a socket has room for.
            (3 << 20, 3 << 20, 1 << 20),
            (3 << 20, 100_000, 1000),
        ] {
            let (mut a, mut b) = pair();
            let sent = message(n_bytes);
            let ((), received) = tokio::join!(send(&mut a, &sent, piece), receive(&mut b, asked));
            assert!(sent == received, "{n_bytes} in pieces of {piece}, {asked} asked for");
            // The other way is open still.
            let ((), received) = tokio::join!(send(&mut b, b"back", 4), receive(&mut a, asked));
            assert_eq!(received, b"back");
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn nobody_is_told_of_room_but_who_waits_for_it() {
        const EPOLLIN: u32 = 1;
        const EPOLLOUT: u32 = 4;
        let (mut writer, mut reader) = pair();
        let sent = message(3 << 20);
        {
            let mut writing = pin!(send(&mut writer, &sent, sent.len()));
            assert!((&mut writing).now_or_never().is_none(), "there was room for all of it");
            let ((), received) = tokio::join!(writing, receive(&mut reader, 1 << 20));
            assert!(sent == received);
        }
        assert!(writer.waiting.is_none());
        for stream in [&writer, &reader] {
            let told = told_of(stream);
            let no_room = |events: &u32| events & (EPOLLIN | EPOLLOUT) == EPOLLIN;
            assert!(!told.is_empty() && told.iter().all(no_room), "{told:x?}");
        }
    }

    #[tokio::test]
    async fn who_waits_hears_that_the_other_end_is_gone() {
        let (mut writer, reader) = pair();
        let sent = message(3 << 20);
        let mut writing = pin!(writer.write_all(&sent));
        assert!((&mut writing).now_or_never().is_none());
        drop(reader);
        // It has not read what it was sent: systems differ in what they call that.
        let gone = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        assert!(gone.contains(&writing.await.unwrap_err().kind()));
    }
}
