//! The disk at the destination, compared with the one the source kept.
//!
//! A bitmap that the destination's QEMU kept since before the guest resumed tells which blocks changed
//! there. Every other block must equal the source's kept disk; the changed ones are checked by the
//! file system and by the service's own records.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;

use super::gateway::Gateway;
use super::monitor::Monitor;
use super::scene::{Scene, VM};
use crate::guest::verify;

/// Compared block by block of this size, the bitmap's granularity.
const BLOCK: u64 = 65536;
/// The block node of the root disk, as the gateway names it, is found by its file.
const ROOT: &str = "root";

/// What the comparison found.
#[derive(Debug, Clone, Default)]
pub struct DiskFindings {
    /// Blocks compared with the source's kept disk.
    pub compared: u64,
    /// Blocks among them that differ.
    pub mismatched: u64,
    /// Blocks that the destination says have changed there.
    pub changed: u64,
    /// The service's records and the file system are right.
    pub sound: bool,
    /// Number of the last record of the service's log.
    pub last_record: u64,
    /// What the service's records say.
    pub detail: String,
}

/// A run of blocks, as `qemu-img map` prints it.
#[derive(Deserialize)]
struct Run {
    start: u64,
    length: u64,
    data: bool,
}

/// Stops the machine at the destination and compares its root disk. `epoch` is the one that began there.
pub async fn compare(scene: &Scene, monitor: &mut Monitor, id: &str, epoch: u64) -> Result<DiskFindings> {
    let root = scene.disks.first().context("The guest has no disk")?;
    compare_at(scene, "b", &kept_disk(root, epoch), monitor, id, epoch).await
}

/// The same at any site, with what another one has `kept`.
pub async fn compare_at(
    scene: &Scene,
    site: &str,
    kept: &Path,
    monitor: &mut Monitor,
    id: &str,
    epoch: u64,
) -> Result<DiskFindings> {
    if !kept.exists() {
        bail!("The source did not keep its disk at {}", kept.display());
    }
    let gateway = scene.gateway(site)?;
    monitor.ask("stop", json!({}))?;
    let dirty = dirty_runs(gateway, monitor, epoch)?;
    gateway.client().stop(&VM.parse()?).await?;
    let there = arrived_disk(gateway, id)?;
    let mut findings = compare_files(kept, &there, &dirty)?;
    let work = tempfile::tempdir_in(scene.world.lab.scratch())?;
    let (verdict, _) = verify::root_disk(&there, work.path())?;
    findings.sound = verdict.sound();
    findings.last_record = verdict.log.last;
    findings.detail = format!(
        "log of {} records {}, {} rewritten blocks {}, file system {}",
        verdict.log.records,
        if verdict.log.sound() { "right" } else { "WRONG" },
        verdict.dirt.blocks,
        if verdict.dirt.sound() { "right" } else { "WRONG" },
        verdict.file_system.as_deref().unwrap_or("clean"),
    );
    Ok(findings)
}

/// Where the root disk lies that came by this migration.
pub fn arrived_disk(gateway: &Gateway, id: &str) -> Result<PathBuf> {
    let short = id.get(..8).context("The migration has no id")?;
    Ok(gateway.folder.join("disks").join(format!("{VM}-{ROOT}.{short}.raw")))
}

/// Where a source keeps a disk when `epoch` began elsewhere.
pub fn kept_disk(disk: &Path, epoch: u64) -> PathBuf {
    PathBuf::from(format!("{}.moved-e{epoch}", disk.display()))
}

/// How many blocks of two disks differ.
pub fn blocks_that_differ(one: &Path, other: &Path) -> Result<u64> {
    Ok(compare_files(one, other, &[])?.mismatched)
}

/// The runs that changed since before the guest resumed, from QEMU's bitmap over NBD.
fn dirty_runs(gateway: &Gateway, monitor: &mut Monitor, epoch: u64) -> Result<Vec<(u64, u64)>> {
    let nodes = monitor.ask("query-named-block-nodes", json!({ "flat": true }))?;
    let nodes = nodes.as_array().context("QEMU lists no nodes")?;
    let bitmap = format!("longhaul-e{epoch}");
    let node = nodes
        .iter()
        .find(|node| {
            let bitmaps = node["dirty-bitmaps"].as_array();
            let named = bitmaps.is_some_and(|all| all.iter().any(|each| each["name"] == bitmap.as_str()));
            named && node["node-name"].as_str().is_some_and(|name| name.contains(ROOT))
        })
        .and_then(|node| node["node-name"].as_str())
        .context("The destination's QEMU has no bitmap on the root disk")?
        .to_owned();
    monitor.ask("block-dirty-bitmap-disable", json!({ "node": node, "name": bitmap }))?;
    // Where QEMU may make one.
    let socket = gateway.observer(VM).with_file_name("own").join("check.sock");
    let address = json!({ "type": "unix", "data": { "path": socket } });
    monitor.ask("nbd-server-start", json!({ "addr": address }))?;
    let export = json!({
        "type": "nbd", "id": "check", "node-name": node, "name": "check", "writable": false,
        "bitmaps": [bitmap],
    });
    monitor.ask("block-export-add", export)?;
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=check,x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = crate::exec::run("qemu-img", &["map", "--output=json", "--image-opts", &options])?;
    monitor.ask("nbd-server-stop", json!({}))?;
    let runs: Vec<Run> = serde_json::from_str(&map).context("qemu-img map")?;
    // With x-dirty-bitmap qemu-img shows dirty blocks as holes.
    Ok(runs.into_iter().filter(|run| !run.data).map(|run| (run.start, run.start + run.length)).collect())
}

fn compare_files(kept: &Path, there: &Path, dirty: &[(u64, u64)]) -> Result<DiskFindings> {
    let open = |path: &Path| File::open(path).with_context(|| format!("Cannot open {}", path.display()));
    let (kept, there) = (open(kept)?, open(there)?);
    let len = kept.metadata()?.len();
    if there.metadata()?.len() != len {
        bail!("The disks differ in size");
    }
    let mut findings = DiskFindings::default();
    let (mut left, mut right) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
    for start in (0..len).step_by(BLOCK as usize) {
        let end = (start + BLOCK).min(len);
        if dirty.iter().any(|(from, to)| *from < end && *to > start) {
            findings.changed += 1;
            continue;
        }
        let size = (end - start) as usize;
        kept.read_exact_at(&mut left[..size], start)?;
        there.read_exact_at(&mut right[..size], start)?;
        findings.compared += 1;
        if left[..size] != right[..size] {
            findings.mismatched += 1;
        }
    }
    Ok(findings)
}
