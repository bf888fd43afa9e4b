//! The disk mirror: what the source sends, in which order, and when the destination may be believed.
//!
//! ```text
//!  guest writes ─▶ MirrorSource ─chunks of numbered records─▶ MirrorTarget ─steps─▶ destination disk
//!  re-reads ─────▶ (bitmap, queue)                           (order, digest, flush)
//!                        ◀──────────────map of blocks───────────── MapWriter
//! ```
//!
//! Every position is a byte offset on the disk, every decision is made in blocks of [`BLOCK`] bytes.
//! Nothing here talks NBD, reads an image or knows how chunks travel: `gateway::disk` does.

mod bitmap;
mod map;
#[cfg(test)]
mod model_tests;
mod naming;
mod pack;
#[cfg(test)]
mod proof_tests;
mod queue;
mod record;
mod refused;
mod source;
mod target;

pub use bitmap::Bitmap;
pub use map::{MapError, MapWriter};
pub use pack::{ChunkReader, DEFAULT_WINDOW_LOG, MAX_BODY, MAX_RECORDS};
pub use record::{Barrier, Chunk, ChunkError, Record, RunningDigest};
pub use refused::TargetError;
pub use source::{
    Content, Existing, MirrorSource, ReadRun, SourceConfig, SourceCounters, SourceError, TargetDisk,
};
pub use target::{MirrorTarget, Step, TargetConfig, TargetCounters};

/// The granularity of the mirror in bytes: 64 KiB, which is also QEMU's own mirror granularity, so
/// that a mirrored write covers whole blocks. One TiB of disk costs 2 MiB per bitmap.
pub const BLOCK: u64 = 64 << 10;

/// Splits `offset..offset + len` where blocks meet: `(block, offset, len)` for each part.
pub(crate) fn split_blocks(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let part = (at / BLOCK, at, (BLOCK - at % BLOCK).min(end - at));
        at += part.2;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_split_where_blocks_meet() {
        let parts: Vec<_> = split_blocks(BLOCK - 10, BLOCK + 30).collect();
        assert_eq!(parts, [(0, BLOCK - 10, 10), (1, BLOCK, BLOCK), (2, 2 * BLOCK, 20)]);
        assert_eq!(split_blocks(7, 0).count(), 0);
    }
}
