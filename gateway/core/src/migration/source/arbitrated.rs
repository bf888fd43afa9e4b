//! The source with an arbiter: who is in doubt asks the register.
//!
//! ```text
//!             +--- past its budget, the register just answered ---> Reclaiming --+
//!  Offered ---|                                                                  |
//!     |       +--- past its budget, it does not, the link is up --> Promised ----|
//!     |                                                                          |
//!     `-------------------------------- the register is the destination's ------`---> Committed
//!     `-------------------------------- it is the source's, or refused ---------`---> Returned
//! ```
//!
//! * A source that promised never asks the register for itself, and one that asked never promises;
//! * it asks for itself only if the register has just answered: else a destination that claimed would be left with
//!   a register that nobody reaches and a source that may not promise;
//! * a machine whose QEMU is gone is not asked for: the destination has the only copy of its memory.

use std::time::Duration;

use super::deadlines::travel_time;
use super::{Action, Source, State};
use crate::migration::CommitMode;
use crate::migration::arbiter::{Request, Verdict};
use crate::migration::message::{Handover, MigrationMessage, Refusal};
use crate::migration::record::{Record, SourceRecord};
use crate::migration::step::Step;

impl Source {
    pub(super) fn is_arbitrated(&self) -> bool {
        self.attempt.commit.is_arbitrated()
    }

    pub(super) fn hand_over(
        &mut self,
        handover: Box<Handover>,
        give_up_at: Duration,
        now: Duration,
    ) -> Step<Action> {
        match self.attempt.commit {
            CommitMode::Confirmed => self.commit(handover, None, now),
            // However late it is, the destination gets the time to load.
            CommitMode::Pipelined => {
                let ask_at = give_up_at.max(now + self.limits.pause_budget);
                self.commit(handover, Some(ask_at), now)
            }
            CommitMode::Arbitrated(_) => self.offer(handover, give_up_at, now),
        }
    }

    fn offer(&mut self, handover: Box<Handover>, give_up_at: Duration, now: Duration) -> Step<Action> {
        // However late it is, the destination gets the time to answer.
        let give_up_at = Some(give_up_at.max(now + self.limits.repeat * 2 + travel_time(&handover)));
        self.state = State::Offered { give_up_at, handover: handover.clone() };
        self.next_repeat = now + self.repeat_after();
        let offer = MigrationMessage::Offer { epoch: self.attempt.epoch, handover: handover.clone() };
        Step::record(Record::Source(SourceRecord::Offered { handover }), vec![Action::Send(offer)])
    }

    /// What is to be asked of the register in this state.
    pub(super) fn question(&self) -> Option<Action> {
        let request = match &self.state {
            State::Offered { .. } => Request::Read,
            State::Reclaiming { .. } => Request::ForSource,
            State::Promised { .. } => Request::ForDestination,
            State::Committed { refused: Some(_), .. } | State::Aborting { owes: true, .. } => {
                Request::BackToSource
            }
            State::Committed { refused: None, .. } if self.is_arbitrated() => Request::Read,
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. }
            | State::Committed { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => return None,
        };
        Some(Action::Arbitrate(request))
    }

    pub(super) fn on_verdict(&mut self, verdict: Verdict, now: Duration) -> Step<Action> {
        match verdict {
            Verdict::Open => self.on_open(now),
            Verdict::Source => self.on_won(),
            // What was not moved on from here is the destination's.
            Verdict::Destination | Verdict::Later => self.gone(now),
            Verdict::Unknown => self.on_silence(now),
            Verdict::Behind => Step::nothing(),
        }
    }

    /// The operator wants it back: as soon as the register answers, if it is not decided yet.
    pub(super) fn on_abort_requested(&mut self, now: Duration) -> Step<Action> {
        if let State::Offered { give_up_at: Some(at), .. } = &mut self.state {
            *at = now;
            return Step::act(vec![Action::Arbitrate(Request::Read)]);
        }
        if self.ask_for_operator() {
            return Step::nothing();
        }
        self.give_up(Refusal::Operator)
    }

    /// What the destination has is the only copy of its memory now.
    pub(super) fn on_guest_lost(&mut self) -> Step<Action> {
        if let State::Offered { give_up_at, .. } = &mut self.state {
            *give_up_at = None;
        }
        Step::nothing()
    }

    fn on_open(&mut self, now: Duration) -> Step<Action> {
        let State::Offered { give_up_at: Some(at), handover } = &self.state else {
            return Step::nothing();
        };
        if now < *at {
            return Step::nothing();
        }
        let handover = handover.clone();
        self.state = State::Reclaiming { handover: handover.clone() };
        self.next_repeat = now + self.repeat_after();
        Step::record(
            Record::Source(SourceRecord::Reclaiming { handover }),
            vec![Action::Arbitrate(Request::ForSource)],
        )
    }

    fn on_silence(&mut self, now: Duration) -> Step<Action> {
        let State::Offered { give_up_at, handover } = &self.state else {
            return Step::nothing();
        };
        if self.link_down_since.is_some() || give_up_at.is_some_and(|at| now < at) {
            return Step::nothing();
        }
        let handover = handover.clone();
        self.state = State::Promised { handover: handover.clone() };
        self.next_repeat = now + self.repeat_after();
        let commit = MigrationMessage::Commit { epoch: self.attempt.epoch, handover: handover.clone() };
        Step::record(
            Record::Source(SourceRecord::Promised { handover: handover.clone() }),
            vec![Action::Send(commit), Action::Attract(handover)],
        )
    }

    /// The destination owns it, by the register or because it runs there.
    pub(super) fn gone(&mut self, now: Duration) -> Step<Action> {
        let (handover, attracted) = match &self.state {
            State::Offered { handover, .. } | State::Reclaiming { handover } => (handover.clone(), false),
            State::Promised { handover } => (handover.clone(), true),
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. }
            | State::Committed { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => return Step::nothing(),
        };
        let step = self.commit(handover, None, now);
        if !attracted {
            return step;
        }
        step.without(|action| matches!(action, Action::Attract(_)))
    }

    /// The register names this side.
    fn on_won(&mut self) -> Step<Action> {
        match &mut self.state {
            State::Offered { .. } | State::Reclaiming { .. } | State::Promised { .. } => {
                let why = "the machine was taken back at the arbiter: the other site did not take it in time";
                self.returned(Refusal::Link(why.into()), false)
            }
            // What the destination does not say itself, it has said by handing back.
            State::Committed { refused, .. } => {
                let (why, told) = match refused.take() {
                    Some(why) => (why, true),
                    None => (Refusal::Other("The other site handed the machine back".into()), false),
                };
                self.returned(why, told)
            }
            State::Aborting { owes, .. } if *owes => {
                *owes = false;
                self.end_if_settled();
                Step::record(Record::Source(SourceRecord::Settled), Vec::new())
            }
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    /// Durably refused, or the register's: it comes back. A register that may name the other side is owed the
    /// news.
    pub(super) fn returned(&mut self, why: Refusal, told: bool) -> Step<Action> {
        let owes = self.is_arbitrated();
        self.state = State::Aborting { why: why.clone(), rolled_back: false, told, owes };
        let mut actions = vec![Action::Rollback(self.permit())];
        if !told {
            let epoch = self.attempt.epoch;
            actions.push(Action::Send(MigrationMessage::Abort { epoch, why: why.clone() }));
        }
        Step::record(Record::Source(SourceRecord::Returned { why }), actions)
    }

    /// Refused although the register names the destination: the register first.
    pub(super) fn take_back(&mut self, why: Refusal) -> Step<Action> {
        if let State::Committed { refused, .. } = &mut self.state {
            *refused = Some(why);
        }
        Step::act(vec![Action::Arbitrate(Request::BackToSource)])
    }
}
