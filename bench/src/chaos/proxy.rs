//! A TCP proxy between two processes that does to their bytes what a bad network does. Seeded; what it does can change
//! at any moment.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use serde::{Deserialize, Serialize};
use telemetry::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// What is done to one direction. Everything off by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Toxic {
    pub(crate) latency_ms: u64,
    /// Up to so much more.
    pub(crate) jitter_ms: u64,
    /// 0: no limit.
    pub(crate) kib_per_s: u64,
    /// Pieces of at most so many bytes; 0: as they come.
    pub(crate) slice_bytes: usize,
    /// Nothing passes, and nobody is told.
    pub(crate) blackhole: bool,
    /// The connection is reset after so many bytes; 0: never.
    pub(crate) reset_after: u64,
    /// This direction is closed after so many bytes; 0: never.
    pub(crate) half_close_after: u64,
    /// One bit is flipped somewhere in every so many bytes; 0: never.
    pub(crate) flip_every: u64,
}

/// Towards the server, and back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Toxics {
    pub(crate) to: Toxic,
    pub(crate) from: Toxic,
    /// Connections are refused, and those there are are cut.
    pub(crate) down: bool,
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    toxics: watch::Sender<Toxics>,
    upstream: Arc<Mutex<Option<SocketAddr>>>,
}

impl Proxy {
    /// Listens from now on, and forwards once it has been told where to.
    pub(crate) async fn start(seed: u64, tasks: &Tasks) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (toxics, receiver) = watch::channel(Toxics::default());
        let upstream = Arc::new(Mutex::new(None));
        let (to, stop) = (Arc::clone(&upstream), tasks.clone());
        tasks.spawn("proxy", async move {
            tokio::select! {
                () = stop.shutting_down() => {}
                () = accept(listener, to, receiver, seed, stop.clone()) => {}
            }
        });
        Ok(Self { address, toxics, upstream })
    }

    pub(crate) fn forward_to(&self, upstream: SocketAddr) {
        *self.upstream.lock().unwrap_or_else(PoisonError::into_inner) = Some(upstream);
    }

    pub(crate) fn set(&self, toxics: Toxics) {
        self.toxics.send_replace(toxics);
    }
}

async fn accept(
    listener: TcpListener,
    upstream: Arc<Mutex<Option<SocketAddr>>>,
    toxics: watch::Receiver<Toxics>,
    seed: u64,
    tasks: Tasks,
) {
    let mut n_connections = 0_u64;
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        n_connections += 1;
        let to = *upstream.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(to), false) = (to, toxics.borrow().down) else {
            reset(&client);
            continue;
        };
        let (toxics, dice) = (toxics.clone(), ChaCha8Rng::seed_from_u64(seed ^ (n_connections << 32)));
        let stop = tasks.clone();
        tasks.spawn("proxied connection", async move {
            let Ok(server) = TcpStream::connect(to).await else { return reset(&client) };
            // The proxy adds no waiting of its own.
            let _best_effort = (client.set_nodelay(true), server.set_nodelay(true));
            tokio::select! {
                () = stop.shutting_down() => {}
                () = both_ways(client, server, toxics, dice) => {}
            }
        });
    }
}

/// Closing a socket with this option sends a reset.
fn reset(socket: &TcpStream) {
    let _best_effort = socket.set_zero_linger();
}

async fn both_ways(
    client: TcpStream,
    server: TcpStream,
    toxics: watch::Receiver<Toxics>,
    mut dice: ChaCha8Rng,
) {
    let back = ChaCha8Rng::seed_from_u64(dice.next_u64());
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut is_down = toxics.clone();
    let to = Pump { from: from_client, to: to_server, dice, n_bytes: 0 };
    let from = Pump { from: from_server, to: to_client, dice: back, n_bytes: 0 };
    let (at_to, at_from) = (toxics.clone(), toxics);
    tokio::select! {
        _ = is_down.wait_for(|toxics| toxics.down) => {}
        ended = async { tokio::try_join!(to.run(at_to, |toxics| &toxics.to), from.run(at_from, |toxics| &toxics.from)) } => {
            // An error cuts both directions; two clean ends are a connection that has ended.
            let _ended = ended;
        }
    }
}

struct Pump {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    dice: ChaCha8Rng,
    n_bytes: u64,
}

impl Pump {
    async fn run(
        mut self,
        toxics: watch::Receiver<Toxics>,
        side: impl Fn(&Toxics) -> &Toxic,
    ) -> Result<(), std::io::Error> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let toxic = side(&toxics.borrow()).clone();
            let most = if toxic.slice_bytes > 0 { toxic.slice_bytes.min(buffer.len()) } else { buffer.len() };
            let n = self.from.read(&mut buffer[..most]).await?;
            if n == 0 {
                return self.to.shutdown().await;
            }
            // What was asked for while waiting for the bytes counts for them.
            let mut toxic = side(&toxics.borrow()).clone();
            let mut changed = toxics.clone();
            while toxic.blackhole {
                if changed.changed().await.is_err() {
                    return Ok(());
                }
                toxic = side(&changed.borrow_and_update()).clone();
            }
            let jitter = if toxic.jitter_ms > 0 { self.dice.next_u64() % toxic.jitter_ms } else { 0 };
            let mut wait = Duration::from_millis(toxic.latency_ms + jitter);
            if let Some(micros) = (n as u64 * 1_000_000).checked_div(toxic.kib_per_s * 1024) {
                wait += Duration::from_micros(micros);
            }
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let before = self.n_bytes;
            self.n_bytes += n as u64;
            if toxic.flip_every > 0 && before / toxic.flip_every != self.n_bytes / toxic.flip_every {
                let bit = self.dice.next_u64() as usize % (n * 8);
                buffer[bit / 8] ^= 1 << (bit % 8);
            }
            if toxic.reset_after > 0 && self.n_bytes >= toxic.reset_after {
                reset(self.to.as_ref());
                // Dropped, it would say goodbye first.
                self.to.forget();
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            self.to.write_all(&buffer[..n]).await?;
            if toxic.half_close_after > 0 && self.n_bytes >= toxic.half_close_after {
                return self.to.shutdown().await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
