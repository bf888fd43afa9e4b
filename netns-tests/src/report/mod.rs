//! The report of one scenario: `report.json` for programs, `report.html` for people.
//!
//! The JSON is a versioned contract ([`SCHEMA`]); the page is made from it and from the samples ([`Series`]) that the
//! JSON does not carry. Nothing is measured or judged here.

pub mod chart;
pub mod figures;
pub mod page;
pub mod series;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use series::{RateReading, RateSample, Series};

/// Version of `report.json`.
pub const SCHEMA: u32 = 1;

/// `report.json`, version 1. All times are milliseconds since the scenario's start, unless they are durations. A value
/// that could not be measured is `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Name of the scenario, also of its folder.
    pub scenario: String,
    /// The emulated WAN.
    pub wan: Wan,
    /// The machine that moved.
    pub vm: Vm,
    /// How it ended, in a word: `moved`, `rolled-back`, `failed`.
    pub outcome: String,
    /// The migration's stages.
    pub stages: Vec<Stage>,
    /// Duration of the whole migration.
    pub total_ms: Option<u64>,
    /// From the guest's pause at the source to its resumption, wherever that was.
    pub downtime_ms: Option<f64>,
    /// Longest silence on the record connection minus its normal interval.
    pub client_gap_ms: Option<u64>,
    /// Rounds of memory.
    pub rounds: Vec<Round>,
    /// Bytes on the WAN by kind.
    pub wan_bytes: WanBytes,
    /// Connections opened before the move.
    pub connections: Connections,
    /// Requests by name.
    pub http: Http,
    /// The name.
    pub dns: Dns,
    /// The disks after the move.
    pub disk: Disk,
    /// The tunnel.
    pub tunnel: Tunnel,
    /// What the laboratory found left over after it ended.
    pub left_behind: Vec<String>,
    /// What was promised, and whether it held.
    pub promises: Vec<Promise>,
}

/// The WAN as asked for and as measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wan {
    /// Round trip asked for.
    pub rtt_ms: f64,
    /// Rate asked for, in 10^6 bits a second.
    pub rate_mbit: f64,
    /// Loss asked for, in percent.
    pub loss_pct: f64,
    /// What emulates it: `netem` or `userspace`.
    pub emulator: String,
    /// What was measured before the scenario began.
    pub measured: Measured,
}

/// The WAN as measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Round trip.
    pub rtt_ms: Option<f64>,
    /// Rate, in 10^6 bits a second.
    pub rate_mbit: Option<f64>,
}

/// The machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its memory.
    pub memory_bytes: u64,
    /// All its disks together.
    pub disk_bytes: u64,
}

/// One stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Its name, for example `2 pre-copy`.
    pub stage: String,
    /// Beginning.
    pub start_ms: u64,
    /// End, or nothing if it did not end.
    pub end_ms: Option<u64>,
}

/// One round of memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// Bytes of QEMU's stream, before they are reduced for the WAN.
    pub bytes: u64,
    /// Pages in it.
    pub pages: u64,
    /// Duration.
    pub ms: u64,
}

/// Bytes on the WAN.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WanBytes {
    /// The machine's memory and device state.
    pub memory: u64,
    /// Its disks.
    pub disk: u64,
    /// Guest packets.
    pub tunnel: u64,
    /// Everything else.
    pub control: u64,
}

impl WanBytes {
    /// All kinds together.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.memory + self.disk + self.tunnel + self.control
    }
}

/// Connections opened before the move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connections {
    /// Opened.
    pub before: u64,
    /// Ended as they should.
    pub survived: u64,
    /// Ended by a reset.
    pub reset: u64,
    /// All content was right.
    pub content_ok: bool,
}

/// Requests by name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Begun and ended.
    pub requests: u64,
    /// Without the right answer.
    pub failed: u64,
    /// Longest successful one.
    pub longest_ms: f64,
}

/// The name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dns {
    /// Address before.
    pub old: Option<IpAddr>,
    /// Address after.
    pub new: Option<IpAddr>,
    /// When the name server answered the new one.
    pub updated_ms: Option<u64>,
    /// When a request first succeeded at the new one.
    pub first_direct_client_ms: Option<u64>,
}

/// The disks after the move.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Blocks compared.
    pub blocks: u64,
    /// Blocks that differ where they must not.
    pub mismatched: u64,
}

/// The tunnel.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tunnel {
    /// Packets carried.
    pub packets: u64,
    /// Packets dropped.
    pub dropped: u64,
    /// When it came down.
    pub closed_ms: Option<u64>,
}

/// One promise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promise {
    /// What was promised.
    pub name: String,
    /// Whether it held.
    pub held: bool,
    /// The figures behind it.
    pub detail: String,
}

impl Report {
    /// An empty report of `scenario`.
    #[must_use]
    pub fn new(scenario: &str) -> Self {
        Self { schema: SCHEMA, scenario: scenario.to_owned(), ..Self::default() }
    }

    /// Adds a promise.
    pub fn promise(&mut self, name: &str, held: bool, detail: impl Into<String>) {
        self.promises.push(Promise { name: name.to_owned(), held, detail: detail.into() });
    }

    /// Whether every promise held; a report without promises proves nothing.
    #[must_use]
    pub fn all_held(&self) -> bool {
        !self.promises.is_empty() && self.promises.iter().all(|promise| promise.held)
    }

    /// Writes `report.json` and `report.html` into `LAB/SCENARIO/` and gives that folder.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, lab: &Path, series: &Series) -> Result<PathBuf> {
        let folder = lab.join(&self.scenario);
        fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        fs::write(folder.join("report.json"), json).context("Cannot write report.json")?;
        fs::write(folder.join("report.html"), page::render(self, series))
            .context("Cannot write report.html")?;
        Ok(folder)
    }

    /// Reads a `report.json`.
    ///
    /// # Errors
    /// It is missing, or not of version [`SCHEMA`].
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("Cannot read {}", path.display()))?;
        let report: Self = serde_json::from_slice(&bytes).context("This is no report of version 1")?;
        anyhow::ensure!(report.schema == SCHEMA, "The report has version {}, not {SCHEMA}", report.schema);
        Ok(report)
    }
}
