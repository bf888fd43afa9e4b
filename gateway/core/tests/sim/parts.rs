//! What a site is made of in the simulation: journal, guest, drivers, and the words between them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::LazyLock;

use longhaul_core::ids::{Epoch, MigrationId, SiteName, VmName};
use longhaul_core::migration::arbiter::Request;
use longhaul_core::migration::destination::{self, Destination};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Handover, MigrationMessage, Proposal, Reservation};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::migration::record::{Record, SourceRecord};
use longhaul_core::migration::source::{self, Source};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode};
use longhaul_core::wire::AnchorMessage;

use crate::scene::{A, SITES};
use crate::support;

/// Which attempt.
pub type Id = u64;

/// What an attempt is, as both its sites know it.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    pub source: usize,
    pub destination: usize,
    /// The epoch that it would begin.
    pub epoch: Epoch,
    pub commit: CommitMode,
}

impl Move {
    pub fn peer_of(&self, site: usize) -> usize {
        if site == self.source { self.destination } else { self.source }
    }

    /// The attempt as `site` keeps it.
    pub fn at(&self, site: usize, id: Id) -> Attempt {
        let peer = name(self.peer_of(site)).clone();
        Attempt { id: MigrationId(id.into()), vm: VM.clone(), peer, epoch: self.epoch, commit: self.commit }
    }
}

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

    fn is_busy(&self) -> bool {
        self.unsynced.is_none() && !self.work.is_empty()
    }
}

/// What is on a site's disk.
#[derive(Debug, Default)]
pub struct Journal {
    pub records: BTreeMap<Id, Vec<Record>>,
    pub owner: Option<Ownership>,
    pub anchor: Option<Anchor>,
    /// The highest epoch ever seen in the arbiter's register.
    pub seen: Epoch,
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

/// What stays at a site that the machine left. The name is the home's to move.
#[derive(Clone, Debug)]
pub struct Anchor {
    /// The epoch that began at its new place.
    pub epoch: Epoch,
    /// Its new place.
    pub peer: usize,
    /// It is known to run there: nothing is said or changed before.
    pub runs_there: bool,
    pub names: Names,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Not this site's.
    None,
    Owed,
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
    /// The anchor was told that the machine runs over there, and did not write it down yet.
    pub runs_there: bool,
    /// Sites that have heard from the anchor where the machine is.
    pub noted: BTreeSet<usize>,
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
            noted: BTreeSet::new(),
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
        self.noted.clear();
    }

    /// Every migration is over here, or its machine is free again.
    pub fn is_idle(&self) -> bool {
        self.destinations.is_empty() && self.sources.values().all(|driver| driver.machine.is_settled_here())
    }

    /// The records of those who wait for the disk.
    pub fn unsynced(&self) -> impl Iterator<Item = (Id, Option<&Record>)> {
        let sources = self.sources.iter();
        let sources =
            sources.filter_map(|(id, driver)| Some((*id, driver.unsynced.as_ref()?.pending_record())));
        let destinations = self.destinations.iter();
        let destinations =
            destinations.filter_map(|(id, driver)| Some((*id, driver.unsynced.as_ref()?.pending_record())));
        sources.chain(destinations)
    }

    /// Who has something to do and is not waiting for the disk.
    pub fn busy(&self) -> impl Iterator<Item = Id> {
        let sources = self.sources.iter();
        let sources = sources.filter(|(_, driver)| driver.is_busy()).map(|(id, _)| *id);
        let destinations = self.destinations.iter();
        let destinations = destinations.filter(|(_, driver)| driver.is_busy()).map(|(id, _)| *id);
        sources.chain(destinations)
    }
}

/// Words under way.
#[derive(Clone, Debug)]
pub struct Packet {
    pub from: usize,
    pub to: usize,
    pub word: Word,
}

#[derive(Clone, Debug)]
pub enum Word {
    Migration(Id, MigrationMessage),
    Anchor(AnchorMessage),
}

static NAMES: LazyLock<[SiteName; SITES]> =
    LazyLock::new(|| ["a", "b", "c"].map(|name| name.parse().expect("a literal name")));

pub static VM: LazyLock<VmName> = LazyLock::new(|| "web1".parse().expect("a literal name"));

pub fn name(site: usize) -> &'static SiteName {
    &NAMES[site]
}

/// The site of a name.
pub fn site_of(name: &SiteName) -> usize {
    NAMES.iter().position(|known| known == name).expect("a site of the simulation")
}

pub fn proposal(epoch: Epoch, commit: CommitMode) -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: name(A).clone(),
        hypervisor: "7.2".into(),
        epoch,
        running: true,
        commit,
        nics: Vec::new(),
        carried: Vec::new(),
    })
}

pub fn reservation() -> Reservation {
    Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None }
}

pub fn handover() -> Box<Handover> {
    Box::new(Handover { nics: Vec::new() })
}
