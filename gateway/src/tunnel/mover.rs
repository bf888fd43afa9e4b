//! The task that moves packets between the TUN device and the links.
//!
//! One task owns the datapath's state: it waits for a packet from the device, a datagram from a peer, a
//! command or the clock, and applies what came. It never answers a packet itself: while a link is down,
//! packets are dropped without a word and the transports inside repeat them.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::ids::SiteName;
use longhaul_core::tunnel::coalesce::Coalescer;
use longhaul_core::tunnel::datapath::{
    Counters, Datapath, GivenAway, PortStatus, Traffic, UnknownPort, VisitRoute, Way,
};
use longhaul_core::tunnel::flows::{FlowEntry, FlowTable, HeldBy, OneWay};
use longhaul_core::tunnel::handover::FlowTuple;
use longhaul_core::tunnel::offload::{self, MAX_FRAME_BYTES, Offload, VNET_HEADER_BYTES};
use longhaul_core::tunnel::policy::{AddressTaken, DropReason, PeerSlot, PortKey, Role};
use longhaul_core::tunnel::repair::{self, RepairCounters};
use longhaul_core::tunnel::segment;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{trace, warn};

use super::config::TunnelConfig;
use super::device::TunDevice;

/// Packets taken from one source before the others get their turn, give or take a super-packet's: the link must send what
/// it was given before it is given more.
const BATCH: usize = 64;
/// Packets the device is emptied of before a hold is given up: more than it can queue.
const DRAIN: usize = 8192;
/// How exactly repair is called in time; well below a round trip that is worth repairing.
const REPAIR_GRANULARITY: Duration = Duration::from_micros(500);
/// How soon a link that took no datagram is tried again with packets that were kept.
const RETRY: Duration = Duration::from_millis(1);

/// A peer's link, as far as the tunnel uses it.
pub trait DatagramPath: Send + Sync {
    /// Sends one datagram now, or says `false`: the link is down or its queue is full. It must neither
    /// wait nor make room by dropping an earlier one.
    fn try_send(&self, datagram: Bytes) -> bool;

    /// The largest datagram the link takes at the moment, in bytes; 0 while it is down.
    fn max_len(&self) -> usize;

    /// The path's round trip; `None` while the link is down.
    fn rtt(&self) -> Option<Duration>;
}

/// What the tunnel does, for status and metrics.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TunnelStatus {
    /// Packets of all tunnels together.
    pub counters: Counters,
    /// Every NIC that is away or visits.
    pub ports: Vec<PortStatus>,
    /// What was done about each path's loss.
    pub repair: Vec<(SiteName, RepairCounters)>,
}

/// The flows of a NIC that is away, and what holds its tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowListing {
    /// What holds it.
    pub held_by: HeldBy,
    /// The flows that have been without a packet for the longest.
    pub flows: Vec<FlowEntry>,
}

/// A peer's path and the datagrams that come from it.
pub(super) struct PeerPath {
    pub path: Arc<dyn DatagramPath>,
    pub incoming: mpsc::Receiver<Bytes>,
}

/// What the datapath is told to do.
pub(super) enum Command {
    AddPeer {
        site: SiteName,
        path: PeerPath,
        done: oneshot::Sender<()>,
    },
    BeginHold {
        key: PortKey,
        peer: SiteName,
        home: Vec<IpAddr>,
        done: oneshot::Sender<Result<(), AddressTaken>>,
    },
    Attract {
        key: PortKey,
        flows: Vec<FlowTuple>,
        /// Nobody had needed the addresses for this long.
        quiet: Duration,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    Visit {
        key: PortKey,
        routes: Vec<VisitRoute>,
        done: oneshot::Sender<Result<Vec<GivenAway>, AddressTaken>>,
    },
    Resumed {
        key: PortKey,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    /// A machine that is here stops to leave.
    Pause {
        key: PortKey,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    /// It left for this site.
    Relay {
        key: PortKey,
        onward: SiteName,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    /// A machine that is away is at this site now.
    Retarget {
        key: PortKey,
        peer: SiteName,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    ExpectReturn {
        key: PortKey,
        returning: bool,
        done: oneshot::Sender<()>,
    },
    ForgetAddress {
        key: PortKey,
        address: IpAddr,
        done: oneshot::Sender<()>,
    },
    /// The peer's gateway was started anew.
    PeerRestarted {
        site: SiteName,
        done: oneshot::Sender<()>,
    },
    Flows {
        key: PortKey,
        max: usize,
        done: oneshot::Sender<Result<FlowListing, UnknownPort>>,
    },
    /// These go into the kernel, as if they came from a peer.
    Deliver {
        packets: Vec<Bytes>,
        done: oneshot::Sender<()>,
    },
    NamesExpire {
        key: PortKey,
        after: Duration,
        done: oneshot::Sender<Result<(), UnknownPort>>,
    },
    TakeKept {
        key: PortKey,
        role: Role,
        done: oneshot::Sender<Vec<Bytes>>,
    },
    End {
        key: PortKey,
        role: Role,
        done: oneshot::Sender<Vec<Bytes>>,
    },
}

/// The device, the links and the state between them.
pub(super) struct Mover {
    device: TunDevice,
    buffer: Box<[u8]>,
    /// Packets of the super-packet that was read last.
    segments: Vec<Bytes>,
    /// Packets on their way to the device, while those behind them may be joined to them.
    joining: Coalescer,
    datapath: Datapath,
    peers: BTreeMap<PeerSlot, PeerPath>,
    last_served: PeerSlot,
    epoch: Instant,
    status: watch::Sender<TunnelStatus>,
    /// NICs of which it was said that most of their connections are heard from one end only.
    one_way: BTreeSet<PortKey>,
}

impl Mover {
    pub(super) fn new(device: TunDevice, config: &TunnelConfig, status: watch::Sender<TunnelStatus>) -> Self {
        Self {
            joining: Coalescer::new(device.takes_udp()),
            device,
            buffer: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            segments: Vec::new(),
            datapath: Datapath::new(config.datapath.clone()),
            peers: BTreeMap::new(),
            last_served: PeerSlot(0),
            epoch: Instant::now(),
            status,
            one_way: BTreeSet::new(),
        }
    }

    /// Moves packets until the last sender of commands is gone.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>, status_interval: Duration) {
        enum Event {
            Command(Option<Command>),
            Device(io::Result<usize>),
            Peer(PeerSlot),
            Status,
            Retry,
            Repair,
        }
        let mut ticks = tokio::time::interval(status_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let releasing = self.datapath.is_releasing();
            let repair_at = self.repair_at();
            let event = tokio::select! {
                command = commands.recv() => Event::Command(command),
                read = self.device.recv(&mut self.buffer) => Event::Device(read),
                peer = next_batch(&mut self.peers, self.last_served, &mut batch) => Event::Peer(peer),
                _ = ticks.tick() => Event::Status,
                () = tokio::time::sleep(RETRY), if releasing => Event::Retry,
                () = tokio::time::sleep_until(repair_at.unwrap_or(self.epoch)), if repair_at.is_some() => {
                    Event::Repair
                }
            };
            match event {
                Event::Command(Some(command)) => {
                    self.handle_command(command);
                    self.publish();
                }
                Event::Command(None) => return,
                Event::Device(Ok(len)) => self.handle_packets(len),
                // One packet that the kernel could not describe (`tun_put_user`), and no failure of the device.
                Event::Device(Err(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.datapath.handle_strange_frame();
                }
                Event::Device(Err(error)) => {
                    warn!(%error, "tunnel device failed; the gateway ends, and must be started again");
                    return;
                }
                Event::Peer(peer) => self.handle_datagrams(peer, &mut batch),
                Event::Status => {
                    self.measure_paths();
                    self.publish();
                }
                Event::Retry | Event::Repair => {}
            }
            // However busy it is: what is given up in time holds up nobody.
            if self.datapath.repair_timeout().is_some_and(|at| at <= self.now()) {
                self.handle_repair_timeout();
            }
            self.release_kept();
            self.send_repair();
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn publish(&mut self) {
        let ports = self.datapath.handle_status(self.now());
        self.warn_of_one_way(&ports);
        let (counters, repair) = (self.datapath.counters().clone(), self.datapath.repair_counters());
        let status = TunnelStatus { counters, ports, repair };
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }

    /// Once for as long as a NIC is away.
    fn warn_of_one_way(&mut self, ports: &[PortStatus]) {
        self.one_way.retain(|key| ports.iter().any(|port| port.role == Role::Away && port.key == *key));
        for port in ports.iter().filter(|port| port.one_way.is_most()) {
            if self.one_way.insert(port.key.clone()) {
                let OneWay { active, only_guest, only_remote } = port.one_way;
                warn!(port = %port.key, peer = %port.peer, active, only_guest, only_remote, "connections of a machine that is away are heard from one end only: a firewall may have lost its state, or the tunnel carries one direction");
            }
        }
    }

    fn handle_command(&mut self, command: Command) {
        let now = self.now();
        // A caller that gave up waiting does not want the answer.
        match command {
            Command::AddPeer { site, path, done } => {
                let slot = self.datapath.peer_slot(&site);
                self.peers.insert(slot, path);
                let _ = done.send(());
            }
            Command::BeginHold { key, peer, home, done } => {
                let _ = done.send(self.datapath.begin_hold(&key, &peer, &home));
            }
            Command::Attract { key, flows, quiet, done } => {
                let _ = done.send(self.datapath.attract_again(now, &key, &flows, quiet));
            }
            Command::Visit { key, routes, done } => {
                let _ = done.send(self.datapath.visit(&key, &routes));
            }
            Command::Pause { key, done } => {
                let _ = done.send(self.datapath.pause(&key));
            }
            Command::Relay { key, onward, done } => {
                let _ = done.send(self.datapath.relay(now, &key, &onward));
            }
            Command::Retarget { key, peer, done } => {
                let _ = done.send(self.datapath.retarget(&key, &peer));
            }
            Command::ExpectReturn { key, returning, done } => {
                self.datapath.expect_return(now, &key, returning);
                let _ = done.send(());
            }
            Command::ForgetAddress { key, address, done } => {
                self.datapath.forget_address(&key, address);
                let _ = done.send(());
            }
            Command::PeerRestarted { site, done } => {
                self.datapath.handle_peer_restart(&site);
                let _ = done.send(());
            }
            Command::Flows { key, max, done } => {
                let table = self.datapath.flows(&key).ok_or(UnknownPort(key.clone()));
                let listing = |table: &FlowTable| FlowListing {
                    held_by: table.held_by(now),
                    flows: table.longest_idle(now, max),
                };
                let _ = done.send(table.map(listing));
            }
            Command::Deliver { packets, done } => {
                packets.into_iter().for_each(|packet| self.deliver(packet));
                self.flush();
                let _ = done.send(());
            }
            Command::Resumed { key, done } => {
                let _ = done.send(self.datapath.resumed(now, &key));
            }
            Command::NamesExpire { key, after, done } => {
                let _ = done.send(self.datapath.set_names_expire_at(&key, now + after));
            }
            Command::TakeKept { key, role, done } => {
                self.drain_device(DRAIN, usize::MAX);
                let _ = done.send(self.datapath.take_kept(&key, role));
            }
            Command::End { key, role, done } => {
                self.drain_device(DRAIN, usize::MAX);
                let _ = done.send(self.datapath.end(&key, role));
            }
        }
    }

    fn handle_packets(&mut self, first: usize) {
        let packets = self.handle_frame(first);
        self.drain_device(BATCH, BATCH.saturating_sub(packets));
    }

    /// Handles what the device has at once, at most `max` reads, and no more once they were `max_packets`.
    fn drain_device(&mut self, max: usize, max_packets: usize) {
        let mut packets = 0;
        for _ in 0..max {
            if packets >= max_packets {
                return;
            }
            let Some(len) = self.device.try_recv(&mut self.buffer) else { return };
            packets += self.handle_frame(len);
        }
    }

    /// Takes what the device gave apart into packets; says how many.
    fn handle_frame(&mut self, len: usize) -> usize {
        let frame = &mut self.buffer[..len];
        let Ok((left, packet_len)) = offload::read(frame) else {
            self.datapath.handle_strange_frame();
            return 1;
        };
        let packet = &self.buffer[VNET_HEADER_BYTES..][..packet_len];
        let max_len = match left {
            Offload::Tcp { .. } => self.datapath.link_of(packet).map_or(0, |peer| self.room_for(peer)),
            Offload::Finished | Offload::Checksum | Offload::Udp { .. } => packet_len,
        };
        segment::finish(left, packet, max_len, &mut self.segments);
        let mut segments = std::mem::take(&mut self.segments);
        let count = segments.len();
        segments.drain(..).for_each(|packet| self.handle_packet(&packet));
        self.segments = segments;
        count
    }

    fn handle_packet(&mut self, packet: &Bytes) {
        if let Some(peer) = self.datapath.handle_packet(self.now(), packet.clone()) {
            let outcome = self.send(peer, packet);
            trace!(len = packet.len(), ?outcome, "to peer");
            self.datapath.handle_outcome(Way::Peer(peer), Traffic::of(packet), outcome);
        }
    }

    /// How long a packet may be that a peer's link need not split.
    fn room_for(&self, peer: PeerSlot) -> usize {
        let len = self.peers.get(&peer).map_or(0, |peer| peer.path.max_len());
        len.saturating_sub(repair::ROOM + 1)
    }

    fn handle_datagrams(&mut self, peer: PeerSlot, batch: &mut Vec<Bytes>) {
        self.last_served = peer;
        let now = self.now();
        for datagram in batch.drain(..) {
            self.datapath.handle_datagram(now, peer, datagram);
            self.take_packets(peer);
        }
        self.flush();
    }

    /// What has come from `peer` and waits for nothing goes on.
    fn take_packets(&mut self, peer: PeerSlot) {
        let now = self.now();
        while let Some((way, packet)) = self.datapath.poll_packet(now, peer) {
            match way {
                Way::Device => self.deliver(packet),
                Way::Peer(onward) => {
                    let outcome = self.send(onward, &packet);
                    trace!(len = packet.len(), ?outcome, "from peer");
                    self.datapath.handle_outcome(way, Traffic::of(&packet), outcome);
                }
            }
        }
    }

    /// When repair wants to be called. Not at once again: a link that takes nothing would be asked without pause.
    fn repair_at(&self) -> Option<Instant> {
        let at = self.epoch + self.datapath.repair_timeout()?;
        Some(at.max(Instant::now() + REPAIR_GRANULARITY))
    }

    fn handle_repair_timeout(&mut self) {
        self.datapath.handle_repair_timeout(self.now());
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            self.take_packets(peer);
        }
        self.flush();
    }

    /// Reports, repeats and parity, as far as the links take them.
    fn send_repair(&mut self) {
        let now = self.now();
        for (slot, peer) in &self.peers {
            while let Some(datagram) = self.datapath.poll_repair(now, *slot) {
                if !peer.path.try_send(datagram.clone()) {
                    self.datapath.return_repair(*slot, datagram);
                    break;
                }
            }
        }
    }

    fn measure_paths(&mut self) {
        for (slot, peer) in &self.peers {
            if let Some(rtt) = peer.path.rtt() {
                self.datapath.set_rtt(*slot, rtt);
            }
        }
    }

    /// Lets kept packets go until none is left or none can leave.
    fn release_kept(&mut self) {
        let now = self.now();
        let mut busy = Vec::new();
        while let Some((port, way, packet)) = self.datapath.poll_kept(now, &busy) {
            match way {
                Way::Peer(peer) => {
                    let outcome = self.send(peer, &packet);
                    if outcome == Err(DropReason::LinkBusy) {
                        self.datapath.return_kept(port, packet);
                        busy.push(port);
                        continue;
                    }
                    self.datapath.handle_outcome(way, Traffic::of(&packet), outcome);
                }
                Way::Device => self.deliver(packet),
            }
        }
        self.flush();
    }

    fn send(&mut self, peer: PeerSlot, packet: &Bytes) -> Result<(), DropReason> {
        let path = &self.peers.get(&peer).ok_or(DropReason::LinkBusy)?.path;
        let max_len = path.max_len();
        if max_len == 0 {
            return Err(DropReason::LinkBusy);
        }
        let now = self.epoch.elapsed();
        let datagrams = self.datapath.split(now, peer, packet, max_len);
        let mut datagrams = datagrams.ok_or(DropReason::TooLarge)?;
        while let Some(datagram) = datagrams.next() {
            if !path.try_send(datagram) {
                datagrams.take_back();
                return Err(DropReason::LinkBusy);
            }
        }
        Ok(())
    }

    /// Hands a packet to the device, at [`Mover::flush`] at the latest.
    fn deliver(&mut self, packet: Bytes) {
        self.joining.push(packet);
        self.write_ready();
    }

    /// Nothing waits for packets behind it any longer.
    fn flush(&mut self) {
        self.joining.flush();
        self.write_ready();
    }

    fn write_ready(&mut self) {
        while let Some(train) = self.joining.poll() {
            let outcome = self.device.send(&train).map_err(|_| DropReason::DeviceBusy);
            trace!(traffic = ?train.traffic(), ?outcome, "to device");
            self.datapath.handle_outcome(Way::Device, train.traffic(), outcome);
        }
    }
}

/// Waits until some peer has datagrams and fills `batch` with them. Peers take turns, beginning after
/// `last_served`. Cancel-safe: nothing is taken unless it is returned.
async fn next_batch(
    peers: &mut BTreeMap<PeerSlot, PeerPath>,
    last_served: PeerSlot,
    batch: &mut Vec<Bytes>,
) -> PeerSlot {
    poll_fn(|context| poll_batch(peers, last_served, batch, context)).await
}

fn poll_batch(
    peers: &mut BTreeMap<PeerSlot, PeerPath>,
    last_served: PeerSlot,
    batch: &mut Vec<Bytes>,
    context: &mut Context<'_>,
) -> Poll<PeerSlot> {
    let after = (Bound::Excluded(last_served), Bound::Unbounded);
    for (slot, peer) in peers.range_mut(after) {
        if let Poll::Ready(1..) = peer.incoming.poll_recv_many(context, batch, BATCH) {
            return Poll::Ready(*slot);
        }
    }
    for (slot, peer) in peers.range_mut(..=last_served) {
        if let Poll::Ready(1..) = peer.incoming.poll_recv_many(context, batch, BATCH) {
            return Poll::Ready(*slot);
        }
    }
    Poll::Pending
}
