//! The contract: what gateway, router and expert servers say to each other.
//!
//! Generated types stay on the wire side of [`frame`] and [`rows`]: everything behind them works on values whose
//! lengths agree. This crate knows no tensors, no sockets and no files.

pub mod checksum;
pub mod error;
pub mod frame;
pub mod rows;

pub use error::{Code, Error};
pub use frame::{Frame, Reply};

/// Version of the frames on a dispatch stream. Ends that differ refuse each other.
pub const WIRE_VERSION: u32 = 4;

/// Largest message either end of a dispatch stream accepts. A router cuts batches well below it
/// ([`frame::FRAME_BYTES_MAX`]); gRPC's default of 4 MiB is 292 rows of DeepSeek-V3.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// HTTP/2 windows on every connection of ours: below 8 MiB a layer's activations wait for window updates.
pub const HTTP2_WINDOW_BYTES: u32 = 8 << 20;

/// Largest HTTP/2 frame either end of a dispatch stream takes. With the protocol's 16 KiB, the rows of two sequences would be
/// cut, and each piece would wake its reader. A ping waits for the one that is being written.
pub const HTTP2_FRAME_BYTES: u32 = 1 << 20;

/// The generated messages, clients and servers of `shoal.v1`.
pub mod v1 {
    #![expect(
        clippy::all,
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        reason = "generated code"
    )]
    include!(concat!(env!("OUT_DIR"), "/shoal.v1.rs"));

    /// The compiled `.proto` files, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shoal.v1.bin"));
}
