//! How long what was sent waits at the other side: a destination that is slower than the link is behind, and bytes do not
//! tell. A page that is named by a disk is a few of them, and a read of that disk.
//!
//! ```text
//!  queued     ──────●───────●───────●──────>   marks, one a look
//!  taken      ───────────●                     the oldest mark that is not taken is as old as what waits
//! ```
//!
//! Deliberately not here: what of it is the link's own time, which [`super::convergence`] knows.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Bytes;

/// Marks that are kept. At ten looks a second what waits for longer than a minute seems to wait for a minute.
const MARKS: usize = 600;

/// Follows one channel. A look costs 16 bytes until what was queued by then is taken.
#[derive(Clone, Debug, Default)]
pub struct Lag {
    /// When it was seen that so many bytes were queued, in order of both.
    marks: VecDeque<(Duration, Bytes)>,
}

impl Lag {
    /// So many bytes were queued since the beginning, of which the other side has taken so many. How long the oldest that it
    /// has not taken has waited at least: it may be one look more.
    pub fn look(&mut self, now: Duration, queued: Bytes, taken: Bytes) -> Duration {
        let last = self.marks.back().map_or(Bytes(0), |(_, queued)| *queued);
        if queued > last {
            self.marks.push_back((now, queued));
        }
        while self.marks.front().is_some_and(|(_, queued)| *queued <= taken) {
            self.marks.pop_front();
        }
        if self.marks.len() > MARKS {
            self.marks.pop_front();
        }
        self.marks.front().map_or(Duration::ZERO, |(at, _)| now.saturating_sub(*at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_is_taken_in_time_does_not_wait() {
        let mut lag = Lag::default();
        assert_eq!(lag.look(ms(100), Bytes(0), Bytes(0)), ms(0));
        assert_eq!(lag.look(ms(200), Bytes(500), Bytes(0)), ms(0), "it may have come this moment");
        assert_eq!(lag.look(ms(300), Bytes(900), Bytes(500)), ms(0));
        assert_eq!(lag.look(ms(400), Bytes(900), Bytes(900)), ms(0));
        assert!(lag.marks.is_empty());
    }

    #[test]
    fn few_bytes_that_stay_wait_longer_with_each_look() {
        let mut lag = Lag::default();
        lag.look(ms(100), Bytes(10), Bytes(0));
        assert_eq!(lag.look(ms(200), Bytes(20), Bytes(5)), ms(100), "a part of it is not all of it");
        assert_eq!(lag.look(ms(300), Bytes(20), Bytes(9)), ms(200));
        assert_eq!(
            lag.look(ms(400), Bytes(30), Bytes(10)),
            ms(200),
            "what came after it waits for less long"
        );
    }

    #[test]
    fn what_never_ends_is_remembered_within_bounds() {
        let mut lag = Lag::default();
        for look in 0..2 * MARKS as u64 {
            lag.look(ms(look), Bytes(look + 1), Bytes(0));
        }
        assert_eq!(lag.marks.len(), MARKS);
        let now = 2 * MARKS as u64;
        assert_eq!(lag.look(ms(now), Bytes(now), Bytes(0)), ms(MARKS as u64));
    }

    proptest! {
        /// A destination that takes each byte after a fixed time is seen to be behind by that, but for one look.
        #[test]
        fn a_delay_is_found_to_within_a_look(delay in 1_u64..40, per_look in 1_u64..1_000_000) {
            let mut lag = Lag::default();
            for look in 1..200 {
                let taken = Bytes(look_bytes(look, delay, per_look));
                let seen = lag.look(ms(100 * look), Bytes(per_look * look), taken);
                if look > delay {
                    prop_assert_eq!(seen, ms(100 * (delay - 1)));
                }
            }
        }
    }

    /// What was queued `delay` looks ago.
    fn look_bytes(look: u64, delay: u64, per_look: u64) -> u64 {
        per_look * look.saturating_sub(delay)
    }
}
