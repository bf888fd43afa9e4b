//! The main job, shown: a web server moves while a client uses it.
//!
//! Plays the scene in one order: client opens its connections, `longhaul migrate` moves the machine,
//! old connections end, the tunnel comes down, the machine is stopped and its disk compared. What held
//! is [`checks`]' to say; everything is measured from outside.

use std::net::IpAddr;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use gateway::api::types::{MigrationView, StatusView};

use super::SceneOptions;
use super::checks;
use super::disk_check::{self, DiskFindings};
use super::monitor::{GuestEvent, Monitor, connect_later};
use super::names::Names;
use super::outside::{self, NameWatch};
use super::programs::Programs;
use super::scene::{Scene, VM};
use super::traces;
use super::traffic::Client;
use crate::guest::image::lab_folder;
use crate::report::{RateReading, RateSample};
use crate::topology::Watched;
use crate::traffic::{TrafficPlan, TrafficReport};
use crate::wan::{Direction, Measured, PacketMatch, Tally};

/// Everything that was seen, for the checks and the report.
pub struct Seen {
    /// Zero of all times.
    pub epoch_unix_ms: u64,
    /// The WAN as measured.
    pub measured: Measured,
    /// The migration as the gateway shows it.
    pub view: MigrationView,
    /// Events of the source's QEMU.
    pub events_a: Vec<GuestEvent>,
    /// Events of the destination's QEMU.
    pub events_b: Vec<GuestEvent>,
    /// QEMUs of the machine that work at site a and at site b afterwards.
    pub qemus: (usize, usize),
    /// Run state at the destination afterwards.
    pub state_b: Option<String>,
    /// The client's report.
    pub traffic: TrafficReport,
    /// What the gateways put on the WAN from a to b while the machine moved, IP packets.
    pub wan_forward: Tally,
    /// The WAN's throughput while the machine moved, by the emulator's count.
    pub wan_rate: Vec<RateSample>,
    /// Packets to the care-of address on the core's link to site b.
    pub direct: Tally,
    /// Packets to the care-of address seen at site a's router.
    pub through_a: Tally,
    /// The machine's home address, and the one that site b is to give it.
    pub addresses: (IpAddr, IpAddr),
    /// When the name server first answered without the home address.
    pub name_moved_unix_ms: Option<u64>,
    /// Site a still attracted the home address while the old connections were open.
    pub attracted: bool,
    /// When the last old connection had ended.
    pub old_closed_unix_ms: u64,
    /// When site a was seen to attract the home address no longer.
    pub released_unix_ms: Option<u64>,
    /// The name server's answer at the end: addresses and TTL.
    pub name: (Vec<IpAddr>, Option<u32>),
    /// Disk comparison.
    pub disk: DiskFindings,
    /// Site a's status at the end.
    pub status_a: StatusView,
}

/// How long the tunnel may take to come down after the last old connection.
const TUNNEL_LIMIT: Duration = Duration::from_secs(60);

/// The machine stayed where it was.
#[derive(Debug, thiserror::Error)]
#[error("The machine did not move: {0}")]
pub struct Stayed(String);

/// Plays it. True if every promise held.
pub async fn run(options: SceneOptions, programs: &Programs) -> Result<bool> {
    let name = options.name.clone();
    let scene = Scene::build(options, programs).await?;
    println!(
        "two sites, gateways, a {} name server and a client are up; WAN by the {} emulator",
        format!("{:?}", scene.options.dns).to_lowercase(),
        scene.emulator.name()
    );
    let played = play(&scene).await;
    let (options, emulator) = (scene.options.clone(), scene.emulator);
    let logs = (scene.a.log_tail(), scene.b.log_tail());
    let left = scene.close();
    let seen = match played {
        Ok(seen) => seen,
        Err(error) => {
            eprintln!("site a's last words:\n{}\nsite b's last words:\n{}", logs.0, logs.1);
            // A report of an earlier run must not stand for this one.
            let (report, series) = checks::failed(&options, emulator, &error, left);
            report.write(&lab_folder(), &series)?;
            return Err(error.context(format!("Logs are in {}", lab_folder().join(name).display())));
        }
    };
    let (report, series) = checks::report(&options, emulator, &seen, left);
    let folder = report.write(&lab_folder(), &series)?;
    checks::print(&report);
    println!("{}", folder.join("report.html").display());
    Ok(report.all_held())
}

async fn play(scene: &Scene) -> Result<Seen> {
    let measured = scene.measure()?;
    println!(
        "WAN asked {:.1} ms, {:.1} Mbit/s; measured {:.1} ms, {:.1} Mbit/s",
        scene.options.rtt.as_secs_f64() * 1e3,
        scene.options.rate_mbit,
        measured.rtt_ms,
        measured.rate_mbit
    );
    let booted = scene.start_guest().await?;
    println!("{VM} runs at site a ({:.1} s to boot)", booted.as_secs_f64());
    let monitor_a = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
    let monitor_b = connect_later(scene.b.observer(VM), Duration::from_secs(900));
    let home = scene.home()?;
    let care_of = scene.world.site("b")?.spec.address(200).into();
    let direct = scene.world.watch_client_to("b", "direct", PacketMatch::to(care_of))?;
    let through_a = scene.world.watch_router("a", "through_a", PacketMatch::to(care_of))?;
    let epoch_unix_ms = unix_ms();
    let mut client = start_client(scene, epoch_unix_ms).await?;
    println!(
        "the client has a record connection, a download and an idle connection open, and asks by name every 100 ms"
    );
    let name_watch = NameWatch::begin(&scene.names, &Scene::name(), home);
    let before = forward(scene)?;
    let (view, wan_rate) = sampled(scene, epoch_unix_ms, migrate(scene)).await?;
    let wan_forward = since(before, forward(scene)?);
    if view.progressing != gateway::api::types::Progressing::Moved {
        bail!(Stayed(view.reason.unwrap_or_default()));
    }
    let state_b_early = monitor_b.join().map_err(|_| anyhow::anyhow!("The monitor broke"))?;
    let mut monitor_b = state_b_early.context("No monitor on site b's QEMU")?;
    wait_for_direct(scene, &direct).await?;
    let host_a = &scene.world.site("a")?.host;
    let attracted = outside::attracts(host_a, home)?;
    client.close_old().await?;
    let old_closed_unix_ms = unix_ms();
    println!("old connections have ended");
    let released_unix_ms = outside::released(host_a, home, TUNNEL_LIMIT).await?;
    wait_for_ttl(scene).await?;
    let traffic = client.finish().await?;
    let qemus = (traces::qemus(&scene.a).len(), traces::qemus(&scene.b).len());
    let state_b = monitor_b.state().ok();
    let records = scene.names.read(&Scene::name())?;
    let (events_a, events_b) = (monitor_a.events(), monitor_b.events());
    let status_a = scene.a.client().status().await?;
    let disk = disk_check::compare(scene, &mut monitor_b, &view.id, 1).await?;
    Ok(Seen {
        epoch_unix_ms,
        measured,
        view,
        events_a,
        events_b,
        qemus,
        state_b,
        traffic,
        wan_forward,
        wan_rate,
        direct: direct.tally()?,
        through_a: through_a.tally()?,
        addresses: (home, care_of),
        name_moved_unix_ms: name_watch.end(),
        attracted,
        old_closed_unix_ms,
        released_unix_ms,
        name: (records.addresses.clone(), records.ttl_s()),
        disk,
        status_a,
    })
}

async fn start_client(scene: &Scene, epoch_unix_ms: u64) -> Result<Client> {
    // A fortieth of the link, for longer than the move can take: about 220 MB travel. Slow enough for a
    // sender that takes the WAN's losses for congestion.
    let rate = scene.options.rate_mbit * 1e6 / 8.0;
    let expected_s = 220e6 / rate;
    let download_rate = rate / 40.0;
    let download_s = expected_s * 1.4 + 20.0;
    let bytes = download_rate * download_s;
    let mut plan = TrafficPlan::new(epoch_unix_ms)
        .with_old_connections(scene.home()?, bytes as u64, download_rate as u64)
        .with_requests(&Scene::name(), Names::address());
    // A move that was quick leaves most of the download to be done.
    plan.close_timeout_ms += (download_s * 1e3) as u64;
    Client::start(&scene.world.client, plan).await
}

/// What an operator types, with its progress on this program's output.
async fn migrate(scene: &Scene) -> Result<MigrationView> {
    println!("$ longhaul migrate {VM} --to b");
    let status = tokio::process::Command::new(&scene.programs.longhaul)
        .arg("--socket")
        .arg(scene.a.socket())
        .args(["migrate", VM, "--to", "b"])
        .stdin(Stdio::null())
        .status()
        .await?;
    let views = scene.a.client().status().await?.migrations;
    let view = views.into_iter().next_back().context("The gateway shows no migration")?;
    if !status.success() && view.reason.is_none() {
        bail!("longhaul migrate ended with {status}");
    }
    Ok(view)
}

/// New requests reach the care-of address without a detour once the client's resolver asks again.
async fn wait_for_direct(scene: &Scene, direct: &Watched) -> Result<()> {
    let limit = Duration::from_secs(u64::from(scene.options.ttl_s) + 20);
    let deadline = Instant::now() + limit;
    while direct.tally()?.packets == 0 {
        if Instant::now() > deadline {
            println!("no new request has reached site b directly within {limit:?}");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("new requests reach site b directly");
    Ok(())
}

/// Waits until the name has its TTL of before, or not much longer than that may take.
async fn wait_for_ttl(scene: &Scene) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while scene.names.read(&Scene::name())?.ttl_s() != Some(scene.options.ttl_s) && Instant::now() < deadline
    {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Does `work`, and reads five times a second what the WAN carries meanwhile.
async fn sampled<T>(
    scene: &Scene,
    epoch_unix_ms: u64,
    work: impl Future<Output = Result<T>>,
) -> Result<(T, Vec<RateSample>)> {
    let mut work = std::pin::pin!(work);
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    ticks.tick().await;
    let (mut last, mut samples) = (reading(scene, epoch_unix_ms)?, Vec::new());
    loop {
        let done = tokio::select! {
            done = &mut work => Some(done?),
            _ = ticks.tick() => None,
        };
        let now = reading(scene, epoch_unix_ms)?;
        samples.extend(RateSample::between(last, now));
        last = now;
        if let Some(done) = done {
            return Ok((done, samples));
        }
    }
}

fn reading(scene: &Scene, epoch_unix_ms: u64) -> Result<RateReading> {
    let bytes = |direction| Ok::<_, anyhow::Error>(scene.world.wan.counters(direction)?.delivered.bytes);
    Ok(RateReading {
        at_ms: unix_ms().saturating_sub(epoch_unix_ms),
        forward_bytes: bytes(Direction::ToFar)?,
        backward_bytes: bytes(Direction::ToNear)?,
    })
}

fn forward(scene: &Scene) -> Result<Tally> {
    let counters = scene.world.wan.counters(Direction::ToFar)?;
    Ok(counters.class("gateways").context("The WAN does not count the gateways")?.offered)
}

fn since(before: Tally, after: Tally) -> Tally {
    Tally { packets: after.packets - before.packets, bytes: after.bytes - before.bytes }
}

/// Milliseconds since the UNIX epoch.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Builds the demo's world and guest and opens a shell in site a's host.
pub async fn shell(options: SceneOptions, programs: &Programs) -> Result<bool> {
    let scene = Scene::build(SceneOptions { name: "shell".into(), ..options }, programs).await?;
    scene.start_guest().await?;
    let (host, client) = (&scene.world.site("a")?.host, &scene.world.client);
    println!("You are on site a's host (namespace {}). {VM} runs; move it with", host.name());
    println!(
        "  {} --socket {} migrate {VM} --to b",
        scene.programs.longhaul.display(),
        scene.a.socket().display()
    );
    println!("The client is namespace {}; leave the shell to take everything down.", client.name());
    let mut shell = std::process::Command::new(std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into()));
    let mut child = host.spawn(&mut shell)?;
    tokio::task::spawn_blocking(move || child.wait()).await??;
    let left = scene.close();
    Ok(left.is_empty())
}
