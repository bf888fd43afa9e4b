//! What the operator may set about the link, with defaults and what each costs.
//!
//! Derived figures (windows, buffers) are computed here from rate and round trip, so that one place
//! says how much memory a link may take. Nothing is read from a file here.

use std::net::SocketAddr;
use std::time::Duration;

use longhaul_core::bulk::MAX_CHUNK_BYTES;
use longhaul_core::ids::SiteName;
use longhaul_core::units::{Bytes, Rate};
use longhaul_core::wire::{SUPPORTED, VersionRange};

use super::handle::DatagramBuffer;
use crate::identity::PublicKey;

/// The smallest UDP payload that QUIC allows, in bytes (RFC 9000, section 14).
pub const MIN_MTU_BYTES: u16 = 1200;

/// How the rate within the operator's is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CongestionControl {
    /// What the path carries at present is estimated, and followed.
    #[default]
    Model,
    /// The operator's rate is what the path carries, whatever happens.
    Fixed,
}

/// One site this gateway links with.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// The site's name; it must call itself the same.
    pub name: SiteName,
    /// The only key that may speak for it.
    pub key: PublicKey,
    /// Where it listens. Without one this side waits to be dialled.
    pub address: Option<SocketAddr>,
}

/// Everything about the link.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// This site.
    pub site: SiteName,
    /// The one UDP port, for listening and for dialling. An IPv6 wildcard serves IPv4 too.
    pub listen: SocketAddr,
    /// The sites to link with.
    pub peers: Vec<PeerConfig>,
    /// How fast to send to each peer at most, in IP bytes. Default 100 Mbit/s. Below the path's own rate the path is not
    /// filled. Above it [`CongestionControl::Model`] sends what the path carries; with `Fixed` the difference is lost and sent again.
    pub rate: Rate,
    /// How the rate within that is found. Default `Model`. `Fixed` needs no time to find it, and yields to nobody.
    pub congestion: CongestionControl,
    /// The round trip to expect before one was measured, and the shortest that windows are made for. Default 100 ms.
    pub rtt: Duration,
    /// Bytes that bulk data of one kind (memory, disk) may have under way in QUIC. Default: two round
    /// trips at `rate`, also where they are longer than `rtt`, and at least 2 MiB. It costs at most that much memory,
    /// twice, at either side.
    pub window_bytes: Option<u64>,
    /// What it grows to at most where the round trip is longer than `rtt`. Default 64 MiB: 2.7 s at 100 Mbit/s, 270 ms at
    /// 1 Gbit/s. Too low limits the rate to that much per two round trips; too high costs memory.
    pub window_limit_bytes: u64,
    /// The UDP socket's buffers in bytes. Default 8 MiB each way; beyond `net.core.rmem_max` it takes
    /// CAP_NET_ADMIN. Small ones lose packets while the gateway is not scheduled.
    pub udp_buffer_bytes: usize,
    /// The UDP payload that the path carries for certain, in bytes. Default 1400. Larger is cheaper; too
    /// large for the path and no connection comes about (28 bytes of IPv4 and UDP header, 48 of IPv6,
    /// come on top).
    pub mtu_bytes: u16,
    /// The largest UDP payload that is probed for, in bytes. Default: `mtu_bytes`, that is no probing.
    pub mtu_limit_bytes: Option<u16>,
    /// How long the link may be silent before this side speaks. Default 1 s; costs one packet of about
    /// 50 bytes each way.
    pub keep_alive: Duration,
    /// How long nothing may arrive before the connection counts as lost and a new one is dialled.
    /// Default 6 s. Short ones take a slow path for a cut one, which costs what was in flight.
    pub idle_timeout: Duration,
    /// Pause after the first failed dial; it doubles up to `backoff_limit`, each with up to half of it
    /// drawn at random. Default 250 ms.
    pub backoff: Duration,
    /// The longest pause between dials. Default 3 s: after a cut the link is back that much later at worst.
    pub backoff_limit: Duration,
    /// How long one dial, or one peer's handshake, may take. Default 4 s.
    pub handshake_timeout: Duration,
    /// How long the side with the larger key waits for the other one to dial. Default 3 s.
    pub dial_after: Duration,
    /// How many incoming handshakes may be under way. Default 32, at about 20 KiB each. From half of it
    /// on, dialling addresses are first proved (QUIC Retry), which costs them one round trip. One address
    /// (of IPv6: one /64) gets a quarter of it at most.
    pub handshake_limit: usize,
    /// How many control messages may wait for the gateway in either direction, per peer. Default 1024.
    /// A peer that sends more than the gateway digests is disconnected.
    pub control_queue: usize,
    /// And how many bytes of them, per peer and direction. Default 8 MiB; that much memory at most.
    pub control_queue_bytes: usize,
    /// How many datagrams from one peer may wait to be taken. Default 4096 (6 MB at most); more are dropped.
    pub datagram_queue: usize,
    /// Bytes of datagrams that may wait to be sent to one peer, whatever the path. Default 1 MiB.
    pub datagram_buffer_bytes: usize,
    /// And where the path itself holds much: half of that, up to this. A connection inside, which sends less after a loss, then
    /// still fills the path. Default 8 MiB, and half a round trip of waiting; more are dropped.
    pub datagram_buffer_limit_bytes: usize,
    /// How many bulk channels one peer may have open in each direction. Default 256.
    pub channel_limit: usize,
    /// How many chunks may be under way at once per peer. Default 512. Small chunks on a long path need
    /// many; each takes about 1 KiB beside its bytes.
    pub stream_limit: u32,
    /// The protocol versions to offer. Default: all this build knows. Fewer hold an update back.
    pub versions: VersionRange,
}

impl LinkConfig {
    /// The defaults for `site` listening at `listen`.
    pub fn new(site: SiteName, listen: SocketAddr, peers: Vec<PeerConfig>) -> Self {
        Self {
            site,
            listen,
            peers,
            rate: Rate::mbit(100),
            congestion: CongestionControl::default(),
            rtt: Duration::from_millis(100),
            window_bytes: None,
            window_limit_bytes: 64 << 20,
            udp_buffer_bytes: 8 << 20,
            mtu_bytes: 1400,
            mtu_limit_bytes: None,
            keep_alive: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(6),
            backoff: Duration::from_millis(250),
            backoff_limit: Duration::from_secs(3),
            handshake_timeout: Duration::from_secs(4),
            dial_after: Duration::from_secs(3),
            handshake_limit: 32,
            control_queue: 1024,
            control_queue_bytes: 8 << 20,
            datagram_queue: 4096,
            datagram_buffer_bytes: 1 << 20,
            datagram_buffer_limit_bytes: 8 << 20,
            channel_limit: 256,
            stream_limit: 512,
            versions: SUPPORTED,
        }
    }

    pub(super) fn datagram_buffer(&self) -> DatagramBuffer {
        let least = self.datagram_buffer_bytes;
        DatagramBuffer { least, most: self.datagram_buffer_limit_bytes.max(least) }
    }

    /// Bytes that one kind of bulk data may have under way: as set, else two round trips at the rate.
    pub fn window_bytes(&self) -> u64 {
        let two_round_trips = self.rate.bytes_in(2 * self.rtt).0;
        self.window_bytes.unwrap_or_else(|| two_round_trips.max(Bytes::mib(2).0))
    }

    /// The same on a path of that round trip.
    pub(super) fn window_at(&self, rtt: Duration) -> u64 {
        let two_round_trips = self.rate.bytes_in(2 * rtt).0.min(self.window_limit_bytes);
        self.window_bytes.unwrap_or_else(|| two_round_trips.max(self.window_bytes()))
    }

    /// The largest UDP payload that may ever be used, in bytes.
    pub(super) fn mtu_limit_bytes(&self) -> u16 {
        self.mtu_limit_bytes.unwrap_or(self.mtu_bytes).max(self.mtu_bytes)
    }

    /// What is wrong with the values, in words that name the key.
    pub(super) fn check(&self) -> Result<(), String> {
        let window_bytes = self.window_bytes();
        let checks = [
            (self.rate.0 < 1000, "rate must be at least 8 kbit/s".to_owned()),
            (self.rtt.is_zero(), "rtt must not be 0".to_owned()),
            (self.mtu_bytes < MIN_MTU_BYTES, format!("mtu must be at least {MIN_MTU_BYTES} bytes")),
            (
                window_bytes < u64::from(MAX_CHUNK_BYTES),
                format!("window must hold one chunk of {MAX_CHUNK_BYTES} bytes"),
            ),
            (self.keep_alive >= self.idle_timeout, "keep_alive must be below idle_timeout".to_owned()),
            (self.handshake_limit == 0, "handshake_limit must not be 0".to_owned()),
            (self.control_queue == 0 || self.datagram_queue == 0, "queues must not be 0".to_owned()),
            (self.channel_limit == 0 || self.stream_limit == 0, "limits must not be 0".to_owned()),
            (self.versions.oldest > self.versions.newest, "versions must not be empty".to_owned()),
        ];
        match checks.into_iter().find(|(wrong, _)| *wrong) {
            Some((_, expected)) => Err(expected),
            None => self.check_peers(),
        }
    }

    fn check_peers(&self) -> Result<(), String> {
        for (index, peer) in self.peers.iter().enumerate() {
            if peer.name == self.site {
                return Err(format!("peer {} has this site's own name", peer.name));
            }
            if self.peers[..index].iter().any(|other| other.name == peer.name || other.key == peer.key) {
                return Err(format!("peer {} repeats another peer's name or key", peer.name));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> LinkConfig {
        LinkConfig::new("a".parse().unwrap(), "127.0.0.1:0".parse().unwrap(), Vec::new())
    }

    #[test]
    fn the_defaults_are_valid_and_two_round_trips_fit_the_window() {
        let mut config = config();
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.window_bytes(), 2_500_000);
        config.rate = Rate::mbit(5);
        assert_eq!(config.window_bytes(), Bytes::mib(2).0);
        config.rate = Rate::mbit(1000);
        assert_eq!(config.window_bytes(), 25_000_000);
    }

    #[test]
    fn a_longer_round_trip_widens_the_window_to_a_limit_and_a_set_one_stays() {
        let mut config = config();
        let at = |config: &LinkConfig, ms| config.window_at(Duration::from_millis(ms));
        assert_eq!((at(&config, 20), at(&config, 1000)), (2_500_000, 25_000_000));
        assert_eq!((at(&config, 2684), at(&config, 2685)), (67_100_000, 64 << 20));
        config.rate = Rate::mbit(10_000);
        assert_eq!((at(&config, 1), at(&config, 1000)), (250_000_000, 250_000_000));
        config.window_bytes = Some(3 << 20);
        assert_eq!(at(&config, 1000), 3 << 20);
    }

    #[test]
    fn wrong_values_are_named() {
        type Spoil = fn(&mut LinkConfig);
        let wrong: [(Spoil, &str); 5] = [
            (|config| config.rate = Rate(999), "rate"),
            (|config| config.mtu_bytes = 1199, "mtu"),
            (|config| config.window_bytes = Some(1000), "window"),
            (|config| config.keep_alive = config.idle_timeout, "keep_alive"),
            (|config| config.stream_limit = 0, "limits"),
        ];
        for (spoil, name) in wrong {
            let mut config = config();
            spoil(&mut config);
            let expected = config.check().unwrap_err();
            assert!(expected.starts_with(name), "{expected}");
        }
    }
}
