//! Clusters of real processes.

pub(crate) mod ask;
pub(crate) mod clients;
pub(crate) mod cluster;
pub(crate) mod collector;
pub(crate) mod http;
pub(crate) mod process;
pub(crate) mod sse;
pub(crate) mod up;
pub(crate) mod wait_for;

pub(crate) use ask::{Endpoint, ask};
pub(crate) use cluster::Cluster;
pub(crate) use http::Http;
pub(crate) use process::Process;
pub(crate) use wait_for::{wait_for, within};
