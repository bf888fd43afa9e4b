//! Rewrites random blocks of a file so that afterwards each block's right content is known.
//!
//! Two files: `dirt` holds the blocks (content from [`super::pattern::fill_block`]), `dirt.index` says which version
//! each must have. A batch writes the index first and waits for the disk, then the blocks:
//!
//! ```text
//! choose blocks ──▶ index: version + 1, batch number ──▶ fdatasync ──▶ blocks ──▶ fdatasync ──▶ next batch
//! ```
//!
//! So whatever moment a disk is cut or copied at, a block holds its index version, or, only if its entry carries the
//! last batch number, the version before. Opening finishes such a batch. Both files have their full size from the
//! start: no block of the file system moves while the guest runs.
//!
//! ```text
//! index: magic u32 | blocks u32 | zeros up to 4096 | per block: version u32 | batch u32       (little endian)
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::log::forget_cached;
use super::pattern::{BLOCK_BYTES, fill_block, mix};

/// Name of the file of blocks.
pub const DATA_FILE: &str = "dirt";
/// Name of the file of versions.
pub const INDEX_FILE: &str = "dirt.index";
const MAGIC: u32 = u32::from_le_bytes(*b"LHDX");
const HEADER_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 8;
const ENTRIES_PER_BLOCK: usize = BLOCK_BYTES / ENTRY_BYTES;

/// What the two files prove about each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtVerdict {
    /// Blocks in the file.
    pub blocks: u64,
    /// Blocks that have been rewritten at least once.
    pub rewritten: u64,
    /// Blocks of the last batch that still hold the version before.
    pub unfinished: u64,
    /// Blocks that hold anything else.
    pub mismatched: u64,
    /// Numbers of the first few of those.
    pub first_mismatched: Vec<u32>,
    /// Number of the last batch.
    pub last_batch: u32,
}

impl DirtVerdict {
    /// Every block holds what the index says.
    #[must_use]
    pub const fn sound(&self) -> bool {
        self.mismatched == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    version: u32,
    batch: u32,
}

/// The open pair of files.
#[derive(Debug)]
pub struct Dirt {
    data: File,
    index_file: File,
    entries: Vec<Entry>,
    batch: u32,
    /// Bytes written so far, index included.
    pub written_bytes: u64,
    draw: u64,
}

/// Writes both files with every block at version 0. Used when the guest's disk is made.
///
/// # Errors
/// The folder is full or `bytes` gives more blocks than fit in 32 bits.
pub fn create(folder: &Path, bytes: u64) -> io::Result<()> {
    let blocks = u32::try_from(bytes / BLOCK_BYTES as u64).map_err(io::Error::other)?;
    let mut data = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    let mut block = vec![0; BLOCK_BYTES];
    for number in 0..blocks {
        fill_block(&mut block, number, 0);
        data.extend_from_slice(&block);
    }
    fs::write(folder.join(DATA_FILE), data)?;
    // 0xFFFFFFFF as batch means never: a hole-free file, because mke2fs would leave zero blocks unallocated.
    let mut index = vec![0; index_bytes(blocks as usize)];
    index[..4].copy_from_slice(&MAGIC.to_le_bytes());
    index[4..8].copy_from_slice(&blocks.to_le_bytes());
    for entry in index[HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES) {
        entry[4..].copy_from_slice(&NEVER.to_le_bytes());
    }
    fs::write(folder.join(INDEX_FILE), index)
}

const NEVER: u32 = u32::MAX;
/// Runs in one batch: what a crash may leave half done.
const RUNS_AT_ONCE: usize = 100;

impl Dirt {
    /// Opens the pair and finishes a batch that a crash interrupted.
    ///
    /// # Errors
    /// The files are missing, damaged or unreadable.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let open = |name: &str| OpenOptions::new().read(true).write(true).open(folder.join(name));
        let (data, index_file) = (open(DATA_FILE)?, open(INDEX_FILE)?);
        let entries = parse_index(&read_all(&index_file)?)?;
        let batch = last_batch(&entries);
        let draw = mix(u64::from(batch), entries.len() as u64);
        let mut dirt = Self { data, index_file, entries, batch, written_bytes: 0, draw };
        let again: Vec<u32> = (0..dirt.blocks()).filter(|block| dirt.in_last_batch(*block)).collect();
        dirt.write_blocks(&again)?;
        Ok(dirt)
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.entries.len()).expect("the index holds at most 2^32 entries")
    }

    /// Rewrites random blocks until about `budget_bytes` are written, index blocks included. At least one block.
    ///
    /// # Errors
    /// The disk fails.
    pub fn rewrite(&mut self, budget_bytes: u64) -> io::Result<u64> {
        let before = self.written_bytes;
        let (mut chosen, mut touched) = (Vec::<u32>::new(), BTreeSet::new());
        let budget_blocks = (budget_bytes / BLOCK_BYTES as u64).max(2);
        while (chosen.len() + touched.len()) < budget_blocks as usize && chosen.len() < self.entries.len() / 2
        {
            let block = self.draw_block();
            if chosen.contains(&block) {
                continue;
            }
            chosen.push(block);
            touched.insert(block as usize / ENTRIES_PER_BLOCK);
        }
        self.write_batch(&chosen)?;
        Ok(self.written_bytes - before)
    }

    fn write_batch(&mut self, blocks: &[u32]) -> io::Result<()> {
        self.batch += 1;
        for block in blocks {
            let entry = &mut self.entries[*block as usize];
            *entry = Entry { version: entry.version + 1, batch: self.batch };
        }
        let touched: BTreeSet<usize> =
            blocks.iter().map(|block| *block as usize / ENTRIES_PER_BLOCK).collect();
        for index_block in touched {
            self.write_index_block(index_block)?;
        }
        self.index_file.sync_data()?;
        self.write_blocks(blocks)
    }

    /// Rewrites `runs` runs of `blocks_each` adjacent blocks, spread evenly over the file: what has changed after a long
    /// time, written in a short one. As many runs as there is room for, if it is less.
    ///
    /// # Errors
    /// The disk fails.
    pub fn rewrite_runs(&mut self, runs: u32, blocks_each: u32) -> io::Result<u64> {
        let before = self.written_bytes;
        let places = u64::from(self.blocks() / blocks_each.max(1));
        let runs = u64::from(runs).min(places);
        let begins_run = |place: &u64| place * runs / places != (place + 1) * runs / places;
        let chosen: Vec<u64> = (0..places).filter(begins_run).collect();
        for some in chosen.chunks(RUNS_AT_ONCE) {
            let first = |place: &u64| u32::try_from(place * u64::from(blocks_each)).unwrap_or(u32::MAX);
            let blocks: Vec<u32> =
                some.iter().flat_map(|place| first(place)..first(place) + blocks_each).collect();
            self.write_batch(&blocks)?;
        }
        Ok(self.written_bytes - before)
    }

    /// Compares every block on the disk, past the page cache, with the index on the disk.
    ///
    /// # Errors
    /// The files cannot be read.
    pub fn verify(&self) -> io::Result<DirtVerdict> {
        forget_cached(&self.data)?;
        forget_cached(&self.index_file)?;
        verify_files(&self.data, &self.index_file)
    }

    fn in_last_batch(&self, block: u32) -> bool {
        self.batch > 0 && self.entries[block as usize].batch == self.batch
    }

    fn draw_block(&mut self) -> u32 {
        self.draw = mix(self.draw, u64::from(self.batch));
        let blocks = self.entries.len() as u64;
        u32::try_from(self.draw % blocks).expect("a remainder of a 32-bit count")
    }

    fn write_blocks(&mut self, blocks: &[u32]) -> io::Result<()> {
        let mut content = vec![0; BLOCK_BYTES];
        for block in blocks {
            fill_block(&mut content, *block, self.entries[*block as usize].version);
            self.data.write_all_at(&content, u64::from(*block) * BLOCK_BYTES as u64)?;
        }
        self.written_bytes += (blocks.len() * BLOCK_BYTES) as u64;
        self.data.sync_data()
    }

    fn write_index_block(&mut self, index_block: usize) -> io::Result<()> {
        let first = index_block * ENTRIES_PER_BLOCK;
        let last = (first + ENTRIES_PER_BLOCK).min(self.entries.len());
        let mut bytes = Vec::with_capacity(BLOCK_BYTES);
        for entry in &self.entries[first..last] {
            bytes.extend_from_slice(&entry.version.to_le_bytes());
            bytes.extend_from_slice(&entry.batch.to_le_bytes());
        }
        self.written_bytes += BLOCK_BYTES as u64;
        self.index_file.write_all_at(&bytes, (HEADER_BYTES + first * ENTRY_BYTES) as u64)
    }
}

/// Compares a file of blocks with its index; for the laboratory, which takes both off a stopped machine's disk.
///
/// # Errors
/// A file cannot be read, or the index is none.
pub fn verify_files(data: &File, index: &File) -> io::Result<DirtVerdict> {
    let entries = parse_index(&read_all(index)?)?;
    let last_batch = last_batch(&entries);
    let mut verdict = DirtVerdict { blocks: entries.len() as u64, last_batch, ..DirtVerdict::default() };
    let (mut found, mut expected) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    for (block, entry) in (0_u32..).zip(&entries) {
        data.read_exact_at(&mut found, u64::from(block) * BLOCK_BYTES as u64)?;
        verdict.rewritten += u64::from(entry.version > 0);
        fill_block(&mut expected, block, entry.version);
        if found == expected {
            continue;
        }
        fill_block(&mut expected, block, entry.version.saturating_sub(1));
        if found == expected && entry.batch == last_batch && last_batch > 0 {
            verdict.unfinished += 1;
            continue;
        }
        verdict.mismatched += 1;
        if verdict.first_mismatched.len() < 16 {
            verdict.first_mismatched.push(block);
        }
    }
    Ok(verdict)
}

fn index_bytes(blocks: usize) -> usize {
    HEADER_BYTES + (blocks * ENTRY_BYTES).next_multiple_of(BLOCK_BYTES)
}

fn last_batch(entries: &[Entry]) -> u32 {
    entries.iter().map(|entry| entry.batch).filter(|batch| *batch != NEVER).max().unwrap_or(0)
}

fn parse_index(bytes: &[u8]) -> io::Result<Vec<Entry>> {
    let word =
        |at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "The index of blocks is damaged");
    let blocks = word(4).filter(|_| word(0) == Some(MAGIC)).ok_or_else(damaged)? as usize;
    (0..blocks)
        .map(|block| {
            let at = HEADER_BYTES + block * ENTRY_BYTES;
            Some(Entry { version: word(at)?, batch: word(at + 4)? })
        })
        .collect::<Option<Vec<_>>>()
        .ok_or_else(damaged)
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> (tempfile::TempDir, Dirt) {
        let folder = tempfile::tempdir().unwrap();
        create(folder.path(), 4 << 20).unwrap();
        let dirt = Dirt::open(folder.path()).unwrap();
        (folder, dirt)
    }

    #[test]
    fn rewritten_blocks_match_their_versions_and_the_rate_is_kept() {
        let (_folder, mut dirt) = fresh();
        for _ in 0..5 {
            let written = dirt.rewrite(64 << 10).unwrap();
            assert!((56 << 10..=72 << 10).contains(&written), "{written}");
        }
        let verdict = dirt.verify().unwrap();
        assert!(verdict.sound());
        assert!(verdict.rewritten > 40 && verdict.last_batch == 5);
    }

    #[test]
    fn runs_are_spread_over_the_whole_file_and_rewritten_once() {
        let (_folder, mut dirt) = fresh();
        dirt.rewrite_runs(100, 5).unwrap();
        let verdict = dirt.verify().unwrap();
        assert!(verdict.sound());
        assert_eq!(verdict.rewritten, 500);
        let changed: Vec<u32> =
            (0..dirt.blocks()).filter(|block| dirt.entries[*block as usize].version == 1).collect();
        assert!(changed[0] < 20 && changed[499] > dirt.blocks() - 20, "{} to {}", changed[0], changed[499]);
        assert_eq!(
            dirt.rewrite_runs(u32::MAX, 512).unwrap(),
            (1024 * BLOCK_BYTES) as u64 + 2 * BLOCK_BYTES as u64
        );
    }

    #[test]
    fn an_interrupted_batch_is_no_mismatch_and_is_finished_at_the_next_opening() {
        let (folder, mut dirt) = fresh();
        dirt.rewrite(64 << 10).unwrap();
        let block = (0..dirt.blocks()).find(|block| dirt.in_last_batch(*block)).unwrap();
        let mut old = vec![0; BLOCK_BYTES];
        fill_block(&mut old, block, 0);
        dirt.data.write_all_at(&old, u64::from(block) * BLOCK_BYTES as u64).unwrap();
        let verdict = dirt.verify().unwrap();
        assert_eq!((verdict.unfinished, verdict.mismatched), (1, 0));
        let again = Dirt::open(folder.path()).unwrap();
        assert_eq!(again.verify().unwrap().unfinished, 0);
    }

    #[test]
    fn a_lost_write_of_an_older_batch_and_a_flipped_bit_are_mismatches() {
        let (_folder, mut dirt) = fresh();
        dirt.rewrite(16 << 10).unwrap();
        let block = (0..dirt.blocks()).find(|block| dirt.in_last_batch(*block)).unwrap();
        while dirt.in_last_batch(block) {
            dirt.rewrite(16 << 10).unwrap();
        }
        let mut old = vec![0; BLOCK_BYTES];
        fill_block(&mut old, block, 0);
        dirt.data.write_all_at(&old, u64::from(block) * BLOCK_BYTES as u64).unwrap();
        dirt.data.write_all_at(&[0xFF], 5 * BLOCK_BYTES as u64 + 100).unwrap();
        let verdict = dirt.verify().unwrap();
        assert_eq!(verdict.mismatched, if block == 5 { 1 } else { 2 });
        assert!(verdict.first_mismatched.contains(&block));
    }
}
