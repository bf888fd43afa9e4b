//! The pages that both ends of a stream remember, each in its newest version, so that a page can be told by what it was, or
//! by another one that is the same.
//!
//! Both ends do the same things in the order of the stream. Which page is forgotten for a new one follows from the order in
//! which pages came and from nothing else: a ring, in which a page that is sent again keeps its place. What it takes is
//! bounded by the number of pages that both sites allow.
//!
//! Deliberately not here: whether a page is worth telling by another one. That is the source's to decide (`encode`).

use std::collections::BTreeMap;
use std::sync::OnceLock;

use crate::memory::PAGE_BYTES;

/// Blocks of memory whose pages are remembered; QEMU has a handful.
const MAX_BLOCKS: usize = 64;

/// A page's place in the machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PageKey {
    /// The number of its block, by first appearance in the stream.
    block: u8,
    /// Its number in the block.
    page: u64,
}

/// The blocks that the stream has named, and the one that its records are of.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Blocks {
    names: Vec<Box<[u8]>>,
    current: Option<u8>,
}

impl Blocks {
    /// A record names its block, or is of the block of the record before it.
    pub(super) fn enter(&mut self, name: Option<&[u8]>) {
        let Some(name) = name else { return };
        let known = self.names.iter().position(|known| **known == *name);
        let number = known.or_else(|| {
            (self.names.len() < MAX_BLOCKS).then(|| {
                self.names.push(name.into());
                self.names.len() - 1
            })
        });
        self.current = number.and_then(|number| u8::try_from(number).ok());
    }

    /// The present block's name.
    pub(super) fn current(&self) -> Option<&[u8]> {
        self.names.get(usize::from(self.current?)).map(|name| &**name)
    }

    /// A page of the present block; none if the stream has named no block, or too many.
    pub(super) fn key(&self, page: u64) -> Option<PageKey> {
        Some(PageKey { block: self.current?, page })
    }
}

/// A page's place in the shadow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(pub u32);

/// The remembered pages.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Shadow {
    capacity: usize,
    pages: Vec<Box<[u8]>>,
    keys: Vec<PageKey>,
    slots: BTreeMap<PageKey, Slot>,
    /// The place that is given away next, once all are taken.
    oldest: usize,
}

impl Shadow {
    /// Room for so many pages; memory is taken as they come.
    pub(super) fn new(capacity: u32) -> Self {
        Self { capacity: capacity as usize, ..Self::default() }
    }

    /// Where a page is.
    pub(super) fn slot(&self, key: PageKey) -> Option<Slot> {
        self.slots.get(&key).copied()
    }

    /// What is there: [`PAGE_BYTES`] bytes.
    pub(super) fn page(&self, slot: Slot) -> Option<&[u8]> {
        self.pages.get(slot.0 as usize).map(|page| &**page)
    }

    /// A page's newest version; where it is now, if there is room for any.
    pub(super) fn put(&mut self, key: PageKey, content: &[u8]) -> Option<Slot> {
        debug_assert_eq!(content.len(), PAGE_BYTES);
        if let Some(slot) = self.slot(key) {
            self.pages[slot.0 as usize].copy_from_slice(content);
            return Some(slot);
        }
        let slot = match self.pages.len() < self.capacity {
            true => {
                self.pages.push(content.into());
                self.keys.push(key);
                self.pages.len() - 1
            }
            false => self.replace(key, content)?,
        };
        let slot = Slot(u32::try_from(slot).ok()?);
        self.slots.insert(key, slot);
        Some(slot)
    }

    /// A page holds zeros now. One that is not remembered is not worth a place.
    pub(super) fn clear(&mut self, key: PageKey) {
        if let Some(slot) = self.slot(key) {
            self.pages[slot.0 as usize].fill(0);
        }
    }

    fn replace(&mut self, key: PageKey, content: &[u8]) -> Option<usize> {
        let slot = self.oldest;
        let place = self.keys.get_mut(slot)?;
        self.slots.remove(place);
        *place = key;
        self.pages[slot].copy_from_slice(content);
        self.oldest = (slot + 1) % self.capacity;
        Some(slot)
    }
}

/// What one end of a stream remembered at its end: where the next stream between the same two sites can begin, if the other
/// end remembers the same.
#[derive(Debug, Default)]
pub struct Remembered {
    blocks: Blocks,
    shadow: Shadow,
    /// Once it was asked for: a gigabyte takes a while to hash.
    digest: OnceLock<[u8; 32]>,
}

impl PartialEq for Remembered {
    fn eq(&self, other: &Self) -> bool {
        (&self.blocks, &self.shadow) == (&other.blocks, &other.shadow)
    }
}

impl Remembered {
    pub(super) fn new(blocks: Blocks, shadow: Shadow) -> Self {
        Self { blocks, shadow, digest: OnceLock::new() }
    }

    /// Room for so many pages, none of them there.
    pub fn with_room(pages: u32) -> Self {
        Self::new(Blocks::default(), Shadow::new(pages))
    }

    /// The pages in their order: the name of the block, the page's number in it, its contents.
    pub fn pages(&self) -> impl Iterator<Item = (&[u8], u64, &[u8])> {
        let name =
            |key: &PageKey| self.blocks.names.get(usize::from(key.block)).map_or(&[][..], |name| &**name);
        self.shadow.keys.iter().zip(&self.shadow.pages).map(move |(key, page)| (name(key), key.page, &**page))
    }

    /// Adds the next page; false if there is no room, or it is no page.
    pub fn put(&mut self, block: &[u8], page: u64, content: &[u8]) -> bool {
        self.digest = OnceLock::new();
        self.blocks.enter(Some(block));
        let Some(key) = self.blocks.key(page).filter(|_| content.len() == PAGE_BYTES) else { return false };
        self.shadow.pages.len() < self.shadow.capacity && self.shadow.put(key, content).is_some()
    }

    /// BLAKE3 of all of it: two ends with the same digest remember the same.
    pub fn digest(&self) -> [u8; 32] {
        *self.digest.get_or_init(|| self.hash())
    }

    fn hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for (block, page, content) in self.pages() {
            hasher.update(&[block.len() as u8]).update(block).update(&page.to_be_bytes()).update(content);
        }
        *hasher.finalize().as_bytes()
    }

    /// The same with room for `capacity` pages, the first of them: alike at both ends.
    pub(super) fn begin(self, capacity: u32) -> (Blocks, Shadow) {
        let mut begun = Self::with_room(capacity);
        for (block, page, content) in self.pages().take(capacity as usize) {
            begun.put(block, page, content);
        }
        (Blocks { current: None, ..begun.blocks }, begun.shadow)
    }
}

/// Finds a remembered page by its contents. Only a hint: a place may hold something else by now, so the contents are
/// compared. The last page of a hash's bucket is found, others are not.
#[derive(Debug)]
pub(super) struct Finder {
    /// A slot's number and one, or zero.
    buckets: Vec<u32>,
}

impl Finder {
    /// For a shadow of so many pages.
    pub(super) fn new(capacity: u32) -> Self {
        // Four for each page: of a full shadow nine in ten are found.
        let buckets = if capacity == 0 { 0 } else { (capacity as usize * 4).next_power_of_two() };
        Self { buckets: vec![0; buckets] }
    }

    /// Where a page with this hash was put.
    pub(super) fn find(&self, hash: u64) -> Option<Slot> {
        let found = *self.buckets.get(self.bucket(hash)?)?;
        found.checked_sub(1).map(Slot)
    }

    /// A page with this hash is there.
    pub(super) fn note(&mut self, hash: u64, slot: Slot) {
        if let Some(bucket) = self.bucket(hash) {
            self.buckets[bucket] = slot.0 + 1;
        }
    }

    fn bucket(&self, hash: u64) -> Option<usize> {
        let mask = self.buckets.len().checked_sub(1)?;
        Some(hash as usize & mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(page: u64) -> PageKey {
        PageKey { block: 0, page }
    }

    fn content(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_BYTES]
    }

    #[test]
    fn the_oldest_page_makes_room_and_one_that_came_again_keeps_its_place() {
        let mut shadow = Shadow::new(2);
        let first = shadow.put(key(1), &content(1)).unwrap();
        shadow.put(key(2), &content(2)).unwrap();
        assert_eq!(shadow.put(key(1), &content(3)), Some(first));
        assert_eq!(shadow.put(key(3), &content(4)), Some(first), "it is the oldest all the same");
        assert_eq!((shadow.slot(key(1)), shadow.slot(key(3))), (None, Some(first)));
        assert_eq!(shadow.page(first), Some(&*content(4)));
        assert_eq!(shadow.put(key(1), &content(5)), Some(Slot(1)), "then the next");
        assert_eq!(shadow.slot(key(2)), None);
    }

    #[test]
    fn without_room_nothing_is_remembered() {
        let mut shadow = Shadow::new(0);
        assert_eq!(shadow.put(key(1), &content(1)), None);
        assert_eq!(shadow.page(Slot(0)), None);
        let mut finder = Finder::new(0);
        finder.note(7, Slot(0));
        assert_eq!(finder.find(7), None);
    }

    #[test]
    fn what_is_remembered_is_the_same_after_it_was_taken_apart_and_has_the_same_digest() {
        let mut blocks = Blocks::default();
        let mut shadow = Shadow::new(3);
        for (block, page) in [("pc.ram", 7), ("vga", 1), ("pc.ram", 9), ("pc.ram", 2)] {
            blocks.enter(Some(block.as_bytes()));
            shadow.put(blocks.key(page).unwrap(), &content(page as u8));
        }
        let kept = Remembered::new(blocks, shadow);
        let mut again = Remembered::with_room(3);
        for (block, page, content) in kept.pages() {
            assert!(again.put(block, page, content));
        }
        assert_eq!(kept.pages().map(|(_, page, _)| page).collect::<Vec<_>>(), [2, 1, 9]);
        assert_eq!(again.digest(), kept.digest());
        assert!(!again.put(b"pc.ram", 3, &content(3)), "full");
        assert!(!Remembered::with_room(1).put(b"pc.ram", 3, &[1, 2]), "no page");
        let (_, begun) = again.begin(2);
        assert_eq!((begun.pages.len(), begun.capacity), (2, 2));
        assert_ne!(Remembered::default().digest(), kept.digest());
    }

    #[test]
    fn only_a_remembered_page_is_cleared() {
        let mut shadow = Shadow::new(4);
        let slot = shadow.put(key(1), &content(9)).unwrap();
        shadow.clear(key(1));
        shadow.clear(key(2));
        assert_eq!(shadow.page(slot), Some(&*content(0)));
        assert_eq!(shadow.slot(key(2)), None);
    }

    #[test]
    fn blocks_are_told_apart_up_to_their_limit() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.key(0), None, "none was named");
        for number in 0..MAX_BLOCKS {
            blocks.enter(Some(format!("block{number}").as_bytes()));
            assert!(blocks.key(0).is_some());
        }
        blocks.enter(Some(b"one more"));
        assert_eq!(blocks.key(0), None);
        blocks.enter(Some(b"block1"));
        assert_eq!(blocks.key(5), Some(PageKey { block: 1, page: 5 }));
        blocks.enter(None);
        assert_eq!(blocks.key(5), Some(PageKey { block: 1, page: 5 }));
    }
}
