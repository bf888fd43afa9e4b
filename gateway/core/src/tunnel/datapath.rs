//! The tunnel's decisions put together: a packet or datagram in, what becomes of it out.
//!
//! It reads no device and sends nothing. The gateway feeds it and carries out what it answers.
//!
//! ```text
//!  the machine's home (away)                      the site it visits
//!
//!  begin_hold   Holding     keeps arrivals        visit      Holding    keeps arrivals
//!  attract      Releasing   kept ones first       resumed    Releasing  kept ones first
//!               Passing     straight through                 Passing    straight through
//!  end          forgotten                         end        forgotten
//! ```
//!
//! A hold only concerns packets to the guest. The guest's own pass in `Passing` and `Releasing`
//! at its home (before, it has not been handed over), and always at the site it visits.
//!
//! A machine that moves on from a site it visits is two things there: its care-of address is `away` like a home
//! address, and what comes for its other addresses is held ([`Datapath::pause`]) and then passed on
//! ([`Datapath::relay`]) until the sites that attract them have heard where it is.

mod register;
mod status;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;

use register::Route;
pub use register::{GivenAway, VisitRoute};
pub use status::{Counters, Phase, PortStatus, Traffic};

use super::flows::{FlowConfig, FlowTable};
use super::fragment::{Parts, Reassembly, ReassemblyConfig, Splitter};
use super::handover::FlowTuple;
use super::hold::{Hold, HoldConfig};
use super::packet::{Packet, Side};
use super::policy::{AddressTaken, DropReason, Inbound, PeerSlot, Policy, PortKey, PortSlot, Role};
use super::repair::{
    FlowBucket, Incarnation, ROOM, Repair, RepairConfig, RepairCounters, RepairError, RepairPolicy, Treatment,
};
use super::share::{ShareLimit, ShareSlot, Shares};
use crate::ids::SiteName;

/// Bounds and times of the datapath.
#[derive(Debug, Clone)]
pub struct DatapathConfig {
    /// Joining of split packets.
    pub reassembly: ReassemblyConfig,
    /// Hiding the path's loss.
    pub repair: RepairConfig,
    /// Which flows it is hidden from.
    pub repair_policy: RepairPolicy,
    /// What tells this start of the gateway from earlier ones to its peers. Drawn at random; the default is for tests.
    pub incarnation: Incarnation,
    /// Packets kept during the pause.
    pub hold: HoldConfig,
    /// Flows and the tunnel's end.
    pub flows: FlowConfig,
    /// What one machine may take. Default: whatever it wants.
    pub share: ShareLimit,
    /// How long held packets wait for a link that takes none before they are dropped. Default 5 s.
    pub release_limit: Duration,
}

impl Default for DatapathConfig {
    fn default() -> Self {
        Self {
            reassembly: ReassemblyConfig::default(),
            repair: RepairConfig::default(),
            repair_policy: RepairPolicy::default(),
            incarnation: Incarnation::default(),
            hold: HoldConfig::default(),
            flows: FlowConfig::default(),
            share: ShareLimit::default(),
            release_limit: Duration::from_secs(5),
        }
    }
}

/// A NIC the datapath does not know, or not in the role that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("No tunnel for {0} in that role; begin it first")]
pub struct UnknownPort(pub PortKey);

/// Where a packet goes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Over the link.
    Peer(PeerSlot),
    /// Into the kernel.
    Device,
}

#[derive(Debug)]
struct Peer {
    site: SiteName,
    splitter: Splitter,
    incarnation: Incarnation,
    repair: Repair,
    reassembly: Reassembly,
}

#[derive(Debug)]
struct Port {
    key: PortKey,
    role: Role,
    /// The other end; for a visit, that of its first address.
    peer: PeerSlot,
    /// For a relay: where the machine is now.
    onward: Option<PeerSlot>,
    /// Packets to the machine come from where it is, because it is on its way back.
    returning: bool,
    phase: Phase,
    released_at: Duration,
    hold: Hold,
    flows: Option<FlowTable>,
    share: Option<ShareSlot>,
}

/// The datagrams of one packet, in order; numbered if its flow is repaired.
#[derive(Debug)]
pub struct Datagrams<'a> {
    now: Duration,
    parts: Parts<'a>,
    flow: Option<FlowBucket>,
    repair: &'a mut Repair,
}

impl Iterator for Datagrams<'_> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let part = self.parts.next()?;
        Some(match self.flow {
            Some(flow) => self.repair.wrap(self.now, flow, &part.pieces()),
            None => part.to_bytes(),
        })
    }
}

impl Datagrams<'_> {
    /// The link did not take the one that was just made.
    pub fn take_back(self) {
        if self.flow.is_some() {
            self.repair.take_back();
        }
    }
}

/// All tunnels of one gateway.
#[derive(Debug)]
pub struct Datapath {
    config: DatapathConfig,
    policy: Policy,
    ports: BTreeMap<PortSlot, Port>,
    peers: BTreeMap<PeerSlot, Peer>,
    shares: Shares,
    next_slot: u32,
    counters: Counters,
}

impl Datapath {
    /// No tunnel yet.
    pub fn new(config: DatapathConfig) -> Self {
        Self {
            shares: Shares::new(config.share),
            config,
            policy: Policy::default(),
            ports: BTreeMap::new(),
            peers: BTreeMap::new(),
            next_slot: 0,
            counters: Counters::default(),
        }
    }

    /// The number under which `site` is known from now on.
    pub fn peer_slot(&mut self, site: &SiteName) -> PeerSlot {
        if let Some((slot, _)) = self.peers.iter().find(|(_, peer)| peer.site == *site) {
            return *slot;
        }
        let slot = PeerSlot(self.take_slot());
        let reassembly = Reassembly::new(self.config.reassembly.clone());
        let incarnation = self.config.incarnation;
        let repair = Repair::new(self.config.repair.clone(), incarnation);
        let (site, splitter) = (site.clone(), Splitter::default());
        self.peers.insert(slot, Peer { site, splitter, incarnation, repair, reassembly });
        slot
    }

    /// The machine is about to leave for `peer`: from now packets to it are kept. Repeating it is harmless.
    pub fn begin_hold(
        &mut self,
        key: &PortKey,
        peer: &SiteName,
        home: &[IpAddr],
    ) -> Result<(), AddressTaken> {
        let peer = self.peer_slot(peer);
        let route = |address: &IpAddr| Route { address: *address, peer, also: None, carried: false };
        let routes: Vec<Route> = home.iter().map(route).collect();
        self.register(key, peer, &routes, Role::Away).map(drop)
    }

    /// The machine was handed over: kept packets leave for the peer, then new ones pass.
    pub fn attract(&mut self, now: Duration, key: &PortKey, flows: &[FlowTuple]) -> Result<(), UnknownPort> {
        self.attract_again(now, key, flows, Duration::ZERO)
    }

    /// The same by a gateway that was started anew, when nobody had needed the addresses for `quiet`.
    pub fn attract_again(
        &mut self,
        now: Duration,
        key: &PortKey,
        flows: &[FlowTuple],
        quiet: Duration,
    ) -> Result<(), UnknownPort> {
        let table = FlowTable::continued(self.config.flows.clone(), now, quiet);
        let slot = self.slot(key, Role::Away).ok_or_else(|| UnknownPort(key.clone()))?;
        let ours = self.policy.addresses(slot);
        let flows: Vec<FlowTuple> = flows.iter().filter(|flow| ours.contains(&flow.local)).copied().collect();
        let port = self.port_mut(key, Role::Away)?;
        port.flows.get_or_insert(table).seed(now, &flows);
        port.release(now);
        Ok(())
    }

    /// A machine will be here whose addresses are attracted at other sites: until it runs, packets to it are kept. Returned:
    /// those that were another machine's until now.
    pub fn visit(&mut self, key: &PortKey, routes: &[VisitRoute]) -> Result<Vec<GivenAway>, AddressTaken> {
        let routes: Vec<Route> = routes.iter().map(|route| self.route(route)).collect();
        let peer = routes.first().map_or(PeerSlot(0), |first| first.peer);
        self.register(key, peer, &routes, Role::Visiting)
    }

    /// A machine that is here is about to leave: packets to it are kept again.
    pub fn pause(&mut self, key: &PortKey) -> Result<(), UnknownPort> {
        self.port_mut(key, Role::Visiting)?.phase = Phase::Holding;
        Ok(())
    }

    /// It left for `onward`: what was kept and what still comes is passed on there, and its replies back.
    pub fn relay(&mut self, now: Duration, key: &PortKey, onward: &SiteName) -> Result<(), UnknownPort> {
        let onward = self.peer_slot(onward);
        if self.slot(key, Role::Relay).is_some() {
            return Ok(());
        }
        let slot = self.slot(key, Role::Visiting).ok_or_else(|| UnknownPort(key.clone()))?;
        self.policy.change(slot, |grant| {
            grant.role = Role::Relay;
            (grant.also, grant.also_until) = (Some(onward), None);
        });
        let port = self.port_mut(key, Role::Visiting)?;
        (port.role, port.onward) = (Role::Relay, Some(onward));
        port.release(now);
        Ok(())
    }

    /// A machine that is away is at `peer` now. The place that it left is believed as well until a moment after the new one has
    /// spoken.
    pub fn retarget(&mut self, key: &PortKey, peer: &SiteName) -> Result<(), UnknownPort> {
        let peer = self.peer_slot(peer);
        let slot = self.slot(key, Role::Away).ok_or_else(|| UnknownPort(key.clone()))?;
        self.policy.change(slot, |grant| grant.move_to(peer));
        self.port_mut(key, Role::Away)?.peer = peer;
        Ok(())
    }

    /// A machine that is away is on its way back: what its present place held for it is kept here until it is. If it
    /// does not come, what was kept goes where it stayed.
    pub fn expect_return(&mut self, now: Duration, key: &PortKey, returning: bool) {
        let Ok(port) = self.port_mut(key, Role::Away) else { return };
        port.returning = returning;
        if !returning && port.phase == Phase::Passing && !port.hold.is_empty() {
            (port.phase, port.released_at) = (Phase::Releasing, now);
        }
    }

    /// An address of a machine that is here is attracted nowhere any more.
    pub fn forget_address(&mut self, key: &PortKey, address: IpAddr) {
        for role in [Role::Visiting, Role::Relay] {
            if let Some(slot) = self.slot(key, role) {
                self.policy.forget_address(slot, address);
            }
        }
    }

    /// The visitor runs: kept packets are delivered, then new ones pass.
    pub fn resumed(&mut self, now: Duration, key: &PortKey) -> Result<(), UnknownPort> {
        self.port_mut(key, Role::Visiting)?.release(now);
        Ok(())
    }

    /// When the last resolver forgets the old address of a machine that is away.
    pub fn set_names_expire_at(&mut self, key: &PortKey, at: Duration) -> Result<(), UnknownPort> {
        let port = self.port_mut(key, Role::Away)?;
        match &mut port.flows {
            Some(flows) => flows.set_names_expire_at(at),
            None => return Err(UnknownPort(key.clone())),
        }
        Ok(())
    }

    /// The flows of a machine that is away and was handed over: to list them, to say what holds the tunnel.
    pub fn flows(&self, key: &PortKey) -> Option<&FlowTable> {
        self.ports.get(&self.slot(key, Role::Away)?)?.flows.as_ref()
    }

    /// What is kept for a NIC now, oldest first; it stays in its phase. An unknown one has nothing.
    pub fn take_kept(&mut self, key: &PortKey, role: Role) -> Vec<Bytes> {
        let slot = self.slot(key, role);
        let Some(port) = slot.and_then(|slot| self.ports.get_mut(&slot)) else { return Vec::new() };
        std::iter::from_fn(|| port.hold.pop()).collect()
    }

    /// Ends a tunnel; what was still kept comes back, oldest first. Ending an unknown one is harmless.
    pub fn end(&mut self, key: &PortKey, role: Role) -> Vec<Bytes> {
        let Some(slot) = self.slot(key, role) else { return Vec::new() };
        self.policy.forget(slot);
        let Some(mut port) = self.ports.remove(&slot) else { return Vec::new() };
        self.shares.leave(port.share);
        std::iter::from_fn(|| port.hold.pop()).collect()
    }

    /// Takes a packet from the device. Returned: the peer it shall be sent to now.
    pub fn handle_packet(&mut self, now: Duration, packet: Bytes) -> Option<PeerSlot> {
        let judged = Packet::parse(&packet).map_err(|_| DropReason::NotAPacket);
        let (view, grant) =
            match judged.and_then(|view| self.policy.outbound(&view).map(|grant| (view, grant))) {
                Ok(judged) => judged,
                Err(reason) => {
                    self.counters.drop(reason, 1);
                    return None;
                }
            };
        let port = self.ports.get_mut(&grant.port)?;
        let sender = match grant.role {
            Role::Away => Side::Remote,
            Role::Visiting | Role::Relay => Side::Guest,
        };
        if !self.shares.admits(now, port.share, sender, packet.len()) {
            self.counters.drop(DropReason::OverShare, 1);
            return None;
        }
        match grant.role {
            Role::Visiting | Role::Relay => Some(grant.peer),
            Role::Away => {
                if let Some(flows) = &mut port.flows {
                    flows.handle_packet(now, &view, Side::Remote);
                }
                if port.keep(&packet, &mut self.counters) { None } else { Some(grant.peer) }
            }
        }
    }

    /// The link that a packet from the device would take.
    pub fn link_of(&self, packet: &[u8]) -> Option<PeerSlot> {
        let view = Packet::parse(packet).ok()?;
        self.policy.outbound(&view).ok().map(|grant| grant.peer)
    }

    /// Counts what came from the device and is no packet.
    pub fn handle_strange_frame(&mut self) {
        self.counters.drop(DropReason::NotAPacket, 1);
    }

    /// Takes a datagram from `peer`. What comes of it is at [`Datapath::poll_packet`].
    pub fn handle_datagram(&mut self, now: Duration, peer: PeerSlot, datagram: Bytes) {
        let Some(peer) = self.peers.get_mut(&peer) else { return };
        match peer.repair.handle_datagram(now, datagram) {
            // What a peer sent before it was started anew may still come.
            Ok(()) | Err(RepairError::Stale) => {}
            Err(RepairError::UnknownFormat | RepairError::Contradiction) => {
                self.counters.drop(DropReason::BadDatagram, 1);
            }
        }
    }

    /// The next packet that has come from `peer`, and where it goes now.
    pub fn poll_packet(&mut self, now: Duration, peer: PeerSlot) -> Option<(Way, Bytes)> {
        loop {
            let Peer { repair, reassembly, .. } = self.peers.get_mut(&peer)?;
            let part = repair.poll_packet()?;
            let abandoned = reassembly.abandoned();
            let joined = reassembly.handle_datagram(now, part);
            self.counters.drop(DropReason::Incomplete, reassembly.abandoned() - abandoned);
            let packet = match joined {
                Ok(Some(packet)) => packet,
                Ok(None) => continue,
                Err(_) => {
                    self.counters.drop(DropReason::BadDatagram, 1);
                    continue;
                }
            };
            match self.admit(now, peer, &packet) {
                Ok(Some(way)) => return Some((way, packet)),
                Ok(None) => {}
                Err(reason) => self.counters.drop(reason, 1),
            }
        }
    }

    /// What repair wants to send to `peer` beside packets. Give it back with [`Datapath::return_repair`] if it cannot
    /// leave.
    pub fn poll_repair(&mut self, now: Duration, peer: PeerSlot) -> Option<Bytes> {
        self.peers.get_mut(&peer)?.repair.poll_transmit(now)
    }

    /// Takes back what repair could not send yet.
    pub fn return_repair(&mut self, peer: PeerSlot, datagram: Bytes) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.repair.return_transmit(datagram);
        }
    }

    /// When repair has something to do next; then call [`Datapath::handle_repair_timeout`].
    pub fn repair_timeout(&self) -> Option<Duration> {
        self.peers.values().filter_map(|peer| peer.repair.poll_timeout()).min()
    }

    /// Repair gives up what is too late. What goes on without it is at [`Datapath::poll_packet`].
    pub fn handle_repair_timeout(&mut self, now: Duration) {
        for peer in self.peers.values_mut() {
            peer.repair.handle_timeout(now);
        }
    }

    /// The path to `peer` has this round trip now.
    pub fn set_rtt(&mut self, peer: PeerSlot, rtt: Duration) {
        if let Some(peer) = self.peers.get_mut(&peer) {
            peer.repair.set_rtt(rtt);
        }
    }

    /// The gateway of `site` was started anew and has forgotten what it had.
    pub fn handle_peer_restart(&mut self, site: &SiteName) {
        let slot = self.peer_slot(site);
        if let Some(peer) = self.peers.get_mut(&slot) {
            peer.incarnation = peer.incarnation.next();
            peer.repair.handle_peer_restart(peer.incarnation);
        }
    }

    /// What repair did, all peers together.
    pub fn repair_counters(&self) -> Vec<(SiteName, RepairCounters)> {
        self.peers.values().map(|peer| (peer.site.clone(), peer.repair.counters())).collect()
    }

    /// The next kept packet that may leave, and where to. Give it back with [`Datapath::return_kept`]
    /// if it cannot, and name its port among the `busy` ones: the others need not wait for that link.
    pub fn poll_kept(&mut self, now: Duration, busy: &[PortSlot]) -> Option<(PortSlot, Way, Bytes)> {
        for (slot, port) in &mut self.ports {
            if port.phase != Phase::Releasing || busy.contains(slot) {
                continue;
            }
            if now >= port.released_at + self.config.release_limit {
                let stale = std::iter::from_fn(|| port.hold.pop()).count();
                self.counters.drop(DropReason::LinkBusy, stale as u64);
            }
            let Some(packet) = port.hold.pop() else {
                port.phase = Phase::Passing;
                continue;
            };
            let way = match port.role {
                Role::Away => Way::Peer(port.peer),
                Role::Relay => Way::Peer(port.onward.unwrap_or(port.peer)),
                Role::Visiting => Way::Device,
            };
            return Some((*slot, way, packet));
        }
        None
    }

    /// Takes back a packet that could not leave yet.
    pub fn return_kept(&mut self, slot: PortSlot, packet: Bytes) {
        if let Some(port) = self.ports.get_mut(&slot) {
            self.counters.drop(DropReason::HoldFull, port.hold.return_first(packet));
        }
    }

    /// Kept packets wait for a link that takes them: call [`Datapath::poll_kept`] again soon.
    pub fn is_releasing(&self) -> bool {
        self.ports.values().any(|port| port.phase == Phase::Releasing)
    }

    /// The datagrams of a packet for `peer`, each at most `max_len` bytes; `None` if it is too large for that. What
    /// the link does not take of them is to be said at once ([`Datagrams::take_back`]).
    pub fn split<'a>(
        &'a mut self,
        now: Duration,
        peer: PeerSlot,
        packet: &'a Bytes,
        max_len: usize,
    ) -> Option<Datagrams<'a>> {
        let Peer { splitter, repair, .. } = self.peers.get_mut(&peer)?;
        let view = Packet::parse(packet).ok()?;
        let (flow, max_len) = match self.config.repair_policy.treatment(&view) {
            Treatment::Repair => (Some(FlowBucket::of(&view)), max_len.saturating_sub(ROOM)),
            Treatment::AtOnce => (None, max_len),
        };
        let parts = splitter.split(packet, max_len)?;
        self.counters.split += u64::from(packet.len() >= max_len);
        Some(Datagrams { now, parts, flow, repair })
    }

    /// Counts what became of packets: they went their way, or not and why.
    pub fn handle_outcome(&mut self, way: Way, traffic: Traffic, outcome: Result<(), DropReason>) {
        match (outcome, way) {
            (Ok(()), Way::Peer(_)) => self.counters.to_peers.count(traffic),
            (Ok(()), Way::Device) => self.counters.from_peers.count(traffic),
            (Err(reason), _) => self.counters.drop(reason, traffic.packets),
        }
    }

    /// What passed and what did not.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Every tunnel's state. Forgets what time has ended.
    pub fn handle_status(&mut self, now: Duration) -> Vec<PortStatus> {
        self.policy.expire(now);
        for peer in self.peers.values_mut() {
            let abandoned = peer.reassembly.abandoned();
            peer.reassembly.expire(now);
            self.counters.drop(DropReason::Incomplete, peer.reassembly.abandoned() - abandoned);
        }
        let (peers, shares) = (&self.peers, &self.shares);
        self.ports.values_mut().filter_map(|port| port.status(now, peers, shares)).collect()
    }

    /// Judges a joined packet; `None`: it was kept.
    fn admit(&mut self, now: Duration, peer: PeerSlot, packet: &Bytes) -> Result<Option<Way>, DropReason> {
        let view = Packet::parse(packet).map_err(|_| DropReason::NotAPacket)?;
        let ports = &self.ports;
        let returning = |slot| ports.get(&slot).is_some_and(|port| port.returning);
        let judged = self.policy.inbound(&view, peer, returning)?;
        let port = self.ports.get_mut(&judged.grant().port).ok_or(DropReason::UnknownAddress)?;
        let sender = match judged {
            Inbound::FromMachine(_) => Side::Guest,
            Inbound::ToMachine(_) | Inbound::PassedOn(..) | Inbound::ForReturning(_) => Side::Remote,
        };
        if !self.shares.admits(now, port.share, sender, packet.len()) {
            return Err(DropReason::OverShare);
        }
        match judged {
            Inbound::ToMachine(grant) => {
                if grant.peer != peer {
                    self.policy.turn_to(now, view.destination(), peer);
                }
                let kept = port.keep(packet, &mut self.counters);
                Ok((!kept).then_some(Way::Device))
            }
            Inbound::FromMachine(grant) => {
                if grant.also.is_some() && grant.also_until.is_none() {
                    self.policy.heard_from(now, view.source(), peer);
                }
                let flows = port.flows.as_mut().ok_or(DropReason::NotHandedOver)?;
                flows.handle_packet(now, &view, Side::Guest);
                Ok(Some(Way::Device))
            }
            Inbound::PassedOn(grant, onward) => {
                let kept = grant.peer == peer && port.keep(packet, &mut self.counters);
                Ok((!kept).then_some(Way::Peer(onward)))
            }
            Inbound::ForReturning(_) => {
                self.counters.held += 1;
                self.counters.drop(DropReason::HoldFull, port.hold.push(Bytes::copy_from_slice(packet)));
                Ok(None)
            }
        }
    }

    fn slot(&self, key: &PortKey, role: Role) -> Option<PortSlot> {
        let is_it = |port: &Port| port.key == *key && port.role == role;
        self.ports.iter().find(|(_, port)| is_it(port)).map(|(slot, _)| *slot)
    }

    fn port_mut(&mut self, key: &PortKey, role: Role) -> Result<&mut Port, UnknownPort> {
        self.ports
            .values_mut()
            .find(|port| port.key == *key && port.role == role)
            .ok_or_else(|| UnknownPort(key.clone()))
    }

    fn take_slot(&mut self) -> u32 {
        self.next_slot += 1;
        self.next_slot
    }
}

impl Port {
    fn release(&mut self, now: Duration) {
        match self.phase {
            Phase::Holding => {
                self.phase = Phase::Releasing;
                self.released_at = now;
            }
            Phase::Releasing | Phase::Passing => {}
        }
    }

    /// Keeps a packet to the guest unless packets pass. It is copied: it came in a buffer that holds many.
    fn keep(&mut self, packet: &Bytes, counters: &mut Counters) -> bool {
        match self.phase {
            Phase::Passing => false,
            Phase::Holding | Phase::Releasing => {
                counters.held += 1;
                counters.drop(DropReason::HoldFull, self.hold.push(Bytes::copy_from_slice(packet)));
                true
            }
        }
    }

    fn status(
        &mut self,
        now: Duration,
        peers: &BTreeMap<PeerSlot, Peer>,
        shares: &Shares,
    ) -> Option<PortStatus> {
        let may_end = !self.returning && self.flows.as_mut().is_some_and(|flows| flows.may_end(now));
        Some(PortStatus {
            key: self.key.clone(),
            role: self.role,
            peer: peers.get(&self.onward.unwrap_or(self.peer))?.site.clone(),
            phase: self.phase,
            held_packets: self.hold.len() as u64,
            held_bytes: self.hold.bytes() as u64,
            held_by: self.flows.as_ref().map(|flows| flows.held_by(now)),
            unneeded_for: self.flows.as_ref().map(|flows| flows.unneeded_for(now)),
            one_way: self.flows.as_mut().map(|flows| flows.count_one_way(now)).unwrap_or_default(),
            over_share: shares.dropped(self.share),
            may_end,
        })
    }
}
