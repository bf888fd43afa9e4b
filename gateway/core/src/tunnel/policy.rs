//! Which packets may travel: only those of machines that moved across the link to that very peer.
//!
//! An address that is not listed does not travel, whoever asks for it and whatever a peer says: not
//! from the host's own stack, not from the peer, not to another peer. A machine has several such addresses once it
//! has visited more than one site: each belongs to the site whose clients dialled it, and each travels on its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::packet::Packet;
use crate::ids::{DeviceName, VmName};

/// One NIC of one machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortKey {
    /// The machine.
    pub machine: VmName,
    /// The NIC's name in its definition.
    pub nic: DeviceName,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.machine, self.nic)
    }
}

/// A peer, as a number that is cheap to copy per packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerSlot(pub u32);

/// A NIC, as a number that is cheap to copy per packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortSlot(pub u32);

/// Which end of the tunnel this site is for a NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The machine's home is here and it is away (or about to leave).
    Away,
    /// The machine is here; the address is attracted at the peer.
    Visiting,
    /// The machine visited here and has moved on: what still comes for it from the site that attracts the address
    /// is passed on, and its replies back.
    Relay,
}

/// Why a packet did not travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Not an IPv4 or IPv6 packet, or one that contradicts its own lengths.
    NotAPacket,
    /// Neither its source nor its destination is a machine's that moved.
    UnknownAddress,
    /// The address is a moved machine's, but the machine is not at this peer.
    WrongPeer,
    /// The machine has not been handed over to the peer that speaks for it.
    NotHandedOver,
    /// The other end is no address that can have a conversation: loopback, multicast, unspecified.
    Martian,
    /// A datagram that is no tunnel datagram, or a part that contradicts the others.
    BadDatagram,
    /// A packet whose parts did not all arrive in time.
    Incomplete,
    /// The hold was full; the oldest packets gave way.
    HoldFull,
    /// The link took no datagram: it is down or its queue is full.
    LinkBusy,
    /// Larger than the link can carry in 64 parts.
    TooLarge,
    /// The device did not take it.
    DeviceBusy,
    /// The machine has had its share of the tunnel.
    OverShare,
}

impl DropReason {
    /// The reason as a metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotAPacket => "not_a_packet",
            Self::UnknownAddress => "unknown_address",
            Self::WrongPeer => "wrong_peer",
            Self::NotHandedOver => "not_handed_over",
            Self::Martian => "martian",
            Self::BadDatagram => "bad_datagram",
            Self::Incomplete => "incomplete",
            Self::HoldFull => "hold_full",
            Self::LinkBusy => "link_busy",
            Self::TooLarge => "too_large",
            Self::DeviceBusy => "device_busy",
            Self::OverShare => "over_share",
        }
    }
}

/// An address that already belongs to another NIC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Address {address} already belongs to {owner}; two machines with one address cannot share a tunnel")]
pub struct AddressTaken {
    /// The address.
    pub address: IpAddr,
    /// The NIC that has it.
    pub owner: PortKey,
}

/// Whose packet it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The NIC.
    pub port: PortSlot,
    /// The peer at the other end of its tunnel.
    pub peer: PeerSlot,
    /// Another peer that may speak for it: while a machine moves on, both its old and its new place do. For a relay, where
    /// the machine is now.
    pub also: Option<PeerSlot>,
    /// When the other one is not believed any more; nothing until the one that stays has spoken.
    pub also_until: Option<Duration>,
    /// Which end we are.
    pub role: Role,
    /// An address of an earlier visit: the site that attracts it may give it to another machine.
    pub carried: bool,
}

/// How long a place that a machine left, or packets came by, is still believed: what it sent may be on its way, repeated
/// by the tunnel and late.
const BELIEVED: Duration = Duration::from_secs(10);

impl Grant {
    /// `peer` is at the other end from now on; the one before is believed as well, until the new one has spoken: it may
    /// send by way of the other one until it hears that it need not.
    pub fn move_to(&mut self, peer: PeerSlot) {
        if self.peer != peer {
            (self.peer, self.also, self.also_until) = (peer, Some(self.peer), None);
        }
    }

    /// `peer` has spoken. If it is the one at the other end, whoever was there before is believed for a moment more.
    fn heard(&mut self, now: Duration, peer: PeerSlot) {
        if self.peer == peer && self.also.is_some() && self.also_until.is_none() {
            self.also_until = Some(now + BELIEVED);
        }
    }
}

/// What becomes of a packet that a peer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inbound {
    /// It is for the machine that is here.
    ToMachine(Grant),
    /// It is from one of our machines that is away.
    FromMachine(Grant),
    /// It is passed on to another peer.
    PassedOn(Grant, PeerSlot),
    /// It was held for a machine that is on its way back here.
    ForReturning(Grant),
}

impl Inbound {
    /// Whose it is.
    pub fn grant(&self) -> Grant {
        match self {
            Self::ToMachine(grant)
            | Self::FromMachine(grant)
            | Self::PassedOn(grant, _)
            | Self::ForReturning(grant) => *grant,
        }
    }
}

/// The list of addresses that may travel. Bounded by the number of NICs that moved.
#[derive(Debug, Default)]
pub struct Policy {
    grants: BTreeMap<IpAddr, Grant>,
}

impl Policy {
    /// What another port than `port` is allowed for `address`.
    pub fn conflict(&self, port: PortSlot, address: IpAddr) -> Option<Grant> {
        self.grants.get(&address).copied().filter(|grant| grant.port != port)
    }

    /// Lets `address` travel.
    pub fn allow(&mut self, grant: Grant, address: IpAddr) {
        self.grants.insert(address, grant);
    }

    /// Takes back all that `port` was allowed.
    pub fn forget(&mut self, port: PortSlot) {
        self.grants.retain(|_, grant| grant.port != port);
    }

    /// The addresses of `port`.
    pub fn addresses(&self, port: PortSlot) -> BTreeSet<IpAddr> {
        let own = self.grants.iter().filter(|(_, grant)| grant.port == port);
        own.map(|(address, _)| *address).collect()
    }

    /// Takes back one address of `port`.
    pub fn forget_address(&mut self, port: PortSlot, address: IpAddr) {
        if self.grants.get(&address).is_some_and(|grant| grant.port == port) {
            self.grants.remove(&address);
        }
    }

    /// Changes what the addresses of `port` are allowed.
    pub fn change(&mut self, port: PortSlot, change: impl Fn(&mut Grant)) {
        self.grants.values_mut().filter(|grant| grant.port == port).for_each(change);
    }

    /// A machine's address is reached by way of `peer` from now on, which spoke for it. Only once: the place that it
    /// left sends what was on its way for a moment more, and must not turn the address back.
    pub fn turn_to(&mut self, now: Duration, address: IpAddr, peer: PeerSlot) {
        if let Some(grant) = self.grants.get_mut(&address)
            && grant.also == Some(peer)
            && grant.also_until.is_none()
        {
            grant.move_to(peer);
            grant.heard(now, peer);
        }
    }

    /// A machine's packet under this address came from `peer`, which may speak for it.
    pub fn heard_from(&mut self, now: Duration, address: IpAddr, peer: PeerSlot) {
        if let Some(grant) = self.grants.get_mut(&address) {
            grant.heard(now, peer);
        }
    }

    /// Forgets who is not believed any more.
    pub fn expire(&mut self, now: Duration) {
        for grant in
            self.grants.values_mut().filter(|grant| grant.also_until.is_some_and(|until| until <= now))
        {
            (grant.also, grant.also_until) = (None, None);
        }
    }

    /// Judges a packet that the kernel gave us: to a machine that is away, or from one that visits.
    pub fn outbound(&self, packet: &Packet<'_>) -> Result<Grant, DropReason> {
        let (source, destination) = (packet.source(), packet.destination());
        let (grant, other) = match self.grant(destination, Role::Away) {
            Some(grant) => (grant, source),
            None => (self.grant(source, Role::Visiting).ok_or(DropReason::UnknownAddress)?, destination),
        };
        if is_martian(other) { Err(DropReason::Martian) } else { Ok(grant) }
    }

    /// Judges a packet that `peer` sent: to a machine that visits us from there, or from one of ours
    /// that is away there. `returning` says of a NIC that its machine is on its way back from its peer.
    pub fn inbound(
        &self,
        packet: &Packet<'_>,
        peer: PeerSlot,
        returning: impl Fn(PortSlot) -> bool,
    ) -> Result<Inbound, DropReason> {
        let (source, destination) = (packet.source(), packet.destination());
        let judged = self.judge_destination(destination, peer, returning).map(|judged| (judged, source));
        let (judged, other) = match judged {
            Some(judged) => judged,
            None => (self.judge_source(source, peer)?, destination),
        };
        let judged = judged?;
        if is_martian(other) { Err(DropReason::Martian) } else { Ok(judged) }
    }

    /// `None`: nobody's that packets go to.
    fn judge_destination(
        &self,
        destination: IpAddr,
        peer: PeerSlot,
        returning: impl Fn(PortSlot) -> bool,
    ) -> Option<Result<Inbound, DropReason>> {
        let grant = *self.grants.get(&destination)?;
        let known = grant.peer == peer || grant.also == Some(peer);
        match grant.role {
            Role::Visiting if known => Some(Ok(Inbound::ToMachine(grant))),
            Role::Visiting => Some(Err(DropReason::WrongPeer)),
            Role::Relay if grant.peer == peer => {
                grant.also.map(|onward| Ok(Inbound::PassedOn(grant, onward)))
            }
            Role::Away if grant.peer == peer && returning(grant.port) => {
                Some(Ok(Inbound::ForReturning(grant)))
            }
            Role::Relay | Role::Away => None,
        }
    }

    fn judge_source(
        &self,
        source: IpAddr,
        peer: PeerSlot,
    ) -> Result<Result<Inbound, DropReason>, DropReason> {
        let grant = *self.grants.get(&source).ok_or(DropReason::UnknownAddress)?;
        Ok(match grant.role {
            Role::Away if grant.peer == peer || grant.also == Some(peer) => Ok(Inbound::FromMachine(grant)),
            Role::Relay if grant.also == Some(peer) => Ok(Inbound::PassedOn(grant, grant.peer)),
            Role::Away | Role::Relay => Err(DropReason::WrongPeer),
            Role::Visiting => Err(DropReason::UnknownAddress),
        })
    }

    fn grant(&self, address: IpAddr, role: Role) -> Option<Grant> {
        self.grants.get(&address).copied().filter(|grant| grant.role == role)
    }
}

fn is_martian(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.octets()[0] == 0
                || v4.octets()[0] >= 240
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unspecified()
                || v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().is_some()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::{ipv4, tcp};
    use super::*;

    const HOME: [u8; 4] = [198, 51, 100, 10];
    const CLIENT: [u8; 4] = [192, 0, 2, 1];

    fn policy(role: Role) -> Policy {
        let mut policy = Policy::default();
        let (port, peer) = (PortSlot(1), PeerSlot(1));
        let grant = Grant { port, peer, also: None, also_until: None, role, carried: false };
        policy.allow(grant, IpAddr::from(HOME));
        policy
    }

    fn outbound(policy: &Policy, from: [u8; 4], to: [u8; 4]) -> Result<Role, DropReason> {
        let bytes = ipv4(from, to, 6, &tcp(1, 2, 0));
        policy.outbound(&Packet::parse(&bytes).unwrap()).map(|grant| grant.role)
    }

    fn inbound(policy: &Policy, from: [u8; 4], to: [u8; 4], peer: u32) -> Result<Role, DropReason> {
        judged(policy, from, to, peer, false).map(|judged| judged.grant().role)
    }

    fn judged(
        policy: &Policy,
        from: [u8; 4],
        to: [u8; 4],
        peer: u32,
        returning: bool,
    ) -> Result<Inbound, DropReason> {
        let bytes = ipv4(from, to, 6, &tcp(1, 2, 0));
        policy.inbound(&Packet::parse(&bytes).unwrap(), PeerSlot(peer), |_| returning)
    }

    fn relay() -> (Policy, Grant) {
        let mut policy = Policy::default();
        let grant = Grant {
            port: PortSlot(1),
            peer: PeerSlot(1),
            also: Some(PeerSlot(2)),
            also_until: None,
            role: Role::Relay,
            carried: false,
        };
        policy.allow(grant, IpAddr::from(HOME));
        (policy, grant)
    }

    #[test]
    fn a_relay_passes_on_between_its_two_peers_and_nothing_else() {
        let (policy, grant) = relay();
        let passed_on = |to: u32| Ok(Inbound::PassedOn(grant, PeerSlot(to)));
        assert_eq!(judged(&policy, CLIENT, HOME, 1, false), passed_on(2));
        assert_eq!(judged(&policy, HOME, CLIENT, 2, false), passed_on(1));
        assert_eq!(judged(&policy, HOME, CLIENT, 1, false), Err(DropReason::WrongPeer));
        assert_eq!(judged(&policy, CLIENT, HOME, 2, false), Err(DropReason::UnknownAddress));
        assert_eq!(judged(&policy, CLIENT, HOME, 3, false), Err(DropReason::UnknownAddress));
        assert_eq!(outbound(&policy, CLIENT, HOME), Err(DropReason::UnknownAddress));
        assert_eq!(outbound(&policy, HOME, CLIENT), Err(DropReason::UnknownAddress));
    }

    #[test]
    fn what_was_held_elsewhere_is_taken_for_a_machine_that_returns_only() {
        let away = policy(Role::Away);
        assert!(matches!(judged(&away, CLIENT, HOME, 1, true), Ok(Inbound::ForReturning(_))));
        assert_eq!(judged(&away, CLIENT, HOME, 1, false), Err(DropReason::UnknownAddress));
        assert_eq!(judged(&away, CLIENT, HOME, 2, true), Err(DropReason::UnknownAddress));
    }

    #[test]
    fn a_machine_is_spoken_for_by_its_old_and_its_new_place_while_it_moves_on() {
        let mut policy = Policy::default();
        let grant = Grant {
            port: PortSlot(1),
            peer: PeerSlot(1),
            also: Some(PeerSlot(2)),
            also_until: None,
            role: Role::Away,
            carried: false,
        };
        policy.allow(grant, IpAddr::from(HOME));
        assert!(inbound(&policy, HOME, CLIENT, 1).is_ok() && inbound(&policy, HOME, CLIENT, 2).is_ok());
        assert_eq!(inbound(&policy, HOME, CLIENT, 3), Err(DropReason::WrongPeer));
        policy.change(PortSlot(1), |grant| grant.role = Role::Visiting);
        let by = |policy: &Policy| {
            let grant = policy.grant(HOME.into(), Role::Visiting).unwrap();
            (grant.peer, grant.also)
        };
        let at = Duration::from_secs;
        policy.turn_to(at(5), HOME.into(), PeerSlot(3));
        assert_eq!(by(&policy).0, PeerSlot(1), "a stranger");
        policy.expire(at(5) + BELIEVED * 100);
        assert_eq!(by(&policy), (PeerSlot(1), Some(PeerSlot(2))), "neither has spoken");
        policy.turn_to(at(5), HOME.into(), PeerSlot(2));
        assert_eq!(by(&policy), (PeerSlot(2), Some(PeerSlot(1))));
        policy.turn_to(at(6), HOME.into(), PeerSlot(1));
        assert_eq!(by(&policy).0, PeerSlot(2), "what was on its way turns nothing back");
        policy.expire(at(5) + BELIEVED);
        assert_eq!(by(&policy), (PeerSlot(2), None), "a place that it left speaks for it no more");
        assert_eq!(inbound(&policy, CLIENT, HOME, 1), Err(DropReason::WrongPeer));
    }

    #[test]
    fn the_place_that_a_machine_left_is_believed_until_a_moment_after_the_new_one_has_spoken() {
        let mut policy = policy(Role::Away);
        let at = Duration::from_secs;
        policy.change(PortSlot(1), |grant| grant.move_to(PeerSlot(2)));
        policy.heard_from(at(1), HOME.into(), PeerSlot(1));
        policy.expire(at(1) + BELIEVED * 100);
        assert!(inbound(&policy, HOME, CLIENT, 1).is_ok(), "the new place sends by way of the old one");
        policy.heard_from(at(2), HOME.into(), PeerSlot(2));
        policy.expire(at(1) + BELIEVED);
        assert!(inbound(&policy, HOME, CLIENT, 1).is_ok(), "on its way");
        policy.expire(at(2) + BELIEVED);
        assert_eq!(inbound(&policy, HOME, CLIENT, 1), Err(DropReason::WrongPeer));
        assert!(inbound(&policy, HOME, CLIENT, 2).is_ok());
    }

    #[test]
    fn only_the_address_that_moved_travels() {
        let away = policy(Role::Away);
        assert_eq!(outbound(&away, CLIENT, HOME), Ok(Role::Away));
        assert_eq!(outbound(&away, HOME, CLIENT), Err(DropReason::UnknownAddress));
        assert_eq!(inbound(&away, HOME, CLIENT, 1), Ok(Role::Away));
        assert_eq!(inbound(&away, CLIENT, HOME, 1), Err(DropReason::UnknownAddress));
        let visiting = policy(Role::Visiting);
        assert_eq!(outbound(&visiting, HOME, CLIENT), Ok(Role::Visiting));
        assert_eq!(outbound(&visiting, CLIENT, HOME), Err(DropReason::UnknownAddress));
        assert_eq!(inbound(&visiting, CLIENT, HOME, 1), Ok(Role::Visiting));
        assert_eq!(inbound(&visiting, CLIENT, [198, 51, 100, 11], 1), Err(DropReason::UnknownAddress));
    }

    #[test]
    fn another_peer_may_not_speak_for_the_machine() {
        assert_eq!(inbound(&policy(Role::Away), HOME, CLIENT, 2), Err(DropReason::WrongPeer));
        assert_eq!(inbound(&policy(Role::Visiting), CLIENT, HOME, 2), Err(DropReason::WrongPeer));
    }

    #[test]
    fn martian_other_ends_are_refused() {
        for other in [[127, 0, 0, 1], [224, 0, 0, 251], [255; 4], [0; 4]] {
            assert_eq!(inbound(&policy(Role::Away), HOME, other, 1), Err(DropReason::Martian));
            assert_eq!(outbound(&policy(Role::Visiting), HOME, other), Err(DropReason::Martian));
        }
    }

    #[test]
    fn a_mapped_address_is_not_the_machine() {
        let mapped: IpAddr = "::ffff:198.51.100.10".parse().unwrap();
        assert!(is_martian(mapped));
        assert!(policy(Role::Away).grant(mapped, Role::Away).is_none());
    }

    #[test]
    fn nothing_travels_after_it_was_taken_back() {
        let mut away = policy(Role::Away);
        away.forget(PortSlot(1));
        assert_eq!(outbound(&away, CLIENT, HOME), Err(DropReason::UnknownAddress));
    }
}
