//! `shoal up`: a whole cluster as the children of one process.

use std::{ffi::OsStr, net::SocketAddr, path::Path};

use super::{Http, Process, wait_for};

pub(crate) struct Up {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
}

impl Up {
    /// `shoal up` on `model` with `args`; it listens when this returns.
    pub(crate) async fn start(model: &Path, args: &[&str]) -> Self {
        let fixed = ["up", "--listen", "127.0.0.1:0", "--model"].map(OsStr::new);
        let args = fixed.into_iter().chain([model.as_os_str()]).chain(args.iter().map(OsStr::new));
        let mut process = Process::spawn_service("up", args);
        let address = process.address().await;
        Self { process, address }
    }

    pub(crate) fn http(&self) -> Http {
        Http { address: self.address }
    }

    pub(crate) async fn ready(&self) {
        let http = self.http();
        wait_for("/ready with 200", async || {
            let response = http.get("/ready").await;
            if response.status == 200 { Ok(()) } else { Err(String::from_utf8_lossy(&response.body).into_owned()) }
        })
        .await;
    }
}
