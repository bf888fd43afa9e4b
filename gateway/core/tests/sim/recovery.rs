//! A gateway of the simulation starts: folds its journal and goes on, by the core's judgement.

use longhaul_core::migration::destination::{Destination, DestinationLimits, Remains};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::recovery::{Facts, NextStep, Qemu, next_step};
use longhaul_core::migration::source::{Source, SourceLimits};

use crate::broken::Broken;
use crate::parts::{DestinationDriver, Guest, Id, SourceDriver, name, reservation};
use crate::world::World;

impl World {
    pub fn restart(&mut self, site: usize) {
        let state = &mut self.sites[site];
        if state.up {
            return;
        }
        state.up = true;
        state.found_dead = state.guest == Guest::Dead;
        self.noticed_down[site].fill(true);
        let ids: Vec<Id> = self.sites[site].journal.records.keys().copied().collect();
        for id in ids {
            if let Some(last) = self.sites[site].journal.last(id).cloned() {
                self.recover(site, id, last);
            }
        }
    }

    fn recover(&mut self, site: usize, id: Id, last: Record) {
        let step = self.misjudges(site, id, &last).unwrap_or_else(|| self.judges(site, id, &last));
        if matches!(last, Record::Source(SourceRecord::Released)) {
            self.owes_names(site, id);
        }
        if !step.is_owed() {
            // What a refused attempt held besides its QEMU is nobody's any more.
            if self.qemu(site, id) == Qemu::Gone {
                self.sites[site].held.remove(&id);
            }
            return;
        }
        match last {
            Record::Source(last) => self.recover_source(site, id, last),
            Record::Destination(last) => self.recover_destination(site, id, last),
        }
    }

    fn judges(&self, site: usize, id: Id, last: &Record) -> NextStep {
        let (journal, attempt) = (&self.sites[site].journal, &self.moves[&id]);
        let is_refusal = |record: Option<&Record>| {
            matches!(
                record,
                None | Some(
                    Record::Source(_)
                        | Record::Destination(
                            DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }
                        )
                )
            )
        };
        let mut others = journal.records.iter().filter(|(other, _)| **other != id);
        let overtaken = others
            .clone()
            .any(|(other, records)| self.moves[other].epoch >= attempt.epoch && !is_refusal(records.last()));
        let came_again = others.any(|(other, records)| {
            self.moves[other].epoch > attempt.epoch && matches!(records.last(), Some(Record::Destination(_)))
        });
        let looks = self.broken != Some(Broken::OverlooksItsAnchor);
        let anchor = journal.anchor.as_ref().filter(|_| looks);
        next_step(&Facts {
            untidied: false,
            last,
            epoch: attempt.epoch,
            owner: journal.owner.as_ref(),
            arbitrated: attempt.commit.is_arbitrated(),
            wanted: true,
            settled: false,
            qemu: self.qemu(site, id),
            encumbered: false,
            owes_names: false,
            overtaken,
            came_again,
            stale: false,
            anchor: anchor.map(|anchor| anchor.epoch),
        })
    }

    /// What a gateway that breaks its promise does instead.
    fn misjudges(&self, site: usize, id: Id, last: &Record) -> Option<NextStep> {
        let stands = self.sites[site].guest == Guest::Still;
        let (owner, epoch) = (self.sites[site].journal.owner.as_ref(), self.moves[&id].epoch);
        match (self.broken?, last) {
            (Broken::ForgetsCommitted, Record::Source(SourceRecord::Committed { .. }))
            | (Broken::LeavesItsQemu, Record::Source(SourceRecord::Released)) => Some(NextStep::Nothing),
            (Broken::OldAbortResumes, Record::Source(SourceRecord::Aborted { .. })) => {
                let may = stands && owner.is_some_and(|owner| owner.epoch() <= epoch);
                Some(if may { NextStep::RollBack } else { NextStep::Nothing })
            }
            (Broken::OldArrivalResumes, Record::Destination(DestinationRecord::Activated { .. })) => {
                Some(if stands { NextStep::Activate } else { NextStep::Nothing })
            }
            (_, _) => None,
        }
    }

    /// The machine's QEMU at this site; one that waits for what an attempt brings is known by what is held.
    fn qemu(&self, site: usize, id: Id) -> Qemu {
        let state = &self.sites[site];
        match state.guest {
            Guest::Running => Qemu::Runs,
            Guest::Still => Qemu::StandsStill,
            Guest::Gone if state.held.contains(&id) => Qemu::StandsStill,
            Guest::Gone | Guest::Dead => Qemu::Gone,
        }
    }

    fn recover_source(&mut self, site: usize, id: Id, last: SourceRecord) {
        let attempt = self.moves[&id].at(site, id);
        let (machine, step) = Source::recover(attempt, last, SourceLimits::default(), name(site), self.now);
        self.sites[site].sources.insert(id, SourceDriver::new(machine));
        self.source_step(id, step);
    }

    fn recover_destination(&mut self, site: usize, id: Id, last: DestinationRecord) {
        let attempt = self.moves[&id].at(site, id);
        let stands = self.sites[site].guest == Guest::Still;
        let qemu_found = stands || self.broken == Some(Broken::TakesWhatIsGone);
        let remains = Remains { nics: Vec::new(), reservation: reservation(), last, qemu_found };
        let limits = DestinationLimits::default();
        let (machine, step) = Destination::recover(attempt, remains, limits, name(site), self.now);
        self.sites[site].destinations.insert(id, DestinationDriver::new(machine));
        self.destination_step(id, step);
    }
}
