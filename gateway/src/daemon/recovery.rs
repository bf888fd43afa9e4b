//! What a gateway does before it listens: takes up its machines, then every migration that is owed.
//!
//! The drivers are the same as in normal running; recovery only chooses the record to go on from. An
//! attempt that never reached the journal was never promised to anybody and is forgotten.

use std::collections::BTreeMap;

use longhaul_core::ids::VmName;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Handover, Proposal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use longhaul_core::migration::{Attempt, CommitMode};
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::mpsc;

use super::{Daemon, Machine};
use crate::hypervisor::Guest;
use crate::journal::History;
use crate::migration::anchor::{AnchorCommand, ports, tell, visits};
use crate::migration::source::SourceOptions;
use crate::migration::{DestinationDriver, MachineRow, SourceDriver};
use crate::tunnel::TunnelError;

/// Machines as the journal and the hypervisor know them, before anybody is given one. A monitor has one
/// client, so each QEMU is looked for once and handed on.
type Found = BTreeMap<VmName, (MachineRow, Option<Guest>)>;

impl Daemon {
    /// Folds the journal and goes on.
    pub(super) async fn recover(&mut self) -> anyhow::Result<()> {
        let mut found = Found::new();
        for (vm, row) in self.edges.journal.machines::<MachineRow>()? {
            let guest = self.find(&row).await;
            found.insert(vm, (row, guest));
        }
        for history in self.edges.journal.histories()? {
            let Some(last) = history.entries.last().map(|entry| entry.record.clone()) else { continue };
            match last {
                Record::Source(last) => self.recover_source(history, last, &found).await,
                Record::Destination(last) => self.recover_destination(history, last, &found).await,
            }
        }
        for (vm, (row, guest)) in found {
            if matches!(self.edges.journal.ownership(&vm)?, Some(Ownership::Here { .. })) {
                tracing::info!(%vm, runs = guest.is_some(), "machine taken up");
                self.restore_network(&row).await;
                self.machines.insert(vm, Machine { row, guest });
            }
        }
        Ok(())
    }

    async fn recover_source(&mut self, history: History, last: SourceRecord, found: &Found) {
        let attempt = history.attempt.clone();
        let Some((proposal, reservation, without_dns)) = source_facts(&history.entries) else { return };
        let Some((row, guest)) = found.get(&attempt.vm).cloned() else { return };
        let owed = match &last {
            SourceRecord::Reserved { .. }
            | SourceRecord::PreCopy { .. }
            | SourceRecord::Parked
            | SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. }
            | SourceRecord::Committed { .. } => true,
            // The register may still name the other site.
            SourceRecord::Returned { .. } if attempt.commit != CommitMode::Confirmed => {
                self.may_undo(&attempt)
            }
            // The guest of a machine that left is ended once.
            SourceRecord::Released => guest.is_some() && self.is_latest(&attempt),
            // Undone before the crash or not: a guest that should run and stands still tells, or a TTL.
            SourceRecord::Aborted { .. } | SourceRecord::Returned { .. } | SourceRecord::Settled => {
                let stands = stands_still(guest.as_ref()).await && proposal.running;
                self.may_undo(&attempt) && (stands || row.ttl_before_s.is_some())
            }
        };
        if matches!(last, SourceRecord::Released) && self.is_latest(&attempt) {
            // The name is owed whether or not a guest is left to end: the anchor may have been told, and
            // have died before it wrote that down.
            tell(&self.anchors, AnchorCommand::MoveNames(attempt.vm.clone())).await;
        }
        if !owed {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        let (inbox, outbox) = mpsc::channel(64);
        let options = SourceOptions { without_dns, max_downtime: None };
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

    async fn recover_destination(&mut self, history: History, last: DestinationRecord, found: &Found) {
        let attempt = history.attempt.clone();
        let Some((proposal, reservation)) = destination_facts(&history.entries) else { return };
        let known = found.get(&attempt.vm).and_then(|(_, guest)| guest.clone());
        // Before it was written down, a machine that comes is known to the hypervisor only.
        let guest = match known {
            Some(guest) => Some(guest),
            None => self.edges.hypervisor.find(&attempt.vm).await.ok().flatten(),
        };
        let owed = match &last {
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. } => true,
            DestinationRecord::HandedBack { .. } => self.is_latest(&attempt),
            DestinationRecord::Activated { .. } => {
                self.is_latest(&attempt) && stands_still(guest.as_ref()).await && proposal.running
            }
            DestinationRecord::Refused { .. } => self.is_latest(&attempt) && guest.is_some(),
        };
        if !owed {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        let (inbox, outbox) = mpsc::channel(64);
        let driver =
            DestinationDriver::new(self.edges.clone(), attempt.clone(), proposal, reservation, outbox);
        let (viewer, shown) = (driver.viewer(), driver.guest());
        self.spawn(attempt, inbox, viewer, shown, async move { driver.resume(guest, last).await.err() });
    }

    /// Rules and samplers of a machine that runs here, before anybody can ask for anything new: its open
    /// connections stall for the gateway's absence, they do not die of it.
    async fn restore_network(&self, row: &MachineRow) {
        let restored = match &row.handover {
            Some(handover) => self.restore_visit(row, handover).await,
            None => self.restore_home(row).await,
        };
        if let Err(error) = restored {
            let error = crate::migration::chain(&error);
            tracing::error!(vm = %row.definition.name, error, "the machine's network could not be restored");
        }
    }

    async fn restore_visit(&self, row: &MachineRow, handover: &Handover) -> Result<(), TunnelError> {
        let reservation = Reservation { care_of: row.care_of.clone() };
        let visits = visits(&self.edges, &row.definition, &reservation, &handover.nics, &row.home_site);
        for visit in visits.unwrap_or_default() {
            let (key, flows) = (visit.key.clone(), visit.nic.flows.clone());
            self.edges.tunnel.visit_prepare(visit).await?;
            self.edges.tunnel.visit_flows(key.clone(), flows).await?;
            self.edges.tunnel.visit_resumed(key).await?;
        }
        Ok(())
    }

    async fn restore_home(&self, row: &MachineRow) -> Result<(), TunnelError> {
        // A gateway that was killed in a pause has left the home address captured, whether or not its
        // successor has a rollback to do.
        for hold in ports(&self.edges, row, self.edges.site()).unwrap_or_default() {
            self.edges.tunnel.hold_undo(hold).await?;
        }
        for nic in &row.definition.nics {
            let key = PortKey { machine: row.definition.name.clone(), nic: nic.name.clone() };
            let tap = self.edges.port(row, &nic.name);
            // Not sysfs: what is mounted there may show another network namespace.
            if nix::net::if_::if_nametoindex(tap.as_str()).is_ok() {
                self.edges.tunnel.sample_begin(key, tap).await?;
            }
        }
        Ok(())
    }

    /// The machine is here, and nothing has happened to it since this attempt.
    fn may_undo(&self, attempt: &Attempt) -> bool {
        let known = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        known.is_some_and(|owner| owner.may_undo(attempt.epoch))
    }

    /// Nothing has happened to the machine since this attempt.
    fn is_latest(&self, attempt: &Attempt) -> bool {
        let epoch = |ownership: &Ownership| ownership.epoch();
        let known = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        known.as_ref().map(epoch).is_none_or(|epoch| epoch <= attempt.epoch)
    }
}

async fn stands_still(guest: Option<&Guest>) -> bool {
    let Some(guest) = guest else { return false };
    guest.status().await.is_ok_and(|state| !state.is_running())
}

/// What was proposed, what is held for it, and whether the name was to stay behind.
fn source_facts(entries: &[Entry]) -> Option<(Proposal, Option<Reservation>, bool)> {
    let mut proposed = None;
    let mut reserved = None;
    for entry in entries {
        match &entry.record {
            Record::Source(SourceRecord::Reserved { proposal, without_names, .. }) => {
                proposed = Some(((**proposal).clone(), *without_names));
            }
            Record::Source(SourceRecord::PreCopy { reservation }) => reserved = Some(reservation.clone()),
            Record::Source(
                SourceRecord::Parked
                | SourceRecord::Committed { .. }
                | SourceRecord::Released
                | SourceRecord::Aborted { .. }
                | SourceRecord::Returned { .. }
                | SourceRecord::Offered { .. }
                | SourceRecord::Reclaiming { .. }
                | SourceRecord::Promised { .. }
                | SourceRecord::Settled,
            )
            | Record::Destination(_) => {}
        }
    }
    let (proposal, without_names) = proposed?;
    Some((proposal, reserved, without_names))
}

fn destination_facts(entries: &[Entry]) -> Option<(Proposal, Reservation)> {
    entries.iter().find_map(|entry| match &entry.record {
        Record::Destination(DestinationRecord::Reserved { proposal, reservation, .. }) => {
            Some(((**proposal).clone(), reservation.clone()))
        }
        Record::Destination(
            DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Refused { .. }
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::HandedBack { .. },
        )
        | Record::Source(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;

    use super::*;

    #[test]
    fn a_move_that_was_begun_without_names_goes_on_without_them() {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            dns_name = \"web1.vm.example\"\n[[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n";
        let proposal = Proposal {
            definition: toml::from_str(definition).unwrap(),
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(0),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
        };
        for without_names in [true, false] {
            let record = Record::Source(SourceRecord::Reserved {
                peer: "b".parse().unwrap(),
                proposal: Box::new(proposal.clone()),
                without_names,
            });
            let entry = Entry { vm: "web1".parse().unwrap(), epoch: Epoch(1), at_unix_ms: 0, record };
            assert_eq!(source_facts(&[entry]).unwrap().2, without_names);
        }
    }
}
