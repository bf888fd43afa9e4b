//! What is done about a queue and about losses while nothing is probed: the path became slower, or others use it too.
//!
//! ```text
//!            a round without a short round trip, or a long queue at once
//!    alone ---------------------------------------------------------------> draining
//!      ^  ^                                                                   |   |
//!      |  '----------------- round trips are short again ---------------------'   | still queued, and the rate
//!      |                                                                          | does not fall any more
//!      '-------- no queue for 3 s -------- beside somebody's queue <--------------'
//! ```
//!
//! Drain and ProbeRtt send half of what is believed. If less than that is delivered, the path carries less than half, and
//! nothing drains: then what is delivered is believed. Without this the queue would pass for the path's round trip.
//!
//! Beside somebody else's queue giving way leads to nothing but starving: CUBIC takes whatever is left and fills the queue all
//! the same. There the rate falls to what is delivered, but not far, and the next probe wins it back. Probes are made in
//! `phase`, not here.

use std::time::Duration;

use super::phase::Phase;
use super::round::Ended;
use super::{Congestion, per_mille, scaled};
use crate::units::Rate;

/// A round trip that is longer by this is queued, or by a 32nd if that is more.
const SHORT_QUEUE: Duration = Duration::from_millis(4);

/// How long a receiver may keep an acknowledgement back (RFC 9000, 18.2: `max_ack_delay`), unless so many packets come.
/// Where that many take longer, every round trip may be longer by that, and is no queue.
const ACK_DELAY: Duration = Duration::from_millis(25);
const ACK_PACKETS: u64 = 10;

/// A queue of a quarter of the round trip, and at least of this, is not waited with until the round ends.
const LONG_QUEUE: Duration = Duration::from_millis(12);

/// A rate that is delivered while a queue stands is what the path carries; down to this, in per mille, it is as believed.
const SAME_PER_MILLE: u64 = 970;

/// Below this, in per mille, the belief is far off, and what is done about the queue has not had its effect yet.
const FALLING_PER_MILLE: u64 = 900;

/// If draining took a rate lower than this, in per mille, the path is another one.
const OTHER_PATH_PER_MILLE: u64 = 750;

/// Somebody else's queue is gone when none was seen for this long: CUBIC's comes and goes every few seconds.
const FOREIGN_MEMORY: Duration = Duration::from_secs(3);

/// Beside it, what of the rate is held at least until the next probe, in per mille.
const HELD_PER_MILLE: u64 = 850;

/// What of a rate or window is left at least after any other round that lowers it, in per mille.
pub(super) const BACK_OFF_PER_MILLE: u64 = 700;

/// What is known of the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    /// No round trip of the last round was short.
    standing: bool,
    last_seen: Duration,
    /// Down is or was made to drain it, and no round in Cruise since was without.
    draining: bool,
    /// That did not help.
    foreign: bool,
    /// The rate was lowered because of it.
    lowered: bool,
    recent_rtts: [Duration; 3],
}

impl Queue {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            standing: false,
            last_seen: now,
            draining: false,
            foreign: false,
            lowered: false,
            recent_rtts: [Duration::ZERO; 3],
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining
    }

    pub(super) fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// A queue stands that this side helps to drain.
    pub(super) fn is_own(&self) -> bool {
        self.standing && !self.foreign
    }

    pub(super) fn handle_rtt(&mut self, rtt: Duration) {
        self.recent_rtts.rotate_left(1);
        self.recent_rtts[2] = rtt;
    }

    pub(super) fn handle_round(&mut self, now: Duration, ended: &Ended) {
        self.standing = ended.queued;
        if ended.queued {
            self.last_seen = now;
        }
    }
}

impl Congestion {
    /// Whether a round trip is so long that something waits.
    pub(super) fn is_queued(&self, rtt: Duration) -> bool {
        let Some(min_rtt) = self.min_rtt.get() else { return false };
        rtt > min_rtt + (min_rtt / 32).max(SHORT_QUEUE) + self.ack_delay()
    }

    fn ack_delay(&self) -> Duration {
        let passes = self.bandwidth().unwrap_or_default().bytes_in(ACK_DELAY).0;
        let sparse = passes < ACK_PACKETS.saturating_mul(self.settings.packet_bytes);
        if sparse { ACK_DELAY } else { Duration::ZERO }
    }

    /// The last few round trips were all queued.
    pub(super) fn sees_queue(&self) -> bool {
        self.queue.recent_rtts.iter().min().is_some_and(|rtt| self.is_queued(*rtt))
    }

    /// And that so much that it is not waited with.
    pub(super) fn sees_new_long_queue(&self) -> bool {
        let (Some(min_rtt), Some(rtt)) = (self.min_rtt.get(), self.queue.recent_rtts.iter().min()) else {
            return false;
        };
        let known = self.queue.draining || self.queue.foreign;
        !known && *rtt > min_rtt + (min_rtt / 4).max(LONG_QUEUE) + self.ack_delay()
    }

    pub(super) fn end_cruise_round(&mut self, now: Duration, ended: &Ended) {
        // What the first round delivered was sent before it.
        if self.cycle.rounds < 2 {
            return;
        }
        if !ended.queued {
            self.queue.draining = false;
            self.queue.foreign &= now.saturating_sub(self.queue.last_seen) < FOREIGN_MEMORY;
        }
        let falls = match (ended.delivered, self.bandwidth()) {
            (Some(delivered), Some(believed)) => delivered < scaled(believed, FALLING_PER_MILLE),
            (None, _) | (_, None) => false,
        };
        if ended.queued || ended.excess {
            self.lower(ended);
        }
        if !ended.queued || self.queue.foreign {
            return;
        }
        if self.queue.draining && !falls {
            self.queue.foreign = true;
        } else {
            self.drain_queue(now);
        }
    }

    pub(super) fn drain_queue(&mut self, now: Duration) {
        self.queue.draining = true;
        self.enter(now, Phase::Down);
    }

    /// A round of Down ends that is not the one in which the probe before it is judged.
    pub(super) fn end_draining_round(&mut self, ended: &Ended) {
        if self.queue.draining && ended.queued || ended.excess {
            self.lower(ended);
        }
    }

    /// A round of Drain or ProbeRtt ends, and the path is not empty yet. Nor will it be, if less is delivered than is sent.
    pub(super) fn end_undrained_round(&mut self, ended: &Ended) {
        let Some(seen) = ended.delivered else { return };
        let sent = self.pace();
        // Somebody who sends more, to probe, takes a little of what is delivered.
        let least = if self.queue.foreign { scaled(sent, FALLING_PER_MILLE) } else { sent };
        // What the first round delivered was sent before it.
        if self.cycle.rounds >= 2 && ended.queued && seen < least {
            self.max_bandwidth.replace(seen);
            self.bandwidth_lo = None;
        }
    }

    /// Down took too long: whatever waits is not ours.
    pub(super) fn handle_undrained(&mut self, ended: &Ended) {
        self.queue.foreign = ended.queued;
    }

    /// Nothing is queued any more as far as this side knows.
    pub(super) fn handle_drained(&mut self) {
        let much_lower =
            |lo: &Rate| self.max_bandwidth.get().is_some_and(|most| *lo < scaled(most, OTHER_PATH_PER_MILLE));
        if self.queue.draining
            && let Some(lo) = self.bandwidth_lo.filter(much_lower)
        {
            self.max_bandwidth.replace(lo);
            self.bandwidth_lo = None;
        }
    }

    /// Before a probe: what a queue has taught stays, what losses have is tried again.
    pub(super) fn forget_lower_bounds(&mut self) {
        let lo = self.bandwidth_lo.take();
        if let Some(lo) = lo.filter(|_| self.queue.lowered) {
            self.max_bandwidth.replace(lo);
        }
        self.queue.lowered = false;
        self.in_flight_lo_bytes = None;
    }

    /// Takes what is delivered now for what the path carries, until the next probe.
    fn lower(&mut self, ended: &Ended) {
        let (Some(seen), Some(believed)) = (ended.delivered, self.bandwidth()) else { return };
        if seen >= scaled(believed, SAME_PER_MILLE) && !ended.excess {
            return;
        }
        let least = match self.queue.foreign && !ended.excess {
            true => scaled(self.max_bandwidth.get().unwrap_or_default(), HELD_PER_MILLE),
            false => scaled(believed, BACK_OFF_PER_MILLE),
        };
        self.bandwidth_lo = Some(seen.max(least).min(believed));
        self.queue.lowered |= ended.queued;
        if ended.excess {
            let least_bytes = per_mille(self.window().0, BACK_OFF_PER_MILLE);
            self.in_flight_lo_bytes = Some(ended.delivered_bytes.max(least_bytes));
        }
    }
}
