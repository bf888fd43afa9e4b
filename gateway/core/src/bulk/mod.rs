//! Numbered, acknowledged, bounded chunk channels that outlive the connection carrying them.
//!
//! A channel carries chunks in order from a producer at one site to a consumer at the other. Chunks may
//! be lost, doubled and reordered on their way; connections may end at any moment. Every chunk reaches
//! the consumer exactly once and in order all the same.
//!
//! ```text
//!  producer -> SendWindow -> Sender ~~~ any order, any connection ~~~> Receiver -> consumer
//!                              ^                                          |
//!                              '---------- taken (cumulative) ------------'
//! ```
//!
//! State only: what carries a chunk, when a link is up and what waits for what is the gateway's.

mod receiver;
mod sender;
mod throttle;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::MigrationId;

pub use receiver::{Admission, Delivery, ReceiveError, Receiver};
pub use sender::{Acknowledged, Outgoing, SendError, SendWindow, Sender};
pub use throttle::Throttle;

/// The largest chunk in bytes. With its header it stays below 1 MiB, so that it fits one short QUIC
/// stream that cannot hold the 1024 gaps at which quinn-proto gives a connection up
/// (`assembler.rs`, `MAX_CHUNKS`).
pub const MAX_CHUNK_BYTES: u32 = (1 << 20) - 1024;

/// What one chunk counts against a window beside its bytes, so that empty chunks are bounded too.
pub const CHUNK_OVERHEAD_BYTES: u64 = 256;

/// What a chunk of `length_bytes` counts against a window, in bytes.
pub fn cost(length_bytes: u64) -> u64 {
    length_bytes.saturating_add(CHUNK_OVERHEAD_BYTES)
}

/// What a bulk channel carries. The order is the order of urgency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// The machine's memory and device state.
    Memory,
    /// The disk with this index in the machine's definition.
    Disk(u8),
    /// What the destination has of that disk already, on the way to the source.
    Map(u8),
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Disk(index) => write!(f, "disk{index}"),
            Self::Map(index) => write!(f, "map{index}"),
        }
    }
}

/// One bulk channel of one migration. Each id is used once, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BulkId {
    /// The attempt it belongs to.
    pub migration: MigrationId,
    /// What it carries.
    pub channel: Channel,
}

impl fmt::Display for BulkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.migration, self.channel)
    }
}

/// What precedes a chunk's bytes on its stream.
///
/// ```text
///  0          16      17      18      19       27       31
///  | migration | kind  | disk  | flags | number | length |     integers big-endian
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The channel.
    pub id: BulkId,
    /// The chunk's number; the first is 0.
    pub number: u64,
    /// How many bytes follow; at most [`MAX_CHUNK_BYTES`].
    pub length_bytes: u32,
    /// Nothing comes after this chunk; it carries no bytes itself.
    pub end: bool,
}

/// A chunk header that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// A kind of channel or flag that this version does not know, or an ending chunk with bytes.
    #[error("A bulk stream begins with a header that this version does not know")]
    Unknown,
    /// Longer than [`MAX_CHUNK_BYTES`].
    #[error("A chunk of {length_bytes} bytes is longer than the allowed {MAX_CHUNK_BYTES}")]
    TooLong {
        /// The length it claims.
        length_bytes: u32,
    },
}

impl ChunkHeader {
    /// The header's length in bytes.
    pub const LEN: usize = 31;

    /// The header's bytes.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let (kind, disk) = match self.id.channel {
            Channel::Memory => (0, 0),
            Channel::Disk(index) => (1, index),
            Channel::Map(index) => (2, index),
        };
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.id.migration.0.to_be_bytes());
        bytes[16..19].copy_from_slice(&[kind, disk, u8::from(self.end)]);
        bytes[19..27].copy_from_slice(&self.number.to_be_bytes());
        bytes[27..].copy_from_slice(&self.length_bytes.to_be_bytes());
        bytes
    }

    /// A header from its bytes.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, HeaderError> {
        let channel = match (bytes[16], bytes[17]) {
            (0, 0) => Channel::Memory,
            (1, index) => Channel::Disk(index),
            (2, index) => Channel::Map(index),
            _ => return Err(HeaderError::Unknown),
        };
        let length_bytes = u32::from_be_bytes(array(&bytes[27..]));
        let end = match (bytes[18], length_bytes) {
            (0, _) => false,
            (1, 0) => true,
            _ => return Err(HeaderError::Unknown),
        };
        if length_bytes > MAX_CHUNK_BYTES {
            return Err(HeaderError::TooLong { length_bytes });
        }
        let migration = MigrationId(u128::from_be_bytes(array(&bytes[..16])));
        let number = u64::from_be_bytes(array(&bytes[19..27]));
        Ok(Self { id: BulkId { migration, channel }, number, length_bytes, end })
    }
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the callers slice by constants of this length")
}

#[cfg(test)]
mod tests;
