//! What processes write down about themselves and about where experts belong. Values are JSON, so that `etcdctl get
//! --prefix` can be read; unknown fields are ignored, so that two releases can share a cluster.

use std::collections::BTreeMap;

use ids::{Epoch, InstanceId, Version};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Holds;

/// The folder of keys that an instance's record lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Expert,
    Router,
}

impl Role {
    #[must_use]
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Expert => "experts",
            Self::Router => "routers",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Listens, and cannot serve yet.
    Loading,
    Ready,
    /// Will leave: gets nothing new where somebody else can take it.
    Draining,
}

impl State {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

/// One instance, as it describes itself under its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
    pub instance: InstanceId,
    /// `host:port` at which others reach it.
    pub address: String,
    pub state: State,
    /// Fingerprint of the checkpoint.
    pub checkpoint: String,
    pub wire_version: u32,
    /// Of the program.
    pub version: String,
    /// Of expert servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holdings: Option<Holdings>,
}

/// What an expert server holds, and what it could.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// Grows with every change of `holds`.
    #[serde(serialize_with = "write_epoch", deserialize_with = "read_epoch")]
    pub epoch: Epoch,
    pub holds: Holds,
    /// Those of `holds` that its own command line named: no placement takes them away.
    #[serde(default)]
    pub pinned: Holds,
    pub device: String,
    /// Bytes of the experts held.
    pub bytes: u64,
    /// Most bytes of experts that it may be asked to hold.
    pub memory_bytes_max: u64,
    /// Of one expert of one layer: the largest.
    #[serde(default)]
    pub expert_bytes: u64,
    /// The placement applied last; 0: none yet.
    #[serde(default, serialize_with = "write_version", deserialize_with = "read_version")]
    pub placement: Version,
}

/// Who should hold what, beyond what is pinned. Written by the leader alone; versions only grow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    #[serde(serialize_with = "write_version", deserialize_with = "read_version")]
    pub version: Version,
    #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
    pub leader: InstanceId,
    /// By instance.
    pub wanted: BTreeMap<String, Holds>,
}

fn write_id<S: Serializer>(id: &InstanceId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id.as_str())
}

fn read_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<InstanceId, D::Error> {
    Ok(String::deserialize(deserializer)?.as_str().into())
}

fn write_epoch<S: Serializer>(epoch: &Epoch, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(epoch.0)
}

fn read_epoch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Epoch, D::Error> {
    u64::deserialize(deserializer).map(Epoch)
}

fn write_version<S: Serializer>(version: &Version, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(version.0)
}

fn read_version<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Version, D::Error> {
    u64::deserialize(deserializer).map(Version)
}

impl Placement {
    /// What `instance`, which has applied version `applied`, is to hold beyond what is pinned. None: nothing new. A
    /// placement that does not know the instance says nothing about it, and one that is not newer is a stale leader's.
    #[must_use]
    pub fn news_for(&self, instance: &InstanceId, applied: Version) -> Option<&Holds> {
        if self.version > applied { self.wanted.get(instance.as_str()) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_newer_placement_that_names_the_instance_is_obeyed() {
        let holds = |text: &str| text.parse::<Holds>().unwrap_or_default();
        let wanted = BTreeMap::from([("me".to_owned(), holds("1:2-3"))]);
        let placement = Placement { version: Version(4), leader: "router".into(), wanted };
        assert_eq!(placement.news_for(&"me".into(), Version(3)), Some(&holds("1:2-3")));
        assert_eq!(placement.news_for(&"me".into(), Version(4)), None);
        assert_eq!(placement.news_for(&"me".into(), Version(5)), None);
        assert_eq!(
            placement.news_for(&"somebody".into(), Version(0)),
            None,
            "a leader that has not heard of it"
        );
    }

    #[test]
    fn records_are_json_and_unknown_fields_are_ignored() {
        let text = r#"{"instance":"a","address":"h:1","state":"ready","checkpoint":"c","wire_version":2,"version":"0",
            "holdings":{"epoch":3,"holds":"1-2:0-3","device":"cpu","bytes":8,"memory_bytes_max":9,"new":1},"newer":[]}"#;
        let record: Record = serde_json::from_str(text).unwrap();
        let holdings = record.holdings.as_ref().unwrap();
        assert_eq!((holdings.epoch, holdings.holds.len(), holdings.placement), (Epoch(3), 8, Version(0)));
        let again: Record = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(again, record);
    }
}
