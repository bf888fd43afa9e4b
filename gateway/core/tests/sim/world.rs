//! The sites, the WAN between them, a name server, an arbiter and a clock of its own; one event at a time, and the way
//! back to health.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use longhaul_core::ids::Epoch;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::migration::record::Record;
use longhaul_core::migration::{CommitMode, destination, source};

use crate::broken::Broken;
use crate::invariants::Violation;
use crate::parts::{Disk, Guest, Id, Journal, Move, Packet, Site, VM, Word, Work};
use crate::register::{Mood, Register, UnderWay};
use crate::scene::{A, B, SITES, Scene};
use crate::schedule::{Event, Kind};

/// Virtual time within which everything has ended once all is well.
const WELL_WITHIN: Duration = Duration::from_secs(180);

pub struct World {
    pub scene: &'static Scene,
    pub now: Duration,
    pub sites: Vec<Site>,
    pub packets: Vec<Packet>,
    /// The WAN from each site to each other.
    pub cut: [[bool; SITES]; SITES],
    /// What each gateway has been told of its link to each other.
    pub noticed_down: [[bool; SITES]; SITES],
    pub name_server: Register,
    pub etcd: Register,
    /// What a second primary says, to a gateway that asks the wrong one.
    pub second_primary: Register,
    pub under_way: Vec<(Arbiter, UnderWay)>,
    pub next_id: Id,
    pub moves: BTreeMap<Id, Move>,
    /// What each attempt has sent of the disk, all of it.
    pub all_sent: BTreeMap<Id, u64>,
    /// The newest write that the guest was told is durable.
    pub flushed: u64,
    /// What a site had durably refused that was destroyed since.
    pub refused_before: BTreeSet<Id>,
    pub broken: Option<Broken>,
    pub only: Option<&'static str>,
    /// Details of what is violated are not wanted: it may hold in a while.
    pub terse: bool,
    wrong: Option<Violation>,
}

/// Packets under way, at most; the oldest are lost.
const UNDER_WAY: usize = 40;

impl World {
    pub fn new(scene: &'static Scene, broken: Option<Broken>, only: Option<&'static str>) -> Self {
        let mut sites: Vec<Site> = (0..scene.sites).map(|_| Site::new(Guest::Gone)).collect();
        sites[A].guest = Guest::Running;
        sites[A].journal.owner = Some(Ownership::Here { epoch: Epoch(4) });
        let mut world = Self {
            scene,
            now: Duration::from_secs(1),
            sites,
            packets: Vec::new(),
            cut: Default::default(),
            noticed_down: Default::default(),
            name_server: Register::new(A, Epoch(4)),
            etcd: Register::new(A, Epoch(4)),
            second_primary: Register::new(A, Epoch(4)),
            under_way: Vec::new(),
            next_id: 1,
            moves: BTreeMap::new(),
            all_sent: BTreeMap::new(),
            flushed: 0,
            refused_before: BTreeSet::new(),
            broken,
            only,
            terse: false,
            wrong: None,
        };
        world.migrate(0);
        world
    }

    /// Says something to the other site of an attempt.
    pub fn send(&mut self, from: usize, id: Id, message: MigrationMessage) {
        let attempt = self.moves[&id];
        let lies = self.broken == Some(Broken::RefusesAfterActivated)
            && matches!(message, MigrationMessage::Activated { .. });
        let message = if lies {
            MigrationMessage::Refused { epoch: attempt.epoch, why: Refusal::Operator }
        } else {
            message
        };
        if let Err(violation) = self.said(from, id, &message) {
            self.wrong.get_or_insert(violation);
        }
        self.transmit(Packet { from, to: attempt.peer_of(from), word: Word::Migration(id, message) });
    }

    /// A WAN that is cut swallows it.
    pub fn transmit(&mut self, packet: Packet) {
        if self.cut[packet.from][packet.to] {
            return;
        }
        if self.packets.len() >= UNDER_WAY {
            self.packets.remove(0);
        }
        self.packets.push(packet);
    }

    /// The register that decides about a hand-over.
    pub fn arbiter(&self, commit: CommitMode) -> Option<&Register> {
        match commit.arbiter()? {
            Arbiter::Dns => Some(&self.name_server),
            Arbiter::Etcd => Some(&self.etcd),
        }
    }

    pub fn register(&mut self, of: Arbiter) -> &mut Register {
        match of {
            Arbiter::Dns => &mut self.name_server,
            Arbiter::Etcd => &mut self.etcd,
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
            Kind::Cut(from, to) => self.cut[from][to] = true,
            Kind::Mend => self.cut = Default::default(),
            Kind::NoticeLink => self.notice(number),
            Kind::Crash(site) => return self.crash(site, number),
            Kind::Restart => self.restart(number % self.scene.sites),
            Kind::PowerLoss(site) => return self.power_loss(site, number),
            Kind::KillGuest(site) => self.kill_guest(site),
            Kind::Boot => return self.boot(number % self.scene.sites),
            Kind::Migrate => self.migrate(number),
            Kind::Abort => self.abort(),
            Kind::NameServer => {
                (self.name_server.mood, self.etcd.mood) = (Mood::of(number), Mood::of(number / 4));
                // Two sites' seeds are older than that it may stay under way.
                let arrives = self.scene.sites == 2 || number & 16 == 0;
                if arrives && !self.under_way.is_empty() {
                    let (of, late) = self.under_way.remove(number % self.under_way.len());
                    self.register(of).apply(late);
                }
            }
            Kind::PutBack => self.put_back(number),
            Kind::Resolve => return self.resolve(number),
            Kind::Calm => return (0..number % 4).try_for_each(|_| self.goes_on()),
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
        self.hear(packet);
    }

    /// A gateway that is down hears nothing.
    fn hear(&mut self, packet: Packet) {
        if !self.sites[packet.to].up {
            return;
        }
        match packet.word {
            Word::Migration(id, message) => self.hear_of_migration(packet.to, id, message),
            Word::Anchor(message) => self.hear_of_anchor(packet.from, packet.to, &message),
        }
    }

    fn busy(&self) -> Vec<(usize, Id)> {
        let sites = self.sites.iter().enumerate();
        sites.flat_map(|(at, site)| site.busy().map(move |id| (at, id))).collect()
    }

    fn unsynced(&self) -> Vec<(usize, Id)> {
        let sites = self.sites.iter().enumerate();
        sites.flat_map(|(at, site)| site.unsynced().map(move |(id, _)| (at, id))).collect()
    }

    fn work(&mut self, number: usize) -> Result<(), Violation> {
        let busy = self.busy();
        // More than there are drivers: anchors work too.
        let at = number % (busy.len() + self.scene.leavers.len());
        if let Some((site, id)) = busy.get(at) {
            return self.works(*site, *id);
        }
        self.anchor_works(self.scene.leavers[at - busy.len()]);
        Ok(())
    }

    fn work_fails(&mut self, number: usize) {
        let busy = self.busy();
        let Some((site, id)) = busy.get(number % busy.len().max(1)).copied() else { return };
        let why = Refusal::Hypervisor("failed".into());
        if site == self.moves[&id].source {
            let driver = self.sites[site].sources.get_mut(&id).expect("it is busy");
            if driver.work.front().is_some_and(Work::may_fail) {
                driver.work.pop_front();
                self.source(id, source::Event::Failed(why));
            }
            return;
        }
        let driver = self.sites[site].destinations.get_mut(&id).expect("it is busy");
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

    /// The drivers of both kinds at a site.
    fn drivers(&self, site: usize) -> (Vec<Id>, Vec<Id>) {
        let site = &self.sites[site];
        (site.sources.keys().copied().collect(), site.destinations.keys().copied().collect())
    }

    /// Time passes; whoever has a deadline by then is told.
    fn wait(&mut self, time: Duration) {
        self.now += time;
        for site in self.sites.iter_mut().filter(|site| site.guest == Guest::Running) {
            self.flushed += 1;
            site.disk = Disk { written: self.flushed, stable: self.flushed };
        }
        for site in 0..self.scene.sites {
            let (sources, destinations) = self.drivers(site);
            sources.into_iter().for_each(|id| self.source(id, source::Event::Tick));
            destinations.into_iter().for_each(|id| self.destination(id, destination::Event::Tick));
        }
        if self.broken == Some(Broken::SourceTimesOut) && time > Duration::from_secs(1) {
            // As libvirt does it: what has not answered has failed.
            self.sites[A].guest = Guest::Running;
        }
    }

    /// A gateway sees what has become of a link.
    fn notice(&mut self, number: usize) {
        let (site, peer) = self.scene.pair(number);
        let down = self.cut[site][peer] || self.cut[peer][site] || !self.sites[peer].up;
        if !self.sites[site].up || down == self.noticed_down[site][peer] {
            return;
        }
        self.noticed_down[site][peer] = down;
        let (mut sources, mut destinations) = self.drivers(site);
        if self.broken == Some(Broken::DeafToTheLink) && !down {
            sources.clear();
        }
        sources.retain(|id| self.moves[id].destination == peer);
        for id in sources {
            self.source(id, if down { source::Event::LinkDown } else { source::Event::LinkUp });
        }
        destinations.retain(|id| self.moves[id].source == peer);
        for id in destinations {
            let event = if down { destination::Event::LinkDown } else { destination::Event::LinkUp };
            self.destination(id, event);
        }
    }

    /// A gateway dies; of what it had not synced, each record is there or not.
    pub fn crash(&mut self, site: usize, number: usize) -> Result<(), Violation> {
        if !self.sites[site].up {
            return Ok(());
        }
        let unsynced = self.sites[site].unsynced().map(|(id, record)| (id, record.cloned()));
        let unsynced: Vec<(Id, Option<Record>)> = unsynced.collect();
        for (at, (id, record)) in unsynced.into_iter().enumerate() {
            if number >> at & 1 == 1 {
                self.write(site, id, record)?;
            }
        }
        self.sites[site].forget();
        self.loses_the_rest(site, number);
        if site == B && self.broken == Some(Broken::UnknownIsRefused) {
            // Its disk was restored from a backup besides.
            self.sites[B].journal = Journal::default();
        }
        Ok(())
    }

    /// What a gateway had sent behind a pipelined Commit and was still on its way is lost with it. All of it had arrived, or not.
    fn loses_the_rest(&mut self, site: usize, number: usize) {
        if number & 0x80 != 0 {
            return;
        }
        let moves = &self.moves;
        self.all_sent.retain(|id, _| {
            let attempt = &moves[id];
            attempt.source != site || attempt.commit != CommitMode::Pipelined
        });
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
        let state = &self.sites[site];
        let Some(owner) = &state.journal.owner else { return Ok(()) };
        if !state.up || state.guest != Guest::Dead {
            return Ok(());
        }
        match owner.permit(&VM, state.journal.unfinished(), &[]) {
            Ok(permit) => self.resumes(site, permit.epoch()),
            Err(_) => Ok(()),
        }
    }

    fn abort(&mut self) {
        for site in 0..self.scene.sites {
            let (sources, destinations) = self.drivers(site);
            sources.into_iter().for_each(|id| self.source(id, source::Event::AbortRequested));
            destinations.into_iter().for_each(|id| self.destination(id, destination::Event::AbortRequested));
        }
    }

    /// The WAN is cut for good, but all reach an arbiter: somebody must run all the same.
    fn partition(&mut self) -> Result<(), Violation> {
        if !self.scene.has_arbiter() {
            return Ok(());
        }
        self.cut = [[true; SITES]; SITES];
        self.packets.clear();
        self.gateways_and_names_are_well();
        self.goes_on_until(Self::check_partitioned)
    }

    /// Links, gateways and the name server are well from now on; everything must end in time.
    fn heal(&mut self) -> Result<(), Violation> {
        self.cut = Default::default();
        self.gateways_and_names_are_well();
        self.goes_on_until(Self::check_settled)
    }

    fn goes_on_until(&mut self, holds: fn(&Self) -> Result<(), Violation>) -> Result<(), Violation> {
        let until = self.now + WELL_WITHIN;
        while self.now < until {
            self.terse = true;
            let held = holds(self);
            self.terse = false;
            if held.is_ok() {
                return Ok(());
            }
            self.goes_on()?;
        }
        holds(self)
    }

    fn gateways_and_names_are_well(&mut self) {
        for register in [&mut self.name_server, &mut self.etcd] {
            register.mood = Mood::Answers;
            register.repair();
        }
        for site in 0..self.scene.sites {
            self.restart(site);
        }
    }

    fn goes_on(&mut self) -> Result<(), Violation> {
        for pair in 0..self.scene.pairs() {
            self.notice(pair);
        }
        for packet in std::mem::take(&mut self.packets) {
            self.hear(packet);
            self.settle_disks()?;
        }
        for _ in 0..4 {
            for (site, id) in self.busy() {
                self.works(site, id)?;
                self.settle_disks()?;
            }
        }
        for site in self.scene.leavers {
            self.anchor_works(*site);
        }
        self.wait(Duration::from_millis(500));
        self.settle_disks()?;
        for site in 0..self.scene.sites {
            self.boot(site)?;
        }
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
