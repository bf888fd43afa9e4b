//! A site of a test: a run directory, a pool of disks, and machines that end with the test.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use gateway::hypervisor::{
    AcceleratorChoice, DiskFile, DiskFormat, Guest, Hypervisor, HypervisorConfig, Placement, StartMode,
};
use longhaul_core::ids::DeviceName;
use longhaul_core::ids::Epoch;
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::permit::RunPermit;
use tokio::net::UnixStream;
use tokio::process::Command;

/// Enters long mode, then for ever: increments a word in each of 128 pages, every 65536th time prints a dot.
const BUSY_GUEST: [u8; 174] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x66, 0xbf, 0x00, 0x10, 0x00, 0x00, 0x66, 0xb9, 0x00, 0x0c,
    0x00, 0x00, 0x66, 0x31, 0xc0, 0xfc, 0x67, 0x66, 0xf3, 0xab, 0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, 0xc7,
    0x06, 0x00, 0x20, 0x03, 0x30, 0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, 0x66, 0xb8, 0xa0, 0x00, 0x00, 0x00,
    0x0f, 0x22, 0xe0, 0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0x00, 0x00,
    0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x0f, 0x30, 0x0f, 0x01, 0x16, 0xa8, 0x7c, 0x0f, 0x20, 0xc0, 0x66,
    0x0d, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x62, 0x7c, 0x08, 0x00, 0xbf, 0x00, 0x00, 0x01,
    0x00, 0xb9, 0x80, 0x00, 0x00, 0x00, 0xff, 0x07, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xff, 0xc9, 0x75,
    0xf4, 0xff, 0x04, 0x25, 0x00, 0x05, 0x00, 0x00, 0xf7, 0x04, 0x25, 0x00, 0x05, 0x00, 0x00, 0xff, 0xff,
    0x00, 0x00, 0x75, 0xd6, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, 0xeb, 0xcd, 0x0f, 0x1f, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x9a, 0x20, 0x00, 0x0f, 0x00,
    0x98, 0x7c, 0x00, 0x00,
];

pub const LIMIT: Duration = Duration::from_secs(60);

pub const WEB1: &str = r#"
    name = "web1"
    machine = "pc-q35-7.2"
    vcpus = 2
    memory_mib = 64
    rng = "06.0"

    [[disks]]
    name = "root"
    size_bytes = 8388608
    pci = "04.0"

    [[disks]]
    name = "data"
    size_bytes = 4194304
    pci = "05.0"
    serial = "data-1"
"#;

pub fn web1() -> MachineDefinition {
    toml::from_str(WEB1).unwrap()
}

pub fn disk(name: &str) -> DeviceName {
    name.parse().unwrap()
}

pub fn permit() -> RunPermit {
    Ownership::Here { epoch: Epoch(0) }.permit(&web1().name, None, &[]).unwrap()
}

/// One site: a run directory, a pool of disks, and whatever runs there until the end of the test.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub hypervisor: Hypervisor,
}

impl Site {
    /// A site whose machines are emulated; `None`, with the reason printed, where there is no QEMU.
    pub async fn new() -> Option<Self> {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut HypervisorConfig)) -> Option<Self> {
        if !has("qemu-system-x86_64").await {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut config = HypervisorConfig {
            run_dir: dir.path().join("run"),
            accelerator: AcceleratorChoice::Tcg,
            systemd: false,
            ..HypervisorConfig::default()
        };
        change(&mut config);
        Some(Self { hypervisor: Hypervisor::new(config).unwrap(), dir })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Raw files of the defined sizes, empty.
    pub fn place(&self, definition: &MachineDefinition) -> Placement {
        let mut placement = Placement::default();
        for volume in definition.volumes() {
            let path = self.path(&format!("{}.raw", volume.name));
            fs::File::create(&path).unwrap().set_len(volume.size_bytes).unwrap();
            placement.disks.insert(volume.name.clone(), DiskFile { path, format: DiskFormat::Raw });
        }
        placement
    }

    /// The same with the busy guest and a pattern on every disk.
    pub fn place_busy(&self, definition: &MachineDefinition) -> Placement {
        let placement = self.place(definition);
        for (at, volume) in definition.volumes().enumerate() {
            let mut file = fs::File::options().write(true).open(&placement.disks[volume.name].path).unwrap();
            let mut sector = [0; 512];
            sector[..BUSY_GUEST.len()].copy_from_slice(&BUSY_GUEST);
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
            file.write_all(&sector).unwrap();
            file.seek(SeekFrom::Start(1 << 20)).unwrap();
            file.write_all(&vec![at as u8 + 1; 1 << 20]).unwrap();
        }
        placement
    }

    /// Starts the busy guest and waits until it prints.
    pub async fn running(&self, definition: &MachineDefinition) -> (Guest, Placement) {
        let placement = self.place_busy(definition);
        let guest = self.hypervisor.start(definition, &placement, StartMode::Boot).await.unwrap();
        guest.resume(permit()).await.unwrap();
        more_dots(&guest, 0).await;
        (guest, placement)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for name in self.hypervisor.running().unwrap_or_default() {
            let pid = self.hypervisor.machine_dir(&name).join("pid");
            if let Some(pid) = fs::read_to_string(pid).ok().and_then(|text| text.trim().parse().ok()) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}

/// How many dots the guest has printed here.
pub fn dots(guest: &Guest) -> u64 {
    fs::metadata(guest.dir().unwrap().join("console.log")).map_or(0, |it| it.len())
}

/// Waits until the guest has printed more than `before` dots.
pub async fn more_dots(guest: &Guest, before: u64) -> u64 {
    let more = async {
        while dots(guest) <= before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        dots(guest)
    };
    tokio::time::timeout(LIMIT, more).await.expect("the guest prints")
}

pub async fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().await.is_ok();
    if !found {
        println!("skipped: there is no {program}");
    }
    found
}

pub fn content(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// A QEMU that somebody else started, with names and options of their own.
pub struct Foreign {
    process: std::process::Child,
    pub socket: PathBuf,
}

impl Foreign {
    pub async fn start(site: &Site, memory: &str, data: &str, extra: &[&str]) -> Self {
        let root = site.place(&web1()).disks[&disk("root")].path.display().to_string();
        let socket = site.path("foreign.sock");
        let process = std::process::Command::new("qemu-system-x86_64")
            .args(["-M", "pc-q35-7.2,accel=tcg", "-cpu", "qemu64", "-smp", "2", "-m", memory])
            .args(["-uuid", &web1().uuid().to_string()])
            .args(["-nodefaults", "-display", "none", "-S", "-serial", "null"])
            .args(["-drive", &format!("file={root},format=raw,if=none,id=hd0")])
            .args(["-device", "virtio-blk-pci,drive=hd0,addr=4"])
            .args(["-drive", data, "-device", "virtio-rng-pci,addr=6"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(extra)
            .spawn()
            .unwrap();
        // The monitor is free again as soon as this connection is dropped.
        let there = async {
            while UnixStream::connect(&socket).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, there).await.expect("QEMU listens");
        Self { process, socket }
    }

    /// With the disks as they are defined.
    pub async fn as_defined(site: &Site, extra: &[&str]) -> Self {
        let data = site.place(&web1()).disks[&disk("data")].path.display().to_string();
        let device = ["-device", "virtio-blk-pci,drive=hd1,addr=5,serial=data-1,id=x"];
        Self::start(
            site,
            "65528K",
            &format!("file={data},format=raw,if=none,id=hd1"),
            &[&device, extra].concat(),
        )
        .await
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
