//! What repair promises, on paths that lose, double, delay and reorder, and at every limit.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;

use super::format::{DataHeader, Gone, Number, Range, ReportWriter};
use super::simulation::{Path, World, identity, payload};
use super::*;

const NOW: Duration = Duration::from_secs(1);
const OURS: Incarnation = Incarnation(7);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A numbered datagram as a sender of incarnation 7 writes it.
fn data(number: u32, back: u16, len: usize) -> Bytes {
    data_of(OURS, number, back, len)
}

fn data_of(incarnation: Incarnation, number: u32, back: u16, len: usize) -> Bytes {
    let mut bytes = BytesMut::new();
    DataHeader { incarnation, number: Number(number), back, covered: false }.encode(&mut bytes);
    bytes.put_slice(&payload(0, number, len));
    bytes.freeze()
}

fn packets(receiver: &mut Receiver) -> Vec<u32> {
    std::iter::from_fn(|| receiver.poll_packet()).map(|packet| identity(&packet).1).collect()
}

fn feed(receiver: &mut Receiver, now: Duration, numbers: &[(u32, u16)]) -> Vec<u32> {
    let mut went_on = Vec::new();
    for (number, back) in numbers {
        receiver.handle_datagram(now, data(*number, *back, 100)).unwrap();
        went_on.extend(packets(receiver));
    }
    went_on
}

fn report(floor: u32, next: u32, ranges: &[(u32, u16)]) -> Bytes {
    let mut report = ReportWriter::new(OURS, Number(floor), Number(next));
    ranges.iter().for_each(|(first, len)| report.push(Range { first: Number(*first), len: *len }));
    report.finish()
}

fn sender(config: RepairConfig, count: u32) -> Sender {
    let mut sender = Sender::new(config, OURS);
    for place in 0..count {
        sender.wrap(NOW, FlowBucket(1), &[&payload(1, place, 89)]);
    }
    sender
}

fn transmits(sender: &mut Sender, now: Duration) -> Vec<u32> {
    let numbers = std::iter::from_fn(|| sender.poll_transmit(now));
    numbers.map(|datagram| DataHeader::decode(&datagram).unwrap().number.0).collect()
}

fn assert_in_order_and_once(world: &World) {
    let mut next: BTreeMap<u16, u32> = BTreeMap::new();
    for packet in &world.delivered {
        let next = next.entry(packet.flow).or_default();
        assert!(packet.place >= *next, "{packet:?} came again or was overtaken");
        *next = packet.place + 1;
    }
}

fn assert_undisturbed_flows_did_not_wait(world: &World) {
    for packet in world.delivered.iter().filter(|packet| !world.disturbed.contains(&packet.flow)) {
        assert_eq!(packet.at, packet.arrived, "{packet:?} waited");
    }
}

fn path_strategy() -> impl Strategy<Value = Path> {
    (1u64..60, 0u64..40, 0u64..200_000, 0u64..100_000).prop_map(|(delay, jitter, loss, doubled)| Path {
        delay: ms(delay),
        jitter: ms(jitter),
        loss,
        doubled,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..Default::default() })]

    #[test]
    fn everything_arrives_once_and_in_order_when_there_is_time(
        paths in (path_strategy(), path_strategy()),
        sends in prop::collection::vec((0u16..12, 0u64..8, 6usize..300), 1..400),
        seed in any::<u64>(),
        first in prop_oneof![Just(0), Just(u32::MAX - 150)],
    ) {
        let forever = Duration::from_secs(1_000_000);
        let config = RepairConfig {
            deadline: (forever, forever),
            max_repeats: u8::MAX,
            max_probes: 20,
            ..Default::default()
        };
        let mut world = World::new(&config, paths.0, seed);
        world.paths[1] = paths.1;
        world.continue_at(&config, first);
        for (flow, pause, len) in sends {
            world.send(flow, len);
            world.run(world.now + ms(pause));
        }
        // The tail probes end long before the deadline; what they did not reach would be missing.
        world.run(world.now + Duration::from_secs(500_000));
        assert_in_order_and_once(&world);
        assert_undisturbed_flows_did_not_wait(&world);
        prop_assert_eq!(world.delivered.len() as u64, world.sent());
    }

    #[test]
    fn with_a_deadline_nothing_is_doubled_overtaken_or_waits_longer(
        paths in (path_strategy(), path_strategy()),
        sends in prop::collection::vec((0u16..12, 0u64..8, 6usize..300), 1..400),
        seed in any::<u64>(),
        max_waiting in 1usize..50,
        max_gaps in 1usize..20,
    ) {
        let config = RepairConfig { max_waiting, max_gaps, ..Default::default() };
        let mut world = World::new(&config, paths.0, seed);
        world.paths[1] = paths.1;
        for (flow, pause, len) in sends {
            world.send(flow, len);
            world.run(world.now + ms(pause));
            let receiver = world.ends[1].receiver();
            prop_assert!(receiver.waiting().0 <= max_waiting && receiver.gaps() <= max_gaps);
        }
        world.settle();
        assert_in_order_and_once(&world);
        assert_undisturbed_flows_did_not_wait(&world);
        for packet in &world.delivered {
            prop_assert!(packet.at - packet.arrived <= config.deadline.1, "{:?}", packet);
        }
        let counters = world.ends[1].counters().receiver;
        prop_assert!(world.delivered.len() as u64 + counters.given_up <= world.sent());
        prop_assert_eq!(world.ends[1].receiver().waiting(), (0, 0));
        prop_assert_eq!(world.ends[0].sender().kept(), (0, 0));
    }

    #[test]
    fn garbage_and_lies_never_panic_and_stay_bounded(
        datagrams in prop::collection::vec(
            (0x1fu8..0x25, prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..40), any::<bool>()),
            0..400,
        ),
    ) {
        let config = RepairConfig { max_gaps: 8, max_waiting: 8, max_waiting_bytes: 64, ..Default::default() };
        let mut repair = Repair::new(config, Incarnation(0));
        for (i, (kind, mut bytes, true_incarnation)) in datagrams.into_iter().enumerate() {
            bytes.insert(0, kind);
            if true_incarnation && bytes.len() > 4 {
                bytes[1..5].fill(0);
            }
            let now = ms(i as u64);
            repair.wrap(now, FlowBucket(1), &[&[1]]);
            let _ = repair.handle_datagram(now, bytes.into());
            prop_assert!(repair.receiver().gaps() <= 8 && repair.receiver().waiting().0 <= 8);
            prop_assert!(repair.receiver().waiting().1 <= 64);
            while repair.poll_packet().is_some() {}
            while repair.poll_transmit(now).is_some() {}
            repair.handle_timeout(now);
        }
    }
}

#[test]
fn only_the_flow_that_lost_a_packet_waits_and_only_for_a_round_trip() {
    let config = RepairConfig::default();
    let mut world = World::new(&config, Path::clean(ms(50)), 1);
    world.lose_places.insert((1, 3));
    for _ in 0..200 {
        (1..=3).for_each(|flow| world.send(flow, 100));
        world.run(world.now + ms(1));
    }
    world.settle();
    assert_eq!(world.delivered.len(), 600);
    assert_in_order_and_once(&world);
    assert_undisturbed_flows_did_not_wait(&world);
    let longest = world.delivered.iter().map(|packet| packet.at - packet.arrived).max().unwrap();
    assert!(longest <= ms(101), "{longest:?}: one round trip after the third later datagram");
    assert_eq!(world.ends[1].counters().receiver.repaired, 1);
}

#[test]
fn a_lost_tail_is_found_and_an_idle_tunnel_says_nothing() {
    let mut world = World::new(&RepairConfig::default(), Path::clean(ms(50)), 1);
    world.lose_places.extend([(1, 8), (1, 9)]);
    (0..10).for_each(|_| world.send(1, 100));
    let began = world.now;
    world.settle();
    assert_eq!(world.delivered.len(), 10);
    assert!(world.now - began < Duration::from_secs(1));
    let spoken = world.transmitted;
    world.run(world.now + Duration::from_secs(3600));
    assert_eq!(world.transmitted, spoken);
    assert!(world.ends.iter().all(|end| end.poll_timeout().is_none()));
}

#[test]
fn a_peer_that_is_silent_costs_three_probes_and_its_ring_is_forgotten() {
    let mut sender = sender(RepairConfig { deadline_round_trips: 40, ..Default::default() }, 5);
    sender.set_rtt(ms(10));
    let mut probes = Vec::new();
    while let Some(at) = sender.poll_timeout() {
        sender.handle_timeout(at);
        probes.extend(transmits(&mut sender, at));
    }
    assert_eq!(probes, [4, 4, 4]);
    assert_eq!((sender.kept(), sender.counters().probes), ((0, 0), 3));
}

#[test]
fn the_rest_goes_on_after_the_deadline_and_a_late_packet_is_dropped() {
    let mut receiver = Receiver::new(RepairConfig::default());
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (2, 1), (3, 1), (4, 0)]), [0, 4]);
    assert_eq!(receiver.poll_timeout(), Some(NOW), "three later ones came: it may be asked for");
    receiver.handle_timeout(NOW + ms(299));
    assert_eq!(packets(&mut receiver), []);
    receiver.handle_timeout(NOW + ms(300));
    assert_eq!(packets(&mut receiver), [2, 3]);
    assert_eq!(feed(&mut receiver, NOW + ms(301), &[(1, 1)]), []);
    let counters = receiver.counters();
    assert_eq!((counters.given_up, counters.duplicates, counters.waited), (1, 1, 2));
}

#[test]
fn what_waits_is_bounded_in_packets_and_in_bytes() {
    for (config, most) in [
        (RepairConfig { max_waiting: 3, ..Default::default() }, 3),
        (RepairConfig { max_waiting_bytes: 400, ..Default::default() }, 4),
    ] {
        let mut receiver = Receiver::new(config);
        feed(&mut receiver, NOW, &[(0, 0)]);
        let at_limit: Vec<_> = (2..2 + most).map(|number| (number, 1)).collect();
        assert_eq!(feed(&mut receiver, NOW, &at_limit), []);
        assert_eq!(receiver.waiting(), (most as usize, most as usize * 100));
        let all: Vec<u32> = (2..=2 + most).collect();
        assert_eq!(feed(&mut receiver, NOW, &[(2 + most, 1)]), all, "the gap was given up");
        assert_eq!((receiver.waiting(), receiver.counters().given_up), ((0, 0), 1));
    }
}

#[test]
fn the_oldest_gap_gives_way_at_the_limit_of_gaps() {
    let mut receiver = Receiver::new(RepairConfig { max_gaps: 2, ..Default::default() });
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (2, 1), (4, 1)]), [0]);
    assert_eq!((receiver.gaps(), receiver.counters().given_up), (2, 0));
    assert_eq!(feed(&mut receiver, NOW, &[(6, 1)]), [2]);
    assert_eq!((receiver.gaps(), receiver.counters().given_up), (2, 1));
}

#[test]
fn the_longest_jump_is_repaired_and_a_longer_one_is_not() {
    let config = RepairConfig { max_jump: 10, ..Default::default() };
    let mut receiver = Receiver::new(config.clone());
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (11, 0)]), [0, 11]);
    assert_eq!((receiver.gaps(), receiver.counters().jumps), (1, 0));
    let mut receiver = Receiver::new(config);
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (2, 1), (14, 0), (15, 1)]), [0, 2, 14, 15]);
    assert_eq!((receiver.gaps(), receiver.counters().jumps), (0, 1));
}

#[test]
fn a_gap_is_given_up_when_the_window_behind_it_is_full() {
    let mut receiver = Receiver::new(RepairConfig::default());
    feed(&mut receiver, NOW, &[(0, 0), (2, 1)]);
    for number in 3..=65_535 {
        receiver.handle_datagram(NOW, data(number, 0, 6)).unwrap();
        while receiver.poll_packet().is_some() {}
    }
    assert_eq!(receiver.gaps(), 1);
    assert_eq!(feed(&mut receiver, NOW, &[(65_536, 0)]), [2, 65_536]);
    assert_eq!(receiver.gaps(), 0);
}

#[test]
fn the_ring_is_bounded_in_datagrams_bytes_and_age() {
    let of_100 = RepairConfig { max_sent_bytes: 1000, ..Default::default() };
    let sender_of_bytes = sender(of_100, 11);
    assert_eq!((sender_of_bytes.kept(), sender_of_bytes.counters().crowded_out), ((10, 1000), 1));
    let mut bounded = sender(RepairConfig { max_sent: 5, ..Default::default() }, 6);
    assert_eq!((bounded.kept().0, bounded.counters().crowded_out), (5, 1));
    bounded.wrap(NOW + ms(300), FlowBucket(1), &[b"new"]);
    assert_eq!(bounded.kept().0, 1, "the others are older than the deadline");
}

#[test]
fn a_datagram_is_repeated_six_times_at_most_and_not_twice_for_one_request() {
    let mut sender = sender(RepairConfig { deadline_round_trips: 100, ..Default::default() }, 5);
    let mut repeated = 0;
    for i in 0..30 {
        sender.handle_report(NOW + ms(i), &report(1, 5, &[(1, 1)])).unwrap();
        sender.handle_report(NOW + ms(i), &report(1, 5, &[(1, 1)])).unwrap();
        repeated += transmits(&mut sender, NOW + ms(i)).len();
    }
    assert_eq!(repeated, 5, "30 ms hold five of the 6.25 ms that lie between two repeats");
    for i in 0..100 {
        sender.handle_report(NOW + ms(100 + i), &report(1, 5, &[(1, 1)])).unwrap();
        repeated += transmits(&mut sender, NOW + ms(100 + i)).len();
    }
    assert_eq!(repeated, 6);
}

#[test]
fn reports_about_what_was_never_sent_are_refused_and_absurd_ranges_are_cut() {
    let mut sender = sender(RepairConfig::default(), 5);
    assert_eq!(sender.handle_report(NOW, &report(0, 6, &[])), Err(RepairError::Contradiction));
    assert_eq!(sender.handle_report(NOW, &report(6, 5, &[])), Err(RepairError::Contradiction));
    assert_eq!(sender.handle_report(NOW, &report(3, 2, &[])), Err(RepairError::Contradiction));
    assert_eq!(sender.handle_report(NOW, &report(0, 5, &[])[1..]), Err(RepairError::UnknownFormat));
    sender.handle_report(NOW, &report(0, 5, &[(3, u16::MAX), (70, 9), (u32::MAX - 2, 1)])).unwrap();
    let numbers: Vec<_> = std::iter::from_fn(|| sender.poll_transmit(NOW)).collect();
    assert_eq!(numbers.len(), 3);
    assert_eq!(Kind::of(&numbers[2]), Kind::Gone, "{:?}", numbers[2]);
    let other = ReportWriter::new(Incarnation(9), Number(0), Number(1)).finish();
    assert_eq!(sender.handle_report(NOW, &other), Err(RepairError::Stale));
}

#[test]
fn one_report_examines_no_more_than_the_longest_jump() {
    let mut sender = sender(RepairConfig { max_jump: 10, ..Default::default() }, 100);
    sender.handle_report(NOW, &report(0, 100, &[(0, 8), (20, 60), (90, 5)])).unwrap();
    assert_eq!(transmits(&mut sender, NOW), [0, 1, 2, 3, 4, 5, 6, 7, 20, 21]);
}

#[test]
fn what_the_sender_no_longer_has_is_given_up_at_once() {
    let mut world = World::new(&RepairConfig { max_sent: 4, ..Default::default() }, Path::clean(ms(50)), 1);
    world.lose_places.extend([(1, 2), (1, 3)]);
    for _ in 0..200 {
        world.send(1, 100);
        world.run(world.now + ms(1));
    }
    world.settle();
    assert_eq!(world.delivered.len(), 198);
    let longest = world.delivered.iter().map(|packet| packet.at - packet.arrived).max().unwrap();
    assert!(longest <= ms(104), "{longest:?}");
}

#[test]
fn a_lie_about_what_is_gone_hurts_no_more_than_the_gaps_there_are() {
    let mut receiver = Receiver::new(RepairConfig::default());
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (4, 1), (6, 1)]), [0]);
    receiver.handle_gone(&Gone { incarnation: OURS, oldest: Number(3) }.encode()).unwrap();
    assert_eq!(packets(&mut receiver), []);
    receiver.handle_gone(&Gone { incarnation: OURS, oldest: Number(1 << 30) }.encode()).unwrap();
    assert_eq!(packets(&mut receiver), [4, 6]);
    assert_eq!(feed(&mut receiver, NOW, &[(7, 1)]), [7]);
    let other = Gone { incarnation: Incarnation(9), oldest: Number(9) }.encode();
    assert_eq!(receiver.handle_gone(&other), Err(RepairError::Stale));
}

#[test]
fn a_restarted_sender_is_heard_at_once_and_stragglers_of_its_old_life_are_not() {
    let mut receiver = Receiver::new(RepairConfig::default());
    assert_eq!(feed(&mut receiver, NOW, &[(0, 0), (1, 1), (3, 1)]), [0, 1]);
    receiver.handle_datagram(NOW, data_of(Incarnation(8), 1, 0, 100)).unwrap();
    assert_eq!(packets(&mut receiver), [3, 1], "what waited goes on first");
    assert_eq!(receiver.handle_datagram(NOW, data(4, 1, 100)), Err(RepairError::Stale));
    receiver.handle_datagram(NOW, data_of(Incarnation(8), 0, 0, 100)).unwrap();
    assert_eq!(packets(&mut receiver), [0], "the first of a life is repaired too");
}

#[test]
fn a_restarted_receiver_joins_and_a_sender_told_of_it_begins_anew() {
    let mut receiver = Receiver::new(RepairConfig::default());
    assert_eq!(feed(&mut receiver, NOW, &[(70_000, 1), (70_001, 1), (70_003, 1)]), [70_000, 70_001]);
    assert_eq!(receiver.gaps(), 1);
    let mut sender = sender(RepairConfig::default(), 5);
    sender.restart(Incarnation(8));
    assert_eq!((sender.kept(), sender.counters().sent), ((0, 0), 5));
    let datagram = sender.wrap(NOW, FlowBucket(1), &[b"new"]);
    let header = DataHeader::decode(&datagram).unwrap();
    assert_eq!((header.incarnation, header.number, header.back), (Incarnation(8), Number(0), 0));
}

#[test]
fn a_datagram_that_was_taken_back_leaves_no_gap() {
    let mut sender = Sender::new(RepairConfig::default(), OURS);
    let mut receiver = Receiver::new(RepairConfig::default());
    for (flow, refused) in [(1, false), (2, true), (1, true), (1, false), (2, false), (1, false)] {
        let datagram = sender.wrap(NOW, FlowBucket(flow), &[&payload(flow, 0, 9)]);
        match refused {
            true => sender.take_back(),
            false => receiver.handle_datagram(NOW, datagram).unwrap(),
        }
    }
    assert_eq!((receiver.gaps(), receiver.waiting().0, packets(&mut receiver).len()), (0, 0, 4));
    assert_eq!((sender.kept().0, sender.counters().sent), (4, 4));
}

#[test]
fn what_the_link_did_not_take_comes_first_the_next_time() {
    let mut repair = Repair::new(RepairConfig::default(), OURS);
    for place in 0..5 {
        repair.wrap(NOW, FlowBucket(1), &[&payload(1, place, 100)]);
    }
    for number in [0, 2, 3, 4] {
        repair.handle_datagram(NOW, data_of(Incarnation(8), number, 0, 100)).unwrap();
    }
    repair.handle_datagram(NOW, report(1, 5, &[(1, 2)])).unwrap();
    let all: Vec<Bytes> = std::iter::from_fn(|| repair.poll_transmit(NOW)).collect();
    assert_eq!(all.len(), 3, "a request and two repeats");
    for datagram in all.iter().rev() {
        repair.return_transmit(datagram.clone());
    }
    let again: Vec<Bytes> = std::iter::from_fn(|| repair.poll_transmit(NOW)).collect();
    assert_eq!(again, all);
}

#[test]
fn unnumbered_datagrams_pass_by_a_gap() {
    let mut repair = Repair::new(RepairConfig::default(), OURS);
    repair.handle_datagram(NOW, data_of(Incarnation(8), 0, 0, 100)).unwrap();
    repair.handle_datagram(NOW, data_of(Incarnation(8), 2, 1, 100)).unwrap();
    let media = Bytes::from_static(&[0x10, 0x45]);
    repair.handle_datagram(NOW, media.clone()).unwrap();
    assert_eq!(repair.poll_packet().map(|packet| packet.len()), Some(100));
    assert_eq!(repair.poll_packet(), Some(media));
    assert_eq!(repair.poll_packet(), None);
}

/// One flow of `count` packets of 1300 bytes at 468 Mbit/s over 100 ms: the share that stayed lost, and what
/// was added to the delay of the packet in the middle.
fn residual_loss(loss: u64, count: u64) -> (f64, Duration) {
    let path = Path { loss, ..Path::clean(ms(50)) };
    let mut world = World::new(&RepairConfig::default(), path, 42);
    for _ in 0..count {
        world.send(1, 1300);
        world.run(world.now + Duration::from_nanos(22_222));
    }
    world.settle();
    assert_in_order_and_once(&world);
    let mut added: Vec<Duration> = world.delivered.iter().map(|packet| packet.at - packet.arrived).collect();
    added.sort();
    let at = |share: f64| added[((added.len() - 1) as f64 * share) as usize];
    let residual = 1.0 - world.delivered.len() as f64 / world.sent() as f64;
    let (sender, receiver) = (world.ends[0].counters().sender, world.ends[1].counters().receiver);
    println!(
        "loss {loss} ppm: residual {residual:.2e}, repeats {:.4} %, reports {}, added delay p50 {:?} p99 {:?} max {:?}",
        sender.repeated as f64 * 100.0 / sender.sent as f64,
        receiver.reports,
        at(0.5),
        at(0.99),
        at(1.0),
    );
    println!("  {sender:?}\n  {receiver:?}");
    (residual, at(0.5))
}

#[test]
fn a_flow_over_a_long_path_sees_almost_none_of_its_loss() {
    let (residual, added) = residual_loss(1_000, 300_000);
    assert!(residual < 1e-5);
    assert_eq!(added, Duration::ZERO, "parity keeps most packets from waiting");
    assert!(residual_loss(10_000, 100_000).0 < 1e-5);
}

/// Prints what a datagram costs: the median of batches. A figure is no promise on a machine that others use.
#[test]
fn repair_speed() {
    for loss_every in [0, 1000] {
        let config = RepairConfig::default();
        let (mut a, mut b) = (Repair::new(config.clone(), OURS), Repair::new(config, Incarnation(8)));
        let (mut wrapping, mut receiving) = (Vec::new(), Vec::new());
        let mut reports: VecDeque<(Duration, Bytes)> = VecDeque::new();
        for batch in 1..4000 {
            let now = NOW + Duration::from_nanos(64 * 22_222) * batch;
            let began = Instant::now();
            let datagrams: Vec<Bytes> =
                (0..64).map(|i| a.wrap(now, FlowBucket(i % 5), &[&[0x10; 1300]])).collect();
            wrapping.push(began.elapsed() / 64);
            let arrives = |i: u32| loss_every == 0 || !(batch * 64 + i).is_multiple_of(loss_every);
            let mut datagrams: Vec<Bytes> =
                (0..).zip(datagrams).filter(|(i, _)| arrives(*i)).map(|(_, d)| d).collect();
            datagrams.extend(std::iter::from_fn(|| a.poll_transmit(now)));
            let (began, count) = (Instant::now(), datagrams.len() as u32);
            for datagram in datagrams {
                b.handle_datagram(now, datagram).unwrap();
                while b.poll_packet().is_some() {}
                let said = std::iter::from_fn(|| b.poll_transmit(now));
                reports.extend(said.map(|report| (now + ms(100), report)));
            }
            receiving.push(began.elapsed() / count);
            while reports.front().is_some_and(|(at, _)| *at <= now) {
                a.handle_datagram(now, reports.pop_front().unwrap().1).unwrap();
            }
        }
        wrapping.sort();
        receiving.sort();
        let middle = wrapping.len() / 2;
        println!(
            "one of {loss_every} lost: {:?} to wrap, {:?} to receive",
            wrapping[middle], receiving[middle]
        );
        println!("  {:?}", b.counters().receiver);
    }
}
