//! The congestion controller of `congestion = "fixed"`: a window from the configured rate and the measured round trip.
//!
//! ```text
//!   window = rate * (1.25 * shortest round trip + 10 ms)
//! ```
//!
//! How fast packets leave is decided by [`super::pacing`], not here; this only sees to it that enough
//! is in flight to keep that pace, and not so much that a path slower than configured queues without
//! end. There is no slow start: the pace is known. Losses are no signal: on a long path random loss would otherwise decide
//! the rate. It does not estimate the path's rate, [`super::model`] does; the operator gives it.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_core::units::Rate;
use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

/// Room for jitter: how much longer than the shortest round trip one may take without costing rate.
const GAIN: f64 = 1.25;

/// Room for timers and for acknowledgements that the peer delays.
const SLACK: Duration = Duration::from_millis(10);

/// The least window in packets: below it, loss detection by reordering does not work.
const MIN_PACKETS: u64 = 10;

/// What a fresh connection starts with.
#[derive(Debug, Clone, Copy)]
pub(super) struct RateWindow {
    /// How fast to send.
    pub(super) rate: Rate,
    /// The round trip to assume before one was measured.
    pub(super) rtt: Duration,
}

#[derive(Debug, Clone)]
struct RateController {
    config: RateWindow,
    mtu_bytes: u64,
    window_bytes: u64,
}

impl RateWindow {
    fn window_bytes(&self, shortest_rtt: Duration, mtu_bytes: u64) -> u64 {
        let time = shortest_rtt.mul_f64(GAIN) + SLACK;
        self.rate.bytes_in(time).0.max(MIN_PACKETS * mtu_bytes)
    }
}

impl ControllerFactory for RateWindow {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let mtu_bytes = u64::from(current_mtu);
        Box::new(RateController {
            config: *self,
            mtu_bytes,
            window_bytes: self.window_bytes(self.rtt, mtu_bytes),
        })
    }
}

impl Controller for RateController {
    fn on_ack(&mut self, _now: Instant, _sent: Instant, _bytes: u64, _app_limited: bool, rtt: &RttEstimator) {
        self.window_bytes = self.config.window_bytes(rtt.min(), self.mtu_bytes);
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, _persistent: bool, _lost_bytes: u64) {}

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu_bytes = u64::from(new_mtu);
    }

    fn window(&self) -> u64 {
        self.window_bytes
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window_bytes;
        metrics.pacing_rate = Some(self.config.rate.0 * 8);
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.window_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_holds_the_bandwidth_delay_product_and_losses_do_not_shrink_it() {
        let config = RateWindow { rate: Rate::mbit(100), rtt: Duration::from_millis(100) };
        let mut controller = Arc::new(config).build(Instant::now(), 1400);
        let started = controller.window();
        assert_eq!(started, 1_687_500);
        let now = Instant::now();
        controller.on_congestion_event(now, now, true, 1 << 20);
        assert_eq!(controller.window(), started);
    }

    #[test]
    fn a_slow_link_still_has_ten_packets() {
        let config = RateWindow { rate: Rate(1000), rtt: Duration::from_millis(1) };
        assert_eq!(Arc::new(config).build(Instant::now(), 1200).window(), 12_000);
    }
}
