//! The two windowed extremes of the model: the highest delivery rate of late, and the shortest round trip.
//!
//! Rates are kept by probing cycle and not by time, because only a probe shows a higher one; round trips by time, because
//! a route can change at any time. Neither knows what it is used for.

use std::time::Duration;

use crate::units::Rate;

/// The highest delivery rate of this cycle and the one before.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MaxBandwidth {
    now: Rate,
    before: Rate,
    /// A sample of this cycle was limited by the path and not by the application.
    full: bool,
}

impl MaxBandwidth {
    pub(super) fn get(&self) -> Option<Rate> {
        let most = self.now.max(self.before);
        (most.0 > 0).then_some(most)
    }

    /// A sample that the application limited counts only if it is higher than what is known.
    pub(super) fn add(&mut self, sample: Rate, app_limited: bool) {
        if !app_limited || self.get().is_none_or(|known| sample > known) {
            self.now = self.now.max(sample);
            self.full |= !app_limited;
        }
    }

    /// A cycle ends. One in which the path was never full says nothing, and what was known stays.
    pub(super) fn end_cycle(&mut self) {
        if self.full {
            *self = Self { now: Rate(0), before: self.now, full: false };
        }
    }

    /// The path is another one: forget all but this.
    pub(super) fn replace(&mut self, seen: Rate) {
        *self = Self { now: seen, before: Rate(0), full: true };
    }
}

/// How long one slot of [`MinRtt`] lasts; a minimum lives two to three of them.
const SLOT: Duration = Duration::from_secs(5);

/// After this long without a sample near the minimum it is looked for.
const UNCONFIRMED: Duration = Duration::from_secs(8);

/// The shortest round trip of the last 10 to 15 s.
#[derive(Debug, Clone, Copy)]
pub(super) struct MinRtt {
    slots: [Option<Duration>; 3],
    slot_began: Duration,
    confirmed: Duration,
    /// The shortest since the path was last probed for it.
    anchor: Option<Duration>,
}

impl MinRtt {
    pub(super) fn new(now: Duration) -> Self {
        Self { slots: [None; 3], slot_began: now, confirmed: now, anchor: None }
    }

    pub(super) fn get(&self) -> Option<Duration> {
        self.slots.iter().flatten().min().copied()
    }

    pub(super) fn add(&mut self, now: Duration, sample: Duration) {
        if now.saturating_sub(self.slot_began) >= SLOT {
            self.slots = [None, self.slots[0], self.slots[1]];
            self.slot_began = now;
        }
        self.slots[0] = Some(self.slots[0].map_or(sample, |known| known.min(sample)));
        let known = self.anchor.map_or(sample, |anchor| anchor.min(sample));
        self.anchor = Some(known);
        if sample <= known + tolerance(known) {
            self.confirmed = now;
        }
    }

    /// No sample was near the minimum for so long that the queue may never have been empty.
    pub(super) fn needs_probe(&self, now: Duration) -> bool {
        now.saturating_sub(self.confirmed) >= UNCONFIRMED
    }

    /// The queue was emptied to look: `seen` is the path's round trip now, also if it is longer than it was.
    pub(super) fn handle_probed(&mut self, now: Duration, seen: Option<Duration>) {
        self.confirmed = now;
        if let Some(seen) = seen {
            self.slots = [Some(seen), None, None];
            (self.slot_began, self.anchor) = (now, Some(seen));
        }
    }
}

/// What timers and acknowledgements blur.
fn tolerance(rtt: Duration) -> Duration {
    (rtt / 64).max(Duration::from_millis(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_lives_through_one_more_cycle() {
        let mut filter = MaxBandwidth::default();
        assert_eq!(filter.get(), None);
        filter.add(Rate(100), false);
        filter.end_cycle();
        filter.add(Rate(20), false);
        assert_eq!(filter.get(), Some(Rate(100)));
        filter.end_cycle();
        assert_eq!(filter.get(), Some(Rate(20)));
    }

    #[test]
    fn an_application_that_sends_little_lowers_nothing() {
        let mut filter = MaxBandwidth::default();
        filter.add(Rate(100), false);
        for _ in 0..10 {
            filter.end_cycle();
            filter.add(Rate(1), true);
        }
        assert_eq!(filter.get(), Some(Rate(100)));
        filter.add(Rate(101), true);
        assert_eq!(filter.get(), Some(Rate(101)));
    }

    #[test]
    fn the_shortest_round_trip_expires() {
        let mut filter = MinRtt::new(Duration::ZERO);
        filter.add(Duration::ZERO, 100 * MS);
        for second in 1..=10 {
            filter.add(Duration::from_secs(second), 200 * MS);
        }
        assert_eq!(filter.get(), Some(100 * MS));
        for second in 11..=15 {
            filter.add(Duration::from_secs(second), 200 * MS);
        }
        assert_eq!(filter.get(), Some(200 * MS));
    }

    #[test]
    fn a_round_trip_that_creeps_up_is_looked_into_and_then_believed() {
        let mut filter = MinRtt::new(Duration::ZERO);
        let mut at = Duration::ZERO;
        for step in 0..30 {
            filter.add(at, 100 * MS + MS * step);
            at += Duration::from_secs(1);
        }
        assert!(filter.needs_probe(at));
        filter.handle_probed(at, Some(120 * MS));
        assert_eq!(filter.get(), Some(120 * MS));
        filter.add(at + Duration::from_secs(7), 121 * MS);
        assert!(!filter.needs_probe(at + Duration::from_secs(14)));
    }
}
