//! Keeps a log file that QEMU appends to from growing without limit.
//!
//! QEMU opens the serial console's file for appending and never looks at its size. Cutting it to nothing
//! is safe under a writer that appends; what was in it goes to `NAME.1`, so that at most twice the limit
//! is kept, plus what the guest prints between two looks. A link in a log's place is never followed: what a
//! guest prints must not reach another file.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::units::Bytes;
use nix::libc::O_NOFOLLOW;

/// Moves what is in `path` to `path.1` if it is longer than `limit`, keeping the newest `limit` bytes.
/// A file that is not there is no error.
pub(super) fn trim(path: &Path, limit: Bytes) -> io::Result<bool> {
    let mut file = match File::options().read(true).write(true).custom_flags(O_NOFOLLOW).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let about = file.metadata()?;
    let length = about.len();
    if !about.is_file() || length <= limit.0 {
        return Ok(false);
    }
    file.seek(SeekFrom::Start(length - limit.0))?;
    let mut kept = new_file(&old_name(path))?;
    io::copy(&mut file.try_clone()?.take(limit.0), &mut kept)?;
    file.set_len(0)?;
    Ok(true)
}

fn old_name(path: &Path) -> PathBuf {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    PathBuf::from(old)
}

/// A file that was not there before, whatever stood in its place.
fn new_file(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// Looks at the logs in `dir` every ten seconds until it is aborted or the folder is gone.
pub(super) async fn keep_trimmed(dir: PathBuf, files: &'static [&'static str], limit: Bytes) {
    let mut look = tokio::time::interval(Duration::from_secs(10));
    while fs::exists(&dir).unwrap_or(false) {
        look.tick().await;
        for file in files {
            if let Err(error) = trim(&dir.join(file), limit) {
                tracing::debug!(%error, file, "log not trimmed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_at_its_limit_stays_and_one_byte_more_is_moved() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert!(!trim(&path, Bytes(8)).unwrap());
        let mut log = File::options().append(true).create(true).open(&path).unwrap();
        log.write_all(b"12345678").unwrap();
        assert!(!trim(&path, Bytes(8)).unwrap());
        log.write_all(b"9").unwrap();
        assert!(trim(&path, Bytes(8)).unwrap());
        log.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read(dir.path().join("console.log.1")).unwrap(), b"23456789");
    }

    #[test]
    fn a_link_in_a_logs_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("console.log"), dir.path().join("victim"));
        fs::write(&victim, "another's").unwrap();
        fs::write(&path, "123456789").unwrap();
        std::os::unix::fs::symlink(&victim, old_name(&path)).unwrap();
        assert!(trim(&path, Bytes(8)).unwrap());
        assert_eq!(fs::read(&victim).unwrap(), b"another's");
        assert_eq!(fs::read(old_name(&path)).unwrap(), b"23456789");

        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        assert!(trim(&path, Bytes(8)).is_err());
        assert_eq!(fs::read(&victim).unwrap(), b"another's");
    }
}
