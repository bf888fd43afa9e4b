//! Which home addresses a host can route without losing something of its own.
//!
//! A home address becomes a host route towards the tunnel at home, and has a route of its own where the machine visits.
//! A route to what the host itself needs cuts the host off, the link included. The gateway gathers the facts, and says
//! less of a visited site, whose routes stay as they are. What another machine or a stranger has is not looked at here:
//! the policy of the datapath keeps machines apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::ids::SiteName;

/// What a host and its gateway need to reach, or have themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostAddresses {
    /// Its own addresses.
    pub own: BTreeSet<IpAddr>,
    /// The other ends of its links.
    pub peers: BTreeMap<IpAddr, SiteName>,
    /// The routers of its routes; of a visited site: none.
    pub routers: BTreeSet<IpAddr>,
    /// The name servers it asks or updates; of a visited site: none.
    pub name_servers: BTreeSet<IpAddr>,
    /// The care-of addresses of its pools.
    pub care_of: BTreeSet<IpAddr>,
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
        None
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
            ("::ffff:198.51.100.2", "site a's gateway"),
        ];
        for (home, words) in cases {
            let homes = [address("198.51.100.10"), address(home)];
            let text = host().check(homes).expect_err(home).to_string();
            assert!(text.contains(words) && text.contains(home), "{text}");
        }
    }

    #[test]
    fn neighbours_of_what_the_host_needs_are_free() {
        for home in ["198.51.100.3", "203.0.113.77", "203.0.114.2", "192.0.2.2", "2001:db8:c::77"] {
            assert_eq!(host().check([address(home)]), Ok(()), "{home}");
        }
    }
}
