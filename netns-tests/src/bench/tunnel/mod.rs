//! `cargo lab bench tunnel`: this tunnel beside plain routing and the best user-space tunnels that the package
//! registries have, on a clean path and on a long one that loses.
//!
//! ```text
//!   a (client, home) ===== veth, or the emulated WAN ===== b (server, visited) --- guest
//! ```
//!
//! All tunnels stand at the same time and are measured in turn, round after round, so that what else the
//! machine does meets all of them; medians are reported. Ours is the real code path: the gateway's `Link`
//! and `Tunnel` in two processes, a home address that was attracted at a and visits b. It has one hop more than
//! the others, to the guest's namespace. Processor time is that of the tunnel's processes and of both ends of
//! iperf3, as offloads move work between them.

mod end;
mod install;
mod measure;
mod peers;
mod place;
mod report;

use std::time::Duration;

use anyhow::Result;

pub use end::{EndArguments, end_main};
pub use report::Outcome;

use measure::{Figures, Transport};
use peers::{Kind, Running};
pub use place::Path;

use place::Place;

/// Data of a UDP packet of 1400 bytes, the longest that fits all of the tunnels as they come.
const LARGE_DATAGRAM: u32 = 1400 - 28;

/// What is measured and for how long.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Length of one measurement.
    pub seconds: u64,
    /// How often each is repeated.
    pub rounds: u32,
    /// Only tunnels with these names; all if empty.
    pub only: Vec<String>,
    /// Only this path; both if none.
    pub path: Option<Path>,
}

/// Measures, prints the table and writes `tunnel.json`, or `tunnel-part.json` if only a part was wanted.
pub fn run(options: &BenchOptions) -> Result<()> {
    let mut outcome = Outcome::default();
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| options.wants(*kind)).collect();
    let ready = peers::install(&kinds, &mut outcome)?;
    for path in [Path::Clean, Path::Lossy] {
        if options.path.is_some_and(|only| only != path) {
            continue;
        }
        measure_path(options, path, &ready, &mut outcome)?;
    }
    println!("{}", outcome.table());
    let partial = options.path.is_some() || !options.only.is_empty();
    let file = super::results("tunnel", partial, "json")?;
    super::keep(&file, serde_json::to_vec_pretty(&outcome)?)
}

impl BenchOptions {
    fn wants(&self, kind: Kind) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == kind.name())
    }
}

fn measure_path(
    options: &BenchOptions,
    path: Path,
    ready: &[peers::Installed],
    outcome: &mut Outcome,
) -> Result<()> {
    let place = Place::build(path)?;
    let mut running = Vec::new();
    for (index, installed) in ready.iter().enumerate() {
        match peers::start(&place, installed, index as u8) {
            Ok(tunnel) => running.push(tunnel),
            Err(error) => outcome.skip(path, installed.kind, &installed.version, &format!("{error:#}")),
        }
    }
    for round in 1..=options.rounds {
        for tunnel in &running {
            println!("{} {}: round {round} of {}", path.name(), tunnel.kind.name(), options.rounds);
            let figures = measure_one(options, path, &place, tunnel);
            outcome.add(path, tunnel.kind, &tunnel.version, figures);
        }
    }
    drop(running);
    place.close()
}

fn measure_one(options: &BenchOptions, path: Path, place: &Place, tunnel: &Running) -> Figures {
    let time = match path {
        Path::Clean => Duration::from_secs(options.seconds),
        Path::Lossy => Duration::from_secs(options.seconds * 5),
    };
    let mut figures = Figures::default();
    let mut tcp = |name: &str, streams: u32, control: &str, back: bool, cpu: bool| {
        let transport = Transport::Tcp { streams, control, back, unseen: path.unseen() };
        match measure::iperf(place, tunnel, transport, time) {
            Ok(run) => {
                figures.put(name, run.bits_per_second / if path == Path::Clean { 1e9 } else { 1e6 });
                if cpu {
                    figures.put("cpu_s_per_gib", run.cpu_s_per_gib);
                }
            }
            Err(error) => println!("  {name}: {error:#}"),
        }
    };
    match path {
        Path::Clean => {
            tcp("tcp1_gbit", 1, "cubic", false, true);
            tcp("tcp1_back_gbit", 1, "cubic", true, false);
            tcp("tcp1_bbr_gbit", 1, "bbr", false, false);
            tcp("tcp8_gbit", 8, "cubic", false, false);
            tcp("tcp8_back_gbit", 8, "cubic", true, false);
            measure_packets(place, tunnel, time, &mut figures);
        }
        Path::Lossy => {
            tcp("cubic_mbit", 1, "cubic", false, false);
            tcp("bbr_mbit", 1, "bbr", false, true);
        }
    }
    figures
}

fn measure_packets(place: &Place, tunnel: &Running, time: Duration, figures: &mut Figures) {
    for (name, bytes) in [("udp64_kpps", 64), ("udp1400_kpps", LARGE_DATAGRAM)] {
        match measure::iperf(place, tunnel, Transport::Udp { bytes }, time) {
            Ok(run) => figures.put(name, run.packets_per_second / 1e3),
            Err(error) => println!("  {name}: {error:#}"),
        }
    }
    match measure::round_trips(place, tunnel, time) {
        Ok(times) => times.put("rtt", figures),
        Err(error) => println!("  rtt: {error:#}"),
    }
    match measure::loaded_round_trips(place, tunnel, time) {
        Ok(times) => times.put("loaded_rtt", figures),
        Err(error) => println!("  loaded_rtt: {error:#}"),
    }
}
