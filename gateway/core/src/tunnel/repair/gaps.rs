//! Which numbers are missing, and when each is asked for again.
//!
//! Gaps are ordered by number and so by age: the first one is the next to be given up. Nothing here knows
//! what waits behind a gap.

use std::collections::VecDeque;
use std::time::Duration;

use super::config::Timing;
use super::format::{Number, Range};

/// A run of missing numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gap {
    pub first: Number,
    pub len: u16,
    /// When it is given up.
    pub deadline: Duration,
    ask_at: Duration,
    asks: u8,
}

impl Gap {
    fn end(&self) -> Number {
        self.first.plus(u32::from(self.len))
    }
}

/// All gaps of one receiver. Its bound is kept by the receiver, which knows what giving one up means.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    queue: VecDeque<Gap>,
    /// No gap is due before; may be too early, never too late.
    due: Option<Duration>,
}

impl Gaps {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn front(&self) -> Option<&Gap> {
        self.queue.front()
    }

    /// When [`Gaps::ask`] may have something to ask.
    pub(super) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Numbers behind all others turned out to be missing.
    pub(super) fn open(&mut self, now: Duration, first: Number, len: u16, timing: &Timing) {
        let ask_at = now + timing.reorder;
        self.queue.push_back(Gap { first, len, deadline: now + timing.deadline, ask_at, asks: 0 });
        self.bring_forward(ask_at);
    }

    /// Makes gaps due behind which enough has come, `next` being one more than the highest number.
    pub(super) fn ripen(&mut self, now: Duration, next: Number, threshold: u32) {
        let mut ripened = false;
        for gap in self.queue.iter_mut().rev() {
            if gap.asks > 0 || gap.ask_at <= now {
                break;
            }
            if next.after(gap.end()).is_some_and(|later| later >= threshold) {
                gap.ask_at = now;
                ripened = true;
            }
        }
        if ripened {
            self.bring_forward(now);
        }
    }

    /// A missing number came; whether it had been asked for.
    pub(super) fn fill(&mut self, number: Number) -> bool {
        let Some(base) = self.queue.front().map(|gap| gap.first) else { return false };
        let ends_before = |gap: &Gap| gap.end().after(base) <= number.after(base);
        let index = self.queue.partition_point(ends_before);
        let Some(gap) = self.queue.get_mut(index) else { return false };
        let Some(before) = number.after(gap.first) else { return false };
        let (before, asked) = (before as u16, gap.asks > 0);
        let after = gap.len - before - 1;
        let mut rest = *gap;
        rest.first = number.plus(1);
        rest.len = after;
        match (before, after) {
            (0, 0) => drop(self.queue.remove(index)),
            (0, _) => *gap = rest,
            (_, 0) => gap.len = before,
            (_, _) => {
                gap.len = before;
                self.queue.insert(index + 1, rest);
            }
        }
        asked
    }

    /// Forgets the first gap.
    pub(super) fn pop_front(&mut self) -> Option<Gap> {
        let gap = self.queue.pop_front();
        if self.queue.is_empty() {
            self.due = None;
        }
        gap
    }

    /// Forgets the first gap's first number.
    pub(super) fn shrink_front(&mut self) {
        if let Some(gap) = self.queue.front_mut() {
            gap.first = gap.first.plus(1);
            gap.len -= 1;
            if gap.len == 0 {
                self.pop_front();
            }
        }
    }

    /// Hands out the gaps that are due until `take` has had enough; `false` if more are due.
    pub(super) fn ask(
        &mut self,
        now: Duration,
        timing: &Timing,
        mut take: impl FnMut(Range) -> bool,
    ) -> bool {
        let mut due = None;
        for gap in &mut self.queue {
            if gap.ask_at <= now {
                if !take(Range { first: gap.first, len: gap.len }) {
                    return false;
                }
                gap.asked(now, timing);
            }
            if gap.ask_at != NEVER {
                due = Some(due.map_or(gap.ask_at, |due: Duration| due.min(gap.ask_at)));
            }
        }
        self.due = due;
        true
    }

    fn bring_forward(&mut self, at: Duration) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

const NEVER: Duration = Duration::MAX;

impl Gap {
    /// The first request is made whatever the round trip is said to be; later ones only if their answer
    /// can come in time.
    fn asked(&mut self, now: Duration, timing: &Timing) {
        self.asks = self.asks.saturating_add(1);
        let pause = if self.asks % 2 == 1 { timing.second_ask } else { timing.next_ask };
        let at = now + pause;
        self.ask_at = if timing.answer_comes_by(at, self.deadline) { at } else { NEVER };
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::RepairConfig;
    use super::*;

    const NOW: Duration = Duration::from_secs(1);

    fn timing() -> Timing {
        Timing::new(&RepairConfig::default(), Duration::from_millis(80))
    }

    fn asked(gaps: &mut Gaps, now: Duration) -> Vec<(u32, u16)> {
        let mut ranges = Vec::new();
        gaps.ask(now, &timing(), |range| {
            ranges.push((range.first.0, range.len));
            true
        });
        ranges
    }

    #[test]
    fn a_gap_splits_and_shrinks_as_its_numbers_come_across_the_wrap() {
        let mut gaps = Gaps::default();
        gaps.open(NOW, Number(u32::MAX - 1), 6, &timing());
        gaps.open(NOW, Number(10), 1, &timing());
        for came in [0, u32::MAX - 1, 3, 1] {
            assert!(!gaps.fill(Number(came)));
        }
        gaps.ripen(NOW, Number(14), 3);
        assert_eq!(asked(&mut gaps, NOW), [(u32::MAX, 1), (2, 1), (10, 1)]);
        assert!(gaps.fill(Number(2)), "it had been asked for");
        assert_eq!(gaps.len(), 2);
    }

    #[test]
    fn a_request_is_made_twice_and_again_while_an_answer_comes_in_time() {
        let mut gaps = Gaps::default();
        gaps.open(NOW, Number(5), 1, &timing());
        let mut times = Vec::new();
        for ms in 0..=240 {
            if !asked(&mut gaps, NOW + Duration::from_millis(ms)).is_empty() {
                times.push(ms);
            }
        }
        assert_eq!(times, [10, 20, 110, 120], "the deadline is 240 ms and an answer takes 80");
        assert_eq!(gaps.due(), None);
    }

    #[test]
    fn three_later_datagrams_make_a_gap_due_and_two_do_not() {
        let mut gaps = Gaps::default();
        gaps.open(NOW, Number(5), 1, &timing());
        gaps.ripen(NOW, Number(8), 3);
        assert!(asked(&mut gaps, NOW).is_empty());
        gaps.ripen(NOW, Number(9), 3);
        assert_eq!(asked(&mut gaps, NOW), [(5, 1)]);
    }
}
