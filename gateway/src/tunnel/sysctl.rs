//! Kernel switches under `/proc/sys`, named by path because device names may contain dots.
//!
//! Written through `/proc/sys` and not through netlink: a unit that runs the gateway must not set
//! `ProtectKernelTunables=yes`. Which ones are written, and why, stands in `plan`. What they said before
//! is kept in a file as well, so that the gateway that follows one that crashed can put it back.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use tracing::warn;

use super::error::TunnelError;

/// The switches that are not as they were found, and what they said then.
#[derive(Debug)]
pub(super) struct Switches {
    file: Option<PathBuf>,
    before: BTreeMap<String, String>,
}

impl Switches {
    /// Reads what an earlier gateway has left in `file`, if any.
    pub(super) fn open(file: Option<PathBuf>) -> Self {
        let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        let before = lines.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Self { file, before }
    }

    /// Sets `key` (such as `net/ipv4/conf/br0/forwarding`) after having noted what it said. A key that
    /// this kernel does not have, or that has gone with its device, is skipped.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), TunnelError> {
        let Some(now) = read(key)? else { return Ok(()) };
        if !self.before.contains_key(key) {
            self.before.insert(key.to_owned(), now);
            self.save()?;
        }
        write(key, value)
    }

    /// Puts `key` back.
    pub(super) fn restore(&mut self, key: &str) -> Result<(), TunnelError> {
        let Some(value) = self.before.remove(key) else { return Ok(()) };
        write(key, &value)?;
        self.save()
    }

    /// The switches that are not as they were found.
    pub(super) fn keys(&self) -> Vec<String> {
        self.before.keys().cloned().collect()
    }

    fn save(&self) -> Result<(), TunnelError> {
        let Some(file) = &self.file else { return Ok(()) };
        if self.before.is_empty() {
            if let Err(error) = std::fs::remove_file(file) {
                warn!(file = %file.display(), %error, "list of sysctls not removed");
            }
            return Ok(());
        }
        let text: String = self.before.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
        let new = file.with_extension("new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, file))
            .map_err(TunnelError::io(format!("write {}; is its folder there?", file.display())))
    }
}

/// What `key` says now; `None` if this kernel has no such key.
pub(super) fn read(key: &str) -> Result<Option<String>, TunnelError> {
    match std::fs::read_to_string(path(key)) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TunnelError::io(format!("read sysctl {key}"))(error)),
    }
}

fn write(key: &str, value: &str) -> Result<(), TunnelError> {
    match std::fs::write(path(key), value) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TunnelError::io(format!("set sysctl {key} to {value}; is /proc/sys writable?"))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn path(key: &str) -> String {
    format!("/proc/sys/{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_by_the_next_one_and_a_missing_switch_is_skipped() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("switches");
        std::fs::write(&file, "net/no/such/switch 0\nnet/neither/this 1\n").unwrap();
        let mut switches = Switches::open(Some(file.clone()));
        switches.set("net/nor/that", "1").unwrap();
        assert_eq!(switches.keys(), ["net/neither/this", "net/no/such/switch"]);
        switches.restore("net/no/such/switch").unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "net/neither/this 1\n");
        switches.restore("net/neither/this").unwrap();
        assert!(!file.exists());
    }
}
