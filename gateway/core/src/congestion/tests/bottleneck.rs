//! A bottleneck in virtual time: one line of a rate with a drop-tail queue, random loss, delay, and senders that share it.
//! Or a policer: it drops what exceeds the rate by more than a burst, and delays nothing.
//!
//! Receivers acknowledge every eighth packet, at a gap, or after 25 ms, as the gateways ask of each other. Packets are lost
//! for a sender when three later ones have arrived, or when nothing was heard for a while. There is no reordering and no jitter.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::{Bytes, Rate};

/// Bytes of a full packet.
pub const PACKET_BYTES: u64 = 1400;

const ACK_EVERY: usize = 8;
const ACK_DELAY: Duration = Duration::from_millis(25);
const REORDERING: u64 = 3;

/// A congestion controller at work.
pub trait Sender {
    fn handle_sent(&mut self, now: Duration, bytes: u64);
    fn handle_acked(&mut self, now: Duration, sent: Duration, bytes: u64);
    fn handle_acks_end(&mut self, now: Duration, in_flight_bytes: u64, app_limited: bool);
    fn handle_lost(&mut self, now: Duration, sent: Duration, bytes: u64);
    /// Without a pace it sends whenever the window allows.
    fn pace(&self) -> Option<Rate>;
    fn window_bytes(&self) -> u64;
}

/// The path between all senders and their receivers.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    pub rate: Rate,
    pub rtt: Duration,
    pub queue_bytes: u64,
    pub loss: f64,
    /// The burst of a policer, which has no queue.
    pub policer_bytes: Option<u64>,
}

impl Path {
    pub fn new(rate: Rate, rtt: Duration, queue_in_held: f64, loss: f64) -> Self {
        let queue_bytes = (rate.bytes_in(rtt).0 as f64 * queue_in_held) as u64;
        Self { rate, rtt, queue_bytes: queue_bytes.max(4 * PACKET_BYTES), loss, policer_bytes: None }
    }

    pub fn policed(rate: Rate, rtt: Duration, burst_bytes: u64) -> Self {
        Self { rate, rtt, queue_bytes: 0, loss: 0.0, policer_bytes: Some(burst_bytes) }
    }
}

struct Packet {
    number: u64,
    sent: Duration,
    arrives: bool,
}

/// What one acknowledgement covers: all packets up to this one that arrived.
struct Ack {
    at: Duration,
    largest: u64,
}

/// One sender with its receiver.
pub struct Flow {
    pub sender: Box<dyn Sender>,
    begins: Duration,
    /// What the application offers; `None`: more than the path takes.
    pub offered: Option<Rate>,
    offered_until: Duration,
    next_number: u64,
    in_flight: VecDeque<Packet>,
    in_flight_bytes: u64,
    next_send: Duration,
    unacknowledged: usize,
    first_unacknowledged: Duration,
    last_arrived: u64,
    gap: bool,
    acks: VecDeque<Ack>,
    last_heard: Duration,
    pub delivered_bytes: u64,
    pub lost_packets: u64,
}

impl Flow {
    pub fn new(sender: Box<dyn Sender>, begins: Duration) -> Self {
        Self {
            sender,
            begins,
            offered: None,
            offered_until: begins,
            next_number: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            next_send: begins,
            unacknowledged: 0,
            first_unacknowledged: Duration::ZERO,
            last_arrived: 0,
            gap: false,
            acks: VecDeque::new(),
            last_heard: begins,
            delivered_bytes: 0,
            lost_packets: 0,
        }
    }

    /// Of what was acknowledged or given up, the share that was lost.
    pub fn lost(&self) -> f64 {
        let lost_bytes = (self.lost_packets * PACKET_BYTES) as f64;
        lost_bytes / (lost_bytes + self.delivered_bytes as f64).max(1.0)
    }

    fn may_send(&self) -> bool {
        self.in_flight_bytes + PACKET_BYTES <= self.sender.window_bytes()
    }

    fn send_at(&self) -> Option<Duration> {
        let ready = self.offered.map_or(Duration::ZERO, |_| self.offered_until);
        self.may_send().then(|| self.next_send.max(ready).max(self.begins))
    }

    fn ack_at(&self, rtt: Duration) -> Option<Duration> {
        let delayed = (self.unacknowledged > 0).then(|| self.first_unacknowledged + ACK_DELAY + rtt / 2);
        self.acks.front().map(|ack| ack.at).or(delayed)
    }

    /// When the sender gives up waiting.
    fn timeout_at(&self, rtt: Duration) -> Option<Duration> {
        (!self.in_flight.is_empty()).then(|| self.last_heard + 3 * rtt + Duration::from_secs(1))
    }

    fn arrive(&mut self, number: u64, at: Duration, rtt: Duration) {
        if self.unacknowledged > 0 && self.first_unacknowledged + ACK_DELAY < at {
            self.acknowledge(self.first_unacknowledged + ACK_DELAY + rtt / 2);
        }
        self.gap |= number > self.last_arrived + 1;
        if self.unacknowledged == 0 {
            self.first_unacknowledged = at;
        }
        self.unacknowledged += 1;
        self.last_arrived = number;
        if self.unacknowledged >= ACK_EVERY || self.gap {
            self.acknowledge(at + rtt / 2);
        }
    }

    fn acknowledge(&mut self, at: Duration) {
        self.acks.push_back(Ack { at, largest: self.last_arrived });
        (self.unacknowledged, self.gap) = (0, false);
    }

    fn handle_ack(&mut self, now: Duration, rtt: Duration) {
        if self.acks.is_empty() {
            self.acknowledge(self.first_unacknowledged + ACK_DELAY + rtt / 2);
        }
        let Some(ack) = self.acks.pop_front() else { return };
        self.last_heard = now;
        let mut waiting = VecDeque::new();
        let mut lost = Vec::new();
        while self.in_flight.front().is_some_and(|packet| packet.number <= ack.largest) {
            let Some(packet) = self.in_flight.pop_front() else { break };
            if packet.arrives {
                self.in_flight_bytes -= PACKET_BYTES;
                self.delivered_bytes += PACKET_BYTES;
                self.sender.handle_acked(now, packet.sent, PACKET_BYTES);
            } else if packet.number + REORDERING <= ack.largest {
                lost.push(packet);
            } else {
                waiting.push_front(packet);
            }
        }
        for packet in waiting {
            self.in_flight.push_front(packet);
        }
        let app_limited = self.offered.is_some_and(|_| self.offered_until > now) && self.may_send();
        self.sender.handle_acks_end(now, self.in_flight_bytes, app_limited);
        self.lose(now, lost);
    }

    fn handle_timeout(&mut self, now: Duration) {
        let lost: Vec<Packet> = self.in_flight.drain(..).collect();
        self.last_heard = now;
        self.lose(now, lost);
    }

    fn lose(&mut self, now: Duration, lost: Vec<Packet>) {
        let Some(last) = lost.last().map(|packet| packet.sent) else { return };
        let bytes = lost.len() as u64 * PACKET_BYTES;
        self.lost_packets += lost.len() as u64;
        self.in_flight_bytes -= bytes;
        self.sender.handle_lost(now, last, bytes);
    }
}

/// What waited in the queue, seen by each packet that came.
#[derive(Debug, Clone, Default)]
pub struct Queue {
    pub waits_ms: Vec<f64>,
}

impl Queue {
    pub fn mean_ms(&self) -> f64 {
        self.waits_ms.iter().sum::<f64>() / self.waits_ms.len().max(1) as f64
    }

    pub fn most_ms(&self) -> f64 {
        self.waits_ms.iter().copied().fold(0.0, f64::max)
    }
}

/// The world.
pub struct Network {
    pub now: Duration,
    pub path: Path,
    pub flows: Vec<Flow>,
    pub queue: Queue,
    pub carried_bytes: u64,
    free_at: Duration,
    /// What the policer lets pass at once, as of a time.
    tokens_bytes: f64,
    tokens_at: Duration,
    random: u64,
}

impl Network {
    pub fn new(path: Path, flows: Vec<Flow>) -> Self {
        Self {
            now: Duration::ZERO,
            path,
            flows,
            queue: Queue::default(),
            carried_bytes: 0,
            free_at: Duration::ZERO,
            tokens_bytes: path.policer_bytes.unwrap_or_default() as f64,
            tokens_at: Duration::ZERO,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// From now on the line has another rate; what waits takes as much longer or shorter.
    pub fn set_rate(&mut self, rate: Rate) {
        self.refill_tokens();
        let waits = self.free_at.saturating_sub(self.now);
        self.free_at = self.now + waits.mul_f64(self.path.rate.0 as f64 / rate.0 as f64);
        self.path.rate = rate;
    }

    /// Forgets what was measured.
    pub fn measure_anew(&mut self) {
        self.queue = Queue::default();
        self.carried_bytes = 0;
        for flow in &mut self.flows {
            (flow.delivered_bytes, flow.lost_packets) = (0, 0);
        }
    }

    /// The share of the line that was used since the measurement began `time` ago.
    pub fn used(&self, time: Duration) -> f64 {
        self.carried_bytes as f64 / self.path.rate.bytes_in(time).0 as f64
    }

    pub fn run_until(&mut self, end: Duration) {
        while let Some((at, index, event)) = self.next_event().filter(|(at, _, _)| *at < end) {
            self.now = at.max(self.now);
            match event {
                Event::Send => self.send(index),
                Event::Ack => self.flows[index].handle_ack(self.now, self.path.rtt),
                Event::Timeout => self.flows[index].handle_timeout(self.now),
            }
        }
        self.now = end;
    }

    fn next_event(&self) -> Option<(Duration, usize, Event)> {
        let mut next: Option<(Duration, usize, Event)> = None;
        for (index, flow) in self.flows.iter().enumerate() {
            let events = [
                (flow.ack_at(self.path.rtt), Event::Ack),
                (flow.send_at(), Event::Send),
                (flow.timeout_at(self.path.rtt), Event::Timeout),
            ];
            for (at, event) in events {
                if let Some(at) = at
                    && next.is_none_or(|(first, _, _)| at < first)
                {
                    next = Some((at, index, event));
                }
            }
        }
        next
    }

    /// A batch as the gateway's socket sends it: what passes in 2 ms, one to ten packets.
    fn send(&mut self, index: usize) {
        let pace = self.flows[index].sender.pace();
        let batch = pace.map_or(1, |pace| pace.bytes_in(Duration::from_millis(2)).0 / PACKET_BYTES);
        let mut sent = 0;
        while sent < batch.clamp(1, 10) && self.flows[index].may_send() {
            self.send_packet(index);
            sent += 1;
        }
        let flow = &mut self.flows[index];
        flow.sender.handle_sent(self.now, sent * PACKET_BYTES);
        let takes = |rate: Rate| rate.time_for(Bytes(sent * PACKET_BYTES)).unwrap_or(Duration::MAX);
        flow.next_send = self.now + pace.map_or(Duration::ZERO, takes);
        if let Some(offered) = flow.offered {
            flow.offered_until = flow.offered_until.max(self.now.saturating_sub(ACK_DELAY)) + takes(offered);
        }
    }

    fn send_packet(&mut self, index: usize) {
        let reached = self.pass();
        let flow = &mut self.flows[index];
        flow.next_number += 1;
        let number = flow.next_number;
        if flow.in_flight.is_empty() {
            flow.last_heard = self.now;
        }
        flow.in_flight.push_back(Packet { number, sent: self.now, arrives: reached.is_some() });
        flow.in_flight_bytes += PACKET_BYTES;
        if let Some(at) = reached {
            self.carried_bytes += PACKET_BYTES;
            flow.arrive(number, at + self.path.rtt / 2, self.path.rtt);
        }
    }

    /// When a packet that comes now is through the bottleneck; `None` if it is lost there.
    fn pass(&mut self) -> Option<Duration> {
        let survives = self.random() >= self.path.loss;
        if self.path.policer_bytes.is_some() {
            self.refill_tokens();
            let passes = survives && self.tokens_bytes >= PACKET_BYTES as f64;
            self.tokens_bytes -= if passes { PACKET_BYTES as f64 } else { 0.0 };
            return passes.then_some(self.now);
        }
        let waits = self.free_at.saturating_sub(self.now);
        self.queue.waits_ms.push(waits.as_secs_f64() * 1e3);
        let full = self.path.rate.bytes_in(waits).0 + PACKET_BYTES > self.path.queue_bytes + PACKET_BYTES;
        if !survives || full {
            return None;
        }
        let takes = self.path.rate.time_for(Bytes(PACKET_BYTES)).unwrap_or(Duration::MAX);
        self.free_at = self.free_at.max(self.now) + takes;
        Some(self.free_at)
    }

    fn refill_tokens(&mut self) {
        let Some(burst_bytes) = self.path.policer_bytes else { return };
        let added_bytes = (self.now - self.tokens_at).as_secs_f64() * self.path.rate.0 as f64;
        self.tokens_bytes = (self.tokens_bytes + added_bytes).min(burst_bytes as f64);
        self.tokens_at = self.now;
    }

    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Send,
    Ack,
    Timeout,
}
