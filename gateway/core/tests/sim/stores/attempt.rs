//! One attempt to move the machine: its disk and its memory on their way, in an order that the dice say, and what may strike
//! it. What the sites do before and afterwards is `world`'s.

use std::time::Duration;

use super::disk::DiskWay;
use super::guest::{Change, Guest};
use super::memory::MemoryWay;
use super::site::{Digest, Loss};
use crate::schedule::Random;

/// What the destination says before anything is sent.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The memory that it keeps.
    pub named: Option<Digest>,
    /// The pages that it allows to be remembered.
    pub allowed_pages: u32,
    /// The pages that both do.
    pub agreed_pages: u32,
}

/// What strikes an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All that is under way is lost, and the attempt is over.
    Cut,
    RestartSource,
    RestartDestination,
    /// Memory that errs, for what crosses a link is proven by the link.
    MemoryFlips,
    DiskFlips,
    MapFails,
    /// Under the destination's eyes.
    BaseRots,
    AtSource(Loss),
    AtDestination(Loss),
}

impl Fault {
    fn any(random: &mut Random) -> Self {
        match random.below(10) {
            0 | 1 => Self::Cut,
            2 => Self::RestartSource,
            3 => Self::RestartDestination,
            4 => Self::MemoryFlips,
            5 => Self::DiskFlips,
            6 => Self::MapFails,
            7 => Self::BaseRots,
            8 => Self::AtSource(Loss::any(random)),
            _ => Self::AtDestination(Loss::any(random)),
        }
    }
}

/// How an attempt is to go.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// At which step.
    pub faults: Vec<(u64, Fault)>,
    /// Between that the destination names what it keeps and that it reads it.
    pub before_it_reads: Option<Loss>,
    /// Given up by the source although all was proven.
    pub rolls_back: bool,
    /// What the destination refuses is not heard.
    pub is_unheard: bool,
    /// The machine does no more than so much.
    pub changes: u64,
    pub memory_begins_at: u64,
    pub guest_stops_at: u64,
}

impl Plan {
    /// In which nothing happens but the machine's changes.
    pub fn calm(changes: u64, random: &mut Random) -> Self {
        let memory_begins_at = 15 + random.below(50);
        let guest_stops_at = memory_begins_at + 20 + random.below(80);
        Self { changes, memory_begins_at, guest_stops_at, ..Self::default() }
    }

    /// One that something strikes, unless it is to be calm.
    pub fn any(is_calm: bool, random: &mut Random) -> Self {
        let changes = if random.one_in(2) { 2 } else { 20 };
        let mut plan = Self::calm(changes, random);
        if is_calm {
            return plan;
        }
        for _ in 0..1 + random.below(2) {
            let fault = Fault::any(random);
            plan.faults.push((random.below(plan.guest_stops_at + 30), fault));
        }
        if random.one_in(4) {
            plan.before_it_reads = Some(Loss::any_of_memory(random));
        }
        (plan.rolls_back, plan.is_unheard) = (random.one_in(3), random.one_in(4));
        plan
    }
}

pub struct Attempt {
    pub number: u64,
    pub from: usize,
    pub to: usize,
    pub terms: Terms,
    pub disk: DiskWay,
    pub memory: MemoryWay,
    /// What the destination gave its decoder.
    pub holds: Option<Digest>,
    /// Both sites kept the same, and nothing has become of it.
    pub must_be_based: bool,
    /// Something came otherwise than it was sent, or a copy changed while it was read.
    pub is_hurt: bool,
    pub plan: Plan,
}

impl Attempt {
    /// Something happens, by the dice while the machine runs and in turn when it does not.
    pub fn step(&mut self, step: u64, guest: &mut Guest, random: &mut Random) {
        let now = Duration::from_millis(step);
        if step < self.plan.guest_stops_at {
            return self.something(now, guest, random);
        }
        if step == self.plan.guest_stops_at {
            self.memory.qemu_ends(guest);
            self.disk.mirror.handle_finish();
        }
        self.disk.tells();
        self.disk.map_arrives();
        self.disk.reads(guest);
        self.disk.read_ends(random);
        self.disk_sends();
        self.disk.arrives(now);
        for _ in 0..3 {
            self.disk.is_written(random);
        }
        self.memory.arrives(&self.disk);
    }

    fn something(&mut self, now: Duration, guest: &mut Guest, random: &mut Random) {
        match random.below(16) {
            0 => self.guest_changes(guest, random),
            1 => self.disk.tells(),
            2 => self.disk.map_arrives(),
            3 => self.disk.reads(guest),
            4 => self.disk.read_ends(random),
            5 | 6 => self.disk_sends(),
            7 | 8 => self.disk.arrives(now),
            9..12 => self.disk.is_written(random),
            12 => self.memory.qemu_writes(guest, 1 + random.below(12) as usize),
            13 => self.memory.is_read(random.below(40_000) as usize, random.one_in(3)),
            _ => self.memory.arrives(&self.disk),
        }
    }

    fn guest_changes(&mut self, guest: &mut Guest, random: &mut Random) {
        let Some(left) = self.plan.changes.checked_sub(1) else { return };
        // Of a machine that does next to nothing, a few bytes change.
        let change = if left < 2 { guest.changes_little(random) } else { guest.changes(random) };
        self.plan.changes = left;
        match change {
            Change::Page(page) => self.memory.dirties(page),
            Change::Written { .. } | Change::Zeroed { .. } | Change::Trimmed { .. } => {
                self.disk.changes(change, guest);
            }
        }
    }

    fn disk_sends(&mut self) {
        self.memory.is_asked(&mut self.disk);
        self.disk.sends();
    }

    pub fn is_refused(&self) -> bool {
        self.memory.refused.is_some() || self.disk.refused.is_some()
    }

    pub fn is_proven(&self) -> bool {
        self.memory.is_proven && self.disk.is_proven()
    }
}
