//! The disk path between two real QEMUs, over a queue instead of a WAN. No network, no root.
//!
//! The guests have no system: SeaBIOS finds nothing to boot. The disk is written by QEMU's own
//! `qemu-io` command through the guest device's backend, which takes the same way as a guest's write.

#![allow(clippy::unwrap_used, reason = "a step that fails here fails the test")]

#[path = "support/lateness.rs"]
mod lateness;

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway::chunk::{ChunkClosed, ChunkRecv, ChunkSend};
use gateway::disk::nbd::{NbdClient, NbdServer};
use gateway::disk::{
    Base, DiskMap, DiskSource, DiskSourceConfig, DiskTarget, DiskTargetError, SourceProgress, block_hashes,
};
use lateness::watch_lateness;
use longhaul_core::disk::{Barrier, SourceConfig, TargetConfig, TargetDisk, TargetError};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

const MIB: u64 = 1 << 20;

/// A queue of chunks that can stall, as a link does when the WAN is cut.
struct Sending {
    chunks: mpsc::UnboundedSender<(Bytes, Option<OwnedSemaphorePermit>)>,
    window: Arc<Semaphore>,
}

struct Receiving {
    chunks: mpsc::UnboundedReceiver<(Bytes, Option<OwnedSemaphorePermit>)>,
    flow: watch::Receiver<Flow>,
    /// Damages the chunk with this number.
    damage: Option<usize>,
    received: usize,
}

/// What the link does at the moment.
#[derive(Clone, Copy, PartialEq)]
enum Flow {
    Cut,
    /// One chunk in this time.
    Paced(Duration),
}

const FAST: Flow = Flow::Paced(Duration::ZERO);
const WINDOW: usize = 4;

fn chunk_queue(damage: Option<usize>) -> (Sending, Receiving, watch::Sender<Flow>) {
    let (flow_in, flow) = watch::channel(FAST);
    let (chunks_in, chunks) = mpsc::unbounded_channel();
    let sending = Sending { chunks: chunks_in, window: Arc::new(Semaphore::new(WINDOW)) };
    (sending, Receiving { chunks, flow, damage, received: 0 }, flow_in)
}

impl ChunkSend for Sending {
    async fn send(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        let place = self.window.clone().acquire_owned().await.map_err(|_| ChunkClosed)?;
        self.chunks.send((chunk, Some(place))).map_err(|_| ChunkClosed)
    }

    fn absorb(&mut self, chunk: Bytes) -> Result<(), ChunkClosed> {
        self.chunks.send((chunk, None)).map_err(|_| ChunkClosed)
    }

    fn unacknowledged(&self) -> u64 {
        ((WINDOW - self.window.available_permits()) * gateway::chunk::MAX_CHUNK) as u64
    }
}

impl ChunkRecv for Receiving {
    async fn recv(&mut self) -> Option<Bytes> {
        // Only the last step takes a chunk, so that giving up before it loses nothing.
        loop {
            let flow = *self.flow.wait_for(|flow| *flow != Flow::Cut).await.ok()?;
            if let Flow::Paced(time) = flow {
                tokio::time::sleep(time).await;
            }
            if *self.flow.borrow() != Flow::Cut {
                break;
            }
        }
        let (chunk, _place) = self.chunks.recv().await?;
        self.received += 1;
        if self.damage != Some(self.received) {
            return Some(chunk);
        }
        let mut bytes = chunk.to_vec();
        *bytes.last_mut()? ^= 1;
        Some(bytes.into())
    }
}

/// A QEMU of our own, ended with the test.
struct Qemu {
    child: Child,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    events: Vec<String>,
    slowest: (Duration, String),
}

impl Qemu {
    async fn start(directory: &Path, name: &str, disk: &Path, incoming: bool) -> Self {
        let socket = directory.join(format!("{name}.qmp"));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none"]);
        command.args(["-blockdev", &format!(
            "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
            disk.display()
        )]);
        command.args(["-device", "virtio-blk-pci,drive=disk0,id=vblk0"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        if incoming {
            // The device leaves its disk alone until a machine arrives, so that it can be exported.
            command.args(["-incoming", "defer", "-S"]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("QEMU starts");
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < Duration::from_secs(30) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("no QMP from QEMU: {error}"),
            }
        };
        let (reader, writer) = stream.into_split();
        let reader = BufReader::new(reader);
        let mut qemu = Self { child, reader, writer, events: vec![], slowest: Default::default() };
        qemu.line().await;
        qemu.run("qmp_capabilities", json!({})).await;
        qemu
    }

    async fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line);
        let read = tokio::time::timeout(Duration::from_secs(60), read).await.expect("QMP answers").unwrap();
        assert!(read > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).unwrap()
    }

    async fn run(&mut self, execute: &str, arguments: Value) -> Value {
        let asked = Instant::now();
        let command = json!({ "execute": execute, "arguments": arguments });
        self.writer.write_all(format!("{command}\n").as_bytes()).await.unwrap();
        loop {
            let mut answer = self.line().await;
            if let Some(event) = answer["event"].as_str() {
                let status = answer["data"]["status"].as_str().unwrap_or_default();
                self.events.push(format!("{event} {status}"));
                continue;
            }
            assert!(answer.get("error").is_none(), "{execute}: {answer}");
            self.slowest = self.slowest.clone().max((asked.elapsed(), execute.to_owned()));
            return answer["return"].take();
        }
    }

    /// Writes through the guest's device.
    async fn io(&mut self, command: &str) {
        let line = format!("qemu-io -d /machine/peripheral/vblk0/virtio-backend \"{command}\"");
        let said = self.run("human-monitor-command", json!({ "command-line": line })).await;
        assert!(!said.to_string().contains("rror"), "{command}: {said}");
    }

    async fn export(&mut self, socket: &Path, writable: bool) {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        self.run("nbd-server-start", json!({ "addr": address, "max-connections": 0 })).await;
        let export = json!({ "type": "nbd", "id": "exp0", "node-name": "disk0", "name": "disk0",
            "writable": writable });
        self.run("block-export-add", export).await;
    }

    async fn mirror_into(&mut self, socket: &Path, sync: &str) {
        let server = json!({ "type": "unix", "path": socket });
        let node = json!({ "node-name": "nbd0", "driver": "raw",
            "file": { "driver": "nbd", "export": "disk0", "server": server } });
        self.run("blockdev-add", node).await;
        let job = json!({ "job-id": "m0", "device": "disk0", "target": "nbd0", "sync": sync,
            "copy-mode": "background", "granularity": 65536, "auto-dismiss": true });
        self.run("blockdev-mirror", job).await;
        self.until_event("JOB_STATUS_CHANGE ready").await;
    }

    async fn end_mirror(&mut self) {
        self.events.clear();
        self.run("block-job-cancel", json!({ "device": "m0" })).await;
        self.until_event("JOB_STATUS_CHANGE null").await;
        self.run("blockdev-del", json!({ "node-name": "nbd0" })).await;
    }

    async fn until_event(&mut self, wanted: &str) {
        let started = Instant::now();
        while !self.events.iter().any(|event| event == wanted) {
            assert!(started.elapsed() < Duration::from_secs(60), "no {wanted}: {:?}", self.events);
            self.run("query-status", json!({})).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn quit(mut self) {
        self.run("quit", json!({})).await;
        let child = &mut self.child;
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(30), "QEMU does not quit");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It has ended already where the test came that far.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two QEMUs with a disk each, and the disk path between them.
struct Lab {
    directory: tempfile::TempDir,
    source_qemu: Qemu,
    target_qemu: Qemu,
    source: DiskSource,
    target: DiskTarget,
    flow: watch::Sender<Flow>,
    _map: Option<DiskMap>,
    _server: NbdServer,
}

/// What varies between the tests.
struct Scenario {
    size: u64,
    mirror: SourceConfig,
    target: TargetConfig,
    sync: &'static str,
    damage: Option<usize>,
    /// The images lie in memory, where the host's own disk does not delay `stop`, which flushes.
    in_memory: bool,
    /// The target's disk is of an earlier attempt, and the source is told what it holds.
    kept: bool,
    /// `base.raw` lies beside the target's disk.
    base: Beside,
}

/// What `base.raw` is.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// A copy of the disk of earlier.
    Kept,
    /// What the disk was cloned from.
    Template,
}

impl Default for Scenario {
    fn default() -> Self {
        let mirror = SourceConfig::default();
        let target = TargetConfig::default();
        let (damage, in_memory, kept, base) = (None, false, false, Beside::Nothing);
        Self { size: 32 * MIB, mirror, target, sync: "none", damage, in_memory, kept, base }
    }
}

impl Lab {
    /// Both sides up to the point where the copy runs. `None` where there is no QEMU.
    async fn start(scenario: Scenario, fill: impl FnOnce(&Path)) -> Option<Self> {
        let Ok(_) = Command::new("qemu-system-x86_64").arg("--version").output() else {
            println!("skipped: qemu-system-x86_64 is not installed");
            return None;
        };
        let directory = disk_directory(scenario.in_memory);
        let path = |name: &str| directory.path().join(name);
        for disk in ["a.raw", "b.raw"] {
            std::fs::File::create(path(disk)).unwrap().set_len(scenario.size).unwrap();
        }
        fill(&path("a.raw"));
        let mut source_qemu = Qemu::start(directory.path(), "a", &path("a.raw"), false).await;
        let mut target_qemu = Qemu::start(directory.path(), "b", &path("b.raw"), true).await;

        let (sending, receiving, flow) = chunk_queue(scenario.damage);
        target_qemu.export(&path("b.nbd"), true).await;
        let disk = NbdClient::connect(&path("b.nbd"), "disk0").await.unwrap();
        let (telling, told, _always_up) = chunk_queue(None);
        let owner = std::fs::metadata(path("b.raw")).unwrap().uid();
        let base = match scenario.base {
            Beside::Nothing => None,
            Beside::Kept => Some(Base::open(&path("base.raw"), scenario.size, owner).unwrap()),
            Beside::Template => Some(Base::of_template(&path("base.raw"), scenario.size).unwrap()),
        };
        let map = match (scenario.kept, base.clone()) {
            (true, base) => Some(DiskMap::of_kept_disk(path("b.raw"), disk.clone(), base, telling)),
            (false, Some(base)) => Some(DiskMap::of_copy_beside_new_disk(base, telling)),
            (false, None) => None,
        };
        let told = map.is_some().then_some(told);
        let target = DiskTarget::spawn(scenario.size, scenario.target, receiving, disk, base).unwrap();

        let config = DiskSourceConfig { mirror: scenario.mirror, ..DiskSourceConfig::default() };
        let (export, mut source) = DiskSource::spawn("disk0", scenario.size, config, sending, told);
        let server = NbdServer::bind(&path("mirror.nbd"), vec![export]).unwrap();
        source_qemu.mirror_into(&path("mirror.nbd"), scenario.sync).await;
        source_qemu.export(&path("a.nbd"), false).await;
        source.begin(&path("a.nbd"), "disk0").await.unwrap();
        Some(Self { directory, source_qemu, target_qemu, source, target, flow, _map: map, _server: server })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn until_in_step(&self) {
        let mut progress = self.source.progress();
        let in_step = progress.wait_for(in_step);
        tokio::time::timeout(Duration::from_secs(60), in_step).await.expect("in step").unwrap();
    }

    /// Stops the guest, ends the mirror and proves the barrier.
    async fn finish(&mut self) -> Barrier {
        self.source_qemu.run("stop", json!({})).await;
        self.source_qemu.end_mirror().await;
        let barrier = tokio::time::timeout(Duration::from_secs(60), self.source.finish()).await;
        let barrier = barrier.expect("finish ends").unwrap();
        let proven = tokio::time::timeout(Duration::from_secs(60), self.target.proves(barrier)).await;
        proven.expect("the proof comes").unwrap();
        barrier
    }

    /// Ends both QEMUs and compares their disks byte for byte.
    async fn compare(self) {
        let Self { directory, source_qemu, mut target_qemu, source, target, .. } = self;
        source.abort();
        target.close().await;
        target_qemu.run("block-export-del", json!({ "id": "exp0", "mode": "hard" })).await;
        target_qemu.until_event("BLOCK_EXPORT_DELETED ").await;
        assert_eq!(target_qemu.run("query-block-exports", json!({})).await, json!([]));
        source_qemu.quit().await;
        target_qemu.quit().await;
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        let (left, right) = (read("a.raw"), read("b.raw"));
        let differs = left.chunks(65536).zip(right.chunks(65536)).position(|(left, right)| left != right);
        assert_eq!((differs, left.len()), (None, right.len()), "first block that differs");
    }
}

/// All was read, and what the guest writes is as good as there.
fn in_step(progress: &SourceProgress) -> bool {
    let waiting = progress.queued_bytes + progress.unacknowledged_bytes;
    progress.total_bytes > 0 && progress.owed_bytes == 0 && waiting <= MIB
}

fn disk_directory(in_memory: bool) -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if in_memory && memory.is_dir() {
        return tempfile::tempdir_in(memory).unwrap();
    }
    tempfile::tempdir().unwrap()
}

/// Content that does not compress, with a hole in its second half.
fn noise(path: &Path, bytes: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let mut noise = vec![0; bytes as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let (first, second) = noise.split_at(noise.len() / 2);
    file.write_all_at(first, 0).unwrap();
    let end = file.metadata().unwrap().len();
    file.write_all_at(second, end - second.len() as u64).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_written_all_the_time_arrives_whole() {
    // Not a multiple of a block, as disks may be.
    let size = 256 * MIB + 5 * 512;
    let mirror = SourceConfig { target: TargetDisk::Zero, ..SourceConfig::default() };
    let scenario = Scenario { size, mirror, ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 128 * MIB)).await else { return };
    let started = Instant::now();
    // Slow enough for a busy host to have written all of it before the copy is over.
    lab.flow.send(Flow::Paced(Duration::from_millis(100))).unwrap();
    for round in 0..60u64 {
        let byte = round % 250 + 1;
        lab.source_qemu.io(&format!("write -P {byte} {} 192k", round * 4 * MIB + 4096)).await;
        lab.source_qemu.io(&format!("write -P {byte} {} 4k", round % 5 * MIB)).await;
        lab.source_qemu.io(&format!("write -z {} 1M", (round * 7 + 1) % 250 * MIB)).await;
        lab.source_qemu.io(&format!("discard {} 128k", (round * 11 + 2) % 250 * MIB)).await;
    }
    lab.source_qemu.io(&format!("write -P 9 {} 2560", size - 2560)).await;
    let during = *lab.source.progress().borrow();
    assert!(during.owed_bytes > 0, "the copy was over before the writes were");
    lab.flow.send(FAST).unwrap();
    lab.until_in_step().await;
    let copied = started.elapsed();
    lab.finish().await;
    let progress = *lab.source.progress().borrow();
    println!("256 MiB, half of it a hole: in step after {copied:.2?}, {:?}", progress.counters);
    assert!(progress.counters.sent_bytes < 200 * MIB, "holes do not travel");

    let left = NbdClient::connect(&lab.path("a.nbd"), "disk0").await.unwrap();
    let right = NbdClient::connect(&lab.path("b.nbd"), "disk0").await.unwrap();
    assert!(block_hashes(&left).await.unwrap() == block_hashes(&right).await.unwrap());
    lab.compare().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_copy_sends_only_what_differs() {
    // Not a multiple of a block, as disks may be.
    let size = 256 * MIB + 5 * 512;
    let mirror = SourceConfig { target: TargetDisk::Told, ..SourceConfig::default() };
    let scenario = Scenario { size, mirror, kept: true, ..Scenario::default() };
    let fill = |disk: &Path| {
        noise(disk, 200 * MIB);
        let kept = disk.with_file_name("b.raw");
        std::fs::copy(disk, &kept).unwrap();
        let file = std::fs::File::options().write(true).open(&kept).unwrap();
        file.set_len(size).unwrap();
        // Blocks that the first copy had wrong, cut short, not at all, and where the source has nothing.
        file.write_all_at(&[1; 100_000], 10 * MIB).unwrap();
        file.write_all_at(&[0; MIB as usize], 50 * MIB + 512).unwrap();
        file.write_all_at(&[2; MIB as usize], 120 * MIB).unwrap();
    };
    let Some(mut lab) = Lab::start(scenario, fill).await else { return };
    for round in 0..20u64 {
        lab.source_qemu.io(&format!("write -P {} {} 4k", round + 1, round * 3 * MIB)).await;
        lab.source_qemu.io(&format!("write -z {} 64k", (round * 7 + 1) * MIB)).await;
    }
    lab.until_in_step().await;
    lab.finish().await;
    let (source, target) = (*lab.source.progress().borrow(), *lab.target.progress().borrow());
    println!("200 MiB of 256 MiB kept: {:?}", source.counters);
    assert!(source.counters.chunk_bytes < 6 * MIB, "{:?}", source.counters);
    assert!(target.counters.same_bytes > 190 * MIB, "{:?}", target.counters);
    lab.compare().await;
}

/// A guest that was here before, with 200 MiB of noise, and comes back with some of it changed. `partial` is what an
/// attempt of before had sent, if there was one.
async fn comes_back(partial: Option<&[u8]>) -> Option<(Lab, Vec<u8>)> {
    let size = 256 * MIB + 5 * 512;
    let mirror = SourceConfig { target: TargetDisk::Told, ..SourceConfig::default() };
    let kept = partial.is_some();
    let scenario = Scenario { size, mirror, base: Beside::Kept, kept, ..Scenario::default() };
    let mut base = Vec::new();
    let fill = |disk: &Path| {
        noise(disk, 200 * MIB);
        let (copy, there) = (disk.with_file_name("base.raw"), disk.with_file_name("b.raw"));
        std::fs::copy(disk, &copy).unwrap();
        let file = std::fs::File::options().write(true).open(&copy).unwrap();
        // What the guest changed elsewhere, and what was altered here behind our back.
        file.write_all_at(&[1; 100_000], 10 * MIB).unwrap();
        file.write_all_at(&[0; MIB as usize], 50 * MIB + 512).unwrap();
        file.write_all_at(&[2; MIB as usize], 220 * MIB).unwrap();
        file.write_all_at(&[3; 100], 190 * MIB).unwrap();
        base = std::fs::read(&copy).unwrap();
        if let Some(partial) = partial {
            std::fs::File::options()
                .write(true)
                .open(there)
                .unwrap()
                .write_all_at(partial, 40 * MIB)
                .unwrap();
        }
    };
    let mut lab = Lab::start(scenario, fill).await?;
    for round in 0..20u64 {
        lab.source_qemu.io(&format!("write -P {} {} 4k", round + 1, round * 3 * MIB)).await;
        lab.source_qemu.io(&format!("write -z {} 64k", (round * 7 + 1) * MIB)).await;
    }
    Some((lab, base))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_comes_back_sends_only_what_changed_and_leaves_the_kept_copy_as_it_is() {
    for partial in [None, Some(&[7; MIB as usize][..])] {
        let Some((mut lab, base)) = comes_back(partial).await else { return };
        lab.until_in_step().await;
        // Made zero after it was put there from the copy.
        lab.source_qemu.io(&format!("write -z {} 1M", 170 * MIB)).await;
        lab.finish().await;
        let (source, target) = (*lab.source.progress().borrow(), *lab.target.progress().borrow());
        println!("partial: {}: {:?} {:?}", partial.is_some(), source.counters, target.counters);
        assert!(source.counters.chunk_bytes < 6 * MIB, "{:?}", source.counters);
        assert!(target.counters.base_bytes > 190 * MIB, "{:?}", target.counters);
        assert!(std::fs::read(lab.path("base.raw")).unwrap() == base, "the kept copy was written");
        lab.compare().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_that_was_grown_sends_only_what_its_template_lacks() {
    let mirror = SourceConfig { target: TargetDisk::Told, ..SourceConfig::default() };
    for kept in [false, true] {
        let scenario =
            Scenario { size: 256 * MIB, mirror, base: Beside::Template, kept, ..Scenario::default() };
        let fill = |disk: &Path| {
            let template = disk.with_file_name("base.raw");
            let file = std::fs::File::create(&template).unwrap();
            std::fs::set_permissions(&template, std::fs::Permissions::from_mode(0o600)).unwrap();
            // It ends within a block, of which the clone's rest is zeros.
            file.set_len(100 * MIB + 5 * 512).unwrap();
            noise(&template, 100 * MIB);
            std::fs::copy(&template, disk).unwrap();
            let clone = std::fs::File::options().write(true).open(disk).unwrap();
            clone.set_len(256 * MIB).unwrap();
            clone.write_all_at(&[1; 100_000], 10 * MIB).unwrap();
            clone.write_all_at(&[2; MIB as usize], 200 * MIB).unwrap();
            if kept {
                // An attempt of before had sent some of what the template lacks.
                let there = std::fs::File::options().write(true).open(disk.with_file_name("b.raw")).unwrap();
                there.write_all_at(&[2; MIB as usize / 2], 200 * MIB).unwrap();
            }
        };
        let Some(mut lab) = Lab::start(scenario, fill).await else { return };
        lab.source_qemu.io(&format!("write -P 3 {} 64k", 60 * MIB)).await;
        lab.source_qemu.io(&format!("write -P 4 {} 64k", 230 * MIB)).await;
        lab.until_in_step().await;
        lab.finish().await;
        let (source, target) = (*lab.source.progress().borrow(), *lab.target.progress().borrow());
        println!("partial: {kept}: {:?} {:?}", source.counters, target.counters);
        assert!(source.counters.chunk_bytes < 2 * MIB, "{:?}", source.counters);
        // All but the changed blocks, the last one that is not whole included.
        assert!(target.counters.base_bytes > 98 * MIB, "{:?}", target.counters);
        lab.compare().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_disk_is_copied_as_fast_as_the_host_can() {
    let scenario = Scenario { size: 256 * MIB, in_memory: true, ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 256 * MIB)).await else { return };
    let started = Instant::now();
    lab.until_in_step().await;
    lab.finish().await;
    let seconds = started.elapsed().as_secs_f64();
    println!("256 MiB of noise copied and proven in {seconds:.2} s, {:.0} MiB/s", 256.0 / seconds);
    lab.compare().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_with_a_tiny_buffer_delays_no_monitor_command() {
    let mirror = SourceConfig { buffer_bytes: 128 << 10, ..SourceConfig::default() };
    let scenario = Scenario { size: 64 * MIB, mirror, in_memory: true, ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 32 * MIB)).await else { return };
    lab.until_in_step().await;
    lab.flow.send(Flow::Cut).unwrap();
    let cut = Instant::now();
    lab.source_qemu.slowest = Default::default();
    let lateness = watch_lateness();
    let mut round = 0u64;
    while cut.elapsed() < Duration::from_secs(5) {
        round += 1;
        lab.source_qemu.io(&format!("write -P {} {} 256k", round % 255 + 1, round * 7 % 250 * 262_144)).await;
        for command in ["query-status", "stop", "cont", "system_reset"] {
            lab.source_qemu.run(command, json!({})).await;
        }
    }
    let (slowest, command) = lab.source_qemu.slowest.clone();
    let progress = *lab.source.progress().borrow();
    println!(
        "{round} rounds during the cut, slowest answer {slowest:.1?} to {command}, {:?}",
        progress.counters
    );
    assert!(!in_step(&progress), "a cut disk is not in step");
    assert!(progress.counters.dropped_bytes > 0, "the buffer was too small");
    let late = *lateness.borrow();
    assert!(
        slowest < Duration::from_millis(100) + late,
        "{command} took {slowest:?}, machine late by {late:?}"
    );
    lab.flow.send(FAST).unwrap();
    lab.until_in_step().await;
    lab.finish().await;
    lab.compare().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_is_absorbed_while_the_link_is_down() {
    let mirror = SourceConfig { buffer_bytes: 0, ..SourceConfig::default() };
    let scenario = Scenario { mirror, ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 16 * MIB)).await else { return };
    lab.until_in_step().await;
    lab.flow.send(Flow::Cut).unwrap();
    for round in 0..40u64 {
        lab.source_qemu.io(&format!("write -P {} {} 512k", round + 1, round * 786_432)).await;
    }
    lab.source_qemu.run("stop", json!({})).await;
    lab.source_qemu.end_mirror().await;
    let barrier = tokio::time::timeout(Duration::from_secs(5), lab.source.finish()).await;
    let first = barrier.expect("finish does not wait for the link").unwrap();

    // The pause lasts too long: the guest goes on at the source, and stops again later.
    lab.source.reopen().await.unwrap();
    lab.source_qemu.events.clear();
    let mirror = lab.path("mirror.nbd");
    lab.source_qemu.mirror_into(&mirror, "none").await;
    lab.source_qemu.run("cont", json!({})).await;
    lab.source_qemu.io("write -P 77 1M 3M").await;
    lab.flow.send(FAST).unwrap();
    lab.until_in_step().await;
    lab.source_qemu.io("write -P 78 2M 64k").await;
    let second = lab.finish().await;
    assert!(second.records > first.records);
    lab.compare().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_mirror_arrives_whole_too() {
    let scenario = Scenario { size: 48 * MIB, sync: "full", ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 24 * MIB)).await else { return };
    lab.source_qemu.io("write -P 5 100k 5M").await;
    lab.until_in_step().await;
    lab.finish().await;
    lab.compare().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_chunk_is_refused_at_once_and_names_its_range() {
    let scenario = Scenario { damage: Some(3), ..Scenario::default() };
    let Some(mut lab) = Lab::start(scenario, |disk| noise(disk, 16 * MIB)).await else { return };
    // Noise travels as it is, so that the byte is one of the disk's.
    let proven = tokio::time::timeout(Duration::from_secs(60), lab.target.proven()).await.unwrap();
    let Err(DiskTargetError::Records(TargetError::Damaged { first, last, range })) = proven else {
        panic!("{proven:?}");
    };
    println!("records {first} to {last}, {range:?}");
    assert!(range.is_some_and(|(start, end)| start < end && end <= 32 * MIB && end - start <= 16 * MIB));
    assert_eq!(lab.target.progress().borrow().counters.records, first - 1, "those before it were taken");
}

/// Writes for a while at a steady rate, stops, and says what was not durable then and how long the proof took.
async fn pause_of_a_busy_disk(target: TargetConfig, on_disk: &Path) -> Option<(u64, Duration)> {
    // The source's image lies in memory, the destination's does not: only the latter's flushes take time.
    let mirror = SourceConfig { target: TargetDisk::Zero, ..SourceConfig::default() };
    let scenario = Scenario { size: 64 * MIB, mirror, target, in_memory: true, ..Scenario::default() };
    let image = on_disk.join("b.raw");
    std::fs::File::create(&image).unwrap().set_len(scenario.size).unwrap();
    let mut lab = Lab::start(scenario, |disk| {
        let link = disk.with_file_name("b.raw");
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&image, link).unwrap();
    })
    .await?;
    lab.until_in_step().await;
    for mib in 0..24u64 {
        lab.source_qemu.io(&format!("write -P {} {} 1M", mib + 1, mib * 2 * MIB)).await;
    }
    let mut progress = lab.target.progress();
    let arrived = progress.wait_for(|progress| progress.counters.received_bytes >= 24 * MIB);
    let counters = tokio::time::timeout(Duration::from_secs(60), arrived).await.unwrap().unwrap().counters;
    let stopped = Instant::now();
    lab.finish().await;
    let took = stopped.elapsed();
    lab.compare().await;
    Some((counters.received_bytes - counters.durable_bytes, took))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn little_is_left_to_flush_when_a_busy_disk_stops() {
    let seldom = TargetConfig {
        flush_bytes: 32 * MIB,
        flush_interval: Duration::from_secs(1),
        ..TargetConfig::default()
    };
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut before, mut after) = ((0, Duration::ZERO), (0, Duration::ZERO));
    for _ in 0..5 {
        for (sum, config) in [(&mut before, seldom), (&mut after, TargetConfig::default())] {
            let Some((left, took)) = pause_of_a_busy_disk(config, folder.path()).await else { return };
            *sum = (sum.0 + left, sum.1 + took);
        }
    }
    println!(
        "left to flush at the stop: {} KiB seldom, {} KiB often ({:.2} of it); stop to proof {:.1?} and {:.1?} ({:.2})",
        before.0 / 5120,
        after.0 / 5120,
        after.0 as f64 / before.0 as f64,
        before.1 / 5,
        after.1 / 5,
        after.1.as_secs_f64() / before.1.as_secs_f64()
    );
    // About half on a disk that is busy with something else, a tenth and less on one that is not.
    assert!(after.0 * 4 < before.0 * 3, "flushing often leaves {} of {} bytes", after.0, before.0);
}
