//! Who is where: how processes find each other and connect on one host, which of them holds which expert, and which should.
//! Knows no tensors.
//!
//! # Keys in etcd
//! Below the prefix of `--registry etcd://host:2379/PREFIX`, each value JSON ([`Record`], [`Placement`]):
//!
//! | key | value | lease |
//! | --- | --- | --- |
//! | `PREFIX/experts/INSTANCE` | [`Record`] with [`Holdings`] | the instance's |
//! | `PREFIX/routers/INSTANCE` | [`Record`] | the instance's |
//! | `PREFIX/leader` | the leading router's instance | the router's |
//! | `PREFIX/placement` | [`Placement`] | none |

pub mod health;
pub mod holds;
mod local;
pub mod placement;
mod port;
pub mod record;
pub mod registry;
pub mod session;
pub mod table;

pub use health::Health;
pub use holds::Holds;
pub use local::LocalStream;
pub use port::Port;
pub use record::{Holdings, Placement, Record, Role, State};
pub use registry::{Registry, advertised};
pub use session::{Announcement, Member, Membership, Refused, Session, Term};
pub use table::{Holder, Members, OtherWeights, RoutingTable};
