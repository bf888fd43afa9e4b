//! Keeps a log file that QEMU appends to from growing without limit.
//!
//! QEMU opens the serial console's file for appending and never looks at its size. Cutting it to nothing
//! is safe under a writer that appends; what was in it goes to `NAME.1`, so that at most twice the limit
//! is kept, plus what the guest prints between two looks.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::units::Bytes;

/// Moves what is in `path` to `path.1` if it is longer than `limit`, keeping the newest `limit` bytes.
/// A file that is not there is no error.
pub(super) fn trim(path: &Path, limit: Bytes) -> io::Result<bool> {
    let mut file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    if length <= limit.0 {
        return Ok(false);
    }
    file.seek(SeekFrom::Start(length - limit.0))?;
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    let mut kept = File::create(PathBuf::from(old))?;
    io::copy(&mut file.try_clone()?.take(limit.0), &mut kept)?;
    file.set_len(0)?;
    Ok(true)
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
}
