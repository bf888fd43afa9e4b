//! A definition and a placement become the arguments of QEMU. Pure: it reads no file and starts nothing.
//!
//! Everything the guest can see comes from the definition, everything else from this site. Two sites
//! with the same definition therefore start machines that accept each other's state. A machine always
//! starts paused (`-S`), whatever it waits for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use longhaul_core::ids::DeviceName;
use longhaul_core::machine::{Disk, Firmware, MachineDefinition, Nic, PciAddress};
use serde_json::json;

use super::accelerator::Accelerator;

/// How a disk is stored at this site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// As the guest sees it. What a migration writes is always raw.
    Raw,
    /// QEMU's own format; a migration flattens it.
    Qcow2,
}

impl DiskFormat {
    fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where a disk is stored at this site.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// A file or a block device.
    pub path: PathBuf,
    /// What is in it.
    pub format: DiskFormat,
}

/// The files of a kernel at this site.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct KernelPaths {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
}

/// What this site gives a machine: files for its volumes, taps for its interfaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// A file for each disk, and for the UEFI variables if the machine has them.
    pub disks: BTreeMap<DeviceName, DiskFile>,
    /// A persistent tap interface for each NIC.
    pub taps: BTreeMap<DeviceName, String>,
}

/// What a machine is started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartMode {
    /// To boot, once somebody with a permit resumes it.
    Boot,
    /// To take a machine that migrates here.
    Incoming,
}

/// What of this host goes into a command line.
#[derive(Debug, Clone)]
pub(super) struct HostSide<'a> {
    pub accelerator: Accelerator,
    /// The machine's run directory.
    pub dir: &'a Path,
    pub kernel: Option<&'a KernelPaths>,
    pub uefi_code: Option<&'a Path>,
    /// The user and group that QEMU becomes after it has opened its files.
    pub run_as: Option<(u32, u32)>,
    /// QEMU was built with seccomp.
    pub sandbox: bool,
}

/// A placement that does not fit the definition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// A volume has no file.
    #[error("No file is placed for disk {0}")]
    NoFile(DeviceName),
    /// An interface has no tap.
    #[error("No tap is placed for interface {0}")]
    NoTap(DeviceName),
    /// The tap's name is none that Linux allows.
    #[error(
        "{name:?} cannot be the tap of interface {nic}: 1 to 15 characters without '/', ',', ':' or space"
    )]
    BadTap {
        /// The interface.
        nic: DeviceName,
        /// The name.
        name: String,
    },
    /// A path that is not text.
    #[error("The path {0:?} cannot be given to QEMU; use one in UTF-8")]
    BadPath(PathBuf),
    /// A socket's path is too long for the system.
    #[error("The path {} is longer than the 107 bytes a socket may have; shorten run_dir", .0.display())]
    LongPath(PathBuf),
    /// The machine boots by UEFI and this site has no image.
    #[error("The machine boots by UEFI; name a UEFI image in the configuration")]
    NoUefi,
    /// The machine boots a kernel that this site does not have.
    #[error("The machine boots a kernel that has no files in the configuration here")]
    NoKernel,
}

/// The socket of the gateway's own monitor, inside the run directory.
pub(super) const QMP_SOCKET: &str = "qmp.sock";
/// The socket of the second monitor, for anybody who observes.
pub(super) const OBSERVER_SOCKET: &str = "observer.sock";
/// The file with QEMU's process id.
pub(super) const PID_FILE: &str = "pid";
/// What the guest writes to its serial port.
pub(super) const CONSOLE_LOG: &str = "console.log";

/// The folder inside the run directory in which QEMU itself may make sockets while it runs.
pub(super) const OWN_DIR: &str = "own";
/// No socket of a machine has a longer path inside its run directory.
const LONGEST_SOCKET: &str = "own/incoming.sock";

/// The node through which a volume is read and written, with its format.
pub(super) fn node_name(volume: &DeviceName) -> String {
    format!("disk-{volume}")
}

/// The device that shows a disk to the guest.
pub(super) fn disk_device(disk: &DeviceName) -> String {
    format!("disk-{disk}")
}

/// The device that is a network interface of the guest.
pub(super) fn nic_device(nic: &DeviceName) -> String {
    format!("nic-{nic}")
}

/// The arguments of QEMU for `definition` as `placement` places it on this host.
pub(super) fn command_line(
    definition: &MachineDefinition,
    placement: &Placement,
    host: &HostSide<'_>,
    mode: StartMode,
) -> Result<Vec<String>, CommandLineError> {
    let mut line = Line(Vec::new());
    line.machine(definition, host)?;
    line.volumes(definition, placement)?;
    line.firmware(definition, host)?;
    let shared = |pci: PciAddress| {
        pci.function() == 0
            && definition.pci_devices().any(|(_, other)| other.slot() == pci.slot() && other.function() > 0)
    };
    for disk in &definition.disks {
        line.disk(disk, shared(disk.pci));
    }
    for nic in &definition.nics {
        line.nic(nic, placement, shared(nic.pci))?;
    }
    if let Some(pci) = definition.rng {
        line.add("-device", format!("virtio-rng-pci,id=rng,{}", address(pci, shared(pci))));
    }
    line.around_it(host)?;
    if mode == StartMode::Incoming {
        line.add("-incoming", "defer");
    }
    Ok(line.0)
}

struct Line(Vec<String>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }

    fn machine(
        &mut self,
        definition: &MachineDefinition,
        host: &HostSide<'_>,
    ) -> Result<(), CommandLineError> {
        self.0.extend(["-nodefaults", "-no-user-config", "-S"].map(str::to_owned));
        self.add("-display", "none");
        // Its threads have names then, which tell an operator who uses the processors: the guest or QEMU.
        self.add("-name", format!("{},debug-threads=on", definition.name));
        let mut machine = format!("{},accel={}", definition.machine, host.accelerator.as_str());
        if let Firmware::Uefi(uefi) = &definition.firmware {
            machine += &format!(",pflash0=uefi-code,pflash1={}", node_name(&uefi.vars));
        }
        self.add("-machine", machine);
        // `enforce`: a processor that lacks a feature of the model is found here, not by the guest.
        let cpu = &definition.cpu;
        self.add("-cpu", if cpu.as_str() == "host" { cpu.to_string() } else { format!("{cpu},enforce") });
        self.add("-smp", definition.vcpus.to_string());
        self.add("-m", format!("{}K", definition.memory().0 >> 10));
        self.add("-uuid", definition.uuid().to_string());
        Ok(())
    }

    fn volumes(
        &mut self,
        definition: &MachineDefinition,
        placement: &Placement,
    ) -> Result<(), CommandLineError> {
        for volume in definition.volumes() {
            let no_file = || CommandLineError::NoFile(volume.name.clone());
            let file = placement.disks.get(volume.name).ok_or_else(no_file)?;
            let file_node = format!("file-{}", volume.name);
            let protocol = json!({
                "driver": "file",
                "node-name": file_node,
                "filename": text(&file.path)?,
                "cache": { "direct": false },
                "discard": "unmap",
            });
            let format = json!({
                "driver": file.format.driver(),
                "node-name": node_name(volume.name),
                "file": file_node,
                "discard": "unmap",
                "detect-zeroes": "off",
            });
            self.add("-blockdev", protocol.to_string());
            self.add("-blockdev", format.to_string());
        }
        Ok(())
    }

    fn firmware(
        &mut self,
        definition: &MachineDefinition,
        host: &HostSide<'_>,
    ) -> Result<(), CommandLineError> {
        match &definition.firmware {
            Firmware::Bios => {}
            Firmware::Uefi(_) => {
                let code = text(host.uefi_code.ok_or(CommandLineError::NoUefi)?)?;
                let file = json!({ "driver": "file", "filename": code });
                let node =
                    json!({ "driver": "raw", "node-name": "uefi-code", "read-only": true, "file": file });
                self.add("-blockdev", node.to_string());
            }
            Firmware::Kernel(boot) => {
                let files = host.kernel.ok_or(CommandLineError::NoKernel)?;
                self.add("-kernel", text(&files.kernel)?);
                if boot.initrd_sha256.is_some() {
                    self.add("-initrd", text(files.initrd.as_deref().ok_or(CommandLineError::NoKernel)?)?);
                }
                self.add("-append", boot.cmdline.as_str());
            }
        }
        Ok(())
    }

    fn disk(&mut self, disk: &Disk, shares_slot: bool) {
        let node = node_name(&disk.name);
        let id = disk_device(&disk.name);
        let serial = disk.serial.as_ref().map_or(String::new(), |serial| format!(",serial={serial}"));
        self.add(
            "-device",
            format!("virtio-blk-pci,drive={node},id={id}{serial},{}", address(disk.pci, shares_slot)),
        );
    }

    fn nic(&mut self, nic: &Nic, placement: &Placement, shares_slot: bool) -> Result<(), CommandLineError> {
        let tap = placement.taps.get(&nic.name).ok_or_else(|| CommandLineError::NoTap(nic.name.clone()))?;
        let allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ',' | ':');
        if tap.is_empty() || tap.len() > 15 || !tap.chars().all(allowed) {
            return Err(CommandLineError::BadTap { nic: nic.name.clone(), name: tap.clone() });
        }
        let netdev = format!("net-{}", nic.name);
        self.add("-netdev", format!("tap,id={netdev},ifname={tap},script=no,downscript=no,vhost=off"));
        // Without a ROM, hosts with different network boot images still have the same memory map.
        let device = format!(
            "virtio-net-pci,netdev={netdev},id={},mac={},romfile=,{}",
            nic_device(&nic.name),
            nic.mac_text(),
            address(nic.pci, shares_slot)
        );
        self.add("-device", device);
        Ok(())
    }

    fn around_it(&mut self, host: &HostSide<'_>) -> Result<(), CommandLineError> {
        let console = escaped(&host.dir.join(CONSOLE_LOG))?;
        self.add("-chardev", format!("file,id=console,path={console},append=on"));
        self.add("-serial", "chardev:console");
        let longest = host.dir.join(LONGEST_SOCKET);
        if longest.as_os_str().len() > 107 {
            return Err(CommandLineError::LongPath(longest));
        }
        for (id, socket) in [("qmp", QMP_SOCKET), ("observer", OBSERVER_SOCKET)] {
            let path = host.dir.join(socket);
            self.add("-chardev", format!("socket,id={id},path={},server=on,wait=off", escaped(&path)?));
            self.add("-mon", format!("chardev={id},mode=control"));
        }
        self.add("-pidfile", text(&host.dir.join(PID_FILE))?);
        if let Some((uid, gid)) = host.run_as {
            self.add("-runas", format!("{uid}:{gid}"));
        }
        if host.sandbox {
            // Becoming another user is itself an elevation for QEMU's filter; after it, there are no
            // privileges left to raise.
            let elevate = if host.run_as.is_some() { "" } else { "elevateprivileges=deny," };
            self.add("-sandbox", format!("on,obsolete=deny,{elevate}spawn=deny,resourcecontrol=deny"));
        }
        Ok(())
    }
}

fn address(pci: PciAddress, shares_slot: bool) -> String {
    format!("addr={pci}{}", if shares_slot { ",multifunction=on" } else { "" })
}

fn text(path: &Path) -> Result<String, CommandLineError> {
    path.to_str().map(str::to_owned).ok_or_else(|| CommandLineError::BadPath(path.to_owned()))
}

/// A path inside a list of options, where a comma ends the value unless it is doubled.
fn escaped(path: &Path) -> Result<String, CommandLineError> {
    Ok(text(path)?.replace(',', ",,"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB1: &str = r#"
        name = "web1"
        machine = "pc-q35-7.2"
        vcpus = 2
        memory_mib = 256
        rng = "07.0"
        [[disks]]
        name = "root"
        size_bytes = 1073741824
        pci = "04.0"
        serial = "root-1"
        [[disks]]
        name = "data"
        size_bytes = 67108864
        pci = "04.1"
        [[nics]]
        name = "lan"
        mac = "52:54:00:12:34:56"
        home = ["198.51.100.10/24"]
        lan = "servers"
        pci = "06.0"
    "#;

    fn placement() -> Placement {
        let file = |path: &str, format| DiskFile { path: path.into(), format };
        Placement {
            disks: [
                ("root".parse().unwrap(), file("/pool/a,b/root.raw", DiskFormat::Raw)),
                ("data".parse().unwrap(), file("/pool/data.qcow2", DiskFormat::Qcow2)),
                ("vars".parse().unwrap(), file("/pool/vars.raw", DiskFormat::Raw)),
            ]
            .into(),
            taps: [("lan".parse().unwrap(), "lh-web1-0".to_owned())].into(),
        }
    }

    fn host(dir: &Path) -> HostSide<'_> {
        HostSide {
            accelerator: Accelerator::Tcg,
            dir,
            kernel: None,
            uefi_code: None,
            run_as: None,
            sandbox: true,
        }
    }

    fn web1() -> MachineDefinition {
        toml::from_str(WEB1).unwrap()
    }

    #[track_caller]
    fn value<'a>(line: &'a [String], option: &str, beginning: &str) -> &'a str {
        let mut pairs = line.windows(2).filter(|pair| pair[0] == option && pair[1].starts_with(beginning));
        &pairs.next().unwrap_or_else(|| panic!("no {option} {beginning} in {line:?}"))[1]
    }

    #[test]
    fn what_the_guest_sees_comes_from_the_definition() {
        let line = command_line(&web1(), &placement(), &host(Path::new("/run/lh")), StartMode::Boot).unwrap();
        assert_eq!(value(&line, "-machine", ""), "pc-q35-7.2,accel=tcg");
        assert_eq!(value(&line, "-cpu", ""), "qemu64,enforce");
        assert_eq!((value(&line, "-smp", ""), value(&line, "-m", "")), ("2", "262136K"));
        assert_eq!(value(&line, "-uuid", ""), web1().uuid().to_string());
        assert_eq!(
            value(&line, "-device", "virtio-blk-pci,drive=disk-root"),
            "virtio-blk-pci,drive=disk-root,id=disk-root,serial=root-1,addr=04.0,multifunction=on"
        );
        assert!(value(&line, "-device", "virtio-blk-pci,drive=disk-data").ends_with("addr=04.1"));
        let nic = value(&line, "-device", "virtio-net-pci");
        assert!(nic.contains("mac=52:54:00:12:34:56,romfile=,addr=06.0"), "{nic}");
        assert_eq!(value(&line, "-device", "virtio-rng"), "virtio-rng-pci,id=rng,addr=07.0");
        assert!(line.contains(&"-S".to_owned()) && !line.contains(&"-incoming".to_owned()));
    }

    #[test]
    fn a_comma_in_a_path_adds_no_option() {
        let line =
            command_line(&web1(), &placement(), &host(Path::new("/run/l,h")), StartMode::Boot).unwrap();
        assert!(value(&line, "-chardev", "file").contains("path=/run/l,,h/console.log,append=on"));
        let root = value(&line, "-blockdev", r#"{"cache""#);
        let root: serde_json::Value = serde_json::from_str(root).unwrap();
        assert_eq!(root["filename"], "/pool/a,b/root.raw");
    }

    #[test]
    fn a_destination_differs_only_in_that_it_waits() {
        let lines = [StartMode::Boot, StartMode::Incoming]
            .map(|mode| command_line(&web1(), &placement(), &host(Path::new("/r")), mode).unwrap());
        assert_eq!(lines[1][..lines[0].len()], lines[0][..]);
        assert_eq!(lines[1][lines[0].len()..], ["-incoming", "defer"]);
    }

    #[test]
    fn what_is_not_placed_is_named() {
        let mut placement = placement();
        placement.taps.clear();
        let dir = Path::new("/r");
        let refused = |definition: &MachineDefinition, placement: &Placement, dir| {
            command_line(definition, placement, &host(dir), StartMode::Boot).unwrap_err()
        };
        assert_eq!(refused(&web1(), &placement, dir), CommandLineError::NoTap("lan".parse().unwrap()));
        placement.taps.insert("lan".parse().unwrap(), "a,script=/x".to_owned());
        assert!(matches!(refused(&web1(), &placement, dir), CommandLineError::BadTap { .. }));
        placement.disks.clear();
        assert_eq!(refused(&web1(), &placement, dir), CommandLineError::NoFile("root".parse().unwrap()));
        let long = PathBuf::from(format!("/{}", "x".repeat(107 - "/own/incoming.sock".len() - 1)));
        assert!(command_line(&web1(), &self::placement(), &host(&long), StartMode::Boot).is_ok());
        let longer = long.with_extension("y");
        assert!(matches!(refused(&web1(), &self::placement(), &longer), CommandLineError::LongPath(_)));
    }

    #[test]
    fn uefi_and_a_kernel_come_from_this_site() {
        let uefi = "firmware = { uefi = { code_bytes = 4096, vars = \"vars\", vars_bytes = 4096 } }\n";
        let definition: MachineDefinition = toml::from_str(&format!("{uefi}{WEB1}")).unwrap();
        let dir = Path::new("/r");
        let without = command_line(&definition, &placement(), &host(dir), StartMode::Boot);
        assert_eq!(without, Err(CommandLineError::NoUefi));
        let host_side = HostSide { uefi_code: Some(Path::new("/usr/share/OVMF_CODE.fd")), ..host(dir) };
        let line = command_line(&definition, &placement(), &host_side, StartMode::Boot).unwrap();
        assert!(value(&line, "-machine", "").ends_with("pflash0=uefi-code,pflash1=disk-vars"));

        let hash = "00".repeat(32);
        let boot =
            format!("[firmware.kernel]\nname = \"k\"\ncmdline = \"a=1,2 b\"\nkernel_sha256 = \"{hash}\"\n");
        let definition: MachineDefinition = toml::from_str(&format!("{WEB1}{boot}")).unwrap();
        let without = command_line(&definition, &placement(), &host(dir), StartMode::Boot);
        assert_eq!(without, Err(CommandLineError::NoKernel));
        let files = KernelPaths { kernel: "/boot/vmlinuz".into(), initrd: None };
        let host_side = HostSide { kernel: Some(&files), ..host(dir) };
        let line = command_line(&definition, &placement(), &host_side, StartMode::Boot).unwrap();
        assert_eq!((value(&line, "-kernel", ""), value(&line, "-append", "")), ("/boot/vmlinuz", "a=1,2 b"));
    }

    #[test]
    fn the_filter_forbids_raising_privileges_unless_qemu_itself_lowers_them() {
        let dir = Path::new("/r");
        let line = command_line(&web1(), &placement(), &host(dir), StartMode::Boot).unwrap();
        assert!(value(&line, "-sandbox", "").contains("elevateprivileges=deny"));
        let host_side = HostSide { run_as: Some((64001, 64001)), ..host(dir) };
        let line = command_line(&web1(), &placement(), &host_side, StartMode::Boot).unwrap();
        assert_eq!(value(&line, "-runas", ""), "64001:64001");
        assert!(!value(&line, "-sandbox", "").contains("elevate"));
        let line =
            command_line(&web1(), &placement(), &HostSide { sandbox: false, ..host_side }, StartMode::Boot);
        assert!(!line.unwrap().contains(&"-sandbox".to_owned()));
    }
}
