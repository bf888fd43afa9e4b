//! What a gateway does before it listens: takes up its machines, then every migration that is owed.
//!
//! The drivers are the same as in normal running; recovery only chooses the record to go on from. An
//! attempt that never reached the journal was never promised to anybody and is forgotten.

use longhaul_core::migration::message::{Proposal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use tokio::sync::mpsc;

use super::{Daemon, Machine};
use crate::journal::History;
use crate::migration::source::SourceOptions;
use crate::migration::{DestinationDriver, MachineRow, SourceDriver};

impl Daemon {
    /// Folds the journal and goes on.
    pub(super) async fn recover(&mut self) -> anyhow::Result<()> {
        let rows: Vec<(_, MachineRow)> = self.edges.journal.machines()?;
        for (vm, row) in rows {
            let guest = self.find(&row).await;
            let found = guest.is_some();
            tracing::info!(%vm, found, "machine taken up");
            self.machines.insert(vm, Machine { row, guest });
        }
        for history in self.edges.journal.histories()? {
            let Some(last) = history.entries.last().map(|entry| entry.record.clone()) else { continue };
            match last {
                Record::Source(last) => self.recover_source(history, last).await,
                Record::Destination(last) => self.recover_destination(history, last).await,
            }
        }
        Ok(())
    }

    async fn recover_source(&mut self, history: History, last: SourceRecord) {
        if matches!(last, SourceRecord::Returned { .. } | SourceRecord::Aborted { .. }) {
            // Undone before or after the crash: the machine's own row says how it stands.
            if !self.needs_rollback(&history).await {
                return;
            }
        }
        let attempt = history.attempt.clone();
        let Some((proposal, reservation)) = source_facts(&history.entries) else { return };
        let (guest, row) = match self.machines.get(&attempt.vm) {
            Some(machine) => (machine.guest.clone(), machine.row.clone()),
            None => return,
        };
        if matches!(last, SourceRecord::Released) && guest.is_none() {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        let (inbox, outbox) = mpsc::channel(64);
        let options = SourceOptions { without_dns: row.definition.dns_name.is_none(), max_downtime: None };
        let anchors = self.anchors.clone();
        let row = MachineRow { wanted: proposal.running, ..row };
        let driver =
            SourceDriver::new(self.edges.clone(), attempt.clone(), guest, row, options, outbox, anchors);
        let (viewer, guest) = (driver.viewer(), driver.guest());
        self.spawn(
            attempt,
            inbox,
            viewer,
            guest,
            async move { driver.resume(reservation, last).await.err() },
        );
    }

    /// A guest of an aborted attempt that still stands still was not resumed before the crash.
    async fn needs_rollback(&self, history: &History) -> bool {
        let Some(machine) = self.machines.get(&history.attempt.vm) else { return false };
        let Some(guest) = &machine.guest else { return false };
        machine.row.wanted && guest.status().await.is_ok_and(|state| !state.is_running())
    }

    async fn recover_destination(&mut self, history: History, last: DestinationRecord) {
        let attempt = history.attempt.clone();
        let Some((proposal, reservation)) = destination_facts(&history.entries) else { return };
        let guest = self.edges.hypervisor.find(&attempt.vm).await.ok().flatten();
        let settled = match &last {
            DestinationRecord::Reserved { .. } | DestinationRecord::Loaded => false,
            DestinationRecord::Activated { .. } => {
                let known = self.machines.contains_key(&attempt.vm);
                let away =
                    self.ownership(&attempt.vm).map_or(true, |ownership| ownership.epoch() > attempt.epoch);
                known || away
            }
            DestinationRecord::Refused { .. } => guest.is_none() || self.machines.contains_key(&attempt.vm),
        };
        if settled {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        let (inbox, outbox) = mpsc::channel(64);
        let driver =
            DestinationDriver::new(self.edges.clone(), attempt.clone(), proposal, reservation, outbox);
        let (viewer, guest) = (driver.viewer(), driver.guest());
        self.spawn(attempt, inbox, viewer, guest, async move { driver.resume(last).await.err() });
    }
}

fn source_facts(entries: &[Entry]) -> Option<(Proposal, Option<Reservation>)> {
    let mut proposed = None;
    let mut reserved = None;
    for entry in entries {
        match &entry.record {
            Record::Source(SourceRecord::Reserved { proposal, .. }) => proposed = Some((**proposal).clone()),
            Record::Source(SourceRecord::PreCopy { reservation }) => reserved = Some(reservation.clone()),
            Record::Source(
                SourceRecord::Parked
                | SourceRecord::Committed { .. }
                | SourceRecord::Released
                | SourceRecord::Aborted { .. }
                | SourceRecord::Returned { .. },
            )
            | Record::Destination(_) => {}
        }
    }
    Some((proposed?, reserved))
}

fn destination_facts(entries: &[Entry]) -> Option<(Proposal, Reservation)> {
    entries.iter().find_map(|entry| match &entry.record {
        Record::Destination(DestinationRecord::Reserved { proposal, reservation, .. }) => {
            Some(((**proposal).clone(), reservation.clone()))
        }
        Record::Destination(
            DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Refused { .. },
        )
        | Record::Source(_) => None,
    })
}
