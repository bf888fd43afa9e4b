//! Whether a machine whose QEMU is gone boots again, and when.
//!
//! Says nothing of whether it may run here: that is the ledger's, and whoever starts it asks for a permit as
//! an operator's start does. It counts starts of its own only.

use std::time::Duration;

use super::Restart;

/// How a QEMU that nobody had asked to stop came to its end, as far as it was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest powered itself off (QEMU's SHUTDOWN event, `guest-shutdown` of `qapi/run-state.json`).
    PoweredOff,
    /// Somebody on the host ended QEMU in order: a signal that it handles, or `quit` on another monitor.
    Told,
    /// It was killed, or crashed.
    Crashed,
    /// Nobody was there to see it, such as a gateway that was down itself. An operator may have been told since
    /// that this copy is destroyed, and have let another one run.
    Unseen,
}

/// How often and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartLimits {
    /// Starts in a row; 0 starts nothing.
    pub starts: u32,
    /// The wait before the first of them; each later wait is twice as long.
    pub first_delay: Duration,
    /// A machine that has run for this long begins a new row.
    pub steady: Duration,
}

/// The longest wait before a start.
const MAX_DELAY: Duration = Duration::from_secs(300);

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its operator starts it, or what ended it does.
    StaysDown,
    /// It is down because its guest wanted that, and is no longer meant to run.
    WantsToBeOff,
    /// It is started again after `delay`, for the `number`th time in a row.
    StartsAgain {
        /// From 1.
        number: u32,
        /// From now.
        delay: Duration,
    },
    /// It has been started too often in a row.
    GivenUp,
}

/// The starts of one machine. Time counts from any fixed moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restarts {
    in_a_row: u32,
    started: Option<Duration>,
}

impl Restarts {
    /// The machine was started again at `now`.
    pub fn handle_started(&mut self, now: Duration) {
        self.started = Some(now);
    }

    /// Its QEMU is gone at `now`.
    pub fn handle_end(
        &mut self,
        end: End,
        policy: Restart,
        limits: &RestartLimits,
        now: Duration,
    ) -> Verdict {
        match (end, policy) {
            (End::PoweredOff, Restart::Never | Restart::OnCrash) => return Verdict::WantsToBeOff,
            (End::Told | End::Unseen, Restart::Never | Restart::OnCrash) | (End::Crashed, Restart::Never) => {
                return Verdict::StaysDown;
            }
            (End::Crashed, Restart::OnCrash) => {}
        }
        if self.started.take().is_none_or(|started| now.saturating_sub(started) >= limits.steady) {
            self.in_a_row = 0;
        }
        if self.in_a_row >= limits.starts {
            // It has to be the next row's first, should an operator start it.
            self.in_a_row = 0;
            return Verdict::GivenUp;
        }
        let delay = limits.first_delay.saturating_mul(2_u32.saturating_pow(self.in_a_row)).min(MAX_DELAY);
        self.in_a_row += 1;
        Verdict::StartsAgain { number: self.in_a_row, delay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RestartLimits =
        RestartLimits { starts: 3, first_delay: Duration::from_secs(1), steady: Duration::from_secs(600) };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Crashes one second after each start that was granted.
    fn crash(restarts: &mut Restarts, limits: &RestartLimits, now: &mut Duration) -> Verdict {
        let verdict = restarts.handle_end(End::Crashed, Restart::OnCrash, limits, *now);
        if let Verdict::StartsAgain { delay, .. } = verdict {
            restarts.handle_started(*now + delay);
            *now += delay + at(1);
        }
        verdict
    }

    #[test]
    fn a_machine_that_crashes_again_and_again_is_started_ever_later_and_then_given_up() {
        let (mut restarts, mut now) = (Restarts::default(), at(0));
        let seen: Vec<_> = (0..4).map(|_| crash(&mut restarts, &LIMITS, &mut now)).collect();
        let again = |number, seconds| Verdict::StartsAgain { number, delay: at(seconds) };
        assert_eq!(seen, [again(1, 1), again(2, 2), again(3, 4), Verdict::GivenUp]);
    }

    #[test]
    fn one_that_ran_steadily_begins_a_new_row() {
        let (mut restarts, mut now) = (Restarts::default(), at(0));
        for _ in 0..3 {
            crash(&mut restarts, &LIMITS, &mut now);
        }
        now += LIMITS.steady;
        let verdict = crash(&mut restarts, &LIMITS, &mut now);
        assert_eq!(verdict, Verdict::StartsAgain { number: 1, delay: at(1) });
    }

    #[test]
    fn an_operators_start_after_it_was_given_up_begins_a_new_row() {
        let (mut restarts, mut now) = (Restarts::default(), at(0));
        while crash(&mut restarts, &LIMITS, &mut now) != Verdict::GivenUp {}
        assert!(matches!(crash(&mut restarts, &LIMITS, &mut now), Verdict::StartsAgain { number: 1, .. }));
    }

    #[test]
    fn only_a_crash_under_the_policy_for_it_starts_anything() {
        for (end, policy, wanted) in [
            (End::PoweredOff, Restart::OnCrash, Verdict::WantsToBeOff),
            (End::PoweredOff, Restart::Never, Verdict::WantsToBeOff),
            (End::Told, Restart::OnCrash, Verdict::StaysDown),
            (End::Told, Restart::Never, Verdict::StaysDown),
            (End::Unseen, Restart::OnCrash, Verdict::StaysDown),
            (End::Crashed, Restart::Never, Verdict::StaysDown),
        ] {
            assert_eq!(
                Restarts::default().handle_end(end, policy, &LIMITS, at(5)),
                wanted,
                "{end:?} {policy:?}"
            );
        }
    }

    #[test]
    fn no_starts_means_none_and_no_wait_is_longer_than_the_longest() {
        let none = RestartLimits { starts: 0, ..LIMITS };
        assert_eq!(crash(&mut Restarts::default(), &none, &mut at(0)), Verdict::GivenUp);
        let many = RestartLimits { starts: 100, first_delay: at(1), steady: at(1_000_000) };
        let (mut restarts, mut now) = (Restarts::default(), at(0));
        let last = (0..100).map(|_| crash(&mut restarts, &many, &mut now)).last();
        assert_eq!(last, Some(Verdict::StartsAgain { number: 100, delay: MAX_DELAY }));
    }
}
