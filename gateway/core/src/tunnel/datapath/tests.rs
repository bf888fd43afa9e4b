//! The datapath, played packet by packet: holds, visits, machines that move on and come back.

use super::super::packet::tests::{ipv4, tcp};
use super::*;
use crate::units::Rate;

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
    std::iter::from_fn(|| datapath.poll_kept(NOW, &[])).map(|(_, _, packet)| packet).collect()
}

/// web1's home, a, and b, where it runs.
fn visiting() -> [Datapath; 2] {
    let [mut a, mut b] = [(); 2].map(|()| Datapath::new(DatapathConfig::default()));
    a.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
    a.attract(NOW, &key("web1"), &[]).unwrap();
    b.visit(&key("web1"), &[route(HOME, "a")]).unwrap();
    b.resumed(NOW, &key("web1")).unwrap();
    assert!(a.poll_kept(NOW, &[]).is_none() && b.poll_kept(NOW, &[]).is_none());
    [a, b]
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
    let (slot, _, packet) = home.poll_kept(NOW, &[]).unwrap();
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
    assert!(home.poll_kept(NOW + Duration::from_secs(5), &[]).is_none());
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
    assert_eq!(visited.poll_kept(NOW, &[]).unwrap().1, Way::Device);
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

#[test]
fn an_address_of_another_machine_is_refused_also_behind_one_of_the_machines_own() {
    let mut home = Datapath::new(DatapathConfig::default());
    home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
    home.begin_hold(&key("web2"), &site("b"), &[OTHER_HOME.into()]).unwrap();
    let taken = home.visit(&key("web1"), &[route(HOME, "b"), route(OTHER_HOME, "b")]).unwrap_err();
    assert_eq!((taken.address, taken.owner), (OTHER_HOME.into(), key("web2")));
    let to_other: Bytes = ipv4(CLIENT, OTHER_HOME, 6, &tcp(1, 80, 0x10)).into();
    home.attract(NOW, &key("web2"), &[]).unwrap();
    assert!(home.poll_kept(NOW, &[]).is_none());
    assert!(home.handle_packet(NOW, to_other).is_some(), "it is attracted as before");
}

#[test]
fn an_address_that_its_site_has_given_to_another_machine_is_that_ones() {
    const CARE_OF: [u8; 4] = [203, 0, 113, 200];
    let carried = |peer| VisitRoute { carried: true, ..route(CARE_OF, peer) };
    let mut home = Datapath::new(DatapathConfig::default());
    home.visit(&key("web1"), &[route(HOME, "b"), carried("c")]).unwrap();
    // Another site has not given it away, and a home address is nobody's to give.
    assert_eq!(home.visit(&key("web2"), &[carried("b")]).unwrap_err().owner, key("web1"));
    assert_eq!(home.visit(&key("web2"), &[route(CARE_OF, "c")]).unwrap_err().owner, key("web1"));
    let own_home = VisitRoute { carried: true, ..route(HOME, "b") };
    assert_eq!(home.visit(&key("web2"), &[own_home]).unwrap_err().owner, key("web1"));
    let given = home.visit(&key("web2"), &[carried("c"), route(OTHER_HOME, "b")]).unwrap();
    assert_eq!(given, [GivenAway { address: CARE_OF.into(), from: key("web1") }]);
    home.resumed(NOW, &key("web2")).unwrap();
    assert!(home.poll_kept(NOW, &[]).is_none());
    let (c, mut site_c) = (home.peer_slot(&site("c")), Datapath::new(DatapathConfig::default()));
    let dialled: Bytes = ipv4(CLIENT, CARE_OF, 6, &tcp(1, 80, 0x02)).into();
    let any = site_c.peer_slot(&site("any"));
    let datagram = datagrams(&mut site_c, any, &dialled).remove(0);
    assert_eq!(arrive(&mut home, c, datagram), Some((Way::Device, dialled)), "web1 still waits");
    assert!(home.handle_packet(NOW, from_guest(1)).is_some(), "the rest of web1's is its own");
}

fn arrive(datapath: &mut Datapath, peer: PeerSlot, datagram: Bytes) -> Option<(Way, Bytes)> {
    datapath.handle_datagram(NOW, peer, datagram);
    datapath.poll_packet(NOW, peer)
}

fn route(address: [u8; 4], peer: &str) -> VisitRoute {
    VisitRoute { address: address.into(), peer: site(peer), also: None, carried: false }
}

/// What `from` sends to `to` about a packet.
fn carry(from: &mut Datapath, to: &mut Datapath, at: (&str, &str), packet: &Bytes) -> Option<(Way, Bytes)> {
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
    assert!(a.poll_kept(NOW, &[]).is_none() && b.poll_kept(NOW, &[]).is_none());
    c.visit(&key("web1"), &[VisitRoute { also: Some(site("a")), ..route(HOME, "b") }]).unwrap();
    b.pause(&key("web1")).unwrap();
    assert_eq!(carry(&mut a, &mut b, ("a", "b"), &to_guest(1)), None, "held");
    b.relay(NOW, &key("web1"), &site("c")).unwrap();
    b.relay(NOW, &key("web1"), &site("c")).unwrap();
    let (_, way, kept) = b.poll_kept(NOW, &[]).unwrap();
    assert_eq!((way, kept.clone()), (Way::Peer(b.peer_slot(&site("c"))), to_guest(1)));
    assert_eq!(carry(&mut b, &mut c, ("b", "c"), &kept), None, "it does not run yet");
    c.resumed(NOW, &key("web1")).unwrap();
    assert_eq!(c.poll_kept(NOW, &[]).unwrap().1, Way::Device);
    assert!(c.poll_kept(NOW, &[]).is_none());
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
    let [mut a, mut b] = visiting();
    b.pause(&key("web1")).unwrap();
    b.begin_hold(&key("web1"), &site("a"), &[CARE_OF.into()]).unwrap();
    assert_eq!(carry(&mut a, &mut b, ("a", "b"), &to_guest(1)), None);
    b.relay(NOW, &key("web1"), &site("a")).unwrap();
    let (_, _, kept) = b.poll_kept(NOW, &[]).unwrap();
    assert_eq!(carry(&mut b, &mut a, ("b", "a"), &kept), None);
    assert_eq!(a.take_kept(&key("web1"), Role::Away), Vec::<Bytes>::new(), "nobody is expected");
    a.expect_return(NOW, &key("web1"), true);
    assert_eq!(carry(&mut b, &mut a, ("b", "a"), &kept), None);
    assert_eq!(a.end(&key("web1"), Role::Away), [to_guest(1)]);
    a.visit(&key("web1"), &[route(CARE_OF, "b"), route(HOME, "b")]).unwrap();
    a.resumed(NOW, &key("web1")).unwrap();
    b.attract(NOW, &key("web1"), &[]).unwrap();
    assert!(b.poll_kept(NOW, &[]).is_none());
    let dialled: Bytes = ipv4(CLIENT, CARE_OF, 6, &tcp(1, 80, 0x02)).into();
    assert_eq!(b.handle_packet(NOW, dialled.clone()), Some(b.peer_slot(&site("a"))));
    assert!(a.poll_kept(NOW, &[]).is_none());
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
fn a_machine_that_does_not_return_after_all_gets_what_was_kept_where_it_stayed() {
    let [mut a, mut b] = visiting();
    a.expect_return(NOW, &key("web1"), true);
    assert_eq!(carry(&mut b, &mut a, ("b", "a"), &to_guest(1)), None);
    a.expect_return(NOW, &key("web1"), false);
    assert_eq!(a.handle_packet(NOW, to_guest(2)), None, "behind the one that is kept");
    let to_b = Way::Peer(a.peer_slot(&site("b")));
    let kept = std::iter::from_fn(|| a.poll_kept(NOW, &[])).map(|(_, way, packet)| (way, packet));
    assert_eq!(kept.collect::<Vec<_>>(), [(to_b, to_guest(1)), (to_b, to_guest(2))]);
    assert_eq!(a.handle_packet(NOW, to_guest(3)), Some(a.peer_slot(&site("b"))));
}

#[test]
fn a_link_that_takes_nothing_holds_up_no_other_machine() {
    const OTHER: [u8; 4] = [198, 51, 100, 11];
    let mut home = Datapath::new(DatapathConfig::default());
    for (vm, address, peer) in [("web1", HOME, "b"), ("web2", OTHER, "c")] {
        home.begin_hold(&key(vm), &site(peer), &[address.into()]).unwrap();
        let packet: Bytes = ipv4(CLIENT, address, 6, &tcp(1, 80, 0x10)).into();
        assert_eq!(home.handle_packet(NOW, packet), None);
        home.attract(NOW, &key(vm), &[]).unwrap();
    }
    let (busy, _, packet) = home.poll_kept(NOW, &[]).unwrap();
    home.return_kept(busy, packet.clone());
    let (other, ..) = home.poll_kept(NOW, &[busy]).unwrap();
    assert_ne!(busy, other);
    assert!(home.poll_kept(NOW, &[busy]).is_none() && home.is_releasing());
    assert_eq!(home.poll_kept(NOW, &[]).unwrap().2, packet);
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
    assert_eq!((status.flows_alive(), status.may_end, status.held_packets), (Some(1), false, 1));
    home.handle_packet(NOW, ipv4(CLIENT, HOME, 6, &tcp(1, 80, 0x04)).into());
    let may_end = |home: &mut Datapath| home.handle_status(NOW + Duration::from_secs(24 * 3600))[0].may_end;
    assert!(may_end(&mut home));
    home.expect_return(NOW, &key("web1"), true);
    assert!(!may_end(&mut home), "it is what the machine comes to");
    home.expect_return(NOW, &key("web1"), false);
    assert!(may_end(&mut home));
}

#[test]
fn a_tunnel_that_a_new_gateway_takes_up_ends_when_the_earlier_one_would_have_ended_it() {
    const HOUR: Duration = Duration::from_secs(3600);
    let mut home = Datapath::new(DatapathConfig::default());
    home.begin_hold(&key("web1"), &site("b"), &[HOME.into()]).unwrap();
    home.attract_again(NOW, &key("web1"), &[], 23 * HOUR).unwrap();
    home.set_names_expire_at(&key("web1"), NOW).unwrap();
    let status = home.handle_status(NOW).remove(0);
    assert_eq!((status.may_end, status.unneeded_for), (false, Some(23 * HOUR)));
    assert!(home.handle_status(NOW + HOUR)[0].may_end);
    // Tried once more, as after a bridge that was made later, it does not begin once more.
    home.attract_again(NOW + HOUR, &key("web1"), &[], Duration::ZERO).unwrap();
    assert!(home.handle_status(NOW + HOUR)[0].may_end);
}

/// web1 and web2 of home a are at b, and each may take 8 Mbit/s.
fn two_with_a_share() -> [Datapath; 2] {
    let config = DatapathConfig {
        share: ShareLimit { rate: Rate::mbit(8), burst_bytes: 65_536 },
        ..DatapathConfig::default()
    };
    let [mut a, mut b] = [(); 2].map(|()| Datapath::new(config.clone()));
    for (machine, address) in [("web1", HOME), ("web2", OTHER_HOME)] {
        a.begin_hold(&key(machine), &site("b"), &[address.into()]).unwrap();
        a.attract(Duration::ZERO, &key(machine), &[]).unwrap();
        b.visit(&key(machine), &[route(address, "a")]).unwrap();
        b.resumed(Duration::ZERO, &key(machine)).unwrap();
    }
    assert!(a.poll_kept(Duration::ZERO, &[]).is_none() && b.poll_kept(Duration::ZERO, &[]).is_none());
    [a, b]
}

const OTHER_HOME: [u8; 4] = [198, 51, 100, 11];

/// A second of a flood of one machine beside 1 Mbit/s of the other: bytes of each that travel.
fn flood(mut travels: impl FnMut(Duration, [u8; 4]) -> bool) -> [u64; 2] {
    let mut bytes = [0; 2];
    for tenth_ms in 0..10_000_u64 {
        let now = Duration::from_micros(tenth_ms * 100);
        // 80 Mbit/s of 1000 bytes each.
        bytes[0] += 1000 * u64::from(travels(now, HOME));
        if tenth_ms % 80 == 0 {
            bytes[1] += 1000 * u64::from(travels(now, OTHER_HOME));
        }
    }
    bytes
}

fn large(from: [u8; 4], to: [u8; 4]) -> Bytes {
    let mut segment = tcp(80, 80, 0x10);
    segment.resize(980, 0);
    ipv4(from, to, 6, &segment).into()
}

#[test]
fn a_machine_that_floods_the_tunnel_takes_nothing_of_anothers_in_either_direction() {
    let [mut a, mut b] = two_with_a_share();
    let (to_b, from_a) = (a.peer_slot(&site("b")), b.peer_slot(&site("a")));
    let all_of_web2 = 1000 * (10_000_u64.div_ceil(80));
    let share = 1_000_000 + 65_536;
    let clients = flood(|now, guest| a.handle_packet(now, large(CLIENT, guest)).is_some());
    let guests = flood(|now, guest| b.handle_packet(now, large(guest, CLIENT)).is_some());
    // The same at the other ends, where a peer does not keep to it.
    let mut free = Datapath::new(DatapathConfig::default());
    let to_any = free.peer_slot(&site("any"));
    let mut through = |ours: &mut Datapath, peer: PeerSlot, now: Duration, packet: &Bytes| {
        for datagram in free.split(now, to_any, packet, 1400).unwrap().collect::<Vec<_>>() {
            ours.handle_datagram(now, peer, datagram);
        }
        ours.poll_packet(now, peer).is_some()
    };
    let [mut a_in, mut b_in] = two_with_a_share();
    let (b_at_a, a_at_b) = (a_in.peer_slot(&site("b")), b_in.peer_slot(&site("a")));
    assert_eq!((b_at_a, a_at_b), (to_b, from_a));
    let arriving = flood(|now, guest| through(&mut b_in, a_at_b, now, &large(CLIENT, guest)));
    let returning = flood(|now, guest| through(&mut a_in, b_at_a, now, &large(guest, CLIENT)));
    for [flooding, other] in [clients, guests, arriving, returning] {
        assert_eq!(other, all_of_web2);
        assert!((1_000_000..=share).contains(&flooding), "{flooding}");
    }
    let dropped = a.counters().dropped[&DropReason::OverShare];
    let statuses = a.handle_status(Duration::from_secs(1));
    let over: Vec<u64> = statuses.iter().map(|port| port.over_share).collect();
    assert_eq!(over, [dropped, 0], "it is told whose they were");
}
