//! Whether a process is the QEMU that it should be, and how it ends.
//!
//! A process id alone proves nothing, for ids are used again. A machine's QEMU is known by the pid file
//! that its command line names, which no other process has.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A QEMU that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QemuProcess {
    /// Its process id.
    pub pid: u32,
    /// When it was started, in clock ticks since boot: with the id it names a process for good.
    started: u64,
}

impl QemuProcess {
    /// The QEMU that wrote `pid_file`, if it still runs.
    pub fn find(pid_file: &Path) -> io::Result<Option<Self>> {
        let text = match std::fs::read_to_string(pid_file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(pid) = text.trim().parse() else { return Ok(None) };
        let wanted = pid_file.as_os_str().as_encoded_bytes();
        let Ok(arguments) = std::fs::read(format!("/proc/{pid}/cmdline")) else { return Ok(None) };
        if !arguments.split(|&byte| byte == 0).any(|argument| argument == wanted) {
            return Ok(None);
        }
        Ok(start_time(pid).map(|started| Self { pid, started }))
    }

    /// Whether it still runs. A process that ended and was not collected yet does not.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Ends it at once, as a power cut would. The guest's own writes that were acknowledged are on disk or
    /// in the host's cache.
    pub fn kill(self) -> io::Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL).map_err(io::Error::from)
    }

    /// Waits until it has ended, at most for `limit`; false if it still runs then.
    pub async fn ended(self, limit: Duration) -> bool {
        // A process that is not our child gives no notice of its end.
        let poll = async {
            while self.is_alive() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(limit, poll).await.is_ok()
    }
}

/// When a live process was started; `None` if there is none or it is a zombie. proc(5), `/proc/pid/stat`.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the command in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_that_names_another_process_finds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        assert_eq!(QemuProcess::find(&file).unwrap(), None);
        std::fs::write(&file, std::process::id().to_string()).unwrap();
        assert_eq!(QemuProcess::find(&file).unwrap(), None);
        std::fs::write(&file, "4194305\n").unwrap();
        assert_eq!(QemuProcess::find(&file).unwrap(), None);
        assert!(start_time(std::process::id()).is_some());
    }

    #[tokio::test]
    async fn a_zombie_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        std::fs::write(&file, child.id().to_string()).unwrap();
        let process = QemuProcess { pid: child.id(), started: start_time(child.id()).unwrap() };
        assert!(process.is_alive());
        process.kill().unwrap();
        assert!(process.ended(Duration::from_secs(5)).await);
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
