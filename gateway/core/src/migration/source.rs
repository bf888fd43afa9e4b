//! The source's side of one migration: see the diagram in [`super`].
//!
//! Consumed by value and handed back with a [`Step`], so a state that was left cannot be used again.
//! It does not start long work itself: it asks for it by an [`Action`] and hears of it by an
//! [`Event`].
//!
//! ```text
//!  Preflight -> Proposed -> Reserving -> PreCopy -> Parking -> Parked -> Committed -> Released
//!      \            \           \           \          \         \           |
//!       `------------`-----------`-----------`----------`---------`          | Refused by the peer
//!                              v                                             v
//!                           Aborting  ------------> Done <--------------- Returned
//! ```
//!
//! * before `Reserving` nothing is held anywhere: a failure ends in `Done` without a record;
//! * from `Reserving` on a failure is first recorded as `Aborted`, then undone, then told;
//! * `Committed` is left by the peer's word only;
//! * with an arbiter `Offered` stands before `Committed`: see `arbitrated`;
//! * pipelined it goes from `Parking` to `Committed` where the link is up, and does not wait for `Loaded`.

mod arbitrated;
mod deadlines;
mod pipelined;
mod resolved;

use std::time::Duration;

use crate::ids::SiteName;
use crate::migration::arbiter::{Request, Verdict};
use crate::migration::convergence::{Convergence, Decision, PauseBudget, Progress};
use crate::migration::message::{Handover, MigrationMessage, Proposal, Refusal, Reservation};
use crate::migration::permit::RunPermit;
use crate::migration::record::{Record, SourceRecord};
use crate::migration::resolve::Resolution;
use crate::migration::step::Step;
use crate::migration::{Attempt, CommitMode, Stage};

/// How long the source waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLimits {
    /// A cut of the link that stages 0 to 2 outlast (default 10 min).
    pub cut_limit: Duration,
    /// How long the guest may stand still without `Loaded` before it is resumed (default 5 s beyond
    /// the predicted pause).
    pub pause_budget: Duration,
    /// Unanswered messages are repeated this often (default 1 s).
    pub repeat: Duration,
    /// The answer to a proposal or a reservation must come within this (default 60 s).
    pub answer: Duration,
    /// When to stop the guest.
    pub pause: PauseBudget,
}

impl Default for SourceLimits {
    fn default() -> Self {
        Self {
            cut_limit: Duration::from_secs(600),
            pause_budget: Duration::from_secs(5),
            repeat: Duration::from_secs(1),
            answer: Duration::from_secs(60),
            pause: PauseBudget::default(),
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The link to the destination is up.
    LinkUp,
    /// It is down.
    LinkDown,
    /// The destination said something.
    Peer(MigrationMessage),
    /// Local checks passed; this is to be proposed.
    PreflightPassed(Box<Proposal>),
    /// A measurement of pre-copy.
    Progress(Progress),
    /// QEMU stopped the guest by itself because it found nothing left to copy (an idle guest).
    SwitchoverReached,
    /// The guest is about to be stopped: its pause begins.
    GuestStopped,
    /// The guest stands still and everything it is was sent, barriers included.
    Parked(Box<Handover>),
    /// Something local failed.
    Failed(Refusal),
    /// A restarted gateway did not find the guest that was offered.
    GuestLost,
    /// Everything this side did was undone; the guest runs if it ran before.
    RolledBack,
    /// What follows from `Released` is done.
    TidiedUp,
    /// What the arbiter's register says, asked or not.
    Arbiter(Verdict),
    /// The operator wants it to end.
    AbortRequested,
    /// An operator decided for a peer that is gone for good.
    Resolved(Resolution),
    /// A deadline may have passed.
    Tick,
}

/// What the gateway is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Check everything local and the names: reports `PreflightPassed` or `Failed`.
    Preflight,
    /// Say something to the destination. May be lost.
    Send(MigrationMessage),
    /// Mirror disks, then copy memory; reports `Progress` and `Failed`.
    StartPreCopy(Reservation),
    /// Hold packets, stop the guest, send the rest and the barriers: reports `GuestStopped`, then
    /// `Parked`.
    Park,
    /// Ask the arbiter: reports `Arbiter`. May be lost, and applied late.
    Arbitrate(Request),
    /// Send held and coming packets to the destination. The machine is its own now.
    Attract(Box<Handover>),
    /// Tell the operator that the destination says it runs the machine, which was never given to it.
    ReportSecondOwner,
    /// Move the names, keep the disk aside, forget the guest: reports `TidiedUp`.
    Release,
    /// Undo everything: reports `RolledBack`. The permit resumes the guest.
    Rollback(RunPermit),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination runs the machine.
    Moved,
    /// The machine stayed; why.
    Stayed(Refusal),
}

#[derive(Debug)]
enum State {
    Preflight,
    Proposed {
        proposal: Box<Proposal>,
        give_up_at: Duration,
    },
    Reserving {
        give_up_at: Duration,
    },
    PreCopy {
        convergence: Convergence,
    },
    Parking {
        stopped_at: Option<Duration>,
        predicted: Duration,
        loaded: bool,
    },
    Parked {
        give_up_at: Duration,
        handover: Box<Handover>,
    },
    /// `give_up_at` is when it asks for itself; `None` is never.
    Offered {
        give_up_at: Option<Duration>,
        handover: Box<Handover>,
    },
    Reclaiming {
        handover: Box<Handover>,
    },
    Promised {
        handover: Box<Handover>,
    },
    /// Pipelined: from `ask_at` on, or once what was on its way is lost with the gateway that sent it, a destination that
    /// still receives is asked to refuse; `asks` is why.
    Committed {
        handover: Box<Handover>,
        refused: Option<Refusal>,
        ask_at: Option<Duration>,
        asks: Option<Refusal>,
    },
    Released,
    /// `owes`: the register is to name this side.
    Aborting {
        why: Refusal,
        rolled_back: bool,
        told: bool,
        owes: bool,
    },
    Done(Outcome),
}

/// One migration at the site the machine leaves.
#[derive(Debug)]
pub struct Source {
    attempt: Attempt,
    limits: SourceLimits,
    without_names: bool,
    link_down_since: Option<Duration>,
    /// On the link that is up the peer has said that it has no record of this attempt.
    knows_nothing: bool,
    next_repeat: Duration,
    state: State,
}

impl Source {
    /// Begins an attempt; `without_names` is kept with its first record, for a gateway that goes on with it.
    pub fn begin(
        attempt: Attempt,
        limits: SourceLimits,
        without_names: bool,
        now: Duration,
    ) -> (Self, Step<Action>) {
        let next_repeat = now + limits.repeat;
        let state = State::Preflight;
        let source = Self {
            attempt,
            limits,
            without_names,
            link_down_since: None,
            knows_nothing: false,
            next_repeat,
            state,
        };
        (source, Step::act(vec![Action::Preflight]))
    }

    /// Goes on after a restart of the gateway at `site`. A gateway that died before `Committed` ends
    /// the attempt: QEMU's sockets died with it.
    pub fn recover(
        attempt: Attempt,
        last: SourceRecord,
        limits: SourceLimits,
        site: &SiteName,
        now: Duration,
    ) -> (Self, Step<Action>) {
        let state = State::Preflight;
        // Only the first record says it, and that is written already.
        let without_names = false;
        let mut source = Self {
            attempt,
            limits,
            without_names,
            link_down_since: Some(now),
            knows_nothing: false,
            next_repeat: now,
            state,
        };
        let step = match last {
            SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked => {
                source.abort(Refusal::Restarted(site.clone()))
            }
            SourceRecord::Committed { handover } => {
                let pipelined = source.attempt.commit == CommitMode::Pipelined;
                let asks = pipelined.then(|| Refusal::Restarted(site.clone()));
                source.state =
                    State::Committed { handover: handover.clone(), refused: None, ask_at: None, asks };
                Step::act(vec![Action::Attract(handover)])
            }
            SourceRecord::Offered { handover } => {
                let give_up_at = Some(now + limits.pause_budget);
                source.state = State::Offered { give_up_at, handover };
                Step::act(vec![Action::Arbitrate(Request::Read)])
            }
            SourceRecord::Reclaiming { handover } => {
                source.state = State::Reclaiming { handover };
                Step::act(vec![Action::Arbitrate(Request::ForSource)])
            }
            SourceRecord::Promised { handover } => {
                source.state = State::Promised { handover: handover.clone() };
                Step::act(vec![Action::Attract(handover), Action::Arbitrate(Request::ForDestination)])
            }
            SourceRecord::Released => {
                source.state = State::Released;
                Step::act(vec![Action::Release])
            }
            SourceRecord::Aborted { why } => source.undo(why, false),
            SourceRecord::Returned { why } => {
                let owes = source.is_arbitrated();
                source.undo(why, owes)
            }
            SourceRecord::Settled => {
                source.undo(Refusal::Other("The machine came back from its hand-over".into()), false)
            }
            SourceRecord::TakenBack { .. } => source.taken_back(),
        };
        (source, step)
    }

    /// What is attempted.
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// The stage for people.
    pub fn stage(&self) -> Stage {
        match &self.state {
            State::Preflight | State::Proposed { .. } => Stage::PreMigration,
            State::Reserving { .. } => Stage::Reservation,
            State::PreCopy { .. } => Stage::PreCopy,
            State::Parking { .. } | State::Parked { .. } => Stage::StopAndCopy,
            State::Offered { .. }
            | State::Reclaiming { .. }
            | State::Promised { .. }
            | State::Committed { .. } => Stage::Commitment,
            State::Released | State::Done(Outcome::Moved) => Stage::Activation,
            State::Aborting { .. } | State::Done(Outcome::Stayed(_)) => Stage::PreMigration,
        }
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            State::Done(outcome) => Some(outcome),
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
            | State::Aborting { .. } => None,
        }
    }

    /// Why it is being undone, if it is.
    pub fn aborting(&self) -> Option<&Refusal> {
        if let State::Aborting { why, .. } = &self.state { Some(why) } else { None }
    }

    /// The attempt is over for this side: the machine is free for another one, even while the peer
    /// is still being told. Not while the register still has to name this side.
    pub fn is_settled_here(&self) -> bool {
        matches!(self.state, State::Done(_) | State::Aborting { rolled_back: true, owes: false, .. })
    }

    /// Takes one event.
    pub fn handle(mut self, event: Event, now: Duration) -> (Self, Step<Action>) {
        let step = match event {
            Event::LinkUp => self.on_link_up(now),
            Event::LinkDown => {
                self.knows_nothing = false;
                self.link_down_since.get_or_insert(now);
                Step::nothing()
            }
            Event::Peer(message) => self.on_message(message, now),
            Event::PreflightPassed(proposal) => self.on_preflight(proposal, now),
            Event::Progress(progress) => self.on_progress(&progress),
            Event::SwitchoverReached => self.on_switchover_reached(),
            Event::GuestStopped => self.on_guest_stopped(now),
            Event::Parked(handover) => self.on_parked(handover, now),
            Event::Failed(why) => self.give_up(why),
            Event::GuestLost => self.on_guest_lost(),
            Event::RolledBack => self.on_rolled_back(),
            Event::TidiedUp => self.on_tidied_up(),
            Event::Arbiter(verdict) => self.on_verdict(verdict, now),
            Event::AbortRequested => self.on_abort_requested(now),
            Event::Resolved(resolution) => self.on_resolved(resolution),
            Event::Tick => self.on_tick(now),
        };
        (self, step)
    }

    fn on_preflight(&mut self, proposal: Box<Proposal>, now: Duration) -> Step<Action> {
        if !matches!(self.state, State::Preflight) {
            return Step::nothing();
        }
        let propose = Action::Send(MigrationMessage::Propose(proposal.clone()));
        self.state = State::Proposed { proposal, give_up_at: now + self.limits.answer };
        self.next_repeat = now + self.repeat_after();
        Step::act(vec![propose])
    }

    fn on_message(&mut self, message: MigrationMessage, now: Duration) -> Step<Action> {
        match message {
            MigrationMessage::Accept => self.on_accept(now),
            MigrationMessage::Reserved(reservation) => self.on_reserved(reservation),
            MigrationMessage::Decline(why) => self.on_decline(why),
            MigrationMessage::Loaded { epoch } if epoch == self.attempt.epoch => self.on_loaded(now),
            MigrationMessage::Activated { epoch } if epoch == self.attempt.epoch => self.on_activated(now),
            MigrationMessage::Refused { epoch, why } if epoch == self.attempt.epoch => self.on_refused(why),
            MigrationMessage::Unknown => self.on_unknown(),
            // Of another epoch: late, and about nothing that concerns this attempt.
            MigrationMessage::Loaded { .. }
            | MigrationMessage::Activated { .. }
            | MigrationMessage::Refused { .. } => Step::nothing(),
            MigrationMessage::Propose(_)
            | MigrationMessage::Reserve { .. }
            | MigrationMessage::Offer { .. }
            | MigrationMessage::Commit { .. }
            | MigrationMessage::TakenBack { .. }
            | MigrationMessage::Abort { .. } => {
                self.give_up(Refusal::PeerMisbehaved("a source's message was sent to the source".into()))
            }
        }
    }

    fn on_accept(&mut self, now: Duration) -> Step<Action> {
        let State::Proposed { proposal, .. } = &self.state else {
            return Step::nothing();
        };
        let record = SourceRecord::Reserved {
            peer: self.attempt.peer.clone(),
            proposal: proposal.clone(),
            without_names: self.without_names,
        };
        self.state = State::Reserving { give_up_at: now + self.limits.answer };
        self.next_repeat = now + self.repeat_after();
        let reserve = MigrationMessage::Reserve { epoch: self.attempt.epoch };
        Step::record(Record::Source(record), vec![Action::Send(reserve)])
    }

    fn on_reserved(&mut self, reservation: Reservation) -> Step<Action> {
        if let State::Committed { asks: Some(why), .. } = &self.state {
            // It still receives. If it has all of it by the time it hears this, it says so.
            let abort = MigrationMessage::Abort { epoch: self.attempt.epoch, why: why.clone() };
            return Step::act(vec![Action::Send(abort)]);
        }
        if !matches!(self.state, State::Reserving { .. }) {
            return Step::nothing();
        }
        self.state = State::PreCopy { convergence: Convergence::default() };
        let record = SourceRecord::PreCopy { reservation: reservation.clone() };
        Step::record(Record::Source(record), vec![Action::StartPreCopy(reservation)])
    }

    fn on_decline(&mut self, why: Refusal) -> Step<Action> {
        // After Committed only a durable refusal counts.
        if matches!(self.state, State::Proposed { .. } | State::Reserving { .. } | State::PreCopy { .. }) {
            return self.give_up(why);
        }
        Step::nothing()
    }

    fn on_progress(&mut self, progress: &Progress) -> Step<Action> {
        let State::PreCopy { convergence } = &mut self.state else {
            return Step::nothing();
        };
        // A guest is not stopped into a cut: nothing could be sent.
        if self.link_down_since.is_some() {
            return Step::nothing();
        }
        match convergence.decide(progress, &self.limits.pause) {
            Decision::Continue => Step::nothing(),
            Decision::Stop(predicted) => {
                self.state = State::Parking { stopped_at: None, predicted, loaded: false };
                Step::act(vec![Action::Park])
            }
            Decision::GiveUp(pause) => self.give_up(Refusal::Diverges(format!(
                "the guest changes its memory as fast as it is sent, and would stand still for {pause:.1?}"
            ))),
        }
    }

    fn on_switchover_reached(&mut self) -> Step<Action> {
        if !matches!(self.state, State::PreCopy { .. }) {
            return Step::nothing();
        }
        self.state = State::Parking { stopped_at: None, predicted: Duration::ZERO, loaded: false };
        Step::act(vec![Action::Park])
    }

    fn on_guest_stopped(&mut self, now: Duration) -> Step<Action> {
        let State::Parking { stopped_at: stopped_at @ None, .. } = &mut self.state else {
            return Step::nothing();
        };
        *stopped_at = Some(now);
        if self.attempt.commit != CommitMode::Pipelined {
            return Step::nothing();
        }
        // Beside sending the rest. A journal that fails here may resume the guest, which one that fails at Committed may not.
        Step::record(Record::Source(SourceRecord::Parked), Vec::new())
    }

    fn on_parked(&mut self, handover: Box<Handover>, now: Duration) -> Step<Action> {
        let State::Parking { stopped_at, predicted, loaded } = self.state else {
            return Step::nothing();
        };
        let give_up_at = self.pause_deadline(stopped_at.unwrap_or(now), predicted);
        if loaded {
            return self.hand_over(handover, give_up_at, now);
        }
        if self.attempt.commit == CommitMode::Pipelined {
            return self.hand_over_behind(handover, give_up_at, now);
        }
        self.state = State::Parked { give_up_at, handover };
        Step::record(Record::Source(SourceRecord::Parked), Vec::new())
    }

    fn on_loaded(&mut self, now: Duration) -> Step<Action> {
        if let State::Parking { loaded, .. } = &mut self.state {
            *loaded = true;
            return Step::nothing();
        }
        let State::Parked { handover, give_up_at } = &self.state else {
            return Step::nothing();
        };
        let (handover, give_up_at) = (handover.clone(), *give_up_at);
        self.hand_over(handover, give_up_at, now)
    }

    fn commit(&mut self, handover: Box<Handover>, ask_at: Option<Duration>, now: Duration) -> Step<Action> {
        self.state = State::Committed { handover: handover.clone(), refused: None, ask_at, asks: None };
        self.next_repeat = now + self.repeat_after();
        let message = MigrationMessage::Commit { epoch: self.attempt.epoch, handover: handover.clone() };
        Step::record(
            Record::Source(SourceRecord::Committed { handover: handover.clone() }),
            vec![Action::Send(message), Action::Attract(handover)],
        )
    }

    fn on_activated(&mut self, now: Duration) -> Step<Action> {
        if matches!(self.state, State::Committed { .. }) {
            self.state = State::Released;
            return Step::record(Record::Source(SourceRecord::Released), vec![Action::Release]);
        }
        if matches!(self.state, State::Aborting { .. }) && !self.is_arbitrated() {
            return self.on_second_owner();
        }
        // It was in doubt: attracting comes first, with a record of its own. The commitment is answered again.
        self.gone(now)
    }

    fn on_refused(&mut self, why: Refusal) -> Step<Action> {
        let arbitrated = self.is_arbitrated();
        match &mut self.state {
            State::Committed { .. } if arbitrated => self.take_back(why),
            State::Offered { .. }
            | State::Reclaiming { .. }
            | State::Promised { .. }
            | State::Committed { .. } => self.returned(why, true),
            State::Aborting { told, .. } => {
                *told = true;
                self.end_if_settled();
                Step::nothing()
            }
            State::Preflight
            | State::Proposed { .. }
            | State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. } => self.give_up(why),
            State::Released | State::Done(_) => Step::nothing(),
        }
    }

    /// The destination has no record: nothing is held there, so an abort needs no answer. After
    /// `Committed` it changes nothing: unknown is not refused.
    fn on_unknown(&mut self) -> Step<Action> {
        if let State::Aborting { .. } = self.state {
            let why = Refusal::Other(String::new());
            return self.on_refused(why);
        }
        self.knows_nothing = true;
        Step::nothing()
    }

    fn on_rolled_back(&mut self) -> Step<Action> {
        if let State::Aborting { rolled_back, .. } = &mut self.state {
            *rolled_back = true;
        }
        self.end_if_settled();
        Step::nothing()
    }

    /// Rolled back, the peer told, the register paid.
    fn end_if_settled(&mut self) {
        if let State::Aborting { why, rolled_back: true, told: true, owes: false } = &self.state {
            self.state = State::Done(Outcome::Stayed(why.clone()));
        }
    }

    fn on_tidied_up(&mut self) -> Step<Action> {
        if matches!(self.state, State::Released) {
            self.state = State::Done(Outcome::Moved);
        }
        Step::nothing()
    }

    /// Ends the attempt if that is still this side's to decide.
    fn give_up(&mut self, why: Refusal) -> Step<Action> {
        match &self.state {
            State::Preflight | State::Proposed { .. } => {
                // Nothing is held yet, but the driver's own state is cleared the same way.
                self.state = State::Aborting { why, rolled_back: false, told: true, owes: false };
                let permit = self.permit();
                Step::act(vec![Action::Rollback(permit)])
            }
            State::Reserving { .. }
            | State::PreCopy { .. }
            | State::Parking { .. }
            | State::Parked { .. } => self.abort(why),
            State::Offered { .. }
            | State::Reclaiming { .. }
            | State::Promised { .. }
            | State::Committed { .. }
            | State::Released
            | State::Aborting { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    /// Goes on with an attempt that was given up before a restart.
    fn undo(&mut self, why: Refusal, owes: bool) -> Step<Action> {
        self.state = State::Aborting { why, rolled_back: false, told: false, owes };
        let permit = self.permit();
        Step::act(vec![Action::Rollback(permit)])
    }

    fn abort(&mut self, why: Refusal) -> Step<Action> {
        self.state = State::Aborting { why: why.clone(), rolled_back: false, told: false, owes: false };
        let tell = MigrationMessage::Abort { epoch: self.attempt.epoch, why: why.clone() };
        let permit = self.permit();
        Step::record(
            Record::Source(SourceRecord::Aborted { why }),
            vec![Action::Rollback(permit), Action::Send(tell)],
        )
    }

    /// Called only where neither `Committed` nor `Offered` was ever written, the peer durably refused, or the
    /// register gave the epoch to this side: see [`super`]. An operator's word has a permit of its own.
    fn permit(&self) -> RunPermit {
        debug_assert!(matches!(self.state, State::Aborting { .. }), "a permit outside an abort");
        RunPermit::grant(self.attempt.vm.clone(), self.attempt.epoch)
    }
}
