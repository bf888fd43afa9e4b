//! Disks of machines that left, kept aside by their old name and `.moved-eN`: which there are, which are superseded,
//! and which one a machine that comes back is compared with.
//!
//! Only what the journal knows as released is touched: the note beside the disk names a machine, and one of its
//! migrations ended with Released in that epoch, or with Overruled before it. A disk without such a note is nobody's to delete. Disks lie
//! anywhere, so that the journal has a row for each; those without one are found in the pool. When a disk's time is
//! over is not decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};

use longhaul_core::ids::{DeviceName, Epoch, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};

use super::{Edges, MachineRow, chain};
use crate::disk::Base;
use crate::generation::{note_path, read_note};
use crate::journal::History;

/// What the journal holds of a kept disk, by its path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptRow {
    /// The machine.
    pub vm: VmName,
    /// Its volume.
    pub volume: DeviceName,
    /// The epoch that began elsewhere when it left.
    pub epoch: Epoch,
    /// The user who owned the file when it was put aside.
    pub owner: u32,
}

/// A disk of a machine that left, as it was then.
#[derive(Debug, Clone)]
pub struct KeptDisk {
    /// The machine.
    pub vm: VmName,
    /// The epoch that began elsewhere when it left.
    pub epoch: Epoch,
    /// The file.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// When the machine was released, milliseconds since the UNIX epoch.
    pub since_ms: u64,
    /// Its row, if it has one: what is known of it besides.
    row: Option<KeptRow>,
}

/// The disks that are kept at this site, by their path.
pub fn list(edges: &Edges) -> Vec<KeptDisk> {
    let histories = edges.journal.histories().unwrap_or_default();
    let machines = edges.journal.machines::<MachineRow>().unwrap_or_default();
    let rows = edges.journal.kept_disks().unwrap_or_default();
    // Under every name that they may be found by.
    let images = machines.into_iter().flat_map(|(_, row)| row.images);
    let used: BTreeSet<PathBuf> =
        images.flat_map(|image| [fs::canonicalize(&image).ok(), Some(image)]).flatten().collect();
    let mut folders: BTreeSet<PathBuf> =
        used.iter().filter_map(|image| image.parent().map(Path::to_path_buf)).collect();
    folders.insert(edges.config.storage.pool.clone());
    kept(&histories, rows, &folders, &used, edges.site())
}

/// Writes down that a volume of a machine that left lies at `path` now. Where machines have users of their own it
/// becomes this gateway's: the next machine may have the same user. An adopted machine's stays its operator's.
pub(super) fn remember(edges: &Edges, attempt: &Attempt, volume: &DeviceName, path: &Path, adopted: bool) {
    let written = || -> Result<(), Box<dyn std::error::Error>> {
        let take = edges.config.hypervisor.uid_base != 0 && !adopted;
        let Some(owner) = owner(path, take)? else { return Ok(()) };
        let row = KeptRow { vm: attempt.vm.clone(), volume: volume.clone(), epoch: attempt.epoch, owner };
        Ok(edges.journal.put_kept_disk(path, &row)?)
    };
    if let Err(error) = written() {
        let path = path.display();
        tracing::warn!(vm = %attempt.vm, %path, error = chain(&*error), "kept disk not written down: a return copies it anew");
    }
}

/// Removes older disks of this machine's volumes, of which newer ones are kept.
pub(super) fn supersede(edges: &Edges, vm: &VmName) {
    for disk in superseded(&list(edges), vm, edges.config.storage.keep_moved_disks_count) {
        remove(edges, disk);
    }
}

/// Removes a kept disk, its note and its row.
pub fn remove(edges: &Edges, disk: &KeptDisk) {
    let (vm, path) = (&disk.vm, disk.path.display());
    match fs::remove_file(&disk.path) {
        Ok(()) => tracing::info!(%vm, %path, "kept disk deleted"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return tracing::warn!(%vm, %path, %error, "kept disk could not be deleted"),
    }
    // Without its disk the note says nothing.
    drop(fs::remove_file(note_path(&disk.path)));
    forget(edges, &disk.path);
}

/// Forgets the rows of disks that somebody else has removed.
pub fn forget_removed(edges: &Edges) {
    let rows: BTreeMap<PathBuf, KeptRow> = edges.journal.kept_disks().unwrap_or_default();
    for path in rows.into_keys() {
        // A folder that is not there may be a file system that is not mounted.
        if !path.exists() && path.parent().is_some_and(Path::is_dir) {
            forget(edges, &path);
        }
    }
}

/// Of these, the newest kept disk of this volume that can be read as a raw image of `size` bytes.
///
/// It is a base and not the new disk: it stays what it was, should the site that has the machine now be lost before
/// the machine runs here. A partial disk of an earlier attempt may lie beside it, and holds what was sent since.
pub(super) fn base_of(disks: &[KeptDisk], vm: &VmName, volume: &DeviceName, size: u64) -> Option<Base> {
    newest_first(disks, vm, volume).into_iter().find_map(|(disk, row)| {
        let path = disk.path.display();
        match Base::open(&disk.path, size, row.owner) {
            Ok(base) => {
                tracing::info!(%vm, disk = %volume, %path, "sending only what changed since it left");
                Some(base)
            }
            Err(error) => {
                tracing::info!(%vm, disk = %volume, %path, error = chain(&error), "kept disk is not used");
                None
            }
        }
    })
}

fn forget(edges: &Edges, path: &Path) {
    if let Err(error) = edges.journal.forget_kept_disk(path) {
        tracing::warn!(path = %path.display(), error = chain(&error), "kept disk could not be forgotten");
    }
}

/// The owner of a regular file, which is this process from now on if it is to `take` it; `None` for anything else.
fn owner(path: &Path, take: bool) -> io::Result<Option<u32>> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = match File::options().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    if take {
        fchown(&file, Some(geteuid().as_raw()), Some(getegid().as_raw()))?;
    }
    Ok(Some(file.metadata()?.uid()))
}

fn newest_first<'a>(
    disks: &'a [KeptDisk],
    vm: &VmName,
    volume: &DeviceName,
) -> Vec<(&'a KeptDisk, &'a KeptRow)> {
    let with_row = disks.iter().filter_map(|disk| Some((disk, disk.row.as_ref()?)));
    let mut found: Vec<_> = with_row.filter(|(_, row)| row.vm == *vm && row.volume == *volume).collect();
    found.sort_by_key(|(_, row)| std::cmp::Reverse(row.epoch));
    found
}

/// All but the newest `count` of each volume of the machine; 0 stands for no bound.
fn superseded<'a>(disks: &'a [KeptDisk], vm: &VmName, count: usize) -> Vec<&'a KeptDisk> {
    let rows = disks.iter().filter_map(|disk| disk.row.as_ref()).filter(|row| row.vm == *vm);
    let volumes: BTreeSet<&DeviceName> = rows.map(|row| &row.volume).collect();
    let older =
        volumes.into_iter().flat_map(|volume| newest_first(disks, vm, volume).into_iter().skip(count));
    if count == 0 { Vec::new() } else { older.map(|(disk, _)| disk).collect() }
}

fn kept(
    histories: &[History],
    mut rows: BTreeMap<PathBuf, KeptRow>,
    folders: &BTreeSet<PathBuf>,
    used: &BTreeSet<PathBuf>,
    site: &SiteName,
) -> Vec<KeptDisk> {
    let released: BTreeMap<(VmName, u64), u64> = histories
        .iter()
        .filter_map(|history| {
            let last = history.entries.last()?;
            let epoch = elsewhere(history.attempt.epoch, &last.record)?;
            Some(((history.attempt.vm.clone(), epoch.0), last.at_unix_ms))
        })
        .collect();
    let mut paths: BTreeSet<PathBuf> = folders.iter().flat_map(|folder| files(folder)).collect();
    paths.extend(rows.keys().filter(|path| path.is_file()).cloned());
    let look = |path: PathBuf| {
        let epoch = moved_epoch(&path)?;
        let note = read_note(&path).ok()??;
        // Somebody made it a machine's disk again, or it is of another stay.
        if note.epoch.0 != epoch || note.owner == *site || is_used(&path, used) {
            return None;
        }
        let since_ms = *released.get(&(note.vm.clone(), epoch))?;
        let bytes = fs::metadata(&path).map_or(0, |about| about.len());
        let row = rows.remove(&path).filter(|row| row.vm == note.vm && row.epoch == note.epoch);
        Some(KeptDisk { vm: note.vm, epoch: note.epoch, path, bytes, since_ms, row })
    };
    paths.into_iter().filter_map(look).collect()
}

fn is_used(path: &Path, used: &BTreeSet<PathBuf>) -> bool {
    used.contains(path) || fs::canonicalize(path).is_ok_and(|real| used.contains(&real))
}

/// The epoch that began elsewhere when a migration that would create `epoch` ended with `last` here.
fn elsewhere(epoch: Epoch, last: &Record) -> Option<Epoch> {
    match last {
        Record::Source(SourceRecord::Released) => Some(epoch),
        Record::Destination(DestinationRecord::Overruled) => Some(epoch.next()),
        Record::Source(
            SourceRecord::Reserved { .. }
            | SourceRecord::PreCopy { .. }
            | SourceRecord::Parked
            | SourceRecord::Committed { .. }
            | SourceRecord::Aborted { .. }
            | SourceRecord::Returned { .. }
            | SourceRecord::TakenBack { .. }
            | SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. }
            | SourceRecord::Settled,
        )
        | Record::Destination(
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Refused { .. }
            | DestinationRecord::TakenOver { .. }
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::HandedBack { .. },
        ) => None,
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect()
}

/// The epoch in the name under which a disk is kept; see `migration::release`.
fn moved_epoch(path: &Path) -> Option<u64> {
    path.extension()?.to_str()?.strip_prefix("moved-e")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::MigrationId;
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::generation::Generation;
    use longhaul_core::migration::message::Refusal;
    use longhaul_core::migration::record::Entry;

    use super::*;
    use crate::generation::write_notes;

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

    fn disk(folder: &Path, name: &str, epoch: u64, with_note: bool) -> PathBuf {
        let path = folder.join(format!("web1-{name}.raw.moved-e{epoch}"));
        fs::write(&path, "disk").unwrap();
        let note =
            Generation { vm: "web1".parse().unwrap(), epoch: Epoch(epoch), owner: "b".parse().unwrap() };
        if with_note {
            write_notes(std::slice::from_ref(&path), &note).unwrap();
        }
        path
    }

    fn row(volume: &str, epoch: u64) -> KeptRow {
        let (vm, volume) = ("web1".parse().unwrap(), volume.parse().unwrap());
        KeptRow { vm, volume, epoch: Epoch(epoch), owner: geteuid().as_raw() }
    }

    fn look(histories: &[History], folder: &Path, used: &BTreeSet<PathBuf>) -> Vec<PathBuf> {
        let folders = [folder.to_owned()].into();
        let found = kept(histories, BTreeMap::new(), &folders, used, &"a".parse().unwrap());
        found.into_iter().map(|disk| disk.path).collect()
    }

    #[test]
    fn only_disks_of_machines_that_were_released_are_kept_disks() {
        let folder = tempfile::tempdir().unwrap();
        let left = disk(folder.path(), "root", 1, true);
        disk(folder.path(), "root", 2, true);
        disk(folder.path(), "data", 1, false);
        fs::write(folder.path().join("web1.raw"), "in use").unwrap();
        let aborted = SourceRecord::Aborted { why: Refusal::Operator };
        let histories = [history(1, SourceRecord::Released), history(2, aborted)];
        assert_eq!(look(&histories, folder.path(), &BTreeSet::new()), std::slice::from_ref(&left));
        assert!(look(&histories, folder.path(), &[left.clone()].into()).is_empty(), "a machine's disk again");
        let ours = |epoch, owner: &str| Generation {
            vm: "web1".parse().unwrap(),
            epoch: Epoch(epoch),
            owner: owner.parse().unwrap(),
        };
        for note in [ours(2, "b"), ours(1, "a")] {
            write_notes(std::slice::from_ref(&left), &note).unwrap();
            assert!(look(&histories, folder.path(), &BTreeSet::new()).is_empty(), "{note:?}");
        }
    }

    /// Two volumes at home, outside the pool, and one of two stays in it.
    fn stays(pool: &Path, home: &Path) -> Vec<KeptDisk> {
        let rows = BTreeMap::from([
            (disk(home, "root", 1, true), row("root", 1)),
            (disk(home, "data", 1, true), row("data", 1)),
            (disk(pool, "root", 3, true), row("root", 3)),
            (disk(pool, "data", 3, true), row("data", 3)),
            (disk(pool, "root", 5, true), row("root", 5)),
            (home.join("web1-root.raw.moved-e7"), row("root", 7)),
        ]);
        disk(pool, "old", 1, true);
        let histories = [1, 3, 5, 7].map(|epoch| history(epoch, SourceRecord::Released));
        kept(&histories, rows, &[pool.to_owned()].into(), &BTreeSet::new(), &"a".parse().unwrap())
    }

    #[test]
    fn disks_outside_the_pool_are_found_and_the_newest_of_a_volume_is_the_base() {
        let (pool, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let disks = stays(pool.path(), home.path());
        assert_eq!(disks.len(), 6, "{disks:?}");
        let epochs = |vm: &str, volume: &str| -> Vec<u64> {
            let found = newest_first(&disks, &vm.parse().unwrap(), &volume.parse().unwrap());
            found.iter().map(|(disk, _)| disk.epoch.0).collect()
        };
        assert_eq!(epochs("web1", "root"), [5, 3, 1]);
        assert_eq!(epochs("web1", "data"), [3, 1]);
        assert!(epochs("web2", "root").is_empty() && epochs("web1", "old").is_empty());
    }

    #[test]
    fn as_many_of_each_volume_as_configured_are_kept_and_the_newest_of_them() {
        let (pool, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let disks = stays(pool.path(), home.path());
        let gone = |vm: &str, count| -> Vec<String> {
            let found = superseded(&disks, &vm.parse().unwrap(), count);
            let name = |disk: &&KeptDisk| disk.path.file_name().unwrap().to_str().unwrap().to_owned();
            found.iter().map(name).collect()
        };
        let older = ["web1-data.raw.moved-e1", "web1-root.raw.moved-e3", "web1-root.raw.moved-e1"];
        assert_eq!(gone("web1", 1), older);
        assert_eq!(gone("web1", 2), ["web1-root.raw.moved-e1"]);
        assert!(gone("web1", 3).is_empty() && gone("web1", 0).is_empty() && gone("web2", 1).is_empty());
    }

    #[test]
    fn what_is_no_regular_file_has_no_owner_to_remember() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kept"), "disk").unwrap();
        std::os::unix::fs::symlink(path("kept"), path("link")).unwrap();
        assert_eq!(owner(&path("kept"), true).unwrap(), Some(geteuid().as_raw()));
        assert_eq!(owner(&path("absent"), true).unwrap(), None);
        assert_eq!(owner(folder.path(), false).unwrap(), None);
        assert!(owner(&path("link"), true).is_err());
    }
}
