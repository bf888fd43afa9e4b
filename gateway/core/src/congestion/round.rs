//! One round trip's worth of acknowledgements: what they say together, before anything is decided from it.

use std::time::Duration;

use super::Congestion;
use super::sample::{Sample, rate};
use crate::units::Rate;

/// The shortest round, so that short paths are judged by more than one batch.
const MIN_ROUND: Duration = Duration::from_millis(5);

/// A round that is under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    began: Duration,
    /// What had been delivered then. The round ends with a packet that was sent later.
    began_at_bytes: u64,
    app_limited: bool,
    min_rtt: Option<Duration>,
    most_in_flight_bytes: u64,
}

/// A round that has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    pub(super) delivered_bytes: u64,
    /// That per second; `None` if the application limited it.
    pub(super) delivered: Option<Rate>,
    pub(super) min_rtt: Option<Duration>,
    pub(super) most_in_flight_bytes: u64,
    /// No round trip in it was short, and it was more than a few packets.
    pub(super) queued: bool,
    /// It lost more than chance explains.
    pub(super) excess: bool,
}

impl Round {
    pub(super) fn new(now: Duration, delivered_bytes: u64) -> Self {
        Self {
            began: now,
            began_at_bytes: delivered_bytes,
            app_limited: false,
            min_rtt: None,
            most_in_flight_bytes: 0,
        }
    }

    pub(super) fn handle_sent(&mut self, in_flight_bytes: u64) {
        self.most_in_flight_bytes = self.most_in_flight_bytes.max(in_flight_bytes);
    }

    /// Takes a sample in, and says whether the round ends with it.
    pub(super) fn handle_sample(&mut self, now: Duration, sample: &Sample) -> bool {
        self.min_rtt = Some(self.min_rtt.map_or(sample.rtt, |known| known.min(sample.rtt)));
        self.app_limited |= sample.app_limited;
        let long_enough = now.saturating_sub(self.began) >= MIN_ROUND;
        sample.delivered_before_bytes >= self.began_at_bytes && long_enough
    }
}

impl Congestion {
    /// What the round that is under way says, if it ends now.
    pub(super) fn judge_round(&self, now: Duration) -> Ended {
        let round = &self.round;
        let delivered_bytes = self.sampler.delivered_bytes().saturating_sub(round.began_at_bytes);
        let time = now.saturating_sub(round.began);
        Ended {
            delivered_bytes,
            delivered: (!round.app_limited).then(|| rate(delivered_bytes, time)).flatten(),
            min_rtt: round.min_rtt,
            most_in_flight_bytes: round.most_in_flight_bytes,
            queued: delivered_bytes >= self.min_window().0
                && round.min_rtt.is_some_and(|rtt| self.is_queued(rtt)),
            excess: self.losses.is_excess(),
        }
    }
}
