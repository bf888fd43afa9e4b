//! The source whose destination is gone for good: an operator's word stands in for the peer's.
//!
//! Only after `Committed`: with an arbiter the register says first whose the machine is. Either the copy at the
//! destination is destroyed, as the operator states; a new epoch begins here, so the register is owed nothing. Or it runs
//! there and its gateway has forgotten how it came, as it says itself: then it is released here as if it had said so.

use super::{Action, Source, State};
use crate::migration::message::Refusal;
use crate::migration::permit::RunPermit;
use crate::migration::record::{Record, SourceRecord};
use crate::migration::resolve::{Decided, Resolution};
use crate::migration::step::Step;

impl Source {
    pub(super) fn on_resolved(&mut self, resolution: Resolution) -> Step<Action> {
        match (&self.state, resolution.decided()) {
            (State::Committed { .. }, Decided::Ours { destroyed }) => {
                let actions = self.taken_back().after_record();
                Step::record(Record::Source(SourceRecord::TakenBack { destroyed }), actions)
            }
            (State::Committed { refused: None, .. }, Decided::Theirs) if self.knows_nothing => {
                self.state = State::Released;
                Step::record(Record::Source(SourceRecord::Released), vec![Action::Release])
            }
            (_, Decided::Ours { .. } | Decided::Theirs) => Step::nothing(),
        }
    }

    /// The destination runs it although it was never handed over: an operator there said that this site is gone. It
    /// is said once; whose it is, only people can decide.
    pub(super) fn on_second_owner(&mut self) -> Step<Action> {
        let State::Aborting { told, .. } = &mut self.state else { return Step::nothing() };
        if std::mem::replace(told, true) {
            return Step::nothing();
        }
        self.end_if_settled();
        Step::act(vec![Action::ReportSecondOwner])
    }

    /// What follows from `TakenBack`, once it is durable.
    pub(super) fn taken_back(&mut self) -> Step<Action> {
        self.state = State::Aborting { why: Refusal::Operator, rolled_back: false, told: true, owes: false };
        let permit = RunPermit::grant(self.attempt.vm.clone(), self.attempt.epoch.next());
        Step::act(vec![Action::Rollback(permit)])
    }
}
