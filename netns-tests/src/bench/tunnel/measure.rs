//! One measurement: iperf3 or ping from the first host through a tunnel, and what it cost.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::peers::Running;
use super::place::Place;
use crate::bench::median;

/// How long iperf3 may take longer than asked before it counts as stuck.
const GRACE: Duration = Duration::from_secs(15);
/// The pause between two pings.
const PING_INTERVAL: Duration = Duration::from_millis(10);

/// What iperf3 sends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Transport<'a> {
    /// Streams with a congestion control, from the server if `back`, counted after they ran for `unseen`.
    Tcp { streams: u32, control: &'a str, back: bool, unseen: Duration },
    /// As many datagrams of this many bytes as it can.
    Udp { bytes: u32 },
}

impl Transport<'_> {
    fn unseen(self) -> Duration {
        match self {
            Self::Tcp { unseen, .. } => unseen,
            Self::Udp { .. } => Duration::ZERO,
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub bits_per_second: f64,
    pub packets_per_second: f64,
    pub cpu_s_per_gib: f64,
}

/// Round trips in µs, in order of length.
#[derive(Debug)]
pub(super) struct RoundTrips(Vec<f64>);

/// Named figures of one round.
#[derive(Debug, Default)]
pub(super) struct Figures(pub BTreeMap<String, f64>);

impl Figures {
    /// Adds one.
    pub fn put(&mut self, name: &str, value: f64) {
        self.0.insert(name.to_owned(), value);
    }
}

impl RoundTrips {
    /// Puts median and 99th percentile.
    pub fn put(&self, name: &str, figures: &mut Figures) {
        let p99 = self.0.len().saturating_sub(1) * 99 / 100;
        if let (Some(p50), Some(p99)) = (median(&self.0), self.0.get(p99)) {
            figures.put(&format!("{name}_p50_us"), p50);
            figures.put(&format!("{name}_p99_us"), *p99);
        }
    }
}

/// Runs iperf3 for `time`.
pub(super) fn iperf(
    place: &Place,
    tunnel: &Running,
    transport: Transport<'_>,
    time: Duration,
) -> Result<Run> {
    let before = tunnel.cpu_time()?;
    let unseen = transport.unseen();
    let report = finish(start_iperf(place, tunnel, transport, time)?, unseen + time + GRACE)?;
    // Both sums are of the whole run; what is counted gets its part by time.
    let counted = time.as_secs_f64() / (unseen + time).as_secs_f64();
    let tunnel_cpu = tunnel.cpu_time()?.saturating_sub(before).mul_f64(counted);
    let end = &report["end"];
    let seconds = end["sum_received"]["seconds"].as_f64().or(end["sum"]["seconds"].as_f64());
    let seconds = seconds.filter(|seconds| *seconds > 0.0).context("iperf3 measured no time")?;
    let (bytes, packets) = match transport {
        Transport::Tcp { .. } => {
            (end["sum_received"]["bytes"].as_f64().context("iperf3 counted no bytes")?, 0.0)
        }
        Transport::Udp { bytes } => {
            let sent = end["sum"]["packets"].as_f64().context("iperf3 counted no packets")?;
            let received = sent - end["sum"]["lost_packets"].as_f64().unwrap_or(0.0);
            (received * f64::from(bytes), received)
        }
    };
    if bytes <= 0.0 {
        bail!("nothing arrived");
    }
    let percent = |end_of: &str| end["cpu_utilization_percent"][end_of].as_f64().unwrap_or(0.0);
    let iperf_cpu = (percent("host_total") + percent("remote_total")) / 100.0 * seconds;
    Ok(Run {
        bits_per_second: bytes * 8.0 / seconds,
        packets_per_second: packets / seconds,
        cpu_s_per_gib: (tunnel_cpu.as_secs_f64() + iperf_cpu) / (bytes / f64::from(1 << 30)),
    })
}

/// Pings for `time` while nothing else uses the tunnel.
pub(super) fn round_trips(place: &Place, tunnel: &Running, time: Duration) -> Result<RoundTrips> {
    let count = (time.as_millis() / PING_INTERVAL.as_millis()).to_string();
    let interval = PING_INTERVAL.as_secs_f64().to_string();
    let (to, from) = (tunnel.to.to_string(), tunnel.from.to_string());
    let said = place.a.output("ping", &["-n", "-i", &interval, "-c", &count, "-I", &from, &to])?;
    let times = said.lines().filter_map(|line| line.split_once("time=")?.1.split(' ').next()?.parse().ok());
    let mut times: Vec<f64> = times.map(|ms: f64| ms * 1e3).collect();
    times.sort_by(f64::total_cmp);
    if times.is_empty() { bail!("no ping was answered") } else { Ok(RoundTrips(times)) }
}

/// The same while one TCP stream fills it.
pub(super) fn loaded_round_trips(place: &Place, tunnel: &Running, time: Duration) -> Result<RoundTrips> {
    let load = Transport::Tcp { streams: 1, control: "cubic", back: false, unseen: Duration::ZERO };
    let child = start_iperf(place, tunnel, load, time + Duration::from_secs(1))?;
    let times = round_trips(place, tunnel, time);
    finish(child, time + GRACE)?;
    times
}

fn start_iperf(place: &Place, tunnel: &Running, transport: Transport<'_>, time: Duration) -> Result<Child> {
    let mut command = Command::new("iperf3");
    command.args(["--json", "--client", &tunnel.to.to_string(), "--bind", &tunnel.from.to_string()]);
    command.args(["--time", &time.as_secs().max(1).to_string(), "--connect-timeout", "5000"]);
    match transport {
        Transport::Tcp { streams, control, back, unseen } => {
            command.args(["--omit", &unseen.as_secs().to_string()]);
            command.args(["--parallel", &streams.to_string(), "--congestion", control]);
            command.args(back.then_some("--reverse"));
        }
        Transport::Udp { bytes } => {
            command.args(["--udp", "--bitrate", "0", "--length", &bytes.to_string()]);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    place.a.spawn(&mut command)
}

/// Waits for iperf3, but not longer than `limit`.
fn finish(mut child: Child, limit: Duration) -> Result<Value> {
    let deadline = Instant::now() + limit;
    let mut output = child.stdout.take().context("iperf3 has no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut output, &mut text).map(|_| text)
    });
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("iperf3 did not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let Ok(text) = reader.join() else { bail!("iperf3's output cannot be read") };
    let report: Value = serde_json::from_str(&text?).context("iperf3 printed no JSON")?;
    match report["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(report),
    }
}
