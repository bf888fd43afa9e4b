//! Disks that an attempt has left behind, kept for the next one.
//!
//! A partial disk is a file in the pool, named `MACHINE.DISK.SITE.ATTEMPT.partial` after what it is of and
//! where it came from. Names have no dots, so the file's name says all there is to know; what the disk
//! holds is found out by reading it. It is bounded in time, number and space, and never the only copy of
//! anything: the source has the machine. Whoever finds a file gone has been overtaken, and goes without.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_core::ids::{DeviceName, SiteName, VmName};
use longhaul_core::units::Bytes;

use crate::config::StorageConfig;

/// What the names of partial disks end with.
const SUFFIX: &str = "partial";

/// Which disk of which machine, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartialOf {
    /// The machine.
    pub vm: VmName,
    /// The disk in its definition.
    pub disk: DeviceName,
    /// The site that sent it.
    pub from: SiteName,
}

/// A disk that was kept.
#[derive(Debug, Clone)]
pub struct Partial {
    /// What it is of.
    pub of: PartialOf,
    /// The file.
    pub path: PathBuf,
    /// Its size as a disk.
    pub size: Bytes,
    /// The space it takes.
    pub taken: Bytes,
    /// When it was kept.
    pub since: SystemTime,
}

/// All partial disks of a pool, the oldest first.
pub fn list(pool: &Path) -> Vec<Partial> {
    let entries = std::fs::read_dir(pool).into_iter().flatten().flatten();
    let mut found: Vec<Partial> = entries.filter_map(|entry| look_at(entry.path())).collect();
    found.sort_by_key(|partial| partial.since);
    found
}

/// Makes the partial disk of `size` bytes the image of a new attempt; false if there is none.
pub(super) fn take(pool: &Path, of: &PartialOf, size: Bytes, image: &Path) -> io::Result<bool> {
    let known = list(pool).into_iter().rev().find(|partial| partial.of == *of && partial.size == size);
    let Some(partial) = known else { return Ok(false) };
    if image.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    match std::fs::rename(&partial.path, image) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Keeps an image that an attempt has left, or removes it where it is not worth keeping or there is no
/// room for it. Its QEMU is gone. An image that is gone already is no failure.
pub(super) fn keep(storage: &StorageConfig, of: &PartialOf, attempt: &str, image: &Path) -> io::Result<()> {
    let about = match std::fs::symlink_metadata(image) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if storage.keep_partial_h == 0 || about.blocks() == 0 || !about.is_file() {
        return std::fs::remove_file(image);
    }
    remove(list(&storage.pool).iter().filter(|older| older.of == *of));
    let path = storage.pool.join(format!("{}.{}.{}.{attempt}.{SUFFIX}", of.vm, of.disk, of.from));
    std::fs::rename(image, &path)?;
    // The user that QEMU ran as may be another machine's next time.
    chown(&path, Some(nix::unistd::geteuid().as_raw()), Some(nix::unistd::getegid().as_raw()))?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
    std::fs::File::options().write(true).open(&path)?.set_modified(SystemTime::now())?;
    sweep(storage);
    make_room(storage, Bytes(0), None);
    Ok(())
}

/// Removes what is too old, too many or too large.
pub fn sweep(storage: &StorageConfig) {
    let all = list(&storage.pool);
    let limit = Duration::from_secs(storage.keep_partial_h.saturating_mul(3600));
    let mut left = storage.keep_partial_gib.saturating_mul(1 << 30);
    let too_much = all.iter().rev().enumerate().filter(|(newer, partial)| {
        let old = partial.since.elapsed().is_ok_and(|age| age >= limit);
        let fits = left.checked_sub(partial.taken.0);
        left = fits.unwrap_or(0);
        old || fits.is_none() || *newer >= storage.keep_partial_count
    });
    remove(too_much.map(|(_, partial)| partial));
}

/// Removes the oldest until `wanted` fits beside what arrivals leave free. What is kept of `but` stays.
pub(super) fn make_room(storage: &StorageConfig, wanted: Bytes, but: Option<&VmName>) {
    let wanted = wanted.0.saturating_add(storage.keep_free_gib << 30);
    for partial in list(&storage.pool).iter().filter(|partial| Some(&partial.of.vm) != but) {
        match nix::sys::statvfs::statvfs(&storage.pool) {
            Ok(space) if space.blocks_available() * space.fragment_size() < wanted => remove([partial]),
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(%error, pool = %storage.pool.display(), "the pool cannot be looked at");
                return;
            }
        }
    }
}

/// The space that is kept for a machine from a site: its next attempt needs so much less.
pub(super) fn kept_for(pool: &Path, vm: &VmName, from: &SiteName) -> Bytes {
    let its = list(pool).into_iter().filter(|partial| partial.of.vm == *vm && partial.of.from == *from);
    Bytes(its.map(|partial| partial.taken.0).sum())
}

/// Removes everything that is kept of a machine; how many disks that were.
pub fn forget(pool: &Path, vm: &VmName) -> usize {
    let all = list(pool);
    let its = || all.iter().filter(|partial| partial.of.vm == *vm);
    remove(its());
    its().count()
}

fn remove<'a>(partials: impl IntoIterator<Item = &'a Partial>) {
    for partial in partials {
        let (vm, disk) = (&partial.of.vm, &partial.of.disk);
        match std::fs::remove_file(&partial.path) {
            Ok(()) => tracing::info!(%vm, %disk, "partial disk removed"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%vm, %disk, %error, "partial disk could not be removed"),
        }
    }
}

fn look_at(path: PathBuf) -> Option<Partial> {
    let of = parse(path.file_name()?)?;
    let about = std::fs::symlink_metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
    let since = about.modified().unwrap_or(UNIX_EPOCH);
    Some(Partial { of, path, size: Bytes(about.len()), taken: Bytes(about.blocks() * 512), since })
}

fn parse(name: &OsStr) -> Option<PartialOf> {
    let parts: Vec<&str> = name.to_str()?.split('.').collect();
    let [vm, disk, from, _attempt, SUFFIX] = parts[..] else { return None };
    Some(PartialOf { vm: vm.parse().ok()?, disk: disk.parse().ok()?, from: from.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(pool: &Path) -> StorageConfig {
        StorageConfig {
            pool: pool.to_owned(),
            keep_free_gib: 0,
            keep_moved_disks_d: 0,
            keep_moved_disks_count: 1,
            keep_partial_h: 24,
            keep_partial_count: 3,
            keep_partial_gib: 1,
            templates: None,
        }
    }

    fn of(vm: &str) -> PartialOf {
        PartialOf { vm: vm.parse().unwrap(), disk: "root".parse().unwrap(), from: "a".parse().unwrap() }
    }

    /// An image with some content, kept `age` seconds ago.
    fn kept(storage: &StorageConfig, vm: &str, attempt: &str, age: u64) {
        let image = storage.pool.join("image.raw");
        std::fs::write(&image, [7; 5000]).unwrap();
        keep(storage, &of(vm), attempt, &image).unwrap();
        assert!(!image.exists());
        let path = storage.pool.join(format!("{vm}.root.a.{attempt}.partial"));
        if let Ok(file) = std::fs::File::options().write(true).open(path) {
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
    }

    fn machines(storage: &StorageConfig) -> Vec<String> {
        list(&storage.pool).iter().map(|partial| partial.of.vm.to_string()).collect()
    }

    #[test]
    fn the_next_attempt_takes_what_the_last_one_left_and_only_that() {
        let pool = tempfile::tempdir().unwrap();
        let storage = storage(pool.path());
        kept(&storage, "web1", "11111111", 0);
        kept(&storage, "web1", "22222222", 0);
        assert_eq!(machines(&storage), ["web1"], "an older one of the same disk goes");
        assert!(kept_for(pool.path(), &of("web1").vm, &of("web1").from) >= Bytes(5000));
        let image = pool.path().join("web1-root.33333333.raw");
        let other = PartialOf { from: "c".parse().unwrap(), ..of("web1") };
        assert!(!take(pool.path(), &other, Bytes(5000), &image).unwrap());
        assert!(!take(pool.path(), &of("web1"), Bytes(5001), &image).unwrap());
        assert!(take(pool.path(), &of("web1"), Bytes(5000), &image).unwrap());
        assert_eq!(std::fs::read(&image).unwrap(), [7; 5000]);
        assert_eq!((machines(&storage).len(), forget(pool.path(), &of("web1").vm)), (0, 0));
    }

    #[test]
    fn what_is_old_goes_and_so_does_the_oldest_of_too_many() {
        let pool = tempfile::tempdir().unwrap();
        let storage = storage(pool.path());
        kept(&storage, "old", "1", 24 * 3600);
        for (age, vm) in ["d", "c", "b"].iter().enumerate() {
            kept(&storage, vm, "1", 10 - age as u64);
        }
        assert_eq!(machines(&storage), ["d", "c", "b"]);
        kept(&storage, "a", "1", 0);
        assert_eq!(machines(&storage), ["c", "b", "a"]);
        sweep(&StorageConfig { keep_partial_gib: 0, ..storage.clone() });
        assert!(machines(&storage).is_empty());
    }

    #[test]
    fn nothing_is_kept_that_is_not_wanted_or_empty() {
        let pool = tempfile::tempdir().unwrap();
        let storage = storage(pool.path());
        kept(&StorageConfig { keep_partial_h: 0, ..storage.clone() }, "web1", "1", 0);
        let image = pool.path().join("image.raw");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        keep(&storage, &of("web1"), "1", &image).unwrap();
        keep(&storage, &of("web1"), "1", &image).unwrap();
        assert!(!image.exists() && machines(&storage).is_empty());
    }

    #[test]
    fn an_arrival_gets_the_room_but_not_that_of_its_own_disks() {
        let pool = tempfile::tempdir().unwrap();
        let storage = storage(pool.path());
        kept(&storage, "web1", "1", 5);
        kept(&storage, "web2", "1", 0);
        make_room(&storage, Bytes(0), None);
        assert_eq!(machines(&storage), ["web1", "web2"]);
        make_room(&storage, Bytes(u64::MAX), Some(&of("web1").vm));
        assert_eq!(machines(&storage), ["web1"]);
    }

    #[test]
    fn other_files_of_the_pool_are_left_alone() {
        let pool = tempfile::tempdir().unwrap();
        for name in ["web1-root.1a2b3c4d.raw", "web1.root.a.partial", "x.y.z.1.raw", "..a.1.partial"] {
            std::fs::write(pool.path().join(name), "x").unwrap();
        }
        assert!(list(pool.path()).is_empty());
    }
}
