//! The routing table: who holds which expert. Immutable and versioned; one writer ([`Members`]) makes the next one,
//! readers keep the one they have for as long as a decision lasts. Pure: no clock, no tasks.

use std::collections::{BTreeMap, HashMap};

use ids::{Epoch, ExpertId, InstanceId, LayerId, Version, WeightsHash};

/// An expert server and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub instance: InstanceId,
    /// `host:port`
    pub address: String,
    /// Of its holdings.
    pub epoch: Epoch,
    /// What it holds, and the hash of each expert's weights.
    pub holds: BTreeMap<(LayerId, ExpertId), WeightsHash>,
    /// It will leave: used only for what nobody else holds.
    pub draining: bool,
    /// Its experts compute with rows in int8 blocks: more precise ones would be rounded to these there.
    pub reads_blocks: bool,
    /// It is the reader of the table itself: nothing is sent to it.
    pub inside: bool,
}

impl Holder {
    /// Number of (layer, expert) pairs held.
    #[must_use]
    pub fn n_experts(&self) -> usize {
        self.holds.len()
    }
}

/// Two servers that hold different weights for the same expert: one file of the two is damaged or of another model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{instance} holds other weights of layer {layer} expert {expert} (hash {has}) than {first} (hash {known}) \
     that this router has used"
)]
pub struct OtherWeights {
    instance: InstanceId,
    layer: LayerId,
    expert: ExpertId,
    has: WeightsHash,
    first: InstanceId,
    known: WeightsHash,
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
        // Those that drain come second: for an expert that somebody else holds they are no holder.
        for draining in [false, true] {
            let mut taken: HashMap<_, Vec<_>> = HashMap::new();
            for holder in holders.values().filter(|holder| holder.draining == draining) {
                for pair in holder.holds.keys().filter(|pair| !holders_of.contains_key(*pair)) {
                    taken.entry(*pair).or_default().push(holder.instance.clone());
                }
            }
            holders_of.extend(taken);
        }
        Self { version, holders, holders_of }
    }

    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    pub fn holders(&self) -> impl Iterator<Item = &Holder> + Clone {
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

    /// The experts of `layer` without a live holder, of `n_experts`.
    #[must_use]
    pub fn missing_of(&self, layer: LayerId, n_experts: usize) -> Vec<ExpertId> {
        (0..n_experts)
            .filter_map(|expert| u32::try_from(expert).ok().map(ExpertId))
            .filter(|&expert| self.holders_of(layer, expert).is_empty())
            .collect()
    }

    /// The experts without a live holder, of `n_experts` in each of `layers`.
    pub fn missing(
        &self,
        layers: impl IntoIterator<Item = LayerId>,
        n_experts: usize,
    ) -> BTreeMap<LayerId, Vec<ExpertId>> {
        let mut missing = BTreeMap::new();
        for layer in layers {
            let orphans = self.missing_of(layer, n_experts);
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
    /// The weights of every expert ever used, and who brought them: an answer must not mix two models.
    weights: HashMap<(LayerId, ExpertId), (InstanceId, WeightsHash)>,
}

impl Members {
    /// `holder` serves from now on; what it held before under this instance is replaced.
    ///
    /// # Errors
    /// It holds other weights than those known: the members stay as they are.
    pub fn join(&mut self, holder: Holder) -> Result<RoutingTable, OtherWeights> {
        for (&(layer, expert), &has) in &holder.holds {
            match self.weights.get(&(layer, expert)) {
                Some((first, known)) if *known != has => {
                    return Err(OtherWeights {
                        instance: holder.instance.clone(),
                        layer,
                        expert,
                        has,
                        first: first.clone(),
                        known: *known,
                    });
                }
                Some(_) | None => {}
            }
        }
        for (&pair, &hash) in &holder.holds {
            self.weights.entry(pair).or_insert_with(|| (holder.instance.clone(), hash));
        }
        self.holders.insert(holder.instance.clone(), holder);
        Ok(self.next())
    }

    /// `instance` serves no more. None if it did not serve: the table stays.
    pub fn leave(&mut self, instance: &InstanceId) -> Option<RoutingTable> {
        self.holders.remove(instance)?;
        Some(self.next())
    }

    /// `instance` will leave. None if that is no news: the table stays.
    pub fn drain(&mut self, instance: &InstanceId) -> Option<RoutingTable> {
        let holder = self.holders.get_mut(instance).filter(|holder| !holder.draining)?;
        holder.draining = true;
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

    fn holder(name: &str, experts: &[u32]) -> Holder {
        let held = |&expert: &u32| ((LayerId(1), ExpertId(expert)), WeightsHash(expert.into()));
        Holder {
            instance: name.into(),
            address: format!("{name}:1"),
            epoch: Epoch(1),
            holds: experts.iter().map(held).collect(),
            draining: false,
            reads_blocks: false,
            inside: false,
        }
    }

    fn holders_of(table: &RoutingTable, expert: u32) -> Vec<&str> {
        table.holders_of(LayerId(1), ExpertId(expert)).iter().map(InstanceId::as_str).collect()
    }

    #[test]
    fn members_come_and_go() {
        let mut members = Members::default();
        members.join(holder("a", &[0, 1])).unwrap();
        let table = members.join(holder("b", &[1, 2])).unwrap();
        assert_eq!(table.version(), Version(2));
        assert_eq!(holders_of(&table, 1), ["a", "b"]);
        assert_eq!(describe(&table.missing([LayerId(1)], 4)), "layer 1: expert 3");
        assert!(members.leave(&"c".into()).is_none());
        let table = members.leave(&"a".into()).unwrap();
        assert_eq!(table.version(), Version(3));
        assert_eq!(describe(&table.missing([LayerId(1)], 4)), "layer 1: experts 0,3");
    }

    #[test]
    fn a_draining_server_is_asked_only_for_what_nobody_else_holds() {
        let mut members = Members::default();
        members.join(holder("a", &[0, 1])).unwrap();
        members.join(holder("b", &[1])).unwrap();
        let table = members.drain(&"a".into()).unwrap();
        assert_eq!((holders_of(&table, 0), holders_of(&table, 1)), (vec!["a"], vec!["b"]));
        assert!(members.drain(&"a".into()).is_none());
    }

    #[test]
    fn other_weights_of_a_known_expert_are_refused_for_good() {
        let mut members = Members::default();
        members.join(holder("a", &[0, 1])).unwrap();
        members.leave(&"a".into());
        let mut other = holder("b", &[0, 1]);
        other.holds.insert((LayerId(1), ExpertId(1)), WeightsHash(77));
        assert_eq!(
            members.join(other).unwrap_err().to_string(),
            "b holds other weights of layer 1 expert 1 (hash 000000000000004d) than a (hash 0000000000000001) \
             that this router has used"
        );
        assert!(holders_of(&members.join(holder("c", &[1])).unwrap(), 0).is_empty());
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
