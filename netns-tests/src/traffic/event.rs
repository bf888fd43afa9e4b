//! What the client tells while it runs, and its final report.
//!
//! Both are plain data, one JSON object each. All times are milliseconds since the plan's start.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::report::{Connections, Http};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Every old connection of the plan is open and the record connection has had its first record.
    Ready {
        /// When.
        at_ms: u64,
    },
    /// The record connection was silent; told when it speaks again.
    Gap(Gap),
    /// How far the download is, about once a second.
    Progress {
        /// When.
        at_ms: u64,
        /// Bytes of the body that came.
        bytes: u64,
    },
    /// A request by name ended.
    Probe(ProbeSample),
    /// The name has another address than before.
    NameChanged(NameChange),
    /// An old connection broke, or could not be opened.
    Lost {
        /// When.
        at_ms: u64,
        /// Which: `record`, `download` or `idle`.
        connection: String,
        /// Why.
        error: String,
    },
    /// All old connections have ended; requests go on.
    Closed {
        /// When.
        at_ms: u64,
    },
    /// The report, asked for or final.
    Report(Box<TrafficReport>),
}

/// A silence of the record connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The last record before it.
    pub start_ms: u64,
    /// The first record after it.
    pub end_ms: u64,
}

/// One request by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeSample {
    /// When it began.
    pub at_ms: u64,
    /// From its beginning, name included, to the last byte or the failure.
    pub latency_ms: f64,
    /// The address the name gave, and so the place that was dialled.
    pub address: Option<IpAddr>,
    /// How it ended.
    pub outcome: Outcome,
    /// The machine's boot id, as the web server's `X-Boot-Id` says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// What went wrong, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Status 200 and the right body.
    Ok,
    /// The name server did not answer, or with no address.
    Name,
    /// No connection: refused or unreachable.
    Connect,
    /// The connection was reset.
    Reset,
    /// It took too long.
    Timeout,
    /// Another status or a wrong body.
    Content,
}

/// The name's address as the client first used it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameChange {
    /// When the answer came.
    pub at_ms: u64,
    /// The address.
    pub address: IpAddr,
    /// The answer's TTL, in seconds.
    pub ttl_s: u32,
}

/// The record connection's result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordReport {
    /// Records this side sent.
    pub sent: u64,
    /// Records this side received.
    pub received: u64,
    /// Records that were lost, either way.
    pub lost: u64,
    /// Records that came twice, either way.
    pub doubled: u64,
    /// Frames with a wrong checksum, either way.
    pub corrupt: u64,
    /// Longest silence minus the interval.
    pub longest_gap_ms: u64,
    /// Silences worth listing; at most [`GAPS_LISTED`].
    pub gaps: Vec<Gap>,
    /// Both sides said their End and every count fits.
    pub content_ok: bool,
    /// Why it broke, if it did.
    pub error: Option<String>,
}

/// More gaps than this are counted in the longest one only.
pub const GAPS_LISTED: usize = 2_000;

/// The download's result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadReport {
    /// Bytes of the body that came.
    pub bytes: u64,
    /// When it ended.
    pub ended_ms: u64,
    /// SHA-256 of what came.
    pub sha256: String,
    /// SHA-256 of what should have come, as far as it came.
    pub expected_sha256: String,
    /// The two are equal and the length is right.
    pub content_ok: bool,
    /// Why it broke, if it did.
    pub error: Option<String>,
}

/// The idle connection's result.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleReport {
    /// How long it had been silent when it spoke.
    pub silent_ms: u64,
    /// From the question to the answer.
    pub answer_ms: u64,
    /// The boot id of the machine that answered.
    pub boot_id: Option<String>,
    /// The answer was the question, after the boot id.
    pub content_ok: bool,
    /// Why it broke, if it did.
    pub error: Option<String>,
}

/// All that the client saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrafficReport {
    /// Zero of all times, milliseconds since 1970.
    pub epoch_unix_ms: u64,
    /// When the client began.
    pub start_ms: u64,
    /// When this report was written.
    pub end_ms: u64,
    /// When everything was open.
    pub ready_ms: Option<u64>,
    /// The record connection, once it has ended.
    pub record: Option<RecordReport>,
    /// The download, once it has ended.
    pub download: Option<DownloadReport>,
    /// The idle connection, once it has spoken.
    pub idle: Option<IdleReport>,
    /// Old connections that the plan asked for.
    pub connections_planned: u64,
    /// Requests begun and ended.
    pub requests: u64,
    /// Requests by outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Longest successful request.
    pub longest_ms: f64,
    /// First successful request at each address.
    pub first_ok_ms: BTreeMap<IpAddr, u64>,
    /// Last request, of any outcome, at each address.
    pub last_used_ms: BTreeMap<IpAddr, u64>,
    /// Addresses the name has had, in order.
    pub names: Vec<NameChange>,
    /// Boot ids seen in answers, each with the number of answers.
    pub boot_ids: BTreeMap<String, u64>,
    /// The requests themselves; at most [`PROBES_KEPT`].
    pub probes: Vec<ProbeSample>,
    /// Silences of the record connection so far.
    pub gaps: Vec<Gap>,
    /// The download so far: time and bytes.
    pub progress: Vec<(u64, u64)>,
}

/// Requests kept one by one (about 5 hours at ten a second); later ones are counted only. Each costs about 200 bytes.
pub const PROBES_KEPT: usize = 180_000;

impl TrafficReport {
    /// The report's `connections`: what became of the old connections.
    #[must_use]
    pub fn connections(&self) -> Connections {
        let ended = [
            self.record.as_ref().map(|report| (report.error.as_deref(), report.content_ok)),
            self.download.as_ref().map(|report| (report.error.as_deref(), report.content_ok)),
            self.idle.as_ref().map(|report| (report.error.as_deref(), report.content_ok)),
        ];
        let survived = ended.iter().flatten().filter(|(error, _)| error.is_none()).count() as u64;
        let right = ended.iter().flatten().filter(|(_, right)| *right).count() as u64;
        let reset = ended
            .iter()
            .flatten()
            .filter(|(error, _)| error.is_some_and(|text| text.contains("reset")))
            .count() as u64;
        Connections {
            before: self.connections_planned,
            survived,
            reset,
            content_ok: right == self.connections_planned,
        }
    }

    /// The report's `http`: requests by name.
    #[must_use]
    pub fn http(&self) -> Http {
        let right = self.outcomes.get(&Outcome::Ok).copied().unwrap_or(0);
        Http { requests: self.requests, failed: self.requests - right, longest_ms: self.longest_ms }
    }

    /// The report's `client_gap_ms`, or the longest silence so far if the record connection has not ended.
    #[must_use]
    pub fn client_gap_ms(&self) -> Option<u64> {
        self.record.as_ref().map(|record| record.longest_gap_ms)
    }

    /// When the first request succeeded at an address other than `old`.
    #[must_use]
    pub fn first_direct_ms(&self, old: IpAddr) -> Option<u64> {
        self.first_ok_ms.iter().filter(|(address, _)| **address != old).map(|(_, at)| *at).min()
    }

    /// Counts what an event says.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Ready { at_ms } => self.ready_ms = Some(*at_ms),
            Event::Gap(gap) => {
                if self.gaps.len() < GAPS_LISTED {
                    self.gaps.push(*gap);
                }
            }
            Event::Progress { at_ms, bytes } => self.progress.push((*at_ms, *bytes)),
            Event::Probe(sample) => self.apply_probe(sample),
            Event::NameChanged(change) => self.names.push(*change),
            Event::Lost { .. } | Event::Closed { .. } | Event::Report(_) => {}
        }
    }

    fn apply_probe(&mut self, sample: &ProbeSample) {
        self.requests += 1;
        *self.outcomes.entry(sample.outcome).or_default() += 1;
        if let Some(address) = sample.address {
            let last = self.last_used_ms.entry(address).or_default();
            *last = sample.at_ms.max(*last);
            if sample.outcome == Outcome::Ok {
                let first = self.first_ok_ms.entry(address).or_insert(sample.at_ms);
                *first = sample.at_ms.min(*first);
                self.longest_ms = self.longest_ms.max(sample.latency_ms);
            }
        }
        if let Some(boot_id) = &sample.boot_id {
            *self.boot_ids.entry(boot_id.clone()).or_default() += 1;
        }
        if self.probes.len() < PROBES_KEPT {
            self.probes.push(sample.clone());
        }
    }
}
