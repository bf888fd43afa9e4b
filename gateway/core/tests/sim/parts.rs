//! What a site is made of in the simulation: journal, guest, drivers, the name server between them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::migration::arbiter::{Contest, Request, Verdict};
use longhaul_core::migration::destination::{self, Destination};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Handover, MigrationMessage, Proposal, Reservation};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::migration::record::{Record, SourceRecord};
use longhaul_core::migration::source::{self, Source};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};

use crate::support;

/// Which attempt.
pub type Id = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    Gone,
    Still,
    Running,
    Dead,
}

/// Something a gateway is busy with; lost when it dies.
#[derive(Debug)]
pub enum Work {
    Preflight,
    Copy,
    StopGuest,
    SendRest,
    Rollback(RunPermit),
    Release,
    Prepare,
    Load,
    Activate(RunPermit),
    Discard,
    /// Look whether what was loaded is still there.
    Check,
    /// Ask the arbiter.
    Ask(Request),
}

impl Work {
    /// It can fail and be given up; the others are tried until they are done.
    pub fn may_fail(&self) -> bool {
        match self {
            Self::Preflight | Self::Copy | Self::StopGuest | Self::SendRest | Self::Prepare | Self::Load => {
                true
            }
            Self::Rollback(_)
            | Self::Release
            | Self::Activate(_)
            | Self::Discard
            | Self::Check
            | Self::Ask(_) => false,
        }
    }
}

/// A machine, the step whose record is not on disk yet, and the work that was asked for.
#[derive(Debug)]
pub struct Driver<M, A, E> {
    pub machine: M,
    pub unsynced: Option<Step<A>>,
    /// What happened while it waited for the disk.
    pub inbox: VecDeque<E>,
    pub work: VecDeque<Work>,
}

pub type SourceDriver = Driver<Source, source::Action, source::Event>;
pub type DestinationDriver = Driver<Destination, destination::Action, destination::Event>;

impl<M, A, E> Driver<M, A, E> {
    pub fn new(machine: M) -> Self {
        Self { machine, unsynced: None, inbox: VecDeque::new(), work: VecDeque::new() }
    }
}

/// What is on a site's disk.
#[derive(Debug, Default)]
pub struct Journal {
    pub records: BTreeMap<Id, Vec<Record>>,
    pub owner: Option<Ownership>,
    pub anchor: Option<Anchor>,
}

impl Journal {
    pub fn last(&self, id: Id) -> Option<&Record> {
        self.records.get(&id).and_then(|records| records.last())
    }

    pub fn is_here(&self) -> bool {
        matches!(self.owner, Some(Ownership::Here { .. }))
    }

    /// The record of an attempt that is not over, for the start gate.
    pub fn unfinished(&self) -> Option<&SourceRecord> {
        self.records.values().find_map(|records| match records.last() {
            Some(Record::Source(
                last @ (SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked),
            )) => Some(last),
            Some(_) | None => None,
        })
    }
}

/// A name that is to follow.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    pub id: Id,
    pub epoch: Epoch,
    pub names: Names,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    Waiting,
    Pending,
    Moved,
}

/// A gateway and its host.
#[derive(Debug)]
pub struct Site {
    pub up: bool,
    pub journal: Journal,
    pub guest: Guest,
    /// Attempts for which something is held on the host; outlives the gateway.
    pub held: BTreeSet<Id>,
    pub sources: BTreeMap<Id, SourceDriver>,
    pub destinations: BTreeMap<Id, DestinationDriver>,
    pub accepted: BTreeSet<Id>,
    /// The anchor was told that the machine runs over there.
    pub runs_there: bool,
    /// The gateway was started when the guest was dead already.
    pub found_dead: bool,
    /// The machine's disk here.
    pub disk: Disk,
}

/// A disk, as far as it is known by the number of its newest write.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk {
    /// What is read from it.
    pub written: u64,
    /// What is still there after a power loss.
    pub stable: u64,
}

impl Site {
    pub fn new(guest: Guest) -> Self {
        Self {
            up: true,
            journal: Journal::default(),
            guest,
            held: BTreeSet::new(),
            sources: BTreeMap::new(),
            destinations: BTreeMap::new(),
            accepted: BTreeSet::new(),
            runs_there: false,
            found_dead: false,
            disk: Disk::default(),
        }
    }

    pub fn forget(&mut self) {
        self.up = false;
        self.sources.clear();
        self.destinations.clear();
        self.accepted.clear();
        self.runs_there = false;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameServerMood {
    Answers,
    Stalls,
    Refuses,
    AppliesAndLosesTheAnswer,
}

/// One name, changed by compare-and-swap.
#[derive(Clone, Copy, Debug)]
pub struct NameServer {
    pub mood: NameServerMood,
    pub site: usize,
    pub epoch: Epoch,
}

/// A compare-and-swap that has not been answered: it may still be applied, as long as the register says what it
/// said when it was sent.
#[derive(Clone, Copy, Debug)]
pub struct UnderWay {
    before: (usize, Epoch),
    after: (usize, Epoch),
}

impl NameServer {
    /// What the register says of the attempt that would begin `epoch`.
    fn says(&self, epoch: Epoch) -> Verdict {
        let owner = name(self.site);
        contest(epoch).said(Some((self.epoch, owner.as_str())), Epoch(0)).verdict
    }

    /// Arbitrates, as the mood allows.
    pub fn ask(&mut self, request: Request, epoch: Epoch) -> (Verdict, Option<UnderWay>) {
        let contest = contest(epoch);
        let winner = contest.winner(request, self.says(epoch)).map(|winner| usize::from(*winner == name(1)));
        let change =
            winner.map(|winner| UnderWay { before: (self.site, self.epoch), after: (winner, epoch) });
        match self.mood {
            NameServerMood::Stalls => (Verdict::Unknown, change),
            NameServerMood::Refuses => (Verdict::Unknown, None),
            NameServerMood::Answers => {
                change.into_iter().for_each(|change| self.apply(change));
                (self.says(epoch), None)
            }
            NameServerMood::AppliesAndLosesTheAnswer => {
                change.into_iter().for_each(|change| self.apply(change));
                (Verdict::Unknown, None)
            }
        }
    }

    /// Epoch and owner stand for the transaction's number: none of them comes back.
    pub fn apply(&mut self, change: UnderWay) {
        if (self.site, self.epoch) == change.before {
            (self.site, self.epoch) = change.after;
        }
    }

    /// Moves the name; whether the asker knows that it moved.
    pub fn swap(&mut self, site: usize, epoch: Epoch) -> bool {
        let done = self.site == site && self.epoch == epoch;
        let applies = done || self.epoch < epoch;
        match self.mood {
            NameServerMood::Stalls | NameServerMood::Refuses => false,
            NameServerMood::Answers => {
                if applies {
                    (self.site, self.epoch) = (site, epoch);
                }
                applies
            }
            NameServerMood::AppliesAndLosesTheAnswer => {
                if applies {
                    (self.site, self.epoch) = (site, epoch);
                }
                false
            }
        }
    }
}

/// A message under way.
#[derive(Clone, Debug)]
pub struct Packet {
    pub to: usize,
    pub id: Id,
    pub message: MigrationMessage,
}

fn contest(epoch: Epoch) -> Contest {
    Contest { epoch, source: name(0), destination: name(1) }
}

pub fn name(site: usize) -> SiteName {
    ["a", "b"][site].parse().expect("a literal name")
}

pub fn attempt(id: Id, epoch: Epoch, peer: usize, commit: CommitMode) -> Attempt {
    let vm = "web1".parse().expect("a literal name");
    Attempt { id: MigrationId(id.into()), vm, peer: name(peer), epoch, commit }
}

pub fn proposal(epoch: Epoch) -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: name(0),
        hypervisor: "7.2".into(),
        epoch,
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
        carried: Vec::new(),
    })
}

pub fn reservation() -> Reservation {
    Reservation { care_of: Vec::new() }
}

pub fn handover() -> Box<Handover> {
    Box::new(Handover { nics: Vec::new() })
}
