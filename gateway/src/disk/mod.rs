//! The disk's way between sites: NBD towards QEMU, numbered records towards the peer.
//!
//! ```text
//!  source host                                            destination host
//!  QEMU ─mirror writes─▶ NbdServer ─▶ DiskSource ═chunks═▶ DiskTarget ─▶ NbdClient ─▶ QEMU
//!  QEMU ◀──re-reads───── NbdClient ◀──┘ ◀══map chunks══ DiskMap ◀──reads── NbdClient, Base
//! ```
//!
//! What is sent, in which order, and when the destination is believed is decided in
//! [`longhaul_core::disk`]; how chunks travel is the business of [`crate::chunk`]'s implementors.
//! Starting mirror jobs and exports is the hypervisor's.

pub mod nbd;

mod base;
mod hash;
mod map;
mod source;
mod target;

pub(crate) use base::only_ours;
pub use base::{Base, BaseError};
pub use hash::block_hashes;
pub use map::DiskMap;
pub use source::{DiskSource, DiskSourceConfig, DiskSourceError, SourceProgress};
pub use target::{DiskTarget, DiskTargetError, TargetProgress, WrittenDisk};
