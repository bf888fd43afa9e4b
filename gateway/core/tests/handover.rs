//! Two migration machines, a link that loses, doubles and delays, journals, crashes: never two copies.
//!
//! Schedules are generated, so a failing one is shrunk and kept by proptest. The world is smaller
//! than the laboratory's: a guest is a flag, a crash loses everything but the journal.

use std::time::Duration;

use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::migration::destination::{
    Action as DestinationAction, Destination, DestinationLimits, Event as DestinationEvent,
};
use longhaul_core::migration::message::{Handover, MigrationMessage, Proposal, Refusal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use longhaul_core::migration::source::{Action as SourceAction, Event as SourceEvent, Source, SourceLimits};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};
use proptest::prelude::*;

mod support;

#[derive(Clone, Debug)]
enum Act {
    DeliverToDestination(usize),
    DeliverToSource(usize),
    LoseToDestination(usize),
    LoseToSource(usize),
    LocalSource(u8),
    LocalDestination(u8),
    CrashSource,
    CrashDestination,
    Wait(u16),
    LinkSource(bool),
    LinkDestination(bool),
    OperatorAborts,
}

#[derive(Default)]
struct World {
    now: Duration,
    source: Option<Source>,
    destination: Option<Destination>,
    source_journal: Vec<Record>,
    destination_journal: Vec<Record>,
    to_destination: Vec<MigrationMessage>,
    to_source: Vec<MigrationMessage>,
    runs_at_source: bool,
    runs_at_destination: bool,
    rollback_pending: bool,
    discard_pending: bool,
    tidy_pending: bool,
}

fn site(name: &str) -> SiteName {
    name.parse().expect("a literal name")
}

fn proposal() -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: site("a"),
        hypervisor: "7.2".into(),
        epoch: Epoch(4),
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
    })
}

fn attempt(peer: &str) -> Attempt {
    Attempt {
        id: MigrationId(7),
        vm: "web1".parse().expect("a literal name"),
        peer: site(peer),
        epoch: Epoch(5),
    }
}

fn reservation() -> Reservation {
    Reservation { care_of: Vec::new() }
}

fn handover() -> Box<Handover> {
    Box::new(Handover { nics: Vec::new() })
}

impl World {
    fn start() -> Self {
        let mut world = Self { runs_at_source: true, ..Self::default() };
        let (source, step) = Source::begin(attempt("b"), SourceLimits::default(), false, world.now);
        world.source = Some(source);
        world.commit_source(step);
        world
    }

    fn commit_source(&mut self, step: Step<SourceAction>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.source_journal.last(), record).expect("a legal record");
            self.source_journal.push(record.clone());
        }
        for action in step.after_record() {
            match action {
                SourceAction::Send(message) => self.to_destination.push(message),
                SourceAction::Rollback(permit) => {
                    assert_eq!(permit.vm().as_str(), "web1");
                    let committed = self
                        .source_journal
                        .iter()
                        .any(|record| matches!(record, Record::Source(SourceRecord::Committed { .. })));
                    let refused = self.destination_journal.iter().any(|record| {
                        matches!(record, Record::Destination(DestinationRecord::Refused { .. }))
                    });
                    assert!(!committed || refused, "a permit after Committed without a durable refusal");
                    self.runs_at_source = true;
                    self.rollback_pending = true;
                }
                SourceAction::Release => self.tidy_pending = true,
                SourceAction::Park => self.runs_at_source = false,
                SourceAction::Preflight | SourceAction::StartPreCopy(_) | SourceAction::Attract(_) => {}
            }
        }
        self.check();
    }

    fn commit_destination(&mut self, step: Step<DestinationAction>) {
        if let Some(record) = step.pending_record() {
            Record::check_order(self.destination_journal.last(), record).expect("a legal record");
            self.destination_journal.push(record.clone());
        }
        for action in step.after_record() {
            match action {
                DestinationAction::Send(message) => self.to_source.push(message),
                DestinationAction::Activate(_permit, _) => self.runs_at_destination = true,
                DestinationAction::Discard => self.discard_pending = true,
                DestinationAction::Prepare => {}
            }
        }
        self.check();
    }

    fn check(&self) {
        assert!(!(self.runs_at_source && self.runs_at_destination), "two running copies");
    }

    fn source(&mut self, event: SourceEvent) {
        let Some(source) = self.source.take() else { return };
        let (source, step) = source.handle(event, self.now);
        self.source = Some(source);
        self.commit_source(step);
    }

    fn destination(&mut self, event: DestinationEvent) {
        let Some(destination) = self.destination.take() else { return };
        let (destination, step) = destination.handle(event, self.now);
        self.destination = Some(destination);
        self.commit_destination(step);
    }

    fn deliver_to_destination(&mut self, message: MigrationMessage) {
        match (&self.destination, &message) {
            (Some(_), _) => self.destination(DestinationEvent::Peer(message)),
            (None, MigrationMessage::Propose(_)) => self.to_source.push(MigrationMessage::Accept),
            (None, MigrationMessage::Reserve { .. }) => {
                let limits = DestinationLimits::default();
                let (destination, step) =
                    Destination::begin(attempt("a"), proposal(), reservation(), limits, self.now);
                self.destination = Some(destination);
                self.commit_destination(step);
            }
            (None, _) => self.to_source.push(MigrationMessage::Unknown),
        }
    }

    fn local_source(&mut self, choice: u8) {
        let event = match choice % 7 {
            0 => SourceEvent::PreflightPassed(proposal()),
            1 | 2 => SourceEvent::Progress(support::converged()),
            3 if !self.runs_at_source => SourceEvent::GuestStopped,
            4 if !self.runs_at_source => SourceEvent::Parked(handover()),
            5 if self.rollback_pending => SourceEvent::RolledBack,
            5 if self.tidy_pending => SourceEvent::TidiedUp,
            6 => SourceEvent::Failed(Refusal::Hypervisor("killed".into())),
            _ => SourceEvent::Tick,
        };
        self.source(event);
    }

    fn local_destination(&mut self, choice: u8) {
        let everything_sent = !self.runs_at_source;
        let event = match choice % 6 {
            0 => DestinationEvent::Prepared,
            1 | 2 if everything_sent => DestinationEvent::Loaded,
            3 if self.runs_at_destination => DestinationEvent::Activated,
            4 if self.discard_pending => DestinationEvent::Discarded,
            5 => DestinationEvent::Failed(Refusal::Hypervisor("killed".into())),
            _ => DestinationEvent::Tick,
        };
        self.destination(event);
    }

    /// The gateway is killed and restarted; guests and the journal live on.
    fn crash_source(&mut self) {
        self.rollback_pending = false;
        let Some(Record::Source(last)) = self.source_journal.last().cloned() else {
            // Nothing was held anywhere: the attempt is forgotten and the guest never noticed.
            self.source = None;
            return;
        };
        let (source, step) =
            Source::recover(attempt("b"), last, SourceLimits::default(), &site("a"), self.now);
        self.source = Some(source);
        self.commit_source(step);
    }

    fn crash_destination(&mut self) {
        self.discard_pending = false;
        let Some(Record::Destination(last)) = self.destination_journal.last().cloned() else {
            self.destination = None;
            return;
        };
        let limits = DestinationLimits::default();
        let (destination, step) =
            Destination::recover(attempt("a"), reservation(), last, limits, &site("b"), self.now);
        self.destination = Some(destination);
        self.commit_destination(step);
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::DeliverToDestination(at) if !self.to_destination.is_empty() => {
                let message = self.to_destination[at % self.to_destination.len()].clone();
                self.deliver_to_destination(message);
            }
            Act::DeliverToSource(at) if !self.to_source.is_empty() => {
                let message = self.to_source[at % self.to_source.len()].clone();
                self.source(SourceEvent::Peer(message));
            }
            Act::LoseToDestination(at) if !self.to_destination.is_empty() => {
                let at = at % self.to_destination.len();
                self.to_destination.remove(at);
            }
            Act::LoseToSource(at) if !self.to_source.is_empty() => {
                let at = at % self.to_source.len();
                self.to_source.remove(at);
            }
            Act::LocalSource(choice) => self.local_source(choice),
            Act::LocalDestination(choice) => self.local_destination(choice),
            Act::CrashSource => self.crash_source(),
            Act::CrashDestination => self.crash_destination(),
            Act::Wait(ms) => {
                self.now += Duration::from_millis(u64::from(ms) * 40);
                self.source(SourceEvent::Tick);
                self.destination(DestinationEvent::Tick);
            }
            Act::LinkSource(up) => self.source(if up { SourceEvent::LinkUp } else { SourceEvent::LinkDown }),
            Act::LinkDestination(up) => {
                self.destination(if up { DestinationEvent::LinkUp } else { DestinationEvent::LinkDown });
            }
            Act::OperatorAborts => self.source(SourceEvent::AbortRequested),
            Act::DeliverToDestination(_)
            | Act::DeliverToSource(_)
            | Act::LoseToDestination(_)
            | Act::LoseToSource(_) => {}
        }
    }

    /// The link heals, gateways live, local work ends: exactly one copy must run in bounded time.
    fn heal(&mut self) {
        self.source(SourceEvent::LinkUp);
        self.destination(DestinationEvent::LinkUp);
        for _ in 0..200 {
            self.now += Duration::from_millis(500);
            for message in std::mem::take(&mut self.to_destination) {
                self.deliver_to_destination(message);
            }
            for message in std::mem::take(&mut self.to_source) {
                self.source(SourceEvent::Peer(message));
            }
            self.local_source(0);
            for choice in [1, 3, 4, 5] {
                self.local_source(choice);
            }
            for choice in 0..5 {
                self.local_destination(choice);
            }
            self.source(SourceEvent::Tick);
            self.destination(DestinationEvent::Tick);
            if self.source.as_ref().is_some_and(|source| source.outcome().is_some()) {
                break;
            }
        }
        if self.source.is_none() {
            assert!(self.runs_at_source && !self.runs_at_destination, "forgotten, but not where it was");
            return;
        }
        let outcome = self.source.as_ref().and_then(|source| source.outcome().cloned());
        assert!(outcome.is_some(), "undecided: {:?} {:?}", self.source, self.destination);
        assert!(self.runs_at_source != self.runs_at_destination, "not exactly one copy: {outcome:?}");
    }
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        8 => any::<usize>().prop_map(Act::DeliverToDestination),
        8 => any::<usize>().prop_map(Act::DeliverToSource),
        2 => any::<usize>().prop_map(Act::LoseToDestination),
        2 => any::<usize>().prop_map(Act::LoseToSource),
        8 => (0u8..6).prop_map(Act::LocalSource),
        8 => (0u8..5).prop_map(Act::LocalDestination),
        1 => Just(Act::LocalSource(6)),
        1 => Just(Act::LocalDestination(5)),
        1 => Just(Act::CrashSource),
        1 => Just(Act::CrashDestination),
        2 => any::<u16>().prop_map(Act::Wait),
        1 => any::<bool>().prop_map(Act::LinkSource),
        1 => any::<bool>().prop_map(Act::LinkDestination),
        1 => Just(Act::OperatorAborts),
    ];
    prop::collection::vec(act, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(20_000) })]

    #[test]
    fn never_two_copies_and_exactly_one_once_healed(acts in acts()) {
        let mut world = World::start();
        for act in acts {
            world.act(act);
        }
        world.heal();
    }
}

#[test]
fn an_undisturbed_migration_moves_the_machine() {
    let mut world = World::start();
    world.heal();
    assert!(world.runs_at_destination && !world.runs_at_source);
}

#[test]
fn a_destination_that_refused_unheard_is_asked_when_the_link_is_back() {
    let mut world = World::start();
    world.local_source(0);
    while let Some(message) = world.to_destination.pop() {
        world.deliver_to_destination(message);
        for message in std::mem::take(&mut world.to_source) {
            world.source(SourceEvent::Peer(message));
        }
        world.local_destination(0);
    }
    for message in std::mem::take(&mut world.to_source) {
        world.source(SourceEvent::Peer(message));
    }
    world.source(SourceEvent::LinkDown);
    world.crash_destination();
    world.to_source.clear();
    world.destination(DestinationEvent::Discarded);
    world.source(SourceEvent::LinkUp);
    for message in std::mem::take(&mut world.to_destination) {
        world.deliver_to_destination(message);
    }
    for message in std::mem::take(&mut world.to_source) {
        world.source(SourceEvent::Peer(message));
    }
    let source = world.source.expect("an attempt");
    assert!(source.aborting().is_some(), "{source:?}");
    assert!(world.runs_at_source && !world.runs_at_destination);
}

#[test]
fn a_reserved_record_keeps_that_the_name_stays_behind_and_older_ones_are_still_read() {
    let (source, _) = Source::begin(attempt("b"), SourceLimits::default(), true, Duration::ZERO);
    let (source, _) = source.handle(SourceEvent::PreflightPassed(proposal()), Duration::ZERO);
    let (_, step) = source.handle(SourceEvent::Peer(MigrationMessage::Accept), Duration::ZERO);
    let record = step.pending_record().expect("an accepted proposal is recorded").clone();
    let without = |record: &Record| {
        let Record::Source(SourceRecord::Reserved { without_names, .. }) = record else {
            panic!("{} instead of reserved", record.name());
        };
        *without_names
    };
    assert!(without(&record));
    let entry = Entry { vm: attempt("b").vm, epoch: Epoch(5), at_unix_ms: 0, record };
    let bytes = postcard::to_allocvec(&entry).expect("an entry can be written");
    let read: Entry = postcard::from_bytes(&bytes).expect("what was written");
    assert!(without(&read.record));
    // A version that did not keep it wrote the same without the last byte.
    let older: Entry = postcard::from_bytes(&bytes[..bytes.len() - 1]).expect("an older record");
    assert!(!without(&older.record));
}
