//! Finishes what the device gave: cuts a super-packet into the segments that the kernel would have sent, of the size
//! it asked for or less, and makes their checksums.
//!
//! Headers are copied and corrected: lengths, IPv4 identification and header checksum, TCP sequence number;
//! FIN and PSH are kept by the last segment only, CWR by the first (`net/ipv4/tcp_offload.c`). What the
//! data is does not matter here, nor where a segment goes.

use bytes::{BufMut, Bytes, BytesMut};

use super::checksum;
use super::offload::{Layout, Offload};
use super::packet::{Packet, TCP};

const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;
/// The least data a segment carries, in bytes: on a path so narrow that less fits, packets are split instead.
const MIN_SEGMENT: usize = 256;

/// A super-packet on its way into segments.
#[derive(Debug)]
struct Cut<'a> {
    packet: &'a [u8],
    layout: Layout,
    size: usize,
    pseudo_sum: u64,
}

impl<'a> Cut<'a> {
    /// Cuts `packet` after every `size` bytes of data. `None` if it is not a whole TCP or UDP packet with
    /// data.
    fn new(packet: &'a [u8], size: usize) -> Option<Self> {
        let view = Packet::parse(packet).ok()?;
        let layout = Layout::of(&view).filter(|layout| size > 0 && layout.data_at < packet.len())?;
        let pseudo_sum = checksum::pseudo_header(packet, layout.protocol);
        Some(Self { packet, layout, size, pseudo_sum })
    }

    fn data_len(&self) -> usize {
        self.packet.len() - self.layout.data_at
    }

    fn count(&self) -> usize {
        self.data_len().div_ceil(self.size)
    }

    /// TCP does not mind where its data is cut: shorter segments, all of which fit into `max_len`.
    fn shortened(self, max_len: usize) -> Self {
        let room = max_len.saturating_sub(self.layout.data_at);
        if self.layout.protocol != TCP || room < MIN_SEGMENT {
            return self;
        }
        Self { size: self.size.min(room), ..self }
    }

    /// Appends segment `index`, below [`Cut::count`], to `out`.
    fn write(&self, index: usize, out: &mut BytesMut) {
        let header_len = self.layout.data_at;
        let from = index * self.size;
        let data_len = self.size.min(self.data_len() - from);
        out.put_slice(&self.packet[..header_len]);
        self.correct(index, data_len, out);
        out.put_slice(&self.packet[header_len + from..][..data_len]);
        checksum::complete(out, self.layout.transport_at, self.layout.checksum_offset());
    }

    fn correct(&self, index: usize, data_len: usize, header: &mut [u8]) {
        let transport_at = self.layout.transport_at;
        let transport_len = header.len() - transport_at + data_len;
        set_lengths(header, transport_at + transport_len, index as u16);
        match self.layout.protocol {
            TCP => self.correct_tcp(index, &mut header[transport_at..]),
            _ => header[transport_at + 4..][..2].copy_from_slice(&(transport_len as u16).to_be_bytes()),
        }
        self.layout.set_pseudo_sum(header, self.pseudo_sum, transport_len);
    }

    fn correct_tcp(&self, index: usize, tcp: &mut [u8]) {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        let sequence = sequence.wrapping_add((index * self.size) as u32);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        if index + 1 < self.count() {
            tcp[13] &= !TCP_FIN_PSH;
        }
        if index > 0 {
            tcp[13] &= !TCP_CWR;
        }
    }
}

/// Appends the packets that the kernel would send for this one to `out`, with nothing left to do. The segments of a
/// TCP super-packet are at most `max_len` bytes long where the kernel would have made them longer.
pub fn finish(offload: Offload, packet: &[u8], max_len: usize, out: &mut Vec<Bytes>) {
    let cut = match offload {
        Offload::Finished => None,
        Offload::Checksum => return out.push(complete(packet)),
        Offload::Tcp { size } | Offload::Udp { size } => Cut::new(packet, usize::from(size)),
    };
    let Some(cut) = cut.map(|cut| cut.shortened(max_len)) else {
        return out.push(Bytes::copy_from_slice(packet));
    };
    let count = cut.count();
    let mut buffer = BytesMut::with_capacity(cut.data_len() + count * cut.layout.data_at);
    for index in 0..count {
        cut.write(index, &mut buffer);
        out.push(buffer.split().freeze());
    }
}

/// Makes the checksum of a packet that needs it.
fn complete(packet: &[u8]) -> Bytes {
    let mut packet = BytesMut::from(packet);
    if let Some(layout) = Packet::parse(&packet).ok().and_then(|view| Layout::of(&view)) {
        checksum::complete(&mut packet, layout.transport_at, layout.checksum_offset());
    }
    packet.freeze()
}

/// Sets a packet's lengths in its IP header; `step` is added to the IPv4 identification.
pub(super) fn set_lengths(packet: &mut [u8], len: usize, step: u16) {
    if packet[0] >> 4 == 6 {
        packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        return;
    }
    packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
    let identification = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(step);
    packet[4..6].copy_from_slice(&identification.to_be_bytes());
    checksum::set_ipv4_header(packet);
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A TCP or UDP super-packet with `data` bytes, cut every `size`, as the kernel would hand it over.
    pub fn super_packet(six: bool, tcp: bool, data: usize, size: u16, flags: u8) -> (Offload, Bytes) {
        let transport_len = if tcp { 32 } else { 8 } + data;
        let mut packet = ip_header(six, if tcp { 6 } else { 17 }, transport_len);
        packet.extend_from_slice(&[0x9c, 0x40, 0, 80]);
        if tcp {
            packet.extend_from_slice(&0xffff_ff00u32.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0, 7, 0x80, flags, 1, 0, 0, 0, 0, 0]);
            packet.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            packet.extend_from_slice(&(transport_len as u16).to_be_bytes());
            packet.extend_from_slice(&[0, 0]);
        }
        packet.extend((0..data).map(|index| (index / 7) as u8));
        let layout = Layout::of(&Packet::parse(&packet).unwrap()).unwrap();
        let sum = checksum::pseudo_header(&packet, layout.protocol);
        layout.set_pseudo_sum(&mut packet, sum, transport_len);
        let offload = if tcp { Offload::Tcp { size } } else { Offload::Udp { size } };
        (offload, packet.into())
    }

    fn ip_header(six: bool, protocol: u8, payload: usize) -> Vec<u8> {
        if six {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header[4..6].copy_from_slice(&(payload as u16).to_be_bytes());
            header.extend((0..32).map(|byte| byte * 5));
            return header;
        }
        let mut header =
            vec![0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 198, 51, 100, 10];
        header[2..4].copy_from_slice(&((20 + payload) as u16).to_be_bytes());
        checksum::set_ipv4_header(&mut header);
        header
    }

    pub fn finished((offload, packet): &(Offload, Bytes), max_len: usize) -> Vec<Bytes> {
        let mut segments = Vec::new();
        finish(*offload, packet, max_len, &mut segments);
        segments
    }

    /// Checks what a receiving kernel checks: lengths and both checksums.
    pub fn verify(packet: &[u8]) {
        let view = Packet::parse(packet).unwrap();
        assert_eq!(view.transport_at() + view.transport().len(), packet.len());
        if packet[0] >> 4 == 4 {
            assert_eq!(checksum::fold(checksum::sum(&packet[..20])), 0xffff);
        }
        let layout = Layout::of(&view).unwrap();
        if layout.protocol != TCP {
            let len = u16::from_be_bytes([packet[layout.transport_at + 4], packet[layout.transport_at + 5]]);
            assert_eq!(usize::from(len), view.transport().len());
        }
        let pseudo = checksum::pseudo_header(packet, layout.protocol) + view.transport().len() as u64;
        assert_eq!(checksum::fold(pseudo + checksum::sum(view.transport())), 0xffff);
    }

    #[test]
    fn flags_that_belong_to_one_end_stay_there() {
        let frame = super_packet(false, true, 2500, 1000, 0x10 | TCP_FIN_PSH | TCP_CWR);
        let flags: Vec<u8> = finished(&frame, 1500).iter().map(|segment| segment[33]).collect();
        assert_eq!(flags, [0x10 | TCP_CWR, 0x10, 0x10 | TCP_FIN_PSH]);
    }

    #[test]
    fn what_has_no_data_or_is_a_fragment_is_not_cut() {
        assert!(Cut::new(&super_packet(true, true, 0, 1, 0x10).1, 100).is_none());
        let mut fragment = super_packet(false, false, 100, 10, 0).1.to_vec();
        fragment[6] = 0x20;
        assert!(Cut::new(&fragment, 10).is_none());
    }

    #[test]
    fn a_super_packet_of_crumbs_is_refused_at_the_limit() {
        use super::super::offload::{self, FrameError, MAX_SEGMENTS, VNET_HEADER_BYTES};

        let read = |data: usize| {
            let (left, packet) = super_packet(false, true, data, 8, 0x10);
            let layout = Layout::of(&Packet::parse(&packet).unwrap()).unwrap();
            let mut frame = [&offload::header_of(left, layout, &packet)[..], &packet].concat();
            offload::read(&mut frame).map(|(read, len)| {
                assert_eq!((read, len), (left, frame.len() - VNET_HEADER_BYTES));
            })
        };
        assert_eq!(read(8 * MAX_SEGMENTS), Ok(()));
        assert_eq!(read(8 * MAX_SEGMENTS + 1), Err(FrameError::Contradiction));
    }

    #[test]
    fn only_tcp_is_cut_smaller_than_the_kernel_asked_and_not_to_crumbs() {
        let lens = |tcp, max_len| {
            let frame = super_packet(false, tcp, 3000, 1400, 0x10);
            finished(&frame, max_len).iter().map(Bytes::len).collect::<Vec<_>>()
        };
        assert_eq!(lens(true, 1052), [1052, 1052, 1052]);
        assert_eq!(lens(true, 1500), [1452, 1452, 252]);
        assert_eq!(lens(true, 200), [1452, 1452, 252]);
        assert_eq!(lens(false, 1000), [1428, 1428, 228]);
    }

    proptest! {
        #[test]
        fn segments_are_whole_packets_that_carry_all_data_in_order(
            six in any::<bool>(),
            tcp in any::<bool>(),
            data in 1usize..20_000,
            size in 1u16..9000,
            max_len in 500usize..2000,
        ) {
            let data = data.min(usize::from(size) * 40);
            let frame = super_packet(six, tcp, data, size, 0x18);
            let header_len = frame.1.len() - data;
            let max_len = if tcp { max_len } else { usize::MAX };
            let segments = finished(&frame, max_len);
            let size = usize::from(size).min(max_len - header_len);
            prop_assert_eq!(segments.len(), data.div_ceil(size));
            let mut joined = Vec::new();
            for (index, segment) in segments.iter().enumerate() {
                verify(segment);
                if tcp {
                    let at = header_len - 32 + 4;
                    let sequence = u32::from_be_bytes(*segment[at..].first_chunk().unwrap());
                    prop_assert_eq!(sequence, 0xffff_ff00u32.wrapping_add(joined.len() as u32));
                }
                if !six {
                    prop_assert_eq!(u16::from_be_bytes([segment[4], segment[5]]), 0xffffu16.wrapping_add(index as u16));
                }
                joined.extend_from_slice(&segment[header_len..]);
            }
            prop_assert_eq!(&joined[..], &frame.1[header_len..]);
        }
    }
}
