//! Disks of machines that left, kept aside by their old name and `.moved-eN`: which there are, and which are due.
//!
//! Only what the journal knows as released is touched: the note beside the disk names a machine, and one of its
//! migrations ended with Released in that epoch. A disk without such a note is nobody's to delete.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::ids::{SiteName, VmName};
use longhaul_core::migration::record::{Record, SourceRecord};

use super::Daemon;
use crate::api::types::KeptView;
use crate::generation::{note_path, read_note};
use crate::journal::{History, unix_ms};
use crate::migration::MachineRow;

/// Between two looks.
pub(super) const DAILY: Duration = Duration::from_secs(24 * 3600);

impl Daemon {
    /// The disks that are kept now.
    pub(super) fn kept_disks(&self) -> Vec<KeptView> {
        let histories = self.edges.journal.histories().unwrap_or_default();
        let rows = self.edges.journal.machines::<MachineRow>().unwrap_or_default();
        let used: BTreeSet<PathBuf> = rows.into_iter().flat_map(|(_, row)| row.images).collect();
        let mut folders: BTreeSet<PathBuf> =
            used.iter().filter_map(|image| image.parent().map(Path::to_path_buf)).collect();
        folders.insert(self.edges.config.storage.pool.clone());
        let keep_d = self.edges.config.storage.keep_moved_disks_d;
        kept(&histories, &folders, &used, self.edges.site(), keep_d)
    }

    /// Deletes those whose time is over.
    pub(super) fn delete_due_disks(&self) {
        let now_ms = unix_ms();
        for disk in self.kept_disks().into_iter().filter(|disk| is_due(disk, now_ms)) {
            match std::fs::remove_file(&disk.path) {
                Ok(()) => {
                    tracing::info!(vm = %disk.vm, path = %disk.path.display(), "kept disk deleted");
                    // Without its disk the note says nothing.
                    drop(std::fs::remove_file(note_path(&disk.path)));
                }
                Err(error) => {
                    tracing::warn!(vm = %disk.vm, path = %disk.path.display(), %error, "kept disk could not be deleted");
                }
            }
        }
    }
}

fn is_due(disk: &KeptView, now_ms: u64) -> bool {
    disk.until_ms.is_some_and(|until_ms| until_ms <= now_ms)
}

fn kept(
    histories: &[History],
    folders: &BTreeSet<PathBuf>,
    used: &BTreeSet<PathBuf>,
    site: &SiteName,
    keep_d: u64,
) -> Vec<KeptView> {
    let released: BTreeMap<(VmName, u64), u64> = histories
        .iter()
        .filter_map(|history| {
            let last = history.entries.last()?;
            let released = matches!(last.record, Record::Source(SourceRecord::Released));
            released.then(|| ((history.attempt.vm.clone(), history.attempt.epoch.0), last.at_unix_ms))
        })
        .collect();
    let mut kept = Vec::new();
    for path in folders.iter().flat_map(|folder| files(folder)) {
        let Some(epoch) = moved_epoch(&path) else { continue };
        let Ok(Some(note)) = read_note(&path) else { continue };
        // Somebody made it a machine's disk again, or it is of another stay.
        if note.epoch.0 != epoch || note.owner == *site || used.contains(&path) {
            continue;
        }
        let Some(&since_ms) = released.get(&(note.vm.clone(), epoch)) else { continue };
        let until_ms = (keep_d > 0).then(|| since_ms + keep_d * DAILY.as_millis() as u64);
        let bytes = std::fs::metadata(&path).map_or(0, |about| about.len());
        kept.push(KeptView { vm: note.vm, path, bytes, since_ms, until_ms });
    }
    kept.sort_by(|one, other| one.path.cmp(&other.path));
    kept
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect()
}

/// The epoch in the name under which a disk is kept; see `migration::release`.
fn moved_epoch(path: &Path) -> Option<u64> {
    path.extension()?.to_str()?.strip_prefix("moved-e")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::{Epoch, MigrationId};
    use longhaul_core::migration::generation::Generation;
    use longhaul_core::migration::message::Refusal;
    use longhaul_core::migration::record::Entry;
    use longhaul_core::migration::{Attempt, CommitMode};

    use super::*;
    use crate::generation::write_notes;

    const DAY_MS: u64 = 24 * 3600 * 1000;

    fn history(epoch: u64, last: SourceRecord) -> History {
        let attempt = Attempt {
            id: MigrationId(epoch.into()),
            vm: "web1".parse().unwrap(),
            peer: "b".parse().unwrap(),
            epoch: Epoch(epoch),
            commit: CommitMode::Confirmed,
        };
        let (vm, record) = (attempt.vm.clone(), Record::Source(last));
        History { entries: vec![Entry { vm, epoch: attempt.epoch, at_unix_ms: 1000, record }], attempt }
    }

    fn disk(folder: &Path, epoch: u64, with_note: bool) -> PathBuf {
        let path = folder.join(format!("web1-{with_note}.raw.moved-e{epoch}"));
        std::fs::write(&path, "disk").unwrap();
        let note =
            Generation { vm: "web1".parse().unwrap(), epoch: Epoch(epoch), owner: "b".parse().unwrap() };
        if with_note {
            write_notes(std::slice::from_ref(&path), &note).unwrap();
        }
        path
    }

    fn look(histories: &[History], folder: &Path, used: &BTreeSet<PathBuf>, keep_d: u64) -> Vec<KeptView> {
        kept(histories, &[folder.to_owned()].into(), used, &"a".parse().unwrap(), keep_d)
    }

    #[test]
    fn only_disks_of_machines_that_were_released_are_kept_disks() {
        let folder = tempfile::tempdir().unwrap();
        let left = disk(folder.path(), 1, true);
        disk(folder.path(), 2, true);
        disk(folder.path(), 1, false);
        std::fs::write(folder.path().join("web1.raw"), "in use").unwrap();
        let aborted = SourceRecord::Aborted { why: Refusal::Operator };
        let histories = [history(1, SourceRecord::Released), history(2, aborted)];
        let found = look(&histories, folder.path(), &BTreeSet::new(), 30);
        let paths: Vec<_> = found.iter().map(|disk| &disk.path).collect();
        assert_eq!(paths, [&left]);
        assert!(
            look(&histories, folder.path(), &[left.clone()].into(), 30).is_empty(),
            "a machine's disk again"
        );
        let ours = |epoch, owner: &str| Generation {
            vm: "web1".parse().unwrap(),
            epoch: Epoch(epoch),
            owner: owner.parse().unwrap(),
        };
        for note in [ours(2, "b"), ours(1, "a")] {
            write_notes(std::slice::from_ref(&left), &note).unwrap();
            assert!(look(&histories, folder.path(), &BTreeSet::new(), 30).is_empty(), "{note:?}");
        }
    }

    #[test]
    fn a_kept_disk_is_due_when_its_days_are_over_and_never_with_zero() {
        let folder = tempfile::tempdir().unwrap();
        disk(folder.path(), 1, true);
        let histories = [history(1, SourceRecord::Released)];
        let found = |days| look(&histories, folder.path(), &BTreeSet::new(), days).remove(0);
        assert!(!is_due(&found(30), 1000 + 30 * DAY_MS - 1));
        assert!(is_due(&found(30), 1000 + 30 * DAY_MS));
        assert!(!is_due(&found(0), u64::MAX));
    }
}
