//! Limits and times of repair, with what they cost.
//!
//! The times follow the path's round trip, which the caller measures; none is measured here.

use std::time::Duration;

/// How much a numbered datagram may be ahead of the oldest missing one: `back` has sixteen bits.
pub(super) const WINDOW: usize = u16::MAX as usize;
/// The round trip that is assumed until [`set_rtt`](super::Repair::set_rtt) is called.
const INITIAL_RTT: Duration = Duration::from_millis(100);

/// Bounds of repair, per peer.
#[derive(Debug, Clone)]
pub struct RepairConfig {
    /// Bytes of sent datagrams kept for repeating. Default 24 MiB: 400 ms at 500 Mbit/s. A smaller one
    /// cannot repair fast flows on long paths.
    pub max_sent_bytes: usize,
    /// Sent datagrams kept for repeating, at most 65,535, which is the default. Costs 80 bytes each.
    pub max_sent: usize,
    /// How often one datagram is repeated. Default 6. It bounds what a peer's lies can make us send.
    pub max_repeats: u8,
    /// How often the last datagram is sent again when nothing is heard about it. Default 3.
    pub max_probes: u8,
    /// Packets that wait for an earlier one of their flow. Default 32,768: 700 ms at 500 Mbit/s.
    pub max_waiting: usize,
    /// Bytes of them. Default 24 MiB. When full, the oldest gap is given up.
    pub max_waiting_bytes: usize,
    /// Gaps asked for at once. Default 2048: 10 % loss at 500 Mbit/s and 200 ms. Costs 56 bytes each.
    pub max_gaps: usize,
    /// The longest run of lost datagrams that is repaired. Default 16,384: 370 ms at 500 Mbit/s. Behind a
    /// longer one everything begins anew, and what waited goes on.
    pub max_jump: u16,
    /// Later datagrams that must have come before a missing one is asked for (RFC 9002, 6.1.1). Default 3.
    pub reorder_threshold: u32,
    /// Round trips after which a missing datagram is given up. Default 3: two requests with their doubles.
    pub deadline_round_trips: u32,
    /// The shortest and the longest deadline. Default 50 and 400 ms: shorter gives up on a host that was
    /// busy for a moment; longer than a TCP retransmission timeout helps nobody.
    pub deadline: (Duration, Duration),
    /// How long the receiver waits before it reports that all is well. Default 10 ms: 100 reports of 13
    /// bytes a second at most.
    pub report_delay: Duration,
    /// How long parity is sent after the peer asked for something. Default 10 s; 0 sends none. Costs 3 % of
    /// the rate meanwhile; without it a fast flow on a lossy path has twice the round trip.
    pub parity_hold: Duration,
    /// The shortest time between two rounds of requests. Default 500 us.
    pub ask_spacing: Duration,
}

impl Default for RepairConfig {
    fn default() -> Self {
        Self {
            max_sent_bytes: 24 << 20,
            max_sent: WINDOW,
            max_repeats: 6,
            max_probes: 3,
            max_waiting: 32_768,
            max_waiting_bytes: 24 << 20,
            max_gaps: 2048,
            max_jump: 16_384,
            reorder_threshold: 3,
            deadline_round_trips: 3,
            deadline: (Duration::from_millis(50), Duration::from_millis(400)),
            report_delay: Duration::from_millis(10),
            parity_hold: Duration::from_secs(10),
            ask_spacing: Duration::from_micros(500),
        }
    }
}

/// The times that follow from the round trip.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    rtt: Duration,
    /// How long a missing datagram is worth waiting for, and a sent one worth keeping.
    pub deadline: Duration,
    /// A gap that no later datagram made ripe is asked for after this: an eighth of a round trip, as
    /// RFC 9002's time threshold allows beyond the one that an acknowledgement takes.
    pub reorder: Duration,
    /// Each request is made twice, this far apart: a burst or a lost report then costs an eighth of a
    /// round trip and not a whole one.
    pub second_ask: Duration,
    /// From a request's double to the next request: together a round trip and a quarter.
    pub next_ask: Duration,
    /// A datagram that was repeated less than this ago is not repeated for the same request come twice.
    pub repeat_spacing: Duration,
    /// Silence after which the last datagram is sent again.
    pub probe: Duration,
}

impl Timing {
    pub(super) fn initial(config: &RepairConfig) -> Self {
        Self::new(config, INITIAL_RTT)
    }

    pub(super) fn new(config: &RepairConfig, rtt: Duration) -> Self {
        const GRANULARITY: Duration = Duration::from_millis(1);
        let (least, most) = config.deadline;
        let eighth = (rtt / 8).max(GRANULARITY);
        Self {
            rtt,
            deadline: (rtt * config.deadline_round_trips).max(least).min(most),
            reorder: eighth,
            second_ask: eighth,
            next_ask: rtt + eighth,
            repeat_spacing: eighth / 2,
            probe: rtt * 3 / 2 + config.report_delay + GRANULARITY,
        }
    }

    /// An answer to a request made now would come before `deadline`.
    pub(super) fn answer_comes_by(&self, now: Duration, deadline: Duration) -> bool {
        now + self.rtt <= deadline
    }
}
