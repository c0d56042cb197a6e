//! `shoal up`: a whole cluster as the children of one process.

use std::{ffi::OsStr, net::SocketAddr, path::Path};

use nix::unistd::Pid;
use serde_json::Value;

use super::{Http, Process, wait_for};

pub(crate) struct Up {
    pub(crate) process: Process,
    /// As its table has them at the start.
    pub(crate) members: Vec<Child>,
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Child {
    pub(crate) name: String,
    pub(crate) pid: Pid,
    pub(crate) address: SocketAddr,
}

impl Up {
    /// `shoal up` on `model` with `args`; everybody listens when this returns.
    pub(crate) async fn start(model: &Path, args: &[&str]) -> Self {
        let fixed = ["up", "--json", "--listen", "127.0.0.1:0", "--model"].map(OsStr::new);
        let args = fixed.into_iter().chain([model.as_os_str()]).chain(args.iter().map(OsStr::new));
        let mut process = Process::spawn("up", args);
        let members = wait_for("table", async || {
            if let Some(status) = process.exit_status() {
                panic!("up ended before it was up: {status}\n{}", process.log());
            }
            let lines = process.stdout();
            let tables = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            tables.filter_map(|table| table["members"].as_array().cloned()).next().ok_or(lines)
        });
        let members = members.await.iter().map(Child::read).collect();
        Self { process, members }
    }

    pub(crate) fn http(&self) -> Http {
        Http { address: self.member("gateway").address }
    }

    /// The first whose name begins so.
    pub(crate) fn member(&self, name: &str) -> &Child {
        let found = self.members.iter().find(|member| member.name.starts_with(name));
        found.unwrap_or_else(|| panic!("no {name} in {:?}", self.members))
    }

    pub(crate) async fn ready(&self) {
        let http = self.http();
        wait_for("/ready with 200", async || {
            let response = http.get("/ready").await;
            if response.status == 200 {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&response.body).into_owned())
            }
        })
        .await;
    }
}

impl Child {
    fn read(member: &Value) -> Self {
        let text = |field: &str| member[field].as_str().unwrap_or_else(|| panic!("no {field} in {member}"));
        let pid = member["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        Self {
            name: text("name").to_owned(),
            pid: Pid::from_raw(pid.unwrap_or_else(|| panic!("no pid in {member}"))),
            address: text("address").parse().unwrap_or_else(|_| panic!("no address in {member}")),
        }
    }
}
