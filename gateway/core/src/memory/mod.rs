//! QEMU's migration stream, read page by page without changing a byte of it.
//!
//! The source's gateway parses what QEMU writes so that pages can be batched, compressed and, one
//! day, left out when the other side has them. Every [`Item`] carries the bytes it was read from:
//! joining them gives the stream again, so re-emitting is exact by construction.
//!
//! Understood: the single unidirectional stream of QEMU 7.2 to 11 with neither return path, multifd,
//! XBZRLE nor post-copy, 4 KiB target pages (`migration/savevm.c`, `migration/ram.c`). Anything else
//! is passed through as [`Item::Opaque`] from the first byte that was not understood. Deliberately not
//! done here: compression and framing (see [`crate::wan`]), and interpreting device state.
//!
//! ```text
//! stream  = header [configuration] { command } ram-start { command | ram-part } ram-end device-state
//! ram-*   = section-head { sizes | page | zero-page } eos [footer]
//! ```

mod parser;
mod records;
#[cfg(test)]
pub(crate) mod sample;

pub use parser::StreamParser;
pub use records::PAGE_BYTES;

use bytes::Bytes;

/// A RAM block of the machine, by its place in the stream's list of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u16);

/// Where one page of the machine's memory lies, and how the record names its block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageHead {
    /// The block the page belongs to.
    pub block: BlockIndex,
    /// The page's first byte in its block; a multiple of [`PAGE_BYTES`].
    pub offset_bytes: u64,
    /// The block's name where the record spells it out; `None` where it says "same block as before".
    pub name: Option<Bytes>,
}

/// One piece of the stream, in the order of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Framing that was understood: headers, commands, the list of blocks, ends of sections.
    Framing(Bytes),
    /// A page with its contents.
    Page {
        /// Which page.
        head: PageHead,
        /// The whole record; its last [`PAGE_BYTES`] bytes are the contents.
        record: Bytes,
    },
    /// A page that holds only zeros.
    ZeroPage {
        /// Which page.
        head: PageHead,
        /// The whole record.
        record: Bytes,
    },
    /// What follows the memory: device state, the end mark and the description of it.
    DeviceState(Bytes),
    /// Something that was not understood, and everything after it.
    Opaque(Bytes),
}

impl Item {
    /// The bytes of the stream that this item is.
    pub fn bytes(&self) -> &Bytes {
        match self {
            Self::Framing(bytes) | Self::DeviceState(bytes) | Self::Opaque(bytes) => bytes,
            Self::Page { record, .. } | Self::ZeroPage { record, .. } => record,
        }
    }
}

/// What has been seen of a stream so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamCounters {
    /// Bytes of the items handed out.
    pub bytes: u64,
    /// Pages with contents.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Sections of memory that ended (QEMU ends one about every 50 ms).
    pub sections: u64,
    /// Rounds over the machine's memory that were begun. QEMU does not mark them in the stream: one
    /// begins where its scan, which only goes forward, starts over. It can differ by one or two from
    /// `dirty-sync-count` of `query-migrate`, which also counts looks that found nothing to send.
    pub rounds: u64,
    /// Bytes after the memory.
    pub device_state_bytes: u64,
}

/// How far into the stream the parser is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamPhase {
    /// Before or inside the machine's memory.
    Memory,
    /// The memory is complete: the guest is stopped and device state follows.
    DeviceState,
    /// Passing through what is not understood.
    Opaque(OpaqueReason),
}

/// Why a stream is passed through without being understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpaqueReason {
    /// Not the magic number and version 3 of a QEMU migration stream.
    #[error("The stream does not begin as QEMU's version 3")]
    Header,
    /// The configuration section holds something unknown, or a page size other than 4 KiB.
    #[error("The stream's configuration section is of an unknown kind")]
    Configuration,
    /// A command that changes how the rest must be read, or an unknown one.
    #[error("The stream contains command {0}, which is not understood")]
    Command(u16),
    /// A section type that is not expected before the end of the memory.
    #[error("The stream contains a section of type {0:#04x} before the memory is complete")]
    Section(u8),
    /// A section that is not the memory's.
    #[error("The stream contains a live section other than memory version 4")]
    ForeignSection,
    /// The end mark of a section does not carry the section's number.
    #[error("A section of the stream ends with another section's number")]
    Footer,
    /// The list of memory blocks is not as expected.
    #[error("The stream's list of memory blocks is not understood")]
    Blocks,
    /// A memory record of an unknown kind, or one that points outside its block.
    #[error("The stream contains a memory record that is not understood (flags {flags:#05x})")]
    Record {
        /// The record's flags.
        flags: u16,
    },
}
