//! Mirrors a disk of a running machine into an NBD server, which is the gateway's own.
//!
//! ```text
//!   mirror_start --> running --> ready --(mirror_finish)--> concluded, gone: target holds all writes
//!                      |  \        |
//!                      |   paused (target error; mirror_resume tries again)
//!                      +---------- mirror_abort --> concluded, gone
//! ```
//!
//! Upstream's mirror knows no bitmap: `full` copies everything, `none` only what the guest writes from
//! now on. It copies in the background, so that the guest never waits for the target.

use std::path::Path;
use std::time::Duration;

use longhaul_core::ids::DeviceName;
use longhaul_core::units::{Bytes, Rate};
use serde::Deserialize;
use serde_json::json;

use super::guest::Guest;
use super::qmp::{EventLoss, QmpError};

/// What a mirror copies besides new writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorMode {
    /// The whole disk.
    Full,
    /// Nothing: somebody else reads what is there already.
    None,
}

impl MirrorMode {
    fn sync(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::None => "none",
        }
    }
}

/// Where a mirror is (QMP `JobStatus`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobState {
    /// Copies.
    Running,
    /// Waits: its target failed, see [`MirrorStatus::io_status`].
    Paused,
    /// The target holds what the disk holds, but for writes on their way.
    Ready,
    /// Has ended; [`MirrorStatus::error`] says how.
    Concluded,
    /// Any other state, by its name (`created`, `waiting`, `aborting`, ...).
    Other(String),
}

/// What QEMU says of a mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Where it is.
    pub state: JobState,
    /// Bytes copied so far.
    pub done: Bytes,
    /// Bytes to copy, what the guest wrote meanwhile included.
    pub total: Bytes,
    /// `ok`, `failed` or `nospace`.
    pub io_status: String,
    /// Requests are on their way to the target.
    pub busy: bool,
    /// Why it ended, if it failed.
    pub error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockJob {
    device: String,
    status: String,
    offset: u64,
    len: u64,
    io_status: String,
    busy: bool,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockNode {
    node_name: String,
}

impl From<BlockJob> for MirrorStatus {
    fn from(job: BlockJob) -> Self {
        let state = match job.status.as_str() {
            "running" => JobState::Running,
            // `standby` is what QEMU calls a mirror that is paused after it was ready.
            "paused" | "standby" => JobState::Paused,
            "ready" => JobState::Ready,
            "concluded" => JobState::Concluded,
            other => JobState::Other(other.to_owned()),
        };
        let (done, total) = (Bytes(job.offset), Bytes(job.len));
        Self { state, done, total, io_status: job.io_status, busy: job.busy, error: job.error }
    }
}

/// How long the connection to the target may take, in seconds. The server is the gateway on this host.
///
/// A connection that is lost later is *not* waited for (`reconnect-delay` stays 0): while QEMU waited,
/// `stop` and `blockdev-del` would hang, and with them the monitor. The mirror pauses instead, and
/// [`Guest::mirror_resume`] connects anew.
const CONNECT_S: u64 = 10;

pub(super) fn job_id(disk: &DeviceName) -> String {
    format!("mirror-{disk}")
}

fn target_node(disk: &DeviceName) -> String {
    format!("target-{disk}")
}

fn client_node(disk: &DeviceName) -> String {
    format!("nbd-{disk}")
}

impl Guest {
    /// Bounds what the guest writes to a disk, as long as QEMU lives; `None` lifts it. Nothing for a volume that is no disk
    /// of the guest's, nor for an adopted machine, whose limits are its own manager's. QMP `block_set_io_throttle`.
    pub async fn limit_writes(&self, disk: &DeviceName, limit: Option<Rate>) -> Result<(), QmpError> {
        let device = self.volumes.get(disk).and_then(|volume| volume.device.as_ref());
        let Some(device) = device.filter(|_| self.home.is_some()) else { return Ok(()) };
        let written = limit.map_or(0, |limit| limit.0);
        let limits = json!({
            "id": format!("{device}/virtio-backend"), "bps": 0, "bps_rd": 0, "bps_wr": written, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        });
        self.qmp.execute("block_set_io_throttle", limits).await.map(drop)
    }

    /// Starts to mirror `disk` into export `export` of the NBD server at `path`. A target that fails
    /// pauses the mirror instead of ending it. QMP `blockdev-add`, `blockdev-mirror`.
    pub async fn mirror_start(
        &self,
        disk: &DeviceName,
        path: &Path,
        export: &str,
        mode: MirrorMode,
    ) -> Result<(), QmpError> {
        let source = self.node(disk)?;
        let target = json!({
            "driver": "raw",
            "node-name": target_node(disk),
            "discard": "unmap",
            "file": {
                "driver": "nbd",
                "node-name": client_node(disk),
                "discard": "unmap",
                "server": { "type": "unix", "path": path },
                "export": export,
                "open-timeout": CONNECT_S,
            },
        });
        self.qmp.execute_within("blockdev-add", target, Duration::from_secs(CONNECT_S + 5)).await?;
        let job = json!({
            "job-id": job_id(disk),
            "device": source,
            "target": target_node(disk),
            "sync": mode.sync(),
            "copy-mode": "background",
            // A small write travels as itself, not as the 64 KiB around it.
            "granularity": 4096,
            "on-target-error": "stop",
            "auto-dismiss": false,
        });
        let started = self.qmp.execute("blockdev-mirror", job).await.map(drop);
        if matches!(started, Err(QmpError::Refused { .. })) {
            self.delete_target(disk).await?;
        }
        started
    }

    /// Where the mirror of `disk` is; `None` if there is none. QMP `query-block-jobs`.
    pub async fn mirror_status(&self, disk: &DeviceName) -> Result<Option<MirrorStatus>, QmpError> {
        let jobs: Vec<BlockJob> = self.qmp.query("query-block-jobs", json!({})).await?;
        Ok(jobs.into_iter().find(|job| job.device == job_id(disk)).map(MirrorStatus::from))
    }

    /// Waits until the mirror of `disk` is ready, paused or concluded, at most for `limit`. QMP event
    /// `JOB_STATUS_CHANGE`.
    pub async fn mirror_settled(&self, disk: &DeviceName, limit: Duration) -> Result<MirrorStatus, QmpError> {
        self.wait_mirror(disk, limit, |state| matches!(state, JobState::Ready | JobState::Paused)).await
    }

    /// Lets a mirror that its target had paused try again. QMP `block-job-resume`.
    pub async fn mirror_resume(&self, disk: &DeviceName) -> Result<(), QmpError> {
        self.qmp.execute("block-job-resume", json!({ "device": job_id(disk) })).await.map(drop)
    }

    /// Ends a ready mirror in order: waits until the target holds every write that was made before,
    /// and takes the target away. The guest must be stopped if nothing may be missing. QMP
    /// `block-job-cancel` (of a ready job: completes without pivot), `job-dismiss`, `blockdev-del`.
    pub async fn mirror_finish(&self, disk: &DeviceName, limit: Duration) -> Result<MirrorStatus, QmpError> {
        let status = self.mirror_status(disk).await?;
        if !matches!(&status, Some(status) if status.state == JobState::Ready) {
            let state =
                status.map_or("there is none".to_owned(), |status| format!("it is {:?}", status.state));
            return Err(QmpError::Refused {
                command: "block-job-cancel".to_owned(),
                class: "GenericError".to_owned(),
                desc: format!("the mirror of {disk} is not ready: {state}"),
            });
        }
        self.qmp.execute("block-job-cancel", json!({ "device": job_id(disk) })).await?;
        let status = self.wait_mirror(disk, limit, |_| false).await?;
        self.dismiss(disk).await?;
        match status.error {
            None => Ok(status),
            Some(desc) => Err(QmpError::Refused {
                command: "block-job-cancel".to_owned(),
                class: "GenericError".to_owned(),
                desc,
            }),
        }
    }

    /// Ends a mirror in whatever state, leaving the target incomplete; no mirror is no error, and a target that
    /// a gateway left which was killed beside its mirror is taken away. With `force` a target that does not
    /// answer within `limit` is cut off. QMP `block-job-cancel force`, `yank`, `job-dismiss`, `blockdev-del`.
    pub async fn mirror_abort(
        &self,
        disk: &DeviceName,
        force: bool,
        limit: Duration,
    ) -> Result<(), QmpError> {
        let Some(status) = self.mirror_status(disk).await? else {
            return self.delete_left_target(disk).await;
        };
        if status.state != JobState::Concluded {
            let cancel = json!({ "device": job_id(disk), "force": true });
            self.qmp.execute("block-job-cancel", cancel).await?;
            match self.wait_mirror(disk, limit, |_| false).await {
                Err(QmpError::Timeout { .. }) if force => {
                    let node = json!({ "type": "block-node", "node-name": client_node(disk) });
                    self.qmp.execute_out_of_band("yank", json!({ "instances": [node] })).await?;
                    self.wait_mirror(disk, limit, |_| false).await?;
                }
                other => drop(other?),
            }
        }
        self.dismiss(disk).await
    }

    async fn dismiss(&self, disk: &DeviceName) -> Result<(), QmpError> {
        self.qmp.execute("job-dismiss", json!({ "id": job_id(disk) })).await?;
        self.delete_target(disk).await
    }

    async fn delete_left_target(&self, disk: &DeviceName) -> Result<(), QmpError> {
        let nodes: Vec<BlockNode> =
            self.qmp.query("query-named-block-nodes", json!({ "flat": true })).await?;
        if nodes.iter().all(|node| node.node_name != target_node(disk)) {
            return Ok(());
        }
        self.delete_target(disk).await
    }

    async fn delete_target(&self, disk: &DeviceName) -> Result<(), QmpError> {
        self.qmp.execute("blockdev-del", json!({ "node-name": target_node(disk) })).await.map(drop)
    }

    async fn wait_mirror(
        &self,
        disk: &DeviceName,
        limit: Duration,
        wanted: impl Fn(&JobState) -> bool,
    ) -> Result<MirrorStatus, QmpError> {
        let mut events = self.events();
        let wait = async {
            loop {
                let Some(status) = self.mirror_status(disk).await? else {
                    return Err(QmpError::Refused {
                        command: "query-block-jobs".to_owned(),
                        class: "DeviceNotFound".to_owned(),
                        desc: format!("{disk} has no mirror"),
                    });
                };
                if wanted(&status.state) || status.state == JobState::Concluded {
                    return Ok(status);
                }
                loop {
                    match events.next().await {
                        Ok(event)
                            if event.name == "JOB_STATUS_CHANGE" && event.data["id"] == job_id(disk) =>
                        {
                            break;
                        }
                        Ok(_) => {}
                        Err(EventLoss::Missed(_)) => break,
                        Err(EventLoss::Gone) => {
                            return Err(QmpError::Gone { peer: self.qmp.peer().to_owned() });
                        }
                    }
                }
            }
        };
        let late = |_| QmpError::Timeout { command: "blockdev-mirror".to_owned(), limit };
        tokio::time::timeout(limit, wait).await.map_err(late)?
    }
}
