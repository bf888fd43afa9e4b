//! The append-only log: numbered records, each on the disk before the next.
//!
//! ```text
//! record, 32 bytes, little endian:  magic u32 | boot u32 | number u64 | unix_ms u64 | zero u32 | crc32 u32
//! ```
//!
//! Numbers begin at 1 and have no gaps, across reboots too; `boot` counts openings. A record that a crash tore off
//! at the end is cut away at the next opening and counted; damage anywhere else stays and is reported. Does not
//! rotate: at ten records a second it grows 28 MB a day.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

use super::crc::crc32;

/// Size of one record.
pub const RECORD_BYTES: usize = 32;
const MAGIC: u32 = u32::from_le_bytes(*b"LHLG");

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Position in the log, from 1.
    pub number: u64,
    /// The guest's clock when it was written, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Which opening of the log wrote it, from 1.
    pub boot: u32,
}

/// What a log's content proves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogVerdict {
    /// Records with the right checksum.
    pub records: u64,
    /// Number of the last good record, 0 if there is none.
    pub last: u64,
    /// Numbers that should be there and are not.
    pub missing: u64,
    /// Records that came twice or out of order.
    pub doubled: u64,
    /// Whole records whose checksum is wrong.
    pub corrupt: u64,
    /// Bytes after the last whole record.
    pub torn_bytes: u64,
    /// Openings seen.
    pub boots: u32,
}

impl LogVerdict {
    /// Nothing missing, doubled or damaged. A torn end is allowed: that is what a crash leaves.
    #[must_use]
    pub fn sound(&self) -> bool {
        self.missing == 0 && self.doubled == 0 && self.corrupt == 0
    }
}

/// An open log.
#[derive(Debug)]
pub struct Log {
    file: File,
    last: u64,
    boot: u32,
    /// Bytes of a torn record that opening removed.
    pub cut_bytes: u64,
}

impl Log {
    /// Opens or creates the log, removes a torn end, and continues its numbers.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let good = bytes.chunks_exact(RECORD_BYTES).rposition(|record| decode(record).is_some());
        let kept = good.map_or(0, |index| (index + 1) * RECORD_BYTES);
        let last = good.and_then(|index| decode(&bytes[index * RECORD_BYTES..][..RECORD_BYTES]));
        file.set_len(kept as u64)?;
        file.seek(SeekFrom::End(0))?;
        file.sync_all()?;
        Ok(Self {
            file,
            last: last.map_or(0, |record| record.number),
            boot: last.map_or(0, |record| record.boot) + 1,
            cut_bytes: (bytes.len() - kept) as u64,
        })
    }

    /// Number of the last record on the disk.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Writes the next record and waits until it is on the disk.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn append(&mut self, unix_ms: u64) -> io::Result<u64> {
        let record = Record { number: self.last + 1, unix_ms, boot: self.boot };
        self.file.write_all(&encode(record))?;
        self.file.sync_data()?;
        self.last = record.number;
        Ok(self.last)
    }

    /// The newest `count` records, oldest first.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn tail(&mut self, count: usize) -> io::Result<Vec<Record>> {
        let bytes = self.read()?;
        let whole = bytes.len() / RECORD_BYTES;
        let first = whole.saturating_sub(count);
        Ok(bytes[first * RECORD_BYTES..].chunks_exact(RECORD_BYTES).filter_map(decode).collect())
    }

    /// Reads the whole log from the disk, past the page cache, and checks it.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn verify(&mut self) -> io::Result<LogVerdict> {
        forget_cached(&self.file)?;
        Ok(verify_bytes(&self.read()?))
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Checks a log's content; for the laboratory, which reads it off a stopped machine's disk.
#[must_use]
pub fn verify_bytes(bytes: &[u8]) -> LogVerdict {
    let mut verdict = LogVerdict { torn_bytes: (bytes.len() % RECORD_BYTES) as u64, ..LogVerdict::default() };
    for record in bytes.chunks_exact(RECORD_BYTES) {
        let Some(record) = decode(record) else {
            verdict.corrupt += 1;
            continue;
        };
        verdict.records += 1;
        verdict.boots = verdict.boots.max(record.boot);
        if record.number <= verdict.last {
            verdict.doubled += 1;
            continue;
        }
        verdict.missing += record.number - verdict.last - 1;
        verdict.last = record.number;
    }
    verdict
}

/// Writes a file back and drops it from the page cache, so that the next read comes from the disk.
///
/// # Errors
/// Writing back fails.
pub fn forget_cached(file: &File) -> io::Result<()> {
    file.sync_all()?;
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(io::Error::from)
}

fn encode(record: Record) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&record.boot.to_le_bytes());
    bytes[8..16].copy_from_slice(&record.number.to_le_bytes());
    bytes[16..24].copy_from_slice(&record.unix_ms.to_le_bytes());
    let crc = crc32(&bytes[..28]);
    bytes[28..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Record> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    if u32_at(0)? != MAGIC || u32_at(28)? != crc32(&bytes[..28]) {
        return None;
    }
    Some(Record { boot: u32_at(4)?, number: u64_at(8)?, unix_ms: u64_at(16)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(count: u64) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = Log::open(&path).unwrap();
        for at in 0..count {
            log.append(at).unwrap();
        }
        (folder, path)
    }

    #[test]
    fn numbers_continue_after_a_reopening_that_cuts_a_torn_record() {
        let (_folder, path) = log_of(3);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&[1; 20]).unwrap();
        let mut log = Log::open(&path).unwrap();
        assert_eq!((log.last(), log.cut_bytes), (3, 20));
        assert_eq!(log.append(9).unwrap(), 4);
        let verdict = log.verify().unwrap();
        assert!(verdict.sound());
        assert_eq!((verdict.records, verdict.last, verdict.boots), (4, 4, 2));
        assert_eq!(log.tail(2).unwrap()[1], Record { number: 4, unix_ms: 9, boot: 2 });
    }

    #[test]
    fn a_lost_a_doubled_and_a_damaged_record_are_each_noticed() {
        let (_folder, path) = log_of(5);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.drain(RECORD_BYTES..2 * RECORD_BYTES);
        assert_eq!(verify_bytes(&bytes).missing, 1);
        let again = bytes[..RECORD_BYTES].to_vec();
        bytes.extend_from_slice(&again);
        assert_eq!(verify_bytes(&bytes).doubled, 1);
        bytes[RECORD_BYTES + 9] ^= 1;
        assert_eq!(verify_bytes(&bytes).corrupt, 1);
    }
}
