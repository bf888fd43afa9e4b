//! What a destination already has of a disk, told to the source block by block.
//!
//! ```text
//!  chunk = version u8 | flags u8 | first block u64 | runs u32 | run...
//!  run   = skipped u32 | told u32 | hint [16] for each told block
//! ```
//!
//! Integers are little-endian, blocks are told in order and once. Flag 1 says that the disk was made just
//! now and reads as zeros. Without runs that is the whole map; with runs they tell what the destination can
//! put there from a copy that it keeps. A hint is the beginning of the block's BLAKE3 hash. It proves
//! nothing: the source sends the whole hash of what it has, and the destination hashes its block again.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};

use super::BLOCK;

/// The most blocks that one chunk tells of by hints: 32 KiB of them, 128 MiB of disk.
pub const MAX_HINTS: usize = 2048;

const VERSION: u8 = 1;
const FLAG_NEW: u8 = 1;
const HEADER: usize = 14;
/// What a run costs in memory beside its hints, in bytes.
const RUN_COST: u64 = 96;

/// The beginning of a block's BLAKE3 hash.
type Hint = [u8; 16];

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
    first: u64,
    next: u64,
    runs: Vec<(u32, Vec<Hint>)>,
    hints: usize,
}

impl MapWriter {
    /// The map of a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { blocks: size.div_ceil(BLOCK), flags: 0, first: 0, next: 0, runs: Vec::new(), hints: 0 }
    }

    /// The map of a disk of `size` bytes that was made just now and reads as zeros, where a kept copy of it
    /// is told of: zeros need not be sent, and neither need what the copy holds.
    pub fn of_copy_beside_new_disk(size: u64) -> Self {
        Self { flags: FLAG_NEW, ..Self::new(size) }
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

    /// The next block holds what has this BLAKE3 hash.
    pub fn tell(&mut self, hash: &[u8; 32]) {
        if self.runs.is_empty() {
            self.runs.push((0, Vec::new()));
        }
        if let Some((_, hints)) = self.runs.last_mut()
            && self.next < self.blocks
        {
            hints.push(hint(hash));
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
        for (skipped, hints) in self.runs.drain(..) {
            chunk.extend(skipped.to_le_bytes());
            chunk.extend((hints.len() as u32).to_le_bytes());
            hints.iter().for_each(|hint| chunk.extend(hint));
        }
        self.first = self.next;
        self.hints = 0;
        chunk.into()
    }
}

/// What the source has been told of the destination's disk.
#[derive(Debug)]
pub(super) struct BlockMap {
    blocks: u64,
    told: u64,
    new: bool,
    runs: BTreeMap<u64, Vec<Hint>>,
    bytes: u64,
    max_bytes: u64,
}

impl BlockMap {
    /// A map of a disk of `blocks` blocks that takes at most `max_bytes` of memory: hints beyond it are
    /// forgotten.
    pub(super) fn new(blocks: u64, max_bytes: u64) -> Self {
        Self { blocks, told: 0, new: false, runs: BTreeMap::new(), bytes: 0, max_bytes }
    }

    /// Takes the next chunk. After an error nothing of the chunk is believed.
    pub(super) fn add(&mut self, mut chunk: Bytes) -> Result<(), MapError> {
        if chunk.len() < HEADER {
            return Err(MapError::Length);
        }
        let (version, flags) = (chunk.get_u8(), chunk.get_u8());
        let (first, count) = (chunk.get_u64_le(), chunk.get_u32_le());
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
        let place = |end| MapError::Place { first, end, expected: self.told, blocks: self.blocks };
        if first != self.told {
            return Err(place(first));
        }
        let (runs, end) = read_runs(first, count, chunk)?;
        if end > self.blocks {
            return Err(place(end));
        }
        self.told = end;
        self.new |= flags == FLAG_NEW;
        for (block, hints) in runs {
            let cost = RUN_COST + hints.len() as u64 * size_of::<Hint>() as u64;
            if self.bytes + cost <= self.max_bytes {
                self.bytes += cost;
                self.runs.insert(block, hints);
            }
        }
        Ok(())
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

    /// Whether the destination may have a block with this hash, in its disk or, if that is new, beside it.
    pub(super) fn may_have(&self, block: u64, hash: impl FnOnce() -> [u8; 32]) -> Option<[u8; 32]> {
        let (first, hints) = self.runs.range(..=block).next_back()?;
        let told = hints.get((block - first) as usize)?;
        let hash = hash();
        (hint(&hash) == *told).then_some(hash)
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
        if told.saturating_mul(size_of::<Hint>()) > chunk.len() {
            return Err(MapError::Length);
        }
        at = at.saturating_add(u64::from(skipped));
        let mut hints = vec![Hint::default(); told];
        hints.iter_mut().for_each(|hint| chunk.copy_to_slice(hint));
        if told > 0 {
            runs.push((at, hints));
        }
        at = at.saturating_add(told as u64);
    }
    if chunk.is_empty() { Ok((runs, at)) } else { Err(MapError::Length) }
}

fn hint(hash: &[u8; 32]) -> Hint {
    let mut hint = Hint::default();
    hint.copy_from_slice(&hash[..size_of::<Hint>()]);
    hint
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(byte: u8) -> [u8; 32] {
        *blake3::hash(&[byte]).as_bytes()
    }

    proptest! {
        #[test]
        fn what_was_told_is_known_and_nothing_else(
            blocks in prop::collection::vec(prop::option::of(any::<u8>()), 1..200),
            sending in any::<u8>(),
        ) {
            let size = blocks.len() as u64 * BLOCK - 1;
            let (mut writer, mut map) = (MapWriter::new(size), BlockMap::new(blocks.len() as u64, 1 << 20));
            for (index, block) in blocks.iter().enumerate() {
                prop_assert_eq!(writer.next(), Some(index as u64));
                match block {
                    Some(byte) => writer.tell(&hash(*byte)),
                    None => writer.skip(1),
                }
                if index % (sending as usize + 1) == 0 || writer.is_due() {
                    map.add(writer.finish()).unwrap();
                    prop_assert_eq!(map.told(), index as u64 + 1);
                }
            }
            prop_assert_eq!((writer.next(), map.told()), (None, blocks.len() as u64));
            for (index, block) in blocks.iter().enumerate() {
                let known = |byte| map.may_have(index as u64, || hash(byte));
                let other = block.unwrap_or_default().wrapping_add(1);
                prop_assert_eq!(block.map(known), block.map(|byte| Some(hash(byte))));
                prop_assert_eq!(known(other), None);
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
        let mut writer = MapWriter::new(100 * BLOCK);
        writer.skip(60);
        let early = writer.finish();
        writer.skip(40);
        let late = writer.finish();
        let mut map = BlockMap::new(100, 1 << 20);
        assert!(matches!(map.add(late.clone()), Err(MapError::Place { expected: 0, first: 60, .. })));
        map.add(early.clone()).unwrap();
        assert!(matches!(map.add(early), Err(MapError::Place { expected: 60, .. })));
        assert!(matches!(map.add(MapWriter::of_new_disk()), Err(MapError::Format)));
        let mut beside = MapWriter::of_copy_beside_new_disk(100 * BLOCK);
        beside.skip(100);
        assert!(matches!(map.add(beside.finish()), Err(MapError::Format)), "it was not new before");
        map.add(late).unwrap();
        let mut small = BlockMap::new(50, 1 << 20);
        let mut writer = MapWriter::new(60 * BLOCK);
        writer.skip(60);
        assert!(matches!(small.add(writer.finish()), Err(MapError::Place { end: 60, blocks: 50, .. })));
    }

    #[test]
    fn the_encoding_is_pinned() {
        let mut writer = MapWriter::new(10 * BLOCK);
        writer.skip(3);
        writer.tell(&[9; 32]);
        let mut expected = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0];
        expected.extend([9; 16]);
        assert_eq!(writer.finish(), expected);
        assert_eq!(MapWriter::of_new_disk(), [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..]);
    }

    #[test]
    fn a_copy_beside_a_new_disk_is_told_of_and_an_error_leaves_the_disk_unknown() {
        let mut writer = MapWriter::of_copy_beside_new_disk(10 * BLOCK);
        writer.skip(3);
        writer.tell(&hash(1));
        let first = writer.finish();
        assert_eq!(first[..2], [VERSION, FLAG_NEW]);
        writer.tell(&hash(2));
        writer.skip(5);
        let mut map = BlockMap::new(10, 1 << 20);
        map.add(first.clone()).unwrap();
        assert!(map.is_new() && map.told() == 4);
        map.add(writer.finish()).unwrap();
        assert_eq!((map.told(), map.may_have(4, || hash(2))), (10, Some(hash(2))));
        assert!(map.may_have(3, || hash(1)).is_some() && map.may_have(5, || hash(2)).is_none());
        let mut small = BlockMap::new(3, 1 << 20);
        small.add(first).unwrap_err();
        assert!(!small.is_new());
    }

    #[test]
    fn hints_beyond_the_memory_for_them_are_forgotten() {
        let mut map = BlockMap::new(1000, RUN_COST + 10 * 16);
        let mut writer = MapWriter::new(1000 * BLOCK);
        (0..10).for_each(|_| writer.tell(&hash(1)));
        map.add(writer.finish()).unwrap();
        writer.tell(&hash(1));
        map.add(writer.finish()).unwrap();
        assert_eq!(map.told(), 11);
        assert!(map.may_have(9, || hash(1)).is_some() && map.may_have(10, || hash(1)).is_none());
    }

    #[test]
    fn a_chunk_is_due_before_it_is_too_long_for_a_channel() {
        let mut writer = MapWriter::new(u64::MAX / 2);
        while !writer.is_due() {
            writer.skip(1);
            writer.tell(&hash(1));
        }
        assert!(writer.finish().len() < 64 << 10);
        writer.skip(u64::MAX);
        assert_eq!(writer.next(), None);
    }
}
