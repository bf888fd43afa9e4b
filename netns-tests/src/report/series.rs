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

/// What the WAN had carried at a moment.
#[derive(Debug, Clone, Copy)]
pub struct RateReading {
    /// When.
    pub at_ms: u64,
    /// Bytes from the source's site to the destination's.
    pub forward_bytes: u64,
    /// Bytes the other way.
    pub backward_bytes: u64,
}

impl RateSample {
    /// The throughput between two readings; none if no time lies between them.
    #[must_use]
    pub fn between(before: RateReading, after: RateReading) -> Option<Self> {
        let ms = after.at_ms.checked_sub(before.at_ms).filter(|ms| *ms > 0)?;
        let mbit = |before: u64, after: u64| after.saturating_sub(before) as f64 * 8e-3 / ms as f64;
        Some(Self {
            at_ms: after.at_ms,
            forward_mbit: mbit(before.forward_bytes, after.forward_bytes),
            backward_mbit: mbit(before.backward_bytes, after.backward_bytes),
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_what_was_carried_between_two_readings() {
        let before = RateReading { at_ms: 500, forward_bytes: 1000, backward_bytes: 0 };
        let after = RateReading { at_ms: 2500, forward_bytes: 25_001_000, backward_bytes: 250_000 };
        let sample = RateSample::between(before, after).unwrap();
        assert_eq!((sample.at_ms, sample.forward_mbit, sample.backward_mbit), (2500, 100.0, 1.0));
        assert_eq!(RateSample::between(after, after), None);
    }
}
