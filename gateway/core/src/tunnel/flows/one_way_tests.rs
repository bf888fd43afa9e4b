//! Flows that are heard from one end only: when they count, and that counting them is bounded.

use proptest::prelude::*;

use super::super::packet::tests::{ipv4, tcp};
use super::super::packet::{TCP, UDP};
use super::*;

const GUEST: [u8; 4] = [198, 51, 100, 10];
const CLIENT: [u8; 4] = [192, 0, 2, 1];
const ACK: u8 = 0x10;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn table() -> FlowTable {
    FlowTable::new(FlowConfig::default(), ms(0))
}

fn speaks(table: &mut FlowTable, now: Duration, protocol: u8, port: u16, sender: Side) {
    let (from, to, ports) = match sender {
        Side::Guest => (GUEST, CLIENT, (80, port)),
        Side::Remote => (CLIENT, GUEST, (port, 80)),
    };
    let bytes = ipv4(from, to, protocol, &tcp(ports.0, ports.1, ACK));
    table.handle_packet(now, &Packet::parse(&bytes).unwrap(), sender);
}

fn seeded(port: u16) -> FlowTuple {
    FlowTuple { protocol: TCP, local: GUEST.into(), local_port: 80, remote: CLIENT.into(), remote_port: port }
}

#[test]
fn a_flow_whose_one_end_falls_silent_while_the_other_repeats_itself_is_one_way() {
    let mut table = table();
    speaks(&mut table, ms(0), UDP, 1, Side::Remote);
    speaks(&mut table, ms(10), UDP, 1, Side::Guest);
    for at in [1_000, 5_000, 20_000, 30_999] {
        speaks(&mut table, ms(at), UDP, 1, Side::Remote);
    }
    assert_eq!(table.count_one_way(ms(30_999)), OneWay { active: 1, ..OneWay::default() }, "not long enough");
    speaks(&mut table, ms(31_000), UDP, 1, Side::Remote);
    let counted = table.count_one_way(ms(31_000));
    assert_eq!(counted, OneWay { active: 1, only_guest: 0, only_remote: 1 });
    assert!(counted.is_most());
    assert_eq!(table.longest_idle(ms(31_000), 10)[0].heard_only, Some(Side::Remote));
    speaks(&mut table, ms(31_001), UDP, 1, Side::Guest);
    assert_eq!(table.count_one_way(ms(31_001)).flows(), 0, "it is heard again");
}

#[test]
fn a_flow_of_before_the_move_counts_although_its_other_end_was_not_heard_here() {
    let mut table = table();
    table.seed(ms(0), &[seeded(1), seeded(2)]);
    for at in [0, 15_000, 30_000] {
        speaks(&mut table, ms(at), TCP, 1, Side::Guest);
        speaks(&mut table, ms(at), TCP, 2, Side::Guest);
        speaks(&mut table, ms(at + 1), TCP, 2, Side::Remote);
    }
    let counted = table.count_one_way(ms(30_001));
    assert_eq!(counted, OneWay { active: 2, only_guest: 1, only_remote: 0 });
    assert!(counted.is_most(), "half of them");
    assert_eq!(table.count_one_way(ms(60_000)), OneWay { active: 1, ..OneWay::default() }, "it has given up");
}

#[test]
fn who_never_answered_or_was_not_asked_often_enough_is_not_missed() {
    let mut table = table();
    for at in (0..=40_000).step_by(1000) {
        speaks(&mut table, ms(at), UDP, 1, Side::Remote);
    }
    speaks(&mut table, ms(0), UDP, 2, Side::Remote);
    speaks(&mut table, ms(0), UDP, 2, Side::Guest);
    speaks(&mut table, ms(31_000), UDP, 2, Side::Guest);
    assert_eq!(table.count_one_way(ms(40_000)), OneWay { active: 2, ..OneWay::default() });
}

#[test]
fn a_large_table_is_counted_in_bounded_steps() {
    let config = FlowConfig { expire_batch: 100, ..FlowConfig::default() };
    let mut table = FlowTable::new(config, ms(0));
    let seeds: Vec<FlowTuple> = (0..1000).map(seeded).collect();
    table.seed(ms(0), &seeds);
    for at in [0, 15_000, 30_000] {
        (0..1000).for_each(|port| speaks(&mut table, ms(at), TCP, port, Side::Guest));
    }
    for step in 1..=10 {
        let counted = table.count_one_way(ms(30_000));
        assert_eq!(counted.only_guest, if step == 10 { 1000 } else { 0 }, "after whole passes only");
    }
}

proptest! {
    /// Against the rule, read plainly from the whole history of one UDP flow.
    #[test]
    fn the_count_is_what_the_history_says(
        history in prop::collection::vec((0_u64..20_000, any::<bool>()), 1..40)
    ) {
        let mut table = table();
        let (mut now, mut said) = (0, Vec::new());
        for (step, guest) in history {
            now += step;
            let sender = if guest { Side::Guest } else { Side::Remote };
            speaks(&mut table, ms(now), UDP, 1, sender);
            said.push((now, sender));
            let row: Vec<_> = said.iter().rev().take_while(|(_, each)| *each == sender).collect();
            let long = row.len() >= 3 && now - row[row.len() - 1].0 >= 30_000;
            let other_was_heard = row.len() < said.len();
            let expected = (long && other_was_heard).then_some(sender);
            prop_assert_eq!(table.longest_idle(ms(now), 1)[0].heard_only, expected);
            let counted = table.count_one_way(ms(now));
            prop_assert_eq!((counted.active, counted.flows()), (1, u64::from(expected.is_some())));
        }
    }
}
