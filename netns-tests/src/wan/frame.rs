//! What a TUN device with `IFF_VNET_HDR` hands over: ten bytes of virtio-net header and an IP packet, which may be a
//! super-packet standing for many segments. Knows how long each segment would be on the wire and cuts a run of segments
//! out of a super-packet. Never computes a full checksum: the kernel marks super-packets "checksum to be completed", and
//! the receiving kernel completes or skips it.
//!
//! Layout of the header (virtio 1.2, 5.1.6; `linux/virtio_net.h`): flags, gso_type, hdr_len, gso_size, csum_start,
//! csum_offset; the last four are 16-bit little endian here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// Length of the virtio-net header.
pub const VNET_HEADER_BYTES: usize = 10;

const FLAG_NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;

/// A virtio-net header and an IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame(Vec<u8>);

/// How a super-packet divides; an ordinary packet is one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// How many.
    pub count: usize,
    header_bytes: usize,
    payload_bytes: usize,
    payload_per_segment: usize,
}

/// What a classifier looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHeader {
    /// Who sent it.
    pub source: IpAddr,
    /// Whom it is for.
    pub destination: IpAddr,
    /// IP protocol number (6 TCP, 17 UDP, 1 and 58 ICMP).
    pub protocol: u8,
    /// 0 where the protocol has no ports, and in later IP fragments.
    pub source_port: u16,
    /// 0 where the protocol has no ports, and in later IP fragments.
    pub destination_port: u16,
}

impl Segments {
    /// Length of segment `index` as an IP packet of its own.
    pub fn length(&self, index: usize) -> usize {
        let start = index * self.payload_per_segment;
        self.header_bytes + self.payload_per_segment.min(self.payload_bytes - start)
    }
}

impl Frame {
    /// Takes what was read from the device; `None` if it is too short to be an IP packet.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() >= VNET_HEADER_BYTES + 20).then_some(Self(bytes))
    }

    /// What to write to the device.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// How it divides. What does not parse as a TCP or UDP super-packet is one segment, carried whole.
    pub fn segments(&self) -> Segments {
        self.super_packet().unwrap_or_else(|| {
            let length = self.packet().len();
            Segments { count: 1, header_bytes: 0, payload_bytes: length, payload_per_segment: length }
        })
    }

    /// The segments of `run` as a smaller super-packet, or as a plain packet if it is only one.
    pub fn cut(&self, segments: &Segments, run: Range<usize>) -> Self {
        if run == (0..segments.count) {
            return self.clone();
        }
        let from = run.start * segments.payload_per_segment;
        let to = (run.end * segments.payload_per_segment).min(segments.payload_bytes);
        let payload_start = VNET_HEADER_BYTES + segments.header_bytes;
        let mut bytes = Vec::with_capacity(payload_start + to - from);
        bytes.extend_from_slice(&self.0[..payload_start]);
        bytes.extend_from_slice(&self.0[payload_start + from..payload_start + to]);
        let mut cut = Self(bytes);
        cut.fix_headers(segments, &run, from as u32);
        cut
    }

    /// Addresses, protocol and ports; `None` for what is neither IPv4 nor IPv6.
    pub fn header(&self) -> Option<PacketHeader> {
        let packet = self.packet();
        let (source, destination, protocol, ports_at) = match packet[0] >> 4 {
            4 => {
                let source = IpAddr::V4(Ipv4Addr::from(array::<4>(packet, 12)?));
                let destination = IpAddr::V4(Ipv4Addr::from(array::<4>(packet, 16)?));
                let later_fragment = u16_be(packet, 6)? & 0x1fff != 0;
                let ports_at = (!later_fragment).then_some(usize::from(packet[0] & 15) * 4);
                (source, destination, packet[9], ports_at)
            }
            6 => {
                let source = IpAddr::V6(Ipv6Addr::from(array::<16>(packet, 8)?));
                let destination = IpAddr::V6(Ipv6Addr::from(array::<16>(packet, 24)?));
                (source, destination, packet[6], Some(40))
            }
            _ => return None,
        };
        let ports_at = ports_at.filter(|_| protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP);
        let port = |offset: usize| ports_at.and_then(|at| u16_be(packet, at + offset)).unwrap_or(0);
        Some(PacketHeader { source, destination, protocol, source_port: port(0), destination_port: port(2) })
    }

    fn packet(&self) -> &[u8] {
        &self.0[VNET_HEADER_BYTES..]
    }

    fn vnet_u16(&self, offset: usize) -> usize {
        usize::from(u16::from_le_bytes([self.0[offset], self.0[offset + 1]]))
    }

    fn super_packet(&self) -> Option<Segments> {
        let size = self.vnet_u16(4);
        if self.0[0] & FLAG_NEEDS_CHECKSUM == 0 || size == 0 {
            return None;
        }
        let transport = self.vnet_u16(6);
        let packet = self.packet();
        let transport_header = match self.0[1] & !GSO_ECN {
            GSO_TCP4 | GSO_TCP6 => usize::from(packet.get(transport + 12)? >> 4) * 4,
            GSO_UDP => 8,
            _ => return None,
        };
        let header_bytes = transport + transport_header;
        let payload_bytes = packet.len().checked_sub(header_bytes).filter(|payload| *payload > 0)?;
        Some(Segments {
            count: payload_bytes.div_ceil(size),
            header_bytes,
            payload_bytes,
            payload_per_segment: size,
        })
    }

    fn fix_headers(&mut self, segments: &Segments, run: &Range<usize>, payload_offset: u32) {
        let transport = self.vnet_u16(6);
        let gso_type = self.0[1] & !GSO_ECN;
        self.0[2..4].copy_from_slice(&(segments.header_bytes as u16).to_le_bytes());
        if run.len() == 1 {
            self.0[1] = GSO_NONE;
            self.0[4..6].copy_from_slice(&[0, 0]);
        }
        let checksum_at = transport + self.vnet_u16(8);
        let packet = &mut self.0[VNET_HEADER_BYTES..];
        let length = packet.len();
        let transport_length = length - transport;
        match packet[0] >> 4 {
            4 => fix_ipv4(packet, length, run.start as u16),
            _ => put_u16(packet, 4, (length - 40) as u16),
        }
        match gso_type {
            GSO_UDP => put_u16(packet, transport + 4, transport_length as u16),
            _ => fix_tcp(packet, transport, payload_offset, run, segments.count),
        }
        let protocol = if gso_type == GSO_UDP { PROTOCOL_UDP } else { PROTOCOL_TCP };
        let partial = pseudo_header_sum(packet, protocol, transport_length);
        put_u16(packet, checksum_at, partial);
    }
}

fn fix_ipv4(packet: &mut [u8], length: usize, identification_step: u16) {
    put_u16(packet, 2, length as u16);
    let identification = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(identification_step);
    put_u16(packet, 4, identification);
    put_u16(packet, 10, 0);
    let header_bytes = usize::from(packet[0] & 15) * 4;
    let checksum = !fold(sum(&packet[..header_bytes]));
    put_u16(packet, 10, checksum);
}

/// FIN and PSH belong to the last segment only, CWR to the first.
fn fix_tcp(packet: &mut [u8], transport: usize, payload_offset: u32, run: &Range<usize>, count: usize) {
    let at = transport + 4;
    let sequence = u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
    packet[at..at + 4].copy_from_slice(&sequence.wrapping_add(payload_offset).to_be_bytes());
    if run.end != count {
        packet[transport + 13] &= !TCP_FIN_PSH;
    }
    if run.start != 0 {
        packet[transport + 13] &= !TCP_CWR;
    }
}

/// What a "needs checksum" packet carries in its checksum field: the sum over the pseudo header, not inverted.
fn pseudo_header_sum(packet: &[u8], protocol: u8, transport_length: usize) -> u16 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    fold(sum(addresses) + u32::from(protocol) + transport_length as u32)
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

fn u16_be(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(array::<2>(bytes, at)?))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An IPv4 UDP super-packet of `payload` bytes, divided every `size` bytes (0: an ordinary packet).
    pub fn udp_frame(payload: usize, size: u16) -> Frame {
        let mut bytes = vec![0u8; VNET_HEADER_BYTES + 28 + payload];
        if size > 0 {
            bytes[0] = FLAG_NEEDS_CHECKSUM;
            bytes[1] = GSO_UDP;
            bytes[4..6].copy_from_slice(&size.to_le_bytes());
            bytes[6..8].copy_from_slice(&20u16.to_le_bytes());
            bytes[8..10].copy_from_slice(&6u16.to_le_bytes());
        }
        let packet = &mut bytes[VNET_HEADER_BYTES..];
        packet[0] = 0x45;
        packet[9] = PROTOCOL_UDP;
        packet[12..16].copy_from_slice(&[192, 0, 2, 10]);
        packet[16..20].copy_from_slice(&[203, 0, 113, 2]);
        packet[20..24].copy_from_slice(&[0x11, 0x51, 0x11, 0x52]);
        for (index, byte) in packet[28..].iter_mut().enumerate() {
            *byte = (index / usize::from(size.max(1))) as u8;
        }
        Frame::new(bytes).unwrap()
    }

    #[test]
    fn an_ordinary_packet_is_one_segment_of_its_own_length() {
        let frame = udp_frame(100, 0);
        let segments = frame.segments();
        assert_eq!(segments.count, 1);
        assert_eq!(segments.length(0), 128);
        let header = frame.header().unwrap();
        assert_eq!(header.destination.to_string(), "203.0.113.2");
        assert_eq!((header.source_port, header.destination_port), (0x1151, 0x1152));
    }

    #[test]
    fn a_super_packet_is_cut_into_runs_with_right_headers() {
        let frame = udp_frame(2500, 1000);
        let segments = frame.segments();
        assert_eq!(segments.count, 3);
        assert_eq!((segments.length(0), segments.length(2)), (1028, 528));
        let tail = frame.cut(&segments, 1..3);
        assert_eq!(tail.segments().count, 2);
        assert_eq!(tail.packet().len(), 28 + 1500);
        assert_eq!(u16_be(tail.packet(), 2), Some(1528));
        assert_eq!(u16_be(tail.packet(), 24), Some(1508));
        assert_eq!(fold(sum(&tail.packet()[..20])), 0xffff, "the IPv4 header checksum holds");
        assert_eq!((tail.packet()[28], tail.packet()[1028]), (1, 2));
        let last = frame.cut(&segments, 2..3);
        assert_eq!(last.segments().count, 1);
        assert_eq!(last.packet().len(), 528);
    }

    #[test]
    fn tcp_flags_and_sequence_follow_the_segments() {
        let mut bytes = vec![0u8; VNET_HEADER_BYTES + 60 + 3000];
        bytes[0] = FLAG_NEEDS_CHECKSUM;
        bytes[1] = GSO_TCP6;
        bytes[4..6].copy_from_slice(&1000u16.to_le_bytes());
        bytes[6..8].copy_from_slice(&40u16.to_le_bytes());
        bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
        let packet = &mut bytes[VNET_HEADER_BYTES..];
        packet[0] = 0x60;
        packet[6] = PROTOCOL_TCP;
        packet[44..48].copy_from_slice(&5u32.to_be_bytes());
        packet[52] = 5 << 4;
        packet[53] = TCP_FIN_PSH | TCP_CWR | 0x10;
        let frame = Frame::new(bytes).unwrap();
        let segments = frame.segments();
        assert_eq!(segments.count, 3);
        let first = frame.cut(&segments, 0..1);
        assert_eq!(first.packet()[53], TCP_CWR | 0x10);
        let last = frame.cut(&segments, 2..3);
        assert_eq!(last.packet()[53], TCP_FIN_PSH | 0x10);
        assert_eq!(array::<4>(last.packet(), 44), Some(2005u32.to_be_bytes()));
        assert_eq!(u16_be(last.packet(), 4), Some(1020));
    }

    #[test]
    fn a_malformed_super_packet_is_carried_whole() {
        let mut frame = udp_frame(100, 50);
        frame.0[6..8].copy_from_slice(&9000u16.to_le_bytes());
        assert_eq!(frame.segments().count, 1);
        assert!(Frame::new(vec![0; 12]).is_none());
    }
}
