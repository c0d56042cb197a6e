//! Server-sent events of the OpenAI API, one by one, and what they add up to.

use serde_json::Value;

use super::{
    http::{Connection, is_chunked},
    wait_for::DEADLINE,
    within,
};

/// A stream that is being read.
pub(crate) struct Events {
    connection: Connection,
    buffer: Vec<u8>,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    Data(Value),
    /// `[DONE]`
    Done,
}

impl Events {
    pub(crate) fn new(connection: Connection, headers: &[(String, String)]) -> Self {
        assert!(is_chunked(headers), "a stream of unknown length: {headers:?}");
        let is_events = headers
            .iter()
            .any(|(name, value)| name == "content-type" && value.starts_with("text/event-stream"));
        assert!(is_events, "{headers:?}");
        Self { connection, buffer: Vec::new() }
    }

    /// The next event; None at the end of the body. An Err is a connection cut before it.
    pub(crate) async fn next(&mut self) -> std::io::Result<Option<Event>> {
        within(DEADLINE, "event", async {
            loop {
                if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                    let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                    if let Some(event) = parse(&event) {
                        return Ok(Some(event));
                    }
                    continue;
                }
                match self.connection.chunk().await? {
                    Some(chunk) => self.buffer.extend(chunk),
                    None => {
                        assert!(
                            self.buffer.is_empty(),
                            "half an event: {:?}",
                            String::from_utf8_lossy(&self.buffer)
                        );
                        return Ok(None);
                    }
                }
            }
        })
        .await
    }

    /// The data of every event up to `[DONE]`, which must be the last.
    pub(crate) async fn rest(&mut self) -> Vec<Value> {
        let mut chunks = Vec::new();
        loop {
            match self.next().await.expect("the stream is whole") {
                Some(Event::Data(chunk)) => chunks.push(chunk),
                Some(Event::Done) => break,
                None => panic!("the stream ended without [DONE]; its last chunk: {:?}", chunks.last()),
            }
        }
        assert_eq!(self.next().await.expect("the stream is whole"), None, "nothing follows [DONE]");
        chunks
    }

    pub(crate) fn into_connection(self) -> Connection {
        self.connection
    }
}

/// None: a comment.
fn parse(event: &[u8]) -> Option<Event> {
    let event = std::str::from_utf8(event).expect("events are UTF-8: a character is never cut");
    let mut data: Option<&str> = None;
    for line in event.trim_end().lines().filter(|line| !line.starts_with(':')) {
        let line = line.strip_prefix("data:").unwrap_or_else(|| panic!("line {line:?} is not data"));
        assert_eq!(data.replace(line.trim_start()), None, "one data line an event");
    }
    match data? {
        "[DONE]" => Some(Event::Done),
        json => {
            Some(Event::Data(serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"))))
        }
    }
}

/// One choice's answer, however it came.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    pub(crate) finish_reason: String,
}

impl Answer {
    /// Choice `index` of a plain response of either endpoint.
    #[track_caller]
    pub(crate) fn of_response(response: &Value, index: usize) -> Self {
        let choice = &response["choices"][index];
        let field = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let message = &choice["message"];
        Self {
            text: field(if message.is_null() { &choice["text"] } else { &message["content"] }),
            reasoning: field(&message["reasoning_content"]),
            finish_reason: field(&choice["finish_reason"]),
        }
    }

    /// Choice `index` of the chunks of a stream of either endpoint.
    #[track_caller]
    pub(crate) fn of_chunks(chunks: &[Value], index: usize) -> Self {
        let mut answer = Self::default();
        let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices is a list"));
        for choice in choices.filter(|choice| choice["index"] == index) {
            assert_eq!(answer.finish_reason, "", "nothing follows the finish_reason: {choice}");
            let delta = &choice["delta"];
            let text = if delta.is_null() { &choice["text"] } else { &delta["content"] };
            for (part, whole) in [
                (text, &mut answer.text),
                (&delta["reasoning_content"], &mut answer.reasoning),
                (&choice["finish_reason"], &mut answer.finish_reason),
            ] {
                let part = part.as_str().unwrap_or_default();
                whole.push_str(part);
            }
        }
        answer
    }
}
