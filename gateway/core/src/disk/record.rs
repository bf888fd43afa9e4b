//! The mirror's records on the wire: numbered, several to a chunk. How a chunk is packed is [`super::pack`]'s.
//!
//! ```text
//!  record = kind u8 | write: offset u64, length u32, payload
//!                   | zero: offset u64, length u64
//!                   | same: offset u64, length u32, hash [32]
//!                   | flush: nothing
//!                   | barrier: records u64, last number u64, digest [32]
//! ```
//!
//! Integers are little-endian. Offsets are not checked against a disk here: [`super::MirrorTarget`]
//! does that. The digest covers records, not chunks, so packing and compression do not change it; how it stands behind a
//! chunk's last record travels with the chunk.

use bytes::{Buf, Bytes};

use super::pack::VERSION;
use crate::proof::Proof;

pub(super) const WRITE_HEADER: usize = 13;

/// One change of the disk, or a mark in the sequence of changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// `data` at byte `offset`.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// `len` bytes of zero at byte `offset`.
    Zero {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// `len` bytes at byte `offset`, at most a block, are there already: the destination holds what has
    /// this BLAKE3 hash, in this place of its disk or of a copy that it keeps, and refuses the mirror if it
    /// does not.
    Same {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u32,
        /// Of the source's content.
        hash: [u8; 32],
    },
    /// The guest asked for its writes to be durable.
    Flush,
    /// All records before this one, so that the other end can prove that it has them.
    Barrier(Barrier),
}

/// What a destination must have applied and flushed to be equal to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Barrier {
    /// How many records come before the barrier, since the mirror began.
    pub records: u64,
    /// The number of the last of them; records are numbered from 1.
    pub last_number: u64,
    /// BLAKE3 over number, kind, offset, length and payload or hash of each of them, in order.
    pub digest: [u8; 32],
}

/// The digest of all records so far, computed alike at both ends.
#[derive(Debug, Clone, Default)]
pub struct RunningDigest {
    hasher: blake3::Hasher,
    records: u64,
}

/// A chunk taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The number of the first record; the others follow without gaps.
    pub first_number: u64,
    /// The records in order.
    pub records: Vec<Record>,
    /// What the digest of all records is behind the last of them, if they are what was sent.
    pub proof: Proof,
}

/// Why bytes are not a chunk of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Bytes are missing.
    #[error("The disk chunk ends too early")]
    Short,
    /// Another version of the format.
    #[error("The disk chunk has format {0}, expected {VERSION}: run the same release at both sites")]
    Version(u8),
    /// Flags this version does not define.
    #[error("The disk chunk has unknown flags {0:#x}: run the same release at both sites")]
    Flags(u8),
    /// The header announces more than a chunk may hold.
    #[error("The disk chunk announces {records} records in {body} bytes, more than a chunk may hold")]
    TooLarge {
        /// Announced records.
        records: u32,
        /// Announced body length in bytes.
        body: u32,
    },
    /// The compressed body does not decompress to the announced length.
    #[error("The disk chunk does not decompress")]
    Zstd,
    /// A record of unknown kind.
    #[error("The disk chunk holds a record of unknown kind {0}")]
    Kind(u8),
    /// Bytes follow the last record.
    #[error("The disk chunk has {0} bytes too many")]
    Trailing(usize),
}

impl Record {
    /// How many bytes the record takes in a body.
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Write { data, .. } => WRITE_HEADER + data.len(),
            Self::Zero { .. } => 17,
            Self::Same { .. } => 45,
            Self::Flush => 1,
            Self::Barrier(_) => 49,
        }
    }

    /// First byte and end of what the record changes on the disk, or says of it. One that was damaged may say anything.
    pub(super) fn range(&self) -> Option<(u64, u64)> {
        let (offset, len) = match self {
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::Zero { offset, len } => (*offset, *len),
            Self::Same { offset, len, .. } => (*offset, u64::from(*len)),
            Self::Flush | Self::Barrier(_) => return None,
        };
        Some((offset, offset.saturating_add(len)))
    }

    /// Bytes of content that the record carries.
    pub(super) fn payload_len(&self) -> u64 {
        match self {
            Self::Write { data, .. } => data.len() as u64,
            Self::Zero { .. } | Self::Same { .. } | Self::Flush | Self::Barrier(_) => 0,
        }
    }

    /// Kind, offset and length in bytes.
    fn header(&self) -> (u8, u64, u64) {
        match self {
            Self::Write { offset, data } => (1, *offset, data.len() as u64),
            Self::Zero { offset, len } => (2, *offset, *len),
            Self::Flush => (3, 0, 0),
            Self::Barrier(_) => (4, 0, 0),
            Self::Same { offset, len, .. } => (5, *offset, u64::from(*len)),
        }
    }

    pub(super) fn encode(&self, body: &mut Vec<u8>) {
        let (kind, offset, len) = self.header();
        body.push(kind);
        match self {
            Self::Write { data, .. } => {
                body.extend(offset.to_le_bytes());
                body.extend((len as u32).to_le_bytes());
                body.extend_from_slice(data);
            }
            Self::Zero { .. } => {
                body.extend(offset.to_le_bytes());
                body.extend(len.to_le_bytes());
            }
            Self::Same { offset, len, hash } => {
                body.extend(offset.to_le_bytes());
                body.extend(len.to_le_bytes());
                body.extend(hash);
            }
            Self::Flush => {}
            Self::Barrier(barrier) => body.extend(barrier.to_bytes()),
        }
    }

    pub(super) fn decode(body: &mut Bytes) -> Result<Self, ChunkError> {
        match body.try_get_u8().map_err(|_| ChunkError::Short)? {
            1 => {
                let offset = u64_from(body)?;
                let len = body.try_get_u32_le().map_err(|_| ChunkError::Short)? as usize;
                if len > body.len() {
                    return Err(ChunkError::Short);
                }
                Ok(Self::Write { offset, data: body.split_to(len) })
            }
            2 => Ok(Self::Zero { offset: u64_from(body)?, len: u64_from(body)? }),
            3 => Ok(Self::Flush),
            4 => {
                let (records, last_number) = (u64_from(body)?, u64_from(body)?);
                Ok(Self::Barrier(Barrier { records, last_number, digest: hash_from(body)? }))
            }
            5 => {
                let offset = u64_from(body)?;
                let len = body.try_get_u32_le().map_err(|_| ChunkError::Short)?;
                Ok(Self::Same { offset, len, hash: hash_from(body)? })
            }
            kind => Err(ChunkError::Kind(kind)),
        }
    }
}

impl Barrier {
    fn to_bytes(self) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[..8].copy_from_slice(&self.records.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.last_number.to_le_bytes());
        bytes[16..].copy_from_slice(&self.digest);
        bytes
    }
}

impl RunningDigest {
    /// Takes in the next record.
    pub fn add(&mut self, record: &Record) {
        self.records += 1;
        let (kind, offset, len) = record.header();
        let mut header = [0; 25];
        header[..8].copy_from_slice(&self.records.to_le_bytes());
        header[8] = kind;
        header[9..17].copy_from_slice(&offset.to_le_bytes());
        header[17..].copy_from_slice(&len.to_le_bytes());
        self.hasher.update(&header);
        match record {
            Record::Write { data, .. } => self.hasher.update(data),
            Record::Barrier(barrier) => self.hasher.update(&barrier.to_bytes()),
            Record::Same { hash, .. } => self.hasher.update(hash),
            Record::Zero { .. } | Record::Flush => &mut self.hasher,
        };
    }

    /// How many records were taken in, which is also the number of the last.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// The proof of the records taken in so far.
    pub fn proof(&self) -> Proof {
        Proof::of(&self.hasher)
    }

    /// The barrier behind the records taken in so far.
    pub fn barrier(&self) -> Barrier {
        let digest = *self.hasher.finalize().as_bytes();
        Barrier { records: self.records, last_number: self.records, digest }
    }
}

fn u64_from(body: &mut Bytes) -> Result<u64, ChunkError> {
    body.try_get_u64_le().map_err(|_| ChunkError::Short)
}

fn hash_from(body: &mut Bytes) -> Result<[u8; 32], ChunkError> {
    let mut hash = [0; 32];
    body.try_copy_to_slice(&mut hash).map_err(|_| ChunkError::Short)?;
    Ok(hash)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(in crate::disk) fn any_record() -> impl Strategy<Value = Record> {
        let noise = prop::collection::vec(any::<u8>(), 0..3000);
        let same = (any::<u8>(), 0..70_000usize).prop_map(|(byte, len)| vec![byte; len]);
        let barrier = (any::<u64>(), any::<u64>(), any::<[u8; 32]>());
        prop_oneof![
            4 => (any::<u64>(), prop_oneof![noise, same])
                .prop_map(|(offset, data)| Record::Write { offset, data: data.into() }),
            2 => (any::<u64>(), any::<u64>()).prop_map(|(offset, len)| Record::Zero { offset, len }),
            2 => (any::<u64>(), any::<u32>(), any::<[u8; 32]>())
                .prop_map(|(offset, len, hash)| Record::Same { offset, len, hash }),
            1 => Just(Record::Flush),
            1 => barrier.prop_map(|(records, last_number, digest)| {
                Record::Barrier(Barrier { records, last_number, digest })
            }),
        ]
    }

    #[test]
    fn the_encoding_is_pinned() {
        let mut body = Vec::new();
        let records = [
            Record::Write { offset: 1, data: Bytes::from_static(b"ab") },
            Record::Zero { offset: 2, len: 3 },
            Record::Flush,
            Record::Same { offset: 4, len: 5, hash: [6; 32] },
        ];
        records.iter().for_each(|record| record.encode(&mut body));
        let mut expected = vec![1, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, b'a', b'b'];
        expected.extend([2, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 3]);
        expected.extend([5, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
        expected.extend([6; 32]);
        assert_eq!(body, expected);
    }

    #[test]
    fn the_digest_tells_order_kind_and_place() {
        let write = |offset, byte| Record::Write { offset, data: vec![byte; 8].into() };
        let digest_of = |records: &[Record]| {
            let mut digest = RunningDigest::default();
            records.iter().for_each(|record| digest.add(record));
            digest.barrier().digest
        };
        let reference = digest_of(&[write(0, 1), write(8, 2)]);
        for other in [
            vec![write(8, 2), write(0, 1)],
            vec![write(0, 1)],
            vec![write(0, 1), write(16, 2)],
            vec![write(0, 1), Record::Zero { offset: 8, len: 8 }],
            vec![write(0, 1), write(8, 2), Record::Flush],
            vec![write(0, 1), Record::Same { offset: 8, len: 8, hash: [2; 32] }],
        ] {
            assert_ne!(digest_of(&other), reference);
        }
    }
}
