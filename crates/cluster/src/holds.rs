//! Which experts, by layer, and their text form: `1-3:0-15,20;4:7` are experts 0 to 15 and 20 of layers 1 to 3, and
//! expert 7 of layer 4.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
    str::FromStr,
};

use ids::{ExpertId, LayerId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A set of (layer, expert) pairs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holds(BTreeMap<LayerId, BTreeSet<ExpertId>>);

/// A text that is no set of experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is not LAYERS:EXPERTS, such as 1-3:0-15,20")]
pub struct BadHolds {
    part: String,
}

/// Layers and experts that a text may name: more are a mistake, and would only cost memory.
const ID_MAX: u32 = 1 << 16;

impl Holds {
    /// The same `experts` of every layer.
    #[must_use]
    pub fn of_layers(layers: impl IntoIterator<Item = LayerId>, experts: &[ExpertId]) -> Self {
        layers.into_iter().flat_map(|layer| experts.iter().map(move |&expert| (layer, expert))).collect()
    }

    pub fn insert(&mut self, layer: LayerId, expert: ExpertId) -> bool {
        self.0.entry(layer).or_default().insert(expert)
    }

    pub fn remove(&mut self, layer: LayerId, expert: ExpertId) -> bool {
        let Some(experts) = self.0.get_mut(&layer) else { return false };
        let removed = experts.remove(&expert);
        if experts.is_empty() {
            self.0.remove(&layer);
        }
        removed
    }

    #[must_use]
    pub fn contains(&self, layer: LayerId, expert: ExpertId) -> bool {
        self.0.get(&layer).is_some_and(|experts| experts.contains(&expert))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of pairs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.values().map(BTreeSet::len).sum()
    }

    /// Every pair, by layer and expert.
    pub fn iter(&self) -> impl Iterator<Item = (LayerId, ExpertId)> + '_ {
        self.0.iter().flat_map(|(&layer, experts)| experts.iter().map(move |&expert| (layer, expert)))
    }

    pub fn layers(&self) -> impl Iterator<Item = (LayerId, &BTreeSet<ExpertId>)> {
        self.0.iter().map(|(&layer, experts)| (layer, experts))
    }
}

impl FromIterator<(LayerId, ExpertId)> for Holds {
    fn from_iter<T: IntoIterator<Item = (LayerId, ExpertId)>>(pairs: T) -> Self {
        let mut holds = Self::default();
        for (layer, expert) in pairs {
            holds.insert(layer, expert);
        }
        holds
    }
}

impl fmt::Display for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers: Vec<(LayerId, &BTreeSet<ExpertId>)> = self.layers().collect();
        let same = layers.chunk_by(|a, b| a.0.0 + 1 == b.0.0 && a.1 == b.1);
        for (index, run) in same.enumerate() {
            let [(first, experts), ..] = run else { continue };
            let last = run.last().map_or(first, |(last, _)| last);
            let experts: Vec<u32> = experts.iter().map(|expert| expert.0).collect();
            let experts: Vec<String> = experts
                .chunk_by(|a, b| a + 1 == *b)
                .filter_map(|run| Some(range(*run.first()?, *run.last()?)))
                .collect();
            let separator = if index > 0 { ";" } else { "" };
            write!(f, "{separator}{}:{}", range(first.0, last.0), experts.join(","))?;
        }
        Ok(())
    }
}

fn range(first: u32, last: u32) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

impl FromStr for Holds {
    type Err = BadHolds;

    fn from_str(text: &str) -> Result<Self, BadHolds> {
        let mut holds = Self::default();
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let bad = || BadHolds { part: part.to_owned() };
            let (layers, experts) = part.split_once(':').ok_or_else(bad)?;
            for layer in parse_range(layers).ok_or_else(bad)? {
                for experts in experts.split(',') {
                    for expert in parse_range(experts).ok_or_else(bad)? {
                        holds.insert(LayerId(layer), ExpertId(expert));
                    }
                }
            }
        }
        Ok(holds)
    }
}

fn parse_range(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.trim().split_once('-').unwrap_or((text.trim(), text.trim()));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && last < ID_MAX).then_some(first..=last)
}

impl Serialize for Holds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Holds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, n: usize, written: &str) {
        let holds: Holds = text.parse().unwrap();
        assert_eq!((holds.len(), holds.to_string()), (n, written.to_owned()));
    }

    #[test]
    fn the_text_form_is_read_and_written() {
        check("", 0, "");
        check("1-3:0-15,20; 4:7", 52, "1-3:0-15,20;4:7");
        check("1:1;2:1,0;3:0,1", 5, "1:1;2-3:0-1");
        for bad in ["1", "1:", "1:2-1", "x:1", "1:99999999", "0-4294967295:1"] {
            assert!(bad.parse::<Holds>().is_err(), "{bad}");
        }
    }
}
