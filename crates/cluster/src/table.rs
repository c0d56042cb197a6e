//! The routing table: who holds which expert. Immutable and versioned; one writer ([`Members`]) makes the next one,
//! readers keep the one they have for as long as a decision lasts. Pure: no clock, no tasks.

use std::collections::{BTreeMap, HashMap};

use ids::{ExpertId, InstanceId, LayerId, Version};

/// An expert server and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub instance: InstanceId,
    /// `host:port`
    pub address: String,
    pub holds: BTreeMap<LayerId, Vec<ExpertId>>,
}

impl Holder {
    /// Number of (layer, expert) pairs held.
    #[must_use]
    pub fn n_experts(&self) -> usize {
        self.holds.values().map(Vec::len).sum()
    }
}

/// Which instances hold which expert, at one moment.
#[derive(Clone, Debug, Default)]
pub struct RoutingTable {
    version: Version,
    holders: BTreeMap<InstanceId, Holder>,
    holders_of: HashMap<(LayerId, ExpertId), Vec<InstanceId>>,
}

impl RoutingTable {
    fn new(version: Version, holders: BTreeMap<InstanceId, Holder>) -> Self {
        let mut holders_of: HashMap<_, Vec<_>> = HashMap::new();
        for holder in holders.values() {
            for (&layer, experts) in &holder.holds {
                for &expert in experts {
                    holders_of.entry((layer, expert)).or_default().push(holder.instance.clone());
                }
            }
        }
        Self { version, holders, holders_of }
    }

    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    pub fn holders(&self) -> impl Iterator<Item = &Holder> {
        self.holders.values()
    }

    #[must_use]
    pub fn holder(&self, instance: &InstanceId) -> Option<&Holder> {
        self.holders.get(instance)
    }

    /// Every live holder of one expert, in a fixed order.
    #[must_use]
    pub fn holders_of(&self, layer: LayerId, expert: ExpertId) -> &[InstanceId] {
        self.holders_of.get(&(layer, expert)).map_or(&[], Vec::as_slice)
    }

    /// The experts without a live holder, of `n_experts` in each of `layers`.
    pub fn missing(
        &self,
        layers: impl IntoIterator<Item = LayerId>,
        n_experts: usize,
    ) -> BTreeMap<LayerId, Vec<ExpertId>> {
        let mut missing = BTreeMap::new();
        for layer in layers {
            let orphans: Vec<ExpertId> = (0..n_experts)
                .filter_map(|expert| u32::try_from(expert).ok().map(ExpertId))
                .filter(|&expert| self.holders_of(layer, expert).is_empty())
                .collect();
            if !orphans.is_empty() {
                missing.insert(layer, orphans);
            }
        }
        missing
    }
}

/// The members as they come and go: the one place where the next table is made.
#[derive(Debug, Default)]
pub struct Members {
    version: Version,
    holders: BTreeMap<InstanceId, Holder>,
}

impl Members {
    /// `holder` serves from now on; what it held before under this instance is replaced.
    pub fn join(&mut self, holder: Holder) -> RoutingTable {
        self.holders.insert(holder.instance.clone(), holder);
        self.next()
    }

    /// `instance` serves no more. None if it did not serve: the table stays.
    pub fn leave(&mut self, instance: &InstanceId) -> Option<RoutingTable> {
        self.holders.remove(instance)?;
        Some(self.next())
    }

    fn next(&mut self) -> RoutingTable {
        self.version.0 += 1;
        RoutingTable::new(self.version, self.holders.clone())
    }
}

/// `layer 3: experts 0-7,12; layer 4: expert 9`: for messages to people. Long lists of layers with the same experts
/// are folded.
#[must_use]
pub fn describe(experts: &BTreeMap<LayerId, Vec<ExpertId>>) -> String {
    let mut parts: Vec<(LayerId, LayerId, String)> = Vec::new();
    for (&layer, experts) in experts {
        let list = ranges(experts);
        match parts.last_mut() {
            Some((_, last, text)) if last.0 + 1 == layer.0 && *text == list => *last = layer,
            _ => parts.push((layer, layer, list)),
        }
    }
    let parts: Vec<String> = parts
        .into_iter()
        .map(|(first, last, list)| match first == last {
            true => format!("layer {first}: {list}"),
            false => format!("layers {first}-{last}: {list}"),
        })
        .collect();
    parts.join("; ")
}

fn ranges(experts: &[ExpertId]) -> String {
    let mut sorted: Vec<u32> = experts.iter().map(|expert| expert.0).collect();
    sorted.sort_unstable();
    sorted.dedup();
    let list: Vec<String> = sorted
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    format!("expert{} {}", if sorted.len() == 1 { "" } else { "s" }, list.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(name: &str, layer: u32, experts: &[u32]) -> Holder {
        Holder {
            instance: name.into(),
            address: format!("{name}:1"),
            holds: BTreeMap::from([(LayerId(layer), experts.iter().copied().map(ExpertId).collect())]),
        }
    }

    #[test]
    fn members_come_and_go() {
        let mut members = Members::default();
        members.join(holder("a", 1, &[0, 1]));
        let table = members.join(holder("b", 1, &[1, 2]));
        assert_eq!(table.version(), Version(2));
        assert_eq!(table.holders_of(LayerId(1), ExpertId(1)), [InstanceId::from("a"), InstanceId::from("b")]);
        assert_eq!(describe(&table.missing([LayerId(1)], 4)), "layer 1: expert 3");
        assert!(members.leave(&"c".into()).is_none());
        let table = members.leave(&"a".into()).unwrap();
        assert_eq!(table.version(), Version(3));
        assert_eq!(describe(&table.missing([LayerId(1)], 4)), "layer 1: experts 0,3");
    }

    #[test]
    fn missing_experts_read_well() {
        let experts = |ids: &[u32]| ids.iter().copied().map(ExpertId).collect::<Vec<_>>();
        let missing = BTreeMap::from([
            (LayerId(1), experts(&[0, 1, 2, 9])),
            (LayerId(2), experts(&[0, 1, 2, 9])),
            (LayerId(3), experts(&[5])),
        ]);
        assert_eq!(describe(&missing), "layers 1-2: experts 0-2,9; layer 3: expert 5");
    }
}
