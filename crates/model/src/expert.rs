//! One expert FFN over a group of rows, and the set of experts a process holds.

use std::{collections::HashMap, fs, ops::Range, sync::Arc};

use ids::{ExpertId, LayerId, WeightsHash};
use rayon::prelude::*;

use crate::{Bits, Checkpoint, Error, Mlp, ModelConfig, checkpoint::Mapped, storage::Input};

/// The routed experts that one process holds; maps only their bytes.
#[derive(Default)]
pub struct Experts {
    experts: HashMap<(LayerId, ExpertId), Arc<Expert>>,
    bytes: u64,
    mapped: Mapped,
}

/// A routed expert.
pub struct Expert {
    mlp: Mlp,
    weights: WeightsHash,
}

fn prefix(layer: LayerId, expert: ExpertId) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}")
}

/// In the order in which they are hashed: gate_proj, up_proj, down_proj.
fn tensors(config: &ModelConfig, (layer, expert): (LayerId, ExpertId)) -> [(String, Vec<usize>); 3] {
    Mlp::tensors(&prefix(layer, expert), config.hidden_size, config.moe_intermediate_size)
}

impl Experts {
    /// Maps the experts and hashes their tensors, which reads every byte of them once: they are in the page cache
    /// afterwards, as far as it reaches.
    pub fn load(checkpoint: &Checkpoint, held: &[(LayerId, ExpertId)]) -> Result<Self, Error> {
        Self::load_after(&Self::default(), checkpoint, held, &|| true)
    }

    /// The same where `before` were held so far: what is in both is not read again. Gives up when `go_on` is false; it
    /// is asked before each expert is read.
    pub fn load_after(
        before: &Self,
        checkpoint: &Checkpoint,
        held: &[(LayerId, ExpertId)],
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, Error> {
        let config = checkpoint.config();
        let (hidden_size, width) = (config.hidden_size, config.moe_intermediate_size);
        if let Some(bits) = checkpoint.weights().of_experts() {
            return Self::quantize_after(before, checkpoint, held, bits, go_on);
        }
        let names: Vec<_> = held.iter().flat_map(|&pair| tensors(config, pair)).collect();
        let mapped = checkpoint.map(&names)?;
        let experts = held
            .par_iter()
            .map(|&(layer, expert)| {
                let weights = match before.weights(layer, expert) {
                    Some(weights) => weights,
                    None if go_on() => checkpoint.digest(&tensors(config, (layer, expert)))?,
                    None => return Err(Error::new("loading was stopped".to_owned())),
                };
                let mlp = Mlp::from_mapped(&mapped, &prefix(layer, expert), hidden_size, width)?;
                Ok(((layer, expert), Arc::new(Expert { mlp, weights })))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { experts, bytes: mapped.tensor_bytes(), mapped })
    }

    /// One expert after the other, each on all threads: no more of the checkpoint is in memory than one.
    fn quantize_after(
        before: &Self,
        checkpoint: &Checkpoint,
        held: &[(LayerId, ExpertId)],
        bits: Bits,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, Error> {
        let width = checkpoint.config().moe_intermediate_size;
        let mut loaded = Self::default();
        for &(layer, expert) in held {
            let kept = match before.experts.get(&(layer, expert)) {
                Some(kept) => Arc::clone(kept),
                None if go_on() => {
                    let (mlp, weights) = Mlp::quantized(checkpoint, &prefix(layer, expert), width, bits)?;
                    Arc::new(Expert { mlp, weights })
                }
                None => return Err(Error::new("loading was stopped".to_owned())),
            };
            loaded.experts.insert((layer, expert), kept);
        }
        loaded.bytes = Self::bytes_of(checkpoint, held.iter().copied())?;
        Ok(loaded)
    }

    /// [`Experts::shard_bytes`] of experts that are not loaded.
    pub fn bytes_of(
        checkpoint: &Checkpoint,
        experts: impl IntoIterator<Item = (LayerId, ExpertId)>,
    ) -> Result<u64, Error> {
        let config = checkpoint.config();
        let bytes = |pair| {
            let tensors = tensors(config, pair);
            match checkpoint.weights().of_experts() {
                None => checkpoint.bytes_of(&tensors),
                Some(bits) => {
                    checkpoint.bytes_of(&tensors)?;
                    Ok(checkpoint.packed_bytes(bits, &Mlp::shapes(&tensors)))
                }
            }
        };
        experts.into_iter().map(bytes).sum()
    }

    /// XXH3-64 over an expert's tensors as they are stored: gate_proj, up_proj, down_proj, each with whatever scales it
    /// has. Holders of the same weights agree on it.
    #[must_use]
    pub fn weights(&self, layer: LayerId, expert: ExpertId) -> Option<WeightsHash> {
        self.get(layer, expert).map(|expert| expert.weights)
    }

    #[must_use]
    pub fn get(&self, layer: LayerId, expert: ExpertId) -> Option<&Expert> {
        self.experts.get(&(layer, expert)).map(Arc::as_ref)
    }

    /// Bytes of the tensors held.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes mapped for them: the tensors and the gaps of less than a page between them, or what they were packed to.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.addresses().map(|range| range.len() as u64).sum()
    }

    /// Where in memory they are.
    fn addresses(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let packed = self.experts.values().filter_map(|expert| expert.mlp.packed_addresses());
        self.mapped.addresses().chain(packed)
    }

    /// Of the mapped bytes, those in this process's resident set now; None where the system does not tell.
    #[must_use]
    pub fn resident_bytes(&self) -> Option<u64> {
        let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
        let maps: Vec<_> = self.addresses().collect();
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
    #[must_use]
    pub const fn weights(&self) -> WeightsHash {
        self.weights
    }

    /// Experts, each with some of the `rows` `[rows, hidden]`: down(silu(gate x) · up x) of those, `[some, hidden]` each,
    /// unweighted.
    ///
    /// # Panics
    /// If one of them is none of the rows.
    #[must_use]
    pub fn forward(rows: &Input<'_>, groups: &[(&Self, &[usize])]) -> Vec<Vec<f32>> {
        let mlps = groups.iter().map(|(expert, _)| &expert.mlp);
        let firsts = mlps.clone().zip(groups).map(|(mlp, (_, rows))| (mlp.first(), *rows));
        let inputs = rows.select(&firsts.collect::<Vec<_>>());
        Mlp::apply_list(&mlps.zip(&inputs).collect::<Vec<_>>())
    }
}
