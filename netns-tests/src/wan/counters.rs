//! What the emulator saw: totals per direction and per class of packets, and a bounded row of samples for plots.
//! A super-packet counts as its segments, with the lengths they have on the wire (IP packets, no Ethernet framing).

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use super::frame::PacketHeader;

/// Length of one sample.
pub const SAMPLE_TIME: Duration = Duration::from_millis(100);

/// How many samples are kept: the last hour.
pub const MAX_SAMPLES: usize = 36_000;

/// How many pairs of addresses are told apart per class; further ones are only counted in the class.
pub const MAX_PAIRS: usize = 1024;

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Packets (segments of super-packets).
    pub packets: u64,
    /// Bytes of IP packets.
    pub bytes: u64,
}

impl Tally {
    /// Counts one packet of this length.
    pub fn add(&mut self, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
    }

    /// Takes another tally in.
    pub fn merge(&mut self, other: Tally) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// One condition on a packet; what is `None` does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketMatch {
    /// IP protocol number (6 TCP, 17 UDP, 1 ICMP).
    pub protocol: Option<u8>,
    /// The sender.
    pub source: Option<IpAddr>,
    /// The receiver.
    pub destination: Option<IpAddr>,
    /// Source or destination port.
    pub port: Option<u16>,
}

impl PacketMatch {
    /// UDP from or to this port: the traffic of the gateways.
    pub fn udp_port(port: u16) -> Self {
        Self { protocol: Some(17), port: Some(port), ..Self::default() }
    }

    /// Whatever is sent to this address.
    pub fn to(destination: IpAddr) -> Self {
        Self { destination: Some(destination), ..Self::default() }
    }

    /// Whatever is sent from one address to another.
    pub fn between(source: IpAddr, destination: IpAddr) -> Self {
        Self { source: Some(source), destination: Some(destination), ..Self::default() }
    }

    /// Whether the packet meets it.
    pub fn matches(&self, packet: &PacketHeader) -> bool {
        self.protocol.is_none_or(|protocol| protocol == packet.protocol)
            && self.source.is_none_or(|source| source == packet.source)
            && self.destination.is_none_or(|destination| destination == packet.destination)
            && self.port.is_none_or(|port| port == packet.source_port || port == packet.destination_port)
    }
}

/// A named class of packets: those that meet any of its conditions. The first class that fits takes the packet; what
/// fits none is counted as `other`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketClass {
    /// Its name in the report.
    pub name: String,
    /// Its conditions.
    pub any_of: Vec<PacketMatch>,
}

impl PacketClass {
    /// A class with one condition.
    pub fn new(name: &str, condition: PacketMatch) -> Self {
        Self { name: name.to_owned(), any_of: vec![condition] }
    }
}

/// What one class did in one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClassCounters {
    /// The class's name.
    pub name: String,
    /// What entered the WAN.
    pub offered: Tally,
    /// What left it at the other end.
    pub delivered: Tally,
    /// What entered, by sender and receiver.
    pub pairs: BTreeMap<(IpAddr, IpAddr), Tally>,
}

/// One direction's totals.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathCounters {
    /// What entered the WAN.
    pub offered: Tally,
    /// What left it at the other end (duplicates included).
    pub delivered: Tally,
    /// What random loss took.
    pub lost: Tally,
    /// What found the queue full.
    pub tail_dropped: Tally,
    /// What met a cut.
    pub cut_dropped: Tally,
    /// Extra copies made.
    pub duplicated: Tally,
    /// Packets made late on purpose.
    pub reordered: Tally,
    /// Packets that the device at the far side did not take (not an emulated loss: something is wrong).
    pub write_failed: Tally,
    /// Packets that the kernel dropped in front of the emulator (not an emulated loss: the machine is too busy).
    pub kernel_dropped: u64,
    /// By class, `other` last.
    pub classes: Vec<ClassCounters>,
}

impl PathCounters {
    /// The class of this name.
    pub fn class(&self, name: &str) -> Option<&ClassCounters> {
        self.classes.iter().find(|class| class.name == name)
    }
}

/// What happened in one [`SAMPLE_TIME`]. Times without any traffic have no sample.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Its beginning, since the WAN was built.
    pub at: Duration,
    /// Bytes that entered.
    pub offered_bytes: u64,
    /// Bytes that left.
    pub delivered_bytes: u64,
    /// Packets lost at random.
    pub lost_packets: u64,
    /// Packets dropped at the full queue or by a cut.
    pub dropped_packets: u64,
    /// The longest queue seen, in bytes.
    pub queue_bytes: u64,
    /// Delivered bytes by class, in the order of [`PathCounters::classes`].
    pub class_bytes: Vec<u64>,
}

/// What became of a packet that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DropCause {
    Lost,
    QueueFull,
    Cut,
}

/// Keeps the books of one direction.
#[derive(Debug)]
pub(super) struct Ledger {
    rules: Vec<PacketClass>,
    counters: PathCounters,
    samples: VecDeque<Sample>,
}

impl Ledger {
    pub fn new(rules: Vec<PacketClass>) -> Self {
        let mut ledger = Self { rules, counters: PathCounters::default(), samples: VecDeque::new() };
        ledger.reset();
        ledger
    }

    pub fn reset(&mut self) {
        let names = self.rules.iter().map(|rule| rule.name.clone()).chain(["other".to_owned()]);
        let classes = names.map(|name| ClassCounters { name, ..ClassCounters::default() }).collect();
        self.counters = PathCounters { classes, ..PathCounters::default() };
        self.samples.clear();
    }

    pub fn counters(&self) -> &PathCounters {
        &self.counters
    }

    pub fn samples(&self) -> Vec<Sample> {
        self.samples.iter().cloned().collect()
    }

    /// The index of the class this packet belongs to.
    pub fn classify(&self, header: Option<&PacketHeader>) -> usize {
        let fits =
            |rule: &PacketClass, packet: &PacketHeader| rule.any_of.iter().any(|one| one.matches(packet));
        let found = header.and_then(|packet| self.rules.iter().position(|rule| fits(rule, packet)));
        found.unwrap_or(self.rules.len())
    }

    pub fn offered(&mut self, now: Duration, class: usize, header: Option<&PacketHeader>, tally: Tally) {
        self.counters.offered.merge(tally);
        let counters = &mut self.counters.classes[class];
        counters.offered.merge(tally);
        if let Some(header) = header {
            let pair = (header.source, header.destination);
            if counters.pairs.len() < MAX_PAIRS || counters.pairs.contains_key(&pair) {
                counters.pairs.entry(pair).or_default().merge(tally);
            }
        }
        self.sample(now).offered_bytes += tally.bytes;
    }

    pub fn dropped(&mut self, now: Duration, why: DropCause, bytes: usize) {
        let sample = self.sample(now);
        match why {
            DropCause::Lost => sample.lost_packets += 1,
            DropCause::QueueFull | DropCause::Cut => sample.dropped_packets += 1,
        }
        match why {
            DropCause::Lost => self.counters.lost.add(bytes),
            DropCause::QueueFull => self.counters.tail_dropped.add(bytes),
            DropCause::Cut => self.counters.cut_dropped.add(bytes),
        }
    }

    /// Packets on their way that a cut met at the far end.
    pub fn dropped_many(&mut self, now: Duration, tally: Tally) {
        self.counters.cut_dropped.merge(tally);
        self.sample(now).dropped_packets += tally.packets;
    }

    pub fn delivered(&mut self, now: Duration, class: usize, tally: Tally) {
        self.counters.delivered.merge(tally);
        self.counters.classes[class].delivered.merge(tally);
        let sample = self.sample(now);
        sample.delivered_bytes += tally.bytes;
        sample.class_bytes[class] += tally.bytes;
    }

    pub fn duplicated(&mut self, tally: Tally) {
        self.counters.duplicated.merge(tally);
    }

    pub fn reordered(&mut self, tally: Tally) {
        self.counters.reordered.merge(tally);
    }

    pub fn write_failed(&mut self, tally: Tally) {
        self.counters.write_failed.merge(tally);
    }

    pub fn queued(&mut self, now: Duration, queue_bytes: u64) {
        let sample = self.sample(now);
        sample.queue_bytes = sample.queue_bytes.max(queue_bytes);
    }

    fn sample(&mut self, now: Duration) -> &mut Sample {
        let slot = (now.as_nanos() / SAMPLE_TIME.as_nanos()) as u32;
        let at = SAMPLE_TIME * slot;
        if self.samples.back().is_none_or(|last| last.at < at) {
            if self.samples.len() == MAX_SAMPLES {
                self.samples.pop_front();
            }
            let class_bytes = vec![0; self.rules.len() + 1];
            self.samples.push_back(Sample { at, class_bytes, ..Sample::default() });
        }
        self.samples.back_mut().expect("one was just pushed if there was none")
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::tests::udp_frame;
    use super::*;

    #[test]
    fn packets_are_counted_in_the_first_class_that_fits_and_by_address() {
        let mut ledger = Ledger::new(vec![
            PacketClass::new("gateways", PacketMatch::udp_port(0x1152)),
            PacketClass::new("client", PacketMatch::to("203.0.113.2".parse().unwrap())),
        ]);
        let header = udp_frame(100, 0).header();
        let class = ledger.classify(header.as_ref());
        assert_eq!(class, 0);
        let other_port = header.map(|header| PacketHeader { destination_port: 80, ..header });
        assert_eq!(ledger.classify(other_port.as_ref()), 1);
        assert_eq!(ledger.classify(None), 2);
        ledger.offered(Duration::ZERO, class, header.as_ref(), Tally { packets: 2, bytes: 200 });
        ledger.delivered(Duration::from_millis(120), class, Tally { packets: 2, bytes: 200 });
        let counters = ledger.counters();
        assert_eq!(counters.class("gateways").unwrap().delivered.bytes, 200);
        assert_eq!(counters.class("gateways").unwrap().pairs.len(), 1);
        let samples = ledger.samples();
        assert_eq!(samples.len(), 2);
        assert_eq!((samples[1].at, samples[1].class_bytes[0]), (Duration::from_millis(100), 200));
    }

    #[test]
    fn the_row_of_samples_and_the_pairs_are_bounded() {
        let mut ledger = Ledger::new(Vec::new());
        for slot in 0..(MAX_SAMPLES as u32 + 5) {
            ledger.queued(SAMPLE_TIME * slot, 1);
        }
        assert_eq!(ledger.samples().len(), MAX_SAMPLES);
        let header = udp_frame(100, 0).header().unwrap();
        for number in 0..(MAX_PAIRS as u32 + 5) {
            let source = IpAddr::V4(number.into());
            let header = PacketHeader { source, ..header };
            ledger.offered(Duration::ZERO, 0, Some(&header), Tally { packets: 1, bytes: 1 });
        }
        assert_eq!(ledger.counters().class("other").unwrap().pairs.len(), MAX_PAIRS);
        assert_eq!(ledger.counters().offered.packets, MAX_PAIRS as u64 + 5);
    }
}
