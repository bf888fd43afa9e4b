//! Whether a QEMU holds what a move makes in it. It is asked after a gateway was killed; who takes it away is
//! `migration/rollback.rs`.

use serde::Deserialize;
use serde_json::json;

use super::disks::export_id;
use super::guest::Guest;
use super::mirror::job_id;
use super::qmp::QmpError;

#[derive(Deserialize)]
struct Job {
    device: String,
}

#[derive(Deserialize)]
struct Backend {
    #[serde(default)]
    inserted: Option<Limits>,
}

#[derive(Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Limits {
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
}

impl Limits {
    /// Of the shape that [`Guest::limit_writes`] gives them: others are an operator's own.
    fn are_ours(&self) -> bool {
        let bps_wr = self.bps_wr;
        bps_wr > 0 && *self == Self { bps_wr, ..Self::default() }
    }
}

impl Guest {
    /// Whether a disk of the machine is mirrored or exported as moves do it, or what the guest writes is bounded so. An adopted
    /// machine's bounds are its own manager's. QMP `query-block-jobs`, `query-block-exports`, `query-block`.
    pub async fn is_encumbered(&self) -> Result<bool, QmpError> {
        let jobs: Vec<Job> = self.qmp.query("query-block-jobs", json!({})).await?;
        let exports = self.exports().await?;
        let is_held = self.volumes.keys().any(|disk| {
            let (job, export) = (job_id(disk), export_id(disk));
            jobs.iter().any(|it| it.device == job) || exports.iter().any(|it| it.id == export)
        });
        if is_held || self.home.is_none() {
            return Ok(is_held);
        }
        let backends: Vec<Backend> = self.qmp.query("query-block", json!({})).await?;
        Ok(backends.iter().filter_map(|backend| backend.inserted.as_ref()).any(Limits::are_ours))
    }
}
