//! Two ends and a path between them in virtual time, that loses, doubles, delays and reorders.
//!
//! Only for tests. What happens follows from the seed alone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

use super::format::{DataHeader, Number};
use super::{FlowBucket, HEADER, Incarnation, Kind, Receiver, Repair, RepairConfig, Sender};

/// How a direction treats datagrams; chances in parts of a million.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path {
    pub delay: Duration,
    pub jitter: Duration,
    pub loss: u64,
    pub doubled: u64,
}

impl Path {
    pub(super) fn clean(delay: Duration) -> Self {
        Self { delay, jitter: Duration::ZERO, loss: 0, doubled: 0 }
    }
}

/// A payload that says who it is: flow, place in its flow, and padding.
pub(super) fn payload(flow: u16, place: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len.max(6)];
    bytes[..2].copy_from_slice(&flow.to_be_bytes());
    bytes[2..6].copy_from_slice(&place.to_be_bytes());
    bytes
}

pub(super) fn identity(payload: &[u8]) -> (u16, u32) {
    let place = u32::from_be_bytes([payload[2], payload[3], payload[4], payload[5]]);
    (u16::from_be_bytes([payload[0], payload[1]]), place)
}

/// A packet that went on at the receiving end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Delivered {
    pub flow: u16,
    pub place: u32,
    /// When its first copy came, and when it went on.
    pub arrived: Duration,
    pub at: Duration,
}

pub(super) struct World {
    pub now: Duration,
    /// `ends[0]` sends packets, `ends[1]` receives them.
    pub ends: [Repair; 2],
    /// From `ends[0]`, from `ends[1]`.
    pub paths: [Path; 2],
    /// Loses first transmissions of these places, whatever the flow.
    pub lose_places: BTreeSet<(u16, u32)>,
    pub delivered: Vec<Delivered>,
    /// Flows of which a packet was lost or came out of order, reordering included.
    pub disturbed: BTreeSet<u16>,
    /// Everything each end put on the path.
    pub transmitted: [u64; 2],
    places: BTreeMap<u16, u32>,
    arrived: BTreeMap<(u16, u32), Duration>,
    next_place: BTreeMap<u16, u32>,
    in_flight: BTreeMap<(Duration, u64), (usize, Bytes)>,
    serial: u64,
    random: u64,
}

impl World {
    pub(super) fn new(config: &RepairConfig, path: Path, seed: u64) -> Self {
        let end = |n| Repair::new(config.clone(), Incarnation(n));
        let mut ends = [end(7), end(8)];
        ends.iter_mut().for_each(|end| end.set_rtt(path.delay * 2));
        Self {
            now: Duration::from_secs(1),
            ends,
            paths: [path, path],
            lose_places: BTreeSet::new(),
            delivered: Vec::new(),
            disturbed: BTreeSet::new(),
            transmitted: [0; 2],
            places: BTreeMap::new(),
            arrived: BTreeMap::new(),
            next_place: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            serial: 0,
            random: seed | 1,
        }
    }

    /// Both ends of the first direction are at this number already.
    pub(super) fn continue_at(&mut self, config: &RepairConfig, number: u32) {
        self.ends[0].sender = Sender::starting_at(config.clone(), Incarnation(7), Number(number));
        self.ends[1].receiver = Receiver::continued(config.clone(), Incarnation(7), Number(number));
        let rtt = self.paths[0].delay * 2;
        self.ends.iter_mut().for_each(|end| end.set_rtt(rtt));
    }

    /// `ends[0]` sends the next packet of `flow` now.
    pub(super) fn send(&mut self, flow: u16, len: usize) {
        let place = self.places.entry(flow).or_default();
        let bytes = payload(flow, *place, len);
        let lost = self.lose_places.remove(&(flow, *place));
        *place += 1;
        let datagram = self.ends[0].wrap(self.now, FlowBucket(flow), &[&bytes]);
        match lost {
            true => drop(self.disturbed.insert(flow)),
            false => self.transmit(0, datagram),
        }
        self.drain(0);
    }

    /// Lets everything happen until `until`.
    pub(super) fn run(&mut self, until: Duration) {
        loop {
            let timeouts = self.ends.iter().filter_map(Repair::poll_timeout);
            let arrival = self.in_flight.first_key_value().map(|((at, _), _)| *at);
            let Some(next) = timeouts.chain(arrival).min().filter(|at| *at <= until) else { break };
            self.now = self.now.max(next);
            self.step();
        }
        self.now = until;
    }

    /// Until nothing is under way and no timer runs; fails if that does not come.
    pub(super) fn settle(&mut self) {
        for _ in 0..1_000_000 {
            let timeouts = self.ends.iter().filter_map(Repair::poll_timeout);
            let arrival = self.in_flight.first_key_value().map(|((at, _), _)| *at);
            let Some(next) = timeouts.chain(arrival).min() else { return };
            self.now = self.now.max(next);
            self.step();
        }
        panic!("the tunnel does not become idle");
    }

    pub(super) fn sent(&self) -> u64 {
        self.places.values().map(|place| u64::from(*place)).sum()
    }

    fn step(&mut self) {
        while let Some(entry) = self.in_flight.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (to, datagram) = entry.remove();
            self.note_arrival(to, &datagram);
            self.ends[to].handle_datagram(self.now, datagram).unwrap();
            self.drain(to);
        }
        for end in 0..2 {
            self.ends[end].handle_timeout(self.now);
            self.drain(end);
        }
    }

    fn drain(&mut self, end: usize) {
        while let Some(packet) = self.ends[end].poll_packet() {
            let (flow, place) = identity(&packet);
            // What parity found never arrived.
            let arrived = *self.arrived.entry((flow, place)).or_insert(self.now);
            self.delivered.push(Delivered { flow, place, arrived, at: self.now });
        }
        while let Some(datagram) = self.ends[end].poll_transmit(self.now) {
            self.transmit(end, datagram);
        }
    }

    fn note_arrival(&mut self, to: usize, datagram: &Bytes) {
        if to == 0 || Kind::of(datagram) != Kind::Data {
            return;
        }
        DataHeader::decode(datagram).unwrap();
        let (flow, place) = identity(&datagram[HEADER..]);
        if self.arrived.contains_key(&(flow, place)) {
            return;
        }
        self.arrived.insert((flow, place), self.now);
        let expected = self.next_place.entry(flow).or_default();
        if place != *expected {
            self.disturbed.insert(flow);
        }
        *expected = place + 1;
    }

    fn transmit(&mut self, from: usize, datagram: Bytes) {
        let path = self.paths[from];
        self.transmitted[from] += 1;
        let copies = if self.chance(path.doubled) { 2 } else { 1 };
        for _ in 0..copies {
            if self.chance(path.loss) {
                if Kind::of(&datagram) == Kind::Data {
                    self.disturbed.insert(identity(&datagram[HEADER..]).0);
                }
                continue;
            }
            let jitter = path.jitter.as_nanos() as u64;
            let extra = if jitter == 0 { 0 } else { self.random() % jitter };
            let at = self.now + path.delay + Duration::from_nanos(extra);
            self.serial += 1;
            self.in_flight.insert((at, self.serial), (1 - from, datagram.clone()));
        }
    }

    fn chance(&mut self, millionths: u64) -> bool {
        millionths > 0 && self.random() % 1_000_000 < millionths
    }

    /// splitmix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
