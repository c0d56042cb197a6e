//! An expert server that says one thing and does another: in this process, behind a real router.

use std::net::SocketAddr;

use proto::v1::{
    self,
    expert_server::{Expert, ExpertServer},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

/// How it answers a frame. Each is wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Behaviour {
    /// As if it did not hold what its Status lists.
    NotFound,
    /// With fewer rows than were asked for.
    FewerRows,
    /// With rows of another width.
    NarrowRows,
    NotFinite,
    /// With an answer to a frame that nobody sent.
    UnknownFrame,
    /// With the end of the stream.
    EndsTheStream,
    /// For an epoch of its holdings that is over.
    StaleEpoch,
    /// With other weights than the router knows.
    OtherWeights,
    /// With a flipped bit.
    Damaged,
}

impl Behaviour {
    pub(crate) const ALL: [Self; 9] = [
        Self::NotFound,
        Self::FewerRows,
        Self::NarrowRows,
        Self::NotFinite,
        Self::UnknownFrame,
        Self::EndsTheStream,
        Self::StaleEpoch,
        Self::OtherWeights,
        Self::Damaged,
    ];

    /// The reason under which the router counts it; None if it cannot tell that a frame failed.
    pub(crate) const fn reason(self) -> Option<&'static str> {
        match self {
            Self::NotFound => Some("expert_not_held"),
            Self::FewerRows | Self::NarrowRows => Some("internal"),
            Self::EndsTheStream => Some("transport"),
            Self::NotFinite => Some("not_finite"),
            Self::UnknownFrame => None,
            Self::StaleEpoch => Some("stale_reply"),
            Self::OtherWeights => Some("weights_mismatch"),
            Self::Damaged => Some("checksum_mismatch"),
        }
    }

    fn reply(self, frame: &v1::Frame) -> Result<v1::Reply, Status> {
        let n_rows = frame.assignment_row.len() as u32;
        let width = frame.rows.as_ref().map_or(0, |rows| rows.width);
        let rows = |n_rows: u32, width: u32, value: f32| {
            v1::reply::Outcome::Computed(v1::Computed {
                rows: Some(v1::Rows {
                    dtype: v1::Dtype::F32.into(),
                    n_rows,
                    width,
                    data: value.to_le_bytes().repeat((n_rows * width) as usize).into(),
                }),
                ..Default::default()
            })
        };
        let outcome = match self {
            Self::NotFound => v1::reply::Outcome::Failure(v1::Failure {
                code: "not_found".into(),
                reason: "expert_not_held".into(),
                message: "not held here: layer 1: expert 3".into(),
            }),
            Self::FewerRows => rows(n_rows - 1, width, 0.0),
            Self::NarrowRows => rows(n_rows, width / 2, 0.0),
            Self::NotFinite => rows(n_rows, width, f32::NAN),
            Self::UnknownFrame | Self::StaleEpoch | Self::OtherWeights | Self::Damaged => {
                rows(n_rows, width, 0.0)
            }
            Self::EndsTheStream => return Err(Status::internal("out of order")),
        };
        let id = if matches!(self, Self::UnknownFrame) { frame.id + 1_000_000 } else { frame.id };
        let mut reply = v1::Reply {
            id,
            outcome: Some(outcome),
            epoch: frame.epoch - u64::from(matches!(self, Self::StaleEpoch)),
            weights: frame.weights ^ u64::from(matches!(self, Self::OtherWeights)),
            checksum: 0,
        };
        reply = proto::checksum::seal_reply(reply);
        reply.checksum ^= u64::from(matches!(self, Self::Damaged));
        Ok(reply)
    }
}

/// A running stand-in; gone when dropped.
pub(crate) struct StandIn {
    pub(crate) address: SocketAddr,
    _server: JoinSet<()>,
}

impl StandIn {
    /// `status` is what it says of itself.
    pub(crate) async fn start(status: v1::ExpertStatus, behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let server = ExpertServer::new(Service { status, behaviour });
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            Server::builder().add_service(server).serve_with_incoming(incoming).await.expect("it serves");
        });
        Self { address, _server: tasks }
    }
}

struct Service {
    status: v1::ExpertStatus,
    behaviour: Behaviour,
}

#[tonic::async_trait]
impl Expert for Service {
    type DispatchStream = std::pin::Pin<Box<dyn Stream<Item = Result<v1::Reply, Status>> + Send>>;

    async fn dispatch(
        &self,
        request: Request<Streaming<v1::Frame>>,
    ) -> Result<Response<Self::DispatchStream>, Status> {
        let behaviour = self.behaviour;
        let replies = request.into_inner().map(move |frame| behaviour.reply(&frame?));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn status(
        &self,
        _: Request<v1::ExpertStatusRequest>,
    ) -> Result<Response<v1::ExpertStatus>, Status> {
        Ok(Response::new(self.status.clone()))
    }
}
