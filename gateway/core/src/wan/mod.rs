//! What crosses the WAN in place of a migration stream, and how the stream is made of it again.
//!
//! The source turns [`Item`](crate::memory::Item)s into batches: a short program of operations (runs
//! of pages, runs of zero pages, verbatim bytes) and the contents it refers to, compressed together
//! with zstd where that shrinks them. Batches are packed into chunks no longer than what the bulk
//! channel carries. The last frame proves the stream: its length and its BLAKE3 digest, which the
//! source takes from what QEMU wrote and the destination from what it made. Every chunk can be decoded
//! with nothing but itself, so that nothing is shared that could go out of step.
//!
//! Deliberately not here: a cache of contents, deltas against earlier pages, and carrying the chunks.
//!
//! ```text
//! chunk = { frame }
//! frame = 0x01 encoding:u8 data_len:be32 contents_len:be32 ops_len:be32 data[data_len]      a batch
//!       | 0x02 stream_len:be64 digest[32]                                                   the end
//! data  = contents[contents_len] ops[ops_len], stored (encoding 0) or a zstd frame (encoding 1)
//! ops   = { tag:u8 [name_len:u8 name] count:varint | tag:u8 [..] page_delta:svarint count:varint }
//! ```

mod decode;
mod encode;
mod ops;

pub use decode::{DecodeError, Decoded, StreamDecoder};
pub use encode::{EncoderConfig, EncoderCounters, StreamEncoder};

use std::fmt;

/// The longest contents of one batch, in bytes: what a decoder is ready to unpack.
pub const MAX_CONTENTS: usize = 1 << 20;
/// The longest program of one batch, in bytes.
pub const MAX_OPS: usize = 64 << 10;
/// The most memory records one batch may stand for. A batch becomes at most its contents, its program
/// (where the names are) and 9 bytes for each record: 1.7 MiB.
pub const MAX_RECORDS: u64 = 1 << 16;

const FRAME_BATCH: u8 = 0x01;
const FRAME_END: u8 = 0x02;
const ENCODING_STORED: u8 = 0;
const ENCODING_ZSTD: u8 = 1;
const BATCH_HEADER_BYTES: usize = 14;
const END_FRAME_BYTES: usize = 41;

/// A BLAKE3 digest of a whole migration stream.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StreamDigest(pub [u8; 32]);

impl fmt::Display for StreamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for StreamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a whole stream was: the memory's part of the barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamEnd {
    /// The stream's length.
    pub bytes: crate::units::Bytes,
    /// The digest of all of it.
    pub digest: StreamDigest,
}

#[cfg(test)]
mod tests;
