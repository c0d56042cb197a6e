//! One expert FFN over a group of rows, and the set of experts a process holds.
use ids::{ExpertId, LayerId};
use crate::{Checkpoint, Error};

/// The routed experts that one process holds; maps only their bytes.
pub struct Experts {}
pub struct Expert {}

impl Experts {
    pub fn load(_checkpoint: &Checkpoint, _held: &[(LayerId, ExpertId)]) -> Result<Self, Error> {
        unimplemented!()
    }
    pub fn get(&self, _layer: LayerId, _expert: ExpertId) -> Option<&Expert> {
        unimplemented!()
    }
    /// Bytes of the tensors held.
    pub fn shard_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Bytes mapped for them (whole pages).
    pub fn mapped_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Of the mapped bytes, those in this process's resident set now; None where the system does not tell.
    pub fn resident_bytes(&self) -> Option<u64> {
        unimplemented!()
    }
}

impl Expert {
    /// A group of rows `[rows, hidden]` → `[rows, hidden]`: down(act(gate x) * up x), unweighted.
    pub fn forward(&self, _rows: &[f32]) -> Vec<f32> {
        unimplemented!()
    }
}
