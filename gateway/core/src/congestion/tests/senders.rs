//! Who uses the bottleneck: this controller, and models of what it meets: CUBIC (RFC 9438) and the first BBR.
//!
//! The models are as simple as their behaviour in a queue allows: no SACK, no HyStart, no offloads.

use std::collections::VecDeque;
use std::time::Duration;

use super::bottleneck::{PACKET_BYTES, Sender};
use crate::congestion::{Congestion, Settings};
use crate::units::Rate;

/// This controller.
pub struct Ours(pub Congestion);

impl Ours {
    pub fn new(cap: Rate, rtt: Duration, seed: u64, now: Duration) -> Self {
        Self(Congestion::new(Settings { cap, rtt, packet_bytes: PACKET_BYTES, seed }, now))
    }
}

impl Sender for Ours {
    fn handle_sent(&mut self, now: Duration, bytes: u64) {
        self.0.handle_sent(now, bytes);
    }

    fn handle_acked(&mut self, _now: Duration, sent: Duration, bytes: u64) {
        self.0.handle_acked(sent, bytes);
    }

    fn handle_acks_end(&mut self, now: Duration, in_flight_bytes: u64, app_limited: bool) {
        self.0.handle_acks_end(now, in_flight_bytes, app_limited);
    }

    fn handle_lost(&mut self, now: Duration, sent: Duration, bytes: u64) {
        self.0.handle_lost(now, sent, bytes);
    }

    fn pace(&self) -> Option<Rate> {
        Some(self.0.pace())
    }

    fn window_bytes(&self) -> u64 {
        self.0.window().0
    }
}

/// CUBIC, windows in packets.
pub struct Cubic {
    window: f64,
    threshold: f64,
    most: f64,
    epoch: Option<Epoch>,
    recovers_until: Duration,
}

/// Growth since the last loss.
#[derive(Clone, Copy)]
struct Epoch {
    began: Duration,
    /// When the cubic reaches the window of before.
    k: f64,
    reno_window: f64,
}

impl Cubic {
    const C: f64 = 0.4;
    const BETA: f64 = 0.7;

    pub fn new() -> Self {
        Self { window: 10.0, threshold: f64::MAX, most: 0.0, epoch: None, recovers_until: Duration::ZERO }
    }
}

impl Sender for Cubic {
    fn handle_sent(&mut self, _now: Duration, _bytes: u64) {}

    fn handle_acked(&mut self, now: Duration, sent: Duration, _bytes: u64) {
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        self.most = self.most.max(self.window.min(self.threshold));
        let (window, most) = (self.window, self.most);
        let epoch = self.epoch.get_or_insert_with(|| Epoch {
            began: now,
            k: ((most - window).max(0.0) / Self::C).cbrt(),
            reno_window: window,
        });
        let since = (now - epoch.began + (now - sent)).as_secs_f64();
        let target = (Self::C * (since - epoch.k).powi(3) + most).clamp(window, 1.5 * window);
        epoch.reno_window += 3.0 * (1.0 - Self::BETA) / (1.0 + Self::BETA) / window;
        self.window = (window + (target - window) / window).max(epoch.reno_window);
    }

    fn handle_acks_end(&mut self, _now: Duration, _in_flight_bytes: u64, _app_limited: bool) {}

    fn handle_lost(&mut self, now: Duration, sent: Duration, _bytes: u64) {
        if sent < self.recovers_until {
            return;
        }
        self.recovers_until = now;
        let converging = self.window < self.most;
        self.most = if converging { self.window * (1.0 + Self::BETA) / 2.0 } else { self.window };
        self.window = (self.window * Self::BETA).max(2.0);
        self.threshold = self.window;
        self.epoch = None;
    }

    fn pace(&self) -> Option<Rate> {
        None
    }

    fn window_bytes(&self) -> u64 {
        (self.window * PACKET_BYTES as f64) as u64
    }
}

/// The first BBR: gains, ten rounds of bandwidth, ten seconds of round trips, losses ignored.
pub struct Bbr {
    delivered_bytes: u64,
    sent: VecDeque<(Duration, u64, Duration)>,
    acked_at: Duration,
    /// The highest rate of each of the last ten rounds.
    rates: VecDeque<f64>,
    round_ends_at_bytes: u64,
    min_rtt: Duration,
    min_rtt_at: Duration,
    probe_rtt_until: Option<Duration>,
    full: bool,
    drained: bool,
    best: f64,
    flat_rounds: u32,
    step: usize,
    step_began: Duration,
    in_flight_bytes: u64,
}

impl Bbr {
    const GAINS: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    const ROUNDS: usize = 11;

    pub fn new(now: Duration) -> Self {
        Self {
            delivered_bytes: 0,
            sent: VecDeque::new(),
            acked_at: now,
            rates: VecDeque::from([0.0]),
            round_ends_at_bytes: 0,
            min_rtt: Duration::MAX,
            min_rtt_at: now,
            probe_rtt_until: None,
            full: false,
            drained: false,
            best: 0.0,
            flat_rounds: 0,
            step: 2,
            step_began: now,
            in_flight_bytes: 0,
        }
    }

    fn bandwidth(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn gain(&self) -> f64 {
        match (self.full, self.drained) {
            (false, _) => 2.89,
            (true, false) => 1.0 / 2.89,
            (true, true) => Self::GAINS[self.step],
        }
    }

    fn held_bytes(&self) -> f64 {
        self.bandwidth() * self.min_rtt.min(Duration::from_secs(1)).as_secs_f64()
    }

    fn end_round(&mut self) {
        self.round_ends_at_bytes = self.delivered_bytes;
        let now = self.bandwidth();
        self.rates.push_back(0.0);
        if self.rates.len() > Self::ROUNDS {
            self.rates.pop_front();
        }
        if now >= 1.25 * self.best {
            (self.best, self.flat_rounds) = (now, 0);
        } else {
            self.flat_rounds += 1;
        }
        self.full |= self.flat_rounds >= 3;
    }

    fn advance(&mut self, now: Duration) {
        if self.full && !self.drained && self.in_flight_bytes as f64 <= self.held_bytes() {
            (self.drained, self.step_began) = (true, now);
        }
        if self.drained && now - self.step_began > self.min_rtt {
            (self.step, self.step_began) = ((self.step + 1) % Self::GAINS.len(), now);
        }
        match self.probe_rtt_until {
            Some(until) if now >= until => (self.probe_rtt_until, self.min_rtt_at) = (None, now),
            Some(_) => {}
            None if now - self.min_rtt_at > Duration::from_secs(10) => {
                self.probe_rtt_until = Some(now + Duration::from_millis(200) + self.min_rtt);
                self.min_rtt = Duration::MAX;
            }
            None => {}
        }
    }
}

impl Sender for Bbr {
    fn handle_sent(&mut self, now: Duration, bytes: u64) {
        if self.in_flight_bytes == 0 {
            self.acked_at = now;
        }
        self.in_flight_bytes += bytes;
        self.sent.push_back((now, self.delivered_bytes, self.acked_at));
    }

    fn handle_acked(&mut self, now: Duration, sent: Duration, bytes: u64) {
        self.delivered_bytes += bytes;
        self.acked_at = now;
        let rtt = now - sent;
        if rtt <= self.min_rtt {
            (self.min_rtt, self.min_rtt_at) = (rtt, now);
        }
        while self.sent.get(1).is_some_and(|(at, _, _)| *at <= sent) {
            self.sent.pop_front();
        }
        let Some((_, before, acked_before)) = self.sent.front().copied() else { return };
        let interval = (now - acked_before).max(rtt);
        let rate = (self.delivered_bytes - before) as f64 / interval.as_secs_f64();
        if let Some(most) = self.rates.back_mut() {
            *most = most.max(rate);
        }
        if before >= self.round_ends_at_bytes {
            self.end_round();
        }
    }

    fn handle_acks_end(&mut self, now: Duration, in_flight_bytes: u64, _app_limited: bool) {
        self.in_flight_bytes = in_flight_bytes;
        self.advance(now);
    }

    fn handle_lost(&mut self, _now: Duration, _sent: Duration, bytes: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    fn pace(&self) -> Option<Rate> {
        let pace = (self.bandwidth() * self.gain()) as u64;
        Some(Rate(if pace == 0 { 200_000 } else { pace.max(10_000) }))
    }

    fn window_bytes(&self) -> u64 {
        if self.probe_rtt_until.is_some() {
            return 4 * PACKET_BYTES;
        }
        let gain = if self.full { 2.0 } else { 2.89 };
        (self.held_bytes() * gain) as u64 + 20 * PACKET_BYTES
    }
}
