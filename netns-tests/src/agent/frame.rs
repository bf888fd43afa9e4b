//! The record exchange's wire format: fixed frames with a number and a checksum, the same in both directions.
//!
//! ```text
//! frame, 64 bytes, little endian:
//!   magic u32 | kind u32 | number u64 | unix_ms u64 | received u64 | lost u64 | doubled u64 | corrupt u64 | zero u32 | crc32 u32
//!
//! client ── Hello (number = interval in ms) ──▶ server
//! client ── Record 1, 2, 3 … ──▶ server          client ◀── Record 1, 2, 3 … ── server
//! client ── End (number = records sent) ──▶ server
//!                                                client ◀── End (number = records sent, counters of what came) ── server
//! ```

use super::crc::crc32;

/// Size of a frame.
pub const FRAME_BYTES: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"LHRX");

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client's first frame; `number` is the interval it wishes, in milliseconds.
    Hello,
    /// A numbered record, from 1.
    Record,
    /// The sender's last frame: `number` records were sent.
    End,
}

/// What one side has seen of the other's records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Records that came.
    pub received: u64,
    /// Numbers that never came.
    pub lost: u64,
    /// Records that came again, or too late.
    pub doubled: u64,
    /// Frames with a wrong checksum.
    pub corrupt: u64,
    /// The highest number seen.
    pub last: u64,
}

impl Tally {
    /// Counts one record.
    pub fn record(&mut self, number: u64) {
        self.received += 1;
        if number <= self.last {
            self.doubled += 1;
            return;
        }
        self.lost += number - self.last - 1;
        self.last = number;
    }

    /// Everything up to `sent` came once and whole.
    #[must_use]
    pub const fn complete(&self, sent: u64) -> bool {
        self.last == sent && self.lost == 0 && self.doubled == 0 && self.corrupt == 0
    }
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its number, see [`Kind`].
    pub number: u64,
    /// The sender's clock, milliseconds since 1970.
    pub unix_ms: u64,
    /// What the sender has seen; meaningful in [`Kind::End`].
    pub tally: Tally,
}

impl Frame {
    /// A frame without counters.
    #[must_use]
    pub fn new(kind: Kind, number: u64, unix_ms: u64) -> Self {
        Self { kind, number, unix_ms, tally: Tally::default() }
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        let mut bytes = [0; FRAME_BYTES];
        let kind: u32 = match self.kind {
            Kind::Hello => 1,
            Kind::Record => 2,
            Kind::End => 3,
        };
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        let tally = &self.tally;
        let words = [self.number, self.unix_ms, tally.received, tally.lost, tally.doubled, tally.corrupt];
        for (at, word) in (8..).step_by(8).zip(words) {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The frame in `bytes`, or nothing if magic, kind or checksum are wrong.
    #[must_use]
    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if u32_at(0)? != MAGIC || u32_at(60)? != crc32(&bytes[..60]) {
            return None;
        }
        let kind = match u32_at(4)? {
            1 => Kind::Hello,
            2 => Kind::Record,
            3 => Kind::End,
            _ => return None,
        };
        let tally = Tally {
            received: u64_at(24)?,
            lost: u64_at(32)?,
            doubled: u64_at(40)?,
            corrupt: u64_at(48)?,
            last: 0,
        };
        Some(Self { kind, number: u64_at(8)?, unix_ms: u64_at(16)?, tally })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_and_a_flipped_bit_is_refused() {
        let tally = Tally { received: 5, lost: 1, doubled: 2, corrupt: 3, last: 0 };
        let frame = Frame { kind: Kind::End, number: 9, unix_ms: 77, tally };
        let mut bytes = frame.encode();
        assert_eq!(Frame::decode(&bytes), Some(frame));
        bytes[12] ^= 4;
        assert_eq!(Frame::decode(&bytes), None);
    }

    #[test]
    fn lost_and_doubled_records_are_counted() {
        let mut tally = Tally::default();
        for number in [1, 2, 4, 4, 5] {
            tally.record(number);
        }
        assert_eq!((tally.received, tally.lost, tally.doubled, tally.last), (5, 1, 1, 5));
        assert!(!tally.complete(5));
    }
}
