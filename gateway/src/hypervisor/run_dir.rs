//! A machine's folder: whose it is, what is in it, and what QEMU said there before it ended.
//!
//! The folder is the gateway's, and its group is the machine's: QEMU goes through it to its own folder inside
//! and cannot change it. A QEMU that a guest has broken out of can therefore not put a link where the
//! gateway, as root, opens a log, a pid file or a monitor.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use nix::libc::O_NOFOLLOW;
use nix::unistd::geteuid;

use super::command_line::{OWN_DIR, Placement};
use super::config::{HypervisorError, UidRange, files};

/// A user for the machine: the one its folder has, or one that no other machine's folder has.
pub(super) fn user_for(
    range: Option<UidRange>,
    vms: &Path,
    dir: &Path,
) -> Result<Option<(u32, u32)>, HypervisorError> {
    let Some(range) = range else { return Ok(None) };
    let ours = range.first..range.first.saturating_add(range.count);
    if let Some(group) = fs::metadata(dir).ok().map(|it| it.gid()).filter(|gid| ours.contains(gid)) {
        return Ok(Some((group, group)));
    }
    let entries = fs::read_dir(vms).map_err(files("list", vms))?;
    let taken: Vec<u32> = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.gid())).collect();
    let free = ours.clone().find(|uid| !taken.contains(uid));
    free.map(|uid| Some((uid, uid))).ok_or(HypervisorError::NoUid { count: range.count })
}

/// Makes a machine's folder, empty but for the logs of earlier runs, and QEMU's own folder in it.
pub(super) fn prepare_dir(dir: &Path, run_as: Option<(u32, u32)>) -> Result<(), HypervisorError> {
    let make = |path: &Path, mode| {
        DirBuilder::new().recursive(true).mode(mode).create(path).map_err(files("make the folder", path))
    };
    make(dir, 0o700)?;
    if let Some((_, gid)) = run_as {
        chown(dir, Some(geteuid().as_raw()), Some(gid)).map_err(files("take the folder", dir))?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o710)).map_err(files("open the folder", dir))?;
    for entry in fs::read_dir(dir).map_err(files("list", dir))? {
        let entry = entry.map_err(files("list", dir))?;
        let path = entry.path();
        let about = entry.metadata().map_err(files("read", &path))?;
        if about.is_dir() {
            fs::remove_dir_all(&path).map_err(files("remove", &path))?;
        } else if !is_log(&path, &about) {
            fs::remove_file(&path).map_err(files("remove", &path))?;
        }
    }
    let own = dir.join(OWN_DIR);
    make(&own, 0o700)?;
    match run_as {
        Some((uid, gid)) => chown(&own, Some(uid), Some(gid)).map_err(files("give away the folder", &own)),
        None => Ok(()),
    }
}

/// A log of the gateway's, and no link that only looks like one.
fn is_log(path: &Path, about: &Metadata) -> bool {
    let called = path.extension().is_some_and(|extension| extension == "log" || extension == "1");
    called && about.is_file() && about.nlink() == 1 && about.uid() == geteuid().as_raw()
}

/// Every disk is there.
pub(super) fn expect_disks(placement: &Placement) -> Result<(), HypervisorError> {
    for file in placement.disks.values() {
        fs::metadata(&file.path).map_err(files("use the disk", &file.path))?;
    }
    Ok(())
}

/// Gives regular files to the machine's user; QEMU opens them again when a migration ends.
pub(super) fn give_disks(placement: &Placement, run_as: Option<(u32, u32)>) -> Result<(), HypervisorError> {
    for file in placement.disks.values() {
        let about = fs::metadata(&file.path).map_err(files("use the disk", &file.path))?;
        if let Some((uid, gid)) = run_as.filter(|_| about.is_file()) {
            chown(&file.path, Some(uid), Some(gid)).map_err(files("give away", &file.path))?;
        }
    }
    Ok(())
}

/// The end of what QEMU printed, in one line.
pub(super) fn last_words(log: &Path) -> String {
    let tail = || -> io::Result<String> {
        let mut file = File::options().read(true).custom_flags(O_NOFOLLOW).open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(2048)))?;
        let mut tail = Vec::new();
        file.read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).trim().replace('\n', "; "))
    };
    tail().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_a_user_of_its_own_until_all_are_taken() {
        let vms = tempfile::tempdir().unwrap();
        let us = fs::metadata(vms.path()).unwrap().gid();
        let range = |first, count| Some(UidRange { first, count });
        let dir = vms.path().join("web1");
        assert_eq!(user_for(None, vms.path(), &dir).unwrap(), None);
        assert_eq!(user_for(range(us, 1), vms.path(), &dir).unwrap(), Some((us, us)));
        fs::create_dir(&dir).unwrap();
        assert_eq!(user_for(range(us, 1), vms.path(), &dir).unwrap(), Some((us, us)), "it keeps its own");
        let other = vms.path().join("web2");
        assert_eq!(user_for(range(us, 2), vms.path(), &other).unwrap(), Some((us + 1, us + 1)));
        assert!(matches!(
            user_for(range(us, 1), vms.path(), &other),
            Err(HypervisorError::NoUid { count: 1 })
        ));
    }

    #[test]
    fn only_logs_of_an_earlier_run_stay() {
        let vms = tempfile::tempdir().unwrap();
        let dir = vms.path().join("web1");
        prepare_dir(&dir, None).unwrap();
        for file in ["pid", "qmp.sock", "console.log", "console.log.1"] {
            fs::write(dir.join(file), "x").unwrap();
        }
        prepare_dir(&dir, None).unwrap();
        let mut left: Vec<_> = fs::read_dir(&dir).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["console.log", "console.log.1", "own"]);
    }

    #[test]
    fn a_link_that_is_called_like_a_log_does_not_stay_and_is_not_read() {
        let vms = tempfile::tempdir().unwrap();
        let (dir, victim) = (vms.path().join("web1"), vms.path().join("victim"));
        fs::write(&victim, "secret").unwrap();
        prepare_dir(&dir, None).unwrap();
        std::os::unix::fs::symlink(&victim, dir.join("qemu.log")).unwrap();
        fs::hard_link(&victim, dir.join("console.log")).unwrap();
        assert_eq!(last_words(&dir.join("qemu.log")), "");
        prepare_dir(&dir, None).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "only QEMU's own folder");
        assert_eq!(fs::read(&victim).unwrap(), b"secret");
    }

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        let file = super::super::command_line::DiskFile {
            path: "/nonexistent/root.raw".into(),
            format: super::super::DiskFormat::Raw,
        };
        let placement = Placement { disks: [("root".parse().unwrap(), file)].into(), ..Placement::default() };
        let error = expect_disks(&placement).unwrap_err().to_string();
        assert_eq!(error, "Cannot use the disk /nonexistent/root.raw");
    }
}
