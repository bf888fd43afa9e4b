//! Joins the segments of a flow to super-packets again, as a kernel's receive offload does, so that the
//! device is written to once for many.
//!
//! Only neighbours are joined whose headers differ in nothing but what follows from their place
//! (`net/ipv4/tcp_offload.c`, tcp_gro_receive), and whose checksums are right: the kernel makes the joined packet's
//! anew, and what was damaged before it came to us must stay visible. A flow's packets stay in order. Nothing waits
//! here longer than the batch it came with; data is not copied.

use std::collections::VecDeque;

use bytes::Bytes;

use super::checksum;
use super::datapath::Traffic;
use super::offload::{self, Layout, Offload, VNET_HEADER_BYTES};
use super::packet::{Packet, TCP};
use super::segment;

/// Flows that are joined at once; the oldest gives way. More cost a search per packet.
const MAX_TRAINS: usize = 16;
/// Datagrams the kernel takes as one UDP super-packet (`linux/udp.h`, UDP_MAX_SEGMENTS before Linux 6.9).
const MAX_UDP_SEGMENTS: usize = 64;
/// The most packets that are joined: 64 KiB of the shortest usual segments. A device writes them in one piece more.
pub const MAX_JOINED: usize = 128;
const MAX_PACKET: usize = 65_535;
/// The longest header of a packet that is joined: IPv6 and TCP with options.
const MAX_HEADER: usize = 40 + 60;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_ECE: u8 = 0x40;

/// A packet, alone or with others of its flow behind it.
#[derive(Debug)]
pub struct Train {
    first: Bytes,
    layout: Option<Layout>,
    /// The first packet's checksum was found right.
    is_verified: bool,
    /// Data of the packets behind the first.
    rest: Vec<Bytes>,
    rest_len: usize,
    /// FIN and PSH of the last packet: nothing follows it.
    end_flags: u8,
    /// The last packet was shorter than the first.
    is_short: bool,
}

/// Joins packets of one peer.
#[derive(Debug)]
pub struct Coalescer {
    /// The device takes UDP super-packets.
    udp: bool,
    open: Vec<Train>,
    ready: VecDeque<Train>,
}

impl Coalescer {
    /// Nothing joined yet; `udp`: also datagrams, which takes Linux 6.2.
    pub fn new(udp: bool) -> Self {
        Self { udp, open: Vec::with_capacity(MAX_TRAINS), ready: VecDeque::new() }
    }

    /// Takes the next packet.
    pub fn push(&mut self, packet: Bytes) {
        let layout = Packet::parse(&packet)
            .ok()
            .filter(|view| view.total_len() == packet.len())
            .and_then(|view| Layout::of(&view));
        let train = Train::of(packet, layout);
        let Some(layout) = layout else {
            // It may be a fragment of a flow that is joined: nothing overtakes it, and it overtakes nothing.
            self.flush();
            return self.ready.push_back(train);
        };
        if let Some(at) = self.open.iter().rposition(|open| open.is_same_flow(&train, layout)) {
            if self.open[at].take(&train, layout) {
                return;
            }
            let open = self.open.remove(at);
            self.ready.push_back(open);
        }
        if !train.may_lead(layout, self.udp) {
            return self.ready.push_back(train);
        }
        if self.open.len() == MAX_TRAINS {
            let oldest = self.open.remove(0);
            self.ready.push_back(oldest);
        }
        self.open.push(train);
    }

    /// What needs not wait for the packet that comes next.
    pub fn poll(&mut self) -> Option<Train> {
        self.ready.pop_front()
    }

    /// The batch is over: nothing waits any longer.
    pub fn flush(&mut self) {
        self.ready.extend(self.open.drain(..));
    }
}

impl Train {
    fn of(first: Bytes, layout: Option<Layout>) -> Self {
        let (rest, rest_len, end_flags) = (Vec::new(), 0, 0);
        Self { first, layout, is_verified: false, rest, rest_len, end_flags, is_short: false }
    }

    /// Hands the pieces of what the device takes, in order, to `write`: virtio-net header and corrected
    /// headers, then data.
    pub fn write<T>(&self, write: impl FnOnce(&[u8], &[u8], &[Bytes]) -> T) -> T {
        let mut head = [0; VNET_HEADER_BYTES + MAX_HEADER];
        let (Some(layout), false) = (self.layout, self.rest.is_empty()) else {
            return write(&head[..VNET_HEADER_BYTES], &self.first, &[]);
        };
        let (header, data) = self.first.split_at(layout.data_at);
        let packet = &mut head[VNET_HEADER_BYTES..][..layout.data_at];
        packet.copy_from_slice(header);
        self.correct(layout, packet);
        let size = data.len() as u16;
        let offload = if layout.protocol == TCP { Offload::Tcp { size } } else { Offload::Udp { size } };
        let vnet = offload::header_of(offload, layout, packet);
        head[..VNET_HEADER_BYTES].copy_from_slice(&vnet);
        write(&head[..VNET_HEADER_BYTES + layout.data_at], data, &self.rest)
    }

    /// The packets it is and their bytes, headers included.
    pub fn traffic(&self) -> Traffic {
        let header_len = self.layout.map_or(0, |layout| layout.data_at);
        let bytes = self.first.len() + self.rest_len + self.rest.len() * header_len;
        Traffic { packets: 1 + self.rest.len() as u64, bytes: bytes as u64 }
    }

    /// Makes the first packet's headers those of all together.
    fn correct(&self, layout: Layout, header: &mut [u8]) {
        let len = self.first.len() + self.rest_len;
        segment::set_lengths(header, len, 0);
        let transport_len = len - layout.transport_at;
        match layout.protocol {
            TCP => header[layout.transport_at + 13] |= self.end_flags,
            _ => {
                header[layout.transport_at + 4..][..2].copy_from_slice(&(transport_len as u16).to_be_bytes())
            }
        }
        let pseudo_sum = checksum::pseudo_header(header, layout.protocol);
        layout.set_pseudo_sum(header, pseudo_sum, transport_len);
    }
}

/// What is compared before a packet is taken.
impl Train {
    fn is_same_flow(&self, next: &Self, layout: Layout) -> bool {
        let (one, other) = (&self.first, &next.first);
        let addresses = if other[0] >> 4 == 4 { 12..20 } else { 8..40 };
        self.layout
            .is_some_and(|own| own.protocol == layout.protocol && ports(one, own) == ports(other, layout))
            && one[0] >> 4 == other[0] >> 4
            && one[addresses.clone()] == other[addresses]
    }

    /// Others may follow this packet.
    fn may_lead(&self, layout: Layout, udp: bool) -> bool {
        let plain = if self.first[0] >> 4 == 4 { self.first[0] == 0x45 } else { layout.transport_at == 40 };
        let joinable = match layout.protocol {
            TCP => {
                let flags = self.first[layout.transport_at + 13];
                flags & !TCP_ECE == TCP_ACK
            }
            _ => udp,
        };
        plain && joinable && layout.data_at < self.first.len()
    }

    /// Takes `next`, a packet of the same flow, if it is what follows.
    fn take(&mut self, next: &Self, layout: Layout) -> bool {
        let Some(own) = self.layout else { return false };
        let size = self.first.len() - own.data_at;
        let data_len = next.first.len() - layout.data_at;
        let fits = own == layout
            && self.rest.len() + 1 < MAX_JOINED
            && (1..=size).contains(&data_len)
            && self.first.len() + self.rest_len + data_len <= MAX_PACKET;
        let ended = self.is_short || self.end_flags != 0;
        if !fits || ended || !self.is_followed_by(&next.first, layout) {
            return false;
        }
        self.is_verified = self.is_verified || layout.is_valid(&self.first);
        if !self.is_verified || !layout.is_valid(&next.first) {
            return false;
        }
        let transport = &next.first[layout.transport_at..];
        if layout.protocol == TCP {
            self.end_flags = transport[13] & (TCP_FIN | TCP_PSH);
        }
        self.is_short = data_len < size;
        self.rest_len += data_len;
        self.rest.push(next.first.slice(layout.data_at..));
        true
    }

    fn is_followed_by(&self, next: &[u8], layout: Layout) -> bool {
        let (first, index) = (&self.first[..], self.rest.len() + 1);
        let network = match first[0] >> 4 {
            // Version, type of service; flags, time to live, protocol. With "don't fragment" the identification
            // has no meaning (RFC 6864, 4.1).
            4 => {
                let identification = |packet: &[u8]| u16::from_be_bytes([packet[4], packet[5]]);
                let numbered = identification(first).wrapping_add(index as u16) == identification(next);
                first[..2] == next[..2] && first[6..10] == next[6..10] && (first[6] & 0x40 != 0 || numbered)
            }
            _ => first[..4] == next[..4] && first[6..8] == next[6..8],
        };
        let (first, next) = (&first[layout.transport_at..], &next[layout.transport_at..]);
        match layout.protocol {
            TCP => network && self.tcp_follows(first, next, layout.data_at - layout.transport_at),
            _ => network && index < MAX_UDP_SEGMENTS,
        }
    }

    /// Ports were compared; acknowledgement, flags but those of an end, window, urgent pointer and options.
    fn tcp_follows(&self, first: &[u8], next: &[u8], header_len: usize) -> bool {
        let sequence = |tcp: &[u8]| u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let sent = (first.len() - header_len + self.rest_len) as u32;
        sequence(first).wrapping_add(sent) == sequence(next)
            && first[8..13] == next[8..13]
            && first[13] == next[13] & !(TCP_FIN | TCP_PSH)
            && first[14..16] == next[14..16]
            && first[18..header_len] == next[18..header_len]
    }
}

/// Each packet has its ports where its own network headers end.
fn ports(packet: &[u8], layout: Layout) -> &[u8] {
    &packet[layout.transport_at..layout.transport_at + 4]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::segment::tests::{finished, super_packet, verify};
    use super::*;

    type Super = (Offload, Bytes);

    fn push(coalescer: &mut Coalescer, packets: impl IntoIterator<Item = Bytes>) {
        packets.into_iter().for_each(|packet| coalescer.push(packet));
    }

    /// What the device would be given, read back as the kernel reads it.
    fn frame(train: &Train) -> Super {
        let mut bytes = train.write(|head, data, rest| {
            let mut bytes = [head, data].concat();
            rest.iter().for_each(|piece| bytes.extend_from_slice(piece));
            bytes
        });
        let (offload, len) = offload::read(&mut bytes).unwrap();
        assert_eq!(len, bytes.len() - VNET_HEADER_BYTES);
        (offload, Bytes::from(bytes).slice(VNET_HEADER_BYTES..))
    }

    fn drain(coalescer: &mut Coalescer) -> Vec<Super> {
        coalescer.flush();
        std::iter::from_fn(|| coalescer.poll())
            .map(|train| {
                let frame = frame(&train);
                let segments = finished(&frame, usize::MAX);
                let bytes = segments.iter().map(Bytes::len).sum::<usize>();
                assert_eq!(
                    (segments.len() as u64, bytes as u64),
                    (train.traffic().packets, train.traffic().bytes)
                );
                frame
            })
            .collect()
    }

    #[test]
    fn what_is_no_next_segment_ends_a_train_and_comes_after_it() {
        let mut segments = finished(&super_packet(false, true, 5000, 1000, 0x10), usize::MAX);
        let mut other = segments[2].to_vec();
        other[20 + 14] ^= 1; // the window
        segments[2] = other.into();
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, segments);
        let lens: Vec<_> = drain(&mut coalescer).iter().map(|(_, packet)| packet.len() - 52).collect();
        assert_eq!(lens, [2000, 1000, 2000]);
    }

    #[test]
    fn a_pure_acknowledgement_does_not_overtake_data_of_its_flow() {
        let data = super_packet(false, true, 2000, 1000, 0x10);
        let (_, acknowledgement) = super_packet(false, true, 0, 1, 0x10);
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, finished(&data, usize::MAX));
        assert!(coalescer.poll().is_none());
        push(&mut coalescer, finished(&(Offload::Checksum, acknowledgement), usize::MAX));
        let lens: Vec<_> = drain(&mut coalescer).iter().map(|(_, packet)| packet.len()).collect();
        assert_eq!(lens, [2052, 52]);
    }

    #[test]
    fn a_packet_that_was_damaged_is_not_joined_and_stays_damaged() {
        for damaged in [0, 1, 2] {
            let mut segments = finished(&super_packet(false, true, 4000, 1000, 0x10), usize::MAX);
            let mut bytes = segments[damaged].to_vec();
            *bytes.last_mut().unwrap() ^= 1;
            segments[damaged] = bytes.into();
            let expected = segments.clone();
            let mut coalescer = Coalescer::new(true);
            push(&mut coalescer, segments);
            let packets: Vec<_> =
                drain(&mut coalescer).iter().flat_map(|frame| finished(frame, usize::MAX)).collect();
            assert_eq!(packets, expected, "{damaged}");
        }
    }

    #[test]
    fn datagrams_are_joined_only_for_a_device_that_takes_them_and_at_most_64() {
        let segments = finished(&super_packet(true, false, 100 * 100, 100, 0), usize::MAX);
        let joined = |udp| {
            let mut coalescer = Coalescer::new(udp);
            push(&mut coalescer, segments.clone());
            drain(&mut coalescer).len()
        };
        assert_eq!((joined(true), joined(false)), (2, 100));
    }

    #[test]
    fn no_more_are_joined_than_a_device_writes_at_once() {
        let segments = finished(&super_packet(false, true, (MAX_JOINED + 1) * 10, 10, 0x10), usize::MAX);
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, segments);
        coalescer.flush();
        let counts = std::iter::from_fn(|| coalescer.poll()).map(|train| train.traffic().packets);
        assert_eq!(counts.collect::<Vec<_>>(), [MAX_JOINED as u64, 1]);
    }

    #[test]
    fn bytes_behind_a_packet_are_not_taken_for_data() {
        let segments = finished(&super_packet(false, true, 2000, 1000, 0x10), usize::MAX);
        let longer = Bytes::from([&segments[0][..], &[0; 4]].concat());
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, [longer.clone(), segments[1].clone()]);
        coalescer.flush();
        let first = coalescer.poll().unwrap();
        assert_eq!((first.traffic().packets, &first.first), (1, &longer));
    }

    #[test]
    fn a_fragment_does_not_overtake_datagrams_of_its_flow() {
        let segments = finished(&super_packet(false, false, 300, 100, 0), usize::MAX);
        let mut fragment = segments[2].to_vec();
        fragment[6] = 0x20;
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, [segments[0].clone(), segments[1].clone(), fragment.into()]);
        assert_eq!(coalescer.poll().unwrap().traffic().packets, 2);
        assert_eq!(coalescer.poll().unwrap().first[6], 0x20);
    }

    #[test]
    fn a_packet_with_options_does_not_overtake_its_flow() {
        let segments = finished(&super_packet(false, true, 2000, 1000, 0x10), usize::MAX);
        let mut options = segments[1].to_vec();
        options.splice(20..20, [1, 1, 1, 0]);
        options[0] = 0x46;
        let len = options.len() as u16;
        options[2..4].copy_from_slice(&len.to_be_bytes());
        let mut coalescer = Coalescer::new(true);
        push(&mut coalescer, [segments[0].clone(), options.into()]);
        coalescer.flush();
        assert_eq!(coalescer.poll().unwrap().first[0], 0x45);
        assert_eq!(coalescer.poll().unwrap().first[0], 0x46);
    }

    #[test]
    fn headers_that_a_receiver_would_refuse_are_not_made_right() {
        let damage = |tcp, at: usize| {
            let mut segments = finished(&super_packet(false, tcp, 2000, 1000, 0x10), usize::MAX);
            for segment in &mut segments {
                let mut bytes = segment.to_vec();
                bytes[at] ^= 1;
                *segment = bytes.into();
            }
            let mut coalescer = Coalescer::new(true);
            push(&mut coalescer, segments);
            drain(&mut coalescer).len()
        };
        assert_eq!(damage(true, 11), 2, "the checksum of the IPv4 header");
        assert_eq!(damage(false, 25), 2, "the length of the datagram");
    }

    #[test]
    fn more_flows_than_are_joined_at_once_let_the_oldest_go() {
        let mut coalescer = Coalescer::new(true);
        for port in 0..=MAX_TRAINS as u8 {
            let mut segment = finished(&super_packet(false, true, 100, 100, 0x10), usize::MAX)[0].to_vec();
            segment[21] = port;
            coalescer.push(segment.into());
        }
        assert_eq!(coalescer.poll().unwrap().first[21], 0);
        assert!(coalescer.poll().is_none());
    }

    proptest! {
        /// Whatever the order and the mixture, each flow's segments come out as they went in.
        #[test]
        fn joined_and_cut_again_every_flow_is_what_it_was(
            kinds in prop::collection::vec((any::<bool>(), any::<bool>(), 1usize..6000, 100u16..1400), 1..5),
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..100),
        ) {
            let of_flow = |(index, (six, tcp, data, size)): (usize, &(bool, bool, usize, u16))| {
                let (offload, packet) = super_packet(*six, *tcp, *data, *size, 0x18);
                let mut packet = packet.to_vec();
                packet[if *six { 40 } else { 20 }] = index as u8; // a source port of its own
                finished(&(offload, packet.into()), usize::MAX)
            };
            let flows: Vec<Vec<Bytes>> = kinds.iter().enumerate().map(of_flow).collect();
            let mut queues: Vec<_> = flows.iter().map(|flow| flow.iter().cloned().collect::<VecDeque<_>>()).collect();
            let mut sent = Vec::new();
            let mut coalescer = Coalescer::new(true);
            let mut got = Vec::new();
            for index in order {
                let turn = index.index(queues.len());
                if let Some(packet) = queues[turn].pop_front() {
                    sent.push(packet.clone());
                    coalescer.push(packet);
                }
                while let Some(train) = coalescer.poll() {
                    got.extend(finished(&frame(&train), usize::MAX));
                }
            }
            for packet in queues.into_iter().flatten() {
                sent.push(packet.clone());
                coalescer.push(packet);
            }
            got.extend(drain(&mut coalescer).iter().flat_map(|frame| finished(frame, usize::MAX)));
            got.iter().for_each(|packet| verify(packet));
            for (index, (six, ..)) in kinds.iter().enumerate() {
                let of = |packet: &&Bytes| {
                    let is_six = packet[0] >> 4 == 6;
                    usize::from(packet[if is_six { 40 } else { 20 }]) == index && is_six == *six
                };
                let sent: Vec<_> = sent.iter().filter(of).collect();
                let got: Vec<_> = got.iter().filter(of).collect();
                prop_assert_eq!(sent, got);
            }
        }
    }
}
