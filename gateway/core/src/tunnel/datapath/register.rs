//! Which addresses a NIC has in the datapath, and what becomes of another machine's that it comes with.
//!
//! It does not say where packets go; the policy does, and the phases of a port.

use std::net::IpAddr;
use std::time::Duration;

use super::super::hold::Hold;
use super::super::policy::{AddressTaken, Grant, PeerSlot, PortKey, PortSlot, Role};
use super::{Datapath, Phase, Port};
use crate::ids::SiteName;

/// An address of a machine that is here, and the site that attracts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitRoute {
    /// The address.
    pub address: IpAddr,
    /// The site that attracts it, or the one that passes its packets on.
    pub peer: SiteName,
    /// The other of the two, if it may be either.
    pub also: Option<SiteName>,
    /// The machine had it at that site, which may give it to another one.
    pub carried: bool,
}

/// An address of an earlier visit that is another machine's now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenAway {
    /// The address.
    pub address: IpAddr,
    /// The NIC that had it.
    pub from: PortKey,
}

/// The same, between sites that are known by their numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub address: IpAddr,
    pub peer: PeerSlot,
    pub also: Option<PeerSlot>,
    pub carried: bool,
}

impl Datapath {
    pub(super) fn route(&mut self, route: &VisitRoute) -> Route {
        let also = route.also.as_ref().map(|also| self.peer_slot(also));
        Route { address: route.address, peer: self.peer_slot(&route.peer), also, carried: route.carried }
    }

    /// Gives a NIC these addresses and no others. Returned: what was another machine's until now.
    pub(super) fn register(
        &mut self,
        key: &PortKey,
        peer: PeerSlot,
        routes: &[Route],
        role: Role,
    ) -> Result<Vec<GivenAway>, AddressTaken> {
        let port = match self.slot(key, role) {
            Some(slot) => slot,
            None => PortSlot(self.take_slot()),
        };
        let given = self.given_away(port, key, routes)?;
        let known = self.ports.get(&port).is_some_and(|known| known.peer == peer);
        self.policy.forget(port);
        for Route { address, peer, also, carried } in routes.iter().copied() {
            self.policy.allow(Grant { port, peer, also, also_until: None, role, carried }, address);
        }
        if !known {
            self.replace(port, key, peer, role);
        }
        Ok(given)
    }

    fn replace(&mut self, port: PortSlot, key: &PortKey, peer: PeerSlot, role: Role) {
        let hold = Hold::new(self.config.hold.clone());
        let replaced = self.ports.get(&port).and_then(|replaced| replaced.share);
        self.shares.leave(replaced);
        let share = self.shares.enter(&key.machine);
        let (key, phase, released_at) = (key.clone(), Phase::Holding, Duration::ZERO);
        let new = Port {
            key,
            role,
            peer,
            onward: None,
            returning: false,
            phase,
            released_at,
            hold,
            flows: None,
            share,
        };
        self.ports.insert(port, new);
    }

    /// What a machine has here in another role gives way to the same machine: it comes, goes and comes again. Another
    /// machine's address of an earlier visit gives way if the site that attracts it brings it here again: that site alone
    /// can have given it away, and its word that nobody uses it any more is said once and may be lost.
    fn given_away(
        &self,
        port: PortSlot,
        key: &PortKey,
        routes: &[Route],
    ) -> Result<Vec<GivenAway>, AddressTaken> {
        let mut given = Vec::new();
        for route in routes {
            let Some(grant) = self.policy.conflict(port, route.address) else { continue };
            let Some(owner) = self.ports.get(&grant.port).map(|port| &port.key) else { continue };
            if owner == key {
                continue;
            }
            let (address, owner) = (route.address, owner.clone());
            if !(route.carried && grant.carried && route.peer == grant.peer) {
                return Err(AddressTaken { address, owner });
            }
            given.push(GivenAway { address, from: owner });
        }
        Ok(given)
    }
}
