//! The clients: chats over SSE, half greedy and half seeded, each answer kept byte for byte with the time of each piece.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore as _, SeedableRng as _},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::Instant,
};

/// Different requests of a run, at most; they are asked again and again.
pub(crate) const QUESTIONS_MAX: usize = 48;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Far beyond anything that is waited for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// The requests of a run, the same for the same seed.
pub(crate) fn questions(seed: u64, n: usize) -> Vec<Value> {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let mut below = |n: u64| dice.next_u64() % n;
    (0..n)
        .map(|at| {
            let text = match at % 4 {
                0 => format!("What is {} + {}?", 100 + below(900), 100 + below(900)),
                1 => format!("What is {} - {}?", 500 + below(500), 100 + below(400)),
                2 => "Tell me a story.".to_owned(),
                _ => format!("What is {} x {}?", 2 + below(8), 11 + below(80)),
            };
            let mut body = json!({
                "messages": [{ "role": "user", "content": text }],
                "stream": true,
                "stream_options": { "include_usage": true },
                "max_tokens": 60 + below(100),
                // Answers of the full length, so that a run lasts as long with every seed.
                "ignore_eos": true,
                "temperature": 0,
            });
            if at % 2 == 1 {
                body["temperature"] = json!(0.8);
                body["seed"] = json!(below(1 << 30));
            }
            body
        })
        .collect()
}

/// One answer, as a client saw it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Answer {
    pub(crate) question: usize,
    /// Reasoning and content.
    pub(crate) text: String,
    pub(crate) n_pieces: usize,
    pub(crate) n_tokens: u64,
    /// Longest time between two pieces.
    pub(crate) gap_ms: f64,
    /// When, since the load began, that gap began.
    pub(crate) gap_at_s: f64,
    pub(crate) first_ms: f64,
    pub(crate) began_s: f64,
    pub(crate) took_s: f64,
    /// Gateways that refused the connection before one took it.
    pub(crate) n_refused: usize,
    /// Why it is no whole answer.
    pub(crate) error: Option<String>,
}

/// Where the gateways are, as a load balancer would know.
pub(crate) type Gateways = Arc<std::sync::Mutex<Vec<SocketAddr>>>;

/// Asks `question`, at the gateway whose turn it is.
pub(crate) async fn ask(
    gateways: &Gateways,
    turn: usize,
    question: usize,
    body: &Value,
    began: Instant,
) -> Answer {
    let mut answer = Answer {
        question,
        text: String::new(),
        n_pieces: 0,
        n_tokens: 0,
        gap_ms: 0.0,
        gap_at_s: 0.0,
        first_ms: 0.0,
        began_s: began.elapsed().as_secs_f64(),
        took_s: 0.0,
        n_refused: 0,
        error: None,
    };
    let asked = Instant::now();
    let result = tokio::time::timeout(ANSWER_TIMEOUT, read(gateways, turn, body, began, &mut answer)).await;
    answer.took_s = asked.elapsed().as_secs_f64();
    answer.error = match result {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(_) => Some(format!("no end within {ANSWER_TIMEOUT:?}")),
    };
    answer
}

/// A gateway that cannot be reached is left for the next one: no byte of the request has gone anywhere.
async fn connect(
    gateways: &Gateways,
    turn: usize,
    answer: &mut Answer,
) -> anyhow::Result<(TcpStream, SocketAddr)> {
    let deadline = Instant::now() + ANSWER_TIMEOUT / 4;
    loop {
        let list = gateways.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        for at in 0..list.len() {
            let address = list[(turn + at) % list.len()];
            match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
                Ok(Ok(socket)) => return Ok((socket, address)),
                Ok(Err(_)) | Err(_) => answer.n_refused += 1,
            }
        }
        if Instant::now() > deadline {
            bail!("no gateway takes the connection");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// HTTP/1.0, so that the body comes unchunked and ends with the connection.
async fn read(
    gateways: &Gateways,
    turn: usize,
    body: &Value,
    began: Instant,
    answer: &mut Answer,
) -> anyhow::Result<()> {
    let (socket, address) = connect(gateways, turn, answer).await?;
    socket.set_nodelay(true)?;
    let (from, mut to) = socket.into_split();
    let mut body = body.clone();
    body["model"] = json!("minnow");
    let body = body.to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    let asked = Instant::now();
    to.write_all((head + &body).as_bytes()).await.context("the request cannot be sent")?;
    let mut lines = BufReader::new(from).lines();
    let status =
        lines.next_line().await.context("no response")?.context("the connection ended without a response")?;
    if !status.contains(" 200 ") {
        let mut rest = String::new();
        while let Ok(Some(line)) = lines.next_line().await {
            rest = line;
        }
        bail!("{status}: {rest}");
    }
    let (mut last, mut finish, mut done) = (None::<Instant>, None, false);
    while let Some(line) = lines.next_line().await.context("the stream broke")? {
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(data).with_context(|| format!("not JSON: {data}"))?;
        if !event["error"].is_null() {
            bail!("error event: {}", event["error"]);
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            answer.n_tokens = tokens;
        }
        let choice = &event["choices"][0];
        for name in ["reasoning_content", "content"] {
            answer.text.push_str(choice["delta"][name].as_str().unwrap_or_default());
        }
        if choice["delta"]["role"].is_string() {
            continue;
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            finish = Some(reason.to_owned());
        }
        if choice.is_object() {
            let now = Instant::now();
            answer.n_pieces += 1;
            match last {
                None => answer.first_ms = (now - asked).as_secs_f64() * 1e3,
                Some(before) => {
                    let gap = (now - before).as_secs_f64() * 1e3;
                    if gap > answer.gap_ms {
                        (answer.gap_ms, answer.gap_at_s) = (gap, (before - began).as_secs_f64());
                    }
                }
            }
            last = Some(now);
        }
    }
    anyhow::ensure!(
        done && finish.is_some(),
        "the stream ended without {}",
        if done { "a finish_reason" } else { "[DONE]" }
    );
    Ok(())
}
