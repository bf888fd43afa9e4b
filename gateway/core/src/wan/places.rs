//! What stands on the machine's disks at both sites, so that a page of memory that holds the same is named and not sent.
//!
//! ```text
//!  disk's mirror  notes what it sends -> DiskPlaces --given when memory begins--> Places, at the memory's encoder
//!                 is about to overwrite a block that it gave --asks-->  is a name of it on its way?  --released--> sends
//! ```
//!
//! A name says where, and not what: the destination reads its own disk there. It is right because both wait: the destination
//! does not read a name before it has applied what was sent when the places were given, and the source does not overwrite a
//! block before all names of it were read. That all of it was right is part of what the stream's digest proves.
//!
//! Deliberately not here: asking and reading, which the gateway does, and zeros, which need no place.

use std::collections::{BTreeMap, BTreeSet};

use crate::disk::BLOCK;
use crate::memory::PAGE_BYTES;

/// Pages that one block of a disk holds.
const PAGES_PER_BLOCK: u32 = (BLOCK / PAGE_BYTES as u64) as u32;

/// The first half of a BLAKE3 hash: enough that no two contents of one machine share it.
pub(super) type PageHash = [u8; 16];

/// The hash of [`PAGE_BYTES`] bytes.
pub(super) fn page_hash(page: &[u8]) -> PageHash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&blake3::hash(page).as_bytes()[..16]);
    hash
}

/// A place on one of the machine's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The disk's index in the machine's definition.
    pub disk: u8,
    /// Its offset on the disk, in units of [`PAGE_BYTES`].
    pub part: u32,
}

/// Where on one disk pages stand. Of equal ones, one is known.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DiskPlaces {
    parts: BTreeMap<PageHash, u32>,
    hashes: BTreeMap<u32, PageHash>,
    room: usize,
}

impl GivenPlaces {
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

impl DiskPlaces {
    /// Memory for each page that is known, in bytes. What was named lately costs up to half of it more.
    pub const BYTES_PER_PAGE: u64 = 80;

    /// Room for so many pages; what comes when it is full is not known.
    pub fn with_room(pages: usize) -> Self {
        Self { room: pages, ..Self::default() }
    }

    /// `content` is sent for byte `offset` and what follows. Parts that it does not cover whole are forgotten.
    pub fn note(&mut self, offset: u64, content: &[u8]) {
        self.forget(offset, content.len() as u64);
        let skipped = (offset.next_multiple_of(PAGE_BYTES as u64) - offset) as usize;
        let Some(whole) = content.get(skipped..) else { return };
        let first = (offset + skipped as u64) / PAGE_BYTES as u64;
        for (part, page) in (first..).zip(whole.chunks_exact(PAGE_BYTES)) {
            if self.parts.len() >= self.room {
                return;
            }
            // The last number is no place: a range that ends behind it has none.
            let Some(part) = u32::try_from(part).ok().filter(|part| *part < u32::MAX) else { return };
            let hash = page_hash(page);
            if let std::collections::btree_map::Entry::Vacant(free) = self.parts.entry(hash) {
                free.insert(part);
                self.hashes.insert(part, hash);
            }
        }
    }

    /// Something else stands there from now on.
    pub fn forget(&mut self, offset: u64, len: u64) {
        let first = offset / PAGE_BYTES as u64;
        let end = (offset + len).div_ceil(PAGE_BYTES as u64);
        let Ok(first) = u32::try_from(first) else { return };
        let end = u32::try_from(end).unwrap_or(u32::MAX);
        while let Some((&part, hash)) = self.hashes.range(first..end).next() {
            self.parts.remove(hash);
            self.hashes.remove(&part);
        }
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The blocks in which pages are known.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = u64> {
        self.hashes.keys().map(|part| u64::from(part / PAGES_PER_BLOCK))
    }

    fn find(&self, hash: &PageHash) -> Option<u32> {
        self.parts.get(hash).copied()
    }
}

/// What one disk's mirror gave when memory began.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GivenPlaces {
    /// Where pages stand.
    pub places: DiskPlaces,
    /// They do once the destination has applied so many of the disk's records.
    pub after_records: u64,
}

/// Whether blocks were named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// No name of them is on its way.
    No,
    /// All of them are in chunks, within so many bytes of the stream.
    Until(u64),
    /// Some may not be in a chunk yet.
    Lately,
}

/// The places on all of a machine's disks, and which of them were named without that the destination is known to have read
/// them. At the source.
#[derive(Debug, Default)]
pub(super) struct Places {
    disks: Vec<DiskPlaces>,
    /// Named before the chunks of `older_until` bytes of the stream were closed.
    older: BTreeSet<(u8, u64)>,
    older_until: u64,
    /// Named since.
    newer: BTreeSet<(u8, u64)>,
}

impl Places {
    pub(super) fn new(disks: Vec<DiskPlaces>) -> Self {
        Self { disks, ..Self::default() }
    }

    /// Where a page with this hash stands; it counts as named.
    pub(super) fn name(&mut self, hash: &PageHash) -> Option<Place> {
        let found = self.disks.iter().enumerate().find_map(|(disk, places)| Some((disk, places.find(hash)?)));
        let (disk, part) = found?;
        let disk = u8::try_from(disk).ok()?;
        self.newer.insert((disk, u64::from(part / PAGES_PER_BLOCK)));
        Some(Place { disk, part })
    }

    /// Whether there is anything to name pages by.
    pub(super) fn can_name(&self) -> bool {
        !self.disks.is_empty()
    }

    /// Nothing is named any more.
    pub(super) fn end(&mut self) {
        self.disks.clear();
    }

    /// Whether something can be named, or a name may not have been read.
    pub(super) fn is_over(&self) -> bool {
        self.disks.is_empty() && self.older.is_empty() && self.newer.is_empty()
    }

    /// These blocks are about to be overwritten: whether one of them may still have to be read.
    pub(super) fn forget(&mut self, disk: u8, blocks: &BTreeSet<u64>) -> Named {
        if let Some(places) = self.disks.get_mut(usize::from(disk)) {
            blocks.iter().for_each(|block| places.forget(block * BLOCK, BLOCK));
        }
        let any_of = |named: &BTreeSet<(u8, u64)>| blocks.iter().any(|block| named.contains(&(disk, *block)));
        match (any_of(&self.newer), any_of(&self.older)) {
            (true, _) => Named::Lately,
            (false, true) => Named::Until(self.older_until),
            (false, false) => Named::No,
        }
    }

    /// How many blocks were named since the last [`Self::chunk_closed`].
    pub(super) fn named_since(&self) -> usize {
        self.newer.len()
    }

    /// Whether names wait behind which no chunk was closed, and those before them have been read.
    pub(super) fn wants_closing(&self) -> bool {
        self.older.is_empty() && !self.newer.is_empty()
    }

    /// All names so far are within the first `wire_bytes` of the stream.
    pub(super) fn chunk_closed(&mut self, wire_bytes: u64) {
        if self.wants_closing() {
            self.older = std::mem::take(&mut self.newer);
            self.older_until = wire_bytes;
        }
    }

    /// The destination has read so much of the stream.
    pub(super) fn acknowledged(&mut self, wire_bytes: u64) {
        if wire_bytes >= self.older_until {
            self.older.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_BYTES]
    }

    fn hash(byte: u8) -> PageHash {
        page_hash(&page(byte))
    }

    #[test]
    fn whole_parts_are_known_until_something_else_is_written_to_them() {
        let mut places = DiskPlaces::with_room(8);
        let content = [page(1), page(2), page(3)].concat();
        places.note(512, &content);
        assert_eq!(places.find(&hash(1)), None, "no part holds it whole");
        places.note(PAGE, &content);
        assert_eq!([1, 2, 3].map(|byte| places.find(&hash(byte))), [Some(1), Some(2), Some(3)]);
        places.forget(2 * PAGE + 100, 1);
        assert_eq!([1, 2, 3].map(|byte| places.find(&hash(byte))), [Some(1), None, Some(3)]);
        places.note(PAGE, &page(3));
        assert_eq!([1, 3].map(|byte| places.find(&hash(byte))), [None, Some(3)]);
        assert_eq!(places.blocks().collect::<Vec<_>>(), [0]);
        places.forget(3 * PAGE, PAGE);
        assert_eq!(places, DiskPlaces::with_room(8), "one place of equal ones is known");
    }

    #[test]
    fn what_finds_no_room_is_not_known() {
        let mut places = DiskPlaces::with_room(1);
        places.note(0, &[page(1), page(2)].concat());
        assert_eq!([1, 2].map(|byte| places.find(&hash(byte))), [Some(0), None]);
        let mut empty = DiskPlaces::with_room(1);
        for too_far in [u64::from(u32::MAX), u64::from(u32::MAX) + 1] {
            empty.note(too_far * PAGE, &page(1));
            assert_eq!(empty.find(&hash(1)), None);
        }
        let last = u64::from(u32::MAX - 1);
        empty.note(last * PAGE, &page(1));
        assert_eq!(empty.find(&hash(1)), Some(u32::MAX - 1));
        empty.forget(last * PAGE, 1);
        assert_eq!(empty.find(&hash(1)), None);
    }

    #[test]
    fn a_block_is_held_back_until_its_names_were_read() {
        let mut disk = DiskPlaces::with_room(8);
        disk.note(BLOCK, &page(1));
        let mut places = Places::new(vec![DiskPlaces::default(), disk]);
        let blocks = BTreeSet::from([1]);
        assert_eq!(places.name(&hash(2)), None);
        assert_eq!(places.name(&hash(1)), Some(Place { disk: 1, part: 16 }));
        assert_eq!(places.forget(0, &blocks), Named::No, "another disk");
        assert_eq!(places.forget(1, &blocks), Named::Lately);
        assert_eq!(places.name(&hash(1)), None, "it is not named again");
        places.chunk_closed(100);
        places.acknowledged(99);
        assert_eq!(places.forget(1, &blocks), Named::Until(100));
        places.end();
        assert!(!places.is_over());
        places.acknowledged(100);
        assert!(places.forget(1, &blocks) == Named::No && places.is_over());
    }
}
