//! The code's machines with an arbiter, driven along every edge of the arbiter's model; and once more after both
//! gateways have been restarted in every state: what is in the journal is all there is.
//!
//! A message that the model sends later is lost where the code says it at once: it is said again.

use std::time::Duration;

use longhaul_core::ids::{Epoch, MigrationId};
use longhaul_core::migration::arbiter::{Arbiter as Kind, Request, Verdict};
use longhaul_core::migration::destination::{self, DestinationLimits, Remains};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::source::{self, SourceLimits};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};

use crate::arbiter::{Arbiter, Destination, Guest, Label, Register, Sent, Source, State};
use crate::conformance::{moved, name, proposal, reservation, why};
use crate::search::{Model, search};
use crate::support;

const EPOCH: Epoch = Epoch(5);

struct World {
    now: Duration,
    source: Option<source::Source>,
    destination: Option<destination::Destination>,
    source_journal: Vec<Record>,
    destination_journal: Vec<Record>,
    owns: [Option<Ownership>; 2],
    guests: [Guest; 2],
    register: Register,
    sent: Sent,
    /// It came back by the register's word, not by the destination's.
    by_the_register: bool,
}

fn attempt(peer: &str) -> Attempt {
    let vm = "web1".parse().expect("a literal name");
    let commit = CommitMode::Arbitrated(Kind::Dns);
    Attempt { id: MigrationId(7), vm, peer: name(peer), epoch: EPOCH, commit }
}

impl World {
    /// The copy is under way.
    fn start() -> Self {
        let now = Duration::from_secs(1);
        let (source, begun) = source::Source::begin(attempt("b"), SourceLimits::default(), false, now);
        let (destination, held) = destination::Destination::begin(
            attempt("a"),
            proposal(),
            reservation(),
            DestinationLimits::default(),
            now,
        );
        let mut world = Self {
            now,
            source: Some(source),
            destination: Some(destination),
            source_journal: Vec::new(),
            destination_journal: Vec::new(),
            owns: [Some(Ownership::Here { epoch: Epoch(4) }), None],
            guests: [Guest::Running, Guest::Gone],
            register: Register::SourceBefore,
            sent: Sent::default(),
            by_the_register: false,
        };
        world.source_acts(begun);
        world.destination_acts(held);
        world.source(source::Event::PreflightPassed(proposal()));
        world.source(source::Event::Peer(MigrationMessage::Accept));
        world.source(source::Event::Peer(MigrationMessage::Reserved(reservation())));
        world.destination(destination::Event::Prepared);
        world.source(source::Event::Progress(support::converged()));
        world
    }

    fn source_acts(&mut self, step: Step<source::Action>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.source_journal.last(), record).expect("a legal record");
            self.owns[0] = Ownership::after(self.owns[0].as_ref(), record, EPOCH, &name("b"));
            self.source_journal.push(record.clone());
        }
        let mut rolled_back = false;
        for action in step.after_record() {
            match action {
                source::Action::Send(MigrationMessage::Offer { .. }) => self.sent.offer = true,
                source::Action::Send(MigrationMessage::Commit { .. }) => self.sent.grant = true,
                source::Action::Send(MigrationMessage::Abort { .. }) => self.sent.cancel = true,
                source::Action::Arbitrate(Request::ForDestination) => self.sent.claim = true,
                source::Action::Arbitrate(Request::ForSource) => self.sent.reclaim = true,
                source::Action::Rollback(permit) => {
                    assert_eq!(permit.epoch(), EPOCH);
                    resume(&mut self.guests[0]);
                    rolled_back = true;
                }
                source::Action::Send(_)
                | source::Action::Arbitrate(Request::Read | Request::BackToSource)
                | source::Action::Preflight
                | source::Action::StartPreCopy(_)
                | source::Action::Park
                | source::Action::Attract(_)
                | source::Action::ReportSecondOwner
                | source::Action::Release => {}
            }
        }
        if rolled_back {
            self.source(source::Event::RolledBack);
        }
    }

    fn destination_acts(&mut self, step: Step<destination::Action>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.destination_journal.last(), record).expect("a legal record");
            self.owns[1] = Ownership::after(self.owns[1].as_ref(), record, EPOCH, &name("a"));
            self.destination_journal.push(record.clone());
        }
        let mut activated = false;
        for action in step.after_record() {
            match action {
                destination::Action::Send(MigrationMessage::Activated { .. }) => self.sent.running = true,
                destination::Action::Send(MigrationMessage::Refused { .. }) => self.sent.refuse = true,
                destination::Action::Arbitrate(Request::ForDestination) => self.sent.claim = true,
                destination::Action::Arbitrate(Request::ForSource) => self.sent.reclaim = true,
                destination::Action::Arbitrate(Request::BackToSource) => match self.register {
                    Register::SourceBefore => self.sent.reclaim = true,
                    Register::DestinationAfter | Register::SourceAfter => {
                        self.register = Register::SourceAfter;
                    }
                },
                destination::Action::Activate(permit, _) => {
                    assert_eq!(permit.epoch(), EPOCH);
                    resume(&mut self.guests[1]);
                    activated = true;
                }
                destination::Action::Discard => self.guests[1] = Guest::Gone,
                destination::Action::Send(_)
                | destination::Action::Arbitrate(Request::Read)
                | destination::Action::CheckGuest
                | destination::Action::Prepare => {}
            }
        }
        if activated {
            self.destination(destination::Event::Activated);
        }
    }

    fn source(&mut self, event: source::Event) {
        let Some(machine) = self.source.take() else { return };
        let (machine, step) = machine.handle(event, self.now);
        self.source = Some(machine);
        self.source_acts(step);
    }

    fn destination(&mut self, event: destination::Event) {
        let Some(machine) = self.destination.take() else { return };
        let (machine, step) = machine.handle(event, self.now);
        self.destination = Some(machine);
        self.destination_acts(step);
    }

    fn source_hears(&mut self, message: MigrationMessage) {
        self.source(source::Event::Peer(message));
    }

    fn destination_hears(&mut self, message: MigrationMessage) {
        self.destination(destination::Event::Peer(message));
    }

    /// What the source asks of the register now, told the answer.
    fn source_takes_back(&mut self) {
        self.register = Register::SourceAfter;
        self.source(source::Event::Arbiter(Verdict::Source));
    }

    fn apply(&mut self, label: &str) {
        self.now += Duration::from_secs(100);
        let said = self.sent;
        match label {
            "both paused, destination loaded" => {
                self.guests = [Guest::Paused; 2];
                self.source(source::Event::GuestStopped);
                self.source(source::Event::Parked(moved()));
                self.destination(destination::Event::Loaded);
            }
            "source host lost" => self.guests[0] = Guest::Gone,
            "destination host lost" => self.guests[1] = Guest::Gone,
            "arbiter: applies the claim" => self.register = Register::DestinationAfter,
            "arbiter: applies the reclaim" => self.register = Register::SourceAfter,
            source if source.starts_with("source: ") => self.apply_source(&source[8..], said),
            destination => self.apply_destination(&destination[13..]),
        }
    }

    fn apply_source(&mut self, label: &str, said: Sent) {
        match label {
            "offers" => self.source_hears(MigrationMessage::Loaded { epoch: EPOCH }),
            "aborts before the offer" => self.source(source::Event::Failed(why())),
            "asks the register for itself" => self.source(source::Event::Arbiter(Verdict::Open)),
            "promises" => self.source(source::Event::Arbiter(Verdict::Unknown)),
            "writes for the destination" | "gone, says so" => self.source(source::Event::Tick),
            "pays its debt to the register" => {
                self.source(source::Event::Tick);
                self.source_takes_back();
            }
            "reads destination" => {
                self.source(source::Event::Arbiter(Verdict::Destination));
                self.sent.grant = said.grant;
            }
            "reads itself, resumes" | "gone, reads itself, resumes" => {
                self.source(source::Event::Arbiter(Verdict::Source));
                self.by_the_register = true;
            }
            "hears the refusal, resumes" => {
                self.source_hears(MigrationMessage::Refused { epoch: EPOCH, why: why() });
            }
            "hears that it runs there" => {
                for _ in 0..2 {
                    self.source_hears(MigrationMessage::Activated { epoch: EPOCH });
                }
                self.guests[0] = Guest::Gone;
                self.source(source::Event::TidiedUp);
                self.sent.grant = said.grant;
            }
            "refused after all, takes it back" => {
                self.source_hears(MigrationMessage::Refused { epoch: EPOCH, why: why() });
                self.source_takes_back();
                self.by_the_register = true;
            }
            other => panic!("the source cannot {other}"),
        }
    }

    fn apply_destination(&mut self, label: &str) {
        match label {
            "cancelled" => self.destination_hears(MigrationMessage::Abort { epoch: EPOCH, why: why() }),
            "QEMU lost, refuses"
            | "refuses"
            | "QEMU lost, asks for the source"
            | "hands back"
            | "hands back by the register" => self.destination(destination::Event::Failed(why())),
            "was promised it" => {
                self.destination_hears(MigrationMessage::Commit { epoch: EPOCH, handover: moved() });
            }
            "journals, resumes" => self.destination(destination::Event::Stands),
            "claims" => self.destination_hears(MigrationMessage::Offer { epoch: EPOCH, handover: moved() }),
            "reads itself, owns" => self.destination(destination::Event::Arbiter(Verdict::Destination)),
            "lost the race, refuses" => self.destination(destination::Event::Arbiter(Verdict::Source)),
            "hands back again" => self.destination(destination::Event::Tick),
            other => panic!("the destination cannot {other}"),
        }
    }

    /// Both gateways die and start again.
    fn restart(&mut self) {
        let (sent, register) = (self.sent, self.register);
        if let Some(Record::Source(last)) = self.source_journal.last().cloned() {
            let limits = SourceLimits::default();
            let (machine, step) = source::Source::recover(attempt("b"), last, limits, &name("a"), self.now);
            self.source = Some(machine);
            self.source_acts(step);
        }
        if let Some(Record::Destination(last)) = self.destination_journal.last().cloned() {
            let qemu_found = self.guests[1] != Guest::Gone;
            let remains = Remains { nics: Vec::new(), reservation: reservation(), last, qemu_found };
            let limits = DestinationLimits::default();
            let (machine, step) =
                destination::Destination::recover(attempt("a"), remains, limits, &name("b"), self.now);
            self.destination = Some(machine);
            self.destination_acts(step);
        }
        self.source(source::Event::LinkUp);
        self.destination(destination::Event::LinkUp);
        // Saying something again is not saying something else.
        (self.sent, self.register) = (sent, register);
    }

    fn state(&self) -> State {
        State {
            source: self.source_state(),
            source_guest: self.guests[0],
            destination: self.destination_state(),
            destination_guest: self.guests[1],
            register: self.register,
            sent: self.sent,
        }
    }

    fn source_state(&self) -> Source {
        let Some(Record::Source(last)) = self.source_journal.last() else { panic!("nothing is reserved") };
        let (state, owner) = match last {
            SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked => {
                (Source::Run, Ownership::Here { epoch: Epoch(4) })
            }
            SourceRecord::Aborted { .. } => (Source::ResumedUnsettled, Ownership::Here { epoch: Epoch(4) }),
            SourceRecord::Offered { .. } => {
                (Source::Offered, Ownership::Offered { site: name("b"), epoch: EPOCH })
            }
            SourceRecord::Reclaiming { .. } => {
                (Source::Aborting, Ownership::Offered { site: name("b"), epoch: EPOCH })
            }
            SourceRecord::Promised { .. } => {
                (Source::Promised, Ownership::Away { site: name("b"), epoch: EPOCH })
            }
            SourceRecord::Committed { .. } => {
                (Source::Gone, Ownership::Away { site: name("b"), epoch: EPOCH })
            }
            SourceRecord::Released => (Source::Done, Ownership::Away { site: name("b"), epoch: EPOCH }),
            SourceRecord::TakenBack { .. } => panic!("an operator decided, who is not of this model"),
            SourceRecord::Returned { .. } | SourceRecord::Settled if self.by_the_register => {
                (Source::Resumed, Ownership::Here { epoch: EPOCH })
            }
            SourceRecord::Returned { .. } | SourceRecord::Settled => {
                (Source::ResumedUnsettled, Ownership::Here { epoch: EPOCH })
            }
        };
        assert_eq!(self.owns[0], Some(owner), "the ledger after {last:?}");
        state
    }

    fn destination_state(&self) -> Destination {
        let Some(Record::Destination(last)) = self.destination_journal.last() else {
            panic!("nothing is held")
        };
        let (state, owner) = match last {
            DestinationRecord::Reserved { .. } => (Destination::Receiving, Some(false)),
            DestinationRecord::Loaded => (Destination::Loaded, Some(false)),
            DestinationRecord::Claiming { .. } => (Destination::Claiming, Some(false)),
            DestinationRecord::Owned { .. } => (Destination::Owner, Some(false)),
            DestinationRecord::Activated { .. } => (Destination::Ran, Some(true)),
            DestinationRecord::Refused { .. } => (Destination::Refused, None),
            DestinationRecord::TakenOver { .. } | DestinationRecord::Overruled => {
                panic!("an operator decided, who is not of this model")
            }
            DestinationRecord::HandedBack { .. } => (Destination::HandBack, None),
        };
        let here = |owner: &Ownership| matches!(owner, Ownership::Here { .. });
        assert_eq!(self.owns[1].as_ref().map(here), owner, "the ledger after {last:?}");
        state
    }
}

fn resume(guest: &mut Guest) {
    if *guest == Guest::Paused {
        *guest = Guest::Running;
    }
}

fn replay(trace: &[Label]) -> World {
    let mut world = World::start();
    for label in trace {
        world.apply(label.0);
    }
    world
}

/// A restart there is one of the model's own edges: what was not offered is given up, what is lost is refused.
fn restart_decides(state: &State) -> bool {
    let decides = matches!(
        state.destination,
        Destination::Receiving | Destination::Loaded | Destination::Claiming | Destination::Owner
    );
    state.source == Source::Run || (decides && state.destination_guest == Guest::Gone)
}

#[test]
fn the_code_takes_every_edge_of_the_arbiters_model_and_survives_a_restart_in_every_state() {
    let model = Arbiter { mutant: None };
    let found = search(&model);
    let (mut edges, mut restarts) = (0, 0);
    for (at, state) in found.states.iter().enumerate() {
        let mut trace = found.trace(at);
        if !restart_decides(state) {
            let mut world = replay(&trace);
            world.restart();
            assert_eq!(world.state(), *state, "restarted after {trace:?}");
            restarts += 1;
        }
        for step in model.moves(state) {
            trace.push(step.label);
            assert_eq!(replay(&trace).state(), step.to, "after {trace:?}");
            if !restart_decides(state) && !step.fault {
                let mut world = replay(&trace[..trace.len() - 1]);
                world.restart();
                world.apply(step.label.0);
                // A source that came back tells it once more.
                let expected = State { sent: world.sent, ..step.to };
                assert_eq!(world.state(), expected, "restarted before the last of {trace:?}");
            }
            trace.pop();
            edges += 1;
        }
    }
    println!("{edges} edges of {} states, {restarts} restarts", found.states.len());
    assert_eq!(edges, found.transitions);
}
