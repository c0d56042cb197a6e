//! One expert FFN over a group of rows, and the set of experts a process holds.

use std::{collections::HashMap, fs};

use ids::{ExpertId, LayerId};

use crate::{Checkpoint, Error, Mlp, checkpoint::Mapped};

/// The routed experts that one process holds; maps only their bytes.
pub struct Experts {
    experts: HashMap<(LayerId, ExpertId), Expert>,
    mapped: Mapped,
}

/// A routed expert.
pub struct Expert(Mlp);

fn prefix(layer: LayerId, expert: ExpertId) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}")
}

impl Experts {
    pub fn load(checkpoint: &Checkpoint, held: &[(LayerId, ExpertId)]) -> Result<Self, Error> {
        let config = checkpoint.config();
        let (hidden_size, width) = (config.hidden_size, config.moe_intermediate_size);
        let tensors: Vec<_> = held
            .iter()
            .flat_map(|&(layer, expert)| Mlp::tensors(&prefix(layer, expert), hidden_size, width))
            .collect();
        let mapped = checkpoint.map(&tensors)?;
        let experts = held
            .iter()
            .map(|&(layer, expert)| {
                let mlp = Mlp::from_mapped(&mapped, &prefix(layer, expert), hidden_size, width)?;
                Ok(((layer, expert), Expert(mlp)))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { experts, mapped })
    }

    #[must_use]
    pub fn get(&self, layer: LayerId, expert: ExpertId) -> Option<&Expert> {
        self.experts.get(&(layer, expert))
    }

    /// Bytes of the tensors held.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.mapped.tensor_bytes()
    }

    /// Bytes mapped for them: the tensors and the gaps of less than a page between them.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.mapped.addresses().map(|range| range.len() as u64).sum()
    }

    /// Of the mapped bytes, those in this process's resident set now; None where the system does not tell.
    #[must_use]
    pub fn resident_bytes(&self) -> Option<u64> {
        let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
        let maps: Vec<_> = self.mapped.addresses().collect();
        let mut resident_kib = 0;
        let mut ours = false;
        for line in smaps.lines() {
            if let Some(kib) = line.strip_prefix("Rss:") {
                if ours {
                    resident_kib += kib.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok())?;
                }
            } else if let Some((start, end)) =
                line.split_once(' ').and_then(|(range, _)| range.split_once('-'))
            {
                let parse = |address| usize::from_str_radix(address, 16);
                if let (Ok(start), Ok(end)) = (parse(start), parse(end)) {
                    ours = maps.iter().any(|map| map.start < end && start < map.end);
                }
            }
        }
        Some(resident_kib * 1024)
    }
}

impl Expert {
    /// A group of rows `[rows, hidden]` → `[rows, hidden]`: down(silu(gate x) · up x), unweighted.
    #[must_use]
    pub fn forward(&self, rows: &[f32]) -> Vec<f32> {
        self.0.apply(rows)
    }
}
