//! How fast the bulk data of one migration may leave, if somebody has limited it: a token bucket that a chunk may overdraw.
//!
//! What is sent at once is a chunk at most; whoever sends a long one at a low rate is silent for that much longer afterwards.
//! Which chunk goes next is not decided here.

use std::time::Duration;

use crate::units::{Bytes, Rate};

/// How long a bucket saves up while nothing is sent: a late timer must not cost rate.
const BURST: Duration = Duration::from_millis(50);

/// The bucket.
#[derive(Debug, Clone)]
pub struct Throttle {
    rate: Rate,
    /// Nothing may be sent before; in the past while tokens are saved.
    free_at: Duration,
}

impl Throttle {
    /// `rate` from `now` on. A rate of zero is taken for one byte per second: a limit is no abort.
    pub fn new(rate: Rate, now: Duration) -> Self {
        Self { rate: Rate(rate.0.max(1)), free_at: now }
    }

    /// The rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Changes the rate. What was overdrawn is paid at the new one.
    pub fn set_rate(&mut self, rate: Rate, now: Duration) {
        let owed = self.rate.bytes_in(self.free_at.saturating_sub(now));
        self.rate = Rate(rate.0.max(1));
        self.free_at = now + self.time_for(owed);
    }

    /// When something may be sent; `None` if it may now.
    pub fn refused_until(&self, now: Duration) -> Option<Duration> {
        (self.free_at > now).then_some(self.free_at)
    }

    /// Counts what is sent.
    pub fn handle_sent(&mut self, bytes: Bytes, now: Duration) {
        self.free_at = self.free_at.max(now.saturating_sub(BURST)) + self.time_for(bytes);
    }

    fn time_for(&self, bytes: Bytes) -> Duration {
        self.rate.time_for(bytes).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Sends a chunk whenever that is allowed, and is late by `late` each time; what was sent by `end`.
    fn sent_by(end: Duration, throttle: &mut Throttle, chunk_bytes: u64, late: Duration) -> u64 {
        let (mut now, mut sent) = (Duration::ZERO, 0);
        while now < end {
            match throttle.refused_until(now) {
                Some(until) => now = until + late,
                None => {
                    throttle.handle_sent(Bytes(chunk_bytes), now);
                    sent += chunk_bytes;
                }
            }
        }
        sent
    }

    proptest! {
        #[test]
        fn the_rate_is_kept_and_used(
            rate in 1_000u64..1_000_000_000,
            chunk_bytes in 1_000u64..1_048_576,
            late_ms in 0u32..40,
        ) {
            let end = Duration::from_secs(100);
            let sent = sent_by(end, &mut Throttle::new(Rate(rate), Duration::ZERO), chunk_bytes, MS * late_ms);
            let allowed = rate * 100 + rate / 20 + chunk_bytes;
            prop_assert!(sent <= allowed, "{sent} of {allowed}");
            // A timer that is late costs nothing but at the end.
            let due = (rate * 100).saturating_sub(rate / 20 + chunk_bytes);
            prop_assert!(sent >= due, "{sent} of {due}");
        }
    }

    #[test]
    fn what_was_overdrawn_is_paid_at_the_rate_that_holds() {
        let mut throttle = Throttle::new(Rate(1000), Duration::ZERO);
        throttle.handle_sent(Bytes(10_000), Duration::ZERO);
        assert_eq!(throttle.refused_until(MS), Some(Duration::from_secs(10)));
        throttle.set_rate(Rate(10_000), Duration::from_secs(1));
        assert_eq!(throttle.refused_until(Duration::from_secs(1)), Some(Duration::from_millis(1900)));
        assert_eq!(throttle.refused_until(Duration::from_secs(2)), None);
    }

    #[test]
    fn a_rate_of_zero_is_no_abort() {
        let mut throttle = Throttle::new(Rate(0), Duration::ZERO);
        throttle.handle_sent(Bytes(10), Duration::ZERO);
        assert_eq!(throttle.refused_until(Duration::ZERO), Some(Duration::from_secs(10)));
    }
}
