//! What crosses the WAN in place of a migration stream, and how the stream is made of it again.
//!
//! The source turns [`Item`](crate::memory::Item)s into batches: a short program of operations (runs
//! of pages, runs of zero pages, verbatim bytes) and the contents it refers to, compressed together
//! with zstd where that shrinks them. Batches are packed into chunks no longer than what the bulk
//! channel carries. The last frame proves the stream: its length and its BLAKE3 digest, which the
//! source takes from what QEMU wrote and the destination from what it made. Each batch carries half of the running digest
//! behind it ([`crate::proof`]), so that what is not what was sent is known before a byte of the batch is handed out, and is
//! named: damage that came in between, and no other.
//!
//! Both ends remember the newest version of each page, as many as both allow (`shadow.rs`). A page that is sent again
//! travels as what changed of it, one that another page equals as that page's place. This rests on the bulk channel: each chunk
//! arrives once and in order, over any number of connections, so that what both remember cannot go out of step; that it did
//! not is part of what the digest proves.
//!
//! What stands on the machine's disks already is named by its place there (`places.rs`).
//!
//! Deliberately not here: reading disks, and carrying the chunks.
//!
//! ```text
//! chunk = { frame }
//! frame = 0x03 pages:be32 based:u8 digest[32]     how many pages are remembered, and (1) from where on; the first, if there
//!       | 0x01 encoding:u8 data_len:be32 contents_len:be32 ops_len:be32 proof[16] data[data_len]      a batch
//!       | 0x02 stream_len:be64 digest[32]                                                   the end
//!       | 0x04 disks:u8 { records:be64 }       pages may be named by these disks, after so many of their records
//! data  = contents[contents_len] ops[ops_len], stored (encoding 0) or a zstd frame (encoding 1)
//! ops   = { tag:u8 [name_len:u8 name] count:varint | tag:u8 [..] page_delta:svarint count:varint }
//! tag   = 0 verbatim | 1 pages | 2 zeros | 3 as they were | 4 XOR what they were | 5 copies (place:be32)
//!       | 6 on a disk (disk:u8 part:be32), + 0x80 with the block's name
//! ```

mod decode;
mod effort;
mod encode;
mod ops;
mod pages;
mod places;
mod proving;
mod shadow;

pub use decode::{DecodeError, Decoded, StreamDecoder};
pub use effort::{Effort, Level, Seen};
pub use encode::{EncoderConfig, EncoderCounters, StreamEncoder};
pub use pages::ToldPages;
pub use places::{DiskPlaces, GivenPlaces, Place};
pub use shadow::Remembered;

use std::fmt;

use crate::proof::Proof;

/// The longest contents of one batch, in bytes: what a decoder is ready to unpack.
pub const MAX_CONTENTS: usize = 1 << 20;
/// The longest program of one batch, in bytes.
pub const MAX_OPS: usize = 64 << 10;
/// The most memory records one batch may stand for. A batch becomes at most its contents, its program
/// (where the names are), 9 bytes for each record and its known pages: 5.7 MiB.
pub const MAX_RECORDS: u64 = 1 << 16;

/// The most pages of one batch that stand for contents which are not in it. They become 4 MiB.
pub const MAX_KNOWN_PAGES: u64 = 1 << 10;
/// The most pages that two ends can agree to remember: 16 GiB.
pub const MAX_SHADOW_PAGES: u32 = 1 << 22;

const FRAME_BATCH: u8 = 0x01;
const FRAME_END: u8 = 0x02;
const FRAME_SHADOW: u8 = 0x03;
const FRAME_DISKS: u8 = 0x04;
const ENCODING_STORED: u8 = 0;
const ENCODING_ZSTD: u8 = 1;
const BATCH_HEADER_BYTES: usize = 14 + Proof::BYTES;
const END_FRAME_BYTES: usize = 41;
const SHADOW_FRAME_BYTES: usize = 38;

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
mod naming_tests;
#[cfg(test)]
mod proof_tests;
#[cfg(test)]
mod tests;
