//! Two sites, a WAN, a name server and a clock of its own; one event at a time, and the way back to health.

use std::collections::BTreeMap;
use std::time::Duration;

use longhaul_core::ids::Epoch;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::migration::{CommitMode, destination, source};

use crate::invariants::Violation;
use crate::parts::{Disk, Guest, Id, NameServer, NameServerMood, Packet, Site, UnderWay, Work};
use crate::schedule::{Event, Kind};

/// Where the machine is at home.
pub const A: usize = 0;
/// Where it is moved to.
pub const B: usize = 1;

/// Virtual time within which everything has ended once all is well.
const WELL_WITHIN: Duration = Duration::from_secs(180);

/// A gateway that breaks one promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    SourceTimesOut,
    ActsBeforeSync,
    UnknownIsRefused,
    RefusesAfterActivated,
    RollsBackWithoutResuming,
    OldAbortResumes,
    SilentOnceDone,
    ForgetsCommitted,
    ForgetsNames,
    AsksOnce,
    WritesTwice,
    DeafToTheLink,
    TakesWhatIsGone,
    ClaimsWithoutAnAnswer,
    TakesBackWithoutAnAnswer,
    NeverPays,
    TwoPrimaries,
    AsksNobodyInACut,
    LoadsBeforeItFlushes,
}

pub struct World {
    pub now: Duration,
    pub sites: [Site; 2],
    pub packets: Vec<Packet>,
    /// The WAN towards each site.
    pub cut: [bool; 2],
    /// What each gateway has been told of the link.
    pub noticed_down: [bool; 2],
    pub name_server: NameServer,
    /// What a second primary says, to a gateway that asks the wrong one.
    pub second_primary: NameServer,
    pub under_way: Vec<UnderWay>,
    pub commit: CommitMode,
    pub next_id: Id,
    pub epochs: BTreeMap<Id, Epoch>,
    /// What each attempt has sent of the disk, all of it.
    pub all_sent: BTreeMap<Id, u64>,
    /// The newest write that the guest was told is durable.
    pub flushed: u64,
    pub broken: Option<Broken>,
    pub only: Option<&'static str>,
    wrong: Option<Violation>,
}

/// Packets under way, at most; the oldest are lost.
const UNDER_WAY: usize = 40;

impl World {
    pub fn new(commit: CommitMode, broken: Option<Broken>, only: Option<&'static str>) -> Self {
        let mut a = Site::new(Guest::Running);
        a.journal.owner = Some(Ownership::Here { epoch: Epoch(4) });
        let name_server = NameServer { mood: NameServerMood::Answers, site: A, epoch: Epoch(4) };
        let mut world = Self {
            now: Duration::from_secs(1),
            sites: [a, Site::new(Guest::Gone)],
            packets: Vec::new(),
            cut: [false; 2],
            noticed_down: [false; 2],
            name_server,
            second_primary: name_server,
            under_way: Vec::new(),
            commit,
            next_id: 1,
            epochs: BTreeMap::new(),
            all_sent: BTreeMap::new(),
            flushed: 0,
            broken,
            only,
            wrong: None,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        if let Some(Ownership::Here { epoch }) = self.sites[A].journal.owner {
            self.epochs.insert(self.next_id, epoch.next());
        }
        self.migrate();
    }

    /// Says something to the other site; a WAN that is cut swallows it.
    pub fn send(&mut self, from: usize, id: Id, message: MigrationMessage) {
        let lies = self.broken == Some(Broken::RefusesAfterActivated)
            && matches!(message, MigrationMessage::Activated { .. });
        let message = if lies {
            MigrationMessage::Refused { epoch: self.epochs[&id], why: Refusal::Operator }
        } else {
            message
        };
        let packet = Packet { to: 1 - from, id, message };
        if let Err(violation) = self.said(from, &packet) {
            self.wrong.get_or_insert(violation);
        }
        if !self.cut[1 - from] {
            if self.packets.len() >= UNDER_WAY {
                self.packets.remove(0);
            }
            self.packets.push(packet);
        }
    }

    /// Plays a schedule, heals the world, and says what was violated at which event.
    pub fn play(&mut self, events: &[Event]) -> Result<(), (usize, Violation)> {
        for (at, event) in events.iter().enumerate() {
            self.apply(*event).and_then(|()| self.checked()).map_err(|violation| (at, violation))?;
        }
        self.partition().and_then(|()| self.heal()).map_err(|violation| (events.len(), violation))
    }

    fn checked(&mut self) -> Result<(), Violation> {
        self.wrong.take().map_or_else(|| self.check(), Err)
    }

    fn apply(&mut self, event: Event) -> Result<(), Violation> {
        let number = usize::from(event.number);
        match event.kind {
            Kind::Deliver => self.deliver(number, false),
            Kind::Double => self.deliver(number, true),
            Kind::Lose if !self.packets.is_empty() => {
                self.packets.remove(number % self.packets.len());
            }
            Kind::Work => return self.work(number),
            Kind::WorkFails => self.work_fails(number),
            Kind::Sync => return self.sync_any(number),
            Kind::Wait => self.wait(Duration::from_millis(number as u64 * 20 + 1)),
            Kind::CutToB => self.cut[B] = true,
            Kind::CutToA => self.cut[A] = true,
            Kind::Mend => self.cut = [false; 2],
            Kind::NoticeLink => self.notice(number % 2),
            Kind::CrashA => return self.crash(A, number),
            Kind::CrashB => return self.crash(B, number),
            Kind::Restart => self.restart(number % 2),
            Kind::PowerLossA => return self.power_loss(A, number),
            Kind::PowerLossB => return self.power_loss(B, number),
            Kind::KillGuestA => self.kill_guest(A),
            Kind::KillGuestB => self.kill_guest(B),
            Kind::Boot => return self.boot(number % 2),
            Kind::Migrate => self.begin(),
            Kind::Abort => self.abort(),
            Kind::NameServer => {
                self.name_server.mood = mood(number);
                if !self.under_way.is_empty() {
                    let late = self.under_way.remove(number % self.under_way.len());
                    self.name_server.apply(late);
                }
            }
            Kind::Lose => {}
        }
        Ok(())
    }

    fn deliver(&mut self, number: usize, again: bool) {
        if self.packets.is_empty() {
            return;
        }
        let at = number % self.packets.len();
        let packet = if again { self.packets[at].clone() } else { self.packets.remove(at) };
        if self.sites[packet.to].up {
            self.hear(packet);
        }
    }

    /// Whoever has something to do and is not waiting for the disk.
    fn busy(&self) -> Vec<(usize, Id)> {
        let sources = self.sites[A].sources.iter();
        let sources = sources.filter(|(_, driver)| driver.unsynced.is_none() && !driver.work.is_empty());
        let destinations = self.sites[B].destinations.iter();
        let destinations =
            destinations.filter(|(_, driver)| driver.unsynced.is_none() && !driver.work.is_empty());
        sources.map(|(id, _)| (A, *id)).chain(destinations.map(|(id, _)| (B, *id))).collect()
    }

    fn unsynced(&self) -> Vec<(usize, Id)> {
        let sources = self.sites[A].sources.iter().filter(|(_, driver)| driver.unsynced.is_some());
        let destinations = self.sites[B].destinations.iter().filter(|(_, driver)| driver.unsynced.is_some());
        sources.map(|(id, _)| (A, *id)).chain(destinations.map(|(id, _)| (B, *id))).collect()
    }

    fn work(&mut self, number: usize) -> Result<(), Violation> {
        let busy = self.busy();
        // One more than there are drivers: the anchor works too.
        let at = number % (busy.len() + 1);
        match busy.get(at) {
            Some((A, id)) => self.source_works(*id),
            Some((_, id)) => self.destination_works(*id),
            None => {
                self.moves_name();
                Ok(())
            }
        }
    }

    fn work_fails(&mut self, number: usize) {
        let busy = self.busy();
        let Some((site, id)) = busy.get(number % busy.len().max(1)).copied() else { return };
        let why = Refusal::Hypervisor("failed".into());
        if site == A {
            let driver = self.sites[A].sources.get_mut(&id).expect("it is busy");
            if driver.work.front().is_some_and(Work::may_fail) {
                driver.work.pop_front();
                self.source(id, source::Event::Failed(why));
            }
            return;
        }
        let driver = self.sites[B].destinations.get_mut(&id).expect("it is busy");
        if driver.work.front().is_some_and(Work::may_fail) {
            driver.work.pop_front();
            self.destination(id, destination::Event::Failed(why));
        }
    }

    fn sync_any(&mut self, number: usize) -> Result<(), Violation> {
        let unsynced = self.unsynced();
        let Some((site, id)) = unsynced.get(number % unsynced.len().max(1)).copied() else { return Ok(()) };
        self.sync(site, id)
    }

    fn ids(&self) -> (Vec<Id>, Vec<Id>) {
        let sources = self.sites[A].sources.keys().copied().collect();
        (sources, self.sites[B].destinations.keys().copied().collect())
    }

    /// Time passes; whoever has a deadline by then is told.
    fn wait(&mut self, time: Duration) {
        self.now += time;
        for site in self.sites.iter_mut().filter(|site| site.guest == Guest::Running) {
            self.flushed += 1;
            site.disk = Disk { written: self.flushed, stable: self.flushed };
        }
        let (sources, destinations) = self.ids();
        for id in sources {
            self.source(id, source::Event::Tick);
        }
        for id in destinations {
            self.destination(id, destination::Event::Tick);
        }
        if self.broken == Some(Broken::SourceTimesOut) && time > Duration::from_secs(1) {
            // As libvirt does it: what has not answered has failed.
            self.sites[A].guest = Guest::Running;
        }
    }

    /// A gateway sees what has become of the link.
    fn notice(&mut self, site: usize) {
        let down = self.cut[A] || self.cut[B] || !self.sites[1 - site].up;
        if !self.sites[site].up || down == self.noticed_down[site] {
            return;
        }
        self.noticed_down[site] = down;
        let (sources, destinations) = self.ids();
        if site == A && self.broken == Some(Broken::DeafToTheLink) && !down {
            return;
        }
        if site == A {
            for id in sources {
                self.source(id, if down { source::Event::LinkDown } else { source::Event::LinkUp });
            }
            return;
        }
        for id in destinations {
            let event = if down { destination::Event::LinkDown } else { destination::Event::LinkUp };
            self.destination(id, event);
        }
    }

    /// A gateway dies; of what it had not synced, each record is there or not.
    fn crash(&mut self, site: usize, number: usize) -> Result<(), Violation> {
        if !self.sites[site].up {
            return Ok(());
        }
        let unsynced = self.unsynced().into_iter().filter(|(at, _)| *at == site);
        for (at, (_, id)) in unsynced.enumerate() {
            if number >> at & 1 == 1 {
                let site_state = &self.sites[site];
                let record = if site == A {
                    site_state.sources[&id].unsynced.as_ref().and_then(|step| step.pending_record().cloned())
                } else {
                    site_state.destinations[&id]
                        .unsynced
                        .as_ref()
                        .and_then(|step| step.pending_record().cloned())
                };
                self.write(site, id, record)?;
            }
        }
        self.sites[site].forget();
        if site == B && self.broken == Some(Broken::UnknownIsRefused) {
            // Its disk was restored from a backup besides.
            self.sites[B].journal = crate::parts::Journal::default();
        }
        Ok(())
    }

    fn power_loss(&mut self, site: usize, number: usize) -> Result<(), Violation> {
        self.crash(site, number)?;
        self.kill_guest(site);
        self.sites[site].disk.written = self.sites[site].disk.stable;
        Ok(())
    }

    fn kill_guest(&mut self, site: usize) {
        if matches!(self.sites[site].guest, Guest::Still | Guest::Running) {
            self.sites[site].guest = Guest::Dead;
        }
    }

    /// Somebody starts the machine from its disk: through the start gate.
    fn boot(&mut self, site: usize) -> Result<(), Violation> {
        let (state, vm) = (&self.sites[site], "web1".parse().expect("a literal name"));
        let Some(owner) = &state.journal.owner else { return Ok(()) };
        if !state.up || state.guest != Guest::Dead {
            return Ok(());
        }
        match owner.permit(&vm, state.journal.unfinished(), &[]) {
            Ok(permit) => self.resumes(site, permit.epoch()),
            Err(_) => Ok(()),
        }
    }

    fn abort(&mut self) {
        for id in self.ids().0 {
            self.source(id, source::Event::AbortRequested);
        }
    }

    /// The WAN is cut for good, but both reach an arbiter: somebody must run all the same.
    fn partition(&mut self) -> Result<(), Violation> {
        if self.commit == CommitMode::Confirmed {
            return Ok(());
        }
        self.cut = [true; 2];
        self.packets.clear();
        self.gateways_and_names_are_well();
        let until = self.now + WELL_WITHIN;
        while self.now < until && self.check_partitioned().is_err() {
            self.goes_on()?;
        }
        self.check_partitioned()
    }

    /// Links, gateways and the name server are well from now on; everything must end in time.
    fn heal(&mut self) -> Result<(), Violation> {
        self.cut = [false; 2];
        self.gateways_and_names_are_well();
        let until = self.now + WELL_WITHIN;
        while self.now < until && self.check_settled().is_err() {
            self.goes_on()?;
        }
        self.check_settled()
    }

    fn gateways_and_names_are_well(&mut self) {
        self.name_server.mood = NameServerMood::Answers;
        self.restart(A);
        self.restart(B);
    }

    fn goes_on(&mut self) -> Result<(), Violation> {
        self.notice(A);
        self.notice(B);
        for packet in std::mem::take(&mut self.packets) {
            self.hear(packet);
            self.settle_disks()?;
        }
        for _ in 0..4 {
            for (site, id) in self.busy() {
                if site == A {
                    self.source_works(id)?
                } else {
                    self.destination_works(id)?
                }
                self.settle_disks()?;
            }
        }
        self.moves_name();
        self.wait(Duration::from_millis(500));
        self.settle_disks()?;
        self.boot(A)?;
        self.boot(B)?;
        self.checked()
    }

    fn settle_disks(&mut self) -> Result<(), Violation> {
        for (site, id) in self.unsynced() {
            self.sync(site, id)?;
            self.checked()?;
        }
        Ok(())
    }
}

fn mood(number: usize) -> NameServerMood {
    match number % 4 {
        0 => NameServerMood::Answers,
        1 => NameServerMood::Stalls,
        2 => NameServerMood::Refuses,
        _ => NameServerMood::AppliesAndLosesTheAnswer,
    }
}
