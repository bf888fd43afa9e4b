//! The destination with an arbiter: it owns the machine when the register says so, or the source has promised.
//!
//! ```text
//!  Loaded --offered--> Claiming --won, or promised--> Owned --still there--> Activating --> Settling --> Done(Active)
//!     |                   |                             |
//!     |                   `--lost--> Refusing           `--QEMU gone--> HandingBack --> Done(Refused)
//!     `--won by the source's own word at the register--> Owned
//! ```
//!
//! * `Claiming` is never refused before the register says that it is lost: the claim may be under way. With its QEMU
//!   gone it asks for the source;
//! * `Settling` and `HandingBack` last until the register says what is true already.

use super::{Action, Destination, Outcome, State};
use crate::migration::arbiter::{Request, Verdict};
use crate::migration::message::{Handover, MigrationMessage, Refusal};
use crate::migration::record::{DestinationRecord, Record};
use crate::migration::step::Step;

impl Destination {
    pub(super) fn is_arbitrated(&self) -> bool {
        self.attempt.commit.is_arbitrated()
    }

    pub(super) fn on_offer(&mut self, handover: Box<Handover>) -> Step<Action> {
        if !self.is_arbitrated() {
            return self.on_failed(Refusal::PeerMisbehaved("offered a machine that has no arbiter".into()));
        }
        match &self.state {
            State::Preparing | State::Receiving { .. } => {
                self.refuse(Refusal::PeerMisbehaved("offered before the machine was loaded".into()))
            }
            State::Loaded => {
                self.state = State::Claiming { handover: handover.clone(), lost: None };
                let claim = Action::Arbitrate(Request::ForDestination);
                Step::record(Record::Destination(DestinationRecord::Claiming { handover }), vec![claim])
            }
            State::Settling | State::Done(Outcome::Active) => self.say_activated(),
            State::Refusing { .. } | State::HandingBack { .. } | State::Done(Outcome::Refused(_)) => {
                self.answer_reserve()
            }
            State::Claiming { .. } | State::Owned { .. } | State::Activating { .. } => Step::nothing(),
        }
    }

    /// What is to be asked of the register in this state.
    pub(super) fn question(&self) -> Option<Action> {
        let request = match &self.state {
            // The source may have won it for us, and the WAN be cut before it could say so.
            State::Loaded if self.is_arbitrated() && self.link_down_since.is_some() => Request::Read,
            State::Claiming { lost: None, .. } | State::Settling => Request::ForDestination,
            State::Claiming { lost: Some(_), .. } => Request::ForSource,
            State::HandingBack { settled: false, .. } => Request::BackToSource,
            State::Preparing
            | State::Receiving { .. }
            | State::Loaded
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => return None,
        };
        Some(Action::Arbitrate(request))
    }

    pub(super) fn on_verdict(&mut self, verdict: Verdict) -> Step<Action> {
        match verdict {
            Verdict::Destination => self.on_won(),
            // What was not moved on from here is the source's.
            Verdict::Source | Verdict::Later => self.on_lost(),
            Verdict::Open | Verdict::Unknown | Verdict::Behind => Step::nothing(),
        }
    }

    fn on_won(&mut self) -> Step<Action> {
        match &self.state {
            State::Loaded => {
                // What the source would have handed over did not arrive: what was proposed must do.
                let handover = Box::new(Handover { nics: self.nics.clone() });
                self.own(handover)
            }
            State::Claiming { handover, .. } => {
                let handover = handover.clone();
                self.own(handover)
            }
            State::Settling => {
                self.state = State::Done(Outcome::Active);
                Step::nothing()
            }
            State::Preparing
            | State::Receiving { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    fn on_lost(&mut self) -> Step<Action> {
        match &mut self.state {
            State::Loaded | State::Claiming { .. } => {
                self.refuse(Refusal::Other("The source took the machine back at the arbiter".into()))
            }
            State::HandingBack { settled, .. } => {
                *settled = true;
                self.end_if_handed_back();
                Step::nothing()
            }
            State::Preparing
            | State::Receiving { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    pub(super) fn own(&mut self, handover: Box<Handover>) -> Step<Action> {
        self.state = State::Owned { handover: handover.clone() };
        let record = Record::Destination(DestinationRecord::Owned { handover });
        Step::record(record, vec![Action::CheckGuest])
    }

    pub(super) fn on_stands(&mut self) -> Step<Action> {
        let State::Owned { handover } = &self.state else {
            return Step::nothing();
        };
        let handover = handover.clone();
        self.activate(handover)
    }

    pub(super) fn lose(&mut self, why: Refusal) -> Step<Action> {
        if let State::Claiming { lost, .. } = &mut self.state {
            *lost = Some(why);
        }
        Step::act(self.question().into_iter().collect())
    }

    pub(super) fn hand_back(&mut self, why: Refusal) -> Step<Action> {
        self.state = State::HandingBack { why: why.clone(), discarded: false, settled: false };
        let tell = MigrationMessage::Refused { epoch: self.attempt.epoch, why: why.clone() };
        Step::record(
            Record::Destination(DestinationRecord::HandedBack { why }),
            vec![Action::Send(tell), Action::Arbitrate(Request::BackToSource), Action::Discard],
        )
    }

    pub(super) fn end_if_handed_back(&mut self) {
        if let State::HandingBack { why, discarded: true, settled: true } = &self.state {
            self.state = State::Done(Outcome::Refused(why.clone()));
        }
    }

    /// It runs. Whether it was won or promised, the register is to say so.
    pub(super) fn settle(&mut self) -> Step<Action> {
        self.state = State::Settling;
        let activated = Action::Send(MigrationMessage::Activated { epoch: self.attempt.epoch });
        Step::act([activated].into_iter().chain(self.question()).collect())
    }
}
