//! How fast to send: a model of the path, made from what it delivers, and a pace and a window that follow from it.
//!
//! ```text
//!            no longer faster, or a queue, or loss       drained
//!   Startup ---------------------------------------> Drain -----.
//!                                                               v
//!      .------> Down ------------------------------------> Cruise
//!      |         ^   drained, or it is not our queue        |   |
//!      |         '------------ a queue, see `queue` --------'   | 2 to 3 s
//!      | a queue, loss, the cap,                                v
//!     Up <--------------------- a round ---------------------- Refill <----------- ProbeRtt
//!        or nothing gained                 Down <---- loss ------'    two rounds   ^
//!                                  any but Startup: no short round trip for 8 s ---'
//! ```
//!
//! In the manner of BBRv3 (draft-ietf-ccwg-bbr; Cardwell et al., *BBR: Congestion-Based Congestion Control*, 2016): the
//! highest delivery rate of late (`filter`, fed by `sample`) times the shortest round trip is what the path holds; more is a
//! queue. A cycle probes for more (Up), gives back what queued (Down) and stays slightly below (Cruise). Four things differ:
//!
//! - Loss is a signal only beyond what the path loses anyway and chance explains (`loss`).
//! - A queue is a signal too: round trips that stay long in Cruise mean a path that became slower, so the rate falls to what
//!   is delivered and the queue is drained at once. If draining does not help, somebody else keeps the queue, and this side
//!   stops giving way until it is gone (`queue`; the idea of two modes is Copa's, Arun and Balakrishnan 2018).
//! - Up ends as soon as its queue is seen and not after three rounds, and on long paths it begins gently: a probe adds some
//!   30 ms of queue, less where that overflowed.
//! - The operator's rate is an upper bound of the pace, and probing ends there.
//!
//! ECN is not used. Whether packets really leave at the pace is the caller's part, as are the clock and the choice of what is
//! sent. Bytes are those that the caller counts, the same in every call.

mod filter;
mod loss;
mod phase;
mod queue;
mod round;
mod sample;

#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::units::{Bytes, Rate};
use filter::{MaxBandwidth, MinRtt};
use loss::LossMeter;
use phase::Cycle;
use queue::Queue;
use round::Round;
use sample::Sampler;

pub use phase::Phase;

/// The least window in packets: below it, loss detection by reordering and sparse acknowledgements does not work.
const MIN_WINDOW_PACKETS: u64 = 10;

/// The window before anything is known, in packets, at most.
const INITIAL_WINDOW_PACKETS: u64 = 128;

/// The least pace, unless the cap is below: a path that seems slower is paced by its acknowledgements.
const MIN_PACE: Rate = Rate(12_500);

/// Room in the window for acknowledgements that the peer delays, and for timers.
const SLACK: Duration = Duration::from_millis(10);

/// The longest round trip that the window allows for.
const MAX_RTT: Duration = Duration::from_secs(3);

/// How far below the estimate to send, in per mille: a path loaded to its last bit never drains its queue.
const MARGIN_PER_MILLE: u64 = 10;

/// What of the bound on what is in flight is left to others while not probing, in per mille.
const HEADROOM_PER_MILLE: u64 = 150;

/// What does not change while a path is used.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// The pace is never higher.
    pub cap: Rate,
    /// The round trip to assume before one is measured.
    pub rtt: Duration,
    /// The length of a full packet in bytes.
    pub packet_bytes: u64,
    /// Spreads the moments of probing, so that flows which began together do not probe together.
    pub seed: u64,
}

/// The controller of one path.
#[derive(Debug, Clone)]
pub struct Congestion {
    settings: Settings,
    phase: Phase,
    cycle: Cycle,
    queue: Queue,
    round: Round,
    sampler: Sampler,
    max_bandwidth: MaxBandwidth,
    min_rtt: MinRtt,
    losses: LossMeter,
    in_flight_bytes: u64,
    /// What the path seems to carry at present, until the next probe.
    bandwidth_lo: Option<Rate>,
    in_flight_lo_bytes: Option<u64>,
    /// What could be in flight without excess loss.
    in_flight_hi_bytes: Option<u64>,
}

impl Congestion {
    /// A path of which nothing is known.
    pub fn new(settings: Settings, now: Duration) -> Self {
        Self {
            settings,
            phase: Phase::Startup,
            cycle: Cycle::new(now, settings.seed),
            queue: Queue::new(now),
            round: Round::new(now, 0),
            sampler: Sampler::new(now),
            max_bandwidth: MaxBandwidth::default(),
            min_rtt: MinRtt::new(now),
            losses: LossMeter::new(settings.packet_bytes),
            in_flight_bytes: 0,
            bandwidth_lo: None,
            in_flight_lo_bytes: None,
            in_flight_hi_bytes: None,
        }
    }

    /// A batch of packets was made.
    pub fn handle_sent(&mut self, now: Duration, bytes: u64) {
        self.sampler.handle_sent(now, bytes, self.in_flight_bytes);
        self.in_flight_bytes = self.in_flight_bytes.saturating_add(bytes);
        self.round.handle_sent(self.in_flight_bytes);
    }

    /// The batch made last was held back by the pace and left only now.
    pub fn handle_departed(&mut self, at: Duration) {
        self.sampler.handle_departed(at);
    }

    /// A packet made at `sent` is acknowledged. [`Congestion::handle_acks_end`] follows.
    pub fn handle_acked(&mut self, sent: Duration, bytes: u64) {
        self.sampler.handle_acked(sent, bytes);
        self.losses.handle_delivered(bytes);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// The packets that one acknowledgement covered have been handled. `in_flight_bytes` is what remains unacknowledged,
    /// `app_limited` says that nothing waits to be sent.
    pub fn handle_acks_end(&mut self, now: Duration, in_flight_bytes: u64, app_limited: bool) {
        self.in_flight_bytes = in_flight_bytes;
        let shortest = self.min_rtt.get().unwrap_or_default();
        let Some(sample) = self.sampler.handle_acks_end(now, in_flight_bytes, app_limited, shortest) else {
            return;
        };
        self.min_rtt.add(now, sample.rtt);
        if let Some(bandwidth) = sample.bandwidth {
            self.max_bandwidth.add(bandwidth, sample.app_limited);
        }
        self.advance(now, &sample);
    }

    /// Packets are taken for lost, the last of which was made at `sent`.
    pub fn handle_lost(&mut self, now: Duration, sent: Duration, bytes: u64) {
        self.losses.handle_lost(bytes);
        let in_flight_bytes = self.sampler.in_flight_at_bytes(sent).unwrap_or(self.in_flight_bytes);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        self.advance_on_loss(now, in_flight_bytes);
    }

    /// Packets have another length now.
    pub fn set_packet_bytes(&mut self, packet_bytes: u64) {
        self.settings.packet_bytes = packet_bytes;
        self.losses.set_packet_bytes(packet_bytes);
    }

    /// The operator's rate is another one now.
    pub fn set_cap(&mut self, cap: Rate) {
        self.settings.cap = cap;
    }

    /// How fast packets may leave: between [`Congestion::min_pace`] and the cap.
    pub fn pace(&self) -> Rate {
        let wanted = match self.bandwidth() {
            None => self.initial_pace(),
            Some(bandwidth) => {
                let pace = scaled(bandwidth, self.pace_per_mille());
                if self.phase == Phase::Startup { pace.max(self.initial_pace()) } else { pace }
            }
        };
        let wanted = scaled(wanted.min(self.settings.cap), 1000 - MARGIN_PER_MILLE);
        wanted.clamp(self.min_pace(), self.settings.cap)
    }

    /// How much may be in flight: between [`Congestion::min_window`] and [`Congestion::max_window`].
    pub fn window(&self) -> Bytes {
        let window_bytes = match (self.bandwidth(), self.min_rtt.get()) {
            (Some(bandwidth), Some(min_rtt)) => self.model_window_bytes(bandwidth, min_rtt),
            (None, _) | (_, None) => self.initial_window_bytes(),
        };
        Bytes(window_bytes.clamp(self.min_window().0, self.max_window().0))
    }

    /// The least pace.
    pub fn min_pace(&self) -> Rate {
        MIN_PACE.min(self.settings.cap)
    }

    /// The least window.
    pub fn min_window(&self) -> Bytes {
        Bytes(MIN_WINDOW_PACKETS.saturating_mul(self.settings.packet_bytes))
    }

    /// The largest window: the longest round trip twice at the cap.
    pub fn max_window(&self) -> Bytes {
        Bytes(self.settings.cap.bytes_in(2 * MAX_RTT).0.max(self.min_window().0))
    }

    /// What the path is believed to carry; `None` before it was measured.
    pub fn bandwidth(&self) -> Option<Rate> {
        let most = self.max_bandwidth.get()?;
        Some(self.bandwidth_lo.map_or(most, |lo| lo.min(most)))
    }

    /// The shortest round trip of late.
    pub fn min_rtt(&self) -> Option<Duration> {
        self.min_rtt.get()
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    fn model_window_bytes(&self, bandwidth: Rate, min_rtt: Duration) -> u64 {
        let held_bytes = bandwidth.min(self.settings.cap).bytes_in(min_rtt.min(MAX_RTT)).0;
        let slack_bytes = bandwidth.min(self.settings.cap).bytes_in(SLACK).0;
        let window_bytes = per_mille(held_bytes, self.window_per_mille());
        let window_bytes = window_bytes.saturating_add(slack_bytes).saturating_add(self.min_window().0);
        let hi_bytes = self.in_flight_hi_bytes.map_or(u64::MAX, |hi| match self.phase {
            Phase::Startup | Phase::Drain | Phase::Refill | Phase::Up => hi,
            Phase::Down | Phase::Cruise | Phase::ProbeRtt => per_mille(hi, 1000 - HEADROOM_PER_MILLE),
        });
        let least_bytes =
            per_mille(held_bytes, 1000 - HEADROOM_PER_MILLE).saturating_add(self.min_window().0);
        let hi_bytes = hi_bytes.min(self.in_flight_lo_bytes.unwrap_or(u64::MAX)).max(least_bytes);
        let window_bytes = window_bytes.min(hi_bytes);
        match self.phase {
            Phase::Startup => window_bytes.max(self.initial_window_bytes()),
            Phase::Drain | Phase::Down | Phase::Cruise | Phase::Refill | Phase::Up | Phase::ProbeRtt => {
                window_bytes
            }
        }
    }

    fn initial_window_bytes(&self) -> u64 {
        let most_bytes = INITIAL_WINDOW_PACKETS.saturating_mul(self.settings.packet_bytes);
        let share_bytes = self.settings.cap.bytes_in(self.settings.rtt).0 / 8;
        share_bytes.clamp(self.min_window().0, most_bytes)
    }

    fn initial_pace(&self) -> Rate {
        let rtt = self.min_rtt.get().unwrap_or(self.settings.rtt).max(Duration::from_millis(1));
        let per_round = Bytes(self.initial_window_bytes());
        let pace = Rate((per_round.0 as f64 / rtt.as_secs_f64()) as u64);
        scaled(pace, Phase::Startup.usual_pace_per_mille())
    }

    /// What the path holds without a queue, at what it is believed to carry.
    fn held_bytes(&self) -> u64 {
        match (self.bandwidth(), self.min_rtt.get()) {
            (Some(bandwidth), Some(min_rtt)) => bandwidth.bytes_in(min_rtt).0.max(self.min_window().0),
            (None, _) | (_, None) => self.initial_window_bytes(),
        }
    }
}

fn scaled(rate: Rate, factor_per_mille: u64) -> Rate {
    Rate(per_mille(rate.0, factor_per_mille))
}

fn per_mille(number: u64, factor_per_mille: u64) -> u64 {
    let product = u128::from(number) * u128::from(factor_per_mille) / 1000;
    u64::try_from(product).unwrap_or(u64::MAX)
}
