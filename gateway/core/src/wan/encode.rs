//! The source's half: QEMU's bytes in, chunks for the bulk channel out.
//!
//! It owns the parser of the stream. Nothing is held back for good: [`StreamEncoder::handle_flush`]
//! sends what has been gathered, whenever the caller finds that QEMU has paused.

use std::collections::VecDeque;
use std::mem;

use bytes::{BufMut, Bytes, BytesMut};
use zstd::bulk::Compressor;

use super::ops::{MAX_OP_BYTES, OpsWriter, RecordKind};
use super::{
    BATCH_HEADER_BYTES, ENCODING_STORED, ENCODING_ZSTD, END_FRAME_BYTES, FRAME_BATCH, FRAME_END,
    MAX_CONTENTS, MAX_OPS, MAX_RECORDS, StreamDigest, StreamEnd,
};
use crate::memory::{Item, PAGE_BYTES, StreamCounters, StreamParser, StreamPhase};
use crate::units::Bytes as ByteCount;

/// How a stream is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncoderConfig {
    /// The longest chunk in bytes, at least [`EncoderConfig::MIN_CHUNK`]; the bulk channel's limit.
    pub max_chunk: usize,
    /// How much of the stream is compressed at once, in bytes; at most [`MAX_CONTENTS`] and what fits a
    /// chunk uncompressed. More compresses better and delays the first byte longer. Default 512 KiB.
    pub batch: usize,
    /// zstd's level for memory. Default 1: several hundred MB/s per core; 3 costs half of that for
    /// about 5 % fewer bytes.
    pub memory_level: i32,
    /// zstd's level for device state. Default 1.
    pub device_level: i32,
    /// Device state shorter than this, in bytes, is sent as it is: set it to what the link carries in
    /// 5 ms, where compressing would not shorten the pause. Default 0: always compress.
    pub device_stored_below: usize,
}

impl EncoderConfig {
    /// The shortest `max_chunk` with which one page and its record always fit.
    pub const MIN_CHUNK: usize = 16 << 10;

    /// The defaults for a channel that carries chunks of `max_chunk` bytes.
    pub fn for_chunks_of(max_chunk: usize) -> Self {
        Self { max_chunk, batch: 512 << 10, memory_level: 1, device_level: 1, device_stored_below: 0 }
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
}

/// Turns one migration stream into chunks.
pub struct StreamEncoder {
    config: EncoderConfig,
    parser: StreamParser,
    hasher: blake3::Hasher,
    taken_bytes: u64,
    batch: Batch,
    memory: Compressor<'static>,
    device: Compressor<'static>,
    scratch: Vec<u8>,
    chunk: BytesMut,
    ready: VecDeque<Bytes>,
    wire_bytes: u64,
    wire_device_bytes: u64,
}

#[derive(Default)]
struct Batch {
    class: Class,
    contents: Vec<u8>,
    ops: OpsWriter,
    records: u64,
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
        Ok(Self {
            config,
            parser: StreamParser::new(),
            hasher: blake3::Hasher::new(),
            taken_bytes: 0,
            batch: Batch::default(),
            memory: Compressor::new(config.memory_level)?,
            device: Compressor::new(config.device_level)?,
            scratch: Vec::new(),
            chunk: BytesMut::new(),
            ready: VecDeque::new(),
            wire_bytes: 0,
            wire_device_bytes: 0,
        })
    }

    /// Takes the stream's next bytes. Take the chunks they make with [`Self::poll_chunk`] before the next.
    pub fn handle_bytes(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.taken_bytes += bytes.len() as u64;
        self.parser.handle_bytes(bytes);
        self.pack();
    }

    /// Sends what has been gathered, whether or not it fills a chunk.
    pub fn handle_flush(&mut self) {
        self.close_batch();
        self.close_chunk();
    }

    /// The stream is over: sends the rest and the frame that proves it.
    pub fn handle_end(&mut self) -> StreamEnd {
        self.parser.handle_end();
        self.pack();
        self.close_batch();
        let end = StreamEnd {
            bytes: ByteCount(self.taken_bytes),
            digest: StreamDigest(*self.hasher.finalize().as_bytes()),
        };
        self.reserve(END_FRAME_BYTES);
        self.chunk.put_u8(FRAME_END);
        self.chunk.put_u64(end.bytes.0);
        self.chunk.put_slice(&end.digest.0);
        self.close_chunk();
        end
    }

    /// The next chunk to send, in order.
    pub fn poll_chunk(&mut self) -> Option<Bytes> {
        self.ready.pop_front()
    }

    /// What is gathered and would leave with a flush.
    pub fn is_idle(&self) -> bool {
        self.batch.ops.is_empty() && self.chunk.is_empty()
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
        }
    }

    fn pack(&mut self) {
        while let Some(item) = self.parser.poll_item() {
            match item {
                Item::Framing(bytes) | Item::Opaque(bytes) => self.verbatim(Class::Memory, &bytes),
                Item::DeviceState(bytes) => self.verbatim(Class::Device, &bytes),
                Item::Page { head, record } => {
                    let page = &record[record.len() - PAGE_BYTES..];
                    self.room_for(Class::Memory, PAGE_BYTES);
                    self.batch.contents.extend_from_slice(page);
                    self.batch.record(RecordKind::Page, head.offset_bytes, head.name.as_ref());
                }
                Item::ZeroPage { head, .. } => {
                    self.room_for(Class::Memory, 0);
                    self.batch.record(RecordKind::Zero, head.offset_bytes, head.name.as_ref());
                }
            }
        }
    }

    fn verbatim(&mut self, class: Class, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.room_for(class, 1);
            let room = self.config.contents_limit() - self.batch.contents.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.batch.contents.extend_from_slice(now);
            self.batch.ops.verbatim(now.len());
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
        self.batch.records = 0;
        let encoding = self.compress(&data, contents_len);
        let packed = if encoding == ENCODING_ZSTD { self.scratch.len() } else { data.len() };
        self.reserve(BATCH_HEADER_BYTES + packed);
        self.chunk.put_u8(FRAME_BATCH);
        self.chunk.put_u8(encoding);
        self.chunk.put_u32(packed as u32);
        self.chunk.put_u32(contents_len as u32);
        self.chunk.put_u32(ops_len as u32);
        self.chunk.put_slice(if encoding == ENCODING_ZSTD { &self.scratch } else { &data });
        if self.batch.class == Class::Device {
            self.wire_device_bytes += (BATCH_HEADER_BYTES + packed) as u64;
        }
        data.clear();
        self.batch.contents = data;
    }

    /// Compresses into `scratch`; says which encoding is shorter.
    fn compress(&mut self, data: &[u8], contents_len: usize) -> u8 {
        let compressor = match self.batch.class {
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
        let chunk = self.chunk.split().freeze();
        self.wire_bytes += chunk.len() as u64;
        self.ready.push_back(chunk);
    }
}

impl Batch {
    fn record(&mut self, kind: RecordKind, offset_bytes: u64, name: Option<&Bytes>) {
        self.ops.record(kind, offset_bytes, name);
        self.records += 1;
    }
}
