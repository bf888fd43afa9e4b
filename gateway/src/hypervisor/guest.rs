//! A handle on one machine that QEMU runs here: its state, and the commands that start and stop it.
//!
//! Dropping the handle leaves the machine alone. The methods are thin: each is one QMP command, or a
//! command and the wait for what it does. What order they are called in is decided elsewhere. Memory,
//! disks and mirrors have their methods in the files of those names.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::ids::{DeviceName, VmName};
use longhaul_core::migration::permit::RunPermit;
use serde::Deserialize;
use serde_json::json;

use super::process::QemuProcess;
use super::qmp::{Events, QmpClient, QmpError};

/// Between two looks at a state that QEMU tells no event of; the guest may stand still meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// QEMU's run state (`query-status`), by the names of `qapi/run-state.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// Started with `-S`, never resumed.
    Prelaunch,
    /// Waits for a machine that migrates here.
    Inmigrate,
    /// The guest runs.
    Running,
    /// Stopped by `stop`.
    Paused,
    /// Stopped for the last part of its migration.
    FinishMigrate,
    /// Stopped, its state sent away; with `query-migrate` it says whether successfully.
    Postmigrate,
    /// The guest has shut down.
    Shutdown,
    /// Stopped because a disk failed.
    IoError,
    /// Any other state, by its name.
    Other(String),
}

impl RunState {
    fn from_name(name: &str) -> Self {
        match name {
            "prelaunch" => Self::Prelaunch,
            "inmigrate" => Self::Inmigrate,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "finish-migrate" => Self::FinishMigrate,
            "postmigrate" => Self::Postmigrate,
            "shutdown" => Self::Shutdown,
            "io-error" => Self::IoError,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether the guest's processors run.
    pub fn is_running(&self) -> bool {
        *self == Self::Running
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::IoError => "io-error",
            Self::Other(name) => name,
        })
    }
}

/// How QEMU calls a volume of the definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeNode {
    /// The block node that the guest's requests go to.
    pub node: String,
    /// The QOM path of the device, if the guest has the volume as a disk.
    pub device: Option<String>,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A machine that QEMU runs here. Clones are handles on the same machine.
#[derive(Debug, Clone)]
pub struct Guest {
    pub(super) name: VmName,
    pub(super) qmp: QmpClient,
    pub(super) volumes: BTreeMap<DeviceName, VolumeNode>,
    pub(super) home: Option<Arc<Home>>,
}

/// What a machine has that this gateway (or one before it) started.
#[derive(Debug)]
pub(super) struct Home {
    pub dir: PathBuf,
    pub process: QemuProcess,
    pub run_as: Option<(u32, u32)>,
    pub log_task: tokio::task::AbortHandle,
}

impl Drop for Home {
    fn drop(&mut self) {
        self.log_task.abort();
    }
}

/// The guest was not resumed, or nobody knows whether it was. The permit is still good for it.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct NotResumed {
    /// What it may be tried again with.
    pub permit: RunPermit,
    /// What QEMU said.
    pub why: QmpError,
}

impl Guest {
    /// The machine's name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// Its monitor, for what has no method here.
    pub fn qmp(&self) -> &QmpClient {
        &self.qmp
    }

    /// Its volumes as QEMU calls them.
    pub fn volumes(&self) -> &BTreeMap<DeviceName, VolumeNode> {
        &self.volumes
    }

    /// QEMU's process id; `None` for an adopted machine, whose process is not ours to end.
    pub fn pid(&self) -> Option<u32> {
        self.home.as_ref().map(|home| home.process.pid)
    }

    /// The machine's run directory, which its QEMU cannot write to; `None` for an adopted machine.
    pub fn dir(&self) -> Option<&Path> {
        self.home.as_ref().map(|home| home.dir.as_path())
    }

    /// The folder in which its QEMU may make sockets; `None` for an adopted machine.
    pub fn own_dir(&self) -> Option<PathBuf> {
        self.dir().map(|dir| dir.join(super::command_line::OWN_DIR))
    }

    /// The second monitor's socket, for whoever observes; `None` for an adopted machine.
    pub fn observer_socket(&self) -> Option<PathBuf> {
        self.dir().map(|dir| dir.join(super::command_line::OBSERVER_SOCKET))
    }

    /// Gives `socket` to the machine's user, so that its QEMU may connect to it. A gateway that listens
    /// for QEMU calls this after it has bound the socket. Does nothing when QEMU runs as this user.
    pub fn let_connect(&self, socket: &Path) -> std::io::Result<()> {
        match self.home.as_ref().and_then(|home| home.run_as) {
            Some((uid, gid)) => std::os::unix::fs::chown(socket, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// The run state. QMP `query-status`.
    pub async fn status(&self) -> Result<RunState, QmpError> {
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        let status: Status = self.qmp.query("query-status", json!({})).await?;
        Ok(RunState::from_name(&status.status))
    }

    /// The run state, if QEMU says it within `limit`.
    pub async fn status_within(&self, limit: Duration) -> Result<RunState, QmpError> {
        let late = |_| QmpError::Timeout { command: "query-status".to_owned(), limit };
        tokio::time::timeout(limit, self.status()).await.map_err(late)?
    }

    /// The run state after a migration whose status is final. QEMU says `completed` or `failed` a moment before it
    /// leaves `finish-migrate` (migration/migration.c, `migration_iteration_finish`), and no event tells of that, so
    /// this asks until it has, at most for `limit`.
    pub async fn status_after_migration(&self, limit: Duration) -> Result<RunState, QmpError> {
        let left = async {
            loop {
                let state = self.status().await?;
                if state != RunState::FinishMigrate {
                    return Ok(state);
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let late = |_| QmpError::Timeout { command: "query-status".to_owned(), limit };
        tokio::time::timeout(limit, left).await.map_err(late)?
    }

    /// QEMU's events from now on.
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// Waits until QEMU is gone or has closed the monitor. Cancel safe.
    pub async fn gone(&self) {
        self.qmp.closed().await;
    }

    /// Stops the guest's processors; disks are flushed. QMP `stop`.
    ///
    /// A disk request that waits for a server hangs this, and with it every other command.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.qmp.execute("stop", json!({})).await.map(drop)
    }

    /// Lets the guest run. QMP `cont`.
    pub async fn resume(&self, permit: RunPermit) -> Result<(), NotResumed> {
        let done = self.qmp.execute("cont", json!({})).await;
        done.map(drop).map_err(|why| NotResumed { permit, why })
    }

    /// Lets the guest run and tries again, `again` after each failure, which `failed` hears of, until it runs or
    /// QEMU is gone; false if it is gone. A QEMU that hangs does what it was told before, such as a late `stop`, first.
    pub async fn resume_until_it_runs(
        &self,
        permit: RunPermit,
        again: Duration,
        mut failed: impl FnMut(&QmpError),
    ) -> bool {
        let mut permit = permit;
        loop {
            match self.resume(permit).await {
                Ok(()) => return true,
                Err(NotResumed { permit: unused, why }) => {
                    failed(&why);
                    permit = unused;
                }
            }
            if self.qmp.is_closed() {
                return false;
            }
            tokio::time::sleep(again).await;
            // Its answer alone may have been lost.
            if self.status().await.is_ok_and(|state| state.is_running()) {
                return true;
            }
        }
    }

    /// Resets the guest as its reset button would. QMP `system_reset`.
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.qmp.execute("system_reset", json!({})).await.map(drop)
    }

    /// Asks the guest to shut down. QMP `system_powerdown`.
    pub async fn power_down(&self) -> Result<(), QmpError> {
        self.qmp.execute("system_powerdown", json!({})).await.map(drop)
    }

    /// Makes the guest's interfaces announce themselves on their LAN: five times, 50 to 550 ms apart.
    /// QMP `announce-self`.
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.qmp.execute("announce-self", rounds).await.map(drop)
    }

    /// Ends QEMU in order, disks flushed, and waits until it is gone, at most for `limit`; then kills it
    /// if it is ours. QMP `quit`.
    pub async fn quit(&self, limit: Duration) -> Result<(), QmpError> {
        match self.qmp.execute_within("quit", json!({}), limit).await {
            // It may be gone before its answer is read, and it may hang.
            Ok(_) | Err(QmpError::Gone { .. }) => {}
            Err(error @ QmpError::Timeout { .. }) if self.home.is_none() => return Err(error),
            Err(QmpError::Timeout { .. }) => {}
            Err(error) => return Err(error),
        }
        let Some(home) = &self.home else {
            let late = |_| QmpError::Timeout { command: "quit".to_owned(), limit };
            return tokio::time::timeout(limit, self.gone()).await.map_err(late);
        };
        if !home.process.ended(limit).await {
            tracing::warn!(machine = %self.name, pid = home.process.pid, "QEMU does not quit; killing it");
            // What cannot be killed shows in the wait below.
            let _ = home.process.kill();
        }
        if home.process.ended(limit).await {
            return Ok(());
        }
        Err(QmpError::Timeout { command: "quit".to_owned(), limit })
    }

    /// The node of a volume; an unknown name is refused like QEMU would refuse it.
    pub(super) fn node(&self, volume: &DeviceName) -> Result<&str, QmpError> {
        self.volumes.get(volume).map(|volume| volume.node.as_str()).ok_or_else(|| QmpError::Refused {
            command: "the request".to_owned(),
            class: "DeviceNotFound".to_owned(),
            desc: format!("machine {} has no disk {volume}", self.name),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};

    use super::super::qmp::QmpConfig;
    use super::*;

    /// A monitor that answers `query-status` with `states` in turn, then with the last one again, and everything
    /// else with nothing.
    async fn monitor(far: DuplexStream, states: &[&str]) {
        let mut far = BufReader::new(far);
        far.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n").await.unwrap();
        let (mut line, mut told) = (String::new(), 0);
        while far.read_line(&mut line).await.is_ok_and(|length| length > 0) {
            let asked: Value = serde_json::from_str(&line).unwrap();
            line.clear();
            let mut answer = json!({ "return": {}, "id": asked["id"] });
            if asked["execute"] == "query-status" {
                answer["return"]["status"] = json!(states[told]);
                told = (told + 1).min(states.len() - 1);
            }
            far.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
        }
    }

    async fn guest(states: &'static [&str]) -> Guest {
        let (near, far) = duplex(64 << 10);
        tokio::spawn(monitor(far, states));
        let (reader, writer) = tokio::io::split(near);
        let qmp = QmpClient::over(reader, writer, "test".to_owned(), QmpConfig::default()).await.unwrap();
        Guest { name: "web1".parse().unwrap(), qmp, volumes: BTreeMap::new(), home: None }
    }

    #[tokio::test]
    async fn a_machine_that_was_sent_is_asked_until_its_run_state_says_so_too() {
        let slow = guest(&["finish-migrate", "finish-migrate", "postmigrate"]).await;
        let state = slow.status_after_migration(Duration::from_secs(5)).await.unwrap();
        assert_eq!(state, RunState::Postmigrate);
        let failed = guest(&["finish-migrate", "running"]).await;
        let state = failed.status_after_migration(Duration::from_secs(5)).await.unwrap();
        assert_eq!(state, RunState::Running);
        let stuck = guest(&["finish-migrate"]).await;
        let late = stuck.status_after_migration(Duration::from_millis(20)).await;
        assert!(matches!(late, Err(QmpError::Timeout { .. })), "{late:?}");
    }
}
