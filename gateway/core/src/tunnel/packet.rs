//! A view of an IPv4 or IPv6 packet: what the tunnel needs to know to carry it, nothing copied.
//!
//! Checksums are not verified and options are not interpreted: the kernels at both ends do that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::handover::FlowTuple;

/// IP protocol number of ICMP (RFC 792).
pub const ICMP: u8 = 1;
/// IP protocol number of TCP (RFC 9293).
pub const TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const UDP: u8 = 17;
/// IP protocol number of ICMPv6 (RFC 4443).
pub const ICMPV6: u8 = 58;

/// IPv6 extension headers walked before a packet is refused; real packets carry one or two.
const MAX_EXTENSION_HEADERS: usize = 8;

/// Why bytes are not a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Neither version 4 nor 6 in the first nibble, or no bytes at all.
    #[error("Not an IP packet")]
    NotIp,
    /// A length in the header reaches beyond the bytes.
    #[error("Packet shorter than its header says")]
    Truncated,
    /// More IPv6 extension headers than are walked.
    #[error("Packet with more than {MAX_EXTENSION_HEADERS} extension headers")]
    TooManyHeaders,
}

/// The flag bits of a TCP header (RFC 9293, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;

    /// The sender has no more data.
    pub fn fin(self) -> bool {
        self.0 & Self::FIN != 0
    }

    /// The sender gives the connection up.
    pub fn rst(self) -> bool {
        self.0 & Self::RST != 0
    }

    /// A segment that asks for a connection or answers such a one.
    pub fn syn(self) -> bool {
        self.0 & Self::SYN != 0
    }

    /// The first segment of a connection, and not its answer.
    pub fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }
}

/// One parsed packet, borrowing its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    dscp: u8,
    fragment: Fragment,
    total_len: usize,
    transport: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fragment {
    Whole,
    First,
    Later,
}

/// Who sent a packet of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The guest.
    Guest,
    /// The other end.
    Remote,
}

impl<'a> Packet<'a> {
    /// Reads the headers of `bytes`, which begin with the IP header.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PacketError> {
        match bytes.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            Some(_) | None => Err(PacketError::NotIp),
        }
    }

    /// Who the packet says it is from.
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// Where it goes.
    pub fn destination(&self) -> IpAddr {
        self.destination
    }

    /// The transport's protocol number, extension headers skipped.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// The differentiated services code point (RFC 2474), without the two bits of ECN.
    pub fn dscp(&self) -> u8 {
        self.dscp
    }

    /// The packet's bytes, IP header included, as that header counts them.
    pub fn total_len(&self) -> usize {
        self.total_len
    }

    /// A fragment other than the first: it has no transport header.
    pub fn is_later_fragment(&self) -> bool {
        self.fragment == Fragment::Later
    }

    /// A fragment, be it the first: its transport checksum covers bytes that are elsewhere.
    pub fn is_fragment(&self) -> bool {
        self.fragment != Fragment::Whole
    }

    /// Where the transport header begins, in bytes from the IP header's first.
    pub fn transport_at(&self) -> usize {
        self.total_len - self.transport.len()
    }

    /// The transport header and what it carries. Bytes behind the packet's own length are not part of it.
    pub fn transport(&self) -> &'a [u8] {
        self.transport
    }

    /// Source and destination port of TCP and UDP.
    pub fn ports(&self) -> Option<(u16, u16)> {
        if self.is_later_fragment() || !matches!(self.protocol, TCP | UDP) {
            return None;
        }
        match self.transport {
            [s0, s1, d0, d1, ..] => Some((u16::from_be_bytes([*s0, *s1]), u16::from_be_bytes([*d0, *d1]))),
            _ => None,
        }
    }

    /// The flags of a TCP segment.
    pub fn tcp_flags(&self) -> Option<TcpFlags> {
        if self.protocol != TCP || self.is_later_fragment() {
            return None;
        }
        self.transport.get(13).copied().map(TcpFlags)
    }

    /// The flow this packet belongs to, the guest being the `sender` or the receiver. Protocols
    /// without ports are one flow per pair of addresses; a later fragment belongs to none.
    pub fn flow(&self, sender: Side) -> Option<FlowTuple> {
        if self.is_later_fragment() {
            return None;
        }
        let (from, to) = match self.protocol {
            TCP | UDP => self.ports()?,
            _ => (0, 0),
        };
        let outward = FlowTuple {
            protocol: self.protocol,
            local: self.source,
            local_port: from,
            remote: self.destination,
            remote_port: to,
        };
        Some(match sender {
            Side::Guest => outward,
            Side::Remote => FlowTuple {
                protocol: self.protocol,
                local: outward.remote,
                local_port: outward.remote_port,
                remote: outward.local,
                remote_port: outward.local_port,
            },
        })
    }

    fn parse_v4(bytes: &'a [u8]) -> Result<Self, PacketError> {
        let header: &[u8; 20] = bytes.first_chunk().ok_or(PacketError::Truncated)?;
        let header_len = usize::from(header[0] & 0x0f) * 4;
        let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_len < 20 || total_len < header_len || total_len > bytes.len() {
            return Err(PacketError::Truncated);
        }
        let fragment = match u16::from_be_bytes([header[6], header[7]]) & 0x3fff {
            0 => Fragment::Whole,
            0x2000 => Fragment::First,
            _ => Fragment::Later,
        };
        Ok(Self {
            source: IpAddr::V4(Ipv4Addr::new(header[12], header[13], header[14], header[15])),
            destination: IpAddr::V4(Ipv4Addr::new(header[16], header[17], header[18], header[19])),
            protocol: header[9],
            dscp: header[1] >> 2,
            fragment,
            total_len,
            transport: &bytes[header_len..total_len],
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Result<Self, PacketError> {
        let header: &[u8; 40] = bytes.first_chunk().ok_or(PacketError::Truncated)?;
        let payload_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let payload = bytes[40..].get(..payload_len).ok_or(PacketError::Truncated)?;
        let (protocol, transport, fragment) = skip_extensions(header[6], payload)?;
        Ok(Self {
            source: IpAddr::V6(address_v6(header, 8)),
            destination: IpAddr::V6(address_v6(header, 24)),
            protocol,
            dscp: (header[0] & 0x0f) << 2 | header[1] >> 6,
            fragment,
            total_len: header.len() + payload.len(),
            transport,
        })
    }
}

fn address_v6(header: &[u8; 40], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&header[at..at + 16]);
    Ipv6Addr::from(octets)
}

/// Walks the extension headers (RFC 8200, 4): protocol, transport bytes, which fragment.
fn skip_extensions(first: u8, payload: &[u8]) -> Result<(u8, &[u8], Fragment), PacketError> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;

    let (mut protocol, mut rest, mut fragment) = (first, payload, Fragment::Whole);
    for _ in 0..MAX_EXTENSION_HEADERS {
        let unit = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => 8,
            AUTHENTICATION => 4,
            _ => return Ok((protocol, rest, fragment)),
        };
        let header: &[u8; 4] = rest.first_chunk().ok_or(PacketError::Truncated)?;
        if protocol == FRAGMENT {
            match u16::from_be_bytes([header[2], header[3]]) {
                0..=7 => fragment = Fragment::First,
                8.. => return Ok((header[0], &[], Fragment::Later)),
            }
        }
        let len = match protocol {
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(header[1]) + 2) * unit,
            _ => (usize::from(header[1]) + 1) * unit,
        };
        protocol = header[0];
        rest = rest.get(len..).ok_or(PacketError::Truncated)?;
    }
    Err(PacketError::TooManyHeaders)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An IPv4 packet with an eight-byte or longer transport header.
    pub(crate) fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, transport: &[u8]) -> Vec<u8> {
        let len = (20 + transport.len()) as u16;
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet.extend_from_slice(&source);
        packet.extend_from_slice(&destination);
        packet.extend_from_slice(transport);
        packet
    }

    /// A TCP header with these ports and flags and no data.
    pub(crate) fn tcp(from: u16, to: u16, flags: u8) -> Vec<u8> {
        let mut header = vec![0; 20];
        header[..2].copy_from_slice(&from.to_be_bytes());
        header[2..4].copy_from_slice(&to.to_be_bytes());
        header[12] = 0x50;
        header[13] = flags;
        header
    }

    fn ipv6(next_header: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next_header, 64];
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet.extend_from_slice(&"2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(&"2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(payload);
        packet
    }

    #[test]
    fn a_tcp_segment_shows_its_flow_from_both_sides() {
        let bytes = ipv4([192, 0, 2, 1], [198, 51, 100, 10], TCP, &tcp(40000, 80, 0x02));
        let packet = Packet::parse(&bytes).unwrap();
        assert!(packet.tcp_flags().unwrap().opens());
        assert_eq!(packet.total_len(), bytes.len());
        let seen_by_guest = packet.flow(Side::Remote).unwrap();
        assert_eq!(seen_by_guest.local_port, 80);
        assert_eq!(seen_by_guest.remote, "192.0.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(packet.flow(Side::Guest).unwrap().remote_port, 80);
    }

    #[test]
    fn a_later_fragment_has_no_ports() {
        let mut bytes = ipv4([192, 0, 2, 1], [198, 51, 100, 10], UDP, &[0; 16]);
        bytes[7] = 3;
        let packet = Packet::parse(&bytes).unwrap();
        assert!(packet.is_later_fragment());
        assert_eq!((packet.ports(), packet.flow(Side::Guest)), (None, None));
    }

    #[test]
    fn ipv6_ports_are_found_behind_extension_headers() {
        let mut payload = vec![44, 0, 0, 0, 0, 0, 0, 0];
        payload.extend_from_slice(&[UDP, 0, 0, 0, 0, 0, 0, 9]);
        payload.extend_from_slice(&[0x10, 0, 0, 53, 0, 8, 0, 0]);
        let mut bytes = ipv6(0, &payload);
        let len = bytes.len();
        bytes.push(0xff);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.total_len(), len, "what follows the packet is not the packet");
        assert_eq!((packet.protocol(), packet.ports()), (UDP, Some((0x1000, 53))));
    }

    #[test]
    fn the_code_point_is_read_from_both_versions() {
        let mut bytes = ipv4([192, 0, 2, 1], [198, 51, 100, 10], UDP, &[0; 8]);
        bytes[1] = 46 << 2 | 3;
        assert_eq!(Packet::parse(&bytes).unwrap().dscp(), 46);
        let mut bytes = ipv6(UDP, &[0; 8]);
        (bytes[0], bytes[1]) = (0x60 | 46 >> 2, 46 << 6 | 0x3f);
        assert_eq!(Packet::parse(&bytes).unwrap().dscp(), 46);
    }

    #[test]
    fn a_chain_of_extension_headers_ends() {
        let bytes = ipv6(60, &[60, 0, 0, 0, 0, 0, 0, 0].repeat(9));
        assert_eq!(Packet::parse(&bytes), Err(PacketError::TooManyHeaders));
    }

    #[test]
    fn a_header_that_promises_more_than_there_is_is_refused() {
        let bytes = ipv4([1, 2, 3, 4], [5, 6, 7, 8], TCP, &tcp(1, 2, 0));
        assert_eq!(Packet::parse(&bytes[..39]), Err(PacketError::Truncated));
        assert_eq!(Packet::parse(&[]), Err(PacketError::NotIp));
        assert_eq!(Packet::parse(&[0x55; 60]), Err(PacketError::NotIp));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..200), six in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = if six { 0x60 } else { 0x40 | (*first & 0x0f) };
            }
            if let Ok(packet) = Packet::parse(&bytes) {
                let _ = (packet.flow(Side::Guest), packet.tcp_flags(), packet.ports());
            }
        }
    }
}
