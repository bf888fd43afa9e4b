//! Sixteen bytes by which a receiver knows that all that has come so far is what was sent: half of the running BLAKE3 digest,
//! as it is at this place.
//!
//! A running digest binds what came before and the order of it, and both ends keep one anyway for the proof of the whole. To
//! ask it hashes no byte again: it joins at most 54 nodes of a tree, some microseconds. Half of it is enough for what this
//! finds, accidents within a host; what crosses a link is proven by the link, and the whole digest stands at the end.
//!
//! Deliberately not here: what is digested, and what is said of what does not fit.

use std::fmt;

/// The first half of a running digest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Proof([u8; Proof::BYTES]);

impl Proof {
    /// How many bytes it is.
    pub const BYTES: usize = 16;

    /// Of all that the hasher has taken.
    pub(crate) fn of(digest: &blake3::Hasher) -> Self {
        let mut proof = [0; Self::BYTES];
        proof.copy_from_slice(&digest.finalize().as_bytes()[..Self::BYTES]);
        Self(proof)
    }

    /// From the wire.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// For the wire.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
