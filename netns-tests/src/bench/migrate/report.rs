//! What the race found, as a table and as JSON: `{schema, profiles: {PROFILE: {workloads: {WORKLOAD: {runs: {PEER: {wan_bytes,
//! total_ms, downtime_ms, client_gap_ms, cpu_s, ...}}}}}}, left_out: {PEER: reason}}`. Medians of the rounds; a peer that did
//! not finish has `did_not_finish` and the bytes until then.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cell::{Profile, Run, Workload};
use crate::bench::median;

const SCHEMA: u32 = 1;

/// What one run of one racer showed. What could not be seen is left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes of IP packets on the WAN, both ways, from the order to move until the machine was there.
    pub wan_bytes: u64,
    /// From the order to move until the machine was there.
    pub total_ms: Option<f64>,
    /// From the source's stop to the destination's resumption, by QEMU's events.
    pub downtime_ms: Option<f64>,
    /// The longest silence of a connection that sends a record every 10 ms each way.
    pub client_gap_ms: Option<u64>,
    /// Processor time of gateways and QEMUs, the guest's own left out.
    pub cpu_s: f64,
    /// The median time of a request to the web server meanwhile: how slow the guest was.
    pub request_p50_ms: Option<f64>,
    /// Requests that failed.
    pub requests_failed: Option<u64>,
    /// Connections that did not live through it.
    pub connections_lost: Option<u64>,
    /// It was given up when its time was over.
    pub did_not_finish: bool,
}

/// All results so far.
#[derive(Debug, Default)]
pub struct Outcome {
    runs: BTreeMap<(Profile, Workload), BTreeMap<String, Vec<Measured>>>,
    left_out: BTreeMap<String, String>,
}

impl Outcome {
    /// Takes one run's results: one for a peer, two (there and back) for the gateway.
    pub fn add(&mut self, run: &Run, measured: Vec<Measured>) {
        let peers = self.runs.entry((run.profile, run.workload)).or_default();
        for (suffix, measured) in ["", "-back"].into_iter().zip(measured) {
            peers.entry(format!("{}{suffix}", run.racer_name())).or_default().push(measured);
        }
    }

    /// Says why there is nothing.
    pub fn leave_out(&mut self, what: &str, reason: &str) {
        println!("left out: {what}: {reason}");
        self.left_out.insert(what.to_owned(), reason.to_owned());
    }

    /// One table per profile and workload; sizes in MiB, times in seconds where not said otherwise.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for ((profile, workload), peers) in &self.runs {
            text += &format!(
                "\n{:28} {:>9} {:>9} {:>12} {:>9} {:>7} {:>11} {:>6} {:>5}\n",
                format!("{}, {}", profile.name(), workload.name()),
                "WAN MiB",
                "total s",
                "downtime ms",
                "gap ms",
                "CPU s",
                "request ms",
                "failed",
                "lost"
            );
            for (peer, rounds) in peers {
                let of = |figure: &dyn Fn(&Measured) -> Option<f64>| middle(rounds, figure);
                let cell = |value: Option<f64>, digits: usize| {
                    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
                };
                let total = match rounds.iter().any(|round| round.did_not_finish) {
                    true => "no end".to_owned(),
                    false => cell(of(&|round| Some(round.total_ms? / 1e3)), 1),
                };
                text += &format!(
                    "{peer:28} {:>9} {total:>9} {:>12} {:>9} {:>7} {:>11} {:>6} {:>5}\n",
                    cell(of(&|round| Some(round.wan_bytes as f64 / f64::from(1 << 20))), 1),
                    cell(of(&|round| round.downtime_ms), 0),
                    cell(of(&|round| Some(round.client_gap_ms? as f64)), 0),
                    cell(of(&|round| Some(round.cpu_s)), 1),
                    cell(of(&|round| round.request_p50_ms), 1),
                    cell(of(&|round| Some(round.requests_failed? as f64)), 0),
                    cell(of(&|round| Some(round.connections_lost? as f64)), 0),
                );
            }
        }
        for (what, reason) in &self.left_out {
            text += &format!("left out: {what}: {reason}\n");
        }
        text
    }

    /// The report for programs.
    pub fn json(&self) -> Value {
        let mut profiles = json!({});
        for ((profile, workload), peers) in &self.runs {
            let runs: serde_json::Map<String, Value> =
                peers.iter().map(|(peer, rounds)| (peer.clone(), medians(rounds))).collect();
            profiles[profile.name()]["workloads"][workload.name()] = json!({ "runs": runs });
        }
        json!({ "schema": SCHEMA, "profiles": profiles, "left_out": self.left_out })
    }
}

fn medians(rounds: &[Measured]) -> Value {
    let of = |figure: &dyn Fn(&Measured) -> Option<f64>| middle(rounds, figure);
    let whole = |value: Option<f64>| value.map(|value| value.round() as u64);
    let tenths = |value: Option<f64>| value.map(|value| (value * 10.0).round() / 10.0);
    let mut object = json!({
        "wan_bytes": whole(of(&|round| Some(round.wan_bytes as f64))),
        "total_ms": whole(of(&|round| round.total_ms)),
        "downtime_ms": tenths(of(&|round| round.downtime_ms)),
        "client_gap_ms": whole(of(&|round| Some(round.client_gap_ms? as f64))),
        "cpu_s": of(&|round| Some(round.cpu_s)).map(|value| (value * 100.0).round() / 100.0),
        "request_p50_ms": tenths(of(&|round| round.request_p50_ms)),
        "requests_failed": whole(of(&|round| Some(round.requests_failed? as f64))),
        "connections_lost": whole(of(&|round| Some(round.connections_lost? as f64))),
        "rounds": rounds.len(),
    });
    if rounds.iter().any(|round| round.did_not_finish) {
        object["did_not_finish"] = true.into();
        // Some rounds may have ended: their times are not those of all.
        object["total_ms"] = Value::Null;
    }
    object
}

fn middle(rounds: &[Measured], figure: &dyn Fn(&Measured) -> Option<f64>) -> Option<f64> {
    median(&rounds.iter().filter_map(figure).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::super::cell::{Control, Racer};
    use super::*;

    #[test]
    fn the_json_has_medians_both_ways_and_says_who_did_not_finish() {
        let mut outcome = Outcome::default();
        let ours =
            Run { profile: Profile::Lossy, workload: Workload::Web, racer: Racer::Longhaul, control: None };
        for wan_bytes in [1, 9, 2] {
            let there = Measured { wan_bytes, total_ms: Some(5.4), ..Measured::default() };
            let back = Measured { wan_bytes: 7, ..Measured::default() };
            outcome.add(&ours, vec![there, back]);
        }
        let peer = Run { racer: Racer::QemuTcp, control: Some(Control::Cubic), ..ours };
        let given_up = Measured { wan_bytes: 11, did_not_finish: true, ..Measured::default() };
        outcome.add(&peer, vec![given_up]);
        outcome.leave_out("virsh", "not installed");
        let json = outcome.json();
        let runs = &json["profiles"]["lossy"]["workloads"]["web"]["runs"];
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!((&runs["longhaul"]["wan_bytes"], &runs["longhaul"]["total_ms"]), (&json!(2), &json!(5)));
        assert_eq!(runs["longhaul-back"]["wan_bytes"], 7);
        assert_eq!(runs["qemu-tcp-cubic"]["did_not_finish"], true);
        assert!(runs["qemu-tcp-cubic"]["total_ms"].is_null());
        assert_eq!(json["left_out"]["virsh"], "not installed");
        assert!(outcome.table().contains("no end"));
    }
}
