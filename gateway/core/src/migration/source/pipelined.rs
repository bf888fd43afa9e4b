//! The source that commits right behind the last byte: when it does not, and how it asks for its machine.
//!
//! ```text
//!  Parking --all sent, the link is down--> Parked --up--> Committed --past its budget, or an operator wants it--> asks
//! ```
//!
//! * nothing is given away into a cut that is known: the guest is resumed when the pause's budget is over;
//! * who asks gives nothing up: only the destination's durable refusal brings the machine back, and one that has all of it
//!   by then runs it.

use std::time::Duration;

use super::{Action, Source, State};
use crate::migration::CommitMode;
use crate::migration::message::{Handover, Refusal};
use crate::migration::step::Step;

impl Source {
    /// Everything is on its way. That the guest is stopped stands in the journal already.
    pub(super) fn hand_over_behind(
        &mut self,
        handover: Box<Handover>,
        give_up_at: Duration,
        now: Duration,
    ) -> Step<Action> {
        if self.link_down_since.is_none() {
            return self.hand_over(handover, give_up_at, now);
        }
        self.state = State::Parked { give_up_at, handover };
        Step::nothing()
    }

    /// What a link that is up again changes: nothing could be heard meanwhile.
    pub(super) fn hand_over_on_link_up(&mut self, now: Duration) -> Option<Step<Action>> {
        if self.attempt.commit != CommitMode::Pipelined {
            return None;
        }
        if let State::Committed { ask_at: Some(at), .. } = &mut self.state {
            *at = now + self.limits.pause_budget;
        }
        let State::Parked { handover, give_up_at } = &self.state else { return None };
        let (handover, give_up_at) = (handover.clone(), *give_up_at);
        Some(self.hand_over(handover, give_up_at, now))
    }

    /// Whether the machine has stood still for too long although the link is up.
    pub(super) fn ask_if_due(&mut self, now: Duration) {
        if self.link_down_since.is_some() {
            return;
        }
        if let State::Committed { ask_at: Some(at), asks: asks @ None, .. } = &mut self.state
            && now >= *at
        {
            *asks = Some(Refusal::PauseBudget);
        }
    }

    /// An operator wants a machine back that was given away behind its last byte. Whether that can still be is the
    /// destination's to say.
    pub(super) fn ask_for_operator(&mut self) -> bool {
        let State::Committed { asks, .. } = &mut self.state else { return false };
        if self.attempt.commit == CommitMode::Pipelined {
            asks.get_or_insert(Refusal::Operator);
        }
        true
    }
}
