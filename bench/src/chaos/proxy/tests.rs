use std::time::Instant;

use super::*;

/// A client's connection to an echo server, through a proxy.
struct Bench {
    proxy: Proxy,
    tasks: Tasks,
}

impl Bench {
    async fn new() -> Self {
        let tasks = Tasks::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = tasks.clone();
        tasks.spawn("echo", async move {
            loop {
                let (socket, _) = tokio::select! {
                    () = stop.shutting_down() => return,
                    accepted = listener.accept() => accepted.unwrap(),
                };
                let (mut from, mut to) = socket.into_split();
                stop.spawn("echo one", async move {
                    let _ended = tokio::io::copy(&mut from, &mut to).await;
                    let _ended = to.shutdown().await;
                });
            }
        });
        let proxy = Proxy::start(7, &tasks).await.unwrap();
        proxy.forward_to(address);
        Self { proxy, tasks }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.proxy.address).await.unwrap()
    }

    async fn echo(&self, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut socket = self.connect().await;
        socket.write_all(bytes).await?;
        socket.shutdown().await?;
        let mut back = Vec::new();
        socket.read_to_end(&mut back).await?;
        Ok(back)
    }

    fn set(&self, to: Toxic, from: Toxic) {
        self.proxy.set(Toxics { to, from, down: false });
    }

    async fn end(self) {
        self.tasks.begin_shutdown();
        assert!(self.tasks.join(Duration::from_secs(10)).await);
    }
}

#[tokio::test]
async fn bytes_pass_as_they_are() {
    let bench = Bench::new().await;
    let bytes: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(bench.echo(&bytes).await.unwrap(), bytes);
    bench.set(Toxic { slice_bytes: 7, ..Toxic::default() }, Toxic::default());
    assert_eq!(bench.echo(&bytes[..1000]).await.unwrap(), &bytes[..1000]);
    bench.end().await;
}

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the proxy's delay is what is measured")]
async fn latency_and_bandwidth_slow_down() {
    let bench = Bench::new().await;
    bench.set(Toxic { latency_ms: 60, ..Toxic::default() }, Toxic { kib_per_s: 10, ..Toxic::default() });
    let began = Instant::now();
    assert_eq!(bench.echo(&[1; 1024]).await.unwrap().len(), 1024);
    assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
    bench.end().await;
}

#[tokio::test]
async fn one_bit_of_every_so_many_bytes_is_flipped() {
    let bench = Bench::new().await;
    bench.set(Toxic { flip_every: 4096, slice_bytes: 4096, ..Toxic::default() }, Toxic::default());
    let back = bench.echo(&[0; 40_960]).await.unwrap();
    let flipped: u32 = back.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!((back.len(), flipped), (40_960, 10));
    bench.end().await;
}

#[tokio::test]
async fn connections_are_reset_half_closed_and_refused() {
    let bench = Bench::new().await;
    bench.set(Toxic::default(), Toxic { reset_after: 100, ..Toxic::default() });
    assert!(bench.echo(&[1; 500]).await.is_err());
    bench.set(Toxic::default(), Toxic { half_close_after: 10, slice_bytes: 10, ..Toxic::default() });
    assert_eq!(bench.echo(&[1; 500]).await.unwrap().len(), 10);
    bench.proxy.set(Toxics { down: true, ..Toxics::default() });
    let mut socket = bench.connect().await;
    assert!(socket.read(&mut [0; 1]).await.is_err());
    bench.end().await;
}

#[tokio::test]
async fn a_black_hole_holds_everything_until_it_is_gone() {
    let bench = Bench::new().await;
    bench.set(Toxic { blackhole: true, ..Toxic::default() }, Toxic::default());
    let mut socket = bench.connect().await;
    socket.write_all(b"abc").await.unwrap();
    let mut back = [0; 3];
    let early = tokio::time::timeout(Duration::from_millis(50), socket.read_exact(&mut back)).await;
    assert!(early.is_err());
    bench.set(Toxic::default(), Toxic::default());
    tokio::time::timeout(Duration::from_secs(10), socket.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(&back, b"abc");
    drop(socket);
    bench.end().await;
}
