//! The samples behind a report's plots.

use serde::{Deserialize, Serialize};

use crate::traffic::{Gap, ProbeSample, TrafficReport};

/// Samples over time, all in milliseconds since the scenario's start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Requests by name.
    pub probes: Vec<ProbeSample>,
    /// Silences of the record connection.
    pub gaps: Vec<Gap>,
    /// The download: time and bytes so far.
    pub progress: Vec<(u64, u64)>,
    /// Throughput on the WAN, as its emulator counted it.
    pub wan_rate: Vec<RateSample>,
    /// The guest's pause, from a monitor's STOP and RESUME.
    pub paused: Option<Gap>,
    /// Moments worth a line, with their names.
    pub marks: Vec<(u64, String)>,
}

/// One sample of throughput.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RateSample {
    /// End of the interval it was counted over.
    pub at_ms: u64,
    /// 10^6 bits a second from the source's site to the destination's.
    pub forward_mbit: f64,
    /// 10^6 bits a second the other way.
    pub backward_mbit: f64,
}

impl Series {
    /// The samples that the client took.
    #[must_use]
    pub fn of_traffic(report: &TrafficReport) -> Self {
        Self {
            probes: report.probes.clone(),
            gaps: report.gaps.clone(),
            progress: report.progress.clone(),
            ..Self::default()
        }
    }
}
