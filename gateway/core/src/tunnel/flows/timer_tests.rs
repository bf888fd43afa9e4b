//! Every default time of the table just before it is over and at it, in virtual time; and what a million flows cost.

use super::super::packet::tests::{ipv4, tcp};
use super::super::packet::{TCP, UDP};
use super::*;

const GUEST: [u8; 4] = [198, 51, 100, 10];
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Later than any hand-over of a test, by more than the quiet time.
const START: Duration = Duration::from_secs(1000 * 3600);
const STEP: Duration = Duration::from_nanos(1);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const FIN_ACK: u8 = 0x11;
const RST: u8 = 0x04;

fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

/// A table with the defaults that nothing but flows, and no quiet time after them, holds any more at `START`.
fn table() -> FlowTable {
    held_by_flows(FlowConfig { quiet: Duration::ZERO, ..FlowConfig::default() })
}

fn held_by_flows(config: FlowConfig) -> FlowTable {
    let mut table = FlowTable::new(config, START - 30 * DAY);
    table.set_names_expire_at(START - DAY);
    assert!(table.may_end(START));
    table
}

fn tuple(nth: u32) -> FlowTuple {
    let [a, b, c, d] = nth.to_be_bytes();
    FlowTuple {
        protocol: TCP,
        local: GUEST.into(),
        local_port: 80,
        remote: [10, a, b, c].into(),
        remote_port: 1000 + u16::from(d),
    }
}

fn packet(protocol: u8, nth: u32, sender: Side, flags: u8) -> Vec<u8> {
    let [a, b, c, d] = nth.to_be_bytes();
    let port = 1000 + u16::from(d);
    match sender {
        Side::Remote => ipv4([10, a, b, c], GUEST, protocol, &tcp(port, 80, flags)),
        Side::Guest => ipv4(GUEST, [10, a, b, c], protocol, &tcp(80, port, flags)),
    }
}

fn pass(table: &mut FlowTable, now: Duration, protocol: u8, sender: Side, flags: u8) {
    let bytes = packet(protocol, 0, sender, flags);
    table.handle_packet(now, &Packet::parse(&bytes).unwrap(), sender);
}

/// The tunnel is held until `idle` after `since` and no longer, by itself and by what it says of itself.
fn ends_after(table: &mut FlowTable, since: Duration, idle: Duration) {
    let before = since + idle - STEP;
    assert!(!table.may_end(before) && !table.held_by(before).may_end());
    assert!(table.held_by(since + idle).may_end() && table.may_end(since + idle));
}

#[test]
fn an_idle_tcp_connection_is_held_for_two_hours_and_four_minutes() {
    let mut table = table();
    table.seed(START, &[tuple(0)]);
    let last = START + minutes(123);
    pass(&mut table, last, TCP, Side::Guest, ACK);
    ends_after(&mut table, last, 2 * HOUR + minutes(4));
}

#[test]
fn an_attempt_that_is_not_taken_up_is_held_for_a_minute() {
    let mut table = table();
    pass(&mut table, START, TCP, Side::Guest, SYN);
    ends_after(&mut table, START, minutes(1));
}

#[test]
fn a_half_closed_tcp_connection_is_held_for_four_minutes() {
    let mut table = table();
    table.seed(START, &[tuple(0)]);
    pass(&mut table, START, TCP, Side::Remote, FIN_ACK);
    ends_after(&mut table, START, minutes(4));
}

#[test]
fn an_idle_udp_flow_is_held_for_five_minutes() {
    let mut table = table();
    pass(&mut table, START, UDP, Side::Guest, 0);
    pass(&mut table, START + minutes(4), UDP, Side::Remote, 0);
    ends_after(&mut table, START + minutes(4), minutes(5));
}

#[test]
fn other_protocols_are_held_for_half_an_hour() {
    const ESP: u8 = 50;
    let mut table = table();
    pass(&mut table, START, ESP, Side::Guest, 0);
    pass(&mut table, START + minutes(29), ESP, Side::Remote, 0);
    ends_after(&mut table, START + minutes(29), minutes(30));
}

#[test]
fn a_closed_connection_is_waited_for_three_seconds() {
    let mut table = table();
    table.seed(START, &[tuple(0)]);
    pass(&mut table, START, TCP, Side::Guest, RST);
    ends_after(&mut table, START, Duration::from_secs(3));
}

#[test]
fn a_closed_connection_is_remembered_for_two_minutes() {
    for (late, open) in [(minutes(2) - STEP, 0), (minutes(2), 1)] {
        let mut table = table();
        table.seed(START, &[tuple(0)]);
        pass(&mut table, START, TCP, Side::Guest, RST);
        pass(&mut table, START + late, TCP, Side::Remote, ACK);
        assert_eq!(table.held_by(START + late).flows.tcp_open, open);
    }
}

#[test]
fn a_new_flow_to_the_home_address_is_followed_by_a_day_of_quiet() {
    let mut table = held_by_flows(FlowConfig::default());
    pass(&mut table, START - STEP, UDP, Side::Remote, 0);
    pass(&mut table, START, UDP, Side::Guest, 0);
    assert_eq!(table.held_by(START + HOUR).quiet_left, 23 * HOUR);
    ends_after(&mut table, START, DAY);
}

#[test]
fn a_tunnel_that_nobody_ever_uses_is_held_for_a_day() {
    let mut table = FlowTable::new(FlowConfig::default(), START);
    table.set_names_expire_at(START + minutes(5));
    ends_after(&mut table, START, DAY);
}

#[test]
fn a_tunnel_whose_names_live_longer_than_all_else_is_held_until_they_are_forgotten() {
    let mut table = FlowTable::new(FlowConfig::default(), START);
    table.set_names_expire_at(START + 7 * DAY);
    ends_after(&mut table, START, 7 * DAY);
}

#[test]
fn a_connection_that_never_stops_is_held_for_a_month_and_as_long_as_it_speaks() {
    let mut table = table();
    table.seed(START, &[tuple(0)]);
    let mut now = START;
    while now < START + 30 * DAY {
        now += 2 * HOUR + minutes(4) - STEP;
        assert!(!table.may_end(now));
        pass(&mut table, now, TCP, Side::Remote, ACK);
    }
    ends_after(&mut table, now, 2 * HOUR + minutes(4));
}

#[test]
fn a_limit_of_three_days_ends_what_would_go_on() {
    let mut table = FlowTable::new(FlowConfig { limit: Some(3 * DAY), ..FlowConfig::default() }, START);
    for hours in 0..72 {
        pass(&mut table, START + hours * HOUR, TCP, Side::Remote, ACK);
    }
    ends_after(&mut table, START, 3 * DAY);
}

#[test]
fn flows_without_room_hold_the_tunnel_as_long_as_if_they_were_known() {
    let mut table = FlowTable::new(FlowConfig { max_flows: 0, ..FlowConfig::default() }, START - 30 * DAY);
    table.set_names_expire_at(START);
    pass(&mut table, START, TCP, Side::Remote, ACK);
    ends_after(&mut table, START, 2 * HOUR + minutes(4));
}

fn filled(flows: u32, now: Duration) -> FlowTable {
    let config = FlowConfig { max_flows: flows as usize, ..FlowConfig::default() };
    let mut table = FlowTable::new(config, now);
    for nth in 0..flows {
        table.seed(now, &[tuple(nth)]);
    }
    assert_eq!(table.pressure(), FlowPressure::default());
    table
}

#[test]
fn a_million_flows_have_room_in_200_bytes_each_and_one_more_has_none() {
    let mut table = filled(1_000_000, START);
    assert_eq!(table.len(), 1_000_000);
    let bytes = table.store.bytes() + size_of::<FlowTable>();
    assert!(bytes <= 200 * 1_000_000, "{bytes} bytes");
    table.seed(START, &[tuple(1_000_000)]);
    assert_eq!(table.pressure(), FlowPressure { recycled: 0, untracked: 1 });
}

#[test]
fn a_packet_touches_as_few_flows_among_a_hundred_thousand_as_among_a_thousand() {
    let touched = |flows: u32| {
        let mut table = filled(flows, START);
        let before = table.store.touched.get();
        for nth in (0..flows).step_by(flows as usize / 1000) {
            let bytes = packet(TCP, nth, Side::Remote, ACK);
            table.handle_packet(START + HOUR, &Packet::parse(&bytes).unwrap(), Side::Remote);
        }
        table.store.touched.get() - before
    };
    // Find, look, change, take out of the queue, put at its end: and half a neighbour in the bucket.
    let (few, many) = (touched(1000), touched(100_000));
    assert!(few <= 14_000, "{few}");
    assert!(many <= 14_000, "{many}");
}

#[test]
fn forgetting_touches_what_is_due_and_its_neighbours_and_nothing_else() {
    let mut table = filled(100_000, START);
    let touched = |table: &FlowTable, since: u64| table.store.touched.get() - since;
    let before = table.store.touched.get();
    assert!(!table.expire(START + minutes(124) - STEP));
    assert!(touched(&table, before) <= 6, "the oldest of each class");
    for nth in 10..100_000 {
        let bytes = packet(TCP, nth, Side::Guest, ACK);
        table.handle_packet(START + HOUR, &Packet::parse(&bytes).unwrap(), Side::Guest);
    }
    let before = table.store.touched.get();
    assert!(!table.expire(START + minutes(124)));
    assert_eq!(table.len(), 99_990);
    assert!(touched(&table, before) <= 6 + 10 * 16, "{}", touched(&table, before));
}

#[test]
fn one_call_forgets_1024_flows_and_the_tunnel_may_end_all_the_same() {
    let mut table = filled(10_000, START);
    table.set_names_expire_at(START);
    let due = START + minutes(124);
    assert!(table.expire(due));
    assert_eq!((table.len(), table.alive()), (10_000 - 1024, 0), "due ones do not count, forgotten or not");
    assert!(!table.may_end(due), "a day of quiet is not over");
    assert_eq!(table.held_by(due).flows, FlowCounts::default());
    assert!(table.list(due, FlowCursor::default(), 10_000).flows.is_empty());
    let more = std::iter::repeat_with(|| table.expire(due)).take_while(|more| *more).count();
    assert_eq!(more, 7, "1024 more with each but the last");
    assert!(table.is_empty() && table.may_end(START + DAY));
}

#[test]
fn pages_show_every_flow_that_stays_exactly_once() {
    let mut table = filled(2500, START);
    let (mut shown, mut cursor, mut pages) = (Vec::new(), FlowCursor::default(), 0);
    loop {
        let page = table.list(START, cursor, 100);
        assert!(page.flows.len() <= 100);
        shown.extend(page.flows.into_iter().map(|flow| flow.tuple));
        pages += 1;
        for flags in [RST, SYN] {
            pass(&mut table, START, TCP, Side::Remote, flags);
        }
        match page.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    assert_eq!((pages, shown.len()), (25, 2500));
    shown.sort();
    shown.dedup();
    assert_eq!(shown.len(), 2500);
    assert_eq!(FlowTable::new(FlowConfig::default(), START).list(START, cursor, 100).next, None);
    assert_eq!(table.list(START, FlowCursor::default(), 0).flows, []);
}
