//! gRPC clients of our own contract, and the calls that many tests make.

use std::net::SocketAddr;

use proto::v1::{self, chat_client::ChatClient, expert_client::ExpertClient, router_client::RouterClient};
use tokio_stream::StreamExt as _;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{wait_for::DEADLINE, within};

/// A connection of its own, made at the first call and again after it broke.
pub(crate) fn channel(address: SocketAddr) -> Channel {
    connection(address, proto::HTTP2_WINDOW_BYTES, proto::HTTP2_WINDOW_BYTES)
}

/// The same, with room for what many streams hold that nobody reads.
pub(crate) fn channel_for_many_streams(address: SocketAddr) -> Channel {
    connection(address, proto::HTTP2_WINDOW_BYTES, 64 * proto::HTTP2_WINDOW_BYTES)
}

fn connection(address: SocketAddr, stream_window_bytes: u32, window_bytes: u32) -> Channel {
    Endpoint::from_shared(format!("http://{address}"))
        .expect("an address")
        .tcp_nodelay(true)
        .initial_stream_window_size(stream_window_bytes)
        .initial_connection_window_size(window_bytes)
        .connect_lazy()
}

pub(crate) fn chat(address: SocketAddr) -> ChatClient<Channel> {
    ChatClient::new(channel(address))
}

/// A client to which little can be under way: HTTP/2's own default, which is the least for a connection.
pub(crate) fn narrow_chat(address: SocketAddr) -> ChatClient<Channel> {
    const WINDOW_BYTES: u32 = 65_535;
    ChatClient::new(connection(address, WINDOW_BYTES, WINDOW_BYTES))
}

pub(crate) fn router(channel: Channel) -> RouterClient<Channel> {
    RouterClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

pub(crate) fn expert(channel: Channel) -> ExpertClient<Channel> {
    ExpertClient::new(channel)
        .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(proto::MESSAGE_BYTES_MAX)
}

/// What a router generated for one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Generated {
    pub(crate) ids: Vec<u32>,
    /// `[prompt, vocab]`, when they were asked for.
    pub(crate) prompt_logits: Vec<f32>,
    pub(crate) finish: i32,
    pub(crate) usage: v1::Usage,
}

impl Generated {
    /// Reads a whole Generate stream.
    pub(crate) async fn read(mut replies: Streaming<v1::GenerateReply>) -> Result<Self, Status> {
        let mut generated = Self::default();
        let reading = async {
            while let Some(reply) = replies.next().await {
                let reply = reply?;
                generated.ids.extend(reply.tokens.iter().map(|token| token.id));
                if let Some(rows) = reply.prompt_logits.and_then(|logits| logits.rows) {
                    let numbers = rows.data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                    generated.prompt_logits.extend(numbers);
                }
                generated.finish = reply.finish;
                generated.usage = reply.usage.unwrap_or_default();
            }
            Ok(generated)
        };
        within(DEADLINE, "answer", reading).await
    }
}

/// Runs `prompt` greedily for `tokens_max` tokens, whatever they are, with the logits of every prompt position.
pub(crate) async fn generate(
    mut router: RouterClient<Channel>,
    prompt: &[u32],
    tokens_max: u32,
) -> Result<Generated, Status> {
    let request = v1::GenerateRequest {
        prompt_ids: prompt.to_vec(),
        tokens_max,
        ignore_eos: true,
        prompt_logits: true,
        ..v1::GenerateRequest::default()
    };
    Generated::read(router.generate(request).await?.into_inner()).await
}

/// `frame` as a router that has just asked the server would send it: with its epoch and weights, and sealed.
pub(crate) fn planned(frame: v1::Frame, status: &v1::ExpertStatus) -> v1::Frame {
    let of_layer = status.holds.iter().find(|layer| layer.layer == frame.layer);
    let hash = |expert: &u32| {
        let at = of_layer?.experts.iter().position(|held| held == expert)?;
        Some(of_layer?.weights[at])
    };
    let experts: std::collections::BTreeSet<u32> = frame.assignment_expert.iter().copied().collect();
    let weights = experts.iter().filter_map(hash).fold(0_u64, u64::wrapping_add);
    proto::checksum::seal_frame(v1::Frame { epoch: status.epoch, weights, ..frame })
}
