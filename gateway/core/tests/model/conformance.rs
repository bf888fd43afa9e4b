//! The code's machines, driven with the model's steps: along every edge of the confirmed model, and of the pipelined one, both
//! must come to the same state, say the same, and give a permit in the same places.
//!
//! Around the machines is what a gateway does: a journal, a ledger, drivers that end, recovery.

use std::time::Duration;

use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::migration::destination::{self, DestinationLimits, Remains};
use longhaul_core::migration::late;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{
    Handover as Moved, MigrationMessage, Proposal, Refusal, Reservation,
};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::source::{self, SourceLimits};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};

use crate::handover::{Handover, Label, Mode, Then};
use crate::search::search;
use crate::state::{self, Cause, Destination, Guest, Message, Owns, Sent, Source, State};
use crate::support;

const EPOCH: Epoch = Epoch(5);
const NOW: Duration = Duration::from_secs(1);

/// A gateway at each of two sites, and what is between them.
struct World {
    commit: CommitMode,
    source: Option<source::Source>,
    destination: Option<destination::Destination>,
    source_journal: Vec<Record>,
    destination_journal: Vec<Record>,
    owns: [Option<Ownership>; 2],
    permits: [Option<RunPermit>; 2],
    guests: [Guest; 2],
    sent: Sent,
    all_sent: bool,
    tidied: bool,
}

pub fn name(name: &str) -> SiteName {
    name.parse().expect("a literal name")
}

fn attempt(peer: &str, commit: CommitMode) -> Attempt {
    let vm = "web1".parse().expect("a literal name");
    Attempt { id: MigrationId(7), vm, peer: name(peer), epoch: EPOCH, commit }
}

pub fn proposal() -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: name("a"),
        hypervisor: "7.2".into(),
        epoch: Epoch(4),
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
        carried: Vec::new(),
    })
}

pub fn reservation() -> Reservation {
    Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None }
}

pub fn moved() -> Box<Moved> {
    Box::new(Moved { nics: Vec::new() })
}

pub fn why() -> Refusal {
    Refusal::Hypervisor("killed".into())
}

fn as_code(message: Message) -> MigrationMessage {
    match message {
        Message::Propose => MigrationMessage::Propose(proposal()),
        Message::Accept => MigrationMessage::Accept,
        Message::Reserve => MigrationMessage::Reserve { epoch: EPOCH },
        Message::Reserved => MigrationMessage::Reserved(reservation()),
        Message::Loaded => MigrationMessage::Loaded { epoch: EPOCH },
        Message::Commit => MigrationMessage::Commit { epoch: EPOCH, handover: moved() },
        Message::Activated => MigrationMessage::Activated { epoch: EPOCH },
        Message::Refused => MigrationMessage::Refused { epoch: EPOCH, why: why() },
        Message::Abort => MigrationMessage::Abort { epoch: EPOCH, why: why() },
        Message::Unknown => MigrationMessage::Unknown,
    }
}

fn as_model(message: &MigrationMessage) -> Message {
    match message {
        MigrationMessage::Propose(_) => Message::Propose,
        MigrationMessage::Accept => Message::Accept,
        MigrationMessage::Reserve { .. } => Message::Reserve,
        MigrationMessage::Reserved(_) => Message::Reserved,
        MigrationMessage::Loaded { .. } => Message::Loaded,
        MigrationMessage::Commit { .. } => Message::Commit,
        MigrationMessage::Activated { .. } => Message::Activated,
        MigrationMessage::Refused { .. } => Message::Refused,
        MigrationMessage::Abort { .. } => Message::Abort,
        MigrationMessage::Unknown => Message::Unknown,
        MigrationMessage::TakenBack { .. } => panic!("an operator decided, who is not of this model"),
        MigrationMessage::Decline(why) => panic!("a machine declined: {why}"),
        MigrationMessage::Offer { .. } => panic!("a machine was offered without an arbiter"),
    }
}

impl World {
    fn start(commit: CommitMode) -> Self {
        let (machine, step) =
            source::Source::begin(attempt("b", commit), SourceLimits::default(), false, NOW);
        let mut world = Self {
            commit,
            source: Some(machine),
            destination: None,
            source_journal: Vec::new(),
            destination_journal: Vec::new(),
            owns: [Some(Ownership::Here { epoch: Epoch(4) }), None],
            permits: [None, None],
            guests: [Guest::Running, Guest::Gone],
            sent: Sent::default(),
            all_sent: false,
            tidied: false,
        };
        world.source_step(step);
        world
    }

    fn source_step(&mut self, step: Step<source::Action>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.source_journal.last(), record).expect("a legal record");
            self.owns[0] = Ownership::after(self.owns[0].as_ref(), record, EPOCH, &name("b"));
            self.source_journal.push(record.clone());
        }
        for action in step.after_record() {
            match action {
                source::Action::Send(message) => self.sent.add(as_model(&message)),
                source::Action::Rollback(permit) => self.permits[0] = Some(permit),
                source::Action::Arbitrate(request) => panic!("{request:?} without an arbiter"),
                source::Action::Preflight
                | source::Action::StartPreCopy(_)
                | source::Action::Park
                | source::Action::Attract(_)
                | source::Action::ReportSecondOwner
                | source::Action::Release => {}
            }
        }
        if self.source.as_ref().is_some_and(|machine| machine.outcome().is_some()) {
            self.source = None;
        }
    }

    fn destination_step(&mut self, step: Step<destination::Action>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.destination_journal.last(), record).expect("a legal record");
            self.owns[1] = Ownership::after(self.owns[1].as_ref(), record, EPOCH, &name("a"));
            self.destination_journal.push(record.clone());
        }
        for action in step.after_record() {
            match action {
                destination::Action::Send(message) => self.sent.add(as_model(&message)),
                destination::Action::Activate(permit, _) => self.permits[1] = Some(permit),
                destination::Action::Arbitrate(_) | destination::Action::CheckGuest => {
                    panic!("the register is asked without an arbiter")
                }
                destination::Action::Prepare | destination::Action::Discard => {}
            }
        }
        if self.destination.as_ref().is_some_and(|machine| machine.outcome().is_some()) {
            self.destination = None;
        }
    }

    fn source(&mut self, event: source::Event) {
        let Some(machine) = self.source.take() else { return };
        let (machine, step) = machine.handle(event, NOW);
        self.source = Some(machine);
        self.source_step(step);
    }

    fn destination(&mut self, event: destination::Event) {
        let Some(machine) = self.destination.take() else { return };
        let (machine, step) = machine.handle(event, NOW);
        self.destination = Some(machine);
        self.destination_step(step);
    }

    fn deliver(&mut self, message: Message) {
        let heard = as_code(message);
        let for_source = message.is_for_source();
        if for_source && self.source.is_some() {
            return self.source(source::Event::Peer(heard));
        }
        if !for_source && self.destination.is_some() {
            return self.destination(destination::Event::Peer(heard));
        }
        let here = matches!(self.owns[1], Some(Ownership::Here { .. }));
        if message == Message::Propose {
            if !here {
                self.sent.add(Message::Accept);
            }
            return;
        }
        if message == Message::Reserve && self.destination_journal.is_empty() {
            let limits = DestinationLimits::default();
            let attempt = attempt("a", self.commit);
            let (machine, step) =
                destination::Destination::begin(attempt, proposal(), reservation(), limits, NOW);
            self.destination = Some(machine);
            return self.destination_step(step);
        }
        let journal = if for_source { &self.source_journal } else { &self.destination_journal };
        if let Some(answer) = late::answer(journal.last().map(|last| (EPOCH, last)), &heard) {
            self.sent.add(as_model(&answer));
        }
    }

    fn crash_source(&mut self) {
        self.permits[0] = None;
        let owed = match self.source_journal.last() {
            None => false,
            Some(Record::Source(SourceRecord::Aborted { .. } | SourceRecord::Returned { .. })) => {
                let owner = self.owns[0].as_ref().expect("the machine was defined here");
                self.guests[0] == Guest::Still && owner.may_undo(EPOCH)
            }
            Some(_) => !self.tidied,
        };
        self.source = None;
        if let Some(Record::Source(last)) = self.source_journal.last().cloned().filter(|_| owed) {
            let limits = SourceLimits::default();
            let attempt = attempt("b", self.commit);
            let (machine, step) = source::Source::recover(attempt, last, limits, &name("a"), NOW);
            self.source = Some(machine);
            self.source_step(step);
        }
    }

    fn crash_destination(&mut self) {
        self.permits[1] = None;
        let ended = self.destination.is_none();
        let last = self.destination_journal.last().cloned().filter(|_| !ended);
        if let Some(Record::Destination(last)) = last {
            let (machine, step) = destination::Destination::recover(
                attempt("a", self.commit),
                Remains {
                    nics: Vec::new(),
                    reservation: reservation(),
                    last,
                    qemu_found: self.guests[1] == Guest::Still,
                },
                DestinationLimits::default(),
                &name("b"),
                NOW,
            );
            self.destination = Some(machine);
            self.destination_step(step);
        }
    }

    fn resume(&mut self, site: usize) {
        let permit = self.permits[site].take().expect("the model resumes without a permit of the code");
        assert_eq!(permit.epoch(), EPOCH);
        self.guests[site] = Guest::Running;
    }

    fn boot(&mut self, site: usize) {
        let unfinished = match self.source_journal.last() {
            Some(Record::Source(
                record
                @ (SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked),
            )) if site == 0 => Some(record),
            Some(_) | None => None,
        };
        let owner = self.owns[site].as_ref().expect("the model boots an unknown machine");
        let vm = attempt("b", self.commit).vm;
        let permit = owner.permit(&vm, unfinished, &[]).expect("the start gate is shut");
        assert_eq!(permit.vm(), &vm);
        self.guests[site] = Guest::Running;
    }

    fn apply(&mut self, label: Label) {
        match label {
            Label::Deliver(_, message) => self.deliver(message),
            Label::PreflightPassed(_) => self.source(source::Event::PreflightPassed(proposal())),
            Label::Park(_) => self.source(source::Event::Progress(support::converged())),
            Label::GuestStopped(_) => {
                self.guests[0] = Guest::Still;
                self.source(source::Event::GuestStopped);
            }
            Label::LastByte(_) => self.all_sent = true,
            Label::AllSent(_) => self.source(source::Event::Parked(moved())),
            Label::SourceGivesUp(_) => self.source(source::Event::Failed(why())),
            Label::SourceResumes(_) => self.resume(0),
            Label::RolledBack(_) => self.source(source::Event::RolledBack),
            Label::TidiedUp(_) => {
                (self.guests[0], self.tidied) = (Guest::Gone, true);
                self.source(source::Event::TidiedUp);
            }
            Label::Prepared(_) => self.destination(destination::Event::Prepared),
            Label::Loads(_) => {
                self.guests[1] = Guest::Still;
                self.destination(destination::Event::Loaded);
            }
            Label::DestinationFails(_) => self.destination(destination::Event::Failed(why())),
            Label::DestinationResumes(_) => self.resume(1),
            Label::Activated(_) => self.destination(destination::Event::Activated),
            Label::Discarded(_) => {
                self.guests[1] = Guest::Gone;
                self.destination(destination::Event::Discarded);
            }
            Label::GatewayCrash(0) => self.crash_source(),
            Label::GatewayCrash(_) => self.crash_destination(),
            Label::GuestDies(site) => self.guests[site] = Guest::Dead,
            Label::Boot(site) => self.boot(site),
            Label::SourceRepeats(_) => self.source(source::Event::LinkUp),
            Label::DestinationRepeats(_) => self.destination(destination::Event::LinkUp),
            Label::Cut => self.sent = Sent::default(),
            Label::RestIsLost(_) => self.all_sent = false,
            Label::AllSentInACut(_) => {
                self.source(source::Event::LinkDown);
                self.source(source::Event::Parked(moved()));
            }
            Label::SourceAsks(_) => self.source(source::Event::AbortRequested),
            Label::Begin(_) | Label::Wrong(_) => panic!("{label:?} is not of this model"),
        }
    }

    fn state(&self) -> State {
        let owns = |site: usize| match &self.owns[site] {
            None => Owns::Unknown,
            Some(Ownership::Here { epoch }) => Owns::Here((epoch.0 - 4) as u8),
            Some(Ownership::Away { epoch, .. }) => Owns::Away((epoch.0 - 4) as u8),
            Some(Ownership::Arriving { .. }) => Owns::Arriving,
            Some(Ownership::Offered { .. }) => panic!("a machine was offered without an arbiter"),
        };
        let attempt = state::Attempt {
            source: self.source_state(),
            destination: self.destination_state(),
            sent: self.sent,
            all_sent: self.all_sent,
            asks: self.source.as_ref().is_some_and(|machine| format!("{machine:?}").contains("asks: Some")),
            early: self
                .destination
                .as_ref()
                .is_some_and(|machine| format!("{machine:?}").contains("early: Some")),
            epoch: 1,
        };
        State {
            guests: [self.guests[0], self.guests[1], Guest::Gone],
            owns: [owns(0), owns(1), Owns::Unknown],
            attempts: [attempt, state::Attempt::ABSENT],
        }
    }

    fn source_state(&self) -> Source {
        let cause = match self.source_journal.last() {
            None => Cause::Early,
            Some(Record::Source(SourceRecord::Returned { .. })) => Cause::Returned,
            Some(_) => Cause::Aborted,
        };
        let Some(machine) = &self.source else {
            let moved = matches!(self.source_journal.last(), Some(Record::Source(SourceRecord::Released)));
            return if moved { Source::Moved } else { Source::Stayed(cause) };
        };
        let text = format!("{machine:?}");
        let state = text.rsplit_once(" state: ").expect("the state is the last field").1;
        let is = |field: &str| state.contains(field);
        match state.split([' ', '{', '}']).next().expect("a name") {
            "Preflight" => Source::Preflight,
            "Proposed" => Source::Proposed,
            "Reserving" => Source::Reserving,
            "PreCopy" => Source::PreCopy,
            "Parking" => Source::Parking { loaded: is("loaded: true") },
            "Parked" => Source::Parked,
            "Committed" => Source::Committed,
            "Released" => Source::Released,
            "Aborting" => {
                let (rolled_back, told) = (is("rolled_back: true"), is("told: true"));
                Source::Aborting { cause, rolled_back, told }
            }
            other => panic!("the model has no {other}"),
        }
    }

    fn destination_state(&self) -> Destination {
        let Some(machine) = &self.destination else {
            return match self.destination_journal.last() {
                None => Destination::Absent,
                Some(Record::Destination(DestinationRecord::Activated { .. })) => Destination::Active,
                Some(_) => Destination::Refused,
            };
        };
        let text = format!("{machine:?}");
        let state = text.rsplit_once(" state: ").expect("the state is the last field").1;
        match state.split([' ', '{', '}']).next().expect("a name") {
            "Preparing" => Destination::Preparing,
            "Receiving" => Destination::Receiving,
            "Loaded" => Destination::Loaded,
            "Activating" => Destination::Activating,
            "Refusing" => Destination::Refusing,
            other => panic!("the model has no {other}"),
        }
    }
}

/// Where the code comes to along `trace`; the model is asked nothing.
fn replay(commit: CommitMode, trace: &[Label]) -> State {
    let mut world = World::start(commit);
    for label in trace {
        world.apply(*label);
    }
    world.state()
}

fn takes_every_edge(mode: Mode, commit: CommitMode) {
    let model = Handover { mode, then: Then::Nowhere, mutant: None };
    let found = search(&model);
    let mut edges = 0;
    for (at, state) in found.states.iter().enumerate() {
        let mut trace = found.trace(at);
        for label in model.labels() {
            let mut expected = *state;
            if model.apply(&mut expected, label).is_none() {
                continue;
            }
            trace.push(label);
            assert_eq!(replay(commit, &trace), expected, "after {trace:?}");
            trace.pop();
            edges += 1;
        }
    }
    println!("{mode:?}: {edges} edges of {} states", found.states.len());
    assert!(edges > found.transitions, "steps that change nothing are taken too");
}

#[test]
fn the_code_takes_every_edge_of_the_confirmed_model() {
    takes_every_edge(Mode::Confirmed, CommitMode::Confirmed);
}

#[test]
fn the_code_takes_every_edge_of_the_pipelined_model() {
    takes_every_edge(Mode::Pipelined, CommitMode::Pipelined);
}
