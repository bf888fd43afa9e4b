//! A set of block numbers with a known count. It does not know what a block is.

/// One bit per block of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    blocks: u64,
    set: u64,
}

impl Bitmap {
    /// A bitmap of `blocks` bits, all `value`.
    pub fn new(blocks: u64, value: bool) -> Self {
        let mut bitmap = Self { words: vec![0; blocks.div_ceil(64) as usize], blocks, set: 0 };
        if value {
            bitmap.words.fill(u64::MAX);
            if !blocks.is_multiple_of(64) {
                // Bits beyond the last block stay clear, so that whole words can be searched.
                bitmap.words[(blocks / 64) as usize] = (1 << (blocks % 64)) - 1;
            }
            bitmap.set = blocks;
        }
        bitmap
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Whether the bit of `block` is set; false beyond the last block.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Sets the bit of `block`; true if it was clear. Blocks beyond the last are ignored.
    pub fn insert(&mut self, block: u64) -> bool {
        let fresh = block < self.blocks && !self.contains(block);
        if fresh {
            self.words[(block / 64) as usize] |= 1 << (block % 64);
            self.set += 1;
        }
        fresh
    }

    /// Clears the bit of `block`; true if it was set.
    pub fn remove(&mut self, block: u64) -> bool {
        let was_set = self.contains(block);
        if was_set {
            self.words[(block / 64) as usize] &= !(1 << (block % 64));
            self.set -= 1;
        }
        was_set
    }

    /// The first set bit at or after `block`.
    pub fn next_set(&self, block: u64) -> Option<u64> {
        let mut index = (block / 64) as usize;
        let mut word = self.words.get(index)? & (u64::MAX << (block % 64));
        loop {
            if word != 0 {
                return Some(index as u64 * 64 + u64::from(word.trailing_zeros()));
            }
            index += 1;
            word = *self.words.get(index)?;
        }
    }

    /// How many bits in a row are set from `block` on, at most `limit`.
    pub fn run(&self, block: u64, limit: u64) -> u64 {
        (block..block.saturating_add(limit)).take_while(|at| self.contains(*at)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_bitmap_ends_at_the_last_block() {
        for blocks in [0, 1, 63, 64, 65, 130] {
            let full = Bitmap::new(blocks, true);
            assert_eq!((full.count(), full.run(0, 1000)), (blocks, blocks));
            assert_eq!(full.next_set(blocks), None);
        }
    }

    proptest! {
        #[test]
        fn a_bitmap_is_a_set(ops in prop::collection::vec((0..200u64, any::<bool>()), 0..300)) {
            let (mut bitmap, mut model) = (Bitmap::new(150, false), BTreeSet::new());
            for (block, insert) in ops {
                if insert {
                    prop_assert_eq!(bitmap.insert(block), block < 150 && model.insert(block));
                } else {
                    prop_assert_eq!(bitmap.remove(block), model.remove(&block));
                }
                prop_assert_eq!(bitmap.count(), model.len() as u64);
                prop_assert_eq!(bitmap.next_set(block), model.range(block..).next().copied());
            }
        }
    }
}
