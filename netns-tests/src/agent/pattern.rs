//! Content that can be derived: byte streams, disk blocks, memory pages.
//!
//! Every 8-byte word is a mix (splitmix64, Steele 2014) of a seed and a position, so any part can be computed without
//! the parts before it. Not random in any stronger sense.

/// Size of a disk block and of a memory page, in bytes.
pub const BLOCK_BYTES: usize = 4096;

/// A deterministic byte stream.
#[derive(Debug, Clone)]
pub struct Stream {
    seed: u64,
    offset_bytes: u64,
}

impl Stream {
    /// The stream of `seed` from its beginning.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, offset_bytes: 0 }
    }

    /// Fills `buffer` with the next bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        // What is left of a word that the last call began.
        let begun = usize::try_from(self.offset_bytes % 8).expect("below 8");
        let head = if begun == 0 { 0 } else { (8 - begun).min(buffer.len()) };
        let (head, rest) = buffer.split_at_mut(head);
        let first = self.offset_bytes / 8;
        head.copy_from_slice(&mix(self.seed, first).to_le_bytes()[begun..begun + head.len()]);
        let first = (self.offset_bytes + head.len() as u64) / 8;
        for (position, word) in (first..).zip(rest.chunks_mut(8)) {
            word.copy_from_slice(&mix(self.seed, position).to_le_bytes()[..word.len()]);
        }
        self.offset_bytes += buffer.len() as u64;
    }
}

/// The first `length_bytes` of the stream of `seed`, at once. For tests and small files.
#[must_use]
pub fn stream_bytes(seed: u64, length_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length_bytes).expect("the caller asks for what fits in memory")];
    Stream::new(seed).fill(&mut bytes);
    bytes
}

/// Fills one disk block: a header of block number and version (little endian, 4 bytes each), then derived words.
pub fn fill_block(buffer: &mut [u8], block: u32, version: u32) {
    buffer[..4].copy_from_slice(&block.to_le_bytes());
    buffer[4..8].copy_from_slice(&version.to_le_bytes());
    let seed = u64::from(block) << 32 | u64::from(version);
    for (index, word) in buffer[8..].chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(seed, index as u64).to_le_bytes());
    }
}

/// Fills one memory page: like a disk block, but only `random_bytes` of it are derived; the rest is zero, so that a
/// page compresses about as well as asked.
pub fn fill_page(buffer: &mut [u8], page: u32, version: u32, random_bytes: usize) {
    let used = random_bytes.clamp(8, buffer.len()) / 8 * 8;
    fill_block(&mut buffer[..used], page, version);
    buffer[used..].fill(0);
}

/// One word of the stream of `seed`.
#[must_use]
pub const fn mix(seed: u64, position: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0xD129_0D5A_6F3C_1B2F)
        .wrapping_add(position.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_read_in_parts_equals_the_stream_read_at_once() {
        let whole = stream_bytes(5, 1003);
        let mut stream = Stream::new(5);
        let mut parts = vec![0; 1003];
        for part in [0..3, 3..5, 5..512, 512..901, 901..1003] {
            stream.fill(&mut parts[part]);
        }
        assert_eq!(whole, parts);
        assert_ne!(whole, stream_bytes(6, 1003));
    }

    #[test]
    fn blocks_differ_by_number_and_by_version() {
        let block = |number, version| {
            let mut bytes = vec![0; BLOCK_BYTES];
            fill_block(&mut bytes, number, version);
            bytes
        };
        assert_eq!(block(1, 2), block(1, 2));
        assert_ne!(block(1, 2)[8..], block(1, 3)[8..]);
        assert_ne!(block(1, 2)[8..], block(2, 2)[8..]);
    }

    #[test]
    fn a_page_is_derived_as_far_as_asked_and_zero_after() {
        let mut page = vec![9; BLOCK_BYTES];
        fill_page(&mut page, 3, 1, 1024);
        assert!(page[1024..].iter().all(|byte| *byte == 0));
        assert!(page[..1024].iter().any(|byte| *byte != 0));
    }
}
