//! The running digest of what QEMU wrote, at the source: as it is at the end of each batch, so that each batch carries a proof.
//!
//! A batch ends at the end of a record, somewhere in what was read at once or before it. What is in no batch yet waits here,
//! because the next batch may end before it. It is the bytes as they were read that are digested, not what a parser made of
//! them, and each of them once.
//!
//! Deliberately not here: where batches end, and where a proof stands in its frame.

use super::StreamDigest;
use crate::proof::Proof;

/// From a multiple of so much on, the hasher works on many blocks at once.
const ALIGNED: u64 = 16 << 10;

/// The digest so far, and what it has not taken yet: less than [`ALIGNED`] and an incomplete piece of the stream.
#[derive(Debug, Default)]
pub(super) struct SourceDigest {
    hasher: blake3::Hasher,
    hashed_bytes: u64,
    waiting: Vec<u8>,
}

impl SourceDigest {
    /// The proof of the stream's first `end` bytes, which lie behind what was proven before; `read` is what was read and is
    /// not here yet.
    pub(super) fn proof(&mut self, end: u64, read: &mut &[u8]) -> Proof {
        self.advance(end, read);
        Proof::of(&self.hasher)
    }

    /// Batches hold the stream's first `packed` bytes, and those that were closed are proven: takes the rest of what was read.
    pub(super) fn take(&mut self, packed: u64, mut read: &[u8]) {
        self.advance(packed / ALIGNED * ALIGNED, &mut read);
        self.waiting.extend_from_slice(read);
    }

    /// The stream is over, and all of it packed.
    pub(super) fn end(&mut self, packed: u64) -> StreamDigest {
        self.advance(packed, &mut &[][..]);
        StreamDigest(*self.hasher.finalize().as_bytes())
    }

    fn advance(&mut self, end: u64, read: &mut &[u8]) {
        let due = usize::try_from(end.saturating_sub(self.hashed_bytes)).unwrap_or(usize::MAX);
        if !self.waiting.is_empty() {
            let known = self.hashed_bytes + self.waiting.len() as u64;
            let gap = (known.next_multiple_of(ALIGNED) - known) as usize;
            let more = gap.min(due.saturating_sub(self.waiting.len()));
            self.waiting.extend_from_slice(split_off(read, more));
        }
        let first = due.min(self.waiting.len());
        self.hasher.update(&self.waiting[..first]);
        self.waiting.drain(..first);
        let then = split_off(read, due - first);
        self.hasher.update(then);
        self.hashed_bytes += (first + then.len()) as u64;
    }
}

/// Takes up to so many bytes from the front.
fn split_off<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(most.min(bytes.len()));
    *bytes = rest;
    taken
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Parts of any length are read; of what was read, some is packed, and of that, batches end at any place.
        #[test]
        fn each_proof_is_of_the_stream_up_to_its_place(
            parts in prop::collection::vec((0usize..100_000, 0usize..70_000, 0usize..5), 1..12),
        ) {
            let len: usize = parts.iter().map(|(part, ..)| part).sum();
            let stream: Vec<u8> = (0..len).map(|at| ((at * 31) >> 7) as u8).collect();
            let (mut digest, mut packed, mut seen) = (SourceDigest::default(), 0, 0);
            for (part, held_back, batches) in parts {
                let mut read = &stream[seen..seen + part];
                seen += part;
                let now = seen.saturating_sub(held_back).max(packed);
                for batch in 1..=batches {
                    let end = packed + (now - packed) * batch / (batches + 1);
                    let proof = Proof::of(blake3::Hasher::new().update(&stream[..end]));
                    prop_assert_eq!(digest.proof(end as u64, &mut read), proof);
                }
                packed = now;
                digest.take(packed as u64, read);
                prop_assert!(digest.waiting.len() < seen - packed + ALIGNED as usize);
            }
            let whole = StreamDigest(*blake3::hash(&stream).as_bytes());
            prop_assert_eq!(digest.end(len as u64), whole);
        }
    }
}
