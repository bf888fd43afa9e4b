//! Whether a machine that stayed is tried again, and when.
//!
//! A retry is a new attempt with an id of its own and the same epoch; the stage machines know nothing of
//! it. Only what passes by itself is tried again: a pause that took too long, a gateway at the other
//! site that was restarted, what came damaged and is sent anew. What an operator has to look at is not, and an operator's
//! word ends it all.

use std::time::Duration;

use crate::ids::SiteName;
use crate::migration::message::Refusal;

/// The longest wait before a retry, however many there were.
const MAX_DELAY: Duration = Duration::from_secs(600);

/// How often and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryLimits {
    /// Attempts after the operator's own; 0 leaves it at that one.
    pub retries: u32,
    /// The wait before the first of them; each later wait is twice as long.
    pub first_delay: Duration,
}

/// What follows an attempt that did not move the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Which retry it is, from 1.
    pub number: u32,
    /// How long after the end of the attempt it begins.
    pub delay: Duration,
}

impl RetryLimits {
    /// What follows when retry `number` (0: the operator's own attempt) of the machine at `site` stayed
    /// for `why`.
    pub fn after(&self, number: u32, why: &Refusal, site: &SiteName) -> Option<Retry> {
        if number >= self.retries || !passes(number, why, site) {
            return None;
        }
        let delay = self.first_delay.saturating_mul(2u32.saturating_pow(number)).min(MAX_DELAY);
        Some(Retry { number: number + 1, delay })
    }
}

fn passes(number: u32, why: &Refusal, site: &SiteName) -> bool {
    match why {
        Refusal::PauseBudget => true,
        // Our own restart forgets what was asked for.
        Refusal::Restarted(restarted) => restarted != site,
        // The next attempt asks anew what the other site has, and sends the rest again. One that is damaged, too, has a host
        // that is broken.
        Refusal::Verification(_) => number == 0,
        // The other site may still be tidying up after the attempt before.
        Refusal::Busy(_) => number > 0,
        Refusal::NotAllowed { .. }
        | Refusal::NotEnough { .. }
        | Refusal::Incompatible(_)
        | Refusal::CannotTravel(_)
        | Refusal::Names(_)
        | Refusal::Link(_)
        | Refusal::Hypervisor(_)
        | Refusal::Operator
        | Refusal::PeerMisbehaved(_)
        | Refusal::Diverges(_)
        | Refusal::Other(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RetryLimits = RetryLimits { retries: 3, first_delay: Duration::from_secs(2) };

    fn after(number: u32, why: &Refusal) -> Option<(u32, u64)> {
        let retry = LIMITS.after(number, why, &"a".parse().unwrap())?;
        Some((retry.number, retry.delay.as_secs()))
    }

    #[test]
    fn a_pause_that_took_too_long_is_tried_again_ever_later_and_not_for_ever() {
        let seen: Vec<_> = (0..4).map(|number| after(number, &Refusal::PauseBudget)).collect();
        assert_eq!(seen, [Some((1, 2)), Some((2, 4)), Some((3, 8)), None]);
        let often = RetryLimits { retries: 100, ..LIMITS };
        let late = often.after(70, &Refusal::PauseBudget, &"a".parse().unwrap());
        assert_eq!(late, Some(Retry { number: 71, delay: MAX_DELAY }));
    }

    #[test]
    fn without_retries_an_attempt_is_the_last() {
        let none = RetryLimits { retries: 0, ..LIMITS };
        assert_eq!(none.after(0, &Refusal::PauseBudget, &"a".parse().unwrap()), None);
    }

    #[test]
    fn the_other_sites_restart_passes_and_our_own_does_not() {
        let restarted = |site: &str| Refusal::Restarted(site.parse().unwrap());
        assert_eq!(after(0, &restarted("b")), Some((1, 2)));
        assert_eq!(after(0, &restarted("a")), None);
    }

    #[test]
    fn what_came_damaged_is_sent_once_more() {
        let damaged = Refusal::Verification("disk root: digest".into());
        assert_eq!(after(0, &damaged), Some((1, 2)));
        assert_eq!(after(1, &damaged), None, "twice is no accident");
    }

    #[test]
    fn an_operators_word_and_what_needs_one_end_it() {
        for why in [Refusal::Operator, Refusal::Verification("disk".into()), Refusal::Link("600 s".into())] {
            assert_eq!(after(1, &why), None, "{why}");
        }
        assert_eq!(after(0, &Refusal::Busy("web1".into())), None);
        assert_eq!(after(1, &Refusal::Busy("web1".into())), Some((2, 4)));
    }
}
