//! `longhaul resolve`: an operator decides for a peer that is gone for good, and what a peer hears that comes back.
//!
//! What may be decided is the core's; that the peer cannot be asked is looked at here.

use std::time::Duration;

use longhaul_core::ids::{MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::{MigrationMessage, Refusal};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::resolve::{CannotResolve, Keep, resolution};
use longhaul_core::migration::step::Step;

use super::Daemon;
use super::machines::leave_network;
use crate::api::types::ResolveRequest;
use crate::api::{Reply, RequestError};
use crate::journal::History;
use crate::migration::{Edges, Inbound, chain, keep_aside};

/// A record is written in milliseconds, on a busy disk in seconds.
const WRITTEN_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);

impl Daemon {
    /// Decides a move that waits for a peer's word, and answers when that is on disk.
    pub(super) async fn resolve(&self, vm: &VmName, request: &ResolveRequest, reply: Reply<()>) {
        match self.decide(vm, request).await {
            Ok(waits) => {
                let edges = self.edges.clone();
                tokio::spawn(async move { drop(reply.send(is_written(&edges, &waits).await)) });
            }
            // An asker that went away needs no answer.
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    async fn decide(&self, vm: &VmName, request: &ResolveRequest) -> Result<Waits, RequestError> {
        let nothing = || RequestError::Conflict(CannotResolve::NothingWaits(vm.clone()).to_string());
        // Not one that has ended for this site and still has to tell the other.
        let running = self.migration_of(vm).ok_or_else(nothing)?;
        let (attempt, inbox) = (&running.attempt, running.inbox.as_ref().ok_or_else(nothing)?);
        let reached = self.edges.peer(&attempt.peer).is_some_and(|peer| peer.is_up());
        let entries =
            self.edges.journal.entries(attempt.id).map_err(|error| RequestError::Failed(chain(&error)))?;
        let last = &entries.last().ok_or_else(nothing)?.record;
        let resolution =
            resolution(last, request.keep, request.destroyed.as_ref(), vm, &attempt.peer, reached)
                .map_err(|why| RequestError::Conflict(why.to_string()))?;
        tracing::warn!(%vm, peer = %attempt.peer, keep = ?request.keep, "an operator decides for the other site");
        inbox.send(Inbound::Resolve(resolution)).await.map_err(|_| nothing())?;
        Ok(Waits { attempt: attempt.clone(), records: entries.len(), keep: request.keep })
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
        let is_its = |history: &&History| history.attempt.id == id && history.attempt.peer == *peer;
        let Some(history) = histories.iter().find(is_its) else { return };
        let attempt = &history.attempt;
        let owner = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        match follows(history, &histories, owner.as_ref(), self.edges.site()) {
            Follows::Nothing => {}
            Follows::PutAside => self.put_aside_overruled(attempt).await,
            Follows::Overrule if self.may_run_here(&attempt.vm) => {
                self.report_second_copy(attempt, self.edges.site());
            }
            Follows::Overrule => self.overrule(attempt).await,
            Follows::SecondCopy { at } => self.report_second_copy(attempt, &at),
        }
    }

    /// The machine is at site `at` as well: only people can decide whose it is. The site that took it back hears that it was
    /// activated here, and reports it too.
    fn report_second_copy(&self, attempt: &Attempt, at: &SiteName) {
        let (vm, peer) = (&attempt.vm, &attempt.peer);
        tracing::error!(%vm, taken_back_at = %peer, also_at = %at, "an operator took the machine back at another site, and it is at this or a third one too: end one of the two copies at once, and forget it there");
        self.notice(attempt.id, two_copies(vm, peer, at));
        self.edges.send(peer, attempt.id, &MigrationMessage::Activated { epoch: attempt.epoch });
    }

    /// A site from which an operator took a machine back says that it has run it, and that it cannot give it up.
    pub(super) fn on_second_copy(&self, id: MigrationId, peer: &SiteName) {
        let journal = &self.edges.journal;
        let attempt = journal.attempt(id).unwrap_or_default().filter(|attempt| attempt.peer == *peer);
        let Some(Attempt { vm, .. }) = attempt else { return };
        let entries = journal.entries(id).unwrap_or_default();
        let last = entries.last().map(|entry| &entry.record);
        let taken = matches!(last, Some(Record::Source(SourceRecord::TakenBack { .. })));
        // One that was forgotten here is no second copy.
        if !taken || matches!(journal.ownership(&vm), Ok(None)) {
            return;
        }
        tracing::error!(%vm, %peer, "an operator took the machine back here, and the other site runs it or has moved it on, as its log says: end one of the two copies at once, and forget it there");
        self.notice(id, two_copies(&vm, self.edges.site(), peer));
    }

    /// Shown with the migration, as long as that is shown.
    fn notice(&self, id: MigrationId, text: String) {
        if let Some(running) = self.migrations.get(&id) {
            running.viewer.notice_once(text);
        }
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

/// A move that was decided, and how many records it had before that.
struct Waits {
    attempt: Attempt,
    records: usize,
    keep: Keep,
}

/// A gateway that dies before the record is durable has decided nothing, whatever was destroyed for it.
async fn is_written(edges: &Edges, waits: &Waits) -> Result<(), RequestError> {
    let began = tokio::time::Instant::now();
    while began.elapsed() < WRITTEN_LIMIT {
        let entries = edges.journal.entries(waits.attempt.id);
        let entries = entries.map_err(|error| RequestError::Failed(chain(&error)))?;
        match entries.get(waits.records).map(|entry| &entry.record) {
            Some(record) if is_word(record, waits.keep) => return Ok(()),
            Some(record) => {
                let text = format!("Meanwhile something else was decided: {}", record.name());
                return Err(RequestError::Conflict(text));
            }
            None => tokio::time::sleep(LOOK).await,
        }
    }
    let (vm, peer) = (&waits.attempt.vm, &waits.attempt.peer);
    Err(RequestError::Failed(format!(
        "Nothing is written down. Site {peer} may not have said that it knows nothing of the move; `longhaul journal {vm}` says how it stands"
    )))
}

/// The record is what an operator's word becomes.
fn is_word(record: &Record, keep: Keep) -> bool {
    match record {
        Record::Source(SourceRecord::TakenBack { .. })
        | Record::Destination(DestinationRecord::TakenOver { .. }) => keep == Keep::Here,
        Record::Source(SourceRecord::Released)
        | Record::Destination(DestinationRecord::Refused { why: Refusal::Operator }) => keep == Keep::There,
        Record::Source(_) | Record::Destination(_) => false,
    }
}

/// What follows from a peer's word that an operator took a machine back there.
#[derive(Debug, PartialEq, Eq)]
enum Follows {
    Nothing,
    /// It was overruled; what is left is to be sure that its disks are put aside.
    PutAside,
    /// It is ours, and is not any more.
    Overrule,
    /// It went on from here, or has been here again: another copy is at that site, as far as is known here.
    SecondCopy {
        at: SiteName,
    },
}

/// The same, of the migration that brought the machine `here`.
fn follows(history: &History, all: &[History], owner: Option<&Ownership>, here: &SiteName) -> Follows {
    let attempt = &history.attempt;
    let last = history.entries.last().map(|entry| &entry.record);
    if matches!(last, Some(Record::Destination(DestinationRecord::Overruled))) {
        return Follows::PutAside;
    }
    let activated = matches!(
        last,
        Some(Record::Destination(DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }))
    );
    // Or it has changed hands between the two sites since, so that whose it is was settled.
    if !activated || all.iter().any(|other| is_later(other, attempt) && is_handed_over(other)) {
        return Follows::Nothing;
    }
    match owner {
        Some(Ownership::Here { epoch }) if *epoch == attempt.epoch => Follows::Overrule,
        Some(Ownership::Here { epoch }) if *epoch > attempt.epoch => Follows::SecondCopy { at: here.clone() },
        Some(Ownership::Away { site, epoch } | Ownership::Offered { site, epoch })
            if *epoch > attempt.epoch =>
        {
            Follows::SecondCopy { at: site.clone() }
        }
        // An older journal, or one that has forgotten it.
        Some(
            Ownership::Here { .. }
            | Ownership::Away { .. }
            | Ownership::Offered { .. }
            | Ownership::Arriving { .. },
        )
        | None => Follows::Nothing,
    }
}

fn is_later(other: &History, attempt: &Attempt) -> bool {
    let other = &other.attempt;
    other.vm == attempt.vm && other.peer == attempt.peer && other.epoch > attempt.epoch
}

fn is_handed_over(history: &History) -> bool {
    let last = history.entries.last().map(|entry| &entry.record);
    matches!(
        last,
        Some(
            Record::Source(SourceRecord::Released)
                | Record::Destination(
                    DestinationRecord::Activated { .. }
                        | DestinationRecord::TakenOver { .. }
                        | DestinationRecord::Overruled
                )
        )
    )
}

fn two_copies(vm: &VmName, taken_back_at: &SiteName, at: &SiteName) -> String {
    format!(
        "An operator took {vm} back at site {taken_back_at}, and site {at} runs it too or has moved it on: see that only \
         one copy runs, and forget the other at its site (`longhaul vm undefine {vm}`)"
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::message::{Handover, Proposal, Reservation};
    use tokio::sync::watch;

    use super::*;
    use crate::daemon::{Machine, Running};
    use crate::generation::read_note;
    use crate::identity::Identity;
    use crate::migration::view::Viewer;
    use crate::migration::{MachineRow, kept};
    use crate::test_site::{TestSite, definition, machine_row};

    fn attempt(peer: &str) -> Attempt {
        let (id, vm) = (MigrationId(7), "web1".parse().unwrap());
        Attempt { id, vm, peer: peer.parse().unwrap(), epoch: Epoch(5), commit: CommitMode::Confirmed }
    }

    fn proposal() -> Proposal {
        Proposal {
            definition: definition(),
            home_site: "a".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(4),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
            carried: Vec::new(),
        }
    }

    /// The machine has come to this site from a in epoch 5, and its QEMU is gone.
    async fn visited(site: &TestSite) -> (Daemon, PathBuf) {
        let reservation =
            Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None };
        let (peer, proposal) = ("a".parse().unwrap(), Box::new(proposal()));
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
        daemon.machines.insert(vm, Machine { row, guest: None, silent: false });
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

    fn away(epoch: u64) -> Ownership {
        Ownership::Away { site: "c".parse().unwrap(), epoch: Epoch(epoch) }
    }

    #[tokio::test]
    async fn a_machine_that_was_moved_on_before_it_was_taken_back_is_reported_to_both_sites() {
        let (mut a, b) = TestSite::pair().await;
        let (mut at_b, image) = visited(&b).await;
        let vm = attempt("a").vm;
        b.edges.journal.define(&vm, &away(6)).unwrap();
        at_b.on_taken_back(MigrationId(7), a.edges.site()).await;
        let (id, heard) = a.heard_of_migration().await;
        assert_eq!((id, &heard), (MigrationId(7), &MigrationMessage::Activated { epoch: Epoch(5) }));
        assert!(
            image.exists() && b.asked.borrow().is_empty(),
            "only people know which copy is the right one"
        );

        let mut at_a = Daemon::idle(a.edges.clone());
        let viewer = taken_back(&a, &mut at_a).await;
        let message = heard.to_wire(id).unwrap();
        at_a.on_message("b".parse().unwrap(), message.clone()).await;
        assert!(viewer.current().notices.is_empty(), "forgotten here");
        a.edges.journal.define(&vm, &Ownership::Here { epoch: Epoch(6) }).unwrap();
        at_a.on_message("b".parse().unwrap(), message).await;
        let notices = viewer.current().notices;
        assert!(notices.len() == 1 && notices[0].contains("at site a, and site b runs"), "{notices:?}");
    }

    #[tokio::test]
    async fn what_waits_is_resolved_and_not_an_attempt_that_has_ended_and_has_still_to_tell_its_peer() {
        let (a, _b) = TestSite::pair().await;
        let mut daemon = Daemon::idle(a.edges.clone());
        let peer: SiteName = "b".parse().unwrap();
        let records = [
            SourceRecord::Reserved {
                peer: peer.clone(),
                proposal: Box::new(proposal()),
                without_names: false,
            },
            SourceRecord::PreCopy {
                reservation: Reservation {
                    care_of: Vec::new(),
                    shadow_pages: 0,
                    disk_window_log: 20,
                    memory_base: None,
                },
            },
            SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) },
        ];
        let waits = attempt("b");
        for record in records {
            let step = Step::record(Record::Source(record), vec![()]);
            a.edges.journal.commit(&waits, step).await.unwrap();
        }
        let mut inboxes = Vec::new();
        // Whichever comes first by its number.
        for id in [MigrationId(1), waits.id, MigrationId(9)] {
            let attempt = Attempt { id, ..waits.clone() };
            let viewer = Viewer::new(&attempt, a.edges.site(), &peer);
            if id != waits.id {
                viewer.end(crate::api::types::Progressing::Stayed, None);
            }
            let (inbox, outbox) = tokio::sync::mpsc::channel(1);
            inboxes.push((id, outbox));
            let (request, limit_mbit, inbox, guest) = (None, None, Some(inbox), None);
            let running = Running { attempt, request, limit_mbit, inbox, viewer, guest };
            daemon.migrations.insert(id, running);
        }
        let request = ResolveRequest { keep: Keep::There, destroyed: None };
        let decided = daemon.decide(&waits.vm, &request).await.unwrap();
        assert_eq!((decided.attempt.id, decided.records), (waits.id, 3));
        for (id, mut outbox) in inboxes {
            assert_eq!(outbox.try_recv().is_ok(), id == waits.id, "{id}");
        }
    }

    /// An operator took the machine back at this site, and forgot it.
    async fn taken_back(site: &TestSite, daemon: &mut Daemon) -> Viewer {
        let (attempt, peer) = (attempt("b"), "b".parse().unwrap());
        let reservation =
            Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None };
        for record in [
            SourceRecord::Reserved { peer, proposal: Box::new(proposal()), without_names: false },
            SourceRecord::PreCopy { reservation },
            SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) },
            SourceRecord::TakenBack { destroyed: "b".parse().unwrap() },
        ] {
            let step = Step::record(Record::Source(record), vec![()]);
            site.edges.journal.commit(&attempt, step).await.unwrap();
        }
        site.edges.journal.remove_machine(&attempt.vm).unwrap();
        let viewer = Viewer::new(&attempt, site.edges.site(), &attempt.peer);
        let (guest, id) = (watch::channel(None).1, attempt.id);
        let running = Running {
            attempt,
            request: None,
            limit_mbit: None,
            inbox: None,
            viewer: viewer.clone(),
            guest: Some(guest),
        };
        daemon.migrations.insert(id, running);
        viewer
    }

    #[tokio::test]
    async fn what_follows_depends_on_where_the_machine_went_and_on_what_the_sites_did_since() {
        let (b, here) =
            (TestSite::open("b", &Identity::generate().unwrap(), &[]).await, "b".parse().unwrap());
        drop(visited(&b).await);
        let brought = b.edges.journal.histories().unwrap().remove(0);
        let then = |all: &[History], owner: Option<Ownership>| follows(&brought, all, owner.as_ref(), &here);
        let ours = |epoch| Ownership::Here { epoch: Epoch(epoch) };
        let copy_at = |at: &str| Follows::SecondCopy { at: at.parse().unwrap() };
        assert_eq!(then(&[], Some(ours(5))), Follows::Overrule);
        assert_eq!(then(&[], Some(away(6))), copy_at("c"));
        assert_eq!(then(&[], Some(ours(7))), copy_at("b"), "it came here again");
        assert_eq!(then(&[], Some(away(4))), Follows::Nothing);
        assert_eq!(then(&[], None), Follows::Nothing);
        let mut again = brought.clone();
        (again.attempt.id, again.attempt.epoch) = (MigrationId(8), Epoch(9));
        assert_eq!(then(&[again.clone()], Some(away(10))), Follows::Nothing, "a has moved it here since");
        again.entries.truncate(1);
        assert_eq!(then(&[again], Some(away(10))), copy_at("c"), "a has only tried to");
    }
}
