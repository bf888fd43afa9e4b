//! The tunnel: datagrams of two peers that lie, and packets from the device, into one datapath.
//!
//! Whatever comes, a packet is given to the kernel only if it is to the machine that visits from that very
//! peer, or from the machine that is away at it, and nothing leaves for another peer; what is held is bounded.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::tunnel::advertisement::{Advertisement, Received, is_solicitation};
use longhaul_core::tunnel::coalesce::Coalescer;
use longhaul_core::tunnel::datapath::{Datapath, DatapathConfig, VisitRoute, Way};
use longhaul_core::tunnel::duplicates::Claim;
use longhaul_core::tunnel::fragment::{Reassembly, ReassemblyConfig, Splitter};
use longhaul_core::tunnel::handover::Mac;
use longhaul_core::tunnel::offload::{self, VNET_HEADER_BYTES};
use longhaul_core::tunnel::packet::{Packet, Side};
use longhaul_core::tunnel::policy::{PeerSlot, PortKey};
use longhaul_core::tunnel::repair::{FlowBucket, Incarnation, Repair, RepairConfig};
use longhaul_core::tunnel::segment;

use crate::input::Input;
use crate::sample;

const AWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10));
const VISITS: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77));

/// Plays `data` as events: a kind in one byte, a length in two, that many bytes.
pub fn run(data: &[u8]) {
    let mut world = World::new();
    let mut reassembly = Reassembly::new(ReassemblyConfig::default());
    let mut repair = Repair::new(RepairConfig::default(), Incarnation(0));
    let mut input = Input(data);
    while !input.is_empty() {
        let (kind, len) = (input.byte(), usize::from(input.u16()));
        let bytes = Bytes::copy_from_slice(input.take(len));
        world.now += Duration::from_millis(u64::from(kind >> 3));
        let _ = reassembly.handle_datagram(world.now, bytes.clone());
        assert!(reassembly.len() <= ReassemblyConfig::default().max_entries);
        repair_takes(&mut repair, world.now, bytes.clone());
        device_gives(&bytes);
        router_says(&bytes);
        neighbour_says(&bytes);
        match kind & 7 {
            0..=2 => world.peer_sends(world.b, bytes),
            3 => world.peer_sends(world.c, bytes),
            4 | 5 => world.device_sends(bytes),
            6 => drop(world.datapath.resumed(world.now, &key("web2"))),
            _ => drop(world.datapath.handle_status(world.now)),
        }
        world.release();
    }
}

/// Whatever the peer says, what waits is bounded and a datagram is answered by a bounded number.
fn repair_takes(repair: &mut Repair, now: Duration, datagram: Bytes) {
    let config = RepairConfig::default();
    repair.wrap(now, FlowBucket(1), &[&datagram]);
    let _ = repair.handle_datagram(now, datagram);
    repair.handle_timeout(now);
    while repair.poll_packet().is_some() {}
    let answers = std::iter::from_fn(|| repair.poll_transmit(now)).count();
    assert!(answers <= usize::from(config.max_jump) + config.max_gaps);
    let (packets, bytes) = repair.receiver().waiting();
    assert!(packets <= config.max_waiting && bytes <= config.max_waiting_bytes);
}

/// What claims an address names one that a host can have, or is refused.
fn neighbour_says(message: &[u8]) {
    let claims = [Claim::of_arp(message), Claim::of_neighbour(Ipv6Addr::LOCALHOST, 255, message)];
    for claim in claims.into_iter().flatten() {
        assert!(!claim.address.is_unspecified() && claim.mac.0[0] & 1 == 0, "{claim:?}");
    }
}

/// A frame with a virtio-net header is cut into packets that carry all of its data, or refused.
fn device_gives(frame: &[u8]) {
    let mut frame = frame.to_vec();
    let Ok((left, len)) = offload::read(&mut frame) else { return };
    let mut packets = Vec::new();
    segment::finish(left, &frame[VNET_HEADER_BYTES..][..len], 1200, &mut packets);
    assert!(!packets.is_empty() && packets.iter().map(Bytes::len).sum::<usize>() >= len);
}

/// What is taken over of an advertisement is bounded, and is taken over again unchanged.
fn router_says(message: &[u8]) {
    let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let received = Received { device: 1, source, hop_limit: 255, message };
    let _ = is_solicitation(&received);
    let Ok((said, mac)) = Advertisement::received(&received) else { return };
    let _ = said.shortest_lifetime();
    let packet = said.packet(source, mac.unwrap_or(Mac([2, 0, 0, 0, 0, 1])));
    assert!(packet.len() <= 1280);
    let bytes = Vec::from(said.clone());
    assert_eq!(Advertisement::try_from(bytes).expect("it was taken over"), said);
}

struct World {
    datapath: Datapath,
    /// Packets for the device.
    joining: Coalescer,
    b: PeerSlot,
    c: PeerSlot,
    now: Duration,
    /// Repair at the other end.
    there: Repair,
}

impl World {
    /// web1 is away at b, web2 visits from b, and nothing of c's is here.
    fn new() -> Self {
        let mut datapath = Datapath::new(DatapathConfig::default());
        let (b, c) = (datapath.peer_slot(&sample::site("b")), datapath.peer_slot(&sample::site("c")));
        datapath.begin_hold(&key("web1"), &sample::site("b"), &[AWAY]).expect("a free address");
        datapath.attract(Duration::ZERO, &key("web1"), &[]).expect("it is held");
        let route = VisitRoute { address: VISITS, peer: sample::site("b"), also: None, carried: false };
        datapath.visit(&key("web2"), &[route]).expect("a free address");
        let there = Repair::new(RepairConfig::default(), Incarnation::default());
        Self { datapath, joining: Coalescer::new(true), b, c, now: Duration::ZERO, there }
    }

    fn peer_sends(&mut self, peer: PeerSlot, datagram: Bytes) {
        self.datapath.handle_datagram(self.now, peer, datagram);
        while let Some((way, packet)) = self.datapath.poll_packet(self.now, peer) {
            self.came(peer, way, &packet);
            self.joining.push(packet);
        }
        self.joining.flush();
        while let Some(train) = self.joining.poll() {
            let written = train.write(|head, data, rest| {
                head.len() + data.len() + rest.iter().map(Bytes::len).sum::<usize>()
            });
            assert!(written <= offload::MAX_FRAME_BYTES);
        }
        while self.datapath.poll_repair(self.now, peer).is_some() {}
    }

    fn came(&self, peer: PeerSlot, way: Way, packet: &Bytes) {
        assert_eq!(way, Way::Device);
        let view = Packet::parse(packet).expect("it was parsed");
        assert!(peer == self.b && (view.source() == AWAY || view.destination() == VISITS));
        let _ = (view.flow(Side::Guest), view.flow(Side::Remote), view.tcp_flags());
    }

    fn device_sends(&mut self, packet: Bytes) {
        let Some(peer) = self.datapath.handle_packet(self.now, packet.clone()) else { return };
        assert!(peer == self.b);
        let view = Packet::parse(&packet).expect("it was parsed");
        assert!(view.destination() == AWAY || view.source() == VISITS);
        let datagrams = self.datapath.split(self.now, peer, &packet, 1200).expect("not too large");
        let mut other = Reassembly::new(ReassemblyConfig::default());
        let mut joined = None;
        for datagram in datagrams {
            assert!(datagram.len() <= 1200);
            self.there.handle_datagram(self.now, datagram).expect("our own datagrams are understood");
            while let Some(part) = self.there.poll_packet() {
                joined = other.handle_datagram(self.now, part).expect("our own parts join");
            }
        }
        assert_eq!(joined, Some(packet));
    }

    fn release(&mut self) {
        while let Some((_, way, packet)) = self.datapath.poll_kept(self.now, &[]) {
            let view = Packet::parse(&packet).expect("it was parsed");
            match way {
                Way::Peer(peer) => assert!(peer == self.b && view.destination() == AWAY),
                Way::Device => assert!(view.destination() == VISITS),
            }
        }
    }
}

fn key(machine: &str) -> PortKey {
    PortKey { machine: machine.parse().expect("a name"), nic: "net0".parse().expect("a name") }
}

/// Packets that travel and such that do not, whole and in parts, IPv4 and IPv6.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let client = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
    let whole = |packet: Vec<u8>| {
        Splitter::default().split(&packet, 65535).expect("fits").next().expect("one").to_bytes()
    };
    let mut passes = event(0, &whole(ipv4(AWAY, client, 100)));
    passes.extend(event(1, &whole(ipv4(client, VISITS, 100))));
    passes.extend(event(6, b""));
    passes.extend(event(4, &ipv4(client, AWAY, 60)));
    passes.extend(event(5, &ipv4(VISITS, client, 1400)));
    let mut refused = event(3, &whole(ipv4(AWAY, client, 40)));
    refused.extend(event(0, &whole(ipv4(client, AWAY, 40))));
    refused.extend(event(0, &whole(ipv4(AWAY, Ipv4Addr::LOCALHOST.into(), 40))));
    refused.extend(event(4, &ipv6()));
    let mut parts = Vec::new();
    for part in Splitter::default().split(&ipv4(AWAY, client, 900), 400).expect("fits") {
        parts.extend(event(0x78, &part.to_bytes()));
    }
    let routers = event(0, sample::ADVERTISEMENT);
    vec![("passes", passes), ("refused", refused), ("parts", parts), ("routers", routers)]
}

fn event(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&[kind][..], &(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// A TCP segment of `len` bytes in all.
fn ipv4(from: IpAddr, to: IpAddr, len: u16) -> Vec<u8> {
    let mut packet = vec![0; usize::from(len)];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[8..10].copy_from_slice(&[64, 6]);
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else { return packet };
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[20..24].copy_from_slice(&[0, 80, 0x9c, 0x40]);
    packet[32..34].copy_from_slice(&[0x50, 0x02]);
    packet
}

/// A UDP packet behind a hop-by-hop and a fragment header.
fn ipv6() -> Vec<u8> {
    let mut packet = vec![0; 40 + 8 + 8 + 8];
    packet[0] = 0x60;
    packet[5] = 24;
    packet[7] = 64;
    packet[40] = 44;
    packet[48] = 17;
    packet
}
