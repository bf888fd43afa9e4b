//! The gateways of the simulation: what the daemon and its drivers do around the core's machines.
//!
//! A record is on disk only after `sync`; the step's actions come after it. Whatever a gateway is
//! busy with is a piece of work that ends, fails or is lost with it.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::arbiter::Request;
use longhaul_core::migration::destination::{self, Destination, DestinationLimits};
use longhaul_core::migration::late;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::source::{self, Source, SourceLimits};
use longhaul_core::migration::step::Step;

use crate::broken::Broken;
use crate::invariants::Violation;
use crate::parts::{DestinationDriver, Guest, Id, Move, SourceDriver, Work, name, proposal, reservation};
use crate::world::World;

impl World {
    /// The operator wants the machine moved from where it is.
    pub fn migrate(&mut self, number: usize) {
        let routes = self.scene.routes.iter();
        let ways: Vec<_> = routes.filter(|route| self.movable(route.from).is_some()).collect();
        let Some(route) = ways.get(number % ways.len().max(1)) else { return };
        let Some(epoch) = self.movable(route.from).filter(|_| self.next_id <= self.scene.moves) else {
            return;
        };
        let id = self.next_id;
        self.next_id += 1;
        let (from, to) = (route.from, route.to);
        let attempt = Move { source: from, destination: to, epoch: epoch.next(), commit: route.commit };
        self.moves.insert(id, attempt);
        let (machine, step) = Source::begin(attempt.at(from, id), SourceLimits::default(), false, self.now);
        self.sites[from].sources.insert(id, SourceDriver::new(machine));
        self.source_step(id, step);
        if self.noticed_down[from][to] {
            self.source(id, source::Event::LinkDown);
        }
    }

    /// The epoch of a machine that runs here and does not move.
    fn movable(&self, site: usize) -> Option<Epoch> {
        let site = &self.sites[site];
        let Some(Ownership::Here { epoch }) = site.journal.owner else { return None };
        (site.up && site.is_idle() && site.guest == Guest::Running).then_some(epoch)
    }

    pub fn source(&mut self, id: Id, event: source::Event) {
        let site = self.moves[&id].source;
        let Some(mut driver) = self.sites[site].sources.remove(&id) else { return };
        if driver.unsynced.is_some() {
            // Its inbox is bounded, so words may be lost; what matters is said again.
            if !matches!(event, source::Event::Peer(_) | source::Event::Tick) {
                driver.inbox.push_back(event);
            }
            self.sites[site].sources.insert(id, driver);
            return;
        }
        let (machine, step) = driver.machine.handle(event, self.now);
        driver.machine = machine;
        self.sites[site].sources.insert(id, driver);
        self.source_step(id, step);
    }

    pub fn destination(&mut self, id: Id, event: destination::Event) {
        let site = self.moves[&id].destination;
        let Some(mut driver) = self.sites[site].destinations.remove(&id) else { return };
        if driver.unsynced.is_some() {
            if !matches!(event, destination::Event::Peer(_) | destination::Event::Tick) {
                driver.inbox.push_back(event);
            }
            self.sites[site].destinations.insert(id, driver);
            return;
        }
        let (machine, step) = driver.machine.handle(event, self.now);
        driver.machine = machine;
        self.sites[site].destinations.insert(id, driver);
        self.destination_step(id, step);
    }

    pub fn source_step(&mut self, id: Id, step: Step<source::Action>) {
        let site = self.moves[&id].source;
        if step.pending_record().is_none() {
            return self.source_acts(id, step.after_record());
        }
        if self.broken == Some(Broken::ActsBeforeSync) {
            self.send_ahead(id, &step);
        }
        if let Some(driver) = self.sites[site].sources.get_mut(&id) {
            driver.unsynced = Some(step);
        }
    }

    pub fn destination_step(&mut self, id: Id, step: Step<destination::Action>) {
        let site = self.moves[&id].destination;
        if step.pending_record().is_none() {
            return self.destination_acts(id, step.after_record());
        }
        if let Some(driver) = self.sites[site].destinations.get_mut(&id) {
            driver.unsynced = Some(step);
        }
    }

    /// What a gateway must never do: says Commit while the record is still in memory.
    fn send_ahead(&mut self, id: Id, step: &Step<source::Action>) {
        if let Some(Record::Source(SourceRecord::Committed { handover })) = step.pending_record() {
            let Move { source, epoch, .. } = self.moves[&id];
            self.send(source, id, MigrationMessage::Commit { epoch, handover: handover.clone() });
        }
    }

    fn source_acts(&mut self, id: Id, actions: Vec<source::Action>) {
        let site = self.moves[&id].source;
        for action in actions {
            let work = match action {
                source::Action::Send(message) => {
                    self.send(site, id, message);
                    continue;
                }
                source::Action::Attract(_) => {
                    self.attracts(id);
                    continue;
                }
                source::Action::Arbitrate(request) => {
                    self.asks(site, id, request);
                    continue;
                }
                source::Action::Preflight => Work::Preflight,
                source::Action::StartPreCopy(_) => Work::Copy,
                source::Action::Park => {
                    self.sources_work(id, Work::StopGuest);
                    Work::SendRest
                }
                source::Action::Rollback(permit) => {
                    self.forgets_anchor(id);
                    self.sites[site].sources.get_mut(&id).expect("this driver acts").work.clear();
                    Work::Rollback(permit)
                }
                source::Action::ReportSecondOwner => continue,
                source::Action::Release => {
                    self.sites[site].runs_there = true;
                    Work::Release
                }
            };
            self.sources_work(id, work);
        }
        let ended = |driver: &SourceDriver| driver.machine.outcome().is_some();
        if self.sites[site].sources.get(&id).is_some_and(ended) {
            self.sites[site].sources.remove(&id);
        }
    }

    pub fn sources_work(&mut self, id: Id, work: Work) {
        let site = self.moves[&id].source;
        self.sites[site].sources.get_mut(&id).expect("this driver acts").work.push_back(work);
    }

    fn destination_acts(&mut self, id: Id, actions: Vec<destination::Action>) {
        let site = self.moves[&id].destination;
        for action in actions {
            let work = match action {
                destination::Action::Send(message) => {
                    self.send(site, id, message);
                    continue;
                }
                destination::Action::Arbitrate(request) => {
                    self.asks(site, id, request);
                    continue;
                }
                destination::Action::CheckGuest => Work::Check,
                destination::Action::Prepare => {
                    self.sites[site].held.insert(id);
                    Work::Prepare
                }
                destination::Action::Activate(permit, _) => Work::Activate(permit),
                destination::Action::Discard => Work::Discard,
            };
            let driver = self.sites[site].destinations.get_mut(&id).expect("this driver acts");
            if matches!(work, Work::Discard) {
                driver.work.clear();
            }
            driver.work.push_back(work);
        }
        let ended = |driver: &DestinationDriver| driver.machine.outcome().is_some();
        if self.sites[site].destinations.get(&id).is_some_and(ended) {
            self.sites[site].destinations.remove(&id);
        }
    }

    /// One question at a time: what is asked again while it waits is not asked twice.
    fn asks(&mut self, site: usize, id: Id, request: Request) {
        let attempt = self.moves[&id];
        let cut = self.noticed_down[site][attempt.peer_of(site)];
        if self.broken == Some(Broken::AsksNobodyInACut) && cut {
            return;
        }
        let state = &mut self.sites[site];
        let work = if site == attempt.source {
            &mut state.sources.get_mut(&id).expect("this driver acts").work
        } else {
            &mut state.destinations.get_mut(&id).expect("this driver acts").work
        };
        if !work.iter().any(|waiting| matches!(waiting, Work::Ask(asked) if *asked == request)) {
            work.push_back(Work::Ask(request));
        }
    }

    /// What this driver had to write is on disk; then it acts.
    pub fn sync(&mut self, site: usize, id: Id) -> Result<(), Violation> {
        if site == self.moves[&id].source {
            let driver = self.sites[site].sources.get_mut(&id);
            let Some(step) = driver.and_then(|driver| driver.unsynced.take()) else { return Ok(()) };
            self.write(site, id, step.pending_record().cloned())?;
            self.source_acts(id, step.after_record());
            self.source_catches_up(id);
        } else {
            let driver = self.sites[site].destinations.get_mut(&id);
            let Some(step) = driver.and_then(|driver| driver.unsynced.take()) else { return Ok(()) };
            self.write(site, id, step.pending_record().cloned())?;
            self.destination_acts(id, step.after_record());
            self.destination_catches_up(id);
        }
        Ok(())
    }

    fn source_catches_up(&mut self, id: Id) {
        let site = self.moves[&id].source;
        let waits = |driver: &&mut SourceDriver| driver.unsynced.is_none();
        while let Some(driver) = self.sites[site].sources.get_mut(&id).filter(waits) {
            let Some(event) = driver.inbox.pop_front() else { return };
            self.source(id, event);
        }
    }

    fn destination_catches_up(&mut self, id: Id) {
        let site = self.moves[&id].destination;
        let waits = |driver: &&mut DestinationDriver| driver.unsynced.is_none();
        while let Some(driver) = self.sites[site].destinations.get_mut(&id).filter(waits) {
            let Some(event) = driver.inbox.pop_front() else { return };
            self.destination(id, event);
        }
    }

    /// One transaction: the record and the ledger.
    pub fn write(&mut self, site: usize, id: Id, record: Option<Record>) -> Result<(), Violation> {
        let Some(record) = record else { return Ok(()) };
        self.takes_what_is_there(site, &record)?;
        let attempt = self.moves[&id];
        let twice = self.broken == Some(Broken::WritesTwice);
        let state = &mut self.sites[site];
        let records = state.journal.records.entry(id).or_default();
        if twice {
            records.push(record.clone());
        }
        if Record::check_order(records.last(), &record).is_err() {
            return Err(Violation::new("journal_in_order", format!("{} of {id}", record.name())));
        }
        let (before, peer) = (state.journal.owner.as_ref(), name(attempt.peer_of(site)));
        state.journal.owner = Ownership::after(before, &record, attempt.epoch, peer);
        if let Record::Destination(
            DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. },
        ) = record
        {
            // What was held is the machine's own now.
            state.held.remove(&id);
        }
        records.push(record);
        Ok(())
    }

    /// A message reaches a gateway that is up.
    pub fn hear_of_migration(&mut self, to: usize, id: Id, mut message: MigrationMessage) {
        let attempt = self.moves[&id];
        if message == MigrationMessage::Unknown && self.broken == Some(Broken::UnknownIsRefused) {
            message = MigrationMessage::Refused { epoch: attempt.epoch, why: Refusal::Operator };
        }
        let site = &self.sites[to];
        let asked = to == attempt.source && matches!(message, MigrationMessage::Reserved(_));
        if asked && self.broken == Some(Broken::WaitsForWhatIsLost) {
            let given = matches!(site.journal.last(id), Some(Record::Source(SourceRecord::Committed { .. })));
            if given {
                return;
            }
        }
        if to == attempt.source && site.sources.contains_key(&id) {
            return self.source(id, source::Event::Peer(message));
        }
        if to == attempt.destination && site.destinations.contains_key(&id) {
            return self.destination(id, destination::Event::Peer(message));
        }
        let unknown = to == attempt.destination && site.journal.last(id).is_none();
        if matches!(message, MigrationMessage::Propose(_)) {
            self.on_propose(id);
        } else if unknown && matches!(message, MigrationMessage::Reserve { .. }) {
            self.on_reserve(id);
        } else {
            self.answer_from_journal(to, id, &message);
        }
    }

    fn answer_from_journal(&mut self, site: usize, id: Id, heard: &MigrationMessage) {
        let Move { source, epoch, .. } = self.moves[&id];
        let journal = &self.sites[site].journal;
        let last = journal.last(id).map(|record| (epoch, record));
        let Some(mut answer) = late::answer(last, heard) else { return };
        if site == source && self.broken == Some(Broken::SilentOnceDone) {
            return;
        }
        if self.broken == Some(Broken::AnswersByTheLedger) && !journal.is_here() {
            answer = MigrationMessage::Refused { epoch, why: Refusal::Operator };
        }
        self.send(site, id, answer);
    }

    /// Why the machine cannot come by this attempt, if it cannot.
    fn busy_for(&self, id: Id) -> Option<Refusal> {
        let attempt = &self.moves[&id];
        let site = &self.sites[attempt.destination];
        let busy = || Some(Refusal::Busy("web1".into()));
        if !site.is_idle() {
            return busy();
        }
        let is_older = |register: &crate::register::Register| register.epoch < attempt.epoch;
        match &site.journal.owner {
            Some(Ownership::Here { .. } | Ownership::Offered { .. }) => busy(),
            // Nobody gives away what he handed over himself in a later epoch, or never had.
            Some(Ownership::Away { site, epoch })
                if attempt.epoch <= *epoch
                    || (attempt.epoch == epoch.next() && site != name(attempt.source)) =>
            {
                Some(Refusal::PeerMisbehaved("it is not his".into()))
            }
            Some(Ownership::Away { .. } | Ownership::Arriving { .. }) | None => {
                let decides = self.arbiter(attempt.commit).is_none_or(is_older);
                (!decides).then(|| Refusal::Other("the register is not older".into()))
            }
        }
    }

    fn on_propose(&mut self, id: Id) {
        let site = self.moves[&id].destination;
        if let Some(why) = self.busy_for(id) {
            return self.send(site, id, MigrationMessage::Decline(why));
        }
        self.sites[site].accepted.insert(id);
        self.send(site, id, MigrationMessage::Accept);
    }

    fn on_reserve(&mut self, id: Id) {
        let attempt = self.moves[&id];
        let site = attempt.destination;
        if !self.sites[site].accepted.remove(&id) {
            return self.send(site, id, MigrationMessage::Decline(Refusal::Restarted(name(site).clone())));
        }
        if let Some(why) = self.busy_for(id) {
            return self.send(site, id, MigrationMessage::Decline(why));
        }
        let (machine, step) = Destination::begin(
            attempt.at(site, id),
            proposal(Epoch(attempt.epoch.0 - 1), attempt.commit),
            reservation(),
            DestinationLimits::default(),
            self.now,
        );
        self.sites[site].destinations.insert(id, DestinationDriver::new(machine));
        self.destination_step(id, step);
        if self.noticed_down[site][attempt.source] {
            self.destination(id, destination::Event::LinkDown);
        }
    }
}
