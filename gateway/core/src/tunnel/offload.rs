//! What a TUN device with virtio-net headers leaves to whoever sends a packet on: its checksum, and that it
//! is cut into segments.
//!
//! ```text
//!  flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16 | IP packet
//! ```
//!
//! Virtio 1.2, 5.1.6, `linux/virtio_net.h`; little endian. Between two gateways only finished packets travel:
//! [`super::segment`] finishes what the device gave, [`super::coalesce`] joins what comes from a peer. Where a
//! checksum begins and where it is kept follow from the packet's own headers; what the device says otherwise is
//! completed here.

use super::checksum;
use super::packet::{Packet, TCP, UDP};

/// Length of the header before each packet, in bytes.
pub const VNET_HEADER_BYTES: usize = 10;
/// Segments that one super-packet may stand for: 64 KiB of the least that Linux's TCP sends (48 bytes of data, `net/tcp.h`,
/// TCP_MIN_SND_MSS). A guest could ask for one byte each otherwise, and keep everybody waiting.
pub const MAX_SEGMENTS: usize = 1366;
/// The longest packet with its header, in bytes.
pub const MAX_FRAME_BYTES: usize = VNET_HEADER_BYTES + 65_535;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP_CHECKSUM_AT: usize = 16;
const UDP_CHECKSUM_AT: usize = 6;
const TCP_CWR: u8 = 0x80;

/// What is left to do to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Offload {
    /// Nothing.
    #[default]
    Finished,
    /// Its TCP or UDP checksum covers the pseudo header only.
    Checksum,
    /// The same, and it stands for TCP segments of this much data each; the last may have less.
    Tcp {
        /// Bytes of data per segment, at least 1.
        size: u16,
    },
    /// The same with UDP datagrams.
    Udp {
        /// Bytes of data per datagram, at least 1.
        size: u16,
    },
}

/// Why what the device gave is no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than its header, or no IP packet.
    #[error("Not a packet with a virtio-net header")]
    NotAPacket,
    /// Its header asks for what the packet does not allow.
    #[error("Packet whose virtio-net header contradicts it")]
    Contradiction,
}

/// Where the parts of a TCP or UDP packet are, in bytes from its first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub protocol: u8,
    pub transport_at: usize,
    pub data_at: usize,
}

/// Reads what came from the device: what is left to do, and how long the packet behind the header is. A
/// checksum at another place than TCP's or UDP's is completed in place.
pub fn read(frame: &mut [u8]) -> Result<(Offload, usize), FrameError> {
    let (header, packet) =
        frame.split_first_chunk_mut::<VNET_HEADER_BYTES>().ok_or(FrameError::NotAPacket)?;
    let view = Packet::parse(packet).map_err(|_| FrameError::NotAPacket)?;
    let len = view.transport_at() + view.transport().len();
    let layout = Layout::of(&view);
    let packet = &mut packet[..len];
    let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (size, start, offset) = (number(4), usize::from(number(6)), usize::from(number(8)));
    let left = match header[1] & !GSO_ECN {
        GSO_NONE => None,
        GSO_TCP4 | GSO_TCP6 => Some((TCP, Offload::Tcp { size })),
        GSO_UDP => Some((UDP, Offload::Udp { size })),
        _ => return Err(FrameError::Contradiction),
    };
    if let Some((protocol, offload)) = left {
        let fits = layout.is_some_and(|layout| {
            let segments = len.saturating_sub(layout.data_at).div_ceil(usize::from(size).max(1));
            layout.protocol == protocol && (1..=MAX_SEGMENTS).contains(&segments)
        });
        return if fits && size > 0 { Ok((offload, len)) } else { Err(FrameError::Contradiction) };
    }
    if header[0] & NEEDS_CHECKSUM == 0 {
        return Ok((Offload::Finished, len));
    }
    if layout.is_some_and(|layout| (start, offset) == (layout.transport_at, layout.checksum_offset())) {
        return Ok((Offload::Checksum, len));
    }
    match checksum::complete(packet, start, offset) {
        true => Ok((Offload::Finished, len)),
        false => Err(FrameError::Contradiction),
    }
}

/// The header to write before a packet, of which only the headers need be at hand.
pub(super) fn header_of(offload: Offload, layout: Layout, packet: &[u8]) -> [u8; VNET_HEADER_BYTES] {
    let mut header = [0; VNET_HEADER_BYTES];
    let (gso_type, size) = match offload {
        Offload::Finished => return header,
        Offload::Checksum => (GSO_NONE, 0),
        Offload::Tcp { size } if packet[0] >> 4 == 4 => (GSO_TCP4, size),
        Offload::Tcp { size } => (GSO_TCP6, size),
        Offload::Udp { size } => (GSO_UDP, size),
    };
    let congested = layout.protocol == TCP && packet[layout.transport_at + 13] & TCP_CWR != 0;
    header[0] = NEEDS_CHECKSUM;
    header[1] = gso_type | if gso_type != GSO_NONE && congested { GSO_ECN } else { 0 };
    let mut put = |at: usize, value: usize| {
        header[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    };
    put(2, if gso_type == GSO_NONE { 0 } else { layout.data_at });
    put(4, usize::from(size));
    put(6, layout.transport_at);
    put(8, layout.checksum_offset());
    header
}

impl Layout {
    /// The layout of a whole TCP or UDP packet.
    pub fn of(view: &Packet<'_>) -> Option<Self> {
        let (protocol, transport) = (view.protocol(), view.transport());
        let header_len = match protocol {
            _ if view.is_fragment() => return None,
            TCP => usize::from(transport.get(12)? >> 4) * 4,
            UDP => 8,
            _ => return None,
        };
        let shortest = if protocol == TCP { 20 } else { 8 };
        let fits = header_len >= shortest && header_len <= transport.len();
        let transport_at = view.transport_at();
        fits.then_some(Self { protocol, transport_at, data_at: transport_at + header_len })
    }

    pub fn checksum_offset(self) -> usize {
        if self.protocol == TCP { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT }
    }

    /// Whether a receiver would find nothing wrong with a whole packet's headers and checksums. UDP without a checksum
    /// cannot be told, and is not.
    pub fn is_valid(self, packet: &[u8]) -> bool {
        let (network, transport) = packet.split_at(self.transport_at);
        if network[0] >> 4 == 4 && checksum::fold(checksum::sum(network)) != 0xffff {
            return false;
        }
        let at = self.checksum_offset();
        let udp_len = || usize::from(u16::from_be_bytes([transport[4], transport[5]]));
        if self.protocol == UDP && (transport[at..at + 2] == [0, 0] || udp_len() != transport.len()) {
            return false;
        }
        let pseudo = checksum::pseudo_header(packet, self.protocol) + transport.len() as u64;
        checksum::fold(pseudo + checksum::sum(transport)) == 0xffff
    }

    /// Writes the sum that a packet carries which needs its checksum: that of its pseudo header. `pseudo_sum` is the
    /// one of the addresses and the protocol.
    pub fn set_pseudo_sum(self, packet: &mut [u8], pseudo_sum: u64, transport_len: usize) {
        let sum = checksum::fold(pseudo_sum + transport_len as u64);
        let at = self.transport_at + self.checksum_offset();
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}
