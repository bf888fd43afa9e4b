//! What an emulated WAN does to packets, per direction. Only data and its defaults; nothing is carried out here.

use std::time::Duration;

/// The smallest queue a bottleneck gets by default, in bytes.
pub const MIN_QUEUE_BYTES: u64 = 256 * 1024;

/// One direction of the WAN.
#[derive(Clone, Debug, PartialEq)]
pub struct PathProfile {
    /// Bits of IP packets (no Ethernet framing) per second; `None` is no limit.
    pub rate_bits_per_second: Option<u64>,
    /// One-way delay behind the bottleneck.
    pub delay: Duration,
    /// Each packet's delay varies evenly by up to this much, up or down. Order is kept.
    pub jitter: Duration,
    /// Probability that a packet is lost, decided before the queue (as netem does).
    pub loss: f64,
    /// Probability that a packet arrives late by [`PathProfile::reorder_by`], overtaken by its followers.
    pub reorder: f64,
    /// How late a reordered packet is.
    pub reorder_by: Duration,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// What the bottleneck queues before it drops at the tail, in bytes.
    pub queue_bytes: u64,
}

/// Both directions, and the seed of their random decisions.
#[derive(Clone, Debug, PartialEq)]
pub struct WanProfile {
    /// From the near end (the internet core) to the far end (the site).
    pub to_far: PathProfile,
    /// From the far end to the near end.
    pub to_near: PathProfile,
    /// Equal seeds and equal traffic lose the same packets.
    pub seed: u64,
}

impl WanProfile {
    /// The same in both directions: half the round trip each way, a queue of one bandwidth-delay product
    /// (at least [`MIN_QUEUE_BYTES`]), no jitter, reordering or duplicates.
    pub fn symmetric(rate_mbit: f64, rtt: Duration, loss: f64) -> Self {
        let path = PathProfile::new(Some((rate_mbit * 1e6) as u64), rtt, loss);
        Self { to_far: path.clone(), to_near: path, seed: 1 }
    }

    /// The same with jitter, per direction.
    pub fn with_jitter(mut self, jitter: Duration) -> Self {
        self.to_far.jitter = jitter;
        self.to_near.jitter = jitter;
        self
    }

    /// The round trip asked for.
    pub fn rtt(&self) -> Duration {
        self.to_far.delay + self.to_near.delay
    }
}

impl PathProfile {
    /// One direction of a path with this round trip.
    pub fn new(rate_bits_per_second: Option<u64>, rtt: Duration, loss: f64) -> Self {
        let product = rate_bits_per_second.map_or(0.0, |rate| rate as f64 / 8.0 * rtt.as_secs_f64());
        Self {
            rate_bits_per_second,
            delay: rtt / 2,
            jitter: Duration::ZERO,
            loss,
            reorder: 0.0,
            reorder_by: Duration::from_millis(5),
            duplicate: 0.0,
            queue_bytes: (product as u64).max(MIN_QUEUE_BYTES),
        }
    }

    /// How long the line is busy with this many bytes.
    pub fn line_time(&self, bytes: usize) -> Duration {
        let Some(rate) = self.rate_bits_per_second.filter(|rate| *rate > 0) else {
            return Duration::ZERO;
        };
        Duration::from_nanos((bytes as u128 * 8_000_000_000 / u128::from(rate)) as u64)
    }

    /// How many bytes the line carries in this time; 0 without a rate.
    pub fn bytes_in(&self, time: Duration) -> u64 {
        let rate = self.rate_bits_per_second.unwrap_or(0);
        (time.as_nanos() * u128::from(rate) / 8_000_000_000) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_one_bandwidth_delay_product_but_never_tiny() {
        let wan = WanProfile::symmetric(100.0, Duration::from_millis(100), 0.001);
        assert_eq!(wan.to_far.queue_bytes, 1_250_000);
        assert_eq!(wan.to_far.delay, Duration::from_millis(50));
        assert_eq!(wan.rtt(), Duration::from_millis(100));
        let slow = WanProfile::symmetric(5.0, Duration::from_millis(100), 0.0);
        assert_eq!(slow.to_near.queue_bytes, MIN_QUEUE_BYTES);
    }

    #[test]
    fn a_full_packet_takes_its_line_time() {
        let path = PathProfile::new(Some(100_000_000), Duration::ZERO, 0.0);
        assert_eq!(path.line_time(1500), Duration::from_micros(120));
        assert_eq!(path.bytes_in(Duration::from_micros(120)), 1500);
        let unlimited = PathProfile::new(None, Duration::ZERO, 0.0);
        assert_eq!(unlimited.line_time(1500), Duration::ZERO);
    }
}
