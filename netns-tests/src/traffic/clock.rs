//! Milliseconds since the plan's start.
//!
//! Reads the system's clock once and goes on monotonically, so that a step of the clock cannot look like a gap.

use std::time::Duration;

use tokio::time::Instant;

use crate::agent::worker::unix_ms;

/// A clock with the plan's start as zero.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    offset: Duration,
}

impl Clock {
    /// A clock whose zero is `epoch_unix_ms`.
    #[must_use]
    pub fn since(epoch_unix_ms: u64) -> Self {
        let offset = Duration::from_millis(unix_ms().saturating_sub(epoch_unix_ms));
        Self { started: Instant::now(), offset }
    }

    /// Now, in milliseconds since the start.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.at_ms(Instant::now())
    }

    /// An instant in milliseconds since the start.
    #[must_use]
    pub fn at_ms(&self, instant: Instant) -> u64 {
        milliseconds(instant.saturating_duration_since(self.started) + self.offset)
    }
}

/// A duration in whole milliseconds.
#[must_use]
pub fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
