//! QEMU alone, as an experienced operator moves a machine with it today: the other site's QEMU waits, its NBD server takes
//! the disk from a mirror job, memory follows, and the mirror ends in the pause (`pause-before-switchover`). Orders reach
//! both QEMUs at once, without a round trip between the sites, and bandwidth is not limited: both favour the peer.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::cell::{Racer, Run};
use super::client::{self, Watched};
use super::report::Measured;
use super::stretch;
use crate::cleanup::Lab;
use crate::guest::boot::{BootOptions, Nic};
use crate::guest::image::{GuestImage, ImageSpec};
use crate::scenario::gateway::PORT;
use crate::scenario::monitor::Monitor;
use crate::scenario::names::Names;
use crate::scenario::programs::Programs;
use crate::scenario::scene::{Scene, VM_NUMBER, console_ready, guest_ports};
use crate::topology::{BRIDGE, Site, World, WorldSpec};
use crate::wan::Emulator;

const NBD_PORT: u16 = 10_809;
const MIGRATION_PORT: u16 = 4444;
const TAP: &str = "tap0";
const LOOK: Duration = Duration::from_millis(5);
/// A rate that no link here has; QEMU's default would be 128 MiB/s.
const UNLIMITED: u64 = 1 << 40;
/// The secret of QEMU's TLS, known to one run only.
const SECRET: &str = "qemu:4c6f6e676861756c206c61626f7261746f7279";

/// Plays one run.
pub async fn race(run: &Run, limit: Duration, name: &str, programs: &Programs) -> Result<Measured> {
    let options = run.scene(name.to_owned());
    let image = GuestImage::ensure(&ImageSpec::new(&programs.guest_agent))?;
    let mut spec = WorldSpec::two_sites(options.wan(), Emulator::detect()?, PORT);
    spec.open_tcp_ports = guest_ports();
    spec.open_tcp_ports.extend([NBD_PORT, MIGRATION_PORT]);
    let world = World::build(Lab::start()?, &spec)?;
    let played = play(run, limit, &world, &image, options.ttl_s).await;
    let left = world.close();
    let measured = played?;
    if !left.is_empty() {
        bail!("This was left: {left:?}");
    }
    Ok(measured)
}

async fn play(run: &Run, limit: Duration, world: &World, image: &GuestImage, ttl_s: u32) -> Result<Measured> {
    let (a, b) = (world.site("a")?, world.site("b")?);
    for site in [a, b] {
        if let Some(control) = run.control {
            // By the route: a namespace may choose among the host's unrestricted ones only, and QEMU does not choose.
            let route = format!("route replace default via {}", site.spec.router_address());
            site.host.ip(&[format!("{route} congctl {}", control.name())])?;
        }
    }
    stretch::join(world)?;
    let home = a.spec.address(VM_NUMBER).into();
    let names = world.lab.scratch().join("dns");
    let mut names = Names::start(
        crate::scenario::options::DnsServer::Hickory,
        &world.dns,
        &names,
        &Scene::name(),
        home,
        ttl_s,
    )?;
    names.wait(&Scene::name())?;
    let (mut source, mut target) =
        (Side::start(world, a, run, image, false)?, Side::start(world, b, run, image, true)?);
    source.monitor.ask("cont", json!({}))?;
    console_ready(&source.console(), Duration::from_secs(120)).await?;
    let client = client::start(run.profile.path().0, home, world).await?;
    let watched = Watched::begin(world)?;
    let begun = Instant::now();
    let destination = b.host_address().to_string();
    let moved = Move { run, destination, deadline: begun + limit }.perform(&mut source, &mut target).await?;
    let (total, counted) = (begun.elapsed(), watched.end()?);
    if !moved {
        return Ok(counted.unfinished());
    }
    let downtime = client::downtime_ms(&source.monitor.events(), &target.monitor.events());
    let traffic = client::finish(client).await?;
    Ok(counted.finished(total, downtime, &traffic))
}

/// One QEMU. Ends with its handle.
struct Side {
    monitor: Monitor,
    folder: PathBuf,
    child: Child,
}

impl Drop for Side {
    fn drop(&mut self) {
        // One that has ended by itself needs nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Side {
    fn start(world: &World, site: &Site, run: &Run, image: &GuestImage, incoming: bool) -> Result<Self> {
        let folder = world.lab.scratch().join(format!("qemu-{}", site.spec.name));
        std::fs::create_dir_all(&folder)?;
        site.host
            .ip(&[format!("tuntap add {TAP} mode tap"), format!("link set {TAP} master {BRIDGE} up")])?;
        let disk = match incoming {
            false => image.copy_disks(&folder)?.root,
            true => {
                let disk = folder.join("root.img");
                std::fs::File::create(&disk)?.set_len(image.root_template.metadata()?.len())?;
                disk
            }
        };
        std::fs::write(folder.join("keys.psk"), format!("{SECRET}\n"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(hardware(run, &disk.display().to_string())).args(kernel(world, run, image)?);
        let path = |name: &str| folder.join(name).display().to_string();
        command.args(["-chardev", &format!("file,id=console,path={}", path("console.log"))]);
        command.args(["-serial", "chardev:console"]);
        command.args(["-chardev", &format!("socket,id=qmp,path={},server=on,wait=off", path("qmp.sock"))]);
        command.args(["-mon", "chardev=qmp,mode=control"]);
        let endpoint = if incoming { "server" } else { "client,username=qemu" };
        let tls = format!("tls-creds-psk,id=tls0,dir={},endpoint={endpoint}", folder.display());
        command.args(["-object", &tls]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let log = std::fs::File::create(folder.join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = site.host.spawn(&mut command)?;
        let monitor = Monitor::connect(&folder.join("qmp.sock"), Duration::from_secs(20));
        let monitor = monitor.with_context(|| {
            let said = std::fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
            format!("QEMU at site {} says: {said}", site.spec.name)
        })?;
        Ok(Self { monitor, folder, child })
    }

    fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    fn migration(&mut self) -> Result<Value> {
        self.monitor.ask("query-migrate", json!({}))
    }
}

/// The gateway's own guest, so that both move the same machine.
fn hardware(run: &Run, disk: &str) -> Vec<String> {
    let memory = run.scene(String::new()).memory_mib;
    let file = json!({ "driver": "file", "node-name": "file", "filename": disk, "discard": "unmap" });
    let root = json!({ "driver": "raw", "node-name": "root", "file": "file", "discard": "unmap" });
    [
        "-nodefaults -no-user-config -S -display none -name web1,debug-threads=on",
        "-machine pc-q35-7.2,accel=tcg -cpu qemu64,enforce -smp 1",
        &format!("-m {memory}M"),
        &format!("-blockdev {file} -blockdev {root}"),
        "-device virtio-blk-pci,drive=root,id=disk,addr=03.0",
        &format!("-netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off"),
        "-device virtio-net-pci,netdev=net,mac=52:54:00:aa:00:10,romfile=,addr=05.0",
    ]
    .iter()
    .flat_map(|words| words.split(' '))
    .map(str::to_owned)
    .collect()
}

fn kernel(world: &World, run: &Run, image: &GuestImage) -> Result<Vec<String>> {
    let site = &world.site("a")?.spec;
    let (memory, disk) = run.workload.dirt_kib_per_s(run.profile.path().0);
    let nic =
        Nic::new("eth0", site.address(VM_NUMBER).into(), site.lan_prefix, Some(site.router_address().into()));
    let agent = vec![format!("--memory-kib-per-s={memory}"), format!("--disk-kib-per-s={disk}")];
    let boot = BootOptions { nics: vec![nic], agent, ..BootOptions::default() };
    let text = |path: &PathBuf| path.display().to_string();
    let words =
        ["-kernel", &text(&image.kernel), "-initrd", &text(&image.initrd), "-append", &boot.cmdline()];
    Ok(words.map(str::to_owned).to_vec())
}

/// The orders of one move.
struct Move<'a> {
    run: &'a Run,
    destination: String,
    deadline: Instant,
}

impl Move<'_> {
    /// `false` when the time was over before the move was.
    async fn perform(&self, source: &mut Side, target: &mut Side) -> Result<bool> {
        self.prepare(source, target)?;
        self.say("the mirror begins");
        let ready = |source: &mut Side| {
            let jobs = source.monitor.ask("query-block-jobs", json!({}))?;
            let job = jobs.get(0).context("The mirror job is gone: its NBD connection broke")?;
            Ok(job["ready"] == true)
        };
        if !self.until(source, ready).await? {
            return Ok(false);
        }
        self.say("the disks are in step, memory begins");
        source
            .monitor
            .ask("migrate", json!({ "uri": format!("tcp:{}:{MIGRATION_PORT}", self.destination) }))?;
        if !self.until(source, |source| reached(&source.migration()?, "pre-switchover")).await? {
            return Ok(false);
        }
        self.say("the guest has stopped");
        source.monitor.ask("block-job-cancel", json!({ "device": "mirror" }))?;
        let ended = |source: &mut Side| {
            let jobs = source.monitor.ask("query-block-jobs", json!({}))?;
            Ok(jobs.as_array().is_some_and(Vec::is_empty))
        };
        if !self.until(source, ended).await? {
            return Ok(false);
        }
        self.say("the mirror has ended");
        source.monitor.ask("migrate-continue", json!({ "state": "pre-switchover" }))?;
        if !self.until(target, |target| reached(&target.migration()?, "completed")).await? {
            return Ok(false);
        }
        target.monitor.ask("nbd-server-stop", json!({}))?;
        target.monitor.ask("cont", json!({}))?;
        self.until(source, |source| reached(&source.migration()?, "completed")).await
    }

    /// For the run's log.
    fn say(&self, what: &str) {
        println!(
            "{:.1} s left: {what}",
            self.deadline.saturating_duration_since(Instant::now()).as_secs_f64()
        );
    }

    fn prepare(&self, source: &mut Side, target: &mut Side) -> Result<()> {
        let tls = self.run.racer == Racer::QemuMultifd;
        for monitor in [&mut source.monitor, &mut target.monitor] {
            let on = |names: &[&str]| -> Value {
                names.iter().map(|name| json!({ "capability": name, "state": true })).collect()
            };
            let capabilities = match self.run.racer {
                Racer::QemuTcp | Racer::Longhaul => on(&["pause-before-switchover", "auto-converge"]),
                Racer::QemuMultifd => on(&["pause-before-switchover", "auto-converge", "multifd"]),
                Racer::QemuXbzrle => on(&["pause-before-switchover", "auto-converge", "xbzrle"]),
            };
            monitor.ask("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
            monitor.ask("migrate-set-parameters", json!({ "max-bandwidth": UNLIMITED }))?;
            if tls {
                let multifd =
                    json!({ "multifd-compression": "zstd", "multifd-channels": 2, "tls-creds": "tls0" });
                monitor.ask("migrate-set-parameters", multifd)?;
            }
        }
        let inet =
            json!({ "type": "inet", "data": { "host": self.destination, "port": NBD_PORT.to_string() } });
        let mut server = json!({ "addr": inet });
        let mut disk = json!({
            "driver": "nbd", "node-name": "target", "export": "root",
            "server": { "type": "inet", "host": self.destination, "port": NBD_PORT.to_string() },
        });
        if tls {
            server["tls-creds"] = "tls0".into();
            disk["tls-creds"] = "tls0".into();
        }
        target.monitor.ask("nbd-server-start", server)?;
        let export =
            json!({ "type": "nbd", "id": "root", "node-name": "root", "name": "root", "writable": true });
        target.monitor.ask("block-export-add", export)?;
        let listen = json!({ "uri": format!("tcp:{}:{MIGRATION_PORT}", self.destination) });
        target.monitor.ask("migrate-incoming", listen)?;
        source.monitor.ask("blockdev-add", disk)?;
        // A mirror in the background is ready when nothing is on its way for a moment: over 100 ms, with a guest that writes
        // ten times a second, that moment does not come (seen). libvirt's remedy: --copy-storage-synchronous-writes.
        let mirror = json!({ "job-id": "mirror", "device": "root", "target": "target", "sync": "full", "copy-mode": "write-blocking" });
        source.monitor.ask("blockdev-mirror", mirror)?;
        Ok(())
    }

    /// Waits until QEMU says so; `false` when the time is over.
    async fn until(&self, side: &mut Side, mut there: impl FnMut(&mut Side) -> Result<bool>) -> Result<bool> {
        while Instant::now() < self.deadline {
            if there(side)? {
                return Ok(true);
            }
            tokio::time::sleep(LOOK).await;
        }
        let jobs = side.monitor.ask("query-block-jobs", json!({}))?;
        println!("its time is over; memory: {}, disk: {jobs}", side.migration()?);
        Ok(false)
    }
}

fn reached(migration: &Value, wanted: &str) -> Result<bool> {
    match migration["status"].as_str() {
        Some("failed" | "cancelled") => bail!("QEMU's migration failed: {migration}"),
        status => Ok(status == Some(wanted)),
    }
}
