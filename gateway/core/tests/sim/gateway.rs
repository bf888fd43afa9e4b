//! The two gateways of the simulation: what the daemon and its drivers do around the core's machines.
//!
//! A record is on disk only after `sync`; the step's actions come after it. Whatever a gateway is
//! busy with is a piece of work that ends, fails or is lost with it.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::{Request, Verdict};
use longhaul_core::migration::destination::{self, Destination, DestinationLimits, Remains};
use longhaul_core::migration::late;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::source::{self, Source, SourceLimits};

use crate::invariants::Violation;
use crate::parts::{
    Anchor, DestinationDriver, Disk, Guest, Id, Names, Packet, SourceDriver, Work, attempt, handover, name,
    proposal, reservation,
};
use crate::support;
use crate::world::{A, B, Broken, World};

impl World {
    /// The operator wants the machine moved.
    pub fn migrate(&mut self) {
        let site = &self.sites[A];
        let free = site.sources.values().all(|driver| driver.machine.is_settled_here());
        let Some(Ownership::Here { epoch }) = site.journal.owner else { return };
        if !site.up || !free || site.guest != Guest::Running || self.next_id > 3 {
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        let (machine, step) = Source::begin(
            attempt(id, epoch.next(), B, self.commit),
            SourceLimits::default(),
            false,
            self.now,
        );
        self.sites[A].sources.insert(id, SourceDriver::new(machine));
        self.source_step(id, step);
        if self.noticed_down[A] {
            self.source(id, source::Event::LinkDown);
        }
    }

    pub fn source(&mut self, id: Id, event: source::Event) {
        let Some(mut driver) = self.sites[A].sources.remove(&id) else { return };
        if driver.unsynced.is_some() {
            // Its inbox is bounded, so words may be lost; what matters is said again.
            if !matches!(event, source::Event::Peer(_) | source::Event::Tick) {
                driver.inbox.push_back(event);
            }
            self.sites[A].sources.insert(id, driver);
            return;
        }
        let (machine, step) = driver.machine.handle(event, self.now);
        driver.machine = machine;
        self.sites[A].sources.insert(id, driver);
        self.source_step(id, step);
    }

    pub fn destination(&mut self, id: Id, event: destination::Event) {
        let Some(mut driver) = self.sites[B].destinations.remove(&id) else { return };
        if driver.unsynced.is_some() {
            if !matches!(event, destination::Event::Peer(_) | destination::Event::Tick) {
                driver.inbox.push_back(event);
            }
            self.sites[B].destinations.insert(id, driver);
            return;
        }
        let (machine, step) = driver.machine.handle(event, self.now);
        driver.machine = machine;
        self.sites[B].destinations.insert(id, driver);
        self.destination_step(id, step);
    }

    fn source_step(&mut self, id: Id, step: longhaul_core::migration::step::Step<source::Action>) {
        if step.pending_record().is_some() {
            if let Some(driver) = self.sites[A].sources.get_mut(&id) {
                driver.unsynced = Some(step);
            }
            if self.broken == Some(Broken::ActsBeforeSync) {
                self.send_ahead(A, id);
            }
            return;
        }
        self.source_acts(id, step.after_record());
    }

    fn destination_step(&mut self, id: Id, step: longhaul_core::migration::step::Step<destination::Action>) {
        if step.pending_record().is_some() {
            if let Some(driver) = self.sites[B].destinations.get_mut(&id) {
                driver.unsynced = Some(step);
            }
            return;
        }
        self.destination_acts(id, step.after_record());
    }

    /// What a gateway must never do: says Commit while the record is still in memory.
    fn send_ahead(&mut self, from: usize, id: Id) {
        let Some(step) = self.sites[from].sources.get(&id).and_then(|driver| driver.unsynced.as_ref()) else {
            return;
        };
        if let Some(Record::Source(SourceRecord::Committed { handover })) = step.pending_record() {
            let epoch = self.sites[from].sources[&id].machine.attempt().epoch;
            self.send(from, id, MigrationMessage::Commit { epoch, handover: handover.clone() });
        }
    }

    fn source_acts(&mut self, id: Id, actions: Vec<source::Action>) {
        let epoch = self.sites[A].sources[&id].machine.attempt().epoch;
        for action in actions {
            let work = match action {
                source::Action::Send(message) => {
                    self.send(A, id, message);
                    continue;
                }
                source::Action::Attract(_) => {
                    let journal = &mut self.sites[A].journal;
                    journal.anchor.get_or_insert(Anchor { id, epoch, names: Names::Waiting });
                    continue;
                }
                source::Action::Arbitrate(request) => {
                    self.asks(A, id, request);
                    continue;
                }
                source::Action::Preflight => Work::Preflight,
                source::Action::StartPreCopy(_) => Work::Copy,
                source::Action::Park => {
                    self.sources_work(id, Work::StopGuest);
                    Work::SendRest
                }
                source::Action::Rollback(permit) => {
                    let site = &mut self.sites[A];
                    site.journal.anchor = site.journal.anchor.filter(|anchor| anchor.id != id);
                    site.sources.get_mut(&id).expect("this driver acts").work.clear();
                    Work::Rollback(permit)
                }
                source::Action::ReportSecondOwner => continue,
                source::Action::Release => {
                    self.sites[A].runs_there = true;
                    Work::Release
                }
            };
            self.sources_work(id, work);
        }
        let ended = |driver: &SourceDriver| driver.machine.outcome().is_some();
        if self.sites[A].sources.get(&id).is_some_and(ended) {
            self.sites[A].sources.remove(&id);
        }
    }

    fn sources_work(&mut self, id: Id, work: Work) {
        self.sites[A].sources.get_mut(&id).expect("this driver acts").work.push_back(work);
    }

    fn destination_acts(&mut self, id: Id, actions: Vec<destination::Action>) {
        for action in actions {
            let work = match action {
                destination::Action::Send(message) => {
                    self.send(B, id, message);
                    continue;
                }
                destination::Action::Arbitrate(request) => {
                    self.asks(B, id, request);
                    continue;
                }
                destination::Action::CheckGuest => Work::Check,
                destination::Action::Prepare => {
                    self.sites[B].held.insert(id);
                    Work::Prepare
                }
                destination::Action::Activate(permit, _) => Work::Activate(permit),
                destination::Action::Discard => Work::Discard,
            };
            let driver = self.sites[B].destinations.get_mut(&id).expect("this driver acts");
            if matches!(work, Work::Discard) {
                driver.work.clear();
            }
            driver.work.push_back(work);
        }
        let ended = |driver: &DestinationDriver| driver.machine.outcome().is_some();
        if self.sites[B].destinations.get(&id).is_some_and(ended) {
            self.sites[B].destinations.remove(&id);
        }
    }

    /// What this driver had to write is on disk; then it acts.
    pub fn sync(&mut self, site: usize, id: Id) -> Result<(), Violation> {
        if site == A {
            let driver = self.sites[A].sources.get_mut(&id);
            let Some(step) = driver.and_then(|driver| driver.unsynced.take()) else { return Ok(()) };
            self.write(A, id, step.pending_record().cloned())?;
            self.source_acts(id, step.after_record());
            self.source_catches_up(id);
        } else {
            let driver = self.sites[B].destinations.get_mut(&id);
            let Some(step) = driver.and_then(|driver| driver.unsynced.take()) else { return Ok(()) };
            self.write(B, id, step.pending_record().cloned())?;
            self.destination_acts(id, step.after_record());
            self.destination_catches_up(id);
        }
        Ok(())
    }

    fn source_catches_up(&mut self, id: Id) {
        while let Some(driver) = self.sites[A].sources.get_mut(&id).filter(|driver| driver.unsynced.is_none())
        {
            let Some(event) = driver.inbox.pop_front() else { return };
            self.source(id, event);
        }
    }

    fn destination_catches_up(&mut self, id: Id) {
        let waits = |driver: &&mut DestinationDriver| driver.unsynced.is_none();
        while let Some(driver) = self.sites[B].destinations.get_mut(&id).filter(waits) {
            let Some(event) = driver.inbox.pop_front() else { return };
            self.destination(id, event);
        }
    }

    /// One transaction: the record and the ledger.
    pub fn write(&mut self, site: usize, id: Id, record: Option<Record>) -> Result<(), Violation> {
        let Some(record) = record else { return Ok(()) };
        self.takes_what_is_there(site, &record)?;
        let epoch = self.epochs[&id];
        let twice = self.broken == Some(Broken::WritesTwice);
        let journal = &mut self.sites[site].journal;
        let records = journal.records.entry(id).or_default();
        if twice {
            records.push(record.clone());
        }
        if Record::check_order(records.last(), &record).is_err() {
            return Err(Violation::new("journal_in_order", format!("{} of {id}", record.name())));
        }
        journal.owner = Ownership::after(journal.owner.as_ref(), &record, epoch, &name(1 - site));
        records.push(record);
        Ok(())
    }

    /// A message reaches a gateway that is up.
    pub fn hear(&mut self, packet: Packet) {
        let Packet { to, id, mut message } = packet;
        if message == MigrationMessage::Unknown && self.broken == Some(Broken::UnknownIsRefused) {
            message = MigrationMessage::Refused { epoch: self.epochs[&id], why: Refusal::Operator };
        }
        if to == A {
            if self.sites[A].sources.contains_key(&id) {
                return self.source(id, source::Event::Peer(message));
            }
        } else if self.sites[B].destinations.contains_key(&id) {
            return self.destination(id, destination::Event::Peer(message));
        }
        let unknown = to == B && self.sites[B].journal.last(id).is_none();
        if matches!(message, MigrationMessage::Propose(_)) {
            self.on_propose(id);
        } else if unknown && matches!(message, MigrationMessage::Reserve { .. }) {
            self.on_reserve(id);
        } else {
            self.answer_from_journal(to, id, &message);
        }
    }

    fn answer_from_journal(&mut self, site: usize, id: Id, heard: &MigrationMessage) {
        let epoch = self.epochs[&id];
        let last = self.sites[site].journal.last(id).map(|record| (epoch, record));
        let silent = site == A && self.broken == Some(Broken::SilentOnceDone);
        if let Some(answer) = late::answer(last, heard).filter(|_| !silent) {
            self.send(site, id, answer);
        }
    }

    fn is_busy(&self) -> bool {
        self.sites[B].journal.is_here() || !self.sites[B].destinations.is_empty()
    }

    fn on_propose(&mut self, id: Id) {
        if self.is_busy() {
            return self.send(B, id, MigrationMessage::Decline(Refusal::Busy("web1".into())));
        }
        self.sites[B].accepted.insert(id);
        self.send(B, id, MigrationMessage::Accept);
    }

    fn on_reserve(&mut self, id: Id) {
        if !self.sites[B].accepted.remove(&id) {
            return self.send(B, id, MigrationMessage::Decline(Refusal::Restarted(name(B))));
        }
        if self.is_busy() {
            return self.send(B, id, MigrationMessage::Decline(Refusal::Busy("web1".into())));
        }
        let epoch = self.epochs[&id];
        let (machine, step) = Destination::begin(
            attempt(id, epoch, A, self.commit),
            proposal(Epoch(epoch.0 - 1)),
            reservation(),
            DestinationLimits::default(),
            self.now,
        );
        self.sites[B].destinations.insert(id, DestinationDriver::new(machine));
        self.destination_step(id, step);
    }

    /// A gateway starts: folds its journal and goes on.
    pub fn restart(&mut self, site: usize) {
        if self.sites[site].up {
            return;
        }
        self.sites[site].up = true;
        self.noticed_down[site] = true;
        self.sites[site].found_dead = self.sites[site].guest == Guest::Dead;
        let ids: Vec<Id> = self.sites[site].journal.records.keys().copied().collect();
        for id in ids {
            match self.sites[site].journal.last(id).cloned() {
                Some(Record::Source(last)) => self.recover_source(id, last),
                Some(Record::Destination(last)) => self.recover_destination(id, last),
                None => {}
            }
        }
    }

    fn recover_source(&mut self, id: Id, last: SourceRecord) {
        let epoch = self.epochs[&id];
        let site = &mut self.sites[A];
        let owner = site.journal.owner.as_ref().expect("the machine was defined here");
        let owed = match &last {
            SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked => true,
            SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. } => true,
            SourceRecord::Committed { .. } => self.broken != Some(Broken::ForgetsCommitted),
            SourceRecord::Released => {
                // The name is owed whether or not there is a guest left to end.
                site.runs_there = self.broken != Some(Broken::ForgetsNames);
                site.guest != Guest::Gone
            }
            // The register may be owed the news, whatever the guest does.
            SourceRecord::Returned { .. } if self.commit != CommitMode::Confirmed => owner.may_undo(epoch),
            SourceRecord::Aborted { .. }
            | SourceRecord::Returned { .. }
            | SourceRecord::Settled
            | SourceRecord::TakenBack { .. } => {
                let may = match self.broken {
                    Some(Broken::OldAbortResumes) => owner.epoch() <= epoch,
                    Some(_) | None => owner.may_undo(epoch),
                };
                may && site.guest == Guest::Still
            }
        };
        if owed {
            let limits = SourceLimits::default();
            let (machine, step) =
                Source::recover(attempt(id, epoch, B, self.commit), last, limits, &name(A), self.now);
            self.sites[A].sources.insert(id, SourceDriver::new(machine));
            self.source_step(id, step);
        }
    }

    fn recover_destination(&mut self, id: Id, last: DestinationRecord) {
        let epoch = self.epochs[&id];
        let site = &self.sites[B];
        let is_latest = site.journal.owner.as_ref().is_none_or(|owner| owner.epoch() <= epoch);
        let stands = site.guest == Guest::Still;
        let owed = match &last {
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. } => true,
            DestinationRecord::HandedBack { .. } => is_latest,
            // Not written down yet: without that nobody could start it again either.
            DestinationRecord::Overruled => false,
            DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. } => {
                is_latest && (stands || site.held.contains(&id))
            }
            DestinationRecord::Refused { .. } => is_latest && site.held.contains(&id),
        };
        if !owed {
            return;
        }
        let limits = DestinationLimits::default();
        let attempt = attempt(id, epoch, A, self.commit);
        let found = stands || self.broken == Some(Broken::TakesWhatIsGone);
        let remains = Remains { nics: Vec::new(), reservation: reservation(), last, qemu_found: found };
        let (machine, step) = Destination::recover(attempt, remains, limits, &name(B), self.now);
        self.sites[B].destinations.insert(id, DestinationDriver::new(machine));
        self.destination_step(id, step);
    }

    /// Source's work is done.
    pub fn source_works(&mut self, id: Id) -> Result<(), Violation> {
        let driver = self.sites[A].sources.get_mut(&id).expect("a driver with work");
        let Some(work) = driver.work.pop_front() else { return Ok(()) };
        let guest = self.sites[A].guest;
        let lost = matches!(guest, Guest::Dead | Guest::Gone);
        let event = match work {
            Work::Preflight | Work::Copy | Work::StopGuest | Work::SendRest if lost => {
                source::Event::Failed(Refusal::Hypervisor("QEMU is gone".into()))
            }
            Work::Preflight => source::Event::PreflightPassed(proposal(Epoch(self.epochs[&id].0 - 1))),
            Work::Copy => {
                // Until it is stopped it reports again and again.
                self.sources_work(id, Work::Copy);
                source::Event::Progress(support::converged())
            }
            Work::StopGuest => {
                self.sites[A].guest = Guest::Still;
                source::Event::GuestStopped
            }
            Work::SendRest => {
                self.all_sent.insert(id, self.sites[A].disk.written);
                source::Event::Parked(handover())
            }
            Work::Rollback(permit) => {
                if guest == Guest::Still && self.broken != Some(Broken::RollsBackWithoutResuming) {
                    self.resumes(A, permit.epoch())?;
                }
                self.rolled_back(id)?;
                source::Event::RolledBack
            }
            Work::Release => {
                self.sites[A].guest = Guest::Gone;
                source::Event::TidiedUp
            }
            Work::Ask(request) => source::Event::Arbiter(self.arbitrates(A, id, request)),
            Work::Prepare | Work::Load | Work::Activate(_) | Work::Discard | Work::Check => return Ok(()),
        };
        if matches!(event, source::Event::Parked(_)) {
            let driver = self.sites[A].sources.get_mut(&id).expect("it works");
            driver.work.retain(|work| !matches!(work, Work::Copy));
        }
        self.source(id, event);
        Ok(())
    }

    /// Destination's work is done.
    pub fn destination_works(&mut self, id: Id) -> Result<(), Violation> {
        let sent = self.all_sent.get(&id).copied();
        let driver = self.sites[B].destinations.get_mut(&id).expect("a driver with work");
        let Some(work) = driver.work.pop_front() else { return Ok(()) };
        let event = match work {
            Work::Prepare => {
                driver.work.push_back(Work::Load);
                destination::Event::Prepared
            }
            Work::Load => {
                let Some(written) = sent else {
                    driver.work.push_back(Work::Load);
                    return Ok(());
                };
                let unflushed = self.broken == Some(Broken::LoadsBeforeItFlushes);
                self.sites[B].disk = Disk { written, stable: if unflushed { 0 } else { written } };
                (self.sites[B].guest, self.sites[B].found_dead) = (Guest::Still, false);
                destination::Event::Loaded
            }
            Work::Activate(permit) => {
                if self.sites[B].guest == Guest::Still {
                    self.resumes(B, permit.epoch())?;
                }
                self.sites[B].held.remove(&id);
                destination::Event::Activated
            }
            Work::Discard => {
                self.sites[B].held.remove(&id);
                self.sites[B].guest = Guest::Gone;
                destination::Event::Discarded
            }
            Work::Check if self.sites[B].guest == Guest::Still => destination::Event::Stands,
            Work::Check => destination::Event::Failed(Refusal::Hypervisor("QEMU is gone".into())),
            Work::Ask(request) => destination::Event::Arbiter(self.arbitrates(B, id, request)),
            Work::Preflight
            | Work::Copy
            | Work::StopGuest
            | Work::SendRest
            | Work::Rollback(_)
            | Work::Release => {
                return Ok(());
            }
        };
        self.destination(id, event);
        Ok(())
    }

    /// One question at a time: what is asked again while it waits is not asked twice.
    fn asks(&mut self, site: usize, id: Id, request: Request) {
        if self.broken == Some(Broken::AsksNobodyInACut) && self.noticed_down[site] {
            return;
        }
        let work = if site == A {
            &mut self.sites[A].sources.get_mut(&id).expect("this driver acts").work
        } else {
            &mut self.sites[B].destinations.get_mut(&id).expect("this driver acts").work
        };
        if !work.iter().any(|waiting| matches!(waiting, Work::Ask(asked) if *asked == request)) {
            work.push_back(Work::Ask(request));
        }
    }

    fn arbitrates(&mut self, site: usize, id: Id, request: Request) -> Verdict {
        let epoch = self.epochs[&id];
        if self.broken == Some(Broken::NeverPays) && request == Request::BackToSource {
            return Verdict::Source;
        }
        if site == B && self.broken == Some(Broken::TwoPrimaries) {
            return self.second_primary.ask(request, epoch).0;
        }
        let (verdict, under_way) = self.name_server.ask(request, epoch);
        self.under_way.extend(under_way);
        let hopes = match self.broken {
            Some(Broken::ClaimsWithoutAnAnswer) => Some((Request::ForDestination, Verdict::Destination)),
            Some(Broken::TakesBackWithoutAnAnswer) => Some((Request::ForSource, Verdict::Source)),
            Some(_) | None => None,
        };
        match (verdict, hopes) {
            (Verdict::Unknown, Some((hoped, won))) if hoped == request => won,
            (verdict, _) => verdict,
        }
    }

    /// The anchor tries to move the name.
    pub fn moves_name(&mut self) {
        let site = &mut self.sites[A];
        if !site.up {
            return;
        }
        let Some(anchor) = &mut site.journal.anchor else { return };
        match anchor.names {
            Names::Waiting if site.runs_there => anchor.names = Names::Pending,
            Names::Pending => {
                let known = self.name_server.swap(B, anchor.epoch);
                if known || self.broken == Some(Broken::AsksOnce) {
                    anchor.names = Names::Moved;
                }
            }
            Names::Waiting | Names::Moved => {}
        }
    }
}
