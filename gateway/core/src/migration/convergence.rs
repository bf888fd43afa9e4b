//! When to stop the guest: the gateway's decision, not QEMU's.
//!
//! QEMU measures the bandwidth of the socket it writes to, which is the gateway's and says nothing
//! of the WAN. The gateway knows the goodput, what is still unacknowledged, what reduction leaves of
//! a page, and how far the disks are, so it predicts the pause and stops the guest when the
//! prediction meets the budget, or when another round no longer shortens it (Clark 2005, section
//! 3.3), or gives up if it may not be slowed down. Slowing it down is QEMU's and [`super::disk_pace`]'s.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Rate};

/// How far pre-copy is, as measured at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Guest memory that QEMU still has to write, before reduction.
    pub memory_remaining: Bytes,
    /// How fast the guest dirties memory.
    pub dirty_rate: Rate,
    /// Since QEMU last looked for dirty pages. What was dirtied since is not in `memory_remaining`
    /// yet; it appears at the next look, the one after the guest has stopped included.
    pub since_sync: Duration,
    /// Acknowledged bytes per second on the link.
    pub goodput: Rate,
    /// Bytes on their way and not acknowledged, memory and disk.
    pub unacknowledged: Bytes,
    /// Bytes on the wire per 1000 bytes QEMU wrote.
    pub reduction_permille: u32,
    /// The round of memory, from 1; 0 before memory has started.
    pub round: u64,
    /// All disk content is sent but for what the guest writes now.
    pub disks_in_step: bool,
    /// Round-trip time of the link.
    pub rtt: Duration,
    /// How long the oldest of `unacknowledged` has waited ([`super::lag`]).
    pub waited: Duration,
    /// Pages were named by blocks of the disks that the destination has not read yet: what the guest writes there last waits
    /// for that.
    pub names_unread: bool,
}

/// What the operator asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseBudget {
    /// Stop as soon as the predicted pause is at most this (default 300 ms).
    pub target: Duration,
    /// Never stop for longer than this by prediction; keep copying instead (default 30 s).
    pub limit: Duration,
    /// Rounds after which a pause between target and limit is taken when it no longer shrinks
    /// (default 4).
    pub rounds: u64,
    /// Give up when no round gets below the limit, because the guest may not be slowed down (default false: go on).
    pub gives_up: bool,
    /// How often the pause goes from one site to the other (default 3): [`super::CommitMode::ways_in_pause`].
    pub ways: u32,
}

impl Default for PauseBudget {
    fn default() -> Self {
        Self {
            target: Duration::from_millis(300),
            limit: Duration::from_secs(30),
            rounds: 4,
            gives_up: false,
            ways: 3,
        }
    }
}

/// Whether so little waits of what the guest writes to its disks that the rest is memory's: hardly more than is on its
/// way at any time on this link.
pub fn disks_in_step(waiting: Bytes, goodput: Rate, rtt: Duration) -> bool {
    waiting <= goodput.bytes_in(rtt + IN_STEP).max(IN_STEP_BYTES)
}

/// How fast QEMU may write while so much is left, of this round and of what was changed since it began: it is at its end in a
/// look and a half at the earliest, because with nothing left it stops the guest by itself, before packets are held for it.
/// A machine that was at the other site before travels as a few bytes per page, so that much more than the link carries may
/// be written.
fn writing_rate(remaining: Bytes, link: Rate) -> Rate {
    let fitting = Rate((remaining.0 as f64 / LOOK_AND_A_HALF.as_secs_f64()) as u64);
    Rate(fitting.0.min(link.0.saturating_mul(MOST_OF_LINK)).max(link.0 / LEAST_OF_LINK)).max(SLOWEST)
}

/// QEMU takes 0 for no limit, and counts in tenths of a second.
const SLOWEST: Rate = Rate(10 * 4096);

/// The outcome of one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round pays.
    Continue,
    /// Stop the guest now; the pause should be about this long.
    Stop(Duration),
    /// No round will get below this pause, which is longer than allowed.
    GiveUp(Duration),
}

/// Follows the rounds of one migration.
#[derive(Clone, Debug, Default)]
pub struct Convergence {
    round: u64,
    shortest: Option<Duration>,
    shortest_in_last: Option<Duration>,
    shortest_in_round: Option<Duration>,
    rounds_without_gain: u64,
}

/// A look is a tenth of a second.
const LOOK_AND_A_HALF: Duration = Duration::from_millis(150);
/// More is no use: QEMU stops the guest when less is left than it wrote in a millisecond, which is 16 ms of the link then.
const MOST_OF_LINK: u64 = 16;
/// Less would make the end of each round long.
const LEAST_OF_LINK: u64 = 32;
/// Disks in step are behind by less than this, a round trip aside.
const IN_STEP: Duration = Duration::from_millis(100);
/// A destination that keeps up is behind by no more than this, the link's own time aside. Looks are a tenth of a second apart:
/// with less a long round trip would be taken for it, and with more a tenth of a second for none.
const KEEPS_UP: Duration = Duration::from_millis(50);
/// Whatever the link carries: a few chunks wait at any time (84 ms at 100 Mbit/s).
const IN_STEP_BYTES: Bytes = Bytes(1 << 20);

/// Device state of a small guest on the wire, before anything is known (measured: 21 KB compressed).
const DEVICE_STATE: u64 = 64 << 10;

impl Progress {
    /// The pause if the guest were stopped now: the rest and what was dirtied unseen over the
    /// goodput, and so many ways from one site to the other. `None` while no goodput is known.
    pub fn predicted_pause(&self, ways: u32) -> Option<Duration> {
        let dirtied = self.dirty_rate.bytes_in(self.since_sync);
        let memory = self.memory_remaining.0.saturating_add(dirtied.0);
        let memory = memory.saturating_mul(u64::from(self.reduction_permille)) / 1000;
        let rest = Bytes(memory + self.unacknowledged.0 + DEVICE_STATE);
        Some(self.goodput.time_for(rest)?.max(self.behind()) + self.rtt * ways / 2)
    }

    /// The destination has what was sent, but for what the link takes for it, and has read all that pages are named by.
    pub fn destination_keeps_up(&self) -> bool {
        !self.names_unread && self.behind() <= KEEPS_UP
    }

    /// The guest is not stopped, and QEMU is not to stop it, although memory may be at its end: the destination is behind.
    pub fn waits_for_destination(&self) -> bool {
        self.round > 1 && !self.destination_keeps_up()
    }

    /// How fast QEMU may write on this link. What was changed since it looked comes after what is left: a guest that changes much is
    /// stopped by nobody but us. One of which little is left goes on by a page at a time while the destination is behind.
    pub fn writing_rate(&self, link: Rate) -> Rate {
        let changed = self.dirty_rate.bytes_in(self.since_sync);
        let usual = writing_rate(Bytes(self.memory_remaining.0.saturating_add(changed.0)), link);
        let may_end = usual <= writing_rate(Bytes(0), link);
        if may_end && self.waits_for_destination() { SLOWEST } else { usual }
    }

    /// How long what was sent waits for the destination, beyond what the link takes for it.
    pub fn behind(&self) -> Duration {
        let link = self.goodput.time_for(self.unacknowledged).unwrap_or_default() + self.rtt;
        self.waited.saturating_sub(link)
    }
}

impl Convergence {
    /// Looks at the newest measurement and decides.
    pub fn decide(&mut self, progress: &Progress, budget: &PauseBudget) -> Decision {
        // In the first round nobody knows yet how fast the guest dirties what was sent.
        if progress.round <= 1 || !progress.disks_in_step || progress.names_unread {
            return Decision::Continue;
        }
        let Some(pause) = progress.predicted_pause(budget.ways) else {
            return Decision::Continue;
        };
        // They are paid whatever is copied: not for another round to win back.
        let budgeted = budget.target.saturating_add(progress.rtt * budget.ways / 2);
        // What a destination has to catch up with is paid in the pause, or while the guest runs.
        if pause <= budgeted && progress.destination_keeps_up() {
            return Decision::Stop(pause);
        }
        self.enter_round(progress.round);
        self.shortest_in_round = Some(self.shortest_in_round.map_or(pause, |least| least.min(pause)));
        let no_more_gain = self.rounds_without_gain >= 2 && progress.round > budget.rounds;
        // Of the last round: what an earlier one promised may never come again.
        let at_the_bottom = self.shortest_in_last.is_some_and(|least| pause <= least * 11 / 10);
        if no_more_gain && at_the_bottom && pause <= budget.limit {
            return Decision::Stop(pause);
        }
        let never_below = self.shortest_in_last.is_some_and(|least| least > budget.limit);
        // A destination that is slow is no reason to give up: it is waited for.
        let too_long = pause > budget.limit && progress.behind() <= budget.limit;
        if no_more_gain && never_below && too_long && budget.gives_up {
            return Decision::GiveUp(pause);
        }
        Decision::Continue
    }

    fn enter_round(&mut self, round: u64) {
        if round == self.round {
            return;
        }
        self.round = round;
        let Some(last) = self.shortest_in_round.take() else {
            return;
        };
        // Less than a tenth gained is no gain: the guest dirties as fast as the link carries.
        if self.shortest.is_some_and(|least| last >= least * 9 / 10) {
            self.rounds_without_gain += 1;
        } else {
            self.rounds_without_gain = 0;
        }
        self.shortest = Some(self.shortest.map_or(last, |least| least.min(last)));
        self.shortest_in_last = Some(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(round: u64, remaining: u64) -> Progress {
        Progress {
            memory_remaining: Bytes(remaining),
            goodput: Rate::mbit(100),
            reduction_permille: 1000,
            round,
            disks_in_step: true,
            rtt: Duration::from_millis(100),
            ..Progress::default()
        }
    }

    #[test]
    fn a_small_rest_stops_the_guest() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget::default();
        assert_eq!(convergence.decide(&progress(1, 200 << 20), &budget), Decision::Continue);
        assert!(matches!(convergence.decide(&progress(2, 1 << 20), &budget), Decision::Stop(_)));
    }

    #[test]
    fn pages_dirtied_since_qemu_looked_lengthen_the_pause() {
        let end_of_round =
            Progress { dirty_rate: Rate(1_040_384), goodput: Rate(590_000), ..progress(6, 24_576) };
        let long_ago = Progress { since_sync: Duration::from_secs(17), ..end_of_round };
        assert!(end_of_round.predicted_pause(3).is_some_and(|pause| pause < Duration::from_secs(1)));
        assert!(long_ago.predicted_pause(3).is_some_and(|pause| pause > Duration::from_secs(29)));
        let mut convergence = Convergence::default();
        let decision = convergence.decide(&long_ago, &PauseBudget::default());
        assert_eq!(decision, Decision::Continue);
    }

    #[test]
    fn a_destination_that_is_behind_catches_up_while_the_guest_runs_but_is_not_waited_for_without_end() {
        let budget = PauseBudget::default();
        let waits = |ms| Progress { waited: Duration::from_millis(ms), ..progress(2, 4096) };
        let decide = |look: &Progress| Convergence::default().decide(look, &budget);
        assert!(matches!(decide(&waits(150)), Decision::Stop(_)), "the link's round trip and a little");
        assert_eq!(decide(&waits(151)), Decision::Continue);
        let queued = Progress { unacknowledged: Bytes(2_500_000), ..waits(350) };
        assert!(queued.predicted_pause(1) < Some(Duration::from_millis(300)));
        assert!(matches!(decide(&queued), Decision::Stop(_)), "what the link itself takes is no lag");
        assert!(waits(900).predicted_pause(1) > Some(Duration::from_millis(800)));
        let mut slow = Convergence::default();
        let stopped = (2..20).find(|round| {
            let look = Progress { round: *round, ..waits(900) };
            matches!(slow.decide(&look, &budget), Decision::Stop(_))
        });
        assert!(stopped.is_some_and(|round| round > budget.rounds), "{stopped:?}");
    }

    #[test]
    fn qemu_hardly_writes_while_its_end_would_come_before_the_destination_has_caught_up() {
        let link = Rate::mbit(1000);
        let (least, slowest) = (writing_rate(Bytes(0), link), SLOWEST);
        let look = |round, left, names_unread| Progress { names_unread, ..progress(round, left) };
        assert_eq!(look(2, 4096, true).writing_rate(link), slowest);
        assert_eq!(look(2, 4096, false).writing_rate(link), least);
        assert_eq!(look(1, 4096, true).writing_rate(link), least, "its first round has no end but the next");
        assert!(look(2, 100 << 20, true).writing_rate(link) > least, "much is left");
        let slow = Progress { waited: Duration::from_secs(1), ..progress(2, 4096) };
        assert!(slow.waits_for_destination());
        assert_eq!(slow.writing_rate(link), slowest);
        let changes = Progress { dirty_rate: link, since_sync: Duration::from_secs(1), ..slow };
        assert!(changes.writing_rate(link) > least, "what was changed is left, too");
    }

    #[test]
    fn disks_out_of_step_and_names_of_them_keep_the_guest_running() {
        let mut convergence = Convergence::default();
        let late = Progress { disks_in_step: false, ..progress(9, 0) };
        assert_eq!(convergence.decide(&late, &PauseBudget::default()), Decision::Continue);
        let unread = Progress { names_unread: true, ..progress(9, 0) };
        assert_eq!(convergence.decide(&unread, &PauseBudget::default()), Decision::Continue);
    }

    #[test]
    fn qemu_never_comes_to_the_end_of_a_round_between_two_looks_if_more_than_a_little_is_left() {
        let link = Rate::mbit(100);
        assert_eq!(writing_rate(Bytes(256 << 20), link), Rate(16 * 12_500_000));
        let (mut left, mut looks) = (Bytes(256 << 20), 0);
        while left.0 > 100_000 {
            let written = writing_rate(left, link).bytes_in(Duration::from_millis(100));
            assert!(written < left, "{written} of {left}");
            left = Bytes(left.0 - written.0);
            looks += 1;
        }
        assert!(looks < 20, "the end of a round takes {looks} looks");
        assert_eq!(writing_rate(Bytes(0), link), Rate(12_500_000 / 32));
        assert_eq!(writing_rate(Bytes(0), Rate::mbit(1)), SLOWEST);
    }

    /// A guest that changes `share` of what the link carries, copied in rounds: the shortest pause it could have, a look
    /// each tenth of a second, within a minute.
    fn shortest_pause(share: f64) -> Duration {
        let link = Rate::mbit(100);
        let dirty_rate = Rate((link.0 as f64 * share) as u64);
        let (mut left, mut since_sync, mut shortest) = (64 << 20, Duration::ZERO, Duration::MAX);
        for _ in 0..600 {
            let changed = dirty_rate.bytes_in(since_sync);
            let rest = Progress {
                memory_remaining: Bytes(left),
                goodput: link,
                dirty_rate,
                since_sync,
                ..progress(2, left)
            };
            shortest = shortest.min(rest.predicted_pause(3).unwrap_or(Duration::MAX));
            let allowed = writing_rate(Bytes(left + changed.0), link).0.min(link.0);
            since_sync += Duration::from_millis(100);
            left = left.saturating_sub(allowed / 10);
            if left == 0 {
                (left, since_sync) = (dirty_rate.bytes_in(since_sync).0, Duration::ZERO);
            }
        }
        shortest
    }

    #[test]
    fn a_busy_guests_rounds_get_as_short_as_its_writing_lets_them() {
        let target = PauseBudget::default().target + Duration::from_millis(150);
        for share in [0.1, 0.3, 0.5, 0.7] {
            assert!(shortest_pause(share) <= target, "{share}: {:?}", shortest_pause(share));
        }
    }

    #[test]
    fn what_is_on_its_way_on_a_long_fat_link_does_not_put_disks_out_of_step() {
        let (slow, fast, rtt) = (Rate::mbit(10), Rate::mbit(1000), Duration::from_millis(100));
        assert!(disks_in_step(Bytes(1 << 20), Rate(0), rtt) && disks_in_step(Bytes(1 << 20), slow, rtt));
        assert!(!disks_in_step(Bytes((1 << 20) + 1), slow, rtt));
        assert!(disks_in_step(Bytes(25_000_000), fast, rtt) && !disks_in_step(Bytes(25_000_001), fast, rtt));
    }

    #[test]
    fn a_guest_that_dirties_as_fast_as_the_link_is_stopped_once_rounds_no_longer_gain() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget::default();
        let stopped = (1..20).find(|round| {
            matches!(convergence.decide(&progress(*round, 30 << 20), &budget), Decision::Stop(_))
        });
        assert!(stopped.is_some_and(|round| round > budget.rounds));
    }

    #[test]
    fn one_round_that_promised_more_than_any_other_keeps_nobody_copying() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget::default();
        let lucky = |round| if round == 2 { 6 << 20 } else { 30 << 20 };
        let stopped = (1..20).find(|round| {
            matches!(convergence.decide(&progress(*round, lucky(*round)), &budget), Decision::Stop(_))
        });
        assert!(stopped.is_some());
    }

    #[test]
    fn the_first_rounds_end_says_nothing_of_the_pause() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget::default();
        assert_eq!(convergence.decide(&progress(1, 0), &budget), Decision::Continue);
        let stopped = (2..20).find(|round| {
            matches!(convergence.decide(&progress(*round, 30 << 20), &budget), Decision::Stop(_))
        });
        assert!(stopped.is_some());
    }

    #[test]
    fn a_guest_that_may_not_be_slowed_down_and_never_gets_below_the_limit_is_given_up() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget { limit: Duration::from_secs(1), gives_up: true, ..PauseBudget::default() };
        let ended = (1..100).find_map(|round| match convergence.decide(&progress(round, 1 << 30), &budget) {
            Decision::GiveUp(pause) => Some((round, pause)),
            Decision::Continue | Decision::Stop(_) => None,
        });
        let (round, pause) = ended.expect("it is given up");
        assert!(round > budget.rounds && round < 10 && pause > budget.limit, "{round} {pause:?}");
        // A look that promises more than the best of the last round, as most do, ends nothing below the limit.
        let mut noisy = Convergence::default();
        for round in 1..40 {
            let looks =
                [3 << 20, 9 << 20, 6 << 20].map(|left| noisy.decide(&progress(round, left), &tight(&budget)));
            assert!(looks.iter().all(|look| !matches!(look, Decision::GiveUp(_))), "{round}: {looks:?}");
        }
        let mut shrinking = Convergence::default();
        for round in 1..20 {
            assert!(!matches!(
                shrinking.decide(&progress(round, (1 << 36) >> round), &budget),
                Decision::GiveUp(_)
            ));
        }
    }

    /// The same that stops at no look by its target alone.
    fn tight(budget: &PauseBudget) -> PauseBudget {
        PauseBudget { target: Duration::ZERO, ..*budget }
    }

    #[test]
    fn a_pause_beyond_the_limit_is_never_taken() {
        let mut convergence = Convergence::default();
        let budget = PauseBudget { limit: Duration::from_secs(1), ..PauseBudget::default() };
        for round in 1..100 {
            assert_eq!(convergence.decide(&progress(round, 1 << 30), &budget), Decision::Continue);
        }
    }
}
