//! The sending side of a disk mirror: which blocks are owed, what is queued, what is being re-read.
//!
//! ```text
//!                     guest write (no room), guest trim
//!            ┌──────────────────────────────────────────────────┐
//!            ▼              poll_read                           │
//!    ┌──▶ DIRTY ───────────────────────▶ READING ──content──▶ CLEAN ──guest write (room)──▶ queued
//!    │       │ guest write: nothing,         │ guest write
//!    │       ▼ it will be read anyway        ▼
//!    └──────────────────────────────── OVERTAKEN   (content that arrives now may be older than the write)
//!                content, discarded
//!
//!    COPYING ──handle_finish──▶ FINISHING ──all clean, queue empty──▶ barrier sent ──handle_reopen──▶ COPYING
//! ```
//!
//! The order of records is the order in which their content became known: a write behind the re-read it
//! overtook would be undone by it, therefore such a re-read is thrown away. It never waits and never
//! refuses a guest's write for lack of room: what does not fit is forgotten and read again later.
//!
//! Where the destination has told what it holds of a block, and nothing was sent for that block yet, equal
//! content travels as its hash, and of a block that changed only the parts of 4 KiB that did. Re-reads do not
//! run ahead of what was told. A new disk reads as zeros until something is sent for a block, and a hash is
//! something: the destination puts there what it keeps elsewhere.
//!
//! What memory may be named by, and what follows from that, is [`super::naming`]'s.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::bitmap::Bitmap;
use super::map::{BlockMap, MapError, PART, There};
use super::naming::Naming;
use super::pack::{ChunkPacker, DEFAULT_WINDOW_LOG};
use super::queue::{RECORD_COST, RecordQueue};
use super::record::{Barrier, Record, RunningDigest};
use super::{BLOCK, split_blocks};
use crate::wan::{GivenPlaces, Level};

static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Who sends what the disk held before the mirror began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// We read it (QEMU mirrors with `sync=none`): at the pace of the WAN.
    Reread,
    /// QEMU writes it to us (`sync=full`): at the pace of the local disk, so most of it will find no
    /// room and be read again.
    Mirrored,
}

/// What is known of the destination's disk before anything is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetDisk {
    /// Nothing: everything is sent.
    Unknown,
    /// It is new and reads as zeros: zeros need not be sent.
    Zero,
    /// The destination tells, with [`MirrorSource::handle_map`].
    Told,
}

/// Limits of one mirror.
#[derive(Debug, Clone, Copy)]
pub struct SourceConfig {
    /// Guest writes held while the WAN is busy, in bytes. Memory per disk; with less, more is read twice.
    pub buffer_bytes: u64,
    /// Re-reads start only while less than this is queued, in bytes. More smooths out slow local
    /// reads, and makes new writes wait behind old content for longer.
    pub read_ahead_bytes: u64,
    /// Re-reads under way at the same time.
    pub max_reads: usize,
    /// Largest chunk to send in bytes, at least 128 KiB.
    pub max_chunk: usize,
    /// Who sends the existing content.
    pub existing: Existing,
    /// What is known of the destination's disk.
    pub target: TargetDisk,
    /// Memory for what the destination tells of its disk, in bytes. 112 for each block of content, 16 where
    /// room runs short: then parts of blocks are not told of. 1 MiB tells of 585 MiB, 64 MiB of up to 100 GiB. What it does
    /// not hold is sent again.
    pub map_bytes: u64,
    /// How far back what was sent is remembered, as the exponent of two: memory at both sites, and what the destination
    /// allows at most.
    pub window_log: u32,
    /// Memory for where content stands, by which pages of memory may be named, in bytes:
    /// [`crate::wan::DiskPlaces::BYTES_PER_PAGE`] for each 4 KiB of content. Default 0: none is.
    pub places_bytes: u64,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            buffer_bytes: 64 << 20,
            read_ahead_bytes: 4 << 20,
            max_reads: 4,
            max_chunk: (1 << 20) - 1024,
            existing: Existing::Reread,
            target: TargetDisk::Unknown,
            map_bytes: 64 << 20,
            window_log: DEFAULT_WINDOW_LOG,
            places_bytes: 0,
        }
    }
}

/// A range to read from the source's disk. Aligned to blocks, but for the end of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadRun {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Part of what a read found; parts follow each other from the run's offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Data(Bytes),
    /// This many bytes of zero.
    Zero(u64),
}

/// What has happened so far. All in bytes, but for `records` and `level_changes`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceCounters {
    /// Disk content in records already put into chunks, zeros included.
    pub sent_bytes: u64,
    /// What chunks were made of: records before compression, those of zeros and of what the destination has being short.
    pub body_bytes: u64,
    /// The chunks themselves, after compression.
    pub chunk_bytes: u64,
    /// Content that the destination had already, and that travelled as its hash.
    pub same_bytes: u64,
    /// Content of zero that travelled as a length, or not at all.
    pub zero_bytes: u64,
    /// Guest writes that found no room and are read again.
    pub dropped_bytes: u64,
    /// Guest writes to blocks that were going to be read anyway.
    pub coalesced_bytes: u64,
    /// Re-reads discarded because a guest write overtook them.
    pub overtaken_bytes: u64,
    /// Records put into chunks.
    pub records: u64,
    /// How often chunks began to be packed at another level.
    pub level_changes: u64,
}

/// A guest write that cannot belong to this mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// Beyond the end of the disk.
    #[error(
        "The mirror wrote {len} bytes at {offset}, beyond the disk's {size} bytes: check the disk's size"
    )]
    Bounds {
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// After the barrier: the guest or the mirror job had not ended.
    #[error(
        "The disk was written after its barrier: the guest must be stopped and the mirror completed first"
    )]
    AfterBarrier,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Copying,
    Finishing,
    Barred(Barrier),
}

/// The state of one disk's mirror at the source.
pub struct MirrorSource {
    size: u64,
    config: SourceConfig,
    dirty: Bitmap,
    reading: Bitmap,
    overtaken: Bitmap,
    /// Blocks that are zero at the destination once everything queued is applied.
    blank: Bitmap,
    /// Blocks that something was queued for: what was told of them holds no longer.
    touched: Bitmap,
    map: BlockMap,
    cursor: u64,
    reads: usize,
    queue: RecordQueue,
    packer: ChunkPacker,
    naming: Naming,
    digest: RunningDigest,
    counters: SourceCounters,
    phase: Phase,
    #[cfg(test)]
    pub(super) mutant_ignores_overtaking: bool,
    #[cfg(test)]
    pub(super) mutant_believes_old_news: bool,
    #[cfg(test)]
    pub(super) mutant_thinks_new_stays_empty: bool,
}

impl MirrorSource {
    /// The mirror of a disk of `size` bytes, before anything was sent.
    pub fn new(size: u64, config: SourceConfig) -> Self {
        let blocks = size.div_ceil(BLOCK);
        let max_chunk = config.max_chunk.max(2 * BLOCK as usize);
        let mut map = BlockMap::new(blocks, config.map_bytes);
        match config.target {
            TargetDisk::Told => {}
            TargetDisk::Unknown | TargetDisk::Zero => map.end(),
        }
        Self {
            size,
            config: SourceConfig { max_reads: config.max_reads.max(1), max_chunk, ..config },
            dirty: Bitmap::new(blocks, config.existing == Existing::Reread),
            reading: Bitmap::new(blocks, false),
            overtaken: Bitmap::new(blocks, false),
            blank: Bitmap::new(blocks, config.target == TargetDisk::Zero),
            touched: Bitmap::new(blocks, false),
            map,
            cursor: 0,
            reads: 0,
            queue: RecordQueue::default(),
            packer: ChunkPacker::new(max_chunk, config.window_log),
            naming: Naming::noting(config.places_bytes),
            digest: RunningDigest::default(),
            counters: SourceCounters::default(),
            phase: Phase::Copying,
            #[cfg(test)]
            mutant_ignores_overtaking: false,
            #[cfg(test)]
            mutant_believes_old_news: false,
            #[cfg(test)]
            mutant_thinks_new_stays_empty: false,
        }
    }

    /// The destination told what it has of its disk's next blocks. After an error nothing more is
    /// believed, which costs only time.
    pub fn handle_map(&mut self, chunk: Bytes) -> Result<(), MapError> {
        let added = self.map.add(chunk);
        if added.is_err() {
            self.map.end();
        }
        added
    }

    /// The destination tells nothing more.
    pub fn handle_map_end(&mut self) {
        self.map.end();
    }

    /// The guest wrote `data` at `offset`. Queues it, or remembers to read it.
    pub fn handle_write(&mut self, offset: u64, data: Bytes) -> Result<(), SourceError> {
        self.check(offset, data.len() as u64)?;
        for (block, at, len) in split_blocks(offset, data.len() as u64) {
            let part = &data[(at - offset) as usize..][..len as usize];
            if *part == ZEROS[..len as usize] {
                self.write_zero(block, at, len);
            } else if self.admits(block, len) {
                // A copy, because a slice would keep the whole request in memory.
                self.enqueue_write(at, Bytes::copy_from_slice(part));
            }
        }
        Ok(())
    }

    /// The guest (or the mirror) zeroed a range.
    pub fn handle_zero(&mut self, offset: u64, len: u64) -> Result<(), SourceError> {
        self.check(offset, len)?;
        for (block, at, len) in split_blocks(offset, len) {
            self.write_zero(block, at, len);
        }
        Ok(())
    }

    /// The guest gave up a range. What it reads as from now on is the disk's affair: it is read again.
    pub fn handle_trim(&mut self, offset: u64, len: u64) -> Result<(), SourceError> {
        self.check(offset, len)?;
        for (block, ..) in split_blocks(offset, len) {
            self.owe(block);
        }
        Ok(())
    }

    /// The guest flushed: the destination should, too. Advice only, the barrier does not need it.
    pub fn handle_flush(&mut self) {
        if self.barrier().is_none() && !self.queue.is_empty() && self.has_room(0) {
            self.queue.push(Record::Flush, false);
        }
    }

    /// The next range to read, at most `max_len` bytes (at least a block), or `None` while enough is
    /// queued or under way. Every run is answered by [`Self::handle_read`].
    pub fn poll_read(&mut self, max_len: u64) -> Option<ReadRun> {
        if self.reads >= self.config.max_reads || self.queue.bytes() >= self.config.read_ahead_bytes.max(1) {
            return None;
        }
        let told = self.map.told();
        let from = |block| self.dirty.next_set(block).filter(|block| *block < told);
        let first = from(self.cursor).or_else(|| from(0))?;
        let blocks = self.dirty.run(first, (max_len / BLOCK).max(1).min(told - first));
        for block in first..first + blocks {
            self.dirty.remove(block);
            self.reading.insert(block);
        }
        self.cursor = first + blocks;
        self.reads += 1;
        let offset = first * BLOCK;
        Some(ReadRun { offset, len: (blocks * BLOCK).min(self.size - offset) })
    }

    /// What a read found. Blocks of the run that `content` does not cover whole stay owed, and so do
    /// those that a guest write overtook since the run was handed out.
    pub fn handle_read(&mut self, run: ReadRun, content: &[Content]) {
        self.reads -= 1;
        let mut at = run.offset;
        for part in content {
            match part {
                Content::Data(data) => self.read_data(at, data),
                Content::Zero(len) => self.read_zero(at, *len),
            }
            at += part.len();
        }
        for (block, ..) in split_blocks(run.offset, run.len) {
            if self.reading.remove(block) {
                self.overtaken.remove(block);
                self.dirty.insert(block);
            }
        }
        if at < run.offset + run.len {
            self.cursor = at / BLOCK;
        }
    }

    /// Memory begins: what it may be named by. From here on nothing of it is overwritten that was not asked about. Gives it
    /// once; memory that begins anew is named by nothing.
    pub fn give_places(&mut self) -> GivenPlaces {
        let places = self.naming.give(self.size.div_ceil(BLOCK), self.queue.ranges());
        GivenPlaces { places, after_records: self.digest.records() }
    }

    /// Blocks of what was given that are about to be overwritten, and behind which all waits until
    /// [`Self::handle_released`].
    pub fn poll_overwriting(&mut self) -> Option<BTreeSet<u64>> {
        self.naming.poll_overwriting(self.queue.next_place())
    }

    /// What [`Self::poll_overwriting`] told may be overwritten.
    pub fn handle_released(&mut self) {
        self.naming.handle_released();
    }

    /// Memory names nothing any more.
    pub fn handle_naming_end(&mut self) {
        self.naming = Naming::Off;
    }

    /// The guest has stopped and the mirror job has ended: from here on only what is owed is sent, and
    /// behind it the barrier.
    pub fn handle_finish(&mut self) {
        if self.phase == Phase::Copying {
            self.phase = Phase::Finishing;
        }
    }

    /// The guest runs on at the source, with a new mirror job begun before it did.
    pub fn handle_reopen(&mut self) {
        self.phase = Phase::Copying;
    }

    /// Makes chunks smaller or faster from the next one on.
    pub fn set_level(&mut self, level: Level) {
        self.packer.set_level(level);
    }

    /// Whether the level in force has had its time: a change costs what is remembered of the disk.
    pub fn is_level_tried(&self) -> bool {
        self.packer.is_level_tried()
    }

    /// The next chunk to send, if there is anything to send.
    pub fn poll_chunk(&mut self) -> Option<Bytes> {
        let first_number = self.digest.records() + 1;
        let limit = self.naming.limit();
        while let Some(record) = self.queue.front_before(limit).filter(|record| self.packer.fits(record)) {
            self.counters.sent_bytes += record.range().map_or(0, |(start, end)| end - start);
            self.digest.add(record);
            self.packer.push(record);
            self.queue.pop();
        }
        self.pack_barrier();
        if self.digest.records() < first_number {
            return None;
        }
        self.counters.records = self.digest.records();
        self.counters.body_bytes += self.packer.body_bytes();
        let chunk = self.packer.finish(first_number, self.digest.proof());
        self.counters.chunk_bytes += chunk.len() as u64;
        self.counters.level_changes = self.packer.level_changes();
        Some(chunk)
    }

    /// The barrier, once it was put into a chunk.
    pub fn barrier(&self) -> Option<Barrier> {
        match self.phase {
            Phase::Barred(barrier) => Some(barrier),
            Phase::Copying | Phase::Finishing => None,
        }
    }

    /// Bytes that must still be read from the source's disk, or are being read.
    pub fn owed_bytes(&self) -> u64 {
        ((self.dirty.count() + self.reading.count()) * BLOCK).min(self.size)
    }

    /// Bytes queued, with overhead.
    pub fn queued_bytes(&self) -> u64 {
        self.queue.bytes()
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What has happened so far.
    pub fn counters(&self) -> SourceCounters {
        self.counters
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), SourceError> {
        if self.barrier().is_some() {
            return Err(SourceError::AfterBarrier);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(SourceError::Bounds { offset, len, size: self.size }),
        }
    }

    /// Whether a guest write to part of `block` must be queued, and there is room. If it need not or
    /// cannot, what follows from that is noted.
    fn admits(&mut self, block: u64, len: u64) -> bool {
        if self.dirty.contains(block) {
            self.counters.coalesced_bytes += len;
            return false;
        }
        if self.reading.contains(block) && self.overtaking_counts() {
            self.overtaken.insert(block);
            self.counters.coalesced_bytes += len;
            return false;
        }
        if !self.has_room(len) {
            self.counters.dropped_bytes += len;
            self.owe(block);
            return false;
        }
        true
    }

    fn write_zero(&mut self, block: u64, at: u64, len: u64) {
        if self.admits(block, 0) {
            self.enqueue_zero(block, at, len);
        }
    }

    fn has_room(&self, len: u64) -> bool {
        self.queue.bytes() + RECORD_COST + len <= self.config.buffer_bytes
    }

    fn owe(&mut self, block: u64) {
        if self.reading.contains(block) {
            self.overtaken.insert(block);
        } else {
            self.dirty.insert(block);
        }
    }

    fn overtaking_counts(&self) -> bool {
        #[cfg(test)]
        if self.mutant_ignores_overtaking {
            return false;
        }
        true
    }

    fn read_data(&mut self, offset: u64, data: &Bytes) {
        for (block, at, len) in split_blocks(offset, data.len() as u64) {
            if !self.accepts_read(block, at, len) {
                continue;
            }
            let start = (at - offset) as usize;
            let part = data.slice(start..start + len as usize);
            if *part == ZEROS[..part.len()] {
                self.enqueue_zero(block, at, len);
                continue;
            }
            match self.is_there(block, &part) {
                There::Nothing => self.enqueue_write(at, part),
                There::Whole(hash) => {
                    if self.map.is_new() && self.giving_counts() {
                        self.touched.insert(block);
                    }
                    self.enqueue_same(at, &part, hash);
                }
                There::Parts(same) => self.enqueue_parts(at, &part, same),
            }
        }
    }

    /// What the destination should have of a whole block's content.
    fn is_there(&self, block: u64, content: &[u8]) -> There {
        if self.touched.contains(block) && self.touching_counts() {
            return There::Nothing;
        }
        self.map.may_have(block, content)
    }

    fn enqueue_same(&mut self, offset: u64, content: &[u8], hash: [u8; 32]) {
        self.counters.same_bytes += content.len() as u64;
        self.push(Record::Same { offset, len: content.len() as u32, hash }, content);
    }

    /// A block of which the destination should have the parts with a bit in `same`: neighbours of a kind in one record.
    fn enqueue_parts(&mut self, offset: u64, content: &Bytes, same: u16) {
        let parts = content.len().div_ceil(PART as usize);
        let is_same = |part: usize| same >> part & 1 == 1;
        let mut first = 0;
        while first < parts {
            let end = (first + 1..parts).find(|part| is_same(*part) != is_same(first)).unwrap_or(parts);
            let (from, to) = (first * PART as usize, (end * PART as usize).min(content.len()));
            let (at, run) = (offset + from as u64, content.slice(from..to));
            match is_same(first) {
                true => self.enqueue_same(at, &run, *blake3::hash(&run).as_bytes()),
                false => self.enqueue_write(at, run),
            }
            first = end;
        }
    }

    fn touching_counts(&self) -> bool {
        #[cfg(test)]
        if self.mutant_believes_old_news {
            return false;
        }
        true
    }

    fn giving_counts(&self) -> bool {
        #[cfg(test)]
        if self.mutant_thinks_new_stays_empty {
            return false;
        }
        true
    }

    fn read_zero(&mut self, offset: u64, len: u64) {
        for (block, at, len) in split_blocks(offset, len) {
            if self.accepts_read(block, at, len) {
                self.enqueue_zero(block, at, len);
            }
        }
    }

    /// Whether content read for `block` is whole and still current.
    fn accepts_read(&mut self, block: u64, at: u64, len: u64) -> bool {
        let whole = at.is_multiple_of(BLOCK) && (len == BLOCK || at + len == self.size);
        if !whole || !self.reading.contains(block) {
            return false;
        }
        if self.overtaken.contains(block) {
            self.counters.overtaken_bytes += len;
            return false;
        }
        self.reading.remove(block)
    }

    fn enqueue_zero(&mut self, block: u64, offset: u64, len: u64) {
        self.counters.zero_bytes += len;
        if self.blank.contains(block) || self.map.is_new() && !self.touched.contains(block) {
            return;
        }
        self.touched.insert(block);
        if offset.is_multiple_of(BLOCK) && (len == BLOCK || offset + len == self.size) {
            self.blank.insert(block);
        }
        self.push(Record::Zero { offset, len }, &[]);
    }

    fn enqueue_write(&mut self, offset: u64, data: Bytes) {
        self.blank.remove(offset / BLOCK);
        self.touched.insert(offset / BLOCK);
        self.push(Record::Write { offset, data: data.clone() }, &data);
    }

    /// Queues a record that changes the disk, or says what is there: `content`, or zeros.
    fn push(&mut self, record: Record, content: &[u8]) {
        let range = record.range();
        self.queue.push(record, self.naming.joins());
        if let Some((start, end)) = range {
            self.naming.note(start, end, content, self.queue.next_place());
        }
    }

    fn pack_barrier(&mut self) {
        if self.phase != Phase::Finishing || self.owed_bytes() > 0 || self.queue.bytes() > 0 {
            return;
        }
        let barrier = self.digest.barrier();
        let record = Record::Barrier(barrier);
        if self.packer.fits(&record) {
            self.digest.add(&record);
            self.packer.push(&record);
            self.phase = Phase::Barred(barrier);
        }
    }
}

impl Content {
    /// How many bytes of the disk this is.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zero(len) => *len,
        }
    }

    /// Whether it is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
