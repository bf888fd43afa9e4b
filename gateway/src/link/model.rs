//! The congestion controller that estimates the path: quinn's callbacks become samples of `longhaul_core::congestion`.
//!
//! ```text
//!   quinn: on_sent, on_ack, on_end_acks, on_congestion_event --> Congestion --> window() to quinn
//!                                                                    '--> Pace --> PacedSocket
//!                                    PacedSocket, when a batch leaves --> Pace --> departed
//! ```
//!
//! What quinn-proto 0.11.19 gives, and what is made of it: `on_sent` is told each batch when it is made, before the socket
//! takes it, so the socket says when it left and no time before that counts as a round trip; `on_ack` names a packet by the
//! moment its batch was made, which is all that finding its record takes; `on_end_acks` comes before the losses that the same
//! acknowledgement reveals; losses come as a sum. Bytes are UDP payload everywhere here. Nothing is decided here.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use longhaul_core::congestion::{Congestion, Settings};
use longhaul_core::units::Rate;
use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

/// IPv4 and UDP headers, which the operator's rate counts and the controller does not.
const HEADER_BYTES: u64 = 28;

/// What a fresh connection starts with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model {
    /// The operator's rate, in IP bytes: never more.
    pub(super) cap: Rate,
    /// The round trip to assume before one was measured.
    pub(super) rtt: Duration,
}

/// What a controller and the socket tell each other about one path.
#[derive(Debug)]
pub(super) struct Pace {
    since: Instant,
    bytes_per_second: AtomicU64,
    /// When the batch left that the controller was told of last, in microseconds after `since`; zero when it knows.
    departed_us: AtomicU64,
    /// The estimate, in bytes per second; zero before there is one.
    bandwidth: AtomicU64,
    min_rtt_us: AtomicU64,
}

impl Pace {
    fn new(since: Instant) -> Self {
        Self {
            since,
            bytes_per_second: AtomicU64::new(0),
            departed_us: AtomicU64::new(0),
            bandwidth: AtomicU64::new(0),
            min_rtt_us: AtomicU64::new(0),
        }
    }

    /// How fast UDP payload may leave.
    pub(super) fn rate(&self) -> Rate {
        Rate(self.bytes_per_second.load(Ordering::Relaxed))
    }

    /// Something left for the address. The first counts that leaves after the controller has looked: what others send there,
    /// another connection's handshake or a reset, may then lengthen a round trip, and never shorten one.
    pub(super) fn handle_departed(&self, now: Instant) {
        let departed_us = micros(now.saturating_duration_since(self.since));
        // It fails where one is known already.
        let _ = self.departed_us.compare_exchange(0, departed_us, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// What the path is believed to carry, in UDP payload; `None` before it was measured.
    pub(super) fn bandwidth(&self) -> Option<Rate> {
        Some(Rate(self.bandwidth.load(Ordering::Relaxed))).filter(|rate| rate.0 > 0)
    }

    /// The shortest round trip of late; `None` before it was measured.
    pub(super) fn min_rtt(&self) -> Option<Duration> {
        let micros = self.min_rtt_us.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }

    /// The pace that the controller of a connection steers, if that estimates.
    pub(super) fn of(controller: Box<dyn Controller>) -> Option<Arc<Self>> {
        controller.into_any().downcast::<ModelController>().ok().map(|controller| controller.pace)
    }
}

#[derive(Debug, Clone)]
struct ModelController {
    cap: Rate,
    congestion: Congestion,
    pace: Arc<Pace>,
    initial_window_bytes: u64,
}

impl Model {
    fn controller(&self, now: Instant, current_mtu: u16) -> ModelController {
        let settings = Settings {
            cap: payload_rate(self.cap, current_mtu),
            rtt: self.rtt,
            packet_bytes: current_mtu.into(),
            seed: rand::random(),
        };
        let congestion = Congestion::new(settings, Duration::ZERO);
        let initial_window_bytes = congestion.window().0;
        let controller = ModelController {
            cap: self.cap,
            congestion,
            pace: Arc::new(Pace::new(now)),
            initial_window_bytes,
        };
        controller.publish();
        controller
    }
}

impl ControllerFactory for Model {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(self.controller(now, current_mtu))
    }
}

impl ModelController {
    fn time(&self, at: Instant) -> Duration {
        at.saturating_duration_since(self.pace.since)
    }

    /// The batch before this moment may have waited for its turn at the socket.
    fn take_departed(&mut self) {
        let departed_us = self.pace.departed_us.swap(0, Ordering::Relaxed);
        if departed_us > 0 {
            self.congestion.handle_departed(Duration::from_micros(departed_us));
        }
    }

    fn handle_acked(&mut self, sent: Instant, bytes: u64) {
        self.take_departed();
        self.congestion.handle_acked(self.time(sent), bytes);
    }

    fn publish(&self) {
        let bandwidth = self.congestion.bandwidth().unwrap_or_default();
        let min_rtt = self.congestion.min_rtt().unwrap_or_default();
        self.pace.bytes_per_second.store(self.congestion.pace().0, Ordering::Relaxed);
        self.pace.bandwidth.store(bandwidth.0, Ordering::Relaxed);
        self.pace.min_rtt_us.store(micros(min_rtt), Ordering::Relaxed);
    }
}

impl Controller for ModelController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.take_departed();
        self.congestion.handle_sent(self.time(now), bytes);
    }

    fn on_ack(&mut self, _now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.handle_acked(sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        // quinn reads the clock before it reads the packets. While the thread waits for a processor in between, packets come
        // that were not there then, and the round trip would be too short.
        let now = now.max(Instant::now());
        self.congestion.handle_acks_end(self.time(now), in_flight, app_limited);
        self.publish();
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, _persistent: bool, lost_bytes: u64) {
        if lost_bytes > 0 {
            self.congestion.handle_lost(self.time(now), self.time(sent), lost_bytes);
            self.publish();
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.congestion.set_packet_bytes(new_mtu.into());
        self.congestion.set_cap(payload_rate(self.cap, new_mtu));
    }

    fn window(&self) -> u64 {
        self.congestion.window().0
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window();
        metrics.pacing_rate = Some(self.congestion.pace().0.saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window_bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// What of a rate in IP bytes is UDP payload, in full packets.
fn payload_rate(rate: Rate, mtu_bytes: u16) -> Rate {
    let mtu_bytes = u64::from(mtu_bytes);
    Rate((u128::from(rate.0) * u128::from(mtu_bytes) / u128::from(mtu_bytes + HEADER_BYTES)) as u64)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn build(now: Instant) -> ModelController {
        Model { cap: Rate::mbit(100), rtt: 100 * MS }.controller(now, 1400)
    }

    /// 1400 bytes each millisecond, each acknowledged after 50 ms, and `wait` spent at the socket before.
    fn drive(controller: &mut ModelController, began: Instant, wait: Duration) {
        for step in 0..1000u32 {
            let now = began + MS * step;
            if step >= 50 {
                controller.handle_acked(now - 50 * MS, 1400);
                controller.on_end_acks(now, 49 * 1400, false, None);
            }
            controller.on_sent(now, 1400, step.into());
            controller.pace.handle_departed(now + wait);
        }
    }

    #[test]
    fn callbacks_become_an_estimate_and_a_pace_that_clones_share() {
        let began = Instant::now();
        let mut controller = build(began);
        let pace = Pace::of(controller.clone_box()).unwrap();
        assert!(pace.rate() > Rate(0));
        assert_eq!((pace.bandwidth(), pace.min_rtt()), (None, None));
        drive(&mut controller, began, Duration::ZERO);
        assert_eq!(pace.min_rtt(), Some(50 * MS));
        let bandwidth = pace.bandwidth().unwrap().0;
        assert!((1_350_000..=1_400_000).contains(&bandwidth), "{bandwidth}");
        assert!(pace.rate().0 > bandwidth / 2 && pace.rate() <= Rate::mbit(100));
    }

    #[test]
    fn time_at_the_socket_is_no_round_trip() {
        let began = Instant::now();
        let mut controller = build(began);
        drive(&mut controller, began, Duration::from_micros(900));
        assert_eq!(controller.pace.min_rtt(), Some(Duration::from_micros(49_100)));
    }

    #[test]
    fn what_others_send_to_the_address_shortens_no_round_trip() {
        let began = Instant::now();
        let mut controller = build(began);
        for step in 0..100u32 {
            let now = began + 100 * MS * step;
            controller.on_sent(now, 1400, step.into());
            controller.pace.handle_departed(now + MS);
            controller.pace.handle_departed(now + 45 * MS);
            controller.handle_acked(now, 1400);
            controller.on_end_acks(now + 50 * MS, 0, true, None);
        }
        assert_eq!(controller.pace.min_rtt(), Some(49 * MS));
    }

    #[test]
    fn the_operators_rate_counts_headers() {
        assert_eq!(payload_rate(Rate(1_428_000), 1400), Rate(1_400_000));
        let pace = build(Instant::now()).congestion.pace();
        assert!(pace.0 <= 12_500_000 * 1400 / 1428);
    }
}
