//! What the client does: which connections, which name, how often.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// For [`TrafficPlan::close_timeout_ms`] where the path is cut meanwhile: a connection that was silent for a minute tries again
/// within the next one and a half, and a guest on a busy host does not make up at once for what the cut has cost it.
pub const CLOSE_AFTER_CUT_MS: u64 = 150_000;

/// The whole plan. Every part may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficPlan {
    /// Zero of all times, milliseconds since 1970.
    pub epoch_unix_ms: u64,
    /// The record connection.
    pub record: Option<RecordPlan>,
    /// The download.
    pub download: Option<DownloadPlan>,
    /// The idle connection.
    pub idle: Option<IdlePlan>,
    /// New requests by name.
    pub http: Option<HttpPlan>,
    /// How long an old connection may take to end once it is asked to. Default 60 s.
    #[serde(default = "default_close_ms")]
    pub close_timeout_ms: u64,
    /// How long opening may take. Default 10 s.
    #[serde(default = "default_open_ms")]
    pub open_timeout_ms: u64,
}

/// The record connection: numbered records both ways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordPlan {
    /// The guest's record port.
    pub address: SocketAddr,
    /// The relay of a guest, which connects there in the client's place.
    #[serde(default)]
    pub through: Option<SocketAddr>,
    /// Time between two records, each way. Default 10 ms.
    #[serde(default = "default_record_ms")]
    pub interval_ms: u64,
    /// A silence longer than this is listed as a gap. Default 50 ms.
    #[serde(default = "default_gap_ms")]
    pub gap_ms: u64,
}

/// The download of a known body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadPlan {
    /// The guest's download port.
    pub address: SocketAddr,
    /// Length of the body.
    pub bytes: u64,
    /// The rate the server keeps to, bytes a second.
    pub rate_bytes_per_s: u64,
    /// Seed of the body's content.
    #[serde(default)]
    pub seed: u64,
}

/// The connection that speaks once, at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdlePlan {
    /// The guest's idle port.
    pub address: SocketAddr,
}

/// New requests by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpPlan {
    /// The name to ask for, without a final dot.
    pub name: String,
    /// The name server, UDP.
    pub name_server: SocketAddr,
    /// Asks for AAAA instead of A.
    #[serde(default)]
    pub ipv6: bool,
    /// The web server's port. Default 80.
    #[serde(default = "default_port")]
    pub port: u16,
    /// The path to get. Default `/`.
    #[serde(default = "default_path")]
    pub path: String,
    /// What the body must be; any, if left out.
    #[serde(default)]
    pub expect_body: Option<String>,
    /// Time between two requests. Default 100 ms.
    #[serde(default = "default_probe_ms")]
    pub interval_ms: u64,
    /// A request that takes longer has failed. Default 30 s.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
}

const fn default_close_ms() -> u64 {
    60_000
}
const fn default_open_ms() -> u64 {
    10_000
}
const fn default_record_ms() -> u64 {
    10
}
const fn default_gap_ms() -> u64 {
    50
}
const fn default_port() -> u16 {
    80
}
fn default_path() -> String {
    "/".to_owned()
}
const fn default_probe_ms() -> u64 {
    100
}
const fn default_timeout_ms() -> u64 {
    30_000
}

impl TrafficPlan {
    /// A plan with nothing in it.
    #[must_use]
    pub const fn new(epoch_unix_ms: u64) -> Self {
        Self {
            epoch_unix_ms,
            record: None,
            download: None,
            idle: None,
            http: None,
            close_timeout_ms: default_close_ms(),
            open_timeout_ms: default_open_ms(),
        }
    }

    /// Adds the three old connections to the guest's usual ports, with the usual intervals.
    #[must_use]
    pub fn with_old_connections(
        mut self,
        guest: std::net::IpAddr,
        bytes: u64,
        rate_bytes_per_s: u64,
    ) -> Self {
        use crate::agent::{DOWNLOAD_PORT, IDLE_PORT, RECORD_PORT};
        let at = |port| SocketAddr::new(guest, port);
        self.record = Some(RecordPlan {
            address: at(RECORD_PORT),
            through: None,
            interval_ms: default_record_ms(),
            gap_ms: default_gap_ms(),
        });
        self.download = Some(DownloadPlan { address: at(DOWNLOAD_PORT), bytes, rate_bytes_per_s, seed: 1 });
        self.idle = Some(IdlePlan { address: at(IDLE_PORT) });
        self
    }

    /// Adds requests by name for the guest's index page.
    #[must_use]
    pub fn with_requests(mut self, name: &str, name_server: SocketAddr) -> Self {
        self.http = Some(HttpPlan {
            name: name.to_owned(),
            name_server,
            ipv6: false,
            port: default_port(),
            path: default_path(),
            expect_body: Some(crate::guest::tree::INDEX_HTML.to_owned()),
            interval_ms: default_probe_ms(),
            timeout_ms: default_timeout_ms(),
        });
        self
    }
}
