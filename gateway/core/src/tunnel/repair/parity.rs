//! One datagram of parity for every 32 numbered ones: a single loss among them is undone without a round trip.
//!
//! ```text
//!  group  | 32k | 32k+1 | ... | 32k+31 | -> parity = exclusive or of all (distance, length, payload)
//! ```
//!
//! On a path that loses one datagram in a thousand, a fast flow would otherwise always be waiting for some
//! repeat. It costs 3 % of the rate, and is sent only while the peer has asked for something lately. Two
//! losses in a group are left to the repeats; no stronger code is tried.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::config::WINDOW;
use super::format::{DataHeader, Incarnation, Malformed, Number, PARITY, PARITY_HEADER};

/// Numbers in one group; groups begin at multiples of it.
pub(super) const GROUP: u32 = 32;
/// Groups that a receiver collects at once: datagrams reordered by 96 numbers still count.
const GROUPS: usize = 4;
/// Parity datagrams that wait to be sent: those of 256 datagrams numbered in one go.
const MAX_READY: usize = 8;

/// The exclusive or of some datagrams.
#[derive(Debug, Default)]
struct Mix {
    back: u16,
    len: u16,
    body: Vec<u8>,
}

impl Mix {
    fn clear(&mut self) {
        (self.back, self.len) = (0, 0);
        self.body.clear();
    }

    fn add(&mut self, back: u16, len: u16, body: &[u8]) {
        self.back ^= back;
        self.len ^= len;
        if self.body.len() < body.len() {
            self.body.resize(body.len(), 0);
        }
        self.body.iter_mut().zip(body).for_each(|(mixed, byte)| *mixed ^= byte);
    }
}

/// The sending side: mixes what is sent while loss is about.
#[derive(Debug, Default)]
pub(super) struct ParityWriter {
    until: Duration,
    covering: bool,
    mix: Mix,
    /// The newest datagram: it may still be taken back.
    newest: Option<(DataHeader, Bytes)>,
    ready: VecDeque<Bytes>,
}

impl ParityWriter {
    /// Something was lost: parity is worth its bytes until then.
    pub(super) fn handle_loss(&mut self, until: Duration) {
        self.until = self.until.max(until);
    }

    /// Whether the datagram of this number, the next one, belongs to a group with parity.
    pub(super) fn covers(&mut self, now: Duration, number: Number) -> bool {
        self.flush();
        if number.0.is_multiple_of(GROUP) {
            self.covering = now < self.until;
            self.mix.clear();
        }
        self.covering
    }

    pub(super) fn push(&mut self, header: DataHeader, payload: Bytes) {
        self.newest = Some((header, payload));
    }

    pub(super) fn take_back(&mut self) {
        self.newest = None;
    }

    /// The parity of a group that is complete, the oldest first.
    pub(super) fn poll(&mut self) -> Option<Bytes> {
        self.flush();
        self.ready.pop_front()
    }

    fn flush(&mut self) {
        let Some((header, payload)) = self.newest.take() else { return };
        self.mix.add(header.back, payload.len() as u16, &payload);
        if header.number.0 % GROUP == GROUP - 1 {
            self.ready.truncate(MAX_READY - 1);
            self.ready.push_back(self.encode(header.incarnation, header.number.minus(GROUP - 1)));
        }
    }

    fn encode(&self, incarnation: Incarnation, first: Number) -> Bytes {
        let mut bytes = BytesMut::with_capacity(PARITY_HEADER + self.mix.body.len());
        bytes.put_u8(PARITY);
        bytes.put_u32(incarnation.0);
        bytes.put_u32(first.0);
        bytes.put_u16(self.mix.back);
        bytes.put_u16(self.mix.len);
        bytes.put_slice(&self.mix.body);
        bytes.freeze()
    }
}

/// A parity datagram, borrowing its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parity<'a> {
    pub incarnation: Incarnation,
    first: Number,
    back: u16,
    len: u16,
    body: &'a [u8],
}

impl<'a> Parity<'a> {
    pub(super) fn decode(datagram: &'a [u8]) -> Result<Self, Malformed> {
        let (header, body) = datagram.split_first_chunk::<PARITY_HEADER>().ok_or(Malformed)?;
        let mut fields = &header[1..];
        let parity = Self {
            incarnation: Incarnation(fields.get_u32()),
            first: Number(fields.get_u32()),
            back: fields.get_u16(),
            len: fields.get_u16(),
            body,
        };
        let valid = header[0] == PARITY && parity.first.0.is_multiple_of(GROUP);
        if valid { Ok(parity) } else { Err(Malformed) }
    }
}

#[derive(Debug, Default)]
struct Group {
    first: Option<Number>,
    /// Which numbers are mixed in, the first one in the lowest bit.
    mixed: u32,
    has_parity: bool,
    mix: Mix,
}

/// The receiving side: mixes what came, and finds the one that did not. It holds four datagrams' bytes.
#[derive(Debug, Default)]
pub(super) struct ParityReader {
    groups: [Group; GROUPS],
}

impl ParityReader {
    /// Takes a datagram of a group with parity. Returned: one that was missing.
    pub(super) fn handle_data(&mut self, header: DataHeader, payload: &[u8]) -> Option<(DataHeader, Bytes)> {
        let bit = 1 << (header.number.0 % GROUP);
        let group = self.group(header.number.minus(header.number.0 % GROUP))?;
        if group.mixed & bit != 0 {
            return None;
        }
        group.mixed |= bit;
        group.mix.add(header.back, payload.len() as u16, payload);
        group.missing(header.incarnation)
    }

    /// Takes the parity of a group. Returned: the datagram that was missing.
    pub(super) fn handle_parity(&mut self, parity: Parity<'_>) -> Option<(DataHeader, Bytes)> {
        let group = self.group(parity.first)?;
        if !std::mem::replace(&mut group.has_parity, true) {
            group.mix.add(parity.back, parity.len, parity.body);
        }
        group.missing(parity.incarnation)
    }

    /// The group that begins at `first`; `None` if its place is a later one's by now.
    fn group(&mut self, first: Number) -> Option<&mut Group> {
        let group = &mut self.groups[(first.0 / GROUP) as usize % GROUPS];
        if group.first == Some(first) {
            return Some(group);
        }
        // Far behind is no straggler: parity was last sent billions of numbers ago.
        let behind = group.first.and_then(|known| known.after(first));
        if behind.is_some_and(|distance| distance as usize <= WINDOW) {
            return None;
        }
        group.first = Some(first);
        (group.mixed, group.has_parity) = (0, false);
        group.mix.clear();
        Some(group)
    }
}

impl Group {
    fn missing(&mut self, incarnation: Incarnation) -> Option<(DataHeader, Bytes)> {
        if !self.has_parity || self.mixed.count_zeros() != 1 {
            return None;
        }
        let number = self.first?.plus(self.mixed.trailing_ones());
        self.mixed = u32::MAX;
        let payload = self.mix.body.get(..usize::from(self.mix.len))?;
        let header = DataHeader { incarnation, number, back: self.mix.back, covered: true };
        Some((header, Bytes::copy_from_slice(payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1);
    const ONE: Incarnation = Incarnation(1);

    /// A group's datagrams, of different lengths, and its parity.
    fn group(writer: &mut ParityWriter, first: u32) -> (Vec<(DataHeader, Bytes)>, Option<Bytes>) {
        let datagrams = (first..first + GROUP).map(|number| {
            let covered = writer.covers(NOW, Number(number));
            let header =
                DataHeader { incarnation: ONE, number: Number(number), back: number as u16, covered };
            let payload = Bytes::from(vec![number as u8; 10 + number as usize % 7]);
            if covered {
                writer.push(header, payload.clone());
            }
            (header, payload)
        });
        (datagrams.collect(), writer.poll())
    }

    #[test]
    fn one_lost_datagram_is_found_whichever_it_is_and_whatever_comes_last() {
        let mut writer = ParityWriter::default();
        writer.handle_loss(NOW * 2);
        let (datagrams, parity) = group(&mut writer, 64);
        let parity = parity.unwrap();
        let parity = Parity::decode(&parity).unwrap();
        for lost in 0..GROUP as usize {
            for parity_after in [5, GROUP as usize] {
                let mut reader = ParityReader::default();
                let mut found = Vec::new();
                for (i, (header, payload)) in datagrams.iter().enumerate() {
                    if i == parity_after {
                        found.extend(reader.handle_parity(parity));
                    }
                    if i != lost {
                        found.extend(reader.handle_data(*header, payload));
                        assert_eq!(reader.handle_data(*header, payload), None, "doubled");
                    }
                }
                found.extend(reader.handle_parity(parity));
                assert_eq!(found, [datagrams[lost].clone()]);
            }
        }
    }

    #[test]
    fn two_lost_datagrams_wait_for_a_repeat_of_one() {
        let mut writer = ParityWriter::default();
        writer.handle_loss(NOW * 2);
        let (datagrams, parity) = group(&mut writer, 0);
        let mut reader = ParityReader::default();
        for (header, payload) in &datagrams[2..] {
            reader.handle_data(*header, payload);
        }
        assert_eq!(reader.handle_parity(Parity::decode(&parity.unwrap()).unwrap()), None);
        let found = reader.handle_data(datagrams[1].0, &datagrams[1].1);
        assert_eq!(found, Some(datagrams[0].clone()));
    }

    #[test]
    fn there_is_no_parity_without_loss_and_none_of_a_group_that_began_without() {
        let mut writer = ParityWriter::default();
        assert_eq!(group(&mut writer, 0).1, None);
        assert!(!writer.covers(NOW, Number(32)));
        writer.handle_loss(NOW * 2);
        assert!(!writer.covers(NOW, Number(33)));
        assert!(writer.covers(NOW, Number(64)));
        assert!(!writer.covers(NOW * 2, Number(96)), "nothing was lost for a while");
    }

    #[test]
    fn parity_of_eight_groups_waits_to_be_sent() {
        let mut writer = ParityWriter::default();
        writer.handle_loss(NOW * 2);
        for number in 0..GROUP * 10 {
            assert!(writer.covers(NOW, Number(number)));
            let header = DataHeader { incarnation: ONE, number: Number(number), back: 0, covered: true };
            writer.push(header, Bytes::from_static(b"x"));
        }
        assert_eq!(std::iter::from_fn(|| writer.poll()).count(), 8);
    }

    #[test]
    fn what_was_taken_back_is_not_mixed_in() {
        let mut writer = ParityWriter::default();
        writer.handle_loss(NOW * 2);
        let header = DataHeader { incarnation: ONE, number: Number(0), back: 9, covered: true };
        assert!(writer.covers(NOW, Number(0)));
        writer.push(header, Bytes::from_static(b"refused"));
        writer.take_back();
        let (datagrams, parity) = group(&mut writer, 0);
        let mut reader = ParityReader::default();
        datagrams[1..].iter().for_each(|(header, payload)| drop(reader.handle_data(*header, payload)));
        let found = reader.handle_parity(Parity::decode(&parity.unwrap()).unwrap());
        assert_eq!(found, Some(datagrams[0].clone()));
    }

    #[test]
    fn a_group_makes_room_for_the_fourth_after_it_and_not_for_an_older_one() {
        let mut reader = ParityReader::default();
        let header = |number| DataHeader { incarnation: ONE, number: Number(number), back: 0, covered: true };
        reader.handle_data(header(128), b"new");
        reader.handle_data(header(0), b"old");
        assert_eq!(reader.groups[0].first, Some(Number(128)));
        assert_eq!(reader.groups[0].mixed, 1);
        reader.handle_data(header(128 + (1 << 31)), b"after a long time without parity");
        assert_eq!(reader.groups[0].first, Some(Number(128 + (1 << 31))));
    }

    #[test]
    fn a_length_that_no_datagram_has_finds_nothing() {
        let mut reader = ParityReader::default();
        for number in 1..GROUP {
            let header = DataHeader { incarnation: ONE, number: Number(number), back: 0, covered: true };
            reader.handle_data(header, b"abc");
        }
        let lie = Parity { incarnation: ONE, first: Number(0), back: 0, len: 0xff00, body: b"x" };
        assert_eq!(reader.handle_parity(lie), None);
    }
}
