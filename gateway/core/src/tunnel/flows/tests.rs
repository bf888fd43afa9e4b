//! What the table decides, one rule at a time, and that its parts agree.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::packet::tests::{ipv4, tcp};
use super::super::packet::{TCP, UDP};
use super::*;

const GUEST: [u8; 4] = [198, 51, 100, 10];
const CLIENT: [u8; 4] = [192, 0, 2, 1];
const FIN_ACK: u8 = 0x11;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

fn at(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn tuple(port: u16) -> FlowTuple {
    FlowTuple { protocol: TCP, local: GUEST.into(), local_port: 80, remote: CLIENT.into(), remote_port: port }
}

/// A minute of quiet, so that the other times show.
fn config() -> FlowConfig {
    FlowConfig { quiet: at(60), ..FlowConfig::default() }
}

fn table() -> FlowTable {
    let mut table = FlowTable::new(config(), at(0));
    table.set_names_expire_at(at(30));
    table
}

fn from_remote(table: &mut FlowTable, now: u64, port: u16, flags: u8) {
    let bytes = ipv4(CLIENT, GUEST, TCP, &tcp(port, 80, flags));
    table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Remote);
}

fn from_guest(table: &mut FlowTable, now: u64, port: u16, flags: u8) {
    let bytes = ipv4(GUEST, CLIENT, TCP, &tcp(80, port, flags));
    table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Guest);
}

#[test]
fn a_tunnel_without_flows_ends_when_names_have_expired_and_it_was_quiet() {
    let mut table = table();
    assert!(!table.may_end(at(59)));
    assert!(table.may_end(at(60)));
    table.set_names_expire_at(at(90));
    assert!(!table.may_end(at(89)));
    assert!(table.may_end(at(90)));
}

#[test]
fn a_tunnel_whose_names_are_not_known_to_expire_does_not_end() {
    let mut table = FlowTable::new(FlowConfig::default(), at(0));
    assert!(!table.may_end(at(1_000_000)));
}

#[test]
fn a_seeded_connection_holds_the_tunnel_until_both_have_said_fin() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    from_remote(&mut table, 100, 1000, FIN_ACK);
    assert!(!table.may_end(at(200)));
    from_guest(&mut table, 201, 1000, FIN_ACK);
    assert_eq!(table.alive(), 0);
    assert!(!table.may_end(at(203)), "the last acknowledgement still has to pass");
    from_remote(&mut table, 203, 1000, ACK);
    assert!(table.may_end(at(206)));
}

#[test]
fn a_segment_that_comes_late_does_not_open_a_closed_connection_again() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    from_remote(&mut table, 100, 1000, FIN_ACK);
    from_guest(&mut table, 101, 1000, FIN_ACK);
    assert!(table.may_end(at(104)));
    from_remote(&mut table, 110, 1000, ACK);
    assert_eq!(table.alive(), 0);
    assert!(!table.may_end(at(112)), "it is let pass");
    assert!(table.may_end(at(113)));
    from_remote(&mut table, 120, 1000, SYN);
    assert_eq!(table.alive(), 1, "the same ports, a new connection");
}

#[test]
fn connections_that_are_only_remembered_make_room_for_new_ones() {
    let mut table = FlowTable::new(FlowConfig { max_flows: 16, ..config() }, at(0));
    table.set_names_expire_at(at(0));
    for port in 1000..1100 {
        from_remote(&mut table, 100, port, SYN);
        from_remote(&mut table, 100, port, RST);
    }
    assert!(table.len() <= 16);
    assert!(table.may_end(at(160)), "none of them was too many to be tracked");
}

#[test]
fn a_connection_that_one_end_has_closed_holds_the_tunnel_for_minutes_and_not_for_hours() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    from_remote(&mut table, 100, 1000, FIN_ACK);
    from_guest(&mut table, 200, 1000, ACK);
    assert!(!table.may_end(at(439)), "it may still send");
    assert!(table.may_end(at(440)));
}

#[test]
fn a_reset_closes_and_a_stray_reset_opens_nothing() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    from_remote(&mut table, 1, 1000, RST);
    from_remote(&mut table, 1, 2000, RST);
    assert_eq!(table.alive(), 0);
    assert!(table.may_end(at(60)));
}

#[test]
fn an_idle_connection_lives_two_hours_and_four_minutes() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    assert!(!table.may_end(at(7439)));
    from_guest(&mut table, 7439, 1000, ACK);
    assert!(!table.may_end(at(7440 + 7438)));
    assert!(table.may_end(at(7439 + 7440)));
}

#[test]
fn a_new_connection_to_the_home_address_restarts_the_quiet_time() {
    let mut table = table();
    from_remote(&mut table, 48, 1000, SYN);
    from_guest(&mut table, 49, 1000, SYN | ACK);
    from_remote(&mut table, 50, 1000, ACK);
    from_guest(&mut table, 51, 1000, ACK);
    from_remote(&mut table, 52, 1000, RST);
    assert!(!table.may_end(at(109)));
    assert!(table.may_end(at(110)));
}

#[test]
fn a_gateway_that_begins_anew_waits_for_what_is_left_of_the_quiet_time() {
    const HOUR: u64 = 3600;
    let anew = |quiet_h| {
        let mut table = FlowTable::continued(FlowConfig::default(), at(7), at(quiet_h * HOUR));
        table.set_names_expire_at(at(0));
        table
    };
    let mut table = anew(23);
    assert_eq!(table.held_by(at(7)).quiet_left, at(HOUR));
    assert!(!table.may_end(at(7 + HOUR - 1)) && table.may_end(at(7 + HOUR)));
    assert!(anew(25).may_end(at(7)));

    let mut table = anew(23);
    from_guest(&mut table, 100, 1000, SYN);
    from_guest(&mut table, 100, 1000, RST);
    assert!(!table.may_end(at(100 + 24 * HOUR - 1)), "somebody new has come");
    assert!(table.may_end(at(100 + 24 * HOUR)));
}

#[test]
fn the_address_was_needed_when_a_flow_that_the_source_did_not_see_was_last_in_use() {
    let mut table = FlowTable::continued(config(), at(5), at(10));
    table.seed(at(30), &[tuple(1000)]);
    from_remote(&mut table, 31, 1000, ACK);
    from_guest(&mut table, 31, 1000, ACK);
    assert_eq!(table.unneeded_for(at(35)), at(40), "it is known without this table");
    for port in 2000..2100 {
        from_remote(&mut table, 36, port, SYN);
    }
    from_guest(&mut table, 36, 2000, SYN | ACK);
    assert_eq!(table.unneeded_for(at(40)), at(45), "whoever knocks needs nothing");
    from_remote(&mut table, 41, 2000, ACK);
    assert_eq!(table.unneeded_for(at(50)), at(9));
    from_guest(&mut table, 60, 2000, ACK);
    assert_eq!(table.unneeded_for(at(70)), at(10));
    from_remote(&mut table, 80, 2000, RST);
    assert_eq!(table.unneeded_for(at(90)), at(30), "it is over");
    // A connection of before that was opened while the earlier gateway had the tunnel.
    from_remote(&mut table, 100, 3000, ACK);
    assert_eq!(table.unneeded_for(at(110)), at(50));
    from_guest(&mut table, 120, 3000, ACK);
    assert_eq!(table.unneeded_for(at(121)), at(1));
}

#[test]
fn whoever_knocks_and_is_not_let_in_restarts_nothing() {
    let mut table = table();
    from_remote(&mut table, 50, 1000, SYN);
    from_guest(&mut table, 50, 1000, RST | ACK);
    from_remote(&mut table, 51, 1001, SYN);
    from_guest(&mut table, 51, 1001, SYN | ACK);
    from_udp(&mut table, 52, 1002);
    let held = table.held_by(at(55));
    assert_eq!((held.quiet_left, held.flows.tcp_opening, held.flows.udp), (at(5), 1, 1));
    from_guest(&mut table, 56, 1001, SYN | ACK);
    assert_eq!(table.held_by(at(56)).quiet_left, at(4), "nobody has acknowledged that");
}

#[test]
fn what_the_guest_asks_of_its_home_restarts_the_quiet_time() {
    let mut table = table();
    from_guest(&mut table, 50, 1000, SYN);
    assert_eq!(table.held_by(at(50)).quiet_left, at(60));
    from_guest(&mut table, 60, 1000, RST);
    from_guest(&mut table, 70, 1000, SYN);
    assert_eq!(table.held_by(at(70)).quiet_left, at(60));
    let bytes = ipv4(GUEST, CLIENT, UDP, &tcp(53, 53, 0));
    table.handle_packet(at(80), &Packet::parse(&bytes).unwrap(), Side::Guest);
    assert_eq!(table.held_by(at(80)).quiet_left, at(60));
}

#[test]
fn a_reset_whose_sender_goes_on_was_none() {
    let mut table = table();
    table.seed(at(0), &[tuple(1000)]);
    for (sender, other) in [(Side::Remote, Side::Guest), (Side::Guest, Side::Remote)] {
        let mut pass = |now, sender, flags| match sender {
            Side::Remote => from_remote(&mut table, now, 1000, flags),
            Side::Guest => from_guest(&mut table, now, 1000, flags),
        };
        pass(1, sender, RST);
        pass(2, other, ACK);
        pass(2, other, FIN_ACK);
        pass(3, sender, RST | ACK);
        assert_eq!(table.alive(), 0, "what was on its way proves nothing");
        let mut pass = |now, sender, flags| match sender {
            Side::Remote => from_remote(&mut table, now, 1000, flags),
            Side::Guest => from_guest(&mut table, now, 1000, flags),
        };
        pass(4, sender, ACK);
        assert_eq!(table.held_by(at(4)).flows.tcp_open, 1);
    }
    let entry = table.list(at(5), FlowCursor::default(), 10).flows.remove(0);
    assert_eq!((entry.origin, entry.age), (FlowOrigin::Seeded, at(5)), "it is the same connection");
    assert!(!table.may_end(at(7443)) && table.may_end(at(7444)));
}

#[test]
fn an_unanswered_attempt_is_forgotten_after_a_minute() {
    let mut table = table();
    from_remote(&mut table, 0, 1000, SYN);
    assert_eq!(table.alive(), 1);
    assert!(table.may_end(at(60)));
}

#[test]
fn a_port_used_again_is_alive_again() {
    let mut table = table();
    from_remote(&mut table, 1, 1000, SYN);
    from_remote(&mut table, 2, 1000, RST);
    from_remote(&mut table, 3, 1000, SYN);
    from_guest(&mut table, 3, 1000, SYN | ACK);
    from_remote(&mut table, 3, 1000, ACK);
    assert_eq!(table.alive(), 1);
    assert!(!table.may_end(at(1000)));
}

#[test]
fn pings_do_not_hold_the_tunnel() {
    let mut table = table();
    let bytes = ipv4(CLIENT, GUEST, ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]);
    table.handle_packet(at(59), &Packet::parse(&bytes).unwrap(), Side::Remote);
    assert!(table.may_end(at(60)));
}

#[test]
fn flows_beyond_the_limit_keep_the_tunnel_instead_of_being_cut() {
    let mut table = FlowTable::new(FlowConfig { max_flows: 2, ..config() }, at(0));
    table.set_names_expire_at(at(0));
    table.seed(at(0), &[tuple(1), tuple(2), tuple(3)]);
    assert_eq!(table.alive(), 2);
    from_remote(&mut table, 1, 1, RST);
    from_remote(&mut table, 1, 2, RST);
    assert!(!table.may_end(at(7439)));
    assert!(table.may_end(at(7440)));
}

#[test]
fn the_operators_limit_ends_it_whatever_is_left() {
    let config = FlowConfig { limit: Some(at(3600)), ..config() };
    let mut table = FlowTable::new(config, at(0));
    table.seed(at(0), &[tuple(1)]);
    assert!(!table.may_end(at(3599)));
    assert!(table.may_end(at(3600)));
}

fn from_udp(table: &mut FlowTable, now: u64, port: u16) {
    let bytes = ipv4(CLIENT, GUEST, UDP, &tcp(port, 53, 0));
    table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Remote);
}

#[test]
fn an_answer_to_an_attempt_does_not_make_it_a_connection() {
    let mut table = table();
    from_remote(&mut table, 0, 1000, SYN);
    from_guest(&mut table, 0, 1000, SYN | ACK);
    from_guest(&mut table, 15, 1000, SYN | ACK);
    assert_eq!(table.held_by(at(15)).flows.tcp_opening, 1);
    assert!(table.may_end(at(75)), "its sender does not exist");
}

#[test]
fn an_answer_whose_question_was_before_the_move_is_an_attempt() {
    let mut table = table();
    from_guest(&mut table, 1, 1000, SYN | ACK);
    assert_eq!(table.held_by(at(1)).flows.tcp_opening, 1);
    from_remote(&mut table, 2, 1000, ACK);
    assert_eq!(table.held_by(at(2)).flows.tcp_open, 1);
}

#[test]
fn a_client_that_uses_its_port_again_is_new() {
    let mut table = table();
    from_remote(&mut table, 1, 1000, SYN);
    from_remote(&mut table, 2, 1000, RST);
    from_remote(&mut table, 49, 1000, SYN);
    from_remote(&mut table, 50, 1000, SYN);
    from_guest(&mut table, 51, 1000, SYN | ACK);
    from_remote(&mut table, 52, 1000, ACK);
    assert_eq!(table.held_by(at(52)).quiet_left, at(60));
    let entry = table.list(at(55), FlowCursor::default(), 10).flows.remove(0);
    assert_eq!((entry.age, entry.to_guest.packets), (at(6), 3));
}

#[test]
fn a_flow_that_was_due_is_another_when_it_comes_back() {
    let mut table = table();
    let answer = |table: &mut FlowTable, now| {
        let bytes = ipv4(GUEST, CLIENT, UDP, &tcp(53, 1000, 0));
        table.handle_packet(at(now), &Packet::parse(&bytes).unwrap(), Side::Guest);
    };
    from_udp(&mut table, 0, 1000);
    answer(&mut table, 0);
    from_udp(&mut table, 299, 1000);
    answer(&mut table, 299);
    assert_eq!(table.held_by(at(299)).quiet_left, Duration::ZERO, "the same flow is not new");
    from_udp(&mut table, 599, 1000);
    answer(&mut table, 599);
    assert_eq!(table.held_by(at(599)).quiet_left, at(60), "nobody had to forget it first");
}

#[test]
fn a_clock_that_steps_back_stands_still() {
    let mut table = table();
    from_remote(&mut table, 100, 1000, SYN);
    from_remote(&mut table, 50, 2000, SYN);
    table.store.check();
    assert_eq!(table.held_by(at(10)).flows.tcp_opening, 2);
    assert!(table.may_end(at(160)));
}

#[test]
fn the_operator_changes_the_limit_while_the_tunnel_is_held() {
    let mut table = table();
    table.seed(at(0), &[tuple(1)]);
    table.set_limit(Some(at(100)));
    assert_eq!(table.held_by(at(40)).limit_left, Some(at(60)));
    table.set_limit(Some(at(200)));
    assert!(!table.may_end(at(199)));
    table.set_limit(None);
    assert!(!table.may_end(at(300)));
    table.set_limit(Some(at(299)));
    assert!(table.may_end(at(300)), "a limit that has passed ends it at once");
}

#[test]
fn the_operator_ends_a_tunnel_that_is_held_by_everything() {
    let mut table = FlowTable::new(FlowConfig::default(), at(0));
    table.seed(at(0), &[tuple(1)]);
    assert!(!table.may_end(at(1)));
    table.release();
    table.set_limit(None);
    assert!(table.may_end(at(1)));
    assert!(table.held_by(at(1)).released);
}

#[test]
fn what_holds_the_tunnel_is_shown_by_kind() {
    let mut table = FlowTable::new(FlowConfig { max_flows: 5, ..config() }, at(0));
    table.seed(at(0), &[tuple(1), tuple(2)]);
    from_remote(&mut table, 10, 2, FIN_ACK);
    from_remote(&mut table, 20, 3, SYN);
    from_udp(&mut table, 30, 4);
    table.seed(at(30), &[FlowTuple { protocol: 132, ..tuple(0) }]);
    let held = table.held_by(at(40));
    let expected = FlowCounts { tcp_opening: 1, tcp_open: 1, tcp_closing: 1, udp: 1, other: 1, closed: 0 };
    assert_eq!((held.flows, held.names_left, held.quiet_left), (expected, None, at(20)));
    from_remote(&mut table, 41, 1, RST);
    table.set_names_expire_at(at(100));
    let held = table.held_by(at(42));
    assert_eq!((held.flows.closed, held.linger_left, held.names_left), (1, at(2), Some(at(58))));
    assert_eq!((held.untracked_left, held.limit_left), (Duration::ZERO, None));
}

#[test]
fn a_flow_is_shown_with_what_it_carried() {
    let mut table = table();
    table.seed(at(5), &[tuple(1)]);
    from_remote(&mut table, 10, 1, ACK);
    from_guest(&mut table, 11, 1, ACK);
    from_guest(&mut table, 12, 1, FIN_ACK);
    let page = table.list(at(15), FlowCursor::default(), 10);
    let traffic = |packets| Traffic { packets, bytes: packets * 40 };
    let expected = FlowEntry {
        tuple: tuple(1),
        state: FlowState::Closing,
        origin: FlowOrigin::Seeded,
        age: at(10),
        idle: at(3),
        idle_left: at(237),
        to_guest: traffic(1),
        from_guest: traffic(2),
        heard_only: None,
    };
    assert_eq!(page, FlowPage { flows: vec![expected], next: None });
}

#[test]
fn it_is_shown_whether_a_flow_is_older_than_the_move() {
    let mut table = table();
    table.seed(at(0), &[tuple(1)]);
    from_remote(&mut table, 1, 1, ACK);
    from_remote(&mut table, 1, 2, ACK);
    from_remote(&mut table, 1, 3, SYN);
    from_remote(&mut table, 2, 3, ACK);
    from_udp(&mut table, 2, 4);
    let origins = table.list(at(2), FlowCursor::default(), 10).flows.into_iter().map(|flow| flow.origin);
    let expected = [FlowOrigin::Seeded, FlowOrigin::Underway, FlowOrigin::New, FlowOrigin::New];
    assert_eq!(origins.collect::<Vec<_>>(), expected);
}

#[test]
fn the_longest_idle_are_shown_first() {
    let mut table = table();
    table.seed(at(0), &[tuple(1), tuple(2)]);
    from_udp(&mut table, 10, 3);
    from_remote(&mut table, 20, 1, ACK);
    from_remote(&mut table, 30, 4, SYN);
    let ports = |table: &FlowTable, now, limit| {
        let flows = table.longest_idle(at(now), limit).into_iter();
        flows.map(|flow| flow.tuple.remote_port).collect::<Vec<_>>()
    };
    assert_eq!(ports(&table, 31, 10), [2, 3, 1, 4]);
    assert_eq!(ports(&table, 31, 2), [2, 3]);
    assert_eq!(ports(&table, 310, 10), [2, 1], "due ones are not shown, forgotten or not");
}

#[test]
fn a_closed_connection_makes_room_before_an_attempt_and_an_attempt_before_nothing() {
    let mut table = FlowTable::new(FlowConfig { max_flows: 3, ..config() }, at(0));
    table.seed(at(0), &[tuple(1)]);
    from_remote(&mut table, 1, 2, SYN);
    from_remote(&mut table, 2, 3, SYN);
    from_remote(&mut table, 3, 3, RST);
    from_remote(&mut table, 4, 4, SYN);
    let held = table.held_by(at(4));
    assert_eq!((held.flows.tcp_open, held.flows.tcp_opening, held.flows.closed), (1, 2, 0));
    assert_eq!(held.untracked_left, Duration::ZERO);
    from_remote(&mut table, 5, 5, SYN);
    assert_eq!(table.held_by(at(5)).untracked_left, at(56), "the attempt of second 1 may yet be taken up");
    assert_eq!(table.pressure(), FlowPressure { recycled: 2, untracked: 0 });
    from_remote(&mut table, 6, 4, ACK);
    from_remote(&mut table, 6, 5, ACK);
    from_remote(&mut table, 7, 6, ACK);
    assert_eq!(table.held_by(at(7)).flows.tcp_open, 3, "connections in use never make room");
    assert_eq!(table.held_by(at(7)).untracked_left, at(7440));
    assert_eq!(table.pressure(), FlowPressure { recycled: 2, untracked: 1 });
}

/// Patches a packet's client: the cheap way to many of them.
fn client(bytes: &mut [u8], sender: Side, nth: u64) {
    let (address, port) = match sender {
        Side::Remote => (12..16, 20..22),
        Side::Guest => (16..20, 22..24),
    };
    bytes[address].copy_from_slice(&[10, 0, 0, (nth >> 16) as u8]);
    bytes[port].copy_from_slice(&(nth as u16).to_be_bytes());
}

/// 200 connections a second for two hours, each of five packets in twenty seconds and with ports of its own, beside
/// 50,000 old ones that are not over.
#[test]
fn short_connections_at_the_old_address_do_not_fill_the_table() {
    const RATE: u64 = 200;
    const SECONDS: u64 = 7200;
    let seeds: Vec<_> = (0..50_000).map(tuple).collect();
    let mut table = FlowTable::new(config(), at(0));
    table.seed(at(0), &seeds);
    let mut packets = [(0, SYN), (1, ACK), (19, FIN_ACK), (20, ACK)]
        .map(|(age, flags)| (age, Side::Remote, ipv4(CLIENT, GUEST, TCP, &tcp(0, 80, flags))))
        .to_vec();
    packets.insert(3, (19, Side::Guest, ipv4(GUEST, CLIENT, TCP, &tcp(80, 0, FIN_ACK))));
    let mut fullest = 0;
    for second in 1..=SECONDS {
        for nth in (second * RATE..).take(RATE as usize) {
            for (age, sender, bytes) in &mut packets {
                let Some(nth) = nth.checked_sub(*age * RATE) else { continue };
                client(bytes, *sender, nth);
                table.handle_packet(at(second), &Packet::parse(bytes).unwrap(), *sender);
            }
        }
        fullest = fullest.max(table.len());
    }
    assert_eq!(fullest, 65_536, "remembered connections take what room is left");
    assert_eq!(table.pressure().untracked, 0);
    assert!(table.pressure().recycled > 0);
    let flows = table.held_by(at(SECONDS)).flows;
    assert_eq!(flows.tcp_open, 50_000 + RATE * 18, "all old ones, and those that have not closed yet");
    assert_eq!(flows.tcp_opening, RATE);
}

proptest! {
    #[test]
    fn queues_buckets_and_flows_stay_in_step(
        steps in prop::collection::vec((0u64..50, 0u16..6, any::<u8>(), any::<bool>()), 0..300),
        hash_key in any::<[u64; 2]>(),
    ) {
        let hash_key = HashKey(hash_key);
        let config = FlowConfig { max_flows: 4, tcp_idle: at(40), tcp_opening: at(5), tcp_closing: at(20), expire_batch: 2, hash_key, ..config() };
        let mut table = FlowTable::new(config, at(0));
        let mut now = 0;
        for (pause, port, flags, remote) in steps {
            now += pause;
            if remote { from_remote(&mut table, now, port, flags) } else { from_guest(&mut table, now, port, flags) }
            table.store.check();
            while table.expire(at(now)) {
                table.store.check();
            }
            prop_assert!(table.len() <= 4);
            let held = table.held_by(at(now)).flows;
            prop_assert_eq!((held.alive() + held.closed) as usize, table.len());
        }
    }

    #[test]
    fn it_decides_like_a_plain_list_of_flows_and_whenever_it_forgets(
        steps in prop::collection::vec((0u64..50, 0u16..6, any::<u8>(), any::<bool>(), any::<bool>()), 0..200),
    ) {
        let config = FlowConfig { tcp_idle: at(200), tcp_opening: at(5), tcp_closing: at(20), expire_batch: 1, ..config() };
        let mut table = FlowTable::new(config.clone(), at(0));
        table.set_names_expire_at(at(0));
        let mut plain = BTreeMap::<u16, (State, u64)>::new();
        // Whether it began after the move, and who has spoken.
        let mut spoke = BTreeMap::<u16, (bool, [bool; 2])>::new();
        let (mut now, mut last_new, mut last_closed) = (0, 0, None);
        for (pause, port, flags, remote, expires) in steps {
            now += pause;
            let idle = |state| idle_time(&config, class(TCP, state)).as_secs();
            plain.retain(|_, (state, seen)| now < *seen + idle(*state));
            let sender = if remote { Side::Remote } else { Side::Guest };
            let old = plain.get(&port).map(|(state, _)| *state);
            let state = old.map_or_else(
                || State::first(Some(TcpFlags(flags)), sender),
                |state| Some(state.next(Some(TcpFlags(flags)), sender)),
            );
            if let Some(state) = state {
                plain.insert(port, (state, now));
                last_closed = if state.is_over() { Some(now) } else { last_closed };
                let begins = old.is_none_or(|old| old.is_over()) && TcpFlags(flags).opens();
                if old.is_none() || begins {
                    spoke.insert(port, (TcpFlags(flags).syn(), [false; 2]));
                }
                let (is_new, both) = spoke.entry(port).or_default();
                let is_open = |state| matches!(state, State::Open { .. });
                let was_taken_up = *both == [true; 2] && old.is_some_and(is_open);
                both[usize::from(remote)] = true;
                let taken_up = *is_new && *both == [true; 2] && is_open(state) && !was_taken_up;
                last_new = if taken_up || (begins && !remote) { now } else { last_new };
            }
            if remote { from_remote(&mut table, now, port, flags) } else { from_guest(&mut table, now, port, flags) }
            if expires {
                table.expire(at(now));
            }
            for later in [now, now + 3, now + 60, now + 300] {
                let mut alive = plain.values().filter(|(state, _)| !state.is_over());
                let held = alive.any(|(state, seen)| later < seen + idle(*state))
                    || last_closed.is_some_and(|at| later < at + 3)
                    || later < last_new + 60;
                prop_assert_eq!(table.held_by(at(later)).may_end(), !held);
            }
        }
    }
}
