//! What the controller is doing, when it does something else, and how it probes. The diagram is in `mod.rs`.
//!
//! Everything here happens when acknowledgements or losses arrive: a path that is silent changes nothing. Pace and window are
//! computed in `mod.rs` from the factors given here; what a queue means outside of probing is decided in `queue`.

use std::time::Duration;

use super::queue::BACK_OFF_PER_MILLE;
use super::round::{Ended, Round};
use super::sample::Sample;
use super::{Congestion, per_mille, scaled};
use crate::units::Rate;

/// In Startup a path that grows less than this per round, in per mille, is full ...
const GROWTH_PER_MILLE: u64 = 1250;

/// ... after so many rounds.
const FULL_ROUNDS: u32 = 3;

/// In Up a rate that grows less than this per round, in per mille, is all there is.
const UP_GROWTH_PER_MILLE: u64 = 1030;

/// After so many rounds in which Up found more, the path is a much faster one: it goes on with this pace, in per mille.
const FAST_ROUNDS: u32 = 3;
const FAST_PACE_PER_MILLE: u64 = 2000;

/// A rate from this share of the cap on, in per mille, is the cap: there is nothing to probe for.
const AT_CAP_PER_MILLE: u64 = 960;

/// The queue that a probe may make before its effect is seen. It halves when a probe overflows the path's queue, to this at
/// least, and grows again by a quarter with each that does not.
const PROBE_QUEUE: Duration = Duration::from_millis(30);
const LEAST_PROBE_QUEUE: Duration = Duration::from_millis(4);

/// A probe is at least so much above the rate, in per mille.
const LEAST_PROBE_PER_MILLE: u64 = 40;

/// How long to cruise, and up to how much longer.
const CRUISE: Duration = Duration::from_secs(2);
const CRUISE_SPREAD_MS: u64 = 1000;

/// After loss in Refill also so many round trips at least: an estimate that is far too high is lowered round by round, and
/// only a Refill without loss, from the lower rate, leads to the probe that ends its cycle.
const LOWERING_ROUNDS: u32 = 8;

/// After so many rounds Down and ProbeRtt end, drained or not.
const MAX_DRAIN_ROUNDS: u32 = 6;

/// How much slower to cruise while a queue stands, in per mille.
const QUEUED_PACE_PER_MILLE: u64 = 970;

/// What the controller is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Doubles each round until the path is full.
    Startup,
    /// Gives back what Startup queued.
    Drain,
    /// Gives back what Up queued, or drains a queue that came in Cruise.
    Down,
    /// Sends slightly less than the path carries.
    Cruise,
    /// Fills what Cruise left free, before more is tried.
    Refill,
    /// Sends more than the path is known to carry.
    Up,
    /// Sends little, to see the round trip without a queue.
    ProbeRtt,
}

impl Phase {
    /// The pace, in per mille of the path's rate.
    pub(super) fn usual_pace_per_mille(self) -> u64 {
        match self {
            Self::Startup => 2770,
            Self::Drain | Self::ProbeRtt => 500,
            Self::Down => 750,
            Self::Cruise | Self::Refill => 1000,
            Self::Up => 1250,
        }
    }

    /// The window, in per mille of what the path holds. The pace limits; the window catches what it cannot foresee.
    fn usual_window_per_mille(self) -> u64 {
        match self {
            Self::Startup => 2770,
            Self::Up => 2250,
            Self::Drain | Self::Down | Self::Cruise | Self::Refill => 2000,
            Self::ProbeRtt => 1000,
        }
    }
}

/// Where in its cycle the controller is.
#[derive(Debug, Clone)]
pub(super) struct Cycle {
    /// Rounds in this phase.
    pub(super) rounds: u32,
    probe_at: Duration,
    random: u64,
    /// The rate against which growth is measured, and for how many rounds there was none.
    base: Rate,
    full_rounds: u32,
    probe_queue: Duration,
    /// The last probe overflowed the queue.
    overflowed: bool,
    /// For how many rounds this probe has found more.
    grew_rounds: u32,
    /// Acknowledgements of what the last probe sent are still to come.
    unjudged: bool,
    /// ProbeRtt has emptied the path.
    emptied: bool,
}

impl Cycle {
    pub(super) fn new(now: Duration, seed: u64) -> Self {
        Self {
            rounds: 0,
            probe_at: now,
            random: seed | 1,
            base: Rate(0),
            full_rounds: 0,
            probe_queue: PROBE_QUEUE,
            overflowed: false,
            grew_rounds: 0,
            unjudged: false,
            emptied: false,
        }
    }

    fn spread(&mut self) -> Duration {
        // Xorshift (Marsaglia 2003): any spread will do, and it repeats with its seed.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        Duration::from_millis(self.random % CRUISE_SPREAD_MS)
    }
}

impl Congestion {
    /// Acknowledgements arrived.
    pub(super) fn advance(&mut self, now: Duration, sample: &Sample) {
        self.queue.handle_rtt(sample.rtt);
        if self.round.handle_sample(now, sample) {
            self.end_round(now);
        }
        match self.phase {
            Phase::Drain if self.in_flight_bytes <= self.held_bytes() => {
                // Startup may have ended early: look again soon.
                self.cycle.probe_at = now + 4 * self.min_rtt.get().unwrap_or_default();
                self.enter(now, Phase::Cruise);
            }
            Phase::Down if self.in_flight_bytes <= self.held_bytes() => {
                self.handle_drained();
                self.enter(now, Phase::Cruise);
            }
            Phase::Cruise if self.sees_new_long_queue() => self.drain_queue(now),
            Phase::Cruise if now >= self.cycle.probe_at && !self.queue.is_draining() => self.refill(now),
            Phase::Up if self.cycle.rounds >= 1 && self.sees_queue() => self.enter(now, Phase::Down),
            Phase::Startup
            | Phase::Drain
            | Phase::Down
            | Phase::Cruise
            | Phase::Refill
            | Phase::Up
            | Phase::ProbeRtt => {}
        }
        let may_probe = !matches!(self.phase, Phase::Startup | Phase::ProbeRtt);
        if may_probe && self.min_rtt.needs_probe(now) {
            self.enter(now, Phase::ProbeRtt);
        }
    }

    /// Packets were lost, the last of which was sent when so much was in flight.
    pub(super) fn advance_on_loss(&mut self, now: Duration, in_flight_bytes: u64) {
        let too_much = match self.phase {
            Phase::Startup => self.losses.is_excess_in_startup(),
            Phase::Refill | Phase::Up => self.losses.is_excess(),
            Phase::Drain | Phase::Down | Phase::Cruise | Phase::ProbeRtt => false,
        };
        if !too_much {
            return;
        }
        let least_bytes = per_mille(self.held_bytes(), BACK_OFF_PER_MILLE);
        self.in_flight_hi_bytes = Some(in_flight_bytes.max(least_bytes));
        match self.phase {
            Phase::Startup => self.enter(now, Phase::Drain),
            Phase::Refill | Phase::Up => {
                if self.phase == Phase::Refill {
                    self.cruise_longer(now);
                }
                self.cycle.probe_queue = (self.cycle.probe_queue / 2).max(LEAST_PROBE_QUEUE);
                self.cycle.overflowed = true;
                self.enter(now, Phase::Down);
            }
            Phase::Drain | Phase::Down | Phase::Cruise | Phase::ProbeRtt => {}
        }
    }

    fn cruise_longer(&mut self, now: Duration) {
        let lowering = LOWERING_ROUNDS * self.min_rtt.get().unwrap_or_default();
        self.cycle.probe_at = now + CRUISE.max(lowering) + self.cycle.spread();
    }

    pub(super) fn enter(&mut self, now: Duration, phase: Phase) {
        match phase {
            Phase::Up => {
                self.cycle.probe_at = now + CRUISE + self.cycle.spread();
                self.cycle.base = self.max_bandwidth.get().unwrap_or_default();
                (self.cycle.unjudged, self.cycle.grew_rounds) = (true, 0);
            }
            Phase::ProbeRtt => self.cycle.emptied = false,
            Phase::Startup | Phase::Drain | Phase::Down | Phase::Cruise | Phase::Refill => {}
        }
        self.phase = phase;
        self.cycle.rounds = 0;
        self.losses.end_round(false);
        self.round = Round::new(now, self.sampler.delivered_bytes());
    }

    /// The pace, in per mille of the path's rate. On a long path a probe begins gently: what it sends too much is seen only
    /// after a round trip. Beside somebody who keeps a queue anyway, it does not.
    pub(super) fn pace_per_mille(&self) -> u64 {
        let usual = self.phase.usual_pace_per_mille();
        match self.phase {
            Phase::Cruise if self.queue.is_own() => QUEUED_PACE_PER_MILLE,
            Phase::Up if self.cycle.grew_rounds >= FAST_ROUNDS => FAST_PACE_PER_MILLE,
            Phase::Up if self.cycle.grew_rounds == 0 && !self.queue.is_foreign() => {
                let rtt_us = self.min_rtt.get().unwrap_or_default().as_micros().max(1);
                let extra = self.cycle.probe_queue.as_micros() * 1000 / rtt_us;
                let extra = u64::try_from(extra).unwrap_or(u64::MAX).max(LEAST_PROBE_PER_MILLE);
                usual.min(extra.saturating_add(1000))
            }
            Phase::Startup
            | Phase::Drain
            | Phase::Down
            | Phase::Cruise
            | Phase::Refill
            | Phase::Up
            | Phase::ProbeRtt => usual,
        }
    }

    /// The window, in per mille of what the path holds. While a queue of its own making is drained nothing is added to it.
    pub(super) fn window_per_mille(&self) -> u64 {
        let draining = self.phase == Phase::Down && self.queue.is_draining();
        if draining { 1000 } else { self.phase.usual_window_per_mille() }
    }

    fn end_round(&mut self, now: Duration) {
        self.cycle.rounds = self.cycle.rounds.saturating_add(1);
        let ended = self.judge_round(now);
        let settled = self.phase == Phase::Cruise && self.cycle.rounds > 1;
        self.queue.handle_round(now, &ended);
        self.losses.end_round(settled && !ended.queued);
        self.round = Round::new(now, self.sampler.delivered_bytes());
        match self.phase {
            Phase::Startup => self.end_startup_round(now, &ended),
            Phase::Drain => self.end_undrained_round(&ended),
            Phase::Down => self.end_down_round(now, &ended),
            Phase::Cruise => {
                self.judge_probe();
                self.end_cruise_round(now, &ended);
            }
            Phase::Refill => self.enter(now, Phase::Up),
            Phase::Up => self.end_up_round(now, &ended),
            Phase::ProbeRtt => self.end_probe_rtt_round(now, &ended),
        }
    }

    fn end_startup_round(&mut self, now: Duration, ended: &Ended) {
        let seen = self.max_bandwidth.get().unwrap_or_default();
        if seen >= scaled(self.cycle.base, GROWTH_PER_MILLE) {
            (self.cycle.base, self.cycle.full_rounds) = (seen, 0);
        } else if ended.delivered.is_some() {
            self.cycle.full_rounds += 1;
        } else {
            return; // an application that sends little says nothing of the path, nor does a queue that is not its own
        }
        if self.cycle.full_rounds >= FULL_ROUNDS || ended.queued {
            self.enter(now, Phase::Drain);
        }
    }

    fn end_down_round(&mut self, now: Duration, ended: &Ended) {
        if !self.judge_probe() {
            self.end_draining_round(ended);
        }
        if self.cycle.rounds >= MAX_DRAIN_ROUNDS {
            self.handle_undrained(ended);
            self.enter(now, Phase::Cruise);
        }
    }

    /// What the last probe sent is acknowledged: its cycle ends. Says whether that was still to be done. Where the probe
    /// queued nothing, Down is over before its first round is; then it is done in Cruise.
    fn judge_probe(&mut self) -> bool {
        let unjudged = std::mem::take(&mut self.cycle.unjudged);
        if unjudged {
            self.max_bandwidth.end_cycle();
            if !std::mem::take(&mut self.cycle.overflowed) {
                self.cycle.probe_queue = (self.cycle.probe_queue * 5 / 4).min(PROBE_QUEUE);
            }
        }
        unjudged
    }

    fn end_up_round(&mut self, now: Duration, ended: &Ended) {
        let seen = self.max_bandwidth.get().unwrap_or_default();
        if let Some(hi_bytes) = self.in_flight_hi_bytes
            && ended.most_in_flight_bytes >= per_mille(hi_bytes, 900)
        {
            self.in_flight_hi_bytes = Some(per_mille(hi_bytes, GROWTH_PER_MILLE));
        }
        let at_cap = seen >= scaled(self.settings.cap, AT_CAP_PER_MILLE);
        // What was sent in the first round is acknowledged in the second.
        let judged = self.cycle.rounds >= 2;
        let grows = seen >= scaled(self.cycle.base, UP_GROWTH_PER_MILLE);
        if judged {
            self.cycle.base = seen;
            self.cycle.grew_rounds += u32::from(grows);
        }
        if at_cap || (judged && !grows) {
            self.enter(now, Phase::Down);
        }
    }

    fn end_probe_rtt_round(&mut self, now: Duration, ended: &Ended) {
        if !self.cycle.emptied {
            self.end_undrained_round(ended);
        }
        if self.cycle.emptied || self.cycle.rounds >= MAX_DRAIN_ROUNDS {
            self.min_rtt.handle_probed(now, ended.min_rtt);
            self.refill(now);
        }
        self.cycle.emptied |= self.in_flight_bytes <= per_mille(self.held_bytes(), 650);
    }

    fn refill(&mut self, now: Duration) {
        self.forget_lower_bounds();
        self.enter(now, Phase::Refill);
    }
}
