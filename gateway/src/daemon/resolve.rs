//! `longhaul resolve`: an operator decides for a peer that is gone for good, and what a peer hears that comes back.
//!
//! What may be decided is the core's; that the peer cannot be asked is looked at here.

use longhaul_core::ids::{MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::resolve::{CannotResolve, resolution};
use longhaul_core::migration::step::Step;

use super::Daemon;
use super::machines::leave_network;
use crate::api::RequestError;
use crate::api::types::ResolveRequest;
use crate::migration::{Inbound, chain, keep_aside};

impl Daemon {
    /// Decides a move that waits for a peer's word.
    pub(super) async fn resolve(&self, vm: &VmName, request: &ResolveRequest) -> Result<(), RequestError> {
        let nothing = || RequestError::Conflict(CannotResolve::NothingWaits(vm.clone()).to_string());
        let waits =
            self.migrations.values().find(|running| running.attempt.vm == *vm && running.inbox.is_some());
        let running = waits.ok_or_else(nothing)?;
        let (attempt, inbox) = (&running.attempt, running.inbox.as_ref().ok_or_else(nothing)?);
        if self.edges.peer(&attempt.peer).is_some_and(|peer| peer.is_up()) {
            return Err(RequestError::Conflict(format!(
                "Site {} can be reached: the two gateways settle it themselves, and nobody need decide",
                attempt.peer
            )));
        }
        let entries =
            self.edges.journal.entries(attempt.id).map_err(|error| RequestError::Failed(chain(&error)))?;
        let last = &entries.last().ok_or_else(nothing)?.record;
        let resolution = resolution(last, request.keep, request.destroyed.as_ref(), vm, &attempt.peer)
            .map_err(|why| RequestError::Conflict(why.to_string()))?;
        tracing::warn!(%vm, peer = %attempt.peer, keep = ?request.keep, "an operator decides for the other site");
        inbox.send(Inbound::Resolve(resolution)).await.map_err(|_| nothing())
    }

    /// Tells a peer that came back what an operator took back from it.
    pub(super) fn tell_taken_back(&self, peer: &SiteName) {
        for history in self.edges.journal.histories().unwrap_or_default() {
            let last = history.entries.last().map(|entry| &entry.record);
            let taken = matches!(last, Some(Record::Source(SourceRecord::TakenBack { .. })));
            if taken && history.attempt.peer == *peer {
                let message = MigrationMessage::TakenBack { epoch: history.attempt.epoch.next() };
                self.edges.send(peer, history.attempt.id, &message);
            }
        }
    }

    /// The source says that an operator took a machine back while this site was gone.
    pub(super) async fn on_taken_back(&mut self, id: MigrationId, peer: &SiteName) {
        let histories = self.edges.journal.histories().unwrap_or_default();
        let Some(history) = histories.into_iter().find(|history| history.attempt.id == id) else { return };
        let attempt = history.attempt;
        let last = history.entries.last().map(|entry| &entry.record);
        let activated = matches!(
            last,
            Some(Record::Destination(
                DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }
            ))
        );
        if attempt.peer != *peer {
            return;
        }
        if matches!(last, Some(Record::Destination(DestinationRecord::Overruled))) {
            // Nothing is left to do, unless a gateway was killed right after that record.
            return self.put_aside_overruled(&attempt).await;
        }
        let still = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        if !activated || still != Some(Ownership::Here { epoch: attempt.epoch }) {
            return;
        }
        if self.may_run_here(&attempt.vm) {
            tracing::error!(vm = %attempt.vm, %peer, "an operator took the machine back at the other site, and it runs here too: end one of the two copies at once");
            return;
        }
        self.overrule(&attempt).await;
    }

    /// Its QEMU is here, whether it answers or not, or somebody is just starting one.
    fn may_run_here(&self, vm: &VmName) -> bool {
        let has_qemu = self.machines.get(vm).is_some_and(super::Machine::has_qemu);
        has_qemu
            || self.working.contains(vm)
            || self.edges.hypervisor.running().map_or(true, |running| running.contains(vm))
    }

    async fn overrule(&mut self, attempt: &Attempt) {
        let vm = &attempt.vm;
        self.forget_restart(vm);
        // First: an address that the ledger calls free is given to the next visitor.
        if let Some(row) = self.row(vm) {
            leave_network(&self.edges, &row).await;
        }
        let record = Record::Destination(DestinationRecord::Overruled);
        if let Err(error) = self.edges.journal.commit(attempt, Step::record(record, vec![()])).await {
            tracing::error!(%vm, error = chain(&error), "journal cannot be written");
            return;
        }
        tracing::warn!(%vm, peer = %attempt.peer, "an operator took the machine back at the other site; it does not start here any more, and its disks are kept aside");
        self.put_aside_overruled(attempt).await;
        self.refresh(vm, None).await;
    }

    /// Its disks get the name that those of a machine have which left: nobody starts them by hand unnoticed.
    async fn put_aside_overruled(&self, attempt: &Attempt) {
        let taken = Attempt { epoch: attempt.epoch.next(), ..attempt.clone() };
        let owner = self.edges.journal.ownership(&taken.vm).unwrap_or_default();
        if owner != Some(Ownership::Away { site: taken.peer.clone(), epoch: taken.epoch }) {
            return;
        }
        let Some(row) = self.row(&taken.vm) else { return };
        if row.images.iter().any(|image| image.exists()) && !self.may_run_here(&taken.vm) {
            keep_aside(&self.edges, &taken, &row, &row.images).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::message::{Handover, Proposal, Reservation};

    use super::*;
    use crate::daemon::Machine;
    use crate::generation::read_note;
    use crate::migration::{MachineRow, kept};
    use crate::test_site::{TestSite, definition, machine_row};

    fn attempt(peer: &str) -> Attempt {
        let (id, vm) = (MigrationId(7), "web1".parse().unwrap());
        Attempt { id, vm, peer: peer.parse().unwrap(), epoch: Epoch(5), commit: CommitMode::Confirmed }
    }

    /// The machine has come to this site from a in epoch 5, and its QEMU is gone.
    async fn visited(site: &TestSite) -> (Daemon, PathBuf) {
        let proposal = Proposal {
            definition: definition(),
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(4),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
            carried: Vec::new(),
        };
        let reservation = Reservation { care_of: Vec::new() };
        let (peer, proposal) = ("a".parse().unwrap(), Box::new(proposal));
        let handover = Box::new(Handover { nics: Vec::new() });
        for record in [
            DestinationRecord::Reserved { peer, proposal, reservation },
            DestinationRecord::Loaded,
            DestinationRecord::Activated { handover },
        ] {
            let step = Step::record(Record::Destination(record), vec![()]);
            site.edges.journal.commit(&attempt("a"), step).await.unwrap();
        }
        let image = site.pool().join("web1-root.00000000.raw");
        std::fs::write(&image, "disk").unwrap();
        let row = MachineRow {
            home_site: "a".parse().unwrap(),
            images: vec![image.clone()],
            ..machine_row(&site.edges)
        };
        let vm = attempt("a").vm;
        site.edges.journal.put_machine(&vm, &row).unwrap();
        let mut daemon = Daemon::idle(site.edges.clone());
        daemon.machines.insert(vm, Machine { row, guest: None });
        (daemon, image)
    }

    #[tokio::test]
    async fn what_was_taken_back_leaves_neither_its_network_nor_a_disk_under_its_own_name() {
        let (a, b) = TestSite::pair().await;
        let (mut daemon, image) = visited(&b).await;
        daemon.on_taken_back(MigrationId(7), a.edges.site()).await;
        let undone = ["visit_undo", "carry_undo", "sample_end", "remove_tap"];
        assert_eq!(*b.asked.borrow(), undone.map(|what| format!("{what} web1/lan")));
        let aside = PathBuf::from(format!("{}.moved-e6", image.display()));
        assert!(!image.exists() && aside.exists() && daemon.machines.is_empty());
        let note = read_note(&aside).unwrap().unwrap();
        assert_eq!((note.owner, note.epoch), ("a".parse().unwrap(), Epoch(6)));
        let kept: Vec<PathBuf> = kept::list(&b.edges).into_iter().map(|disk| disk.path).collect();
        assert_eq!(kept, std::slice::from_ref(&aside), "shown, and deleted when its days are over");
        // A gateway that was killed between the record and the disk hears of it again.
        std::fs::rename(&aside, &image).unwrap();
        daemon.on_taken_back(MigrationId(7), a.edges.site()).await;
        assert!(!image.exists() && aside.exists());
    }
}
