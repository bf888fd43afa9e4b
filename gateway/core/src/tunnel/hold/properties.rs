//! What the hold promises, whatever comes in which order: bounds, order, and that each drop is counted once. First of
//! the queue alone, then of a NIC's tunnel from the pause until packets pass.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::super::datapath::{Datapath, DatapathConfig, Phase, VisitRoute, Way};
use super::super::packet::UDP;
use super::super::packet::tests::ipv4;
use super::super::policy::{DropReason, PortKey};
use super::*;
use crate::ids::SiteName;

const HOME: [u8; 4] = [198, 51, 100, 10];
const CLIENT: [u8; 4] = [192, 0, 2, 1];
const NOW: Duration = Duration::from_secs(10);

/// The `nth` packet, with `data` bytes behind its headers.
fn packet(nth: u16, data: usize) -> Bytes {
    let mut transport = vec![0; 8 + data];
    transport[..2].copy_from_slice(&nth.to_be_bytes());
    ipv4(CLIENT, HOME, UDP, &transport).into()
}

fn nth(packet: &Bytes) -> u16 {
    u16::from_be_bytes([packet[20], packet[21]])
}

/// Drops the oldest until the bounds hold; how many.
fn shorten(plain: &mut VecDeque<Bytes>, config: &HoldConfig) -> u64 {
    let mut dropped = 0;
    let bytes = |plain: &VecDeque<Bytes>| plain.iter().map(Bytes::len).sum::<usize>();
    while plain.len() > config.max_packets || bytes(plain) > config.max_bytes {
        plain.pop_front();
        dropped += 1;
    }
    dropped
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// A packet with so much data arrives.
    Arrives(usize),
    /// The oldest leaves.
    Leaves,
    /// The oldest is taken and cannot leave; a packet with so much data arrives before it is back.
    Waits(Option<usize>),
    /// The machine has been handed over.
    HandedOver,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..300).prop_map(Step::Arrives),
        2 => Just(Step::Leaves),
        1 => prop::option::of(0usize..300).prop_map(Step::Waits),
        1 => Just(Step::HandedOver),
    ]
}

fn config() -> impl Strategy<Value = HoldConfig> {
    (0usize..6, 0usize..1000).prop_map(|(max_packets, max_bytes)| HoldConfig { max_packets, max_bytes })
}

proptest! {
    #[test]
    fn the_queue_is_bounded_drops_its_oldest_and_counts_each_once(
        config in config(),
        steps in prop::collection::vec(step(), 0..100),
    ) {
        let mut hold = Hold::new(config.clone());
        let mut plain = VecDeque::new();
        let (mut arrived, mut left, mut dropped) = (0, 0, 0);
        for step in steps {
            let mut arrives = |hold: &mut Hold, plain: &mut VecDeque<Bytes>, data| {
                let packet = packet(arrived, data);
                arrived += 1;
                if packet.len() > config.max_bytes {
                    return (hold.push(packet), 1);
                }
                plain.push_back(packet.clone());
                (hold.push(packet), shorten(plain, &config))
            };
            let (said, expected) = match step {
                Step::Arrives(data) => arrives(&mut hold, &mut plain, data),
                Step::Leaves => {
                    let oldest = hold.pop();
                    left += u64::from(oldest.is_some());
                    prop_assert_eq!(oldest, plain.pop_front());
                    (0, 0)
                }
                Step::Waits(meanwhile) => {
                    let Some(oldest) = hold.pop() else { continue };
                    let first = plain.pop_front().unwrap();
                    let (said, expected) =
                        meanwhile.map_or((0, 0), |data| arrives(&mut hold, &mut plain, data));
                    plain.push_front(first);
                    (said + hold.return_first(oldest), expected + shorten(&mut plain, &config))
                }
                Step::HandedOver => continue,
            };
            prop_assert_eq!(said, expected);
            dropped += said;
            prop_assert!(hold.len() <= config.max_packets && hold.bytes() <= config.max_bytes);
            prop_assert_eq!(hold.bytes(), plain.iter().map(Bytes::len).sum::<usize>());
            prop_assert_eq!(&hold.queue, &plain);
        }
        prop_assert_eq!(u64::from(arrived), left + dropped + hold.len() as u64);
    }

    #[test]
    fn from_the_pause_until_they_pass_packets_arrive_once_in_order_or_are_counted(
        hold in config(),
        steps in prop::collection::vec(step(), 0..100),
    ) {
        let mut home = Home::new(hold.clone());
        let mut sent = 0;
        for step in steps {
            match step {
                Step::Arrives(data) => home.arrives(&mut sent, data),
                Step::Leaves => home.leaves(),
                Step::Waits(meanwhile) => home.waits(&mut sent, meanwhile),
                Step::HandedOver => home.datapath.attract(NOW, &key(), &[]).unwrap(),
            }
            let status = home.datapath.handle_status(NOW).remove(0);
            prop_assert!(status.held_packets <= hold.max_packets as u64 && status.held_bytes <= hold.max_bytes as u64);
            prop_assert!(home.delivered.is_sorted_by(|one, next| one < next), "{:?}", home.delivered);
            prop_assert!(status.phase != Phase::Passing || status.held_packets == 0);
            prop_assert!(status.phase != Phase::Holding || home.delivered.is_empty());
            let dropped = home.datapath.counters().dropped_total();
            prop_assert_eq!(u64::from(sent), home.delivered.len() as u64 + dropped + status.held_packets);
        }
        home.datapath.attract(NOW, &key(), &[]).unwrap();
        while home.datapath.is_releasing() {
            home.leaves();
        }
        let full = home.datapath.counters().dropped.get(&DropReason::HoldFull).copied().unwrap_or(0);
        prop_assert_eq!(u64::from(sent), home.delivered.len() as u64 + full);
        let before = home.delivered.len();
        home.arrives(&mut sent, 0);
        prop_assert_eq!(home.delivered.len(), before + 1, "nothing is kept any more");
    }
}

fn key() -> PortKey {
    PortKey { machine: "web1".parse().unwrap(), nic: "net0".parse().unwrap() }
}

fn peer() -> SiteName {
    "b".parse().unwrap()
}

/// The home of a machine whose packets are kept, and the numbers of those that went on.
struct Home {
    datapath: Datapath,
    delivered: Vec<u16>,
}

impl Home {
    fn new(hold: HoldConfig) -> Self {
        let mut datapath = Datapath::new(DatapathConfig { hold, ..DatapathConfig::default() });
        datapath.begin_hold(&key(), &peer(), &[HOME.into()]).unwrap();
        Self { datapath, delivered: Vec::new() }
    }

    fn arrives(&mut self, sent: &mut u16, data: usize) {
        if self.datapath.handle_packet(NOW, packet(*sent, data)).is_some() {
            self.delivered.push(*sent);
        }
        *sent += 1;
    }

    fn leaves(&mut self) {
        if let Some((_, way, packet)) = self.datapath.poll_kept(NOW, &[]) {
            assert!(matches!(way, Way::Peer(_)));
            self.delivered.push(nth(&packet));
        }
    }

    fn waits(&mut self, sent: &mut u16, meanwhile: Option<usize>) {
        let Some((slot, _, packet)) = self.datapath.poll_kept(NOW, &[]) else { return };
        if let Some(data) = meanwhile {
            self.arrives(sent, data);
        }
        self.datapath.return_kept(slot, packet);
    }
}

#[test]
fn what_arrives_while_the_link_is_down_after_the_hand_over_is_counted_once() {
    let mut home = Home::new(HoldConfig { max_packets: 2, max_bytes: 1000 });
    let mut sent = 0;
    (0..3).for_each(|_| home.arrives(&mut sent, 0));
    home.datapath.attract(NOW, &key(), &[]).unwrap();
    home.waits(&mut sent, Some(0));
    let dropped = home.datapath.counters().dropped.clone();
    assert_eq!(dropped.into_iter().collect::<Vec<_>>(), [(DropReason::HoldFull, 2)]);
    assert!(home.datapath.poll_kept(NOW + DatapathConfig::default().release_limit, &[]).is_none());
    let dropped = home.datapath.counters().dropped.clone();
    let expected = [(DropReason::HoldFull, 2), (DropReason::LinkBusy, 2)];
    assert_eq!(dropped.into_iter().collect::<Vec<_>>(), expected);
    home.arrives(&mut sent, 0);
    assert_eq!(home.delivered, [4]);
}

#[test]
fn what_the_guest_sends_is_not_kept_while_packets_to_it_are() {
    let to_client = || Bytes::from(ipv4(HOME, CLIENT, UDP, &[0; 8]));
    let mut visited = Datapath::new(DatapathConfig::default());
    let route = VisitRoute { address: HOME.into(), peer: peer(), also: None, carried: false };
    visited.visit(&key(), &[route]).unwrap();
    let to_peer = visited.peer_slot(&peer());
    assert_eq!(visited.handle_packet(NOW, to_client()), Some(to_peer));
    let status = visited.handle_status(NOW).remove(0);
    assert_eq!((status.phase, status.held_packets), (Phase::Holding, 0));
}
