//! Which home addresses a host can route without losing something of its own.
//!
//! A home address becomes a host route, at home towards the tunnel and at a visited site towards the
//! machine. A route to what the host itself needs cuts the host off, the link included. The gateway
//! gathers the facts. What another machine or a stranger has is not looked at here: the policy of the
//! datapath keeps machines apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::handover::Prefix;
use crate::ids::SiteName;

/// What a host and its gateway need to reach, or have themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostAddresses {
    /// Its own addresses.
    pub own: BTreeSet<IpAddr>,
    /// The other ends of its links.
    pub peers: BTreeMap<IpAddr, SiteName>,
    /// The routers of its routes.
    pub routers: BTreeSet<IpAddr>,
    /// The name servers it asks or updates.
    pub name_servers: BTreeSet<IpAddr>,
    /// The care-of addresses of its pools.
    pub care_of: BTreeSet<IpAddr>,
    /// The networks of its LANs. For a site at which the machine is at home: none, for it is in one.
    pub lans: BTreeSet<Prefix>,
}

/// A home address that the host needs for something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Home address {address} is {what}; give the machine another address")]
pub struct HomeNeeded {
    /// The home address.
    pub address: IpAddr,
    /// What else it is.
    pub what: Needed,
}

/// What a host needs an address for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Needed {
    /// It is the host's.
    #[error("the host's own")]
    Own,
    /// The link goes there.
    #[error("that of site {0}'s gateway")]
    Peer(SiteName),
    /// Routes go through it.
    #[error("a router's")]
    Router,
    /// Names are asked or updated there.
    #[error("a name server's")]
    NameServer,
    /// A visitor may get it.
    #[error("in the pool of care-of addresses")]
    CareOf,
    /// The LAN has it, used or not.
    #[error("in the LAN's {0}, whose stations are reached there")]
    Lan(Network),
}

/// A network, as people write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network(pub Prefix);

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "network {}/{}", self.0.addr, self.0.len)
    }
}

impl HostAddresses {
    /// Whether every one of `homes` can be routed. IPv4 written as IPv6 counts as IPv4.
    ///
    /// # Errors
    ///
    /// The first that cannot, and why.
    pub fn check(&self, homes: impl IntoIterator<Item = IpAddr>) -> Result<(), HomeNeeded> {
        for address in homes {
            if let Some(what) = self.need(address.to_canonical()) {
                return Err(HomeNeeded { address, what });
            }
        }
        Ok(())
    }

    fn need(&self, address: IpAddr) -> Option<Needed> {
        if self.own.contains(&address) {
            return Some(Needed::Own);
        }
        if let Some(site) = self.peers.get(&address) {
            return Some(Needed::Peer(site.clone()));
        }
        if self.routers.contains(&address) {
            return Some(Needed::Router);
        }
        if self.name_servers.contains(&address) {
            return Some(Needed::NameServer);
        }
        if self.care_of.contains(&address) {
            return Some(Needed::CareOf);
        }
        let lan = self.lans.iter().find(|lan| contains(lan, address));
        lan.map(|lan| Needed::Lan(Network(*lan)))
    }
}

fn contains(block: &Prefix, address: IpAddr) -> bool {
    match (block.addr, address) {
        (IpAddr::V4(block_addr), IpAddr::V4(address)) => {
            let differing = u32::from(block_addr) ^ u32::from(address);
            differing.leading_zeros() >= u32::from(block.len)
        }
        (IpAddr::V6(block_addr), IpAddr::V6(address)) => {
            let differing = u128::from(block_addr) ^ u128::from(address);
            differing.leading_zeros() >= u32::from(block.len)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn host() -> HostAddresses {
        let one = |text: &str| BTreeSet::from([address(text)]);
        HostAddresses {
            own: one("203.0.113.2"),
            peers: BTreeMap::from([(address("198.51.100.2"), "a".parse().unwrap())]),
            routers: one("192.0.2.1"),
            name_servers: one("192.0.2.53"),
            care_of: one("192.0.2.200"),
            lans: BTreeSet::from([
                Prefix { addr: address("203.0.113.2"), len: 24 },
                Prefix { addr: address("2001:db8:b::2"), len: 64 },
            ]),
        }
    }

    #[test]
    fn an_address_that_the_host_needs_is_refused_and_the_need_is_named() {
        let cases = [
            ("203.0.113.2", "the host's own"),
            ("198.51.100.2", "site a's gateway"),
            ("192.0.2.1", "a router's"),
            ("192.0.2.53", "a name server's"),
            ("192.0.2.200", "care-of"),
            ("203.0.113.77", "network 203.0.113.2/24"),
            ("2001:db8:b::77", "network 2001:db8:b::2/64"),
            ("::ffff:198.51.100.2", "site a's gateway"),
        ];
        for (home, words) in cases {
            let homes = [address("198.51.100.10"), address(home)];
            let text = host().check(homes).expect_err(home).to_string();
            assert!(text.contains(words) && text.contains(home), "{text}");
        }
    }

    #[test]
    fn neighbours_of_what_the_host_needs_and_its_own_home_lan_are_free() {
        for home in ["198.51.100.3", "203.0.114.2", "192.0.2.2", "2001:db8:c::77"] {
            assert_eq!(host().check([address(home)]), Ok(()), "{home}");
        }
        let at_home = HostAddresses { lans: BTreeSet::new(), ..host() };
        assert_eq!(at_home.check([address("203.0.113.77")]), Ok(()));
    }

    #[test]
    fn blocks_of_every_length_hold_what_they_should() {
        let block = |text: &str, len| Prefix { addr: address(text), len };
        assert!(contains(&block("0.0.0.0", 0), address("255.255.255.255")));
        assert!(contains(&block("192.0.2.1", 32), address("192.0.2.1")));
        assert!(!contains(&block("192.0.2.1", 32), address("192.0.2.0")));
        assert!(!contains(&block("::", 0), address("192.0.2.1")));
    }
}
