//! What the source tells the destination about a machine's network, so that open connections live on.
//!
//! Sent with the proposal (addresses) and with the hand-over itself (neighbours and flows, sampled
//! until the guest stopped). Purely data: applying it is the gateway's work.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::advertisement::Advertisement;
use crate::ids::DeviceName;

/// A link-layer address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An address block: `addr` need not be its first address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Prefix {
    /// An address inside the block.
    pub addr: IpAddr,
    /// The block's length in bits.
    pub len: u8,
}

impl Prefix {
    /// The block of one address.
    pub fn host(addr: IpAddr) -> Self {
        Self { addr, len: if addr.is_ipv6() { 128 } else { 32 } }
    }

    /// Whether `address` is inside; no address of one IP version is inside a block of the other.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.addr, address) {
            (IpAddr::V4(block), IpAddr::V4(address)) => {
                (u32::from(block) ^ u32::from(address)).leading_zeros() >= u32::from(self.len)
            }
            (IpAddr::V6(block), IpAddr::V6(address)) => {
                (u128::from(block) ^ u128::from(address)).leading_zeros() >= u32::from(self.len)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }

    /// The address by which all of a network is reached, of IPv4 networks with more than two addresses.
    pub fn broadcast(&self) -> Option<IpAddr> {
        match self.addr {
            IpAddr::V4(addr) if self.len <= 30 => {
                Some(Ipv4Addr::from(u32::from(addr) | u32::MAX >> self.len).into())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }
}

/// One flow of the guest, as the guest's own packets carry it: local is the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FlowTuple {
    /// IP protocol number (6 TCP, 17 UDP).
    pub protocol: u8,
    /// The guest's address.
    pub local: IpAddr,
    /// The guest's port.
    pub local_port: u16,
    /// The other end's address.
    pub remote: IpAddr,
    /// The other end's port.
    pub remote_port: u16,
}

/// A neighbour that the guest may have in its ARP or NDP cache for ever.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Neighbour {
    /// The neighbour's address.
    pub addr: IpAddr,
    /// Its link-layer address at the home site.
    pub mac: Mac,
    /// What it is on the home LAN.
    pub kind: NeighbourKind,
}

/// What a neighbour is on its LAN.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NeighbourKind {
    /// A host.
    Host,
    /// A router.
    Router,
    /// A router that advertises itself, and what it says: a guest may have its default route from there. Its address is
    /// link-local.
    Advertiser(Box<Advertisement>),
}

impl Neighbour {
    /// Whether it is a router.
    pub fn is_router(&self) -> bool {
        match self.kind {
            NeighbourKind::Host => false,
            NeighbourKind::Router | NeighbourKind::Advertiser(_) => true,
        }
    }

    /// What it advertises, and from which address.
    pub fn advertises(&self) -> Option<(Ipv6Addr, &Advertisement)> {
        match (&self.kind, self.addr) {
            (NeighbourKind::Advertiser(advertisement), IpAddr::V6(source)) => Some((source, advertisement)),
            (NeighbourKind::Advertiser(_), IpAddr::V4(_)) => None,
            (NeighbourKind::Host | NeighbourKind::Router, _) => None,
        }
    }
}

/// What one NIC needs at the visited site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicHandover {
    /// The NIC's name in the machine's definition.
    pub nic: DeviceName,
    /// The guest's link-layer address.
    pub mac: Mac,
    /// The guest's home addresses with the prefix length of the home LAN.
    pub home: Vec<Prefix>,
    /// The home LAN's routers and other neighbours the guest has spoken to.
    pub neighbours: Vec<Neighbour>,
    /// Destinations that are reached through the tunnel, old flows and new.
    pub home_prefixes: Vec<Prefix>,
    /// Flows seen before the move.
    pub flows: Vec<FlowTuple>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str, len: u8) -> Prefix {
        Prefix { addr: text.parse().unwrap(), len }
    }

    #[test]
    fn blocks_of_every_length_hold_what_they_should() {
        let holds = |block: Prefix, text: &str| block.contains(text.parse().unwrap());
        assert!(holds(block("0.0.0.0", 0), "255.255.255.255"));
        assert!(holds(block("192.0.2.1", 32), "192.0.2.1") && !holds(block("192.0.2.1", 32), "192.0.2.0"));
        assert!(
            holds(block("203.0.113.2", 24), "203.0.113.77")
                && !holds(block("203.0.113.2", 24), "203.0.114.2")
        );
        assert!(holds(block("2001:db8:b::2", 64), "2001:db8:b::77"));
        assert!(!holds(block("::", 0), "192.0.2.1"));
    }

    #[test]
    fn a_network_of_ipv4_has_a_broadcast_address() {
        let broadcast = |text, len| block(text, len).broadcast().map(|address| address.to_string());
        assert_eq!(broadcast("198.51.100.65", 29).as_deref(), Some("198.51.100.71"));
        assert_eq!(broadcast("198.51.100.65", 0).as_deref(), Some("255.255.255.255"));
        assert_eq!(broadcast("198.51.100.65", 31), None);
        assert_eq!(broadcast("2001:db8::1", 64), None);
    }
}
