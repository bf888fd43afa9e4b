//! Disks and memory of machines that left: shown to operators, thrown away when they say so, and deleted when their days are
//! over. Which disks there are, and what may be touched, is `migration::kept`'s to say; memory is `migration::remembered`'s.

use std::time::Duration;

use longhaul_core::ids::VmName;

use super::Daemon;
use super::status::in_unix_ms;
use crate::api::RequestError;
use crate::api::types::{KeptMemoryView, KeptView};
use crate::journal::unix_ms;
use crate::migration::kept::{self, KeptDisk};
use crate::migration::remembered;

/// Between two looks.
pub(super) const DAILY: Duration = Duration::from_secs(24 * 3600);

impl Daemon {
    /// The disks that are kept now.
    pub(super) fn kept_disks(&self) -> Vec<KeptView> {
        let keep_d = self.edges.config.storage.keep_moved_disks_d;
        kept::list(&self.edges).into_iter().map(|disk| view(disk, keep_d)).collect()
    }

    /// The memory that is kept now.
    pub(super) fn kept_memory(&self) -> Vec<KeptMemoryView> {
        let keep_d = self.edges.config.storage.keep_moved_disks_d;
        let files = remembered::list(&self.edges).into_iter().map(|(vm, file)| {
            let since_ms = in_unix_ms(file.since);
            KeptMemoryView { vm, bytes: file.bytes, since_ms, until_ms: until_ms(since_ms, keep_d) }
        });
        files.collect()
    }

    /// Throws away what is kept of a machine that left, or whose way back it would make shorter: its memory and its disks.
    pub(super) fn discard_kept(&self, vm: &VmName) -> Result<(), RequestError> {
        // An arrival reads them.
        self.expect_idle(vm)?;
        let disks = || kept::list(&self.edges).into_iter().filter(|disk| disk.vm == *vm);
        let is_remembered = || self.edges.kept_memory(vm).exists();
        if disks().next().is_none() && !is_remembered() {
            let text = format!("Nothing of {vm} is kept here; `longhaul status` lists what is");
            return Err(RequestError::NotFound(text));
        }
        disks().for_each(|disk| kept::remove(&self.edges, &disk));
        remembered::forget(&self.edges, vm);
        match disks().next().is_none() && !is_remembered() {
            true => Ok(()),
            false => Err(RequestError::Failed(format!("Not all of {vm} could be removed; the log says why"))),
        }
    }

    /// Deletes those whose time is over.
    pub(super) fn delete_due_disks(&self) {
        let (now_ms, keep_d) = (unix_ms(), self.edges.config.storage.keep_moved_disks_d);
        let kept = kept::list(&self.edges);
        for disk in kept.iter().filter(|disk| is_due(disk.since_ms, keep_d, now_ms)) {
            kept::remove(&self.edges, disk);
        }
        kept::forget_removed(&self.edges);
        remembered::expire(&self.edges);
    }
}

fn view(disk: KeptDisk, keep_d: u64) -> KeptView {
    let until_ms = until_ms(disk.since_ms, keep_d);
    KeptView { vm: disk.vm, path: disk.path, bytes: disk.bytes, since_ms: disk.since_ms, until_ms }
}

fn until_ms(since_ms: u64, keep_d: u64) -> Option<u64> {
    (keep_d > 0).then(|| since_ms + keep_d * DAILY.as_millis() as u64)
}

fn is_due(since_ms: u64, keep_d: u64, now_ms: u64) -> bool {
    until_ms(since_ms, keep_d).is_some_and(|until_ms| until_ms <= now_ms)
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::{Epoch, MigrationId};
    use longhaul_core::migration::generation::Generation;
    use longhaul_core::migration::ledger::Ownership;
    use longhaul_core::migration::message::{Handover, Reservation};
    use longhaul_core::migration::record::{Record, SourceRecord};
    use longhaul_core::migration::step::Step;
    use longhaul_core::migration::{Attempt, CommitMode};
    use longhaul_core::wan::Remembered;
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::generation::write_notes;
    use crate::identity::Identity;
    use crate::migration::view::Viewer;
    use crate::test_site::{TestSite, definition, proposal};

    /// web1 has left for b, and its disk is kept.
    async fn left(site: &TestSite, attempt: &Attempt) {
        let proposal = proposal(definition());
        let reservation =
            Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None };
        let (journal, peer) = (&site.edges.journal, attempt.peer.clone());
        journal.define(&attempt.vm, &Ownership::Here { epoch: Epoch(0) }).unwrap();
        for record in [
            SourceRecord::Reserved { peer, proposal: Box::new(proposal), without_names: false },
            SourceRecord::PreCopy { reservation },
            SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) },
            SourceRecord::Released,
        ] {
            journal.commit(attempt, Step::<()>::record(Record::Source(record), Vec::new())).await.unwrap();
        }
        let disk = site.pool().join("web1-root.raw.moved-e1");
        std::fs::write(&disk, "disk").unwrap();
        let note = Generation { vm: attempt.vm.clone(), epoch: Epoch(1), owner: attempt.peer.clone() };
        write_notes(&[disk], &note).unwrap();
    }

    #[tokio::test]
    async fn what_is_kept_of_a_machine_is_shown_and_thrown_away_unless_it_moves() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (mut daemon, vm) = (Daemon::idle(site.edges.clone()), "web1".parse::<VmName>().unwrap());
        let (id, peer, epoch) = (MigrationId(1), "b".parse().unwrap(), Epoch(1));
        let attempt = Attempt { id, vm: vm.clone(), peer, epoch, commit: CommitMode::Confirmed };
        left(&site, &attempt).await;
        let path = site.edges.kept_memory(&vm);
        crate::memory::kept::begin(&path).unwrap().write(&Remembered::with_room(1), u64::MAX).unwrap();
        let (disks, memory) = (daemon.kept_disks(), daemon.kept_memory());
        assert_eq!((disks.len(), memory.len()), (1, 1));
        assert_eq!((&memory[0].vm, memory[0].bytes), (&vm, path.metadata().unwrap().len()));
        let viewer = Viewer::new(&attempt, &attempt.peer, site.edges.site());
        let (inbox, guest) = (mpsc::channel(1).0, watch::channel(None).1);
        daemon.spawn(attempt, inbox, viewer, guest, std::future::pending());
        assert!(daemon.discard_kept(&vm).is_err(), "it comes, and they are read");
        daemon.migrations.clear();
        daemon.discard_kept(&vm).unwrap();
        assert!(daemon.kept_disks().is_empty() && daemon.kept_memory().is_empty());
        assert!(!disks[0].path.exists() && !path.exists());
        assert!(matches!(daemon.discard_kept(&vm), Err(RequestError::NotFound(_))));
    }

    const DAY_MS: u64 = 24 * 3600 * 1000;

    #[test]
    fn a_kept_disk_is_due_when_its_days_are_over_and_never_with_zero() {
        assert!(!is_due(1000, 30, 1000 + 30 * DAY_MS - 1));
        assert!(is_due(1000, 30, 1000 + 30 * DAY_MS));
        assert!(!is_due(1000, 0, u64::MAX));
    }
}
