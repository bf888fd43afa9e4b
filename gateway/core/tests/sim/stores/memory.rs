//! The way of the memory in one attempt: QEMU's stream, the encoder, a channel that brings each chunk once and in order, and
//! the decoder (`gateway/src/memory`). What both ends begin with is not decided here.

use std::collections::VecDeque;

use bytes::Bytes;
use longhaul_core::units::Bytes as ByteCount;
use longhaul_core::wan::{
    DecodeError, Decoded, EncoderConfig, GivenPlaces, Place, Remembered, StreamDecoder, StreamEncoder,
};

use super::broken::Broken;
use super::disk::{DiskWay, arrived};
use super::guest::{Guest, PAGES};
use super::site::Digest;
use crate::schedule::Random;
use crate::stream::Stream;

/// What a stream says first, as the destination reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    pub based_on: Option<Digest>,
}

impl Begun {
    /// `0x03 pages:be32 based:u8 digest[32]`, or something else: then nothing is remembered.
    fn of(chunk: &[u8]) -> Self {
        let says = chunk.first() == Some(&3) && chunk.get(5) == Some(&1);
        let digest = chunk.get(6..38).filter(|_| says);
        Self { based_on: digest.and_then(|digest| digest.try_into().ok()) }
    }
}

/// Why the destination does not get the memory.
#[derive(Debug)]
pub enum Refused {
    Decoder(DecodeError),
    /// A page is named by what is no place on its disk.
    Unread,
}

pub struct MemoryWay {
    encoder: Option<StreamEncoder>,
    pub stream: Stream,
    dirty: Vec<bool>,
    /// Where QEMU looks next for pages to send.
    scan: usize,
    /// Of the stream, the encoder has so many bytes.
    taken: usize,
    channel: VecDeque<Bytes>,
    flip: Option<u64>,
    decoder: StreamDecoder,
    /// Of the stream, so many bytes came out again.
    pub made: usize,
    pub begun: Option<Begun>,
    /// The decoder is not through with its chunk.
    amid: bool,
    /// Records of the disk without which nothing may be read there.
    waits_for: Option<u64>,
    wanted: Option<Vec<Place>>,
    /// The disk asked, and may overwrite once so much of what was sent is acknowledged.
    asked: Option<ByteCount>,
    taking_bytes: u64,
    taken_bytes: u64,
    broken: Option<Broken>,
    /// What came out is not what QEMU wrote.
    pub differs: bool,
    pub refused: Option<Refused>,
    pub is_proven: bool,
    pub sent_bytes: u64,
}

impl MemoryWay {
    /// The destination waits, with what it remembers.
    pub fn new(allowed_pages: u32, base: Option<Remembered>, broken: Option<Broken>) -> Self {
        let decoder = StreamDecoder::new(allowed_pages).expect("memory for a decoder").with_base(base);
        Self {
            encoder: None,
            stream: Stream::begin(),
            dirty: vec![true; PAGES],
            scan: 0,
            taken: 0,
            channel: VecDeque::new(),
            flip: None,
            decoder,
            made: 0,
            begun: None,
            amid: false,
            waits_for: None,
            wanted: None,
            asked: None,
            taking_bytes: 0,
            taken_bytes: 0,
            broken,
            differs: false,
            refused: None,
            is_proven: false,
            sent_bytes: 0,
        }
    }

    /// The source begins to send, with what it remembers and by what the disk gave.
    pub fn begins(&mut self, shadow_pages: u32, base: Option<Remembered>, given: GivenPlaces) {
        let config = EncoderConfig { shadow_pages, ..EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK) };
        let encoder = StreamEncoder::based_on(config, base).expect("memory for an encoder");
        self.encoder = Some(encoder.with_disks(vec![given]));
    }

    pub fn has_begun(&self) -> bool {
        self.encoder.is_some()
    }

    /// The machine wrote a page.
    pub fn dirties(&mut self, page: usize) {
        self.dirty[page] = true;
    }

    /// QEMU sends some of what is dirty, in the order in which it looks.
    pub fn qemu_writes(&mut self, guest: &Guest, most: usize) {
        if !self.has_begun() {
            return;
        }
        let ahead = (self.scan..PAGES).chain(0..self.scan).filter(|page| self.dirty[*page]);
        let pages: Vec<usize> = ahead.take(most).collect();
        self.section(guest, &pages, false);
        self.scan = pages.last().map_or(0, |last| (last + 1) % PAGES);
    }

    /// The machine stands still: QEMU sends the rest.
    pub fn qemu_ends(&mut self, guest: &Guest) {
        let rest: Vec<usize> = (0..PAGES).filter(|page| self.dirty[*page]).collect();
        self.section(guest, &rest, true);
        self.stream.end();
        self.is_read(usize::MAX, false);
        let Some(encoder) = &mut self.encoder else { return };
        encoder.handle_disks_end();
        encoder.handle_end();
        self.collect();
    }

    fn section(&mut self, guest: &Guest, pages: &[usize], last: bool) {
        self.stream.section(last, pages.iter().map(|page| (*page, guest.memory[*page].bytes())));
        pages.iter().for_each(|page| self.dirty[*page] = false);
    }

    /// The encoder takes some of what QEMU wrote.
    pub fn is_read(&mut self, most: usize, flush: bool) {
        let Some(encoder) = &mut self.encoder else { return };
        let end = self.taken.saturating_add(most).min(self.stream.bytes.len());
        encoder.handle_bytes(&self.stream.bytes[self.taken..end]);
        self.taken = end;
        if flush {
            encoder.handle_flush();
        }
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(chunk) = self.encoder.as_mut().and_then(StreamEncoder::poll_chunk) {
            self.sent_bytes += chunk.len() as u64;
            self.channel.push_back(chunk);
        }
    }

    /// Answers the disk, which is about to overwrite what pages may be named by.
    pub fn is_asked(&mut self, disk: &mut DiskWay) {
        if self.broken == Some(Broken::DoesNotAsk) {
            while disk.mirror.poll_overwriting().is_some() {
                disk.mirror.handle_released();
            }
        }
        if let Some(blocks) = disk.mirror.poll_overwriting() {
            let until = self.encoder.as_mut().and_then(|encoder| encoder.handle_overwriting(0, &blocks));
            self.collect();
            self.asked = Some(until.unwrap_or_default());
        }
        self.is_acknowledged(disk);
    }

    /// A chunk is acknowledged by asking for the one behind it.
    fn is_acknowledged(&mut self, disk: &mut DiskWay) {
        let Some(encoder) = &mut self.encoder else { return };
        let taken = ByteCount(self.taken_bytes);
        encoder.handle_acknowledged(taken);
        self.collect();
        if self.asked.is_some_and(|until| taken >= until) {
            self.asked = None;
            disk.mirror.handle_released();
        }
    }

    pub fn arrives(&mut self, disk: &DiskWay) {
        let waits = self.waits_for.is_some_and(|records| disk.applied_records() < records);
        if waits || self.refused.is_some() {
            return;
        }
        self.waits_for = None;
        if let Some(wanted) = self.wanted.take() {
            let Some(found) = disk.pages_at(&wanted) else {
                self.refused = Some(Refused::Unread);
                return;
            };
            self.decoder.handle_found(found);
        } else if !self.amid {
            let Some(chunk) = self.channel.pop_front() else { return };
            let chunk = arrived(chunk, self.flip.take());
            self.begun.get_or_insert_with(|| Begun::of(&chunk));
            self.taken_bytes += self.taking_bytes;
            self.taking_bytes = chunk.len() as u64;
            self.decoder.handle_chunk(chunk);
        }
        self.amid = true;
        self.refused = self.decode().err().map(Refused::Decoder);
    }

    fn decode(&mut self) -> Result<(), DecodeError> {
        while let Some(decoded) = self.decoder.poll_decoded()? {
            match decoded {
                Decoded::Bytes(bytes) => {
                    let wrote = self.stream.bytes.get(self.made..self.made + bytes.len());
                    self.differs |= wrote != Some(&bytes[..]);
                    self.made += bytes.len();
                }
                Decoded::Disks(records) => {
                    self.waits_for = records.first().copied();
                    return Ok(());
                }
                Decoded::Wanted(places) => {
                    self.wanted = Some(places);
                    return Ok(());
                }
                Decoded::End(_) => {
                    self.is_proven = true;
                    self.taken_bytes += self.taking_bytes;
                }
            }
        }
        self.amid = false;
        Ok(())
    }

    /// A bit of the chunk that arrives next is another one.
    pub fn flips(&mut self, random: &mut Random) {
        self.flip = Some(random.next());
    }

    /// Pages that were named by the disk.
    pub fn disk_pages(&self) -> u64 {
        self.encoder.as_ref().map_or(0, |encoder| encoder.counters().disk_pages)
    }

    /// What each end remembers.
    pub fn into_remembered(self) -> Option<[Remembered; 2]> {
        Some([self.encoder?.into_remembered(), self.decoder.into_remembered()])
    }
}

/// What a stream costs that begins with nothing.
pub fn whole_bytes(stream: &[u8]) -> u64 {
    let config = EncoderConfig::for_chunks_of(EncoderConfig::MIN_CHUNK);
    let mut encoder = StreamEncoder::new(config).expect("memory for an encoder");
    encoder.handle_bytes(stream);
    encoder.handle_end();
    encoder.counters().wire_bytes
}
