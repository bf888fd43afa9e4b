//! Whether what is left of the disks gets less while the guest writes on, and how much it may write if not (Bradford et al.,
//! VEE 2007, section 3.2: write throttling).
//!
//! ```text
//!  a span: at least 10 s out of step, without a second in which nothing was sent, at least 4 MiB in all
//!    ──▶ an eighth of that is gone ──yes──▶ the next span
//!                 └──no──▶ a limit of half of what the link carries, or half of the last limit
//! ```
//!
//! What is sent makes what is left less by as much, and by more where it compresses, unless the guest adds to it. A copy that
//! gains less than an eighth would take eight times as long. While the link is down nothing is learnt. A limit stays until the
//! attempt ends: what was too much will be again. Deliberately not here: setting it, and the guest's memory, which [`super::convergence`] follows.

use std::time::Duration;

use crate::units::{Bytes, Rate};

/// What a span has at least: less is noise.
const SPAN: Duration = Duration::from_secs(10);
const SPAN_SENT: Bytes = Bytes(4 << 20);
/// The part of what was sent that must be gone: one in so many.
const GAINED: u64 = 8;
/// Without anything sent for so long, the disks are not what is waited for.
const STILL: Duration = Duration::from_secs(1);
/// The least a guest may write: with less its file system stalls for minutes.
const LEAST_LIMIT: Rate = Rate(256 << 10);

/// Follows the disks of one attempt.
#[derive(Debug, Clone, Default)]
pub struct DiskPace {
    began: Option<Look>,
    /// When something was sent last, and how much that made in all.
    moved: Option<(Duration, Bytes)>,
    limit: Option<Rate>,
}

/// The disks at one moment.
#[derive(Debug, Clone, Copy)]
struct Look {
    at: Duration,
    left: Bytes,
    sent: Bytes,
}

impl DiskPace {
    /// Nothing was seen.
    pub fn new() -> Self {
        Self::default()
    }

    /// At `now` so much is left or not acknowledged, `None` while the disks are in step; so much of them was packed for the
    /// link since the attempt began, and so much the link carries. Gives a limit where there is a new one: what the guest may
    /// write from now on, to all of its disks.
    pub fn handle_left(
        &mut self,
        now: Duration,
        left: Option<Bytes>,
        sent: Bytes,
        goodput: Rate,
    ) -> Option<Rate> {
        let stood_still = self.stood_still(now, sent);
        let Some(left) = left.filter(|_| !stood_still && goodput.0 > 0) else {
            self.began = None;
            return None;
        };
        let look = Look { at: now, left, sent };
        let began = *self.began.get_or_insert(look);
        let (elapsed, span_sent) = (now.saturating_sub(began.at), sent.0.saturating_sub(began.sent.0));
        if elapsed < SPAN || span_sent < SPAN_SENT.0 {
            return None;
        }
        self.began = Some(look);
        if began.left.0.saturating_sub(left.0) >= span_sent / GAINED {
            return None;
        }
        let half = Rate(self.limit.unwrap_or(goodput).0 / 2).max(LEAST_LIMIT);
        (self.limit.replace(half) != Some(half)).then_some(half)
    }

    fn stood_still(&mut self, now: Duration, sent: Bytes) -> bool {
        let (at, before) = *self.moved.get_or_insert((now, sent));
        let still = now.saturating_sub(at) >= STILL;
        if sent > before {
            self.moved = Some((now, sent));
        }
        still
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: u64 = 10 << 20;
    const GOODPUT: Rate = Rate(LINK);
    const MIB: u64 = 1 << 20;
    /// With less than this left the disks are in step.
    const IN_STEP: u64 = 4 * MIB;

    fn out_of_step(left: u64) -> Option<Bytes> {
        Some(Bytes(left)).filter(|left| left.0 > IN_STEP)
    }

    /// A copy of `left` bytes to which a guest adds `written` a second, as much as its limit lets it: the limits, and what is
    /// left after `seconds`.
    fn play(left: u64, written: u64, seconds: u64) -> (Vec<Rate>, u64) {
        let (mut pace, mut left, mut sent, mut limits) = (DiskPace::new(), left, 0, Vec::<Rate>::new());
        for tenth in 0..seconds * 10 {
            let now = Duration::from_millis(tenth * 100);
            limits.extend(pace.handle_left(now, out_of_step(left), Bytes(sent), GOODPUT));
            let written = limits.last().map_or(written, |limit| written.min(limit.0));
            left += written / 10;
            sent += left.min(LINK / 10);
            left -= left.min(LINK / 10);
        }
        (limits, left)
    }

    #[test]
    fn a_copy_that_ends_is_not_slowed_down_however_large_it_is() {
        assert_eq!(play(100 << 30, 0, 12_000).0, []);
        let (limits, left) = play(1 << 30, LINK / 2, 600);
        assert!(limits.is_empty() && left < IN_STEP, "{left}");
        assert_eq!(play(3 << 20, LINK, 600).0, [], "what a guest writes in the ordinary way");
    }

    #[test]
    fn a_guest_that_writes_as_fast_as_the_link_carries_is_slowed_down_until_it_ends() {
        for written in [LINK, 11 * MIB, 50 * MIB] {
            let (limits, left) = play(200 * MIB, written, 300);
            assert!(limits == [Rate(LINK / 2)] && left < IN_STEP, "{written}: {limits:?}, {left} left");
        }
    }

    #[test]
    fn a_limit_that_is_not_enough_is_halved_down_to_the_least() {
        let mut pace = DiskPace::new();
        let look = |tenth: u64| {
            let (now, sent) = (Duration::from_millis(tenth * 100), Bytes(tenth * LINK / 10));
            pace.handle_left(now, out_of_step(100 * MIB), sent, GOODPUT)
        };
        let seen: Vec<_> = (0..10_000).filter_map(look).collect();
        assert_eq!(seen[..2], [Rate(LINK / 2), Rate(LINK / 4)]);
        assert_eq!(seen.last(), Some(&LEAST_LIMIT));
        assert!(seen.windows(2).all(|pair| pair[1] < pair[0]), "each is told once");
    }

    #[test]
    fn a_link_that_carries_nothing_is_not_the_guests_fault() {
        let mut pace = DiskPace::new();
        let mut look = |tenth: u64, left: u64, sent: u64| {
            pace.handle_left(Duration::from_millis(tenth * 100), out_of_step(left), Bytes(sent), GOODPUT)
        };
        let mut sent = 0;
        for tenth in 0..600 {
            assert_eq!(look(tenth, 4 * MIB + tenth * MIB / 10, sent), None, "it carries nothing");
        }
        // It is back, and everything that was written meanwhile goes out: no second was like the one before.
        for tenth in 600..900 {
            sent += LINK / 10;
            assert_eq!(look(tenth, (64 * MIB).saturating_sub(sent) + MIB, sent), None, "it is caught up");
        }
    }
}
