//! When a source is woken, what it says again then, and what it gives up: the peer's silence, a cut, the pause's budget.
//!
//! A cut costs time only, up to the limit of its own: nobody can answer through it, so the wait for an answer begins anew
//! when it has ended. What follows from giving up is not decided here.

use std::time::Duration;

use super::{Action, Source, State};
use crate::migration::message::{Handover, MigrationMessage, Refusal};
use crate::migration::step::Step;

/// What a flow that is handed over takes to travel: 42 bytes at 3.4 Mbit/s. Copies of a message must not pile up before the one
/// that is on its way.
const FLOW_TIME: Duration = Duration::from_micros(100);

impl Source {
    /// When [`super::Event::Tick`] is due at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        let own = match &self.state {
            State::Proposed { .. } | State::Reserving { .. } if self.link_down_since.is_some() => None,
            State::Proposed { give_up_at, .. }
            | State::Reserving { give_up_at }
            | State::Parked { give_up_at, .. } => Some((*give_up_at).min(self.next_repeat)),
            State::Parking { stopped_at, predicted, .. } => {
                stopped_at.map(|at| self.pause_deadline(at, *predicted))
            }
            State::Offered { .. }
            | State::Reclaiming { .. }
            | State::Promised { .. }
            | State::Committed { .. }
            | State::Aborting { told: false, .. }
            | State::Aborting { owes: true, .. } => Some(self.next_repeat),
            State::Preflight
            | State::PreCopy { .. }
            | State::Released
            | State::Aborting { told: true, owes: false, .. }
            | State::Done(_) => None,
        };
        let cut = self.link_down_since.filter(|_| self.ends_by_a_cut());
        let cut = cut.map(|since| since + self.limits.cut_limit);
        [own, cut].into_iter().flatten().min()
    }

    pub(super) fn on_link_up(&mut self, now: Duration) -> Step<Action> {
        self.link_down_since = None;
        if let State::Proposed { give_up_at, .. } | State::Reserving { give_up_at } = &mut self.state {
            *give_up_at = now + self.limits.answer;
        }
        if let Some(step) = self.hand_over_on_link_up(now) {
            return step;
        }
        self.repeat(now)
    }

    pub(super) fn on_tick(&mut self, now: Duration) -> Step<Action> {
        if let Some(since) = self.link_down_since
            && now >= since + self.limits.cut_limit
            && self.ends_by_a_cut()
        {
            return self.give_up(Refusal::Link(format!("{} s", (now - since).as_secs())));
        }
        self.ask_if_due(now);
        match &self.state {
            State::Proposed { give_up_at, .. } | State::Reserving { give_up_at }
                if now >= *give_up_at && self.link_down_since.is_none() =>
            {
                self.give_up(Refusal::Other("The other site did not answer in time".into()))
            }
            State::Parking { stopped_at: Some(at), predicted, .. }
                if now >= self.pause_deadline(*at, *predicted) =>
            {
                self.give_up(Refusal::PauseBudget)
            }
            State::Parked { give_up_at, .. } if now >= *give_up_at => self.give_up(Refusal::PauseBudget),
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. }
            | State::Offered { .. }
            | State::Reclaiming { .. }
            | State::Promised { .. }
            | State::Committed { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => self.repeat_if_due(now),
        }
    }

    fn ends_by_a_cut(&self) -> bool {
        matches!(self.state, State::Proposed { .. } | State::Reserving { .. } | State::PreCopy { .. })
    }

    fn repeat_if_due(&mut self, now: Duration) -> Step<Action> {
        if now < self.next_repeat {
            return Step::nothing();
        }
        if self.link_down_since.is_some() {
            // Nobody would hear it; the register may.
            self.next_repeat = now + self.repeat_after();
            return Step::act(self.question().into_iter().collect());
        }
        self.repeat(now)
    }

    /// How long an answer is waited for: longer if what was said takes a while to travel.
    pub(super) fn repeat_after(&self) -> Duration {
        let travels = match &self.state {
            State::Offered { handover, .. }
            | State::Promised { handover }
            | State::Committed { handover, .. } => travel_time(handover),
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. }
            | State::Reclaiming { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => Duration::ZERO,
        };
        self.limits.repeat + travels
    }

    /// Says again what is not answered yet.
    fn repeat(&mut self, now: Duration) -> Step<Action> {
        self.next_repeat = now + self.repeat_after();
        let said = self.unanswered().map(Action::Send);
        Step::act(said.into_iter().chain(self.question()).collect())
    }

    fn unanswered(&self) -> Option<MigrationMessage> {
        Some(match &self.state {
            State::Proposed { proposal, .. } => MigrationMessage::Propose(proposal.clone()),
            // Past the reservation it asks whether that still holds: a destination that lost it while the
            // link was down has nobody left who would say so unasked.
            State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. } => MigrationMessage::Reserve { epoch: self.attempt.epoch },
            State::Offered { handover, .. } => {
                MigrationMessage::Offer { epoch: self.attempt.epoch, handover: handover.clone() }
            }
            State::Promised { handover } | State::Committed { handover, .. } => {
                MigrationMessage::Commit { epoch: self.attempt.epoch, handover: handover.clone() }
            }
            State::Aborting { told: false, why, .. } => {
                MigrationMessage::Abort { epoch: self.attempt.epoch, why: why.clone() }
            }
            State::Preflight
            | State::Reclaiming { .. }
            | State::Released
            | State::Aborting { told: true, .. }
            | State::Done(_) => return None,
        })
    }

    pub(super) fn pause_deadline(&self, stopped_at: Duration, predicted: Duration) -> Duration {
        stopped_at + predicted * 2 + self.limits.pause_budget
    }
}

/// How long a hand-over may take to travel.
pub(super) fn travel_time(handover: &Handover) -> Duration {
    let flows = handover.nics.iter().map(|nic| nic.flows.len()).sum::<usize>();
    FLOW_TIME * u32::try_from(flows).unwrap_or(u32::MAX)
}
