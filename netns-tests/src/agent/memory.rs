//! Touches pages of a memory region so that each page's right content is known.
//!
//! A page's content derives from its number and version ([`super::pattern::fill_page`]); the versions are kept
//! apart from the pages. Does nothing to keep the region out of swap: the guest has none.

use serde::{Deserialize, Serialize};

use super::pattern::{BLOCK_BYTES, fill_page, mix};

/// What the region proves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryVerdict {
    /// Pages in the region.
    pub pages: u64,
    /// Pages whose content is not that of their version.
    pub mismatched: u64,
    /// Numbers of the first few of those.
    pub first_mismatched: Vec<u32>,
}

/// The region.
#[derive(Debug)]
pub struct Region {
    bytes: Vec<u8>,
    versions: Vec<u32>,
    random_bytes: usize,
    draw: u64,
    /// Bytes of pages touched so far.
    pub touched_bytes: u64,
}

impl Region {
    /// A region of `bytes`, every page at version 0. `random_bytes` of each page do not compress.
    #[must_use]
    pub fn new(bytes: u64, random_bytes: usize) -> Self {
        let pages = usize::try_from(bytes).expect("a region fits in memory") / BLOCK_BYTES;
        let mut region = Self {
            bytes: vec![0; pages * BLOCK_BYTES],
            versions: vec![0; pages],
            random_bytes,
            draw: bytes,
            touched_bytes: 0,
        };
        for (page, content) in (0_u32..).zip(region.bytes.chunks_exact_mut(BLOCK_BYTES)) {
            fill_page(content, page, 0, random_bytes);
        }
        region
    }

    /// Gives random pages a new version, `budget_bytes` in total.
    pub fn touch(&mut self, budget_bytes: u64) {
        if self.versions.is_empty() {
            return;
        }
        for _ in 0..budget_bytes / BLOCK_BYTES as u64 {
            self.draw = mix(self.draw, self.touched_bytes);
            let page = usize::try_from(self.draw % self.versions.len() as u64).expect("below a usize");
            self.versions[page] = self.versions[page].wrapping_add(1);
            let number = u32::try_from(page).expect("a region has fewer than 2^32 pages");
            let content = &mut self.bytes[page * BLOCK_BYTES..][..BLOCK_BYTES];
            fill_page(content, number, self.versions[page], self.random_bytes);
            self.touched_bytes += BLOCK_BYTES as u64;
        }
    }

    /// Compares every page with its version.
    #[must_use]
    pub fn verify(&self) -> MemoryVerdict {
        let mut verdict = MemoryVerdict { pages: self.versions.len() as u64, ..MemoryVerdict::default() };
        let mut expected = vec![0; BLOCK_BYTES];
        for ((page, content), version) in
            (0_u32..).zip(self.bytes.chunks_exact(BLOCK_BYTES)).zip(&self.versions)
        {
            fill_page(&mut expected, page, *version, self.random_bytes);
            if content == expected {
                continue;
            }
            verdict.mismatched += 1;
            if verdict.first_mismatched.len() < 16 {
                verdict.first_mismatched.push(page);
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touched_region_is_right_and_one_wrong_byte_is_found() {
        let mut region = Region::new(1 << 20, 2048);
        region.touch(400 << 10);
        assert_eq!(region.verify(), MemoryVerdict { pages: 256, ..MemoryVerdict::default() });
        region.bytes[7 * BLOCK_BYTES + 11] ^= 1;
        assert_eq!(region.verify().first_mismatched, [7]);
    }
}
