//! How hard to compress: as hard as the processor allows while the link is what everything waits for, and no harder.
//!
//! ```text
//!   the link was waited for, packing took little   --> one level up
//!   the link waited for the packer                 --> one level down, and none up for a while;
//!                                                      to none at all only where the link carries more than is packed now
//! ```
//!
//! What else a host does makes it look busy in one moment and idle in the next, and on a disk each change of level costs what
//! is remembered (`core/disk/pack.rs`): so it looks at a while, and after a step down it waits, each time for longer.
//!
//! It measures nothing itself, and one of these belongs to one stream: what else the processor does shows in how long
//! packing takes.

use std::fmt;
use std::time::Duration;

use crate::units::{Bytes, Rate};

/// How content is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Not at all: the link is faster than any packing.
    Stored,
    /// At this level of zstd's.
    Zstd(i32),
}

impl Default for Level {
    fn default() -> Self {
        Self::FIRST
    }
}

impl Level {
    /// What a stream begins with of which nothing is known.
    pub const FIRST: Self = Self::Zstd(1);
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stored => f.write_str("stored"),
            Self::Zstd(level) => write!(f, "{level}"),
        }
    }
}

/// From barely to thoroughly: each of zstd's costs about twice the time of the one before. Its first is about as fast as LZ4.
const LEVELS: [Level; 7] = [
    Level::Stored,
    Level::Zstd(-5),
    Level::FIRST,
    Level::Zstd(3),
    Level::Zstd(6),
    Level::Zstd(9),
    Level::Zstd(12),
];

/// The level that a stream begins with.
const FIRST: usize = 2;

/// The share of the time that packing may take before it is made lighter, and below which it may be made heavier. Twice the
/// second is less than the first, so that a step up is not taken back at once.
const HEAVY: f64 = 0.6;
const LIGHT: f64 = 0.25;
/// The share of the time that the link must have been waited for to be what everything waits for.
const WAITED: f64 = 0.3;

/// How many times what is packed now a link must carry for it to be worth more not to pack at all.
const WORTH_MORE: f64 = 1.25;

/// So much is seen before it is judged.
const JUDGED_OVER: Duration = Duration::from_millis(500);
/// No step up for so long after a step down; twice as long each time that a step up was taken back, up to the second.
const FIRST_REST: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Chooses the level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    level: usize,
    /// Since it was judged last.
    seen: Seen,
    /// How long there is still no step up, and how long there is none after the next step down.
    rest: Duration,
    next_rest: Duration,
    /// The last step was up.
    climbed: bool,
    changes: u32,
}

/// What was seen in a while.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// How long it was.
    pub time: Duration,
    /// How long packing took of it.
    pub packing: Duration,
    /// For how long the link was full.
    pub waiting: Duration,
    /// What was packed, before it was.
    pub content: Bytes,
}

impl Default for Effort {
    fn default() -> Self {
        let (seen, rest) = (Seen::default(), Duration::ZERO);
        Self { level: FIRST, seen, rest, next_rest: FIRST_REST, climbed: false, changes: 0 }
    }
}

impl Effort {
    /// One that begins where another stream on the same link has got to.
    pub fn beginning_with(level: Level) -> Self {
        let level = LEVELS.iter().position(|known| *known == level).unwrap_or(FIRST);
        Self { level, ..Self::default() }
    }

    /// What was seen since the last call, and what the link carries, where that is known. Gives the level from now on. A time
    /// in which nothing was packed says nothing.
    pub fn handle_seen(&mut self, seen: Seen, carries: Option<Rate>) -> Level {
        self.rest = self.rest.saturating_sub(seen.time);
        if seen.packing.is_zero() {
            return self.level();
        }
        self.seen.time += seen.time;
        self.seen.packing += seen.packing;
        self.seen.waiting += seen.waiting;
        self.seen.content.0 += seen.content.0;
        if self.seen.time >= JUDGED_OVER {
            let seen = std::mem::take(&mut self.seen);
            self.judge(seen, carries);
        }
        self.level()
    }

    fn judge(&mut self, seen: Seen, carries: Option<Rate>) {
        let share = |part: Duration| part.as_secs_f64() / seen.time.as_secs_f64();
        let before = self.level;
        if share(seen.packing) > HEAVY && share(seen.waiting) < WAITED {
            let rate = seen.content.0 as f64 / seen.time.as_secs_f64();
            let gains = carries.is_some_and(|carries| carries.0 as f64 >= WORTH_MORE * rate);
            let lighter = self.level.saturating_sub(1);
            if gains || LEVELS[lighter] != Level::Stored {
                self.level = lighter;
            }
        } else if share(seen.packing) < LIGHT && share(seen.waiting) >= WAITED && self.rest.is_zero() {
            self.level = (self.level + 1).min(LEVELS.len() - 1);
        }
        self.changes += u32::from(self.level != before);
        if self.level > before {
            self.climbed = true;
            // Once one was taken back, they come one at a time.
            self.rest = if self.next_rest > FIRST_REST { FIRST_REST } else { Duration::ZERO };
        }
        if self.level < before {
            self.rest = self.next_rest;
            if std::mem::take(&mut self.climbed) {
                self.next_rest = (self.next_rest * 2).min(LONGEST_REST);
            }
        }
    }

    /// How often the level has changed.
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// The level.
    pub fn level(&self) -> Level {
        LEVELS[self.level]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// How far a level is from the first.
    fn steps(level: Level) -> i32 {
        LEVELS.iter().position(|known| *known == level).unwrap() as i32 - FIRST as i32
    }

    /// Packs what a link of `link` units a second takes, with a processor that packs `speed` units at the first level and half
    /// as many at each one more; says where it ends.
    fn settled(link: f64, speed: f64) -> Level {
        let mut effort = Effort::default();
        let mut last = effort.level();
        for _ in 0..100 {
            let can = speed / 2f64.powi(steps(last));
            let packing = TICK.mul_f64((link / can).min(1.0));
            let content = Bytes((link.min(can) * 1e3) as u64);
            let seen = Seen { time: TICK, packing, waiting: TICK - packing, content };
            last = effort.handle_seen(seen, Some(Rate((link * 1e4) as u64)));
        }
        last
    }

    #[test]
    fn a_slow_link_is_worth_the_greatest_effort_and_a_fast_one_the_least() {
        assert_eq!(settled(1.0, 1000.0), Level::Zstd(12));
        assert_eq!(settled(1000.0, 1000.0), Level::Zstd(-5));
        assert_eq!(settled(10_000.0, 1000.0), Level::Stored);
    }

    #[test]
    fn it_settles_where_the_processor_has_something_left() {
        for link in [20.0, 50.0, 90.0, 150.0, 300.0] {
            let level = settled(link, 1000.0);
            let share = link / (1000.0 / 2f64.powi(steps(level)));
            assert!(share <= HEAVY, "{level} takes {share:.2} for a link of {link}");
        }
    }

    /// How often the level changes in a minute in which packing takes these shares of the time, each for so long, in turn.
    fn changes(shares: [f64; 2], each: Duration) -> usize {
        let mut effort = Effort::default();
        let (mut last, mut changes) = (effort.level(), 0);
        for tick in 0..600u32 {
            let turn = (TICK * tick).as_millis() / each.as_millis();
            let share = shares[turn as usize % 2];
            let (packing, waiting) = (TICK.mul_f64(share), TICK.mul_f64(0.9 - share));
            let level = effort.handle_seen(Seen { time: TICK, packing, waiting, content: Bytes(1) }, None);
            changes += usize::from(level != last);
            last = level;
        }
        changes
    }

    #[test]
    fn a_noisy_processor_does_not_make_it_hunt() {
        assert_eq!(changes([0.2, 0.7], TICK), 0, "a half of the time is neither much nor little");
        for each_ms in [300, 1000, 3000, 10_000] {
            let changes = changes([0.2, 0.7], Duration::from_millis(each_ms));
            assert!(changes <= 20, "{changes} changes in a minute of {each_ms} ms each");
        }
    }

    #[test]
    fn it_begins_where_another_one_is() {
        for level in LEVELS {
            assert_eq!(Effort::beginning_with(level).level(), level);
        }
        assert_eq!(Effort::beginning_with(Level::Zstd(2)), Effort::default());
    }

    #[test]
    fn an_idle_guest_changes_nothing() {
        let mut effort = Effort::default();
        for waiting in [TICK, Duration::ZERO] {
            let seen = Seen { time: TICK, waiting, ..Seen::default() };
            assert_eq!(effort.handle_seen(seen, None), LEVELS[FIRST]);
        }
    }

    /// Where a processor ends that is busy with packing so much a second, on a link that carries so much.
    fn busy(content_a_second: u64, carries: Option<Rate>) -> Level {
        let mut effort = Effort::default();
        let content = Bytes(content_a_second / 10);
        let seen = Seen { time: TICK, packing: TICK, waiting: Duration::ZERO, content };
        for _ in 0..100 {
            effort.handle_seen(seen, carries);
        }
        effort.level()
    }

    #[test]
    fn a_link_that_would_carry_no_more_of_it_unpacked_is_packed_for() {
        assert_eq!(busy(100_000_000, Some(Rate(120_000_000))), Level::Zstd(-5));
        assert_eq!(busy(100_000_000, Some(Rate(125_000_000))), Level::Stored);
        assert_eq!(busy(100_000_000, None), Level::Zstd(-5));
        let mut stored = Effort::beginning_with(Level::Stored);
        let seen =
            Seen { time: JUDGED_OVER, packing: JUDGED_OVER, content: Bytes(1 << 40), ..Seen::default() };
        assert_eq!(stored.handle_seen(seen, None), Level::Stored, "what is not packed is no reason to begin");
    }
}
