//! Which packets are repaired, and which of them must not overtake one another.
//!
//! Decided packet by packet from its headers; no state is kept per flow.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::super::packet::{Packet, TCP, UDP};

/// What the tunnel does for a packet that the path loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// It is repeated, and later ones of its flow wait for it until the deadline.
    Repair,
    /// Nothing: it would rather be lost than late, and nothing waits for it.
    AtOnce,
}

/// Who prefers loss to delay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairPolicy {
    /// TCP. Default repaired: a connection that was opened on a LAN takes loss for congestion.
    pub tcp: Treatment,
    /// UDP that nothing below names. Default at once: most of what cannot wait is UDP.
    pub udp: Treatment,
    /// UDP with a port in one of these ranges at either end, the first range that fits. Default none;
    /// `(443..=443, Repair)` helps QUIC, whose congestion control suffers from loss as TCP's does.
    pub udp_ports: Vec<(RangeInclusive<u16>, Treatment)>,
    /// UDP of these code points is sent at once whatever its ports. Default EF, VOICE-ADMIT and AF41 to
    /// AF43 (RFC 8837: interactive audio and video).
    pub realtime_dscp: Vec<u8>,
    /// Everything else: ICMP, IPsec, GRE. Default repaired.
    pub other: Treatment,
}

impl Default for RepairPolicy {
    fn default() -> Self {
        Self {
            tcp: Treatment::Repair,
            udp: Treatment::AtOnce,
            udp_ports: Vec::new(),
            realtime_dscp: vec![46, 44, 34, 36, 38],
            other: Treatment::Repair,
        }
    }
}

impl RepairPolicy {
    /// Judges one packet. A later fragment of UDP has no ports and gets what `udp` says.
    pub fn treatment(&self, packet: &Packet<'_>) -> Treatment {
        match packet.protocol() {
            TCP => self.tcp,
            UDP => self.udp_treatment(packet),
            _ => self.other,
        }
    }

    fn udp_treatment(&self, packet: &Packet<'_>) -> Treatment {
        if self.realtime_dscp.contains(&packet.dscp()) {
            return Treatment::AtOnce;
        }
        let Some((from, to)) = packet.ports() else { return self.udp };
        let named = self.udp_ports.iter().find(|(ports, _)| ports.contains(&from) || ports.contains(&to));
        named.map_or(self.udp, |(_, treatment)| *treatment)
    }
}

/// The flow a packet is ordered with. Flows that share one by chance wait for each other's losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowBucket(pub u16);

impl FlowBucket {
    /// How many there are.
    pub const COUNT: usize = 1 << 16;

    /// The bucket of a packet: a hash of protocol, addresses and ports. Protocols without ports and later
    /// fragments are ordered per pair of addresses.
    pub fn of(packet: &Packet<'_>) -> Self {
        let (from, to) = packet.ports().unwrap_or((0, 0));
        let ports = u64::from(packet.protocol()) << 32 | u64::from(from) << 16 | u64::from(to);
        let hash = mix(mix(mix(0, ports), fold(packet.source())), fold(packet.destination()));
        Self((hash >> 48) as u16)
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}

fn fold(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(v4) => u64::from(v4.to_bits()),
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            mix((bits >> 64) as u64, bits as u64)
        }
    }
}

/// One round of multiply and fold, after Fibonacci hashing (Knuth, TAOCP 3, 6.4).
fn mix(hash: u64, value: u64) -> u64 {
    let product = (hash ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    product ^ product >> 29
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::super::packet::tests::{ipv4, tcp};
    use super::*;

    fn udp(from: u16, to: u16, dscp: u8) -> Vec<u8> {
        let mut packet = ipv4([192, 0, 2, 1], [198, 51, 100, 10], UDP, &tcp(from, to, 0));
        packet[1] = dscp << 2 | 1;
        packet
    }

    #[test]
    fn udp_is_sent_at_once_unless_a_port_is_named_and_no_realtime_mark_says_otherwise() {
        let policy = RepairPolicy {
            udp_ports: vec![(443..=443, Treatment::Repair), (400..=500, Treatment::AtOnce)],
            ..Default::default()
        };
        let judge = |bytes: &[u8]| policy.treatment(&Packet::parse(bytes).unwrap());
        assert_eq!(judge(&udp(5004, 5004, 0)), Treatment::AtOnce);
        assert_eq!(judge(&udp(443, 50_000, 0)), Treatment::Repair);
        assert_eq!(judge(&udp(50_000, 443, 10)), Treatment::Repair);
        assert_eq!(judge(&udp(50_000, 443, 46)), Treatment::AtOnce);
        assert_eq!(judge(&udp(50_000, 442, 0)), Treatment::AtOnce);
        assert_eq!(judge(&ipv4([1, 2, 3, 4], [5, 6, 7, 8], TCP, &tcp(1, 2, 0))), Treatment::Repair);
        assert_eq!(judge(&ipv4([1, 2, 3, 4], [5, 6, 7, 8], 1, &[0; 8])), Treatment::Repair);
    }

    #[test]
    fn a_thousand_connections_of_one_pair_rarely_share_a_bucket() {
        let bucket = |port| {
            let bytes = ipv4([192, 0, 2, 1], [198, 51, 100, 10], TCP, &tcp(port, 80, 0));
            FlowBucket::of(&Packet::parse(&bytes).unwrap()).0
        };
        let buckets: BTreeSet<u16> = (32_768..33_768).map(bucket).collect();
        assert!(buckets.len() > 970, "{}", buckets.len());
        assert_eq!(bucket(40_000), bucket(40_000));
    }
}
