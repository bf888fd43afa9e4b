//! `cargo lab record-stream`: a migration stream of a QEMU that is there, as a fixture of the core's tests.
//!
//! ```text
//!  a small machine that dirties pages for ever --migrate--> exec:cat --> zstd --> qemu-VERSION-MACHINE.zst
//! ```
//!
//! The devices and QEMU's capabilities are those that the gateway uses. Whether the stream is understood is not asked here,
//! but by `gateway/core/tests/streams.rs`: the recording of a QEMU that is not is worth most. It needs QEMU, and no root.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::scenario::monitor::Monitor;

/// Where the recordings are, relative to the workspace.
const STREAMS: &str = "gateway/core/tests/streams";
/// The longest recording that is kept, in bytes: the repository keeps it for ever.
const MOST_BYTES: usize = 512 << 10;
/// zstd's level, of which only the recorder feels that it is slow.
const LEVEL: i32 = 19;
/// 16 MiB less 8 KiB: of a whole number of 256 KiB, QEMU before 9.0 loses track of what the guest writes, as
/// `core/machine/definition.rs` says.
const MEMORY: &str = "16376K";
/// How often QEMU looks for dirtied pages before the guest is stopped.
const ROUNDS: u64 = 6;
/// What QEMU may write while the guest runs, in bytes per second: slow enough that it does not get all rounds done at once.
const RATE_BYTES: u64 = 4 << 20;
/// As the gateway's: faster than any file takes it, in bytes per second.
const UNLIMITED_BYTES: u64 = 1 << 40;
/// What the gateway asks of a QEMU that sends. All else is off.
const CAPABILITIES: [&str; 3] = ["events", "pause-before-switchover", "auto-converge"];
/// For each step: on a busy machine too, what takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// Of which QEMU, and of which of its machines.
#[derive(Debug, Clone, clap::Args)]
pub struct RecordArguments {
    /// The QEMU, by its name or its path
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// The type of machine
    #[arg(long, default_value = "q35")]
    machine: String,
}

/// Records a stream and keeps it.
pub fn run(arguments: &RecordArguments) -> Result<()> {
    let folder = tempfile::tempdir().context("Cannot make a folder")?;
    let (name, stream) = record(arguments, folder.path())?;
    let packed = zstd::bulk::compress(&stream, LEVEL)?;
    let (whole, kept) = (stream.len(), packed.len());
    ensure!(
        kept <= MOST_BYTES,
        "{name} would take {kept} bytes, more than {MOST_BYTES}: record fewer rounds"
    );
    let streams = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(STREAMS);
    std::fs::create_dir_all(&streams)?;
    std::fs::write(streams.join(&name), packed).with_context(|| format!("Cannot write {name}"))?;
    println!("{whole} bytes recorded, {kept} kept in {STREAMS}/{name}");
    Ok(())
}

fn record(arguments: &RecordArguments, folder: &Path) -> Result<(String, Vec<u8>)> {
    let mut machine = Machine::start(arguments, folder)?;
    let version = machine.monitor.ask("query-version", json!({}))?;
    let kind = machine.monitor.ask("qom-get", json!({ "path": "/machine", "property": "type" }))?;
    let name = recording_name(&version, &kind)?;
    until("Booting", || Ok(machine.sweeps()? > 0))?;
    let file = folder.join("stream");
    machine.migrate_to(&file)?;
    Ok((name, std::fs::read(file)?))
}

fn recording_name(version: &Value, kind: &Value) -> Result<String> {
    let number =
        |part: &str| version["qemu"][part].as_u64().with_context(|| format!("No version: {version}"));
    let kind = kind.as_str().and_then(|kind| kind.strip_suffix("-machine"));
    let kind = kind.context("QEMU does not say the type of its machine")?;
    Ok(format!("qemu-{}.{}.{}-{kind}.zst", number("major")?, number("minor")?, number("micro")?))
}

/// A QEMU and its monitor; ends with the value.
struct Machine {
    process: Child,
    monitor: Monitor,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended by itself needs nothing.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// ```text
///         cli; cld; eax = 0x12345678                16 bits; the pages are found by their segments
/// noise:  32 pages from 0x20000 on: xorshift32      content that does not compress
/// sweep:  add 1 to the first dword of 64 pages from 0x20000 on
///         add 1 to the dword at 0x60000; jmp sweep  how often it swept
/// ```
const BOOT_CODE: &str = "fafc66b878563412ba00208ec231ffb900046689c366c1e30d6631d86689c366c1eb116631d86689c366c1e3056631d866ab\
    e2de81c2000181fa004075cdba00208ec22666ff06000081c2000181fa006075ee8ec22666ff060000ebe1";
/// Where the guest counts its sweeps.
const SWEEPS: u32 = 0x60000;

impl Machine {
    fn start(arguments: &RecordArguments, folder: &Path) -> Result<Self> {
        let (boot, socket) = (folder.join("boot.img"), folder.join("qmp.sock"));
        let mut sector = hex::decode(BOOT_CODE)?;
        sector.resize(510, 0);
        sector.extend([0x55, 0xaa]);
        // The firmware reads nothing of a disk without a whole cylinder.
        sector.resize(1 << 20, 0);
        std::fs::write(&boot, sector)?;
        let mut command = Command::new(&arguments.qemu);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-cpu", "qemu64", "-m", MEMORY]);
        command.args(["-machine", &format!("{},accel=tcg", arguments.machine)]);
        let file = json!({ "driver": "file", "filename": boot });
        let boot = json!({ "driver": "raw", "node-name": "boot", "read-only": true, "file": file });
        command.args(["-blockdev", &boot.to_string()]);
        command.args(["-blockdev", "driver=null-co,node-name=root,size=1048576,read-zeroes=on"]);
        command.args(["-netdev", "hubport,hubid=0,id=net-lan"]);
        for device in [
            "virtio-blk-pci,drive=boot,id=disk-boot,addr=03.0,bootindex=0",
            "virtio-blk-pci,drive=root,id=disk-root,addr=04.0",
            "virtio-net-pci,netdev=net-lan,id=nic-lan,romfile=,addr=05.0",
        ] {
            command.args(["-device", device]);
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        let process = command.stdin(Stdio::null()).spawn();
        let mut process = process.with_context(|| format!("Cannot start {}", arguments.qemu.display()))?;
        let monitor = Monitor::connect(&socket, PATIENCE).inspect_err(|_| {
            // Whatever it waits for, nobody else ends it.
            let _ = process.kill();
            let _ = process.wait();
        })?;
        Ok(Self { process, monitor })
    }

    /// How often the guest has gone over its pages, modulo 2^32.
    fn sweeps(&mut self) -> Result<u32> {
        let line = format!("xp /1wx {SWEEPS:#x}");
        let told = self.monitor.ask("human-monitor-command", json!({ "command-line": line }))?;
        let number = told.as_str().and_then(|told| told.trim().rsplit("0x").next());
        Ok(u32::from_str_radix(number.context("QEMU shows no memory")?, 16)?)
    }

    fn migrate_to(&mut self, file: &Path) -> Result<()> {
        self.set_capabilities()?;
        self.limit_bandwidth(RATE_BYTES)?;
        // A file of that name is whole.
        let (part, whole) = (file.with_extension("part"), file.display());
        let uri = format!("exec:cat > {0} && mv {0} {whole}", part.display());
        self.monitor.ask("migrate", json!({ "uri": uri }))?;
        until("Copying memory", || {
            let migration = self.migration()?;
            ensure!(migration["status"] != "pre-switchover", "QEMU does not see that the guest writes");
            Ok(migration["ram"]["dirty-sync-count"].as_u64() >= Some(ROUNDS))
        })?;
        self.monitor.ask("stop", json!({}))?;
        self.limit_bandwidth(UNLIMITED_BYTES)?;
        until("Copying the rest", || Ok(self.migration()?["status"] == "pre-switchover"))?;
        self.monitor.ask("migrate-continue", json!({ "state": "pre-switchover" }))?;
        until("Ending", || Ok(self.migration()?["status"] == "completed"))?;
        until("Writing the file", || Ok(file.exists()))
    }

    fn set_capabilities(&mut self) -> Result<()> {
        let known = self.monitor.ask("query-migrate-capabilities", json!({}))?;
        let state = |it: &Value| CAPABILITIES.iter().any(|wanted| it["capability"] == *wanted);
        let changed: Vec<Value> = known
            .as_array()
            .into_iter()
            .flatten()
            .filter(|it| it["state"] != state(it))
            .map(|it| json!({ "capability": it["capability"], "state": state(it) }))
            .collect();
        self.monitor.ask("migrate-set-capabilities", json!({ "capabilities": changed })).map(drop)
    }

    fn limit_bandwidth(&mut self, bytes_per_s: u64) -> Result<()> {
        let parameters = json!({ "downtime-limit": 1, "max-bandwidth": bytes_per_s });
        self.monitor.ask("migrate-set-parameters", parameters).map(drop)
    }

    /// What QEMU says of the migration, if that has not failed.
    fn migration(&mut self) -> Result<Value> {
        let migration = self.monitor.ask("query-migrate", json!({}))?;
        ensure!(migration["status"] != "failed", "QEMU's migration failed: {migration}");
        Ok(migration)
    }
}

fn until(what: &str, mut there: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !there()? {
        ensure!(Instant::now() < deadline, "{what} takes longer than {} s", PATIENCE.as_secs());
        std::thread::sleep(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_is_named_by_qemus_version_and_the_machines_full_type() {
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 22 }, "package": "Debian" });
        let name = recording_name(&version, &json!("pc-q35-7.2-machine")).unwrap();
        assert_eq!(name, "qemu-7.2.22-pc-q35-7.2.zst");
        assert!(recording_name(&version, &json!(7)).is_err());
        assert!(recording_name(&json!({}), &json!("pc-q35-7.2-machine")).is_err());
    }
}
