//! The source's half: QEMU's bytes in, chunks for the bulk channel out.
//!
//! It owns the parser of the stream. Nothing is held back for good: [`StreamEncoder::handle_flush`]
//! sends what has been gathered, whenever the caller finds that QEMU has paused.

use std::collections::{BTreeSet, VecDeque};
use std::mem;

use bytes::{BufMut, Bytes, BytesMut};
use zstd::bulk::Compressor;

use super::effort::Level;
use super::ops::{COPY_BYTES, MAX_OP_BYTES, OpsWriter, PLACE_BYTES, RecordKind};
use super::places::{GivenPlaces, Named, PageHash, Place, Places, page_hash};
use super::proving::SourceDigest;
use super::shadow::{Blocks, Finder, PageKey, Remembered, Shadow, Slot};
use super::{
    BATCH_HEADER_BYTES, ENCODING_STORED, ENCODING_ZSTD, END_FRAME_BYTES, FRAME_BATCH, FRAME_DISKS, FRAME_END,
    FRAME_SHADOW, MAX_CONTENTS, MAX_KNOWN_PAGES, MAX_OPS, MAX_RECORDS, StreamEnd,
};
use crate::memory::{Item, PAGE_BYTES, PageHead, StreamCounters, StreamParser, StreamPhase};
use crate::proof::Proof;
use crate::units::Bytes as ByteCount;

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderConfig {
    /// The longest chunk in bytes, at least [`EncoderConfig::MIN_CHUNK`]; the bulk channel's limit.
    pub max_chunk: usize,
    /// How much of the stream is compressed at once, in bytes; at most [`MAX_CONTENTS`] and what fits a
    /// chunk uncompressed. More compresses better and delays the first byte longer. Default 512 KiB.
    pub batch: usize,
    /// How memory is packed. Default zstd 1: several hundred MB/s per core; 3 costs half of that for
    /// about 5 % fewer bytes.
    pub memory_level: Level,
    /// zstd's level for device state. Default 1.
    pub device_level: i32,
    /// How many pages both ends remember, at most [`super::MAX_SHADOW_PAGES`] and what the destination allows. Each costs
    /// 4.2 KiB there and here. Default 0: each page travels whole each time.
    pub shadow_pages: u32,
    /// Device state shorter than this, in bytes, is sent as it is: set it to what the link carries in
    /// 5 ms, where compressing would not shorten the pause. Default 0: always compress.
    pub device_stored_below: usize,
}

impl EncoderConfig {
    /// The shortest `max_chunk` with which one page and its record always fit.
    pub const MIN_CHUNK: usize = 16 << 10;

    /// The defaults for a channel that carries chunks of `max_chunk` bytes.
    pub fn for_chunks_of(max_chunk: usize) -> Self {
        Self {
            max_chunk,
            batch: 512 << 10,
            memory_level: Level::FIRST,
            device_level: 1,
            shadow_pages: 0,
            device_stored_below: 0,
        }
    }

    fn contents_limit(&self) -> usize {
        let fits = self.max_chunk.max(Self::MIN_CHUNK) - BATCH_HEADER_BYTES - self.ops_limit() - MAX_OP_BYTES;
        self.batch.min(fits).clamp(2 * PAGE_BYTES, MAX_CONTENTS)
    }

    fn ops_limit(&self) -> usize {
        (self.max_chunk.max(Self::MIN_CHUNK) / 16).min(MAX_OPS - MAX_OP_BYTES)
    }
}

/// What an encoder has taken in and given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncoderCounters {
    /// What the stream contained.
    pub stream: StreamCounters,
    /// Bytes of the chunks made so far, the one being filled included.
    pub wire_bytes: u64,
    /// The part of `wire_bytes` that carries device state.
    pub wire_device_bytes: u64,
    /// Pages that were told by what they were, by another page, or by a disk.
    pub known_pages: u64,
    /// Of those, by a disk.
    pub disk_pages: u64,
}

/// Turns one migration stream into chunks.
pub struct StreamEncoder {
    config: EncoderConfig,
    parser: StreamParser,
    digest: SourceDigest,
    taken_bytes: u64,
    /// Of those, so many are in batches, the one being filled included.
    packed_bytes: u64,
    batch: Batch,
    /// Batches whose frames have no proof yet; never any between two calls.
    unproven: Vec<Unproven>,
    blocks: Blocks,
    shadow: Shadow,
    finder: Finder,
    places: Places,
    known_pages: u64,
    disk_pages: u64,
    memory: Compressor<'static>,
    device: Compressor<'static>,
    scratch: Vec<u8>,
    chunk: BytesMut,
    ready: VecDeque<BytesMut>,
    wire_bytes: u64,
    wire_device_bytes: u64,
}

#[derive(Default)]
struct Batch {
    class: Class,
    contents: Vec<u8>,
    ops: OpsWriter,
    records: u64,
    known: u64,
}

/// A batch that ends within what was read last, most of which is only digested when all of that is packed.
struct Unproven {
    /// Where in the stream it ends.
    end: u64,
    /// Its chunk's place among those that are ready, or behind them: the one being filled.
    chunk: usize,
    /// The proof's place in the chunk.
    at: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Class {
    #[default]
    Memory,
    Device,
}

impl StreamEncoder {
    /// An encoder at the beginning of a stream.
    ///
    /// # Errors
    ///
    /// When zstd has no memory for its state.
    pub fn new(config: EncoderConfig) -> std::io::Result<Self> {
        Self::based_on(config, None)
    }

    /// The same where both ends remember `base` from an earlier stream.
    ///
    /// # Errors
    ///
    /// When zstd has no memory for its state.
    pub fn based_on(config: EncoderConfig, base: Option<Remembered>) -> std::io::Result<Self> {
        let mut chunk = BytesMut::new();
        if config.shadow_pages > 0 {
            chunk.put_u8(FRAME_SHADOW);
            chunk.put_u32(config.shadow_pages);
            chunk.put_u8(u8::from(base.is_some()));
            chunk.put_slice(&base.as_ref().map_or([0; 32], Remembered::digest));
        }
        let (blocks, shadow) = match base.filter(|_| config.shadow_pages > 0) {
            Some(base) => base.begin(config.shadow_pages),
            None => (Blocks::default(), Shadow::new(config.shadow_pages)),
        };
        let mut encoder = Self {
            config,
            parser: StreamParser::new(),
            digest: SourceDigest::default(),
            taken_bytes: 0,
            packed_bytes: 0,
            batch: Batch::default(),
            unproven: Vec::new(),
            blocks,
            shadow,
            finder: Finder::new(config.shadow_pages),
            places: Places::default(),
            known_pages: 0,
            disk_pages: 0,
            memory: Compressor::new(0)?,
            device: Compressor::new(config.device_level)?,
            scratch: Vec::new(),
            chunk,
            ready: VecDeque::new(),
            wire_bytes: 0,
            wire_device_bytes: 0,
        };
        encoder.set_memory_level(config.memory_level);
        Ok(encoder)
    }

    /// The same that names pages by what the machine's disks, in their order, have given, if that is anything. Before the
    /// first byte.
    pub fn with_disks(mut self, given: Vec<GivenPlaces>) -> Self {
        let Ok(disks) = u8::try_from(given.len()) else { return self };
        if given.iter().all(GivenPlaces::is_empty) {
            return self;
        }
        self.chunk.put_u8(FRAME_DISKS);
        self.chunk.put_u8(disks);
        for disk in &given {
            self.chunk.put_u64(disk.after_records);
        }
        self.places = Places::new(given.into_iter().map(|disk| disk.places).collect());
        self
    }

    /// The blocks of a disk are about to be overwritten, and are not named from now on. If the destination may still have to
    /// read them: how much of the stream must be acknowledged before they may be. All of that is in chunks.
    pub fn handle_overwriting(&mut self, disk: u8, blocks: &BTreeSet<u64>) -> Option<ByteCount> {
        match self.places.forget(disk, blocks) {
            Named::No => None,
            Named::Until(wire_bytes) => Some(ByteCount(wire_bytes)),
            Named::Lately => {
                self.handle_flush();
                Some(ByteCount(self.wire_bytes))
            }
        }
    }

    /// Nothing is named by a disk any more: it is about to be quick that counts.
    pub fn handle_disks_end(&mut self) {
        self.places.end();
    }

    /// The destination has read so much of what was sent.
    pub fn handle_acknowledged(&mut self, wire: ByteCount) {
        self.places.acknowledged(wire.0);
        let due = self.places.named_since() >= NAMED_AT_ONCE || !self.places.can_name() || self.is_idle();
        if self.places.wants_closing() && due {
            self.handle_flush();
        }
    }

    /// Whether no disk has to ask any more before it is overwritten.
    pub fn is_done_with_disks(&self) -> bool {
        self.places.is_over()
    }

    /// Takes the stream's next bytes. Take the chunks they make with [`Self::poll_chunk`] before the next.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.taken_bytes += bytes.len() as u64;
        self.parser.handle_bytes(bytes);
        self.pack();
        self.prove(bytes);
    }

    /// Sends what has been gathered, whether or not it fills a chunk.
    pub fn handle_flush(&mut self) {
        self.close_batch();
        self.prove(&[]);
        self.close_chunk();
        self.places.chunk_closed(self.wire_bytes);
    }

    /// From now on chunks are no longer than this, if they were. What has been gathered leaves before.
    pub fn shorten_chunks(&mut self, max_chunk: usize) {
        self.handle_flush();
        self.config.max_chunk = self.config.max_chunk.min(max_chunk);
    }

    /// The stream is over: sends the rest and the frame that proves it.
    pub fn handle_end(&mut self) -> StreamEnd {
        self.parser.handle_end();
        self.pack();
        self.close_batch();
        self.prove(&[]);
        let end =
            StreamEnd { bytes: ByteCount(self.taken_bytes), digest: self.digest.end(self.packed_bytes) };
        self.reserve(END_FRAME_BYTES);
        self.chunk.put_u8(FRAME_END);
        self.chunk.put_u64(end.bytes.0);
        self.chunk.put_slice(&end.digest.0);
        self.close_chunk();
        end
    }

    /// What is remembered at the end.
    pub fn into_remembered(self) -> Remembered {
        Remembered::new(self.blocks, self.shadow)
    }

    /// The next chunk to send, in order.
    pub fn poll_chunk(&mut self) -> Option<Bytes> {
        self.ready.pop_front().map(BytesMut::freeze)
    }

    /// What is gathered and would leave with a flush.
    pub fn is_idle(&self) -> bool {
        self.batch.ops.is_empty() && self.chunk.is_empty()
    }

    /// Makes memory smaller or faster from the next batch on.
    pub fn set_memory_level(&mut self, level: Level) {
        let is_known = match level {
            Level::Stored => true,
            // A level that zstd does not have changes nothing.
            Level::Zstd(level) => self.memory.set_compression_level(level).is_ok(),
        };
        if is_known {
            self.config.memory_level = level;
        }
    }

    /// The level that is in force.
    pub fn memory_level(&self) -> Level {
        self.config.memory_level
    }

    #[cfg(test)]
    pub(super) fn shadow(&self) -> &Shadow {
        &self.shadow
    }

    /// How far into the stream the encoder is.
    pub fn phase(&self) -> StreamPhase {
        self.parser.phase()
    }

    /// What went in and came out so far.
    pub fn counters(&self) -> EncoderCounters {
        EncoderCounters {
            stream: self.parser.counters(),
            wire_bytes: self.wire_bytes + self.chunk.len() as u64,
            wire_device_bytes: self.wire_device_bytes,
            known_pages: self.known_pages,
            disk_pages: self.disk_pages,
        }
    }

    fn pack(&mut self) {
        while let Some(item) = self.parser.poll_item() {
            match item {
                Item::Framing(bytes) | Item::Opaque(bytes) => self.verbatim(Class::Memory, &bytes),
                Item::DeviceState(bytes) => self.verbatim(Class::Device, &bytes),
                Item::Page { head, record } => {
                    self.page(&head, &record[record.len() - PAGE_BYTES..]);
                    self.packed_bytes += record.len() as u64;
                }
                Item::ZeroPage { head, record } => {
                    self.zero_page(&head);
                    self.packed_bytes += record.len() as u64;
                }
            }
        }
    }

    fn zero_page(&mut self, head: &PageHead) {
        self.blocks.enter(head.name.as_deref());
        if let Some(key) = self.blocks.key(head.offset_bytes / PAGE_BYTES as u64) {
            self.shadow.clear(key);
        }
        self.room_for(Class::Memory, 0);
        self.batch.record(RecordKind::Zero, head.offset_bytes, head.name.as_ref());
    }

    fn page(&mut self, head: &PageHead, page: &[u8]) {
        self.blocks.enter(head.name.as_deref());
        let key =
            self.blocks.key(head.offset_bytes / PAGE_BYTES as u64).filter(|_| self.config.shadow_pages > 0);
        let (told, hash) = self.judge(key, page);
        let kind = self.tell(&told, page);
        if let Some(key) = key.filter(|_| kind != RecordKind::Same) {
            let slot = self.shadow.put(key, page);
            if let (Some(hash), Some(slot)) = (hash, slot) {
                self.finder.note(short(&hash), slot);
            }
        }
        self.batch.record(kind, head.offset_bytes, head.name.as_ref());
    }

    /// Puts what tells a page into the batch's contents.
    fn tell(&mut self, told: &Told, page: &[u8]) -> RecordKind {
        match told {
            Told::Whole => {
                self.room_for(Class::Memory, PAGE_BYTES);
                self.batch.contents.extend_from_slice(page);
                RecordKind::Page
            }
            Told::Same => {
                self.room_for_known(0);
                RecordKind::Same
            }
            Told::Copy(slot) => {
                self.room_for_known(COPY_BYTES);
                self.batch.contents.extend_from_slice(&slot.0.to_be_bytes());
                RecordKind::Copy
            }
            Told::OnDisk(place) => {
                self.room_for_known(PLACE_BYTES);
                self.batch.contents.extend_from_slice(&place.to_bytes());
                self.disk_pages += 1;
                RecordKind::OnDisk
            }
            Told::Delta(slot) => {
                self.room_for(Class::Memory, PAGE_BYTES);
                let before = self.shadow.page(*slot).unwrap_or_default();
                self.batch.contents.extend(page.iter().zip(before).map(|(now, before)| now ^ before));
                self.known_pages += 1;
                RecordKind::Delta
            }
        }
    }

    /// How a page is told, and its hash if that was needed. A page of which little changed is not looked for: another one
    /// will hardly be the same.
    fn judge(&mut self, key: Option<PageKey>, page: &[u8]) -> (Told, Option<PageHash>) {
        let before = key.and_then(|key| self.shadow.slot(key));
        if let Some((slot, before)) = before.and_then(|slot| Some((slot, self.shadow.page(slot)?))) {
            match differing_words(before, page) {
                0 => return (Told::Same, None),
                few if few <= MAX_DELTA_WORDS => return (Told::Delta(slot), None),
                _ => {}
            }
        }
        if key.is_none() && !self.places.can_name() {
            return (Told::Whole, None);
        }
        let hash = page_hash(page);
        let twin = self.finder.find(short(&hash)).filter(|slot| self.shadow.page(*slot) == Some(page));
        let told = twin.map(Told::Copy).or_else(|| self.places.name(&hash).map(Told::OnDisk));
        (told.unwrap_or(Told::Whole), Some(hash))
    }

    fn room_for_known(&mut self, len: usize) {
        if self.batch.known == MAX_KNOWN_PAGES {
            self.close_batch();
        }
        self.room_for(Class::Memory, len);
        self.batch.known += 1;
        self.known_pages += 1;
    }

    fn verbatim(&mut self, class: Class, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.room_for(class, 1);
            let room = self.config.contents_limit() - self.batch.contents.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.batch.contents.extend_from_slice(now);
            self.batch.ops.verbatim(now.len());
            self.packed_bytes += now.len() as u64;
            bytes = later;
        }
    }

    /// Closes the batch if another record with `len` bytes of contents would not fit, or is of another class.
    fn room_for(&mut self, class: Class, len: usize) {
        let full = self.batch.contents.len() + len > self.config.contents_limit()
            || self.batch.ops.len() > self.config.ops_limit() - MAX_OP_BYTES
            || self.batch.records == MAX_RECORDS;
        if full || class != self.batch.class {
            self.close_batch();
            self.batch.class = class;
        }
    }

    fn close_batch(&mut self) {
        if self.batch.ops.is_empty() {
            return;
        }
        let mut data = mem::take(&mut self.batch.contents);
        let contents_len = data.len();
        let ops_len = self.batch.ops.finish_into(&mut data);
        (self.batch.records, self.batch.known) = (0, 0);
        let encoding = self.compress(&data, contents_len);
        let packed = if encoding == ENCODING_ZSTD { self.scratch.len() } else { data.len() };
        self.reserve(BATCH_HEADER_BYTES + packed);
        self.chunk.put_u8(FRAME_BATCH);
        self.chunk.put_u8(encoding);
        self.chunk.put_u32(packed as u32);
        self.chunk.put_u32(contents_len as u32);
        self.chunk.put_u32(ops_len as u32);
        self.unproven.push(Unproven {
            end: self.packed_bytes,
            chunk: self.ready.len(),
            at: self.chunk.len(),
        });
        self.chunk.put_bytes(0, Proof::BYTES);
        self.chunk.put_slice(if encoding == ENCODING_ZSTD { &self.scratch } else { &data });
        if self.batch.class == Class::Device {
            self.wire_device_bytes += (BATCH_HEADER_BYTES + packed) as u64;
        }
        data.clear();
        self.batch.contents = data;
    }

    /// Puts the proofs of the batches that were closed into their frames; `read` is what was read and packed since then.
    fn prove(&mut self, mut read: &[u8]) {
        for Unproven { end, chunk, at } in self.unproven.drain(..) {
            let proof = self.digest.proof(end, &mut read).to_bytes();
            let chunk = self.ready.get_mut(chunk).unwrap_or(&mut self.chunk);
            chunk[at..at + Proof::BYTES].copy_from_slice(&proof);
        }
        self.digest.take(self.packed_bytes, read);
    }

    /// Compresses into `scratch`; says which encoding is shorter.
    fn compress(&mut self, data: &[u8], contents_len: usize) -> u8 {
        let compressor = match self.batch.class {
            Class::Memory if self.config.memory_level == Level::Stored => return ENCODING_STORED,
            Class::Memory => &mut self.memory,
            Class::Device if contents_len < self.config.device_stored_below => return ENCODING_STORED,
            Class::Device => &mut self.device,
        };
        // No more room than the data itself: zstd stops there, and then storing it is right.
        self.scratch.clear();
        self.scratch.reserve(data.len());
        match compressor.compress_to_buffer(data, &mut self.scratch) {
            Ok(len) if len < data.len() => ENCODING_ZSTD,
            Ok(_) | Err(_) => ENCODING_STORED,
        }
    }

    fn reserve(&mut self, frame_len: usize) {
        if self.chunk.len() + frame_len > self.config.max_chunk.max(EncoderConfig::MIN_CHUNK) {
            self.close_chunk();
        }
        self.chunk.reserve(frame_len);
    }

    fn close_chunk(&mut self) {
        if self.chunk.is_empty() {
            return;
        }
        let chunk = self.chunk.split();
        self.wire_bytes += chunk.len() as u64;
        self.ready.push_back(chunk);
    }
}

/// How a page is told.
enum Told {
    /// By its contents.
    Whole,
    /// It is what it was.
    Same,
    /// By what differs from what it was, which is there.
    Delta(Slot),
    /// By another page that holds the same.
    Copy(Slot),
    /// By a place on a disk that holds the same.
    OnDisk(Place),
}

/// Words of eight bytes that may differ for a page to be told by its difference: with more, what it is compresses as well as
/// what changed.
const MAX_DELTA_WORDS: usize = PAGE_BYTES / 8 / 2;
/// Blocks named before a chunk is closed behind them, so that what is remembered of them can end.
const NAMED_AT_ONCE: usize = 1 << 12;

fn differing_words(before: &[u8], now: &[u8]) -> usize {
    before.chunks_exact(8).zip(now.chunks_exact(8)).filter(|(before, now)| before != now).count()
}

/// Enough to look for a page in the shadow with, where what is found is compared.
fn short(hash: &PageHash) -> u64 {
    let mut short = [0; 8];
    short.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(short)
}

impl Batch {
    fn record(&mut self, kind: RecordKind, offset_bytes: u64, name: Option<&Bytes>) {
        self.ops.record(kind, offset_bytes, name);
        self.records += 1;
    }
}
