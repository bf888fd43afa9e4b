//! What is the same for every racer: the client that uses the machine meanwhile, and what is counted from outside.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;

use super::cpu::CpuWatch;
use super::report::Measured;
use crate::scenario::demo::unix_ms;
use crate::scenario::monitor::GuestEvent;
use crate::scenario::names::Names;
use crate::scenario::scene::Scene;
use crate::scenario::traffic::Client;
use crate::topology::World;
use crate::traffic::{Outcome, TrafficPlan, TrafficReport};
use crate::wan::{Direction, Wan};

/// How long the client goes on after the move, so that a silence right after it is seen.
const AFTERWARDS: Duration = Duration::from_secs(3);

/// Records both ways, a download at a fortieth of the WAN's rate, an idle connection, and ten requests a second.
pub async fn start(rate_mbit: f64, address: IpAddr, world: &World) -> Result<Client> {
    let download_rate = rate_mbit.min(200.0) * 1e6 / 8.0 / 40.0;
    let mut plan = TrafficPlan::new(unix_ms())
        .with_old_connections(address, (download_rate * 20.0) as u64, download_rate as u64)
        .with_requests(&Scene::name(), Names::address());
    plan.close_timeout_ms = 120_000;
    Client::start(&world.client, plan).await
}

/// Ends the client a little after the move.
pub async fn finish(mut client: Client) -> Result<TrafficReport> {
    tokio::time::sleep(AFTERWARDS).await;
    // A connection that is lost cannot end; the report says so.
    let _ = client.close_old().await;
    client.finish().await
}

/// From the source's last stop to the destination's first resumption after it.
pub fn downtime_ms(source: &[GuestEvent], target: &[GuestEvent]) -> Option<f64> {
    let stop = source.iter().rfind(|event| event.name == "STOP")?.unix_ms;
    let resume = target.iter().find(|event| event.name == "RESUME" && event.unix_ms >= stop)?.unix_ms;
    Some(resume - stop)
}

/// What is counted while a machine moves.
pub struct Watched<'a> {
    wan: &'a Wan,
    before: u64,
    cpu: CpuWatch,
}

/// What was counted.
pub struct Counted {
    wan_bytes: u64,
    cpu_s: f64,
}

impl<'a> Watched<'a> {
    /// From now on.
    pub fn begin(world: &'a World) -> Result<Self> {
        let cpu = CpuWatch::begin(&[&world.site("a")?.host, &world.site("b")?.host])?;
        Ok(Self { wan: &world.wan, before: offered(&world.wan)?, cpu })
    }

    /// Until now.
    pub fn end(self) -> Result<Counted> {
        Ok(Counted { wan_bytes: offered(self.wan)? - self.before, cpu_s: self.cpu.end() })
    }
}

/// Bytes of IP packets that entered the WAN, both ways: whatever the move and the machine's clients cost there.
fn offered(wan: &Wan) -> Result<u64> {
    Direction::BOTH.into_iter().map(|way| Ok(wan.counters(way)?.offered.bytes)).sum()
}

impl Counted {
    /// Of a move that ended.
    pub fn finished(self, total: Duration, downtime_ms: Option<f64>, traffic: &TrafficReport) -> Measured {
        let right = |probe: &&crate::traffic::ProbeSample| probe.outcome == Outcome::Ok;
        let mut requests: Vec<f64> =
            traffic.probes.iter().filter(right).map(|probe| probe.latency_ms).collect();
        requests.sort_by(f64::total_cmp);
        let failed = traffic.http().failed;
        for probe in traffic.probes.iter().filter(|probe| probe.outcome != Outcome::Ok) {
            println!("a request failed: {probe:?}");
        }
        Measured {
            wan_bytes: self.wan_bytes,
            total_ms: Some(total.as_secs_f64() * 1e3),
            downtime_ms,
            client_gap_ms: traffic.client_gap_ms(),
            cpu_s: self.cpu_s,
            request_p50_ms: requests.get(requests.len() / 2).copied(),
            requests_failed: Some(failed),
            connections_lost: Some(traffic.connections().before - traffic.connections().survived),
            did_not_finish: false,
        }
    }

    /// Of one that was given up.
    pub fn unfinished(self) -> Measured {
        Measured { wan_bytes: self.wan_bytes, cpu_s: self.cpu_s, did_not_finish: true, ..Measured::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_from_the_last_stop_to_the_resumption_after_it() {
        let event = |name: &str, unix_ms| GuestEvent { name: name.to_owned(), unix_ms };
        let source = [event("STOP", 1.0), event("RESUME", 2.0), event("STOP", 10.0)];
        let target = [event("RESUME", 3.0), event("RESUME", 17.5)];
        assert_eq!(downtime_ms(&source, &target), Some(7.5));
        assert_eq!(downtime_ms(&source, &target[..1]), None);
    }
}
