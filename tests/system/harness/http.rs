//! A small HTTP/1.1 client that shows what a friendly one hides: raw requests, half-closed sockets, resets.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use super::{sse::Events, wait_for::DEADLINE, within};

/// A server to talk to; each request has a connection of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Http {
    pub(crate) address: SocketAddr,
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Http {
    pub(crate) async fn get(&self, path: &str) -> Response {
        self.exchange(&self.request("GET", path, b""))
            .await
            .unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// `get` for a server that may be away.
    pub(crate) async fn try_get(&self, path: &str) -> std::io::Result<Response> {
        self.exchange(&self.request("GET", path, b"")).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.post_bytes(path, body.to_string().as_bytes()).await
    }

    pub(crate) async fn post_bytes(&self, path: &str, body: &[u8]) -> Response {
        self.exchange(&self.request("POST", path, body))
            .await
            .unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// `post` with further headers.
    pub(crate) async fn post_with(
        &self,
        path: &str,
        headers: &[(&'static str, String)],
        body: &Value,
    ) -> Response {
        let request = self.request_with("POST", path, headers, body.to_string().as_bytes());
        self.exchange(&request).await.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// `stream` with further headers.
    pub(crate) async fn stream_with(
        &self,
        path: &str,
        headers: &[(&'static str, String)],
        body: &Value,
    ) -> Events {
        let request = self.request_with("POST", path, headers, body.to_string().as_bytes());
        let connection = self.send(&request).await.unwrap_or_else(|error| panic!("POST {path}: {error}"));
        Self::events(connection, path).await
    }

    /// Posts `body` and hands over the connection once the head of the response has come: the events follow.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Events {
        Self::events(self.open(path, body).await, path).await
    }

    async fn events(mut connection: Connection, path: &str) -> Events {
        let (status, headers) =
            connection.head().await.unwrap_or_else(|error| panic!("POST {path}: {error}"));
        if status != 200 {
            let body = connection.body(&headers).await.unwrap_or_default();
            panic!("POST {path}: {status} {}", String::from_utf8_lossy(&body));
        }
        Events::new(connection, &headers)
    }

    /// Posts `body` and reads nothing.
    pub(crate) async fn open(&self, path: &str, body: &Value) -> Connection {
        let request = self.request("POST", path, body.to_string().as_bytes());
        self.send(&request).await.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// Sends `request` as it is.
    pub(crate) async fn send(&self, request: &[u8]) -> std::io::Result<Connection> {
        let mut stream = TcpStream::connect(self.address).await?;
        stream.write_all(request).await?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    async fn exchange(&self, request: &[u8]) -> std::io::Result<Response> {
        within(DEADLINE, "response", async {
            let mut connection = self.send(request).await?;
            let (status, headers) = connection.head().await?;
            let body = connection.body(&headers).await?;
            Ok(Response { status, headers, body })
        })
        .await
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
        self.request_with(method, path, &[], body)
    }

    fn request_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&'static str, String)],
        body: &[u8],
    ) -> Vec<u8> {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        [head.as_bytes(), body].concat()
    }
}

impl Response {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON: {error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The JSON of a 200.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// One exchange in progress. Dropping it closes the socket.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Status and headers.
    pub(crate) async fn head(&mut self) -> std::io::Result<(u16, Vec<(String, String)>)> {
        within(DEADLINE, "response head", self.read_head()).await
    }

    async fn read_head(&mut self) -> std::io::Result<(u16, Vec<(String, String)>)> {
        let status_line = self.line().await?;
        let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| invalid(format!("status line {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok((status, headers));
            }
            let (name, value) = line.split_once(':').ok_or_else(|| invalid(format!("header {line:?}")))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// All of the body.
    pub(crate) async fn body(&mut self, headers: &[(String, String)]) -> std::io::Result<Vec<u8>> {
        let mut body = Vec::new();
        if is_chunked(headers) {
            while let Some(chunk) = self.chunk().await? {
                body.extend(chunk);
            }
        } else if let Some((_, length)) = headers.iter().find(|(name, _)| name == "content-length") {
            body.resize(length.parse().map_err(|_| invalid(format!("content-length {length:?}")))?, 0);
            self.stream.read_exact(&mut body).await?;
        } else {
            self.stream.read_to_end(&mut body).await?;
        }
        Ok(body)
    }

    /// The next chunk of a chunked body; None after the last.
    pub(crate) async fn chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let size = self.line().await?;
        let size = usize::from_str_radix(&size, 16).map_err(|_| invalid(format!("chunk size {size:?}")))?;
        let mut chunk = vec![0; size];
        self.stream.read_exact(&mut chunk).await?;
        let end = self.line().await?;
        if !end.is_empty() {
            return Err(invalid(format!("{end:?} after a chunk")));
        }
        Ok((size > 0).then_some(chunk))
    }

    /// Says that nothing more will be sent; the other direction stays open.
    pub(crate) async fn half_close(&mut self) {
        self.stream.get_mut().shutdown().await.expect("the socket is open");
    }

    /// Ends with a reset instead of a farewell.
    pub(crate) fn reset(self) {
        self.stream.into_inner().set_zero_linger().expect("the socket is open");
    }

    async fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }
}

pub(crate) fn is_chunked(headers: &[(String, String)]) -> bool {
    headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked")
}

fn invalid(what: String) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, format!("cannot read {what}"))
}
