//! What a gateway does before it listens: takes up its machines, then every migration that is owed.
//!
//! The drivers are the same as in normal running; recovery only chooses the record to go on from. An
//! attempt that never reached the journal was never promised to anybody and is forgotten.

use std::collections::BTreeMap;

use longhaul_core::ids::{Epoch, SiteName, VmName};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{Proposal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use longhaul_core::migration::recovery::{NextStep, Qemu};
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::mpsc;

use super::Daemon;
use super::machines::held;
use super::unknown::unknown;
use crate::history::{Known, Seen, Site, anchored, judge, shares_images};
use crate::hypervisor::{Guest, HypervisorError};
use crate::journal::History;
use crate::migration::anchor::{AnchorCommand, tell};
use crate::migration::source::SourceOptions;
use crate::migration::stay::{Stay, holds};
use crate::migration::{DestinationDriver, MachineRow, SourceDriver, chain};
use crate::tunnel::TunnelError;

/// Machines as the journal and the hypervisor know them, before anybody is given one. A monitor has one
/// client, so each QEMU is looked for once and handed on.
type Found = BTreeMap<VmName, Taken>;

/// A machine's row and its QEMU.
struct Taken {
    row: MachineRow,
    guest: Option<Guest>,
    /// Why its QEMU, which is there, could not be asked.
    silent: Option<HypervisorError>,
}

impl Taken {
    async fn seen(&self) -> Seen {
        if self.silent.is_some() { Qemu::Unknown.into() } else { seen(self.guest.as_ref()).await }
    }
}

impl Daemon {
    /// Folds the journal and goes on.
    pub(super) async fn recover(&mut self) -> anyhow::Result<()> {
        let mut found = Found::new();
        for (vm, row) in self.edges.journal.machines::<MachineRow>()? {
            let (guest, silent) = match self.look_for(&row).await {
                Ok(guest) => (guest, None),
                Err(error) => (None, Some(error)),
            };
            let held = held(&self.edges, &row);
            if let Some(held) = &held {
                tracing::error!(%vm, why = held.why, remedy = held.remedy, "machine is held");
            }
            let ours = matches!(self.edges.journal.ownership(&vm)?, Some(Ownership::Here { .. }));
            // Before a driver works on them, so that it finds them known.
            if ours && held.is_none() {
                self.restore_network(&row).await;
            }
            found.insert(vm, Taken { row, guest, silent });
        }
        for lost in unknown(&self.edges)? {
            let (vm, held) = (&lost.note.vm, lost.held());
            tracing::error!(%vm, why = held.why, remedy = held.remedy, "machine is held");
        }
        let histories = self.edges.journal.histories()?;
        for history in &histories {
            let Some(last) = history.entries.last().map(|entry| entry.record.clone()) else { continue };
            match last {
                Record::Source(last) => self.recover_source(history, &histories, last, &found).await,
                Record::Destination(last) => {
                    self.recover_destination(history, &histories, last, &found).await;
                }
            }
        }
        for (vm, Taken { row, guest, silent }) in found {
            if matches!(self.edges.journal.ownership(&vm)?, Some(Ownership::Here { .. })) {
                tracing::info!(%vm, runs = guest.is_some(), "machine taken up");
                self.take_up(row, silent.map_or(Ok(guest), Err));
            }
        }
        Ok(())
    }

    async fn recover_source(
        &mut self,
        history: &History,
        all: &[History],
        last: SourceRecord,
        found: &Found,
    ) {
        let attempt = history.attempt.clone();
        let Some((proposal, reservation, without_dns)) = source_facts(&history.entries) else { return };
        let Some(taken) = found.get(&attempt.vm) else { return };
        let owner = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        let (seen, anchor) = (taken.seen().await, self.anchored(&attempt.vm));
        let (row, guest) = (taken.row.clone(), taken.guest.clone());
        let site = Some(self.site());
        let shares_images = shares_images(&attempt.vm, found.iter().map(|(vm, taken)| (vm, &taken.row)));
        let known = Known { owner: owner.as_ref(), row: Some(&row), shares_images, seen, anchor, site };
        let Some(step) = judge(history, all, &known) else { return };
        if step == NextStep::Hold {
            return;
        }
        let left = matches!(&owner, Some(Ownership::Away { epoch, .. }) if *epoch == attempt.epoch);
        if matches!(last, SourceRecord::Released) && left {
            // The name is owed whether or not a guest is left to end: the anchor may have been told, and
            // have died before it wrote that down.
            tell(&self.anchors, AnchorCommand::MoveNames(attempt.vm.clone())).await;
        }
        if !step.is_owed() {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        if row.visits(self.edges.site()) && !matches!(owner, Some(Ownership::Here { .. })) {
            self.restore_visit(&row).await;
        }
        let (inbox, outbox) = mpsc::channel(64);
        let options = SourceOptions { without_dns, ..SourceOptions::default() };
        let anchors = self.anchors.clone();
        let row = MachineRow { wanted: proposal.running, ..row };
        let driver =
            SourceDriver::new(self.edges.clone(), attempt.clone(), guest, row, options, outbox, anchors);
        let (viewer, guest) = (driver.viewer(), driver.guest());
        self.watches.inherit(attempt.id);
        self.spawn(
            attempt,
            inbox,
            viewer,
            guest,
            async move { driver.resume(reservation, last).await.err() },
        );
    }

    async fn recover_destination(
        &mut self,
        history: &History,
        all: &[History],
        last: DestinationRecord,
        found: &Found,
    ) {
        let attempt = history.attempt.clone();
        let Some((proposal, reservation)) = destination_facts(&history.entries) else { return };
        let taken = found.get(&attempt.vm);
        let known = taken.and_then(|taken| taken.guest.clone());
        // Before it was written down, a machine that comes is known to the hypervisor only.
        let (guest, qemu) = match known {
            Some(guest) => (Some(guest.clone()), qemu(Some(&guest)).await),
            None => match self.edges.hypervisor.find(&attempt.vm).await {
                Ok(guest) => (guest.clone(), qemu(guest.as_ref()).await),
                Err(error) => {
                    tracing::warn!(vm = %attempt.vm, error = chain(&error), "QEMU cannot be asked");
                    (None, Qemu::Unknown)
                }
            },
        };
        let owner = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        let (anchor, site) = (self.anchored(&attempt.vm), Some(self.site()));
        let row = taken.map(|taken| &taken.row);
        let (owner, seen) = (owner.as_ref(), qemu.into());
        let known = Known { owner, row, shares_images: false, seen, anchor, site };
        let Some(step) = judge(history, all, &known) else { return };
        if step == NextStep::Hold {
            tracing::error!(vm = %attempt.vm, id = %attempt.id, text = step.text(&attempt.vm, &attempt.peer), "machine is held");
        }
        if matches!(step, NextStep::AwaitSource | NextStep::AskArbiter | NextStep::Take) {
            self.prepare_rules(&attempt.peer, &proposal, &reservation).await;
        }
        if !step.is_owed() {
            return;
        }
        tracing::warn!(vm = %attempt.vm, id = %attempt.id, record = last.name(), "migration interrupted, going on");
        let (inbox, outbox) = mpsc::channel(64);
        let anchors = self.anchors.clone();
        let driver = DestinationDriver::new(
            self.edges.clone(),
            attempt.clone(),
            proposal,
            reservation,
            outbox,
            anchors,
        );
        let (viewer, shown) = (driver.viewer(), driver.guest());
        let qemu_found = qemu != Qemu::Gone;
        let drive = async move { driver.resume(guest, qemu_found, last).await.err() };
        self.watches.inherit(attempt.id);
        self.spawn(attempt, inbox, viewer, shown, drive);
    }

    fn site(&self) -> Site<'_> {
        Site { name: self.edges.site(), pool: &self.edges.config.storage.pool }
    }

    fn anchored(&self, vm: &VmName) -> Option<Epoch> {
        anchored(&self.edges.journal, vm).unwrap_or_else(|error| {
            tracing::error!(%vm, error = chain(&error), "anchor could not be read");
            None
        })
    }

    /// Rules and samplers of a machine that runs here, before anybody can ask for anything new: its open
    /// connections stall for the gateway's absence, they do not die of it.
    async fn restore_network(&self, row: &MachineRow) {
        let restored = self.restore(row).await;
        if let Err(error) = restored {
            let error = chain(&error);
            tracing::error!(vm = %row.definition.name, error, "the machine's network could not be restored");
        }
    }

    /// Rules of a visitor that has been given away, or may come back: the tunnel forgot them with the gateway, and can take
    /// down only what it knows.
    async fn restore_visit(&self, row: &MachineRow) {
        if let Err(error) = Stay::of_row(&self.edges, row).restore(&self.edges).await {
            let error = chain(&error);
            tracing::warn!(vm = %row.definition.name, error, "the visitor's rules could not be taken up, and may be left behind");
        }
    }

    /// What a machine that may become ours any moment will need: the tunnel forgot it with the gateway.
    async fn prepare_rules(&self, from: &SiteName, proposal: &Proposal, reservation: &Reservation) {
        let stay = Stay::of_arrival(&self.edges, from, proposal, reservation);
        if let Err(why) = stay.prepare_rules(&self.edges).await {
            tracing::error!(vm = %proposal.definition.name, %why, "the machine's network could not be restored");
        }
    }

    async fn restore(&self, row: &MachineRow) -> Result<(), TunnelError> {
        Stay::of_row(&self.edges, row).restore(&self.edges).await?;
        // A gateway that was killed in a pause has left the machine's addresses captured, whether or not its
        // successor has a rollback to do.
        for hold in holds(&self.edges, row, self.edges.site()).unwrap_or_default() {
            self.edges.tunnel.hold_undo(hold).await?;
        }
        match row.visits(self.edges.site()) {
            true => Ok(()),
            false => self.sample_at_home(row).await,
        }
    }

    async fn sample_at_home(&self, row: &MachineRow) -> Result<(), TunnelError> {
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
}

/// How a machine's QEMU stands, and whether it holds what an attempt made in it. One that cannot say is left alone: what is
/// in it may be others'.
pub(super) async fn seen(guest: Option<&Guest>) -> Seen {
    let qemu = qemu(guest).await;
    let Some(guest) = guest.filter(|_| matches!(qemu, Qemu::Runs | Qemu::StandsStill)) else {
        return qemu.into();
    };
    let held = guest.is_encumbered().await;
    let encumbered = held.unwrap_or_else(|error| {
        tracing::warn!(vm = %guest.name(), error = chain(&error), "QEMU does not say what it holds of a move; what is left there stays");
        false
    });
    Seen { qemu, encumbered }
}

/// How it stands.
async fn qemu(guest: Option<&Guest>) -> Qemu {
    let Some(guest) = guest else { return Qemu::Gone };
    match guest.status().await {
        Ok(state) if state.is_running() => Qemu::Runs,
        Ok(_) => Qemu::StandsStill,
        Err(_) => Qemu::Unknown,
    }
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
                | SourceRecord::TakenBack { .. }
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
            | DestinationRecord::TakenOver { .. }
            | DestinationRecord::Overruled
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::HandedBack { .. },
        )
        | Record::Source(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use longhaul_core::ids::MigrationId;
    use longhaul_core::migration::message::Refusal;
    use longhaul_core::migration::step::Step;
    use longhaul_core::migration::{Attempt, CommitMode};
    use serde_json::{Value, json};

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, machine_row, proposal};

    /// A QEMU whose guest runs, and which still exports its disk to a gateway that was killed.
    fn exporting(command: &str) -> Value {
        match command {
            "query-status" => json!({ "status": "running" }),
            "query-block-exports" => {
                json!([{ "id": "nbd-root", "node-name": "root", "shutting-down": false }])
            }
            "query-block-jobs" | "query-named-block-nodes" => json!([]),
            _ => json!({}),
        }
    }

    /// What a QEMU is asked for by a gateway that begins with an attempt that came so far, until its NBD server is stopped.
    async fn undone(last: SourceRecord) -> Vec<String> {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (edges, row) = (site.edges.clone(), machine_row(&site.edges));
        let (vm, peer) = (row.definition.name.clone(), "b".parse::<SiteName>().unwrap());
        edges.journal.define(&vm, &Ownership::Here { epoch: Epoch(0) }).unwrap();
        let proposal = proposal(row.definition.clone());
        let (id, epoch, commit) = (MigrationId(1), Epoch(1), CommitMode::Confirmed);
        let attempt = Attempt { id, vm: vm.clone(), peer: peer.clone(), epoch, commit };
        let reserved = SourceRecord::Reserved { peer, proposal: Box::new(proposal), without_names: false };
        for record in [reserved, last.clone()] {
            let step = Step::<()>::record(Record::Source(record), Vec::new());
            edges.journal.commit(&attempt, step).await.unwrap();
        }
        let (guest, mut asked) = Guest::answered_by(exporting).await;
        let found = Found::from([(vm, Taken { row, guest: Some(guest), silent: None })]);
        let histories = edges.journal.histories().unwrap();
        Daemon::idle(edges).recover_source(&histories[0], &histories, last, &found).await;
        let ended = asked.wait_for(|asked| asked.iter().any(|command| command == "nbd-server-stop"));
        tokio::time::timeout(Duration::from_secs(60), ended).await.expect("in time").unwrap().clone()
    }

    #[tokio::test]
    async fn what_an_attempt_left_in_a_qemu_is_taken_away_although_its_guest_runs() {
        let reservation =
            Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None };
        let copying = SourceRecord::PreCopy { reservation };
        for last in [SourceRecord::Aborted { why: Refusal::PauseBudget }, copying] {
            let asked = undone(last).await;
            for command in ["migrate-set-parameters", "block-export-del"] {
                assert!(asked.iter().any(|it| it == command), "{command} is not among {asked:?}");
            }
        }
    }

    #[test]
    fn a_move_that_was_begun_without_names_goes_on_without_them() {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            dns_name = \"web1.vm.example\"\n[[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n";
        let proposal = proposal(toml::from_str(definition).unwrap());
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
