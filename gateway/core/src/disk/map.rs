//! What a destination already has of a disk, told to the source block by block.
//!
//! ```text
//!  chunk = version u8 | flags u8 | first block u64 | runs u32 | salt u64 | run...
//!  run   = skipped u32 | told u32 | (hint [16] | part hint [6] for each of 16 parts) for each told block
//! ```
//!
//! Integers are little-endian, blocks are told in order and once. Flag 1 says that the disk was made just
//! now and reads as zeros. Without runs that is the whole map; with runs they tell what the destination can
//! put there from a copy that it keeps. A hint is the beginning of the BLAKE3 hash of a block, or of 4 KiB of it: of a block that
//! changed, only the parts that did need to travel. It proves nothing: the source sends the whole hash of what it has, and the
//! destination hashes what it has again. A part's hint that is right by chance costs the attempt: once in 2^48, and anew each time,
//! since parts are hashed with a key made of the map's salt, which no guest knows.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};

use super::BLOCK;

/// The most blocks that one chunk tells of by hints: 224 KiB of them, 128 MiB of disk.
pub const MAX_HINTS: usize = 2048;
/// Bytes of a block that a part's hint tells of.
pub(super) const PART: u64 = 4096;

const PARTS: usize = (BLOCK / PART) as usize;
const VERSION: u8 = 2;
const FLAG_NEW: u8 = 1;
const HEADER: usize = 22;
/// What a run costs in memory beside its hints, in bytes.
const RUN_COST: u64 = 96;

/// The beginnings of the BLAKE3 hashes of a block and of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hint {
    whole: [u8; 16],
    parts: [PartHint; PARTS],
}

type PartHint = [u8; 6];

/// What a hint takes in a chunk.
const HINT_BYTES: usize = 16 + size_of::<PartHint>() * PARTS;

/// What the destination may have of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum There {
    /// Nothing of it.
    Nothing,
    /// All of it; its hash.
    Whole([u8; 32]),
    /// Some of its parts: those with a bit, the first part's is the lowest.
    Parts(u16),
}

/// Why bytes are not the next part of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Bytes are missing or too many.
    #[error("The chunk of the disk's map has a wrong length")]
    Length,
    /// Another version of the format, or flags that this one does not define.
    #[error("The chunk of the disk's map has an unknown format: run the same release at both sites")]
    Format,
    /// It begins at another block than the next, or goes beyond the disk.
    #[error("The chunk of the disk's map tells of blocks {first} to {end}, expected {expected} to {blocks}")]
    Place {
        /// Its first block.
        first: u64,
        /// The block behind its last.
        end: u64,
        /// The next block to be told of.
        expected: u64,
        /// How many the disk has.
        blocks: u64,
    },
}

/// Writes the map of one disk, at the destination.
#[derive(Debug)]
pub struct MapWriter {
    blocks: u64,
    flags: u8,
    salt: u64,
    first: u64,
    next: u64,
    runs: Vec<(u32, Vec<Hint>)>,
    hints: usize,
}

impl MapWriter {
    /// The map of a disk of `size` bytes; `salt` is random.
    pub fn new(size: u64, salt: u64) -> Self {
        Self { blocks: size.div_ceil(BLOCK), flags: 0, salt, first: 0, next: 0, runs: Vec::new(), hints: 0 }
    }

    /// The map of a disk of `size` bytes that was made just now and reads as zeros, where a kept copy of it
    /// is told of: zeros need not be sent, and neither need what the copy holds.
    pub fn of_copy_beside_new_disk(size: u64, salt: u64) -> Self {
        Self { flags: FLAG_NEW, ..Self::new(size, salt) }
    }

    /// The whole map of a disk that was made just now and reads as zeros.
    pub fn of_new_disk() -> Bytes {
        let mut chunk = vec![VERSION, FLAG_NEW];
        chunk.extend([0; HEADER - 2]);
        chunk.into()
    }

    /// The next block to be told of, or `None` when all are.
    pub fn next(&self) -> Option<u64> {
        (self.next < self.blocks).then_some(self.next)
    }

    /// Nothing is said of the next `blocks` blocks: they are to be sent, zeros too unless the disk is new.
    pub fn skip(&mut self, blocks: u64) {
        let mut left = blocks.min(self.blocks - self.next);
        self.next += left;
        while left > 0 {
            let part = left.min(u64::from(u32::MAX)) as u32;
            self.runs.push((part, Vec::new()));
            left -= u64::from(part);
        }
    }

    /// The next block holds this.
    pub fn tell(&mut self, content: &[u8]) {
        if self.runs.is_empty() {
            self.runs.push((0, Vec::new()));
        }
        if let Some((_, hints)) = self.runs.last_mut()
            && self.next < self.blocks
        {
            hints.push(Hint::of(content, self.salt));
            self.hints += 1;
            self.next += 1;
        }
    }

    /// A chunk is to be sent now: it is full, or the map is complete.
    pub fn is_due(&self) -> bool {
        !self.runs.is_empty()
            && (self.hints >= MAX_HINTS || self.runs.len() >= MAX_HINTS || self.next >= self.blocks)
    }

    /// The chunk of what was told since the last one.
    pub fn finish(&mut self) -> Bytes {
        let mut chunk = vec![VERSION, self.flags];
        chunk.extend(self.first.to_le_bytes());
        chunk.extend((self.runs.len() as u32).to_le_bytes());
        chunk.extend(self.salt.to_le_bytes());
        for (skipped, hints) in self.runs.drain(..) {
            chunk.extend(skipped.to_le_bytes());
            chunk.extend((hints.len() as u32).to_le_bytes());
            hints.iter().for_each(|hint| hint.write(&mut chunk));
        }
        self.first = self.next;
        self.hints = 0;
        chunk.into()
    }
}

/// Hints of neighbouring blocks. Without room for those of parts these are left out.
#[derive(Debug)]
struct Told {
    wholes: Vec<[u8; 16]>,
    parts: Vec<[PartHint; PARTS]>,
}

/// What the source has been told of the destination's disk.
#[derive(Debug)]
pub(super) struct BlockMap {
    blocks: u64,
    told: u64,
    new: bool,
    runs: BTreeMap<u64, Told>,
    salt: u64,
    bytes: u64,
    max_bytes: u64,
}

impl BlockMap {
    /// A map of a disk of `blocks` blocks that takes at most `max_bytes` of memory: hints beyond it are
    /// forgotten.
    pub(super) fn new(blocks: u64, max_bytes: u64) -> Self {
        Self { blocks, told: 0, new: false, runs: BTreeMap::new(), salt: 0, bytes: 0, max_bytes }
    }

    /// Takes the next chunk. After an error nothing of the chunk is believed.
    pub(super) fn add(&mut self, mut chunk: Bytes) -> Result<(), MapError> {
        if chunk.len() < HEADER {
            return Err(MapError::Length);
        }
        let (version, flags) = (chunk.get_u8(), chunk.get_u8());
        let (first, count, salt) = (chunk.get_u64_le(), chunk.get_u32_le(), chunk.get_u64_le());
        let begins = self.told == 0;
        match (version, flags) {
            (VERSION, 0) => {}
            (VERSION, FLAG_NEW) if begins && count == 0 => {
                (self.new, self.told) = (true, self.blocks);
                return Ok(());
            }
            (VERSION, FLAG_NEW) if (begins || self.new) && count > 0 => {}
            _ => return Err(MapError::Format),
        }
        if !begins && salt != self.salt {
            return Err(MapError::Format);
        }
        let place = |end| MapError::Place { first, end, expected: self.told, blocks: self.blocks };
        if first != self.told {
            return Err(place(first));
        }
        let (runs, end) = read_runs(first, count, chunk)?;
        if end > self.blocks {
            return Err(place(end));
        }
        (self.told, self.salt) = (end, salt);
        self.new |= flags == FLAG_NEW;
        for (block, hints) in runs {
            self.keep(block, &hints);
        }
        Ok(())
    }

    fn keep(&mut self, block: u64, hints: &[Hint]) {
        let cost = |bytes: usize| RUN_COST + (hints.len() * bytes) as u64;
        let left = self.max_bytes - self.bytes;
        // The last quarter of the memory is for whole blocks: they tell more with less.
        let with_parts = cost(HINT_BYTES) <= left.saturating_sub(self.max_bytes / 4);
        let cost = if with_parts { cost(HINT_BYTES) } else { cost(16) };
        if cost > left {
            return;
        }
        self.bytes += cost;
        let wholes = hints.iter().map(|hint| hint.whole).collect();
        let parts = hints.iter().filter(|_| with_parts).map(|hint| hint.parts).collect();
        self.runs.insert(block, Told { wholes, parts });
    }

    /// Nothing more is told: nothing is known of the rest.
    pub(super) fn end(&mut self) {
        self.told = self.blocks;
    }

    /// Blocks before this one were told of.
    pub(super) fn told(&self) -> u64 {
        self.told
    }

    /// The disk was made just now and read as zeros before anything was sent.
    pub(super) fn is_new(&self) -> bool {
        self.new
    }

    /// What the destination may have of a block with this content, in its disk or, if that is new, beside it.
    pub(super) fn may_have(&self, block: u64, content: &[u8]) -> There {
        let Some((first, told)) = self.runs.range(..=block).next_back() else { return There::Nothing };
        let index = (block - first) as usize;
        let Some(whole) = told.wholes.get(index) else { return There::Nothing };
        let hash = *blake3::hash(content).as_bytes();
        if hash[..16] == *whole {
            return There::Whole(hash);
        }
        let Some(parts) = told.parts.get(index) else { return There::Nothing };
        let key = key_of(self.salt);
        let parts = content.chunks(PART as usize).zip(parts);
        let there = parts.enumerate().filter(|(_, (part, told))| part_hint(part, &key) == **told);
        match there.fold(0u16, |bits, (number, _)| bits | 1 << number) {
            // Not if all of them are: then at least one is so by chance.
            bits if bits == 0 || bits.count_ones() as usize == content.len().div_ceil(PART as usize) => {
                There::Nothing
            }
            bits => There::Parts(bits),
        }
    }
}

/// Hints of neighbouring blocks, and the first one's number.
type Run = (u64, Vec<Hint>);

/// The runs with hints, and the block behind the last. Allocates no more than the chunk holds.
fn read_runs(first: u64, count: u32, mut chunk: Bytes) -> Result<(Vec<Run>, u64), MapError> {
    let (mut runs, mut at) = (Vec::new(), first);
    for _ in 0..count {
        let skipped = chunk.try_get_u32_le().map_err(|_| MapError::Length)?;
        let told = chunk.try_get_u32_le().map_err(|_| MapError::Length)? as usize;
        if told.saturating_mul(HINT_BYTES) > chunk.len() {
            return Err(MapError::Length);
        }
        at = at.saturating_add(u64::from(skipped));
        let hints: Vec<Hint> = (0..told).map(|_| Hint::read(&mut chunk)).collect();
        if told > 0 {
            runs.push((at, hints));
        }
        at = at.saturating_add(told as u64);
    }
    if chunk.is_empty() { Ok((runs, at)) } else { Err(MapError::Length) }
}

impl Hint {
    fn of(content: &[u8], salt: u64) -> Self {
        let key = key_of(salt);
        let mut hint = Self { whole: [0; 16], parts: [PartHint::default(); PARTS] };
        hint.whole.copy_from_slice(&blake3::hash(content).as_bytes()[..16]);
        // The disk's last block may have fewer parts.
        for (told, part) in hint.parts.iter_mut().zip(content.chunks(PART as usize)) {
            *told = part_hint(part, &key);
        }
        hint
    }

    fn write(&self, chunk: &mut Vec<u8>) {
        chunk.extend(self.whole);
        self.parts.iter().for_each(|part| chunk.extend(part));
    }

    /// From a chunk that has [`HINT_BYTES`] left.
    fn read(chunk: &mut Bytes) -> Self {
        let mut hint = Self { whole: [0; 16], parts: [PartHint::default(); PARTS] };
        chunk.copy_to_slice(&mut hint.whole);
        hint.parts.iter_mut().for_each(|part| chunk.copy_to_slice(part));
        hint
    }
}

fn key_of(salt: u64) -> [u8; 32] {
    *blake3::hash(&salt.to_le_bytes()).as_bytes()
}

fn part_hint(part: &[u8], key: &[u8; 32]) -> PartHint {
    let mut hint = PartHint::default();
    hint.copy_from_slice(&blake3::keyed_hash(key, part).as_bytes()[..size_of::<PartHint>()]);
    hint
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SALT: u64 = 0x5a17;

    fn content(byte: u8) -> [u8; 3] {
        [byte, 1, 2]
    }

    fn whole(byte: u8) -> There {
        There::Whole(*blake3::hash(&content(byte)).as_bytes())
    }

    proptest! {
        #[test]
        fn what_was_told_is_known_and_nothing_else(
            blocks in prop::collection::vec(prop::option::of(any::<u8>()), 1..200),
            sending in any::<u8>(),
        ) {
            let size = blocks.len() as u64 * BLOCK - 1;
            let (mut writer, mut map) = (MapWriter::new(size, SALT), BlockMap::new(blocks.len() as u64, 1 << 20));
            for (index, block) in blocks.iter().enumerate() {
                prop_assert_eq!(writer.next(), Some(index as u64));
                match block {
                    Some(byte) => writer.tell(&content(*byte)),
                    None => writer.skip(1),
                }
                if index % (sending as usize + 1) == 0 || writer.is_due() {
                    map.add(writer.finish()).unwrap();
                    prop_assert_eq!(map.told(), index as u64 + 1);
                }
            }
            prop_assert_eq!((writer.next(), map.told()), (None, blocks.len() as u64));
            for (index, block) in blocks.iter().enumerate() {
                let known = |byte| map.may_have(index as u64, &content(byte));
                let other = block.unwrap_or_default().wrapping_add(1);
                prop_assert_eq!(block.map(known), block.map(whole));
                prop_assert_eq!(known(other), There::Nothing);
            }
        }

        #[test]
        fn garbage_is_an_error_or_bounded(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200), fix in any::<bool>(),
        ) {
            if fix && bytes.len() > HEADER {
                bytes[..10].copy_from_slice(&[VERSION, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                bytes[10..14].copy_from_slice(&2u32.to_le_bytes());
            }
            let mut map = BlockMap::new(100, 1 << 20);
            let _ = map.add(bytes.into());
            prop_assert!(map.told() <= 100);
        }
    }

    #[test]
    fn a_map_out_of_order_or_beyond_the_disk_is_refused() {
        let mut writer = MapWriter::new(100 * BLOCK, SALT);
        writer.skip(60);
        let early = writer.finish();
        writer.skip(40);
        let late = writer.finish();
        let mut map = BlockMap::new(100, 1 << 20);
        assert!(matches!(map.add(late.clone()), Err(MapError::Place { expected: 0, first: 60, .. })));
        map.add(early.clone()).unwrap();
        assert!(matches!(map.add(early), Err(MapError::Place { expected: 60, .. })));
        assert!(matches!(map.add(MapWriter::of_new_disk()), Err(MapError::Format)));
        let mut beside = MapWriter::of_copy_beside_new_disk(100 * BLOCK, SALT);
        beside.skip(100);
        assert!(matches!(map.add(beside.finish()), Err(MapError::Format)), "it was not new before");
        map.add(late).unwrap();
        let mut small = BlockMap::new(50, 1 << 20);
        let mut writer = MapWriter::new(60 * BLOCK, SALT);
        writer.skip(60);
        assert!(matches!(small.add(writer.finish()), Err(MapError::Place { end: 60, blocks: 50, .. })));
    }

    #[test]
    fn the_encoding_is_pinned() {
        let mut writer = MapWriter::new(10 * BLOCK, SALT);
        writer.skip(3);
        writer.tell(&content(9));
        let mut expected = vec![2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        expected.extend(SALT.to_le_bytes());
        expected.extend([3, 0, 0, 0, 1, 0, 0, 0]);
        let hash = blake3::hash(&content(9));
        expected.extend(&hash.as_bytes()[..16]);
        let key = blake3::hash(&SALT.to_le_bytes());
        expected.extend(&blake3::keyed_hash(key.as_bytes(), &content(9)).as_bytes()[..6]);
        expected.extend([0; 90]);
        assert_eq!(writer.finish(), expected);
        assert_eq!(MapWriter::of_new_disk(), [[2, 1].as_slice(), &[0; 20]].concat());
    }

    #[test]
    fn a_copy_beside_a_new_disk_is_told_of_and_an_error_leaves_the_disk_unknown() {
        let mut writer = MapWriter::of_copy_beside_new_disk(10 * BLOCK, SALT);
        writer.skip(3);
        writer.tell(&content(1));
        let first = writer.finish();
        assert_eq!(first[..2], [VERSION, FLAG_NEW]);
        writer.tell(&content(2));
        writer.skip(5);
        let mut map = BlockMap::new(10, 1 << 20);
        map.add(first.clone()).unwrap();
        assert!(map.is_new() && map.told() == 4);
        map.add(writer.finish()).unwrap();
        assert_eq!((map.told(), map.may_have(4, &content(2))), (10, whole(2)));
        assert_eq!((map.may_have(3, &content(1)), map.may_have(5, &content(2))), (whole(1), There::Nothing));
        let mut small = BlockMap::new(3, 1 << 20);
        small.add(first).unwrap_err();
        assert!(!small.is_new());
    }

    #[test]
    fn hints_beyond_the_memory_for_them_are_forgotten_those_of_parts_first() {
        let mut map = BlockMap::new(1000, RUN_COST + 10 * 16);
        let mut writer = MapWriter::new(1000 * BLOCK, SALT);
        (0..10).for_each(|_| writer.tell(&content(1)));
        map.add(writer.finish()).unwrap();
        writer.tell(&content(1));
        map.add(writer.finish()).unwrap();
        assert_eq!(map.told(), 11);
        assert_eq!((map.may_have(9, &content(1)), map.may_have(10, &content(1))), (whole(1), There::Nothing));
    }

    #[test]
    fn a_chunk_is_due_before_it_is_too_long_for_a_channel() {
        let mut writer = MapWriter::new(u64::MAX / 2, SALT);
        while !writer.is_due() {
            writer.skip(1);
            writer.tell(&content(1));
        }
        assert!(writer.finish().len() < 256 << 10);
        writer.skip(u64::MAX);
        assert_eq!(writer.next(), None);
    }

    #[test]
    fn of_a_block_that_changed_the_parts_that_did_not_are_found() {
        let mut block: Vec<u8> = (0..BLOCK).map(|at| (at / 7) as u8).collect();
        let mut writer = MapWriter::new(2 * BLOCK, SALT);
        writer.tell(&block);
        writer.tell(&block[..PART as usize + 10]);
        let mut map = BlockMap::new(2, 1 << 20);
        map.add(writer.finish()).unwrap();
        assert!(matches!(map.may_have(0, &block), There::Whole(_)));
        block[0] ^= 1;
        block[15 * PART as usize + 3] ^= 1;
        assert_eq!(map.may_have(0, &block), There::Parts(0x7ffe));
        assert_eq!(
            map.may_have(1, &block[..PART as usize + 10]),
            There::Parts(0b10),
            "the disk ends within a part"
        );
        let other: Vec<u8> = block.iter().map(|byte| byte ^ 0x55).collect();
        assert_eq!(map.may_have(0, &other), There::Nothing);
    }

    #[test]
    fn parts_are_told_with_another_key_each_time_and_a_map_has_one() {
        let block = [7; BLOCK as usize];
        let told = |salt| {
            let mut writer = MapWriter::new(2 * BLOCK, salt);
            writer.tell(&block);
            writer
        };
        let (mut one, mut other) = (told(1), told(2));
        let (first, second) = (one.finish(), other.finish());
        assert_eq!(first[HEADER..HEADER + 24], second[HEADER..HEADER + 24], "the whole block's");
        assert_ne!(first[HEADER + 24..], second[HEADER + 24..]);
        let mut map = BlockMap::new(2, 1 << 20);
        map.add(first).unwrap();
        other.skip(1);
        assert!(matches!(map.add(other.finish()), Err(MapError::Format)));
    }
}
