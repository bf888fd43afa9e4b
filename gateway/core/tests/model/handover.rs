//! The hand-over by two journaled machines without an arbiter: commit modes `confirmed` and `pipelined`.
//!
//! In `pipelined` the source commits right behind the last byte, without hearing Loaded; the destination lets an early Commit lie
//! until it has loaded, and says to who commits that it still receives. A source whose gateway died meanwhile, and with it what
//! had not arrived, asks for a refusal then. Time is not in it: whatever a deadline may do, may happen at any time.

use crate::search::{Model, Move};
use crate::state::{Attempt, Cause, Destination, Guest, MESSAGES, Message, Owns, Sent, Source, State};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Confirmed,
    Pipelined,
}

/// Where the machine goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Nowhere,
    /// It stayed at 0; 0 tries 2.
    Retry,
    /// It came to 1; 1 gives it to 2.
    Onward,
    /// It came to 1; 1 gives it back to 0.
    Back,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    SourceTimesOut,
    DestinationTimesOut,
    /// The destination's journal was restored from a backup that is too old. Not the protocol's fault:
    /// it may wait for ever then, but must not run two.
    OldBackup,
    /// The same, and the source takes Unknown for Refused.
    UnknownIsRefused,
    CommitsBeforeRecord,
    ResumesBeforeRecord,
    RefusesAfterActivated,
    OldAbortResumes,
    RollsBackWithoutResuming,
    SilentOnceDone,
    ForgetsRefusal,
    StartGateOpen,
    /// A source that was started anew does not know that the rest is lost.
    WaitsForWhatIsLost,
}

/// One step; the number is the attempt's or, for what befalls a site, the site's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    Begin(usize),
    PreflightPassed(usize),
    Deliver(usize, Message),
    Park(usize),
    GuestStopped(usize),
    /// Its last byte leaves, and may be there before the source has seen to what follows.
    LastByte(usize),
    AllSent(usize),
    /// What was on its way is lost with the source's gateway, behind a Commit: `pipelined` only.
    RestIsLost(usize),
    /// The link is down when it has seen to what follows: `pipelined` gives nothing away then.
    AllSentInACut(usize),
    /// It stands still for too long behind a Commit, or its operator wants it back: `pipelined` only.
    SourceAsks(usize),
    SourceGivesUp(usize),
    SourceResumes(usize),
    RolledBack(usize),
    TidiedUp(usize),
    Prepared(usize),
    Loads(usize),
    DestinationFails(usize),
    DestinationResumes(usize),
    Activated(usize),
    Discarded(usize),
    GatewayCrash(usize),
    GuestDies(usize),
    Boot(usize),
    SourceRepeats(usize),
    DestinationRepeats(usize),
    /// Everything that is under way is lost.
    Cut,
    Wrong(usize),
}

pub struct Handover {
    pub mode: Mode,
    pub then: Then,
    pub mutant: Option<Mutant>,
}

impl Model for Handover {
    type State = State;
    type Label = Label;

    fn start(&self) -> State {
        State::START
    }

    fn moves(&self, state: &State) -> Vec<Move<Label, State>> {
        self.labels()
            .into_iter()
            .filter_map(|label| {
                let mut to = *state;
                self.apply(&mut to, label)?;
                let fault = matches!(
                    label,
                    Label::GatewayCrash(_)
                        | Label::GuestDies(_)
                        | Label::SourceGivesUp(_)
                        | Label::DestinationFails(_)
                        | Label::Begin(_)
                        | Label::RestIsLost(_)
                        | Label::Cut
                );
                (to != *state).then_some(Move { label, to, fault })
            })
            .collect()
    }

    fn violated(&self, state: &State) -> Option<&'static str> {
        state.violated()
    }

    fn is_settled(&self, state: &State) -> bool {
        state.is_settled()
    }

    fn is_lost(&self, state: &State) -> bool {
        state.is_lost()
    }
}

impl Handover {
    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// The sites of an attempt: from, to.
    pub fn route(&self, attempt: usize) -> (usize, usize) {
        match (attempt, self.then) {
            (0, _) | (_, Then::Nowhere) => (0, 1),
            (_, Then::Retry) => (0, 2),
            (_, Then::Onward) => (1, 2),
            (_, Then::Back) => (1, 0),
        }
    }

    /// Every step there is, possible now or not.
    pub fn labels(&self) -> Vec<Label> {
        let attempts = if self.then == Then::Nowhere { 1 } else { 2 };
        let sites = if matches!(self.then, Then::Retry | Then::Onward) { 3 } else { 2 };
        let of_attempt = [
            Label::Begin,
            Label::PreflightPassed,
            Label::Park,
            Label::GuestStopped,
            Label::LastByte,
            Label::AllSent,
            Label::RestIsLost,
            Label::AllSentInACut,
            Label::SourceAsks,
            Label::SourceGivesUp,
            Label::SourceResumes,
            Label::RolledBack,
            Label::TidiedUp,
            Label::Prepared,
            Label::Loads,
            Label::DestinationFails,
            Label::DestinationResumes,
            Label::Activated,
            Label::Discarded,
            Label::SourceRepeats,
            Label::DestinationRepeats,
            Label::Wrong,
        ];
        let mut labels = vec![Label::Cut];
        labels.extend((0..attempts).flat_map(|at| of_attempt.map(|label| label(at))));
        labels.extend((0..attempts).flat_map(|at| MESSAGES.map(|message| Label::Deliver(at, message))));
        labels.extend(
            (0..sites).flat_map(|at| [Label::GatewayCrash(at), Label::GuestDies(at), Label::Boot(at)]),
        );
        labels
    }

    /// Takes one step; `None` where it cannot be taken.
    pub fn apply(&self, state: &mut State, label: Label) -> Option<()> {
        match label {
            Label::Begin(at) => self.begin(state, at),
            Label::Deliver(at, message) => {
                if !state.attempts[at].sent.has(message) {
                    return None;
                }
                if message.is_for_source() {
                    self.to_source(state, at, message);
                } else {
                    self.to_destination(state, at, message);
                }
                Some(())
            }
            Label::PreflightPassed(at)
            | Label::Park(at)
            | Label::GuestStopped(at)
            | Label::LastByte(at)
            | Label::AllSent(at)
            | Label::AllSentInACut(at)
            | Label::SourceAsks(at)
            | Label::SourceResumes(at)
            | Label::RolledBack(at)
            | Label::TidiedUp(at) => self.source_works(state, at, label),
            Label::RestIsLost(at) => {
                let attempt = &mut state.attempts[at];
                let arrives = matches!(attempt.destination, Destination::Preparing | Destination::Receiving);
                (attempt.asks && arrives && attempt.all_sent).then(|| attempt.all_sent = false)
            }
            Label::SourceGivesUp(at) => {
                self.give_up(state, at);
                Some(())
            }
            Label::Prepared(at)
            | Label::Loads(at)
            | Label::DestinationResumes(at)
            | Label::Activated(at)
            | Label::Discarded(at) => self.destination_works(state, at, label),
            Label::DestinationFails(at) => {
                let late = self.is(Mutant::RefusesAfterActivated)
                    && state.attempts[at].destination == Destination::Activating;
                let holds = matches!(
                    state.attempts[at].destination,
                    Destination::Preparing | Destination::Receiving | Destination::Loaded
                );
                (holds || late).then(|| self.refuse(state, at))
            }
            Label::GatewayCrash(site) => self.crash(state, site),
            Label::GuestDies(site) => {
                let alive = matches!(state.guests[site], Guest::Still | Guest::Running);
                alive.then(|| state.guests[site] = Guest::Dead)
            }
            Label::Boot(site) => self.boot(state, site),
            Label::SourceRepeats(at) => {
                if self.mode == Mode::Pipelined && state.attempts[at].source == Source::Parked {
                    commit(state, at, self.route(at).0);
                    return Some(());
                }
                source_repeats(&mut state.attempts[at])
            }
            Label::DestinationRepeats(at) => destination_repeats(&mut state.attempts[at]),
            Label::Cut => {
                state.attempts.iter_mut().for_each(|attempt| attempt.sent = Sent::default());
                Some(())
            }
            Label::Wrong(at) => self.wrong(state, at),
        }
    }

    fn begin(&self, state: &mut State, at: usize) -> Option<()> {
        let (from, _) = self.route(at);
        let Owns::Here(epoch) = state.owns[from] else { return None };
        let first = &state.attempts[0];
        let free = match self.then {
            Then::Nowhere => false,
            Then::Retry => first.is_settled_at_source(),
            Then::Onward | Then::Back => first.destination == Destination::Active,
        };
        let idle = state.attempts[at].source == Source::Absent && state.guests[from] == Guest::Running;
        (at == 1 && free && idle).then(|| {
            state.attempts[1].source = Source::Preflight;
            state.attempts[1].epoch = epoch + 1;
        })
    }

    fn source_works(&self, state: &mut State, at: usize, label: Label) -> Option<()> {
        let (from, _) = self.route(at);
        let attempt = &mut state.attempts[at];
        let guest = &mut state.guests[from];
        match (label, attempt.source) {
            (Label::PreflightPassed(_), Source::Preflight) => {
                attempt.source = Source::Proposed;
                attempt.sent.add(Message::Propose);
            }
            (Label::Park(_), Source::PreCopy) => attempt.source = Source::Parking { loaded: false },
            (Label::GuestStopped(_), Source::Parking { .. }) if *guest == Guest::Running => {
                *guest = Guest::Still;
            }
            (Label::LastByte(_), Source::Parking { .. }) if *guest == Guest::Still => attempt.all_sent = true,
            (Label::AllSent(_), Source::Parking { loaded }) if attempt.all_sent => {
                attempt.source = Source::Parked;
                if loaded || self.mode == Mode::Pipelined {
                    commit(state, at, from);
                }
            }
            (Label::AllSentInACut(_), Source::Parking { loaded: false })
                if attempt.all_sent && self.mode == Mode::Pipelined =>
            {
                attempt.source = Source::Parked;
            }
            (Label::SourceAsks(_), Source::Committed) if self.mode == Mode::Pipelined => attempt.asks = true,
            (Label::SourceResumes(_), Source::Aborting { rolled_back: false, .. })
                if *guest == Guest::Still =>
            {
                *guest = Guest::Running;
            }
            (Label::RolledBack(_), Source::Aborting { cause, rolled_back: false, told }) => {
                if *guest == Guest::Still && !self.is(Mutant::RollsBackWithoutResuming) {
                    return None;
                }
                attempt.source = Source::Aborting { cause, rolled_back: true, told };
                if told {
                    attempt.source = Source::Stayed(cause);
                }
            }
            (Label::TidiedUp(_), Source::Released) => {
                attempt.source = Source::Moved;
                *guest = Guest::Gone;
            }
            (_, _) => return None,
        }
        Some(())
    }

    fn to_source(&self, state: &mut State, at: usize, message: Message) {
        let (from, _) = self.route(at);
        let attempt = &mut state.attempts[at];
        match (message, attempt.source) {
            (Message::Accept, Source::Proposed) => {
                attempt.source = Source::Reserving;
                attempt.sent.add(Message::Reserve);
            }
            (Message::Reserved, Source::Reserving) => attempt.source = Source::PreCopy,
            (Message::Reserved, Source::Committed)
                if attempt.asks && !self.is(Mutant::WaitsForWhatIsLost) =>
            {
                attempt.sent.add(Message::Abort);
            }
            (Message::Loaded, Source::Parking { .. }) => {
                attempt.source = Source::Parking { loaded: true };
            }
            (Message::Loaded, Source::Parked) => commit(state, at, from),
            (Message::Activated, Source::Committed) => {
                attempt.source = Source::Released;
                attempt.asks = false;
            }
            (Message::Refused, Source::Committed) => returned(state, at, from),
            (Message::Unknown, Source::Committed) if self.is(Mutant::UnknownIsRefused) => {
                returned(state, at, from);
            }
            (Message::Refused | Message::Unknown, Source::Aborting { cause, rolled_back, .. }) => {
                attempt.source = Source::Aborting { cause, rolled_back, told: true };
                if rolled_back {
                    attempt.source = Source::Stayed(cause);
                }
            }
            (Message::Refused, _) => self.give_up(state, at),
            // Nobody listens but the journal, and that is enough to say that it is over.
            (Message::Reserved | Message::Loaded, Source::Stayed(Cause::Aborted | Cause::Returned))
                if !self.is(Mutant::SilentOnceDone) =>
            {
                attempt.sent.add(Message::Abort);
            }
            (_, _) => {}
        }
    }

    fn give_up(&self, state: &mut State, at: usize) {
        let attempt = &mut state.attempts[at];
        match attempt.source {
            Source::Preflight | Source::Proposed => {
                attempt.source = Source::Aborting { cause: Cause::Early, rolled_back: false, told: true };
            }
            Source::Reserving | Source::PreCopy | Source::Parking { .. } | Source::Parked => abort(attempt),
            Source::Absent
            | Source::Committed
            | Source::Released
            | Source::Aborting { .. }
            | Source::Moved
            | Source::Stayed(_) => {}
        }
    }

    fn to_destination(&self, state: &mut State, at: usize, message: Message) {
        let (_, to) = self.route(at);
        let busy = self.is_busy(state, at, to);
        let attempt = &mut state.attempts[at];
        match (message, attempt.destination) {
            (Message::Propose, Destination::Absent | Destination::Active | Destination::Refused) if busy => {}
            (Message::Propose, _) => attempt.sent.add(Message::Accept),
            (Message::Reserve, Destination::Absent) if !busy => {
                attempt.destination = Destination::Preparing;
                if !matches!(state.owns[to], Owns::Away(_)) {
                    state.owns[to] = Owns::Arriving;
                }
            }
            (Message::Reserve, Destination::Receiving) => attempt.sent.add(Message::Reserved),
            (
                Message::Reserve | Message::Commit | Message::Abort,
                Destination::Refusing | Destination::Refused,
            ) => {
                attempt.sent.add(Message::Refused);
            }
            (Message::Commit | Message::Abort, Destination::Absent) => attempt.sent.add(Message::Unknown),
            (Message::Commit | Message::Abort, Destination::Active) => attempt.sent.add(Message::Activated),
            (Message::Commit, Destination::Loaded) => activate(state, at, to),
            (Message::Commit, Destination::Receiving) if self.mode == Mode::Pipelined => {
                attempt.early = true;
                attempt.sent.add(Message::Reserved);
            }
            (Message::Commit, Destination::Preparing | Destination::Receiving) => self.refuse(state, at),
            (Message::Abort, Destination::Preparing | Destination::Receiving | Destination::Loaded) => {
                self.refuse(state, at);
            }
            (_, _) => {}
        }
    }

    /// The site has the machine, or another attempt for it under way.
    fn is_busy(&self, state: &State, at: usize, to: usize) -> bool {
        let other = &state.attempts[1 - at];
        let (other_from, other_to) = self.route(1 - at);
        let leaves = other_from == to && !matches!(other.source, Source::Absent | Source::Moved);
        let comes = other_to == to
            && !matches!(other.destination, Destination::Absent | Destination::Refused | Destination::Active);
        let both_ways = self.then != Then::Nowhere && (leaves || comes);
        state.is_here(to) || both_ways
    }

    fn destination_works(&self, state: &mut State, at: usize, label: Label) -> Option<()> {
        let (_, to) = self.route(at);
        let attempt = &mut state.attempts[at];
        let guest = &mut state.guests[to];
        match (label, attempt.destination) {
            (Label::Prepared(_), Destination::Preparing) => {
                attempt.destination = Destination::Receiving;
                attempt.sent.add(Message::Reserved);
            }
            (Label::Loads(_), Destination::Receiving) if attempt.all_sent => {
                *guest = Guest::Still;
                if std::mem::take(&mut attempt.early) {
                    activate(state, at, to);
                    return Some(());
                }
                attempt.destination = Destination::Loaded;
                attempt.sent.add(Message::Loaded);
            }
            (Label::DestinationResumes(_), Destination::Activating) if *guest == Guest::Still => {
                *guest = Guest::Running;
            }
            (Label::Activated(_), Destination::Activating) if *guest != Guest::Still => {
                attempt.destination = Destination::Active;
                attempt.sent.add(Message::Activated);
            }
            (Label::Discarded(_), Destination::Refusing) => {
                attempt.destination = Destination::Refused;
                *guest = Guest::Gone;
            }
            (_, _) => return None,
        }
        Some(())
    }

    fn refuse(&self, state: &mut State, at: usize) {
        let (_, to) = self.route(at);
        state.attempts[at].destination = Destination::Refusing;
        state.attempts[at].early = false;
        state.attempts[at].sent.add(Message::Refused);
        if state.owns[to] == Owns::Arriving {
            state.owns[to] = Owns::Unknown;
        }
    }

    /// The gateway of `site` dies and comes back: every machine there is what its journal holds.
    fn crash(&self, state: &mut State, site: usize) -> Option<()> {
        let attempts = if self.then == Then::Nowhere { 1 } else { 2 };
        for at in 0..attempts {
            let (from, to) = self.route(at);
            if from == site {
                self.recover_source(state, at, from);
            }
            if to == site {
                self.recover_destination(state, at);
            }
        }
        Some(())
    }

    fn recover_source(&self, state: &mut State, at: usize, from: usize) {
        let stands = state.guests[from] == Guest::Still;
        let may_undo = match state.owns[from] {
            Owns::Here(epoch) => epoch <= state.attempts[at].epoch,
            Owns::Away(epoch) => epoch <= state.attempts[at].epoch && self.is(Mutant::OldAbortResumes),
            Owns::Unknown | Owns::Arriving => false,
        };
        let attempt = &mut state.attempts[at];
        match attempt.source {
            Source::Preflight | Source::Proposed | Source::Aborting { cause: Cause::Early, .. } => {
                attempt.source = Source::Stayed(Cause::Early);
            }
            Source::Reserving | Source::PreCopy | Source::Parking { .. } | Source::Parked => abort(attempt),
            Source::Aborting { cause, .. } | Source::Stayed(cause) => {
                attempt.source = Source::Stayed(cause);
                if stands && may_undo {
                    attempt.source = Source::Aborting { cause, rolled_back: false, told: false };
                }
            }
            Source::Committed => attempt.asks = self.mode == Mode::Pipelined,
            Source::Absent | Source::Released | Source::Moved => {}
        }
    }

    fn recover_destination(&self, state: &mut State, at: usize) {
        let (_, to) = self.route(at);
        match state.attempts[at].destination {
            Destination::Preparing | Destination::Receiving => self.refuse(state, at),
            // The source has kept its memory.
            Destination::Loaded if state.guests[to] == Guest::Dead => self.refuse(state, at),
            Destination::Refused if self.is(Mutant::ForgetsRefusal) => {
                state.attempts[at].destination = Destination::Absent;
            }
            Destination::Absent
            | Destination::Loaded
            | Destination::Activating
            | Destination::Active
            | Destination::Refusing
            | Destination::Refused => {}
        }
    }

    /// An operator, or the host's autostart, starts the machine from its disk through the start gate.
    fn boot(&self, state: &mut State, site: usize) -> Option<()> {
        let moving = (0..2).any(|at| {
            self.route(at).0 == site
                && matches!(
                    state.attempts[at].source,
                    Source::Reserving | Source::PreCopy | Source::Parking { .. } | Source::Parked
                )
        });
        let open = (state.is_here(site) && !moving) || self.is(Mutant::StartGateOpen);
        (state.guests[site] == Guest::Dead && open).then(|| state.guests[site] = Guest::Running)
    }

    /// What only a mutant does.
    fn wrong(&self, state: &mut State, at: usize) -> Option<()> {
        let (_, to) = self.route(at);
        let attempt = &mut state.attempts[at];
        match self.mutant? {
            Mutant::DestinationTimesOut if attempt.destination == Destination::Loaded => {
                activate(state, at, to);
            }
            Mutant::SourceTimesOut if attempt.source == Source::Committed => {
                state.guests[self.route(at).0] = Guest::Running;
            }
            Mutant::CommitsBeforeRecord
                if matches!(attempt.source, Source::Parking { .. } | Source::Parked) =>
            {
                attempt.sent.add(Message::Commit);
            }
            Mutant::ResumesBeforeRecord
                if attempt.destination == Destination::Loaded && attempt.sent.has(Message::Commit) =>
            {
                state.guests[to] = Guest::Running;
            }
            Mutant::OldBackup | Mutant::UnknownIsRefused
                if attempt.source == Source::Committed && attempt.destination == Destination::Loaded =>
            {
                attempt.destination = Destination::Absent;
                attempt.sent = Sent::default();
                state.guests[to] = Guest::Gone;
                state.owns[to] = Owns::Unknown;
            }
            Mutant::DestinationTimesOut
            | Mutant::OldBackup
            | Mutant::CommitsBeforeRecord
            | Mutant::ResumesBeforeRecord
            | Mutant::SourceTimesOut
            | Mutant::UnknownIsRefused
            | Mutant::RefusesAfterActivated
            | Mutant::OldAbortResumes
            | Mutant::RollsBackWithoutResuming
            | Mutant::SilentOnceDone
            | Mutant::ForgetsRefusal
            | Mutant::StartGateOpen
            | Mutant::WaitsForWhatIsLost => return None,
        }
        Some(())
    }
}

fn commit(state: &mut State, at: usize, from: usize) {
    let attempt = &mut state.attempts[at];
    attempt.source = Source::Committed;
    attempt.asks = false;
    attempt.sent.add(Message::Commit);
    state.owns[from] = Owns::Away(attempt.epoch);
}

fn returned(state: &mut State, at: usize, from: usize) {
    let attempt = &mut state.attempts[at];
    attempt.source = Source::Aborting { cause: Cause::Returned, rolled_back: false, told: true };
    attempt.asks = false;
    state.owns[from] = Owns::Here(attempt.epoch);
}

fn abort(attempt: &mut Attempt) {
    attempt.source = Source::Aborting { cause: Cause::Aborted, rolled_back: false, told: false };
    attempt.sent.add(Message::Abort);
}

fn activate(state: &mut State, at: usize, to: usize) {
    state.attempts[at].destination = Destination::Activating;
    state.owns[to] = Owns::Here(state.attempts[at].epoch);
}

/// Says again what is not answered yet.
fn source_repeats(attempt: &mut Attempt) -> Option<()> {
    let message = match attempt.source {
        Source::Proposed => Message::Propose,
        Source::Reserving | Source::PreCopy | Source::Parking { .. } | Source::Parked => Message::Reserve,
        Source::Committed => Message::Commit,
        Source::Aborting { told: false, .. } => Message::Abort,
        Source::Absent
        | Source::Preflight
        | Source::Released
        | Source::Aborting { told: true, .. }
        | Source::Moved
        | Source::Stayed(_) => return None,
    };
    attempt.sent.add(message);
    Some(())
}

fn destination_repeats(attempt: &mut Attempt) -> Option<()> {
    let message = match attempt.destination {
        Destination::Receiving => Message::Reserved,
        Destination::Loaded => Message::Loaded,
        Destination::Absent
        | Destination::Preparing
        | Destination::Activating
        | Destination::Active
        | Destination::Refusing
        | Destination::Refused => return None,
    };
    attempt.sent.add(message);
    Some(())
}
