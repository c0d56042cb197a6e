//! A dispatch stream that is lost while its connection lives: pings are answered, frames are not.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use proto::v1::{
    expert_client::ExpertClient,
    expert_server::{Expert, ExpertServer},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server, server::TcpIncoming},
};

use super::*;

/// So many frames of the first stream arrive; what follows does not, as after a message whose length was damaged.
const ARRIVE: usize = 150;

/// Carries frames to a real expert server, and its replies back.
struct Relay {
    server: ExpertClient<Channel>,
    n_streams: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Expert for Relay {
    type DispatchStream = Pin<Box<dyn Stream<Item = Result<v1::Reply, Status>> + Send>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let is_first = self.n_streams.fetch_add(1, Ordering::Relaxed) == 0;
        let mut n_arrived = 0;
        let frames = request.into_inner().filter_map(Result::ok).filter(move |_| {
            n_arrived += 1;
            !is_first || n_arrived <= ARRIVE
        });
        let replies = self.server.clone().dispatch(frames).await?;
        Ok(Response::new(Box::pin(replies.into_inner())))
    }

    async fn status(
        &self,
        request: Request<v1::ExpertStatusRequest>,
    ) -> Result<Response<v1::ExpertStatus>, Status> {
        self.server.clone().status(request.into_inner()).await
    }
}

impl Relay {
    /// Gives where it listens.
    async fn start(self, tasks: &mut JoinSet<()>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        tasks.spawn(async move {
            let server = ExpertServer::new(self);
            Server::builder().add_service(server).serve_with_incoming(incoming).await.expect("it serves");
        });
        address
    }
}

#[tokio::test]
async fn a_lost_stream_in_a_connection_that_lives_costs_seconds_and_no_request() {
    let model = needs_expert_3().write();
    let behind = Cluster::builder(&model).placement(&["0,1", "2,3"]).without_gateway().start().await;
    let n_streams = Arc::new(AtomicUsize::new(0));
    let relay = Relay { server: behind.experts[1].expert(), n_streams: Arc::clone(&n_streams) };
    let mut tasks = JoinSet::new();
    let address = relay.start(&mut tasks).await;
    // Nobody else holds expert 3: its frame is waited for, with the default of half a minute.
    let builder = Cluster::builder(&model).placement(&["0,1"]).also_expert_at(address);
    let mut cluster = builder.start().await;
    for _ in 0..ARRIVE {
        let http = cluster.http();
        within(Duration::from_secs(15), "answer, once the stream is made again", assert_answers(&http)).await;
        if cluster.router_status().await.failures.contains_key("mute") {
            break;
        }
    }
    let status = cluster.router_status().await;
    assert!(status.failures.contains_key("mute"), "{status:?}");
    assert!(n_streams.load(Ordering::Relaxed) >= 2, "{status:?}");
    cluster.idle().await;
    assert!(cluster.router.process.exit_status().is_none());
}
