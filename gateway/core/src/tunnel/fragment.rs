//! A guest's packets in the link's datagrams: split when they are larger than a datagram, and joined.
//!
//! The inner MTU stays the LAN's, because connections that are open have agreed on their segment
//! size already. What is lost on the way is [`super::repair`]'s to hide, each datagram on its own.
//!
//! ```text
//!  whole packet   | 0x10 | packet ...
//!  one part       | 0x11 | index u8 | count u8 | id u32, big-endian | part ...
//! ```
//!
//! The high nibble of the first byte is the format's version. All parts of a packet carry the same
//! id; 32 bits of it do not come round within the lifetime of a half-joined packet.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};

const WHOLE: u8 = 0x10;
const PART: u8 = 0x11;
const PART_HEADER: usize = 7;
/// The largest number of parts of one packet.
pub const MAX_PARTS: usize = 64;
/// The largest IP packet (RFC 791), in bytes.
pub const MAX_PACKET: usize = 65_535;
/// The smallest datagram that any packet fits into by splitting, in bytes.
pub const MIN_DATAGRAM: usize = MAX_PACKET.div_ceil(MAX_PARTS) + PART_HEADER;

/// Numbers the packets it splits. One per peer.
#[derive(Debug, Default)]
pub struct Splitter {
    next_id: u32,
}

/// The datagrams of one packet, in order.
#[derive(Debug)]
pub struct Parts<'a> {
    packet: &'a [u8],
    id: u32,
    count: usize,
    index: usize,
}

impl Splitter {
    /// Cuts `packet` into datagrams of at most `max_len` bytes, as even as they come. `None` if that
    /// takes more than [`MAX_PARTS`], which a `max_len` of [`MIN_DATAGRAM`] rules out.
    pub fn split<'a>(&mut self, packet: &'a [u8], max_len: usize) -> Option<Parts<'a>> {
        if packet.len() < max_len {
            return Some(Parts { packet, id: 0, count: 1, index: 0 });
        }
        let room = max_len.checked_sub(PART_HEADER).filter(|room| *room > 0)?;
        let count = packet.len().div_ceil(room);
        if count > MAX_PARTS {
            return None;
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        Some(Parts { packet, id, count, index: 0 })
    }
}

/// What one datagram carries of a packet, behind a header of ours.
#[derive(Debug)]
pub struct Share<'a> {
    header: [u8; PART_HEADER],
    header_len: usize,
    data: &'a [u8],
}

impl Share<'_> {
    /// Its bytes, one piece after the other.
    pub fn pieces(&self) -> [&[u8]; 2] {
        [&self.header[..self.header_len], self.data]
    }

    /// The same in one piece.
    pub fn to_bytes(&self) -> Bytes {
        let mut datagram = BytesMut::with_capacity(self.header_len + self.data.len());
        self.pieces().into_iter().for_each(|piece| datagram.put_slice(piece));
        datagram.freeze()
    }
}

impl<'a> Iterator for Parts<'a> {
    type Item = Share<'a>;

    fn next(&mut self) -> Option<Share<'a>> {
        if self.index == self.count {
            return None;
        }
        let index = self.index;
        self.index += 1;
        let mut header = [WHOLE; PART_HEADER];
        if self.count == 1 {
            return Some(Share { header, header_len: 1, data: self.packet });
        }
        let size = self.packet.len().div_ceil(self.count);
        let data = &self.packet[(index * size).min(self.packet.len())..];
        let data = &data[..size.min(data.len())];
        header[..3].copy_from_slice(&[PART, index as u8, self.count as u8]);
        header[3..].copy_from_slice(&self.id.to_be_bytes());
        Some(Share { header, header_len: PART_HEADER, data })
    }
}

/// Bounds of what waits for its missing parts, per peer.
#[derive(Debug, Clone)]
pub struct ReassemblyConfig {
    /// Packets half joined at once. Default 256; more cost memory, fewer lose packets on a path that reorders.
    pub max_entries: usize,
    /// Bytes held by them. Default 4 MiB.
    pub max_bytes: usize,
    /// How long a packet waits for its parts. Default 1 s, longer than any reordering worth repairing.
    pub lifetime: Duration,
}

impl Default for ReassemblyConfig {
    fn default() -> Self {
        Self { max_entries: 256, max_bytes: 4 << 20, lifetime: Duration::from_secs(1) }
    }
}

/// A datagram that cannot be part of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Unknown first byte or missing header: another version, or not a tunnel datagram.
    #[error("Datagram of an unknown format")]
    UnknownFormat,
    /// Index, count or length contradict each other or an earlier part.
    #[error("Datagram that contradicts itself or an earlier part")]
    Contradiction,
    /// The part is here already.
    #[error("Datagram received before")]
    Duplicate,
}

/// Joins parts to packets. Bounded in packets, bytes and time; the oldest gives way.
#[derive(Debug)]
pub struct Reassembly {
    config: ReassemblyConfig,
    entries: BTreeMap<u32, Entry>,
    by_age: BTreeMap<u64, u32>,
    next_serial: u64,
    bytes: usize,
    abandoned: u64,
}

#[derive(Debug)]
struct Entry {
    serial: u64,
    expires: Duration,
    parts: Vec<Option<Bytes>>,
    missing: usize,
    bytes: usize,
}

struct Part {
    id: u32,
    index: usize,
    count: usize,
    body: Bytes,
}

impl Reassembly {
    /// Nothing joined yet.
    pub fn new(config: ReassemblyConfig) -> Self {
        let (entries, by_age) = (BTreeMap::new(), BTreeMap::new());
        Self { config, entries, by_age, next_serial: 0, bytes: 0, abandoned: 0 }
    }

    /// Takes one datagram; a packet comes out when it is complete.
    pub fn handle_datagram(
        &mut self,
        now: Duration,
        mut datagram: Bytes,
    ) -> Result<Option<Bytes>, JoinError> {
        self.expire(now);
        match datagram.first() {
            Some(&WHOLE) => Ok(Some(datagram.split_off(1))),
            Some(&PART) => {
                let part = parse_part(datagram)?;
                self.handle_part(now, part)
            }
            Some(_) | None => Err(JoinError::UnknownFormat),
        }
    }

    /// Forgets packets whose parts did not come in time.
    pub fn expire(&mut self, now: Duration) {
        while let Some(id) = self.oldest_if(|entry| entry.expires <= now) {
            self.abandon(id);
        }
    }

    /// Packets given up because a part was late or there was no room.
    pub fn abandoned(&self) -> u64 {
        self.abandoned
    }

    /// Packets waiting for parts.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// No packet waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn handle_part(&mut self, now: Duration, part: Part) -> Result<Option<Bytes>, JoinError> {
        let id = part.id;
        if !self.entries.contains_key(&id) {
            self.open(now, id, part.count);
        }
        let Some(entry) = self.entries.get_mut(&id) else { return Ok(None) };
        if entry.parts.len() != part.count || entry.bytes + part.body.len() > MAX_PACKET {
            self.abandon(id);
            return Err(JoinError::Contradiction);
        }
        let slot = &mut entry.parts[part.index];
        if slot.is_some() {
            return Err(JoinError::Duplicate);
        }
        entry.bytes += part.body.len();
        entry.missing -= 1;
        self.bytes += part.body.len();
        // A copy: it came in a buffer that holds many, and may wait.
        *slot = Some(Bytes::copy_from_slice(&part.body));
        if entry.missing == 0 {
            return Ok(self.forget(id).map(|entry| join(&entry)));
        }
        self.make_room(0);
        Ok(None)
    }

    fn open(&mut self, now: Duration, id: u32, count: usize) {
        self.make_room(1);
        let serial = self.next_serial;
        self.next_serial += 1;
        self.by_age.insert(serial, id);
        let expires = now + self.config.lifetime;
        let parts = vec![None; count];
        self.entries.insert(id, Entry { serial, expires, parts, missing: count, bytes: 0 });
    }

    fn make_room(&mut self, new_entries: usize) {
        while self.entries.len() + new_entries > self.config.max_entries || self.bytes > self.config.max_bytes
        {
            let Some(id) = self.oldest_if(|_| true) else { return };
            self.abandon(id);
        }
    }

    fn oldest_if(&self, wanted: impl Fn(&Entry) -> bool) -> Option<u32> {
        let (_, id) = self.by_age.first_key_value()?;
        self.entries.get(id).filter(|entry| wanted(entry)).map(|_| *id)
    }

    fn abandon(&mut self, id: u32) {
        if self.forget(id).is_some() {
            self.abandoned += 1;
        }
    }

    fn forget(&mut self, id: u32) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.by_age.remove(&entry.serial);
        self.bytes -= entry.bytes;
        Some(entry)
    }
}

fn parse_part(mut datagram: Bytes) -> Result<Part, JoinError> {
    let header: [u8; PART_HEADER] = *datagram.first_chunk().ok_or(JoinError::UnknownFormat)?;
    let (index, count) = (usize::from(header[1]), usize::from(header[2]));
    let id = u32::from_be_bytes([header[3], header[4], header[5], header[6]]);
    let body = datagram.split_off(PART_HEADER);
    if index >= count || !(2..=MAX_PARTS).contains(&count) {
        return Err(JoinError::Contradiction);
    }
    Ok(Part { id, index, count, body })
}

fn join(entry: &Entry) -> Bytes {
    let mut packet = BytesMut::with_capacity(entry.bytes);
    for part in entry.parts.iter().flatten() {
        packet.put_slice(part);
    }
    packet.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn packet(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    }

    fn parts(splitter: &mut Splitter, packet: &[u8], max_len: usize) -> Vec<Bytes> {
        splitter.split(packet, max_len).unwrap().map(|share| share.to_bytes()).collect()
    }

    #[test]
    fn a_packet_that_fits_costs_one_byte() {
        let whole = packet(1199, 1);
        let datagrams = parts(&mut Splitter::default(), &whole, 1200);
        assert_eq!((datagrams.len(), datagrams[0].len()), (1, 1200));
        let joined = Reassembly::new(ReassemblyConfig::default()).handle_datagram(NOW, datagrams[0].clone());
        assert_eq!(joined.unwrap().unwrap(), whole);
    }

    #[test]
    fn a_full_size_segment_takes_two_even_datagrams() {
        let datagrams = parts(&mut Splitter::default(), &packet(1500, 1), 1200);
        assert_eq!(datagrams.iter().map(Bytes::len).collect::<Vec<_>>(), [757, 757]);
    }

    #[test]
    fn the_largest_packet_splits_at_the_smallest_datagram_and_no_smaller() {
        let mut splitter = Splitter::default();
        let largest = packet(MAX_PACKET, 0);
        assert_eq!(parts(&mut splitter, &largest, MIN_DATAGRAM).len(), MAX_PARTS);
        assert!(splitter.split(&largest, MIN_DATAGRAM - 1).is_none());
        assert!(splitter.split(&largest, 3).is_none());
    }

    #[test]
    fn a_part_too_late_does_not_complete_a_packet() {
        let datagrams = parts(&mut Splitter::default(), &packet(1500, 1), 1200);
        let mut reassembly = Reassembly::new(ReassemblyConfig::default());
        assert_eq!(reassembly.handle_datagram(NOW, datagrams[0].clone()), Ok(None));
        let late = NOW + Duration::from_secs(1);
        assert_eq!(reassembly.handle_datagram(late, datagrams[1].clone()), Ok(None));
        assert_eq!((reassembly.abandoned(), reassembly.len()), (1, 1));
    }

    #[test]
    fn the_oldest_gives_way_at_the_limit_of_entries_and_of_bytes() {
        let mut splitter = Splitter::default();
        let config = ReassemblyConfig { max_entries: 4, max_bytes: 2900, lifetime: Duration::from_secs(1) };
        let mut reassembly = Reassembly::new(config);
        let packets: Vec<_> = (0..5).map(|i| parts(&mut splitter, &packet(1500, i), 1200)).collect();
        for datagrams in &packets {
            assert_eq!(reassembly.handle_datagram(NOW, datagrams[0].clone()), Ok(None));
        }
        assert_eq!((reassembly.len(), reassembly.abandoned()), (3, 2));
        assert!(reassembly.handle_datagram(NOW, packets[4][1].clone()).unwrap().is_some());
    }

    #[test]
    fn parts_that_contradict_each_other_are_refused() {
        let mut reassembly = Reassembly::new(ReassemblyConfig::default());
        let part = |index, count| Bytes::copy_from_slice(&[PART, index, count, 0, 0, 0, 9, 1, 2, 3]);
        assert_eq!(reassembly.handle_datagram(NOW, part(2, 2)), Err(JoinError::Contradiction));
        assert_eq!(reassembly.handle_datagram(NOW, part(0, 65)), Err(JoinError::Contradiction));
        assert_eq!(reassembly.handle_datagram(NOW, part(0, 2)), Ok(None));
        assert_eq!(reassembly.handle_datagram(NOW, part(0, 2)), Err(JoinError::Duplicate));
        assert_eq!(reassembly.handle_datagram(NOW, part(0, 3)), Err(JoinError::Contradiction));
        assert!(reassembly.is_empty());
    }

    proptest! {
        #[test]
        fn packets_come_out_whole_whatever_the_order_loss_and_duplication(
            lens in prop::collection::vec(1usize..4000, 1..20),
            max_len in 600usize..1500,
            order in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..200),
        ) {
            let mut splitter = Splitter::default();
            let packets: Vec<_> = lens.iter().enumerate().map(|(i, len)| packet(*len, i as u8)).collect();
            let all: Vec<Bytes> = packets.iter().flat_map(|p| parts(&mut splitter, p, max_len)).collect();
            let mut reassembly = Reassembly::new(ReassemblyConfig::default());
            for (index, _) in order {
                if let Ok(Some(joined)) = reassembly.handle_datagram(NOW, index.get(&all).clone()) {
                    prop_assert!(packets.iter().any(|p| p[..] == joined[..]));
                }
            }
        }

        #[test]
        fn every_packet_arrives_when_every_part_does(
            lens in prop::collection::vec(1usize..4000, 1..20),
            max_len in 600usize..1500,
            seed in any::<u64>(),
        ) {
            let mut splitter = Splitter::default();
            let packets: Vec<_> = lens.iter().enumerate().map(|(i, len)| packet(*len, i as u8)).collect();
            let mut all: Vec<Bytes> = packets.iter().flat_map(|p| parts(&mut splitter, p, max_len)).collect();
            all.sort_by_key(|part| part.iter().fold(seed, |h, b| h.rotate_left(5) ^ u64::from(*b).wrapping_mul(0x9e37)));
            let mut reassembly = Reassembly::new(ReassemblyConfig::default());
            let mut joined: Vec<Vec<u8>> = Vec::new();
            for part in all {
                prop_assert!(part.len() <= max_len);
                joined.extend(reassembly.handle_datagram(NOW, part).unwrap().map(|p| p.to_vec()));
            }
            let mut expected = packets;
            expected.sort();
            joined.sort();
            prop_assert_eq!(joined, expected);
            prop_assert!(reassembly.is_empty());
        }

        #[test]
        fn garbage_never_panics_and_stays_bounded(
            datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..600),
        ) {
            let mut reassembly = Reassembly::new(ReassemblyConfig { max_entries: 8, ..Default::default() });
            for (i, mut datagram) in datagrams.into_iter().enumerate() {
                if let Some(first) = datagram.first_mut() {
                    *first = if *first < 200 { PART } else { *first };
                }
                let _ = reassembly.handle_datagram(Duration::from_millis(i as u64), datagram.into());
                prop_assert!(reassembly.len() <= 8);
            }
        }
    }
}
