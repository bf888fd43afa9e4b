//! A machine's memory on its way between QEMU and the bulk channel.
//!
//! [`MemorySource`] reads what the source's QEMU writes, packs it and sends chunks; [`MemoryTarget`]
//! makes the stream again and writes it to the destination's QEMU. Both keep QEMU's socket open
//! whatever the link does: a cut is the channel's business, and only the owner of a handle decides
//! that QEMU may see the end. Deliberately not here: QMP, and when to stop the guest.
//!
//! ```text
//! QEMU -> UNIX socket -> MemorySource -> ChunkSend ~ WAN ~ ChunkRecv -> MemoryTarget -> UNIX socket -> QEMU
//! ```

pub mod kept;
mod outlet;
mod progress;
mod pump;
mod source;
mod target;

pub use progress::{Round, SourceProgress};
pub use source::{MemorySource, SourceConfig, SourceError, SourceHandle, SourceMode};
pub use target::{MemoryEnd, MemoryTarget, TargetConfig, TargetHandle, TargetProgress};
