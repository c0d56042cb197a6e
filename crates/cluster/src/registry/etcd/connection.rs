//! A way to etcd, its keys, and how long to wait before trying again.

use std::{
    fs,
    future::Future,
    path::Path,
    sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed},
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use super::Url;
use crate::registry::Error;

/// For any single call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that answers no ping is found dead within the sum of the two. More often than every 5 s, or without a
/// call under way, etcd takes pings for an attack and closes the connection.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(6);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

pub(super) struct Connection {
    endpoints: Vec<String>,
    options: ConnectOptions,
    prefix: String,
    pub(super) ttl: Duration,
    /// How it stands, for metrics.
    answers: AtomicBool,
    revision: AtomicI64,
}

impl Connection {
    pub(super) fn new(url: &Url) -> Result<Self, Error> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT);
        if let (Some(user), Some(file)) = (&url.user, &url.password_file) {
            let password = String::from_utf8(read("password-file", file)?).map_err(|_| Error::File {
                option: "password-file",
                path: file.clone(),
                problem: "is not UTF-8".to_owned(),
            })?;
            options = options
                .with_user(user, password.trim_end_matches(['\r', '\n']))
                .with_auto_token_refresh(true);
        }
        let mut scheme = "http";
        if let Some(ca) = &url.ca {
            scheme = "https";
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read("ca", ca)?));
            if let (Some(cert), Some(key)) = (&url.cert, &url.key) {
                tls = tls.identity(Identity::from_pem(read("cert", cert)?, read("key", key)?));
            }
            options = options.with_tls(tls);
        }
        Ok(Self {
            endpoints: url.endpoints.iter().map(|address| format!("{scheme}://{address}")).collect(),
            options,
            prefix: url.prefix.clone(),
            ttl: url.ttl,
            answers: AtomicBool::new(false),
            revision: AtomicI64::new(0),
        })
    }

    /// The registry has answered, as of `revision`.
    pub(super) fn hears(&self, revision: i64) {
        self.answers.store(true, Relaxed);
        self.revision.fetch_max(revision, Relaxed);
    }

    pub(super) fn hears_nothing(&self) {
        self.answers.store(false, Relaxed);
    }

    pub(super) fn answers(&self) -> bool {
        self.answers.load(Relaxed)
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision.load(Relaxed)
    }

    pub(super) fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// A connection of one's own: who breaks it breaks nobody else's.
    pub(super) async fn client(&self) -> Result<Client, etcd_client::Error> {
        within(CALL_TIMEOUT, Client::connect(&self.endpoints, Some(self.options.clone()))).await
    }
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| Error::File { option, path: path.to_owned(), problem: error.to_string() })
}

/// `call`, or an error after `timeout`.
pub(super) async fn within<T>(
    timeout: Duration,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, etcd_client::Error> {
    match tokio::time::timeout(timeout, call).await {
        Ok(result) => result,
        Err(_) => Err(etcd_client::Error::IoError(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("no answer within {timeout:?}"),
        ))),
    }
}

/// Pauses that grow and differ, so that a cluster does not come back in step; and one log line for each new trouble.
pub(super) struct Retry {
    what: &'static str,
    pause: Duration,
    last_error: String,
}

impl Retry {
    pub(super) const fn new(what: &'static str) -> Self {
        Self { what, pause: PAUSE_MIN, last_error: String::new() }
    }

    /// It works (again).
    pub(super) fn works(&mut self) {
        if !self.last_error.is_empty() {
            tracing::info!(what = self.what, "the registry answers again");
            self.last_error.clear();
        }
        self.pause = PAUSE_MIN;
    }

    pub(super) async fn pause(&mut self, error: &etcd_client::Error) {
        let error = error.to_string();
        if error != self.last_error {
            tracing::warn!(what = self.what, %error, "the registry does not answer");
            self.last_error = error;
        }
        tokio::time::sleep(jittered(self.pause)).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }
}

/// Between nothing and `span`.
pub(super) fn jittered(span: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() as u16;
    span.mul_f32(f32::from(random) / f32::from(u16::MAX))
}
