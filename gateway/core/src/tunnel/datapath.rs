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

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::flows::{FlowConfig, FlowTable};
use super::fragment::{Reassembly, ReassemblyConfig, Splitter};
use super::handover::FlowTuple;
use super::hold::{Hold, HoldConfig};
use super::packet::{Packet, Side};
use super::policy::{AddressTaken, DropReason, Grant, Inbound, PeerSlot, Policy, PortKey, PortSlot, Role};
use super::repair::{
    FlowBucket, Incarnation, ROOM, Repair, RepairConfig, RepairCounters, RepairError, RepairPolicy, Treatment,
};
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
            release_limit: Duration::from_secs(5),
        }
    }
}

/// How far a NIC's tunnel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Packets to the guest are kept.
    Holding,
    /// Kept packets leave in order; new ones queue behind them.
    Releasing,
    /// Packets pass.
    Passing,
}

/// Packets and bytes that went one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Their bytes, IP headers included, tunnel headers not.
    pub bytes: u64,
}

impl Traffic {
    fn count(&mut self, packet: &Bytes) {
        self.packets += 1;
        self.bytes += packet.len() as u64;
    }
}

/// What passed and what did not, since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets handed to the link.
    pub to_peers: Traffic,
    /// Packets from the link handed to the device.
    pub from_peers: Traffic,
    /// Packets that had to be split.
    pub split: u64,
    /// Packets that were kept during a pause.
    pub held: u64,
    /// Packets that did not travel, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
}

impl Counters {
    /// Counts `n` packets that did not travel.
    pub fn drop(&mut self, reason: DropReason, n: u64) {
        if n > 0 {
            *self.dropped.entry(reason).or_default() += n;
        }
    }

    /// Packets that did not travel, all reasons together.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }
}

/// One NIC's tunnel as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStatus {
    /// The NIC.
    pub key: PortKey,
    /// Which end we are.
    pub role: Role,
    /// The other end.
    pub peer: SiteName,
    /// How far it is.
    pub phase: Phase,
    /// Packets kept now.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Flows alive; `None` where they are not tracked (visits).
    pub flows_alive: Option<u64>,
    /// The tunnel is needed by nobody any more.
    pub may_end: bool,
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

/// An address of a machine that is here, and the site that attracts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitRoute {
    /// The address.
    pub address: IpAddr,
    /// The site that attracts it, or the one that passes its packets on.
    pub peer: SiteName,
    /// The other of the two, if it may be either.
    pub also: Option<SiteName>,
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
}

/// The datagrams of one packet, in order; numbered if its flow is repaired.
#[derive(Debug)]
pub struct Datagrams<'a> {
    now: Duration,
    parts: std::vec::IntoIter<Bytes>,
    flow: Option<FlowBucket>,
    repair: &'a mut Repair,
}

impl Iterator for Datagrams<'_> {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let part = self.parts.next()?;
        Some(match self.flow {
            Some(flow) => self.repair.wrap(self.now, flow, &[&part]),
            None => part,
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
    next_slot: u32,
    counters: Counters,
}

impl Datapath {
    /// No tunnel yet.
    pub fn new(config: DatapathConfig) -> Self {
        Self {
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
        let routes: Vec<_> = home.iter().map(|address| (*address, peer, None)).collect();
        self.register(key, peer, &routes, Role::Away)
    }

    /// The machine was handed over: kept packets leave for the peer, then new ones pass.
    pub fn attract(&mut self, now: Duration, key: &PortKey, flows: &[FlowTuple]) -> Result<(), UnknownPort> {
        let table = FlowTable::new(self.config.flows.clone(), now);
        let slot = self.slot(key, Role::Away).ok_or_else(|| UnknownPort(key.clone()))?;
        let ours = self.policy.addresses(slot);
        let flows: Vec<FlowTuple> = flows.iter().filter(|flow| ours.contains(&flow.local)).copied().collect();
        let port = self.port_mut(key, Role::Away)?;
        port.flows.get_or_insert(table).seed(now, &flows);
        port.release(now);
        Ok(())
    }

    /// A machine will be here whose addresses are attracted at other sites: until it runs, packets to it are kept.
    pub fn visit(&mut self, key: &PortKey, routes: &[VisitRoute]) -> Result<(), AddressTaken> {
        let routes: Vec<_> = routes
            .iter()
            .map(|route| {
                let also = route.also.as_ref().map(|also| self.peer_slot(also));
                (route.address, self.peer_slot(&route.peer), also)
            })
            .collect();
        let peer = routes.first().map_or(PeerSlot(0), |(_, peer, _)| *peer);
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
            grant.also = Some(onward);
        });
        let port = self.port_mut(key, Role::Visiting)?;
        (port.role, port.onward) = (Role::Relay, Some(onward));
        port.release(now);
        Ok(())
    }

    /// A machine that is away is at `peer` now. The place that it left is believed for a while as well: what it sent
    /// from there may still be under way.
    pub fn retarget(&mut self, key: &PortKey, peer: &SiteName) -> Result<(), UnknownPort> {
        let peer = self.peer_slot(peer);
        let slot = self.slot(key, Role::Away).ok_or_else(|| UnknownPort(key.clone()))?;
        self.policy.change(slot, |grant| {
            if grant.peer != peer {
                (grant.peer, grant.also) = (peer, Some(grant.peer));
            }
        });
        self.port_mut(key, Role::Away)?.peer = peer;
        Ok(())
    }

    /// A machine that is away is on its way back: what its present place held for it is kept here until it is.
    pub fn expect_return(&mut self, key: &PortKey, returning: bool) {
        if let Ok(port) = self.port_mut(key, Role::Away) {
            port.returning = returning;
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
    /// if it cannot.
    pub fn poll_kept(&mut self, now: Duration) -> Option<(PortSlot, Way, Bytes)> {
        for (slot, port) in &mut self.ports {
            if port.phase != Phase::Releasing {
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
    pub fn split(
        &mut self,
        now: Duration,
        peer: PeerSlot,
        packet: &Bytes,
        max_len: usize,
    ) -> Option<Datagrams<'_>> {
        let Peer { splitter, repair, .. } = self.peers.get_mut(&peer)?;
        let view = Packet::parse(packet).ok()?;
        let (flow, max_len) = match self.config.repair_policy.treatment(&view) {
            Treatment::Repair => (Some(FlowBucket::of(&view)), max_len.saturating_sub(ROOM)),
            Treatment::AtOnce => (None, max_len),
        };
        let parts = splitter.split(packet, max_len)?;
        self.counters.split += u64::from(packet.len() >= max_len);
        Some(Datagrams { now, parts: parts.collect::<Vec<_>>().into_iter(), flow, repair })
    }

    /// Counts what became of a packet: it went its way, or not and why.
    pub fn handle_outcome(&mut self, way: Way, packet: &Bytes, outcome: Result<(), DropReason>) {
        match (outcome, way) {
            (Ok(()), Way::Peer(_)) => self.counters.to_peers.count(packet),
            (Ok(()), Way::Device) => self.counters.from_peers.count(packet),
            (Err(reason), _) => self.counters.drop(reason, 1),
        }
    }

    /// What passed and what did not.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Every tunnel's state. Forgets what time has ended.
    pub fn handle_status(&mut self, now: Duration) -> Vec<PortStatus> {
        for peer in self.peers.values_mut() {
            let abandoned = peer.reassembly.abandoned();
            peer.reassembly.expire(now);
            self.counters.drop(DropReason::Incomplete, peer.reassembly.abandoned() - abandoned);
        }
        let peers = &self.peers;
        self.ports.values_mut().filter_map(|port| port.status(now, peers)).collect()
    }

    fn register(
        &mut self,
        key: &PortKey,
        peer: PeerSlot,
        routes: &[(IpAddr, PeerSlot, Option<PeerSlot>)],
        role: Role,
    ) -> Result<(), AddressTaken> {
        let port = match self.slot(key, role) {
            Some(slot) => slot,
            None => PortSlot(self.take_slot()),
        };
        let addresses: Vec<IpAddr> = routes.iter().map(|(address, _, _)| *address).collect();
        if let Some((address, slot)) = self.policy.conflict(port, &addresses)
            && !self.gives_way(slot, key)
        {
            let owner = self.ports.get(&slot).map_or_else(|| key.clone(), |port| port.key.clone());
            return Err(AddressTaken { address, owner });
        }
        let known = self.ports.get(&port).is_some_and(|known| known.peer == peer);
        self.policy.forget(port);
        for (address, peer, also) in routes {
            self.policy.allow(Grant { port, peer: *peer, also: *also, role }, *address);
        }
        if known {
            return Ok(());
        }
        let hold = Hold::new(self.config.hold.clone());
        let (key, phase, released_at) = (key.clone(), Phase::Holding, Duration::ZERO);
        let new =
            Port { key, role, peer, onward: None, returning: false, phase, released_at, hold, flows: None };
        self.ports.insert(port, new);
        Ok(())
    }

    /// What a machine has here in another role gives way to the same machine: it comes, goes and comes again.
    fn gives_way(&self, slot: PortSlot, key: &PortKey) -> bool {
        self.ports.get(&slot).is_none_or(|port| port.key == *key)
    }

    /// Judges a joined packet; `None`: it was kept.
    fn admit(&mut self, now: Duration, peer: PeerSlot, packet: &Bytes) -> Result<Option<Way>, DropReason> {
        let view = Packet::parse(packet).map_err(|_| DropReason::NotAPacket)?;
        let ports = &self.ports;
        let returning = |slot| ports.get(&slot).is_some_and(|port| port.returning);
        let judged = self.policy.inbound(&view, peer, returning)?;
        let port = self.ports.get_mut(&judged.grant().port).ok_or(DropReason::UnknownAddress)?;
        match judged {
            Inbound::ToMachine(grant) => {
                if grant.peer != peer {
                    self.policy.turn_to(view.destination(), peer);
                }
                let kept = port.keep(packet, &mut self.counters);
                Ok((!kept).then_some(Way::Device))
            }
            Inbound::FromMachine(_) => {
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
                self.counters.drop(DropReason::HoldFull, port.hold.push(packet.clone()));
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

    /// Keeps a packet to the guest unless packets pass.
    fn keep(&mut self, packet: &Bytes, counters: &mut Counters) -> bool {
        match self.phase {
            Phase::Passing => false,
            Phase::Holding | Phase::Releasing => {
                counters.held += 1;
                counters.drop(DropReason::HoldFull, self.hold.push(packet.clone()));
                true
            }
        }
    }

    fn status(&mut self, now: Duration, peers: &BTreeMap<PeerSlot, Peer>) -> Option<PortStatus> {
        let may_end = self.flows.as_mut().is_some_and(|flows| flows.may_end(now));
        Some(PortStatus {
            key: self.key.clone(),
            role: self.role,
            peer: peers.get(&self.onward.unwrap_or(self.peer))?.site.clone(),
            phase: self.phase,
            held_packets: self.hold.len() as u64,
            held_bytes: self.hold.bytes() as u64,
            flows_alive: self.flows.as_ref().map(|flows| flows.alive() as u64),
            may_end,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::{ipv4, tcp};
    use super::*;

    const HOME: [u8; 4] = [198, 51, 100, 10];
    const CLIENT: [u8; 4] = [192, 0, 2, 1];
    const NOW: Duration = Duration::from_secs(10);

    fn key(machine: &str) -> PortKey {
        PortKey { machine: machine.parse().unwrap(), nic: "net0".parse().unwrap() }
    }

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn to_guest(port: u16) -> Bytes {
        ipv4(CLIENT, HOME, 6, &tcp(port, 80, 0x10)).into()
    }

    fn from_guest(port: u16) -> Bytes {
        ipv4(HOME, CLIENT, 6, &tcp(80, port, 0x10)).into()
    }

    fn datagrams(datapath: &mut Datapath, peer: PeerSlot, packet: &Bytes) -> Vec<Bytes> {
        datapath.split(NOW, peer, packet, 1200).unwrap().collect()
    }

    fn kept(datapath: &mut Datapath) -> Vec<Bytes> {
        std::iter::from_fn(|| datapath.poll_kept(NOW)).map(|(_, _, packet)| packet).collect()
    }

    #[test]
    fn packets_of_the_pause_reach_the_guest_in_order_and_before_later_ones() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        assert_eq!(home.handle_packet(NOW, to_guest(1)), None);
        home.attract(NOW, &key("web1"), &[]).unwrap();
        assert_eq!(home.handle_packet(NOW, to_guest(2)), None, "queues behind the first");
        assert_eq!(kept(&mut home), [to_guest(1), to_guest(2)]);
        assert!(home.handle_packet(NOW, to_guest(3)).is_some());
        assert_eq!(home.counters().held, 2);
    }

    #[test]
    fn a_packet_the_link_does_not_take_stays_first() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        home.handle_packet(NOW, to_guest(1));
        home.handle_packet(NOW, to_guest(2));
        home.attract(NOW, &key("web1"), &[]).unwrap();
        let (slot, _, packet) = home.poll_kept(NOW).unwrap();
        home.return_kept(slot, packet);
        assert!(home.is_releasing());
        assert_eq!(kept(&mut home), [to_guest(1), to_guest(2)]);
        assert!(!home.is_releasing());
    }

    #[test]
    fn kept_packets_that_no_link_takes_are_dropped_at_the_limit() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        home.handle_packet(NOW, to_guest(1));
        home.attract(NOW, &key("web1"), &[]).unwrap();
        assert!(home.poll_kept(NOW + Duration::from_secs(5)).is_none());
        assert_eq!(home.counters().dropped[&DropReason::LinkBusy], 1);
    }

    #[test]
    fn a_rollback_gives_the_kept_packets_back() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        home.handle_packet(NOW, to_guest(1));
        assert_eq!(home.end(&key("web1"), Role::Away), [to_guest(1)]);
        assert_eq!(home.end(&key("web1"), Role::Away), Vec::<Bytes>::new());
        assert_eq!(home.handle_packet(NOW, to_guest(2)), None);
    }

    #[test]
    fn before_the_hand_over_the_peer_does_not_speak_for_the_machine() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        let peer = home.peer_slot(&site("b"));
        let datagram = datagrams(&mut home, peer, &from_guest(1)).remove(0);
        assert_eq!(arrive(&mut home, peer, datagram), None);
        let datagram = datagrams(&mut home, peer, &from_guest(1)).remove(0);
        assert_eq!(home.counters().dropped[&DropReason::NotHandedOver], 1);
        home.attract(NOW, &key("web1"), &[]).unwrap();
        assert_eq!(arrive(&mut home, peer, datagram), Some((Way::Device, from_guest(1))));
    }

    #[test]
    fn a_visitor_gets_what_arrived_before_it_ran() {
        let mut visited = Datapath::new(DatapathConfig::default());
        visited.visit(&key("web1"), &[route(HOME, "a")]).unwrap();
        let peer = visited.peer_slot(&site("a"));
        let datagram = datagrams(&mut visited, peer, &to_guest(1)).remove(0);
        assert_eq!(arrive(&mut visited, peer, datagram), None);
        visited.resumed(NOW, &key("web1")).unwrap();
        assert_eq!(visited.poll_kept(NOW).unwrap().1, Way::Device);
        assert_eq!(visited.handle_packet(NOW, from_guest(1)), Some(peer));
    }

    #[test]
    fn two_machines_with_one_address_do_not_share_a_tunnel() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        let taken = home.visit(&key("web2"), &[route(HOME, "c")]).unwrap_err();
        assert_eq!(taken.owner, key("web1"));
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
    }

    fn arrive(datapath: &mut Datapath, peer: PeerSlot, datagram: Bytes) -> Option<(Way, Bytes)> {
        datapath.handle_datagram(NOW, peer, datagram);
        datapath.poll_packet(NOW, peer)
    }

    fn route(address: [u8; 4], peer: &str) -> VisitRoute {
        VisitRoute { address: address.into(), peer: site(peer), also: None }
    }

    /// What `from` sends to `to` about a packet.
    fn carry(
        from: &mut Datapath,
        to: &mut Datapath,
        at: (&str, &str),
        packet: &Bytes,
    ) -> Option<(Way, Bytes)> {
        let (peer, back) = (from.peer_slot(&site(at.1)), to.peer_slot(&site(at.0)));
        let datagram = datagrams(from, peer, packet).remove(0);
        arrive(to, back, datagram)
    }

    #[test]
    fn a_machine_that_moves_on_is_reached_through_the_site_it_left_until_its_home_knows() {
        let [mut a, mut b, mut c] = [(); 3].map(|()| Datapath::new(DatapathConfig::default()));
        a.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        a.attract(NOW, &key("web1"), &[]).unwrap();
        b.visit(&key("web1"), &[route(HOME, "a")]).unwrap();
        b.resumed(NOW, &key("web1")).unwrap();
        assert!(a.poll_kept(NOW).is_none() && b.poll_kept(NOW).is_none());
        c.visit(&key("web1"), &[VisitRoute { also: Some(site("a")), ..route(HOME, "b") }]).unwrap();
        b.pause(&key("web1")).unwrap();
        assert_eq!(carry(&mut a, &mut b, ("a", "b"), &to_guest(1)), None, "held");
        b.relay(NOW, &key("web1"), &site("c")).unwrap();
        b.relay(NOW, &key("web1"), &site("c")).unwrap();
        let (_, way, kept) = b.poll_kept(NOW).unwrap();
        assert_eq!((way, kept.clone()), (Way::Peer(b.peer_slot(&site("c"))), to_guest(1)));
        assert_eq!(carry(&mut b, &mut c, ("b", "c"), &kept), None, "it does not run yet");
        c.resumed(NOW, &key("web1")).unwrap();
        assert_eq!(c.poll_kept(NOW).unwrap().1, Way::Device);
        assert!(c.poll_kept(NOW).is_none());
        let by_b = c.peer_slot(&site("b"));
        assert_eq!(c.handle_packet(NOW, from_guest(1)), Some(by_b), "the home does not know yet");
        let to_a = Some((Way::Peer(b.peer_slot(&site("a"))), from_guest(1)));
        assert_eq!(carry(&mut c, &mut b, ("c", "b"), &from_guest(1)), to_a);
        assert_eq!(carry(&mut c, &mut a, ("c", "a"), &from_guest(1)), None, "not believed yet");
        assert_eq!(carry(&mut b, &mut a, ("b", "a"), &from_guest(1)), Some((Way::Device, from_guest(1))));
        a.retarget(&key("web1"), &site("c")).unwrap();
        assert_eq!(a.handle_packet(NOW, to_guest(2)), Some(a.peer_slot(&site("c"))));
        let delivered = Some((Way::Device, to_guest(2)));
        assert_eq!(carry(&mut a, &mut c, ("a", "c"), &to_guest(2)), delivered);
        let direct = c.peer_slot(&site("a"));
        assert_eq!(c.handle_packet(NOW, from_guest(2)), Some(direct), "from now on without a detour");
        let late = Some((Way::Device, from_guest(3)));
        assert_eq!(carry(&mut b, &mut a, ("b", "a"), &from_guest(3)), late, "sent before it was known");
    }

    #[test]
    fn a_machine_that_returns_finds_what_was_held_for_it_and_keeps_the_address_it_was_visited_at() {
        const CARE_OF: [u8; 4] = [203, 0, 113, 200];
        let [mut a, mut b] = [(); 2].map(|()| Datapath::new(DatapathConfig::default()));
        a.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        a.attract(NOW, &key("web1"), &[]).unwrap();
        b.visit(&key("web1"), &[route(HOME, "a")]).unwrap();
        b.resumed(NOW, &key("web1")).unwrap();
        assert!(a.poll_kept(NOW).is_none() && b.poll_kept(NOW).is_none());
        b.pause(&key("web1")).unwrap();
        b.begin_hold(&key("web1"), &site("a"), &[CARE_OF.into()]).unwrap();
        assert_eq!(carry(&mut a, &mut b, ("a", "b"), &to_guest(1)), None);
        b.relay(NOW, &key("web1"), &site("a")).unwrap();
        let (_, _, kept) = b.poll_kept(NOW).unwrap();
        assert_eq!(carry(&mut b, &mut a, ("b", "a"), &kept), None);
        assert_eq!(a.take_kept(&key("web1"), Role::Away), Vec::<Bytes>::new(), "nobody is expected");
        a.expect_return(&key("web1"), true);
        assert_eq!(carry(&mut b, &mut a, ("b", "a"), &kept), None);
        assert_eq!(a.end(&key("web1"), Role::Away), [to_guest(1)]);
        a.visit(&key("web1"), &[route(CARE_OF, "b"), route(HOME, "b")]).unwrap();
        a.resumed(NOW, &key("web1")).unwrap();
        b.attract(NOW, &key("web1"), &[]).unwrap();
        assert!(b.poll_kept(NOW).is_none());
        let dialled: Bytes = ipv4(CLIENT, CARE_OF, 6, &tcp(1, 80, 0x02)).into();
        assert_eq!(b.handle_packet(NOW, dialled.clone()), Some(b.peer_slot(&site("a"))));
        assert!(a.poll_kept(NOW).is_none());
        assert_eq!(carry(&mut b, &mut a, ("b", "a"), &dialled), Some((Way::Device, dialled)));
        let reply: Bytes = ipv4(CARE_OF, CLIENT, 6, &tcp(80, 1, 0x12)).into();
        assert_eq!(a.handle_packet(NOW, reply.clone()), Some(a.peer_slot(&site("b"))));
        assert_eq!(carry(&mut a, &mut b, ("a", "b"), &reply), Some((Way::Device, reply)));
        // And away again: its home address leaves the visit for the hold.
        a.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        assert_eq!(a.handle_packet(NOW, to_guest(9)), None);
        assert_eq!(a.end(&key("web1"), Role::Away), [to_guest(9)]);
        a.forget_address(&key("web1"), CARE_OF.into());
        assert_eq!(a.handle_packet(NOW, ipv4(CARE_OF, CLIENT, 6, &tcp(80, 1, 0x10)).into()), None);
    }

    #[test]
    fn the_status_says_when_a_tunnel_may_end() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        assert!(home.set_names_expire_at(&key("web1"), NOW).is_err(), "nothing was handed over");
        home.attract(NOW, &key("web1"), &[]).unwrap();
        home.set_names_expire_at(&key("web1"), NOW).unwrap();
        home.handle_packet(NOW, to_guest(1));
        let status = home.handle_status(NOW + Duration::from_secs(60)).remove(0);
        assert_eq!((status.flows_alive, status.may_end, status.held_packets), (Some(1), false, 1));
        home.handle_packet(NOW, ipv4(CLIENT, HOME, 6, &tcp(1, 80, 0x04)).into());
        assert!(home.handle_status(NOW + Duration::from_secs(24 * 3600))[0].may_end);
    }
}
