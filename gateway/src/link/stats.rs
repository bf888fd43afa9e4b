//! What the link counts: payload by kind, and what UDP carried, comparable with an outside observer.
//!
//! Payload counters live as long as the gateway; quinn's counters live as long as a connection and are
//! added up here. Nothing is exported from here.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use longhaul_core::bulk::Channel;
use longhaul_core::units::Rate;
use quinn::ConnectionStats;

use super::handle::Current;

/// Bytes by what they were for. Without QUIC's own headers and without what was sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Frames on the control stream.
    pub control_bytes: u64,
    /// Chunks of memory channels with their headers.
    pub memory_bytes: u64,
    /// Chunks of disk channels with their headers.
    pub disk_bytes: u64,
    /// Datagrams: the tunnel.
    pub datagram_bytes: u64,
}

impl Traffic {
    /// All kinds together.
    pub fn total_bytes(&self) -> u64 {
        self.control_bytes + self.memory_bytes + self.disk_bytes + self.datagram_bytes
    }

    /// The same shares of another total, such as what UDP carried: headers, acknowledgements and
    /// retransmissions are then counted with what caused most of them.
    pub fn scaled_to(&self, total_bytes: u64) -> Self {
        let payload_bytes = self.total_bytes().max(1);
        let scale =
            |bytes: u64| (u128::from(bytes) * u128::from(total_bytes) / u128::from(payload_bytes)) as u64;
        Self {
            control_bytes: scale(self.control_bytes),
            memory_bytes: scale(self.memory_bytes),
            disk_bytes: scale(self.disk_bytes),
            datagram_bytes: scale(self.datagram_bytes),
        }
    }
}

/// UDP as an observer on the path counts it, over all connections with one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UdpTraffic {
    /// UDP datagrams.
    pub datagrams: u64,
    /// Their payload; an observer of IP counts 28 (IPv4) or 48 (IPv6) bytes more for each.
    pub payload_bytes: u64,
}

impl UdpTraffic {
    /// IP bytes, with `header_bytes` (28 or 48) for each datagram.
    pub fn ip_bytes(&self, header_bytes: u64) -> u64 {
        self.payload_bytes + self.datagrams * header_bytes
    }
}

/// One link's figures since the gateway started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkStats {
    /// Whether there is a connection now.
    pub up: bool,
    /// How many connections there were.
    pub connections: u64,
    /// The smoothed round trip; zero while down.
    pub rtt: Duration,
    /// The shortest round trip of late, or of this connection where that is not estimated; zero while down.
    pub min_rtt: Duration,
    /// What the path is believed to carry, in UDP payload; `None` while down, before it was measured, and where it is not
    /// estimated.
    pub bandwidth: Option<Rate>,
    /// Payload sent.
    pub sent: Traffic,
    /// Payload received.
    pub received: Traffic,
    /// UDP sent, everything included.
    pub udp_sent: UdpTraffic,
    /// UDP received, everything included.
    pub udp_received: UdpTraffic,
    /// Packets that QUIC took for lost; their stream data was sent again.
    pub lost_packets: u64,
    /// Their bytes.
    pub lost_bytes: u64,
    /// Datagrams that were not sent or not taken in time.
    pub datagrams_dropped: u64,
}

/// Which counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Control,
    Memory,
    Disk,
    Datagram,
}

impl From<Channel> for Kind {
    fn from(channel: Channel) -> Self {
        match channel {
            Channel::Memory => Self::Memory,
            Channel::Disk(_) | Channel::Map(_) => Self::Disk,
        }
    }
}

/// Counters that several tasks add to.
#[derive(Debug, Default)]
pub(super) struct Counters {
    sent: [AtomicU64; 4],
    received: [AtomicU64; 4],
    datagrams_dropped: AtomicU64,
}

impl Counters {
    pub(super) fn sent(&self, kind: Kind, bytes: usize) {
        self.sent[kind as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn received(&self, kind: Kind, bytes: usize) {
        self.received[kind as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn datagram_dropped(&self) {
        self.datagrams_dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// The figures, with `past` connections and the one there is now.
    pub(super) fn stats(&self, past: &PastConnections, now: Option<&Current>) -> LinkStats {
        let mut total = *past;
        if let Some(current) = now {
            total.add(&current.connection.stats());
        }
        let pace = now.and_then(|current| current.pace.as_ref());
        let shortest = |current: &Current| current.connection.min_rtt();
        LinkStats {
            up: now.is_some(),
            connections: total.connections,
            rtt: now.map_or(Duration::ZERO, |current| current.connection.rtt()),
            min_rtt: pace.and_then(|pace| pace.min_rtt()).or(now.map(shortest)).unwrap_or_default(),
            bandwidth: pace.and_then(|pace| pace.bandwidth()),
            sent: traffic(&self.sent),
            received: traffic(&self.received),
            udp_sent: total.udp_sent,
            udp_received: total.udp_received,
            lost_packets: total.lost_packets,
            lost_bytes: total.lost_bytes,
            datagrams_dropped: self.datagrams_dropped.load(Ordering::Relaxed),
        }
    }
}

fn traffic(counters: &[AtomicU64; 4]) -> Traffic {
    let load = |kind: Kind| counters[kind as usize].load(Ordering::Relaxed);
    Traffic {
        control_bytes: load(Kind::Control),
        memory_bytes: load(Kind::Memory),
        disk_bytes: load(Kind::Disk),
        datagram_bytes: load(Kind::Datagram),
    }
}

/// What ended connections had counted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PastConnections {
    connections: u64,
    udp_sent: UdpTraffic,
    udp_received: UdpTraffic,
    lost_packets: u64,
    lost_bytes: u64,
}

impl PastConnections {
    pub(super) fn add(&mut self, stats: &ConnectionStats) {
        self.connections += 1;
        self.udp_sent.datagrams += stats.udp_tx.datagrams;
        self.udp_sent.payload_bytes += stats.udp_tx.bytes;
        self.udp_received.datagrams += stats.udp_rx.datagrams;
        self.udp_received.payload_bytes += stats.udp_rx.bytes;
        self.lost_packets += stats.path.lost_packets;
        self.lost_bytes += stats.path.lost_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_stay_the_same_when_scaled() {
        let traffic = Traffic { control_bytes: 10, memory_bytes: 70, disk_bytes: 20, datagram_bytes: 0 };
        let scaled = traffic.scaled_to(200);
        assert_eq!(scaled.memory_bytes, 140);
        assert_eq!(scaled.total_bytes(), 200);
        assert_eq!(Traffic::default().scaled_to(200), Traffic::default());
    }
}
