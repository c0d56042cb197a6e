//! Who is where: how processes find each other, and which of them holds which expert. Knows no tensors and no
//! sockets.

pub mod registry;
pub mod table;

pub use registry::Registry;
pub use table::{Holder, Members, RoutingTable};
