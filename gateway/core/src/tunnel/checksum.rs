//! The Internet checksum (RFC 1071) over packets, whole and in the two halves that offloads make of it.
//!
//! A transport checksum covers a pseudo header (addresses, protocol, length) and the segment. A packet
//! that "needs its checksum" carries the folded sum of the pseudo header, not inverted, and whoever sends
//! it on adds the rest (`linux/skbuff.h`, CHECKSUM_PARTIAL).

/// The one's complement sum of `bytes`, not folded.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_be_bytes(last));
    sum
}

/// A sum in 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The sum of the pseudo header without its length (RFC 9293, 3.1; RFC 8200, 8.1). `packet` begins with an
/// IP header of 20 or 40 bytes at least.
pub fn pseudo_header(packet: &[u8], protocol: u8) -> u64 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    sum(addresses) + u64::from(protocol)
}

/// Sets the header checksum of an IPv4 packet.
pub fn set_ipv4_header(packet: &mut [u8]) {
    let header_len = usize::from(packet[0] & 0x0f) * 4;
    packet[10..12].copy_from_slice(&[0, 0]);
    let checksum = !fold(sum(&packet[..header_len]));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Completes a checksum that was left to us: over everything from `start`, into the field at `start` +
/// `offset`, which holds what else it covers. `false` if those lie outside.
pub fn complete(packet: &mut [u8], start: usize, offset: usize) -> bool {
    let Some(covered) = packet.get(start..) else { return false };
    if covered.len() < offset + 2 {
        return false;
    }
    let checksum = match !fold(sum(covered)) {
        // In UDP 0 says that there is none (RFC 768); both are zero in one's complement.
        0 => 0xffff,
        checksum => checksum,
    };
    packet[start + offset..start + offset + 2].copy_from_slice(&checksum.to_be_bytes());
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[0x12])), 0x1200, "an odd byte is the high one");
    }

    #[test]
    fn a_field_outside_the_packet_is_refused() {
        assert!(!complete(&mut [0; 10], 11, 0));
        assert!(!complete(&mut [0; 10], 4, 5));
        assert!(complete(&mut [0; 10], 4, 4));
    }

    proptest! {
        #[test]
        fn the_sum_is_that_of_16_bit_words(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let words = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)));
            prop_assert_eq!(fold(sum(&bytes)), fold(words.sum()));
        }

        #[test]
        fn a_completed_checksum_verifies(mut bytes in prop::collection::vec(any::<u8>(), 20..100)) {
            bytes[10..12].copy_from_slice(&[0, 0]);
            prop_assert!(complete(&mut bytes, 4, 6));
            prop_assert_eq!(fold(sum(&bytes[4..])), 0xffff);
        }
    }
}
