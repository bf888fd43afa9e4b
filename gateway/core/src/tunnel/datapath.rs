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

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::flows::{FlowConfig, FlowTable};
use super::fragment::{Parts, Reassembly, ReassemblyConfig, Splitter};
use super::handover::FlowTuple;
use super::hold::{Hold, HoldConfig};
use super::packet::{Packet, Side};
use super::policy::{AddressTaken, DropReason, Grant, PeerSlot, Policy, PortKey, PortSlot, Role};
use crate::ids::SiteName;

/// Bounds and times of the datapath.
#[derive(Debug, Clone)]
pub struct DatapathConfig {
    /// Joining of split packets.
    pub reassembly: ReassemblyConfig,
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
    reassembly: Reassembly,
}

#[derive(Debug)]
struct Port {
    key: PortKey,
    grant: Grant,
    phase: Phase,
    released_at: Duration,
    hold: Hold,
    flows: Option<FlowTable>,
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
        self.peers.insert(slot, Peer { site: site.clone(), splitter: Splitter::default(), reassembly });
        slot
    }

    /// The machine is about to leave for `peer`: from now packets to it are kept. Repeating it is harmless.
    pub fn begin_hold(
        &mut self,
        key: &PortKey,
        peer: &SiteName,
        home: &[IpAddr],
    ) -> Result<(), AddressTaken> {
        self.register(key, peer, home, Role::Away)
    }

    /// The machine was handed over: kept packets leave for the peer, then new ones pass.
    pub fn attract(&mut self, now: Duration, key: &PortKey, flows: &[FlowTuple]) -> Result<(), UnknownPort> {
        let table = FlowTable::new(self.config.flows.clone(), now);
        let port = self.port_mut(key, Role::Away)?;
        port.flows.get_or_insert(table).seed(now, flows);
        port.release(now);
        Ok(())
    }

    /// A machine of `peer` will visit: until it runs, packets to it are kept.
    pub fn visit(&mut self, key: &PortKey, peer: &SiteName, home: &[IpAddr]) -> Result<(), AddressTaken> {
        self.register(key, peer, home, Role::Visiting)
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
        self.ports.get(&self.slot(key)?)?.flows.as_ref()
    }

    /// The same, to change how long the tunnel is held.
    pub fn flows_mut(&mut self, key: &PortKey) -> Option<&mut FlowTable> {
        self.ports.get_mut(&self.slot(key)?)?.flows.as_mut()
    }

    /// What is kept for a NIC now, oldest first; it stays in its phase. An unknown one has nothing.
    pub fn take_kept(&mut self, key: &PortKey) -> Vec<Bytes> {
        let Some(port) = self.slot(key).and_then(|slot| self.ports.get_mut(&slot)) else { return Vec::new() };
        std::iter::from_fn(|| port.hold.pop()).collect()
    }

    /// Ends a tunnel; what was still kept comes back, oldest first. Ending an unknown one is harmless.
    pub fn end(&mut self, key: &PortKey) -> Vec<Bytes> {
        let Some(slot) = self.slot(key) else { return Vec::new() };
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
            Role::Visiting => Some(grant.peer),
            Role::Away => {
                if let Some(flows) = &mut port.flows {
                    flows.handle_packet(now, &view, Side::Remote);
                }
                if port.keep(&packet, &mut self.counters) { None } else { Some(grant.peer) }
            }
        }
    }

    /// Takes a datagram from `peer`. Returned: the packet to give to the kernel now.
    pub fn handle_datagram(&mut self, now: Duration, peer: PeerSlot, datagram: Bytes) -> Option<Bytes> {
        let reassembly = &mut self.peers.get_mut(&peer)?.reassembly;
        let abandoned = reassembly.abandoned();
        let joined = reassembly.handle_datagram(now, datagram);
        self.counters.drop(DropReason::Incomplete, reassembly.abandoned() - abandoned);
        let packet = match joined {
            Ok(packet) => packet?,
            Err(_) => {
                self.counters.drop(DropReason::BadDatagram, 1);
                return None;
            }
        };
        match self.admit(now, peer, &packet) {
            Ok(true) => Some(packet),
            Ok(false) => None,
            Err(reason) => {
                self.counters.drop(reason, 1);
                None
            }
        }
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
            let way = match port.grant.role {
                Role::Away => Way::Peer(port.grant.peer),
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

    /// Cuts a packet into datagrams for `peer`; `None` if it is too large for that.
    pub fn split<'a>(&mut self, peer: PeerSlot, packet: &'a Bytes, max_len: usize) -> Option<Parts<'a>> {
        let parts = self.peers.get_mut(&peer)?.splitter.split(packet, max_len);
        if parts.is_some() && packet.len() >= max_len {
            self.counters.split += 1;
        }
        parts
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
        peer: &SiteName,
        home: &[IpAddr],
        role: Role,
    ) -> Result<(), AddressTaken> {
        let peer = self.peer_slot(peer);
        let port = match self.slot(key) {
            Some(slot) => slot,
            None => PortSlot(self.take_slot()),
        };
        if let Some((address, slot)) = self.policy.conflict(port, home) {
            let owner = self.ports.get(&slot).map_or_else(|| key.clone(), |port| port.key.clone());
            return Err(AddressTaken { address, owner });
        }
        let grant = Grant { port, peer, role };
        self.policy.allow(grant, home);
        if self.ports.get(&port).is_some_and(|known| known.grant == grant) {
            return Ok(());
        }
        let hold = Hold::new(self.config.hold.clone());
        let (key, phase) = (key.clone(), Phase::Holding);
        self.ports.insert(port, Port { key, grant, phase, released_at: Duration::ZERO, hold, flows: None });
        Ok(())
    }

    /// Judges a joined packet; `false`: it was kept.
    fn admit(&mut self, now: Duration, peer: PeerSlot, packet: &Bytes) -> Result<bool, DropReason> {
        let view = Packet::parse(packet).map_err(|_| DropReason::NotAPacket)?;
        let grant = self.policy.inbound(&view, peer)?;
        let port = self.ports.get_mut(&grant.port).ok_or(DropReason::UnknownAddress)?;
        match grant.role {
            Role::Visiting => Ok(!port.keep(packet, &mut self.counters)),
            Role::Away => {
                let flows = port.flows.as_mut().ok_or(DropReason::NotHandedOver)?;
                flows.handle_packet(now, &view, Side::Guest);
                Ok(true)
            }
        }
    }

    fn slot(&self, key: &PortKey) -> Option<PortSlot> {
        self.ports.iter().find(|(_, port)| port.key == *key).map(|(slot, _)| *slot)
    }

    fn port_mut(&mut self, key: &PortKey, role: Role) -> Result<&mut Port, UnknownPort> {
        self.ports
            .values_mut()
            .find(|port| port.key == *key && port.grant.role == role)
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
            role: self.grant.role,
            peer: peers.get(&self.grant.peer)?.site.clone(),
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
        datapath.split(peer, packet, 1200).unwrap().collect()
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
        assert_eq!(home.end(&key("web1")), [to_guest(1)]);
        assert_eq!(home.end(&key("web1")), Vec::<Bytes>::new());
        assert_eq!(home.handle_packet(NOW, to_guest(2)), None);
    }

    #[test]
    fn before_the_hand_over_the_peer_does_not_speak_for_the_machine() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        let peer = home.peer_slot(&site("b"));
        let datagram = datagrams(&mut home, peer, &from_guest(1)).remove(0);
        assert_eq!(home.handle_datagram(NOW, peer, datagram.clone()), None);
        assert_eq!(home.counters().dropped[&DropReason::NotHandedOver], 1);
        home.attract(NOW, &key("web1"), &[]).unwrap();
        assert_eq!(home.handle_datagram(NOW, peer, datagram), Some(from_guest(1)));
    }

    #[test]
    fn a_visitor_gets_what_arrived_before_it_ran() {
        let mut visited = Datapath::new(DatapathConfig::default());
        visited.visit(&key("web1"), &site("a"), &[HOME.into()]).unwrap();
        let peer = visited.peer_slot(&site("a"));
        let datagram = datagrams(&mut visited, peer, &to_guest(1)).remove(0);
        assert_eq!(visited.handle_datagram(NOW, peer, datagram), None);
        visited.resumed(NOW, &key("web1")).unwrap();
        assert_eq!(visited.poll_kept(NOW).unwrap().1, Way::Device);
        assert_eq!(visited.handle_packet(NOW, from_guest(1)), Some(peer));
    }

    #[test]
    fn two_machines_with_one_address_do_not_share_a_tunnel() {
        let mut home = Datapath::new(DatapathConfig::default());
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
        let taken = home.visit(&key("web2"), &site("c"), &[HOME.into()]).unwrap_err();
        assert_eq!(taken.owner, key("web1"));
        home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
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
