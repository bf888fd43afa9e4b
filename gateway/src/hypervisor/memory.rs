//! The migration of a guest's memory and devices: out of this QEMU, or into it, over a UNIX socket.
//!
//! ```text
//!   source       prepare_outgoing, migrate_to --> active --(stop: ours)--> pre-switchover
//!                                                   |  continue_switchover --> completed (postmigrate)
//!                                                   +-- cancel or cut --> cancelled, failed
//!   destination  incoming --> active (inmigrate) --> completed (paused)
//! ```
//!
//! QEMU hardly ever chooses the moment of the pause: `downtime-limit` stays at 1 ms, its least useful
//! value, and `pause-before-switchover` is on. An idle guest gets to `pre-switchover` all the same and
//! waits there, stopped. The return path is off, so that no byte waits for a round trip; therefore *`completed` at the
//! source proves nothing* about the destination: it only says that the bytes went into the socket. What
//! was loaded, the destination's own status says. Facts measured on QEMU 7.2: a cut after
//! `continue_switchover` makes QEMU resume the source by itself unless `stop` was sent before; after such
//! a cut the run state can read `postmigrate` while the migration reads `failed`.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use longhaul_core::units::{Bytes, Rate};
use serde::Deserialize;
use serde_json::{Value, json};

use super::guest::Guest;
use super::qmp::{EventLoss, Events, QmpError};

/// How memory is sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutgoingParameters {
    /// The most QEMU puts into the socket; without it as fast as it is taken (the gateway paces).
    pub max_bandwidth: Option<Rate>,
    /// Take the guest's processors away, up to so many percent of their time, when its memory changes as fast as it is sent
    /// (`auto-converge`). QEMU gives them back when the migration ends in whatever way, that of its socket included.
    pub max_throttle_percent: Option<u32>,
}

/// QEMU begins to throttle when in two looks more memory was changed than this much of what was sent, in percent.
const THROTTLE_TRIGGER_PERCENT: u32 = 90;

/// Faster than any socket takes it, for "as fast as it is taken". 2^40 bytes per second: zero means no
/// limit in some versions only.
const UNLIMITED: u64 = 1 << 40;

/// The pause at which QEMU would go over by itself, in milliseconds. Not 0: QEMU 7.2 looks for newly dirtied
/// pages only when less is left than can be sent in this time, so that with 0 it never looks, and every
/// guest, however busy, is stopped after the first round (measured; `ram_save_pending` in migration/ram.c).
const DOWNTIME_LIMIT_MS: u64 = 1;

/// Where a migration is (`query-migrate`, `qapi/migration.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MigrationStatus {
    /// None was started.
    None,
    /// Connecting.
    Setup,
    /// Pages go out while the guest runs; at a destination: the machine comes in.
    Active,
    /// The guest is stopped and QEMU waits for [`Guest::continue_switchover`].
    PreSwitchover,
    /// Device state goes out.
    Device,
    /// Everything went into the socket; at a destination: everything was loaded.
    Completed,
    /// It failed.
    Failed,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled.
    Cancelled,
    /// Any other status, by its name.
    Other(String),
}

impl MigrationStatus {
    fn from_name(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelling" => Self::Cancelling,
            "cancelled" => Self::Cancelled,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Whether it has ended, well or not.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Other(name) => name,
        })
    }
}

/// What QEMU says of a migration. Counters are zero where QEMU gives none, at a destination for example.
#[derive(Debug, Clone, PartialEq)]
pub struct MigrationInfo {
    /// Where it is.
    pub status: MigrationStatus,
    /// Memory that is still to be sent, in the current round.
    pub remaining: Bytes,
    /// All memory of the guest.
    pub total: Bytes,
    /// What was put into the socket.
    pub transferred: Bytes,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages with content.
    pub normal_pages: u64,
    /// How fast the guest changes pages, in pages per second; known after the first round.
    pub dirty_pages_per_s: u64,
    /// Rounds begun.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: Bytes,
    /// What QEMU believes to put into the socket.
    pub throughput: Rate,
    /// How much of its processors' time the guest is denied, in percent.
    pub throttle_percent: u64,
    /// Since its start.
    pub elapsed: Duration,
    /// What QEMU says went wrong.
    pub error: Option<String>,
    /// Why this machine cannot migrate at all, in QEMU's words.
    pub blocked_reasons: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Reply {
    status: Option<String>,
    ram: Ram,
    total_time: u64,
    cpu_throttle_percentage: u64,
    error_desc: Option<String>,
    blocked_reasons: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Ram {
    remaining: u64,
    total: u64,
    transferred: u64,
    duplicate: u64,
    normal: u64,
    dirty_pages_rate: u64,
    dirty_sync_count: u64,
    page_size: u64,
    mbps: f64,
}

impl From<Reply> for MigrationInfo {
    fn from(reply: Reply) -> Self {
        let ram = reply.ram;
        Self {
            status: reply.status.as_deref().map_or(MigrationStatus::None, MigrationStatus::from_name),
            remaining: Bytes(ram.remaining),
            total: Bytes(ram.total),
            transferred: Bytes(ram.transferred),
            zero_pages: ram.duplicate,
            normal_pages: ram.normal,
            dirty_pages_per_s: ram.dirty_pages_rate,
            dirty_sync_count: ram.dirty_sync_count,
            page_size: Bytes(ram.page_size),
            throughput: Rate((ram.mbps.max(0.0) * 1e6 / 8.0) as u64),
            throttle_percent: reply.cpu_throttle_percentage,
            elapsed: Duration::from_millis(reply.total_time),
            error: reply.error_desc,
            blocked_reasons: reply.blocked_reasons,
        }
    }
}

impl Guest {
    /// Makes this QEMU ready to send its machine. QMP `migrate-set-capabilities` (events and
    /// pause-before-switchover on, everything else off, the return path with it) and
    /// `migrate-set-parameters` (`downtime-limit`).
    pub async fn prepare_outgoing(&self, parameters: &OutgoingParameters) -> Result<(), QmpError> {
        let mut wanted = vec!["events", "pause-before-switchover"];
        if parameters.max_throttle_percent.is_some() {
            wanted.push("auto-converge");
        }
        self.set_capabilities(&wanted).await?;
        if let Some(percent) = parameters.max_throttle_percent {
            let throttle = json!({
                "throttle-trigger-threshold": THROTTLE_TRIGGER_PERCENT, "cpu-throttle-initial": percent.clamp(1, 20),
                "max-cpu-throttle": percent.clamp(1, 99),
            });
            self.qmp.execute("migrate-set-parameters", throttle).await?;
        }
        self.limit_bandwidth(parameters.max_bandwidth).await
    }

    /// Sets the most QEMU puts into the socket; `None` is as fast as it is taken. QMP
    /// `migrate-set-parameters`.
    pub async fn limit_bandwidth(&self, rate: Option<Rate>) -> Result<(), QmpError> {
        let bandwidth = rate.map_or(UNLIMITED, |rate| rate.0);
        let parameters = json!({ "downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": bandwidth });
        self.qmp.execute("migrate-set-parameters", parameters).await.map(drop)
    }

    /// Denies the guest no more of its processors' time than this from now on, in percent; at least one, for QEMU takes no less.
    /// QMP `migrate-set-parameters`.
    pub async fn limit_throttle(&self, percent: u32) -> Result<(), QmpError> {
        let parameters =
            json!({ "max-cpu-throttle": percent.clamp(1, 99), "cpu-throttle-initial": percent.clamp(1, 20) });
        self.qmp.execute("migrate-set-parameters", parameters).await.map(drop)
    }

    /// Starts to send the machine into the socket at `path`. QMP `migrate`.
    pub async fn migrate_to(&self, path: &Path) -> Result<(), QmpError> {
        self.qmp.execute("migrate", json!({ "uri": unix(path) })).await.map(drop)
    }

    /// Where the migration is. QMP `query-migrate`.
    pub async fn migration(&self) -> Result<MigrationInfo, QmpError> {
        self.qmp.query::<Reply>("query-migrate", json!({})).await.map(MigrationInfo::from)
    }

    /// Waits until the migration's status is one of those `wanted` accepts, or final; at most for `limit`.
    /// Woken by QMP event `MIGRATION`, and asks every 100 ms besides, for events can be lost.
    pub async fn wait_migration(
        &self,
        wanted: impl Fn(&MigrationStatus) -> bool,
        limit: Duration,
    ) -> Result<MigrationInfo, QmpError> {
        let mut events = self.events();
        let wait = async {
            loop {
                let info = self.migration().await?;
                if wanted(&info.status) || info.status.is_final() {
                    return Ok(info);
                }
                // Whatever ends this wait, the state is asked for again.
                let _ = tokio::time::timeout(Duration::from_millis(100), events.next()).await;
            }
        };
        let late = |_| QmpError::Timeout { command: "migrate".to_owned(), limit };
        tokio::time::timeout(limit, wait).await.map_err(late)?
    }

    /// Lets a migration in `pre-switchover` go on to its end. QMP `migrate-continue`.
    pub async fn continue_switchover(&self) -> Result<(), QmpError> {
        self.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" })).await.map(drop)
    }

    /// Cancels a migration that has not completed; the guest runs on unless `stop` was sent. QMP
    /// `migrate_cancel`. Returns at once; the status turns to `cancelled` later.
    pub async fn cancel_migration(&self) -> Result<(), QmpError> {
        self.qmp.execute("migrate_cancel", json!({})).await.map(drop)
    }

    /// Ends a migration that is under way, whoever began it; none is no error. Waits at most for `limit`.
    pub async fn end_migration(&self, limit: Duration) -> Result<(), QmpError> {
        let status = self.migration().await?.status;
        if status.is_final() || status == MigrationStatus::None {
            return Ok(());
        }
        self.cancel_migration().await?;
        self.wait_migration(MigrationStatus::is_final, limit).await.map(drop)
    }

    /// Cuts the migration's socket even while QEMU's main loop hangs on it. QMP `yank`, out of band.
    pub async fn cut_migration(&self) -> Result<(), QmpError> {
        let instances = json!({ "instances": [{ "type": "migration" }] });
        self.qmp.execute_out_of_band("yank", instances).await.map(drop)
    }

    /// Makes a QEMU that was started for it listen at `path` for the machine that comes in. QMP
    /// `migrate-set-capabilities` (late-block-activate: disks are taken only when the guest resumes) and
    /// `migrate-incoming`.
    pub async fn incoming(&self, path: &Path) -> Result<(), QmpError> {
        self.set_capabilities(&["events", "late-block-activate"]).await?;
        self.qmp.execute("migrate-incoming", json!({ "uri": unix(path) })).await.map(drop)
    }

    async fn set_capabilities(&self, wanted: &[&str]) -> Result<(), QmpError> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let all: Vec<Capability> = self.qmp.query("query-migrate-capabilities", json!({})).await?;
        let changed: Vec<Value> = all
            .into_iter()
            .map(|it| (wanted.contains(&it.capability.as_str()), it))
            .filter(|(state, it)| *state != it.state)
            .map(|(state, it)| json!({ "capability": it.capability, "state": state }))
            .collect();
        self.qmp.execute("migrate-set-capabilities", json!({ "capabilities": changed })).await.map(drop)
    }
}

/// What QEMU does of its own accord in an outgoing migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrationStep {
    /// It has looked for pages that were changed, and begins with them.
    NewRound,
    /// It finds too little left to send, and has stopped the guest: at this time since the Unix epoch.
    StoppedGuest(Duration),
}

/// Notices at once what QEMU does of its own accord.
#[derive(Debug)]
pub struct MigrationSteps {
    events: Events,
    stopped_at: Option<Duration>,
}

impl MigrationSteps {
    /// Looks at events from now on.
    pub fn new(events: Events) -> Self {
        Self { events, stopped_at: None }
    }

    /// Waits for the next step: QMP event `MIGRATION_PASS`, or that a migration stands in `pre-switchover`. For ever where
    /// events were lost or QEMU is gone: whoever waits also asks. Cancel safe.
    pub async fn next(&mut self) -> MigrationStep {
        loop {
            match self.events.next().await {
                Ok(event) if event.name == "STOP" => self.stopped_at = Some(event.at),
                Ok(event) if event.name == "RESUME" => self.stopped_at = None,
                Ok(event) if event.name == "MIGRATION" && event.data["status"] == "pre-switchover" => {
                    return MigrationStep::StoppedGuest(self.stopped_at.unwrap_or(event.at));
                }
                Ok(event) if event.name == "MIGRATION_PASS" => return MigrationStep::NewRound,
                Ok(_) | Err(EventLoss::Missed(_)) => {}
                Err(EventLoss::Gone) => std::future::pending().await,
            }
        }
    }
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

#[cfg(test)]
mod tests {
    use tokio::sync::broadcast;

    use super::super::qmp::QmpEvent;
    use super::*;

    #[tokio::test]
    async fn a_guest_that_qemu_stops_by_itself_stands_since_its_stop_and_not_since_somebody_looked() {
        let (sender, receiver) = broadcast::channel(8);
        let mut watch = MigrationSteps::new(receiver.into());
        let event = |name: &str, status: &str, at_ms| QmpEvent {
            name: name.to_owned(),
            data: json!({ "status": status }),
            at: Duration::from_millis(at_ms),
        };
        for event in [
            event("STOP", "", 10),
            event("RESUME", "", 11),
            event("MIGRATION", "active", 12),
            event("MIGRATION_PASS", "", 15),
            event("STOP", "", 20),
            event("MIGRATION", "pre-switchover", 27),
        ] {
            sender.send(event).unwrap();
        }
        assert_eq!(watch.next().await, MigrationStep::NewRound);
        assert_eq!(watch.next().await, MigrationStep::StoppedGuest(Duration::from_millis(20)));
        drop(sender);
        let waits = tokio::time::timeout(Duration::from_millis(20), watch.next()).await;
        assert!(waits.is_err(), "a QEMU that is gone stops nothing");
    }

    #[test]
    fn an_answer_of_qemu_reads_with_its_units() {
        let reply: Reply = serde_json::from_value(json!({
            "status": "active", "total-time": 1500, "setup-time": 1,
            "ram": { "total": 1048576, "remaining": 4096, "mbps": 8.0, "dirty-pages-rate": 7, "page-size": 4096,
                     "multifd-bytes": 0, "downtime-bytes": 0 },
        }))
        .unwrap();
        let info = MigrationInfo::from(reply);
        assert_eq!(info.status, MigrationStatus::Active);
        assert_eq!((info.throughput, info.elapsed), (Rate(1_000_000), Duration::from_millis(1500)));
        let none: Reply = serde_json::from_value(json!({})).unwrap();
        assert_eq!(MigrationInfo::from(none).status, MigrationStatus::None);
    }
}
