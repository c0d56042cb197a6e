//! Every identifier of the system, one newtype each, so that a layer can never be passed where an expert is
//! meant. This crate knows nothing else and depends on nothing but `std`.

use std::fmt;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number as a position in a slice.
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_id! {
    /// A decoder layer, counted from 0 as in the checkpoint's tensor names.
    LayerId(u32)
}
number_id! {
    /// A routed expert within one layer, counted from 0 as in the checkpoint's tensor names.
    ExpertId(u32)
}
number_id! {
    /// One row (one token's activation) within a frame or batch.
    RowIndex(u32)
}
number_id! {
    /// One frame on one dispatch stream; unique per link for the life of the router.
    FrameId(u64)
}
number_id! {
    /// A page of the KV cache.
    PageIndex(u32)
}
number_id! {
    /// The version of a routing table: grows by one with every published change.
    Version(u64)
}

number_id! {
    /// What one instance holds, counted: grows with every change of it.
    Epoch(u64)
}

/// XXH3-64 over an expert's tensors as they are stored, or the sum (mod 2^64) of several experts' hashes: holders of
/// the same weights agree on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct WeightsHash(pub u64);

impl WeightsHash {
    /// Of both together, in any order.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
}

impl fmt::Display for WeightsHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A running process: unique for every start of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub std::sync::Arc<str>);

impl InstanceId {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for InstanceId {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
