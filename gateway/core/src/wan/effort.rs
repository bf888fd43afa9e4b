//! How hard to compress: as hard as the processor allows while the link is what everything waits for, and no harder.
//!
//! ```text
//!   the link was waited for, packing took little   --> one level up
//!   the link waited for the packer                 --> one level down
//! ```
//!
//! It measures nothing itself, and one of these belongs to one stream: what else the processor does shows in how long
//! packing takes.

use std::time::Duration;

/// zstd's levels, from barely to thoroughly: each costs about twice the time of the one before. The first is about as fast as
/// LZ4.
const LEVELS: [i32; 6] = [-5, 1, 3, 6, 9, 12];

/// The level that a stream begins with.
const FIRST: usize = 1;

/// The share of the time that packing may take before it is made lighter, and below which it may be made heavier. Twice the
/// second is less than the first, so that a step up is not taken back at once.
const HEAVY: f64 = 0.6;
const LIGHT: f64 = 0.25;
/// The share of the time that the link must have been waited for to be what everything waits for.
const WAITED: f64 = 0.3;

/// Chooses the level.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    level: usize,
}

impl Default for Effort {
    fn default() -> Self {
        Self { level: FIRST }
    }
}

impl Effort {
    /// What was seen in the last `interval`: how long packing took, and how long the link was full. Gives the level from now
    /// on. An interval in which nothing was packed says nothing.
    pub fn handle_interval(&mut self, interval: Duration, packing: Duration, waiting: Duration) -> i32 {
        let share = |part: Duration| part.as_secs_f64() / interval.as_secs_f64().max(1e-9);
        if packing.is_zero() {
            return self.level();
        }
        if share(packing) > HEAVY && share(waiting) < WAITED {
            self.level = self.level.saturating_sub(1);
        } else if share(packing) < LIGHT && share(waiting) >= WAITED {
            self.level = (self.level + 1).min(LEVELS.len() - 1);
        }
        self.level()
    }

    /// zstd's level.
    pub fn level(&self) -> i32 {
        LEVELS[self.level]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// Packs what a link of `link` units a second takes, with a processor that packs `speed` units at the first level and half
    /// as many at each one more; says where it ends.
    fn settled(link: f64, speed: f64) -> i32 {
        let mut effort = Effort::default();
        let mut last = effort.level();
        for _ in 0..100 {
            let steps = LEVELS.iter().position(|level| *level == last).unwrap() as i32 - FIRST as i32;
            let can = speed / 2f64.powi(steps);
            let packing = TICK.mul_f64((link / can).min(1.0));
            last = effort.handle_interval(TICK, packing, TICK - packing);
        }
        last
    }

    #[test]
    fn a_slow_link_is_worth_the_greatest_effort_and_a_fast_one_the_least() {
        assert_eq!(settled(1.0, 1000.0), 12);
        assert_eq!(settled(1000.0, 1000.0), -5);
    }

    #[test]
    fn it_settles_where_the_processor_has_something_left() {
        for link in [20.0, 50.0, 90.0, 150.0, 300.0] {
            let level = settled(link, 1000.0);
            let steps = LEVELS.iter().position(|known| *known == level).unwrap() as i32 - FIRST as i32;
            let share = link / (1000.0 / 2f64.powi(steps));
            assert!(share <= HEAVY, "{level} takes {share:.2} for a link of {link}");
        }
    }

    #[test]
    fn an_idle_guest_changes_nothing() {
        let mut effort = Effort::default();
        assert_eq!(effort.handle_interval(TICK, Duration::ZERO, TICK), LEVELS[FIRST]);
        assert_eq!(effort.handle_interval(TICK, Duration::ZERO, Duration::ZERO), LEVELS[FIRST]);
    }
}
