//! The bytes of repair: numbered datagrams, and what the receiver says about them.
//!
//! ```text
//!  data    | 0x20 | incarnation u32 | number u32 | back u16 | payload ...
//!  report  | 0x21 | incarnation u32 | floor u32 | next u32 | (first u32 | len u16) ...
//!  gone    | 0x22 | incarnation u32 | oldest u32 |
//!  parity  | 0x23 | incarnation u32 | first u32 | back u16 | length u16 | payload ... (exclusive ors of a group)
//!  data    | 0x24 | as 0x20, of a group that parity follows
//! ```
//!
//! Integers are big-endian. The high nibble of the first byte is the format's version, as in
//! [`fragment`](super::super::fragment); that module's own datagrams travel unnumbered beside these.
//! Nothing here knows what was sent or is missing.

use bytes::{Buf, BufMut, Bytes, BytesMut};

const DATA: u8 = 0x20;
const REPORT: u8 = 0x21;
const GONE: u8 = 0x22;
pub(super) const PARITY: u8 = 0x23;
const DATA_COVERED: u8 = 0x24;
/// What a numbered datagram has in front of its payload, in bytes.
pub const HEADER: usize = 11;
/// What parity has in front of the longest payload of its group, in bytes.
pub(super) const PARITY_HEADER: usize = 13;
/// By how much a payload must be shorter than the link's longest datagram, in bytes, so that what repair
/// makes of it fits.
pub const ROOM: usize = PARITY_HEADER;
/// The largest number of ranges in one report, so that it fits the smallest QUIC packet.
pub const MAX_RANGES: usize = 128;
const REPORT_HEADER: usize = 13;
const RANGE: usize = 6;
const GONE_LEN: usize = 9;
/// Distances from here on are backwards (RFC 1982).
const HALF: u32 = 1 << 31;

/// One life of a sender, whose numbers begin at 0. The caller chooses it so that two lives after one
/// another differ: at random, or from the instance that the peer's gateway announced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Incarnation(pub u32);

impl Incarnation {
    /// The one after it.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// A datagram's place among all numbered ones of its incarnation. It wraps (RFC 1982).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(pub u32);

impl Number {
    pub(super) fn plus(self, distance: u32) -> Self {
        Self(self.0.wrapping_add(distance))
    }

    pub(super) fn minus(self, distance: u32) -> Self {
        Self(self.0.wrapping_sub(distance))
    }

    /// How far this is behind `earlier` in the sequence; `None` if it is before it.
    pub(super) fn after(self, earlier: Self) -> Option<u32> {
        let distance = self.0.wrapping_sub(earlier.0);
        (distance < HALF).then_some(distance)
    }
}

/// What kind of datagram it is, by its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A numbered datagram.
    Data,
    /// What the other end's receiver has and misses.
    Report,
    /// What the other end's sender cannot repeat.
    Gone,
    /// The parity of a group of numbered ones.
    Parity,
    /// None of repair's: it travelled unnumbered.
    Unnumbered,
}

impl Kind {
    /// Looks at the first byte only.
    pub fn of(datagram: &[u8]) -> Self {
        match datagram.first() {
            Some(&(DATA | DATA_COVERED)) => Self::Data,
            Some(&REPORT) => Self::Report,
            Some(&GONE) => Self::Gone,
            Some(&PARITY) => Self::Parity,
            Some(_) | None => Self::Unnumbered,
        }
    }
}

/// Bytes that are none of the formats above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What stands in front of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DataHeader {
    pub incarnation: Incarnation,
    pub number: Number,
    /// How many numbers before it the previous one of its flow is; 0: none that could still be missing.
    pub back: u16,
    /// Parity follows its group.
    pub covered: bool,
}

impl DataHeader {
    pub(super) fn encode(self, to: &mut BytesMut) {
        to.put_u8(if self.covered { DATA_COVERED } else { DATA });
        to.put_u32(self.incarnation.0);
        to.put_u32(self.number.0);
        to.put_u16(self.back);
    }

    pub(super) fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        let header: &[u8; HEADER] = datagram.first_chunk().ok_or(Malformed)?;
        let [kind @ (DATA | DATA_COVERED), i0, i1, i2, i3, n0, n1, n2, n3, b0, b1] = *header else {
            return Err(Malformed);
        };
        Ok(Self {
            incarnation: Incarnation(u32::from_be_bytes([i0, i1, i2, i3])),
            number: Number(u32::from_be_bytes([n0, n1, n2, n3])),
            back: u16::from_be_bytes([b0, b1]),
            covered: kind == DATA_COVERED,
        })
    }

    /// The header, and the payload left in `datagram`.
    pub(super) fn take(datagram: &mut Bytes) -> Result<Self, Malformed> {
        let header = Self::decode(datagram)?;
        datagram.advance(HEADER);
        Ok(header)
    }
}

/// Numbers that follow one another: the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub first: Number,
    pub len: u16,
}

/// What a receiver has and misses, borrowing its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Report<'a> {
    pub incarnation: Incarnation,
    /// Everything before it came or was given up.
    pub floor: Number,
    /// One more than the highest that came.
    pub next: Number,
    ranges: &'a [u8],
}

impl<'a> Report<'a> {
    pub(super) fn decode(datagram: &'a [u8]) -> Result<Self, Malformed> {
        let (header, ranges) = datagram.split_first_chunk::<REPORT_HEADER>().ok_or(Malformed)?;
        let mut fields = &header[1..];
        if header[0] != REPORT || !ranges.len().is_multiple_of(RANGE) || ranges.len() > MAX_RANGES * RANGE {
            return Err(Malformed);
        }
        Ok(Self {
            incarnation: Incarnation(fields.get_u32()),
            floor: Number(fields.get_u32()),
            next: Number(fields.get_u32()),
            ranges,
        })
    }

    /// What it asks for again.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range> + use<'a> {
        self.ranges.chunks_exact(RANGE).map(|mut bytes| {
            let first = Number(bytes.get_u32());
            Range { first, len: bytes.get_u16() }
        })
    }
}

/// A report being written.
#[derive(Debug)]
pub(super) struct ReportWriter {
    bytes: BytesMut,
}

impl ReportWriter {
    pub(super) fn new(incarnation: Incarnation, floor: Number, next: Number) -> Self {
        let mut bytes = BytesMut::with_capacity(REPORT_HEADER + 4 * RANGE);
        bytes.put_u8(REPORT);
        bytes.put_u32(incarnation.0);
        bytes.put_u32(floor.0);
        bytes.put_u32(next.0);
        Self { bytes }
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() >= REPORT_HEADER + MAX_RANGES * RANGE
    }

    pub(super) fn push(&mut self, range: Range) {
        self.bytes.put_u32(range.first.0);
        self.bytes.put_u16(range.len);
    }

    pub(super) fn finish(self) -> Bytes {
        self.bytes.freeze()
    }
}

/// A sender's word that nothing before `oldest` comes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone {
    pub incarnation: Incarnation,
    pub oldest: Number,
}

impl Gone {
    pub(super) fn encode(self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(GONE_LEN);
        bytes.put_u8(GONE);
        bytes.put_u32(self.incarnation.0);
        bytes.put_u32(self.oldest.0);
        bytes.freeze()
    }

    pub(super) fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        let bytes: &[u8; GONE_LEN] = datagram.try_into().map_err(|_| Malformed)?;
        let [GONE, i0, i1, i2, i3, n0, n1, n2, n3] = *bytes else { return Err(Malformed) };
        Ok(Self {
            incarnation: Incarnation(u32::from_be_bytes([i0, i1, i2, i3])),
            oldest: Number(u32::from_be_bytes([n0, n1, n2, n3])),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Incarnation = Incarnation(0x0102_0304);

    #[test]
    fn the_bytes_are_what_the_page_says() {
        let mut bytes = BytesMut::new();
        DataHeader { incarnation: ONE, number: Number(7), back: 258, covered: false }.encode(&mut bytes);
        assert_eq!(bytes[..], [0x20, 1, 2, 3, 4, 0, 0, 0, 7, 1, 2]);
        let mut report = ReportWriter::new(ONE, Number(8), Number(12));
        report.push(Range { first: Number(9), len: 2 });
        assert_eq!(report.finish()[..], [0x21, 1, 2, 3, 4, 0, 0, 0, 8, 0, 0, 0, 12, 0, 0, 0, 9, 0, 2]);
        let gone = Gone { incarnation: ONE, oldest: Number(5) };
        assert_eq!(gone.encode()[..], [0x22, 1, 2, 3, 4, 0, 0, 0, 5]);
        assert_eq!(Gone::decode(&gone.encode()), Ok(gone));
    }

    #[test]
    fn a_report_of_the_most_ranges_decodes_and_of_one_more_does_not() {
        let mut report = ReportWriter::new(ONE, Number(0), Number(1000));
        for i in 0..MAX_RANGES as u32 {
            assert!(!report.is_full());
            report.push(Range { first: Number(i * 2), len: 1 });
        }
        assert!(report.is_full());
        let mut bytes = report.finish().to_vec();
        assert!(bytes.len() <= 1162, "the datagrams of a QUIC packet of 1200 bytes");
        assert_eq!(Report::decode(&bytes).unwrap().ranges().count(), MAX_RANGES);
        bytes.extend([0; RANGE]);
        assert_eq!(Report::decode(&bytes), Err(Malformed));
        assert_eq!(Report::decode(&bytes[..REPORT_HEADER + 1]), Err(Malformed));
    }

    #[test]
    fn numbers_compare_across_the_wrap() {
        assert_eq!(Number(2).after(Number(u32::MAX)), Some(3));
        assert_eq!(Number(u32::MAX).after(Number(2)), None);
        assert_eq!(Number(1).minus(3).plus(3), Number(1));
    }
}
