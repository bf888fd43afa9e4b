//! The destination's side of one migration: see the diagram in [`super`].
//!
//! It begins with a reservation; a proposal is answered without a machine, because nothing is held
//! for it. Consumed by value and handed back with a [`Step`].
//!
//! ```text
//!  Preparing -> Receiving -> Loaded -> Activating -> Done(Active)
//!      \            \           \
//!       `------------`-----------`--> Refusing ----> Done(Refused)
//! ```
//!
//! * `Loaded` has no deadline: the source may have committed, and a machine that both sides let go
//!   of would be lost. It waits for the source's word and says so;
//! * `Activating` is entered with the record `Activated` and left only forward;
//! * with an arbiter `Claiming` and `Owned` stand before `Activating`: see `arbitrated`;
//! * pipelined it goes from `Receiving` to `Activating` where the source's Commit was there before the last byte.

mod arbitrated;

use std::mem;
use std::time::Duration;

use crate::ids::SiteName;
use crate::migration::arbiter::{Request, Verdict};
use crate::migration::message::{Handover, MigrationMessage, Proposal, Refusal, Reservation};
use crate::migration::permit::RunPermit;
use crate::migration::record::{DestinationRecord, Record};
use crate::migration::resolve::{Decided, Resolution};
use crate::migration::step::Step;
use crate::migration::{Attempt, CommitMode, Stage};
use crate::tunnel::handover::NicHandover;

/// How long the destination waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationLimits {
    /// Before `Loaded`, a link that is down for longer than this frees what is held (default 11 min,
    /// more than the source's `cut_limit`).
    pub cut_limit: Duration,
    /// Unanswered messages are repeated this often (default 1 s).
    pub repeat: Duration,
}

impl Default for DestinationLimits {
    fn default() -> Self {
        Self { cut_limit: Duration::from_secs(660), repeat: Duration::from_secs(1) }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The link to the source is up.
    LinkUp,
    /// It is down.
    LinkDown,
    /// The source said something.
    Peer(MigrationMessage),
    /// A QEMU waits for the machine, disks are exported, addresses are held.
    Prepared,
    /// Every barrier is proven, QEMU says loaded, the disks are flushed and their exports are gone.
    Loaded,
    /// The guest runs here, or is here paused as its user had left it.
    Activated,
    /// Everything held was given back.
    Discarded,
    /// Something local failed.
    Failed(Refusal),
    /// What was loaded is there, stopped.
    Stands,
    /// What the arbiter's register says, asked or not.
    Arbiter(Verdict),
    /// An operator decided for a source that is gone for good; what is known of connections.
    Resolved(Resolution, Box<Handover>),
    /// An operator of this site wants the attempt to end. Once the machine is loaded only the source may: it may have given
    /// it away.
    AbortRequested,
    /// A deadline may have passed.
    Tick,
}

/// What the gateway is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Hold memory, disks and addresses and start the waiting QEMU: reports `Prepared` or `Failed`,
    /// later `Loaded` or `Failed`.
    Prepare,
    /// Say something to the source. May be lost.
    Send(MigrationMessage),
    /// Ask the arbiter: reports `Arbiter`. May be lost, and applied late.
    Arbitrate(Request),
    /// Look whether what was loaded is still there: reports `Stands`, or `Failed` if it is gone.
    CheckGuest,
    /// Install the rules, resume the guest, announce: reports `Activated`.
    Activate(RunPermit, Box<Handover>),
    /// Give back everything: reports `Discarded`.
    Discard,
}

/// What a machine stands still for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// The source has given it away behind its last byte, and that is not here yet.
    Rest,
    /// It is here, and the source has not said whether it may run.
    Word,
    /// It is here, and the arbiter's register has not said whose it is.
    Register,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine is here.
    Active,
    /// It is not and will not be; why.
    Refused(Refusal),
}

#[derive(Debug)]
enum State {
    Preparing,
    /// `early`: the source has committed behind the last byte, which is not loaded here yet.
    Receiving {
        early: Option<Box<Handover>>,
    },
    Loaded,
    /// `lost`: QEMU is gone; the register is asked for the source.
    Claiming {
        handover: Box<Handover>,
        lost: Option<Refusal>,
    },
    Owned {
        handover: Box<Handover>,
    },
    Activating {
        done: bool,
    },
    /// It runs here; the register is to say so.
    Settling,
    Refusing {
        why: Refusal,
    },
    /// Refused after it was ours; the register is to name the source.
    HandingBack {
        why: Refusal,
        discarded: bool,
        settled: bool,
    },
    Done(Outcome),
}

/// What is left of an attempt after a restart of the gateway.
#[derive(Debug)]
pub struct Remains {
    /// The machine's NICs as they were proposed.
    pub nics: Vec<NicHandover>,
    /// What was held.
    pub reservation: Reservation,
    /// The last record.
    pub last: DestinationRecord,
    /// What was loaded is still there.
    pub qemu_found: bool,
}

/// One migration at the site the machine comes to.
#[derive(Debug)]
pub struct Destination {
    attempt: Attempt,
    nics: Vec<NicHandover>,
    reservation: Reservation,
    limits: DestinationLimits,
    link_down_since: Option<Duration>,
    next_repeat: Duration,
    state: State,
}

impl Destination {
    /// Begins: the proposal passed policy and admission, and the source asks to hold things.
    pub fn begin(
        attempt: Attempt,
        proposal: Box<Proposal>,
        reservation: Reservation,
        limits: DestinationLimits,
        now: Duration,
    ) -> (Self, Step<Action>) {
        let nics = proposal.nics.clone();
        let record = DestinationRecord::Reserved {
            peer: attempt.peer.clone(),
            proposal,
            reservation: reservation.clone(),
        };
        let next_repeat = now + limits.repeat;
        let state = State::Preparing;
        let destination =
            Self { attempt, nics, reservation, limits, link_down_since: None, next_repeat, state };
        (destination, Step::record(Record::Destination(record), vec![Action::Prepare]))
    }

    /// Goes on after a restart of the gateway at `site`. What was not loaded is lost with QEMU's
    /// sockets and is refused durably; what was loaded waits on; what was activated is activated
    /// again. What was loaded and is gone (`qemu_found` is false) is refused too, or handed back: the source
    /// has kept its memory, even where it has committed.
    pub fn recover(
        attempt: Attempt,
        remains: Remains,
        limits: DestinationLimits,
        site: &SiteName,
        now: Duration,
    ) -> (Self, Step<Action>) {
        let state = State::Preparing;
        let Remains { nics, reservation, last, qemu_found } = remains;
        let gone = || Refusal::Hypervisor(format!("QEMU at site {site} is gone"));
        let mut destination =
            Self { attempt, nics, reservation, limits, link_down_since: Some(now), next_repeat: now, state };
        let step = match last {
            DestinationRecord::Reserved { .. } => destination.refuse(Refusal::Restarted(site.clone())),
            DestinationRecord::Loaded if qemu_found => {
                destination.state = State::Loaded;
                Step::nothing()
            }
            DestinationRecord::Loaded => destination.refuse(gone()),
            DestinationRecord::Claiming { handover } => {
                let lost = (!qemu_found).then(gone);
                destination.state = State::Claiming { handover, lost };
                Step::act(destination.question().into_iter().collect())
            }
            DestinationRecord::Owned { handover } if qemu_found => {
                destination.state = State::Owned { handover };
                Step::act(vec![Action::CheckGuest])
            }
            DestinationRecord::Owned { .. } => destination.hand_back(gone()),
            DestinationRecord::HandedBack { why } => {
                destination.state = State::HandingBack { why, discarded: false, settled: false };
                let question = destination.question();
                Step::act(question.into_iter().chain([Action::Discard]).collect())
            }
            DestinationRecord::Activated { handover } | DestinationRecord::TakenOver { handover, .. } => {
                destination.state = State::Activating { done: false };
                let permit = destination.permit();
                Step::act(vec![Action::Activate(permit, handover)])
            }
            DestinationRecord::Refused { why } => {
                destination.state = State::Refusing { why };
                Step::act(vec![Action::Discard])
            }
            // Its disk stays, as that of any machine that is elsewhere.
            DestinationRecord::Overruled => {
                destination.state = State::Done(Outcome::Refused(Refusal::Operator));
                Step::nothing()
            }
        };
        (destination, step)
    }

    /// What is attempted.
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// The machine has come and runs here, even while the register still has to name this side.
    pub fn is_settled_here(&self) -> bool {
        matches!(self.state, State::Settling | State::Done(Outcome::Active))
    }

    /// What a machine waits for that may have been given to this side.
    pub fn waits_for(&self) -> Option<WaitsFor> {
        match self.state {
            State::Receiving { early: Some(_) } => Some(WaitsFor::Rest),
            State::Loaded => Some(WaitsFor::Word),
            State::Claiming { .. } => Some(WaitsFor::Register),
            State::Preparing
            | State::Receiving { early: None }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => None,
        }
    }

    /// Why it is being refused, if it is.
    pub fn refusing(&self) -> Option<&Refusal> {
        match &self.state {
            State::Refusing { why } | State::HandingBack { why, .. } | State::Done(Outcome::Refused(why)) => {
                Some(why)
            }
            State::Preparing
            | State::Receiving { .. }
            | State::Loaded
            | State::Claiming { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Done(Outcome::Active) => None,
        }
    }

    /// The stage for people.
    pub fn stage(&self) -> Stage {
        match &self.state {
            State::Preparing => Stage::Reservation,
            State::Receiving { .. } => Stage::PreCopy,
            State::Loaded | State::Claiming { .. } | State::Owned { .. } => Stage::Commitment,
            State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => Stage::Activation,
        }
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&Outcome> {
        if let State::Done(outcome) = &self.state { Some(outcome) } else { None }
    }

    /// When [`Event::Tick`] is due at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        let cut = match &self.state {
            State::Preparing | State::Receiving { .. } => {
                self.link_down_since.map(|at| at + self.limits.cut_limit)
            }
            State::Loaded
            | State::Claiming { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => None,
        };
        let waits = matches!(
            self.state,
            State::Receiving { early: Some(_) }
                | State::Loaded
                | State::Claiming { .. }
                | State::Settling
                | State::HandingBack { settled: false, .. }
        );
        let repeat = waits.then_some(self.next_repeat);
        [cut, repeat].into_iter().flatten().min()
    }

    /// Takes one event.
    pub fn handle(mut self, event: Event, now: Duration) -> (Self, Step<Action>) {
        let step = match event {
            Event::LinkUp => {
                self.link_down_since = None;
                self.repeat(now)
            }
            Event::LinkDown => {
                self.link_down_since.get_or_insert(now);
                Step::nothing()
            }
            Event::Peer(message) => self.on_message(message),
            Event::Prepared => self.on_prepared(),
            Event::Loaded => self.on_loaded(now),
            Event::Activated => self.on_activated(),
            Event::Discarded => self.on_discarded(),
            Event::Failed(why) => self.on_failed(why),
            Event::Stands => self.on_stands(),
            Event::Arbiter(verdict) => self.on_verdict(verdict),
            Event::Resolved(resolution, handover) => self.on_resolved(resolution, handover),
            Event::AbortRequested => self.on_abort_requested(),
            Event::Tick => self.on_tick(now),
        };
        (self, step)
    }

    fn on_message(&mut self, message: MigrationMessage) -> Step<Action> {
        match message {
            MigrationMessage::Reserve { epoch } if epoch == self.attempt.epoch => self.answer_reserve(),
            MigrationMessage::Commit { epoch, handover } if epoch == self.attempt.epoch => {
                self.on_commit(handover)
            }
            MigrationMessage::Offer { epoch, handover } if epoch == self.attempt.epoch => {
                self.on_offer(handover)
            }
            MigrationMessage::Abort { epoch, why } if epoch == self.attempt.epoch => self.on_abort(why),
            MigrationMessage::TakenBack { epoch } if epoch > self.attempt.epoch => self.on_taken_back(),
            // A repeated proposal: the answer is what became of it.
            MigrationMessage::Propose(_) => Step::act(vec![Action::Send(MigrationMessage::Accept)]),
            // Of another epoch: late, and about nothing that concerns this attempt.
            MigrationMessage::Reserve { .. }
            | MigrationMessage::Commit { .. }
            | MigrationMessage::Offer { .. }
            | MigrationMessage::TakenBack { .. }
            | MigrationMessage::Abort { .. } => Step::nothing(),
            MigrationMessage::Accept
            | MigrationMessage::Reserved(_)
            | MigrationMessage::Decline(_)
            | MigrationMessage::Loaded { .. }
            | MigrationMessage::Activated { .. }
            | MigrationMessage::Refused { .. }
            | MigrationMessage::Unknown => self.on_failed(Refusal::PeerMisbehaved(
                "a destination's message was sent to the destination".into(),
            )),
        }
    }

    fn answer_reserve(&mut self) -> Step<Action> {
        match &self.state {
            State::Receiving { .. } => {
                Step::act(vec![Action::Send(MigrationMessage::Reserved(self.reservation.clone()))])
            }
            State::Refusing { why } | State::HandingBack { why, .. } | State::Done(Outcome::Refused(why)) => {
                let refused = MigrationMessage::Refused { epoch: self.attempt.epoch, why: why.clone() };
                Step::act(vec![Action::Send(refused)])
            }
            State::Preparing
            | State::Loaded
            | State::Claiming { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Done(Outcome::Active) => Step::nothing(),
        }
    }

    fn on_prepared(&mut self) -> Step<Action> {
        if !matches!(self.state, State::Preparing) {
            return Step::nothing();
        }
        self.state = State::Receiving { early: None };
        self.answer_reserve()
    }

    fn on_loaded(&mut self, now: Duration) -> Step<Action> {
        let State::Receiving { early } = &mut self.state else { return Step::nothing() };
        if let Some(handover) = early.take() {
            return self.activate(handover);
        }
        self.state = State::Loaded;
        self.next_repeat = now + self.limits.repeat;
        let loaded = MigrationMessage::Loaded { epoch: self.attempt.epoch };
        Step::record(Record::Destination(DestinationRecord::Loaded), vec![Action::Send(loaded)])
    }

    fn on_commit(&mut self, handover: Box<Handover>) -> Step<Action> {
        let arbitrated = self.is_arbitrated();
        match mem::replace(&mut self.state, State::Preparing) {
            // Promised: the register is told once it runs.
            State::Loaded | State::Claiming { .. } if arbitrated => self.own(handover),
            State::Loaded => self.activate(handover),
            waiting @ (State::Claiming { .. } | State::Owned { .. }) => {
                self.state = waiting;
                Step::nothing()
            }
            // It lies until the machine is loaded. The answer tells a source that has lost the rest.
            State::Receiving { early } if self.attempt.commit == CommitMode::Pipelined => {
                self.state = State::Receiving { early: early.or(Some(handover)) };
                self.answer_reserve()
            }
            // No other mode commits before Loaded; a machine that is not here cannot run.
            early @ (State::Preparing | State::Receiving { .. }) => {
                self.state = early;
                self.refuse(Refusal::PeerMisbehaved("committed before the machine was loaded".into()))
            }
            done @ (State::Activating { done: true } | State::Settling | State::Done(Outcome::Active)) => {
                self.state = done;
                self.say_activated()
            }
            waiting @ State::Activating { done: false } => {
                self.state = waiting;
                Step::nothing()
            }
            refused @ (State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(Outcome::Refused(_))) => {
                self.state = refused;
                self.answer_reserve()
            }
        }
    }

    fn activate(&mut self, handover: Box<Handover>) -> Step<Action> {
        self.state = State::Activating { done: false };
        let permit = self.permit();
        Step::record(
            Record::Destination(DestinationRecord::Activated { handover: handover.clone() }),
            vec![Action::Activate(permit, handover)],
        )
    }

    fn on_abort(&mut self, why: Refusal) -> Step<Action> {
        match &self.state {
            State::Preparing | State::Receiving { .. } | State::Loaded => self.refuse(why),
            // The claim may be under way: only the register knows.
            State::Claiming { .. } => Step::act(vec![Action::Arbitrate(Request::Read)]),
            State::Refusing { .. } | State::HandingBack { .. } | State::Done(Outcome::Refused(_)) => {
                self.answer_reserve()
            }
            State::Activating { done: true } | State::Settling | State::Done(Outcome::Active) => {
                self.say_activated()
            }
            State::Owned { .. } | State::Activating { done: false } => Step::nothing(),
        }
    }

    /// A later epoch runs at the source: whatever the register says of this one, it never runs here.
    fn on_taken_back(&mut self) -> Step<Action> {
        match &self.state {
            State::Claiming { .. } => self.refuse(Refusal::Operator),
            State::Owned { .. } => self.hand_back(Refusal::Operator),
            State::Preparing
            | State::Receiving { .. }
            | State::Loaded
            | State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => self.on_abort(Refusal::Operator),
        }
    }

    /// The operator's word stands in for the source's, which may have given the machine up or not.
    fn on_resolved(&mut self, resolution: Resolution, handover: Box<Handover>) -> Step<Action> {
        match (&self.state, resolution.decided()) {
            (State::Loaded, Decided::Ours { destroyed }) => {
                self.state = State::Activating { done: false };
                let permit = self.permit();
                let record = DestinationRecord::TakenOver { handover: handover.clone(), destroyed };
                Step::record(Record::Destination(record), vec![Action::Activate(permit, handover)])
            }
            (State::Loaded, Decided::Theirs) => self.refuse(Refusal::Operator),
            (_, Decided::Ours { .. } | Decided::Theirs) => Step::nothing(),
        }
    }

    fn on_failed(&mut self, why: Refusal) -> Step<Action> {
        match &self.state {
            State::Preparing | State::Receiving { .. } | State::Loaded => self.refuse(why),
            State::Claiming { .. } => self.lose(why),
            State::Owned { .. } => self.hand_back(why),
            // The machine is ours: a failure here is ours to repair, never the source's to undo.
            State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    fn on_abort_requested(&mut self) -> Step<Action> {
        match &self.state {
            State::Preparing | State::Receiving { .. } => self.refuse(Refusal::Operator),
            State::Loaded
            | State::Claiming { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    fn refuse(&mut self, why: Refusal) -> Step<Action> {
        self.state = State::Refusing { why: why.clone() };
        let tell = MigrationMessage::Refused { epoch: self.attempt.epoch, why: why.clone() };
        Step::record(
            Record::Destination(DestinationRecord::Refused { why }),
            vec![Action::Send(tell), Action::Discard],
        )
    }

    fn on_activated(&mut self) -> Step<Action> {
        if !matches!(self.state, State::Activating { done: false }) {
            return Step::nothing();
        }
        if self.is_arbitrated() {
            return self.settle();
        }
        self.state = State::Done(Outcome::Active);
        self.say_activated()
    }

    fn say_activated(&self) -> Step<Action> {
        Step::act(vec![Action::Send(MigrationMessage::Activated { epoch: self.attempt.epoch })])
    }

    fn on_discarded(&mut self) -> Step<Action> {
        match &mut self.state {
            State::Refusing { why } => self.state = State::Done(Outcome::Refused(why.clone())),
            State::HandingBack { discarded, .. } => {
                *discarded = true;
                self.end_if_handed_back();
            }
            State::Preparing
            | State::Receiving { .. }
            | State::Loaded
            | State::Claiming { .. }
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Settling
            | State::Done(_) => {}
        }
        Step::nothing()
    }

    fn on_tick(&mut self, now: Duration) -> Step<Action> {
        let waits = matches!(self.state, State::Preparing | State::Receiving { .. });
        if let Some(since) = self.link_down_since
            && waits
            && now >= since + self.limits.cut_limit
        {
            return self.refuse(Refusal::Link(format!("{} s", (now - since).as_secs())));
        }
        if now < self.next_repeat {
            return Step::nothing();
        }
        self.repeat(now)
    }

    fn repeat(&mut self, now: Duration) -> Step<Action> {
        self.next_repeat = now + self.limits.repeat;
        match &self.state {
            State::Loaded => {
                let loaded = Action::Send(MigrationMessage::Loaded { epoch: self.attempt.epoch });
                Step::act([loaded].into_iter().chain(self.question()).collect())
            }
            State::Receiving { .. } => self.answer_reserve(),
            State::Claiming { .. } | State::Settling | State::HandingBack { settled: false, .. } => {
                Step::act(self.question().into_iter().collect())
            }
            State::Preparing
            | State::Owned { .. }
            | State::Activating { .. }
            | State::Refusing { .. }
            | State::HandingBack { .. }
            | State::Done(_) => Step::nothing(),
        }
    }

    /// Called only in the step that records `Activated`, or when that record was found: see
    /// [`super`].
    fn permit(&self) -> RunPermit {
        debug_assert!(matches!(self.state, State::Activating { .. }), "a permit before Activated");
        RunPermit::grant(self.attempt.vm.clone(), self.attempt.epoch)
    }
}
