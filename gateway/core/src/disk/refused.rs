//! Why a disk's mirror is refused at the destination, in words for the operator. What is refused is the target's to decide.

use super::record::{Chunk, ChunkError, Record};

/// Why what arrived is refused. The destination's disk must not be used after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The bytes are not a chunk.
    #[error("Refusing a damaged disk chunk")]
    Chunk(#[from] ChunkError),
    /// Records are missing or repeated.
    #[error("Disk record {found} arrived, expected {expected}")]
    Number {
        /// The next number.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The records of a chunk are not those that the source sent.
    #[error(
        "Disk records {first} to {last}{} are not what the source sent: move the machine again, and test the memory of both \
         hosts if that fails too",
        place(.range)
    )]
    Damaged {
        /// The chunk's first record.
        first: u64,
        /// Its last one.
        last: u64,
        /// The lowest byte that they change on the disk or say something of, and the end of the highest; none if they are
        /// about no content.
        range: Option<(u64, u64)>,
    },
    /// A record reaches beyond the disk.
    #[error("Disk record {number} writes {len} bytes at {offset}, beyond the disk's {size} bytes")]
    Bounds {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// A record tells of more than a block.
    #[error("Disk record {number} tells of {len} bytes, more than a block")]
    Block {
        /// The record's number.
        number: u64,
        /// How much, in bytes.
        len: u32,
    },
    /// A record tells of other than whole parts: what is asked about is looked for, and must not be guessed byte by byte.
    #[error("Disk record {number} tells of {len} bytes at {offset}, not of whole parts: the peer misbehaves")]
    Part {
        /// The record's number.
        number: u64,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u32,
    },
    /// The source was told of content that is not here (any more).
    #[error("The {len} bytes at {offset} are not what the source has: the disk changed, copy it again")]
    Differs {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// The barrier counts other records than arrived.
    #[error("The barrier stands behind {barrier} disk records, {received} have arrived")]
    Count {
        /// What the source counted.
        barrier: u64,
        /// What arrived.
        received: u64,
    },
    /// Same number of records, other content.
    #[error("The digest of {records} disk records differs from the source's")]
    Digest {
        /// How many records were digested.
        records: u64,
    },
}

impl TargetError {
    /// Of a chunk that does not fit its proof.
    pub(super) fn damaged(chunk: &Chunk) -> Self {
        let (first, count) = (chunk.first_number, chunk.records.len() as u64);
        let ranges = chunk.records.iter().filter_map(Record::range);
        let range = ranges.reduce(|(start, end), other| (start.min(other.0), end.max(other.1)));
        Self::Damaged { first, last: first.saturating_add(count).saturating_sub(1), range }
    }
}

fn place(range: &Option<(u64, u64)>) -> String {
    range.map_or_else(String::new, |(start, end)| format!(", of the disk's bytes {start} to {end},"))
}
