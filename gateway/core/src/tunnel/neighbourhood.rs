//! Whether packets of two machines can be told apart at a site where one visits and from which the other is away.
//!
//! Where their homes have the same private addresses, a packet between two of these may be the visitor's, to a neighbour at
//! its home, or a station's of this site, to the machine that is away. Nothing in it says which. Strangers that never move
//! are no matter: what the tunnel brings and takes is not theirs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::handover::Prefix;

/// What a machine has at its home.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Neighbourhood {
    /// Its home addresses.
    pub own: BTreeSet<IpAddr>,
    /// What it reaches there.
    pub reached: Vec<Prefix>,
}

impl Neighbourhood {
    /// An address of either machine that may be a neighbour of the other one's.
    pub fn shared(&self, other: &Self) -> Option<IpAddr> {
        self.neighbour_in(other).or_else(|| other.neighbour_in(self))
    }

    fn neighbour_in(&self, other: &Self) -> Option<IpAddr> {
        let reached = |address: &&IpAddr| other.reached.iter().any(|prefix| prefix.contains(**address));
        self.own.iter().find(reached).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn neighbourhood(own: &str, reached: &[(&str, u8)]) -> Neighbourhood {
        let reached = reached.iter().map(|(addr, len)| Prefix { addr: addr.parse().unwrap(), len: *len });
        Neighbourhood { own: BTreeSet::from([own.parse().unwrap()]), reached: reached.collect() }
    }

    #[test]
    fn machines_of_the_same_private_network_are_mistaken_for_neighbours_and_others_are_not() {
        let one = neighbourhood("10.0.0.5", &[("10.0.0.5", 24)]);
        let same = neighbourhood("10.0.0.9", &[("10.0.0.9", 24)]);
        let wide = neighbourhood("10.0.7.9", &[("10.0.0.0", 8)]);
        let other = neighbourhood("10.0.1.5", &[("10.0.1.5", 24)]);
        assert_eq!(one.shared(&same), Some("10.0.0.5".parse().unwrap()));
        // It suffices that one of them reaches the other's address.
        assert_eq!(one.shared(&wide), wide.shared(&one));
        assert_eq!(one.shared(&wide), Some("10.0.0.5".parse().unwrap()));
        assert_eq!(one.shared(&other), None);
        assert_eq!(one.shared(&neighbourhood("fd00::5", &[("fd00::", 8)])), None);
    }
}
