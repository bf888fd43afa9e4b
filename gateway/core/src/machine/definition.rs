//! The definition of a guest: a closed schema, the same in TOML and on the wire.
//!
//! Reading one checks it ([`MachineDefinition::validate`]), so that a definition from a peer or from
//! a file is either sound or an error. The schema keeps to what postcard can carry: no flattened,
//! untagged or skipped fields.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::text;
use super::validate::InvalidDefinition;
use super::values::{
    CpuModel, KernelCommandLine, KernelName, LanName, MachineType, MachineUuid, PciAddress, Serial,
    Sha256Digest,
};
use crate::ids::{DeviceName, TemplateName, VmName};
use crate::tunnel::handover::{Mac, Prefix};
use crate::units::Bytes;

/// A guest as it sees itself: everything that must be equal at both ends of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct MachineDefinition {
    /// The machine's name at all sites.
    pub name: VmName,
    /// Its UUID; without one, [`MachineDefinition::uuid`] derives it from the name.
    #[serde(default)]
    pub uuid: Option<MachineUuid>,
    /// The machine type with its version.
    pub machine: MachineType,
    /// The CPU model by name; `qemu64` if none is named.
    #[serde(default = "default_cpu")]
    pub cpu: CpuModel,
    /// The number of virtual CPUs.
    pub vcpus: u16,
    /// Memory in binary megabytes, less what is trimmed.
    pub memory_mib: u64,
    /// KiB that are left off the end of the memory; 8 if nothing is said, 0 for an adopted machine that
    /// has all of it.
    ///
    /// QEMU before 9.0, when it emulates, loses track of writes during a migration if the memory is a
    /// whole number of 256 KiB: the guest arrives with stale pages (measured on 7.2.22, 121 of 128 busy
    /// pages). Only then it takes a short cut through its dirty bitmap that forgets to reset the TLB
    /// (`cpu_physical_memory_sync_dirty_bitmap`, mended in 2024). A few KiB less, and it does not.
    #[serde(default = "default_trim")]
    pub memory_trim_kib: u64,
    /// What starts the guest.
    #[serde(default)]
    pub firmware: Firmware,
    /// A virtio random number source at this address, if the guest has one.
    #[serde(default)]
    pub rng: Option<PciAddress>,
    /// The name that clients ask DNS for.
    #[serde(default)]
    pub dns_name: Option<String>,
    /// The TTL in seconds of that name's records when no migration is near.
    #[serde(default)]
    pub dns_ttl_s: Option<u32>,
    /// What the site that has it does when its QEMU is gone and nobody stopped it.
    #[serde(default)]
    pub restart: Restart,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Its network interfaces.
    #[serde(default)]
    pub nics: Vec<Nic>,
}

/// What follows the end of a QEMU that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// The machine stays down until an operator starts it.
    #[default]
    Never,
    /// It boots again from its disks, where it is, unless the guest had powered itself off.
    OnCrash,
}

/// One virtio disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name inside the definition.
    pub name: DeviceName,
    /// What the guest sees as its size, in bytes; a multiple of 512.
    pub size_bytes: u64,
    /// Where it sits on PCI bus 0.
    pub pci: PciAddress,
    /// The serial number it shows to the guest.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// The image it was cloned from, if there is one: of what a site has of that, nothing need be sent to it. Whether the
    /// name is the right one is found out block by block.
    #[serde(default)]
    pub template: Option<TemplateName>,
}

/// One virtio network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name inside the definition.
    pub name: DeviceName,
    /// The guest's link-layer address, the same at every site.
    #[serde(with = "text::mac")]
    pub mac: Mac,
    /// The addresses the guest believes it has, with the prefix length of its home LAN.
    #[serde(default, with = "text::prefixes")]
    pub home: Vec<Prefix>,
    /// The network it is attached to.
    pub lan: LanName,
    /// Where it sits on PCI bus 0.
    pub pci: PciAddress,
}

/// What starts the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Firmware {
    /// SeaBIOS, as QEMU brings it.
    #[default]
    Bios,
    /// UEFI in flash, its variables in a volume that travels like a disk.
    Uefi(UefiFirmware),
    /// QEMU loads a kernel by itself.
    Kernel(KernelBoot),
}

/// UEFI in two flash chips. Their sizes are part of the guest's memory map and must be equal at both ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UefiFirmware {
    /// The size in bytes of the code image, which every site has of its own.
    pub code_bytes: u64,
    /// The name of the volume that holds the variables.
    pub vars: DeviceName,
    /// The size in bytes of that volume.
    pub vars_bytes: u64,
}

/// A kernel that QEMU loads by itself. The hashes make sure that a guest that reboots after the move
/// gets the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelBoot {
    /// The name under which each site knows the files.
    pub name: KernelName,
    /// What the kernel is told.
    pub cmdline: KernelCommandLine,
    /// The kernel's hash.
    pub kernel_sha256: Sha256Digest,
    /// The initial RAM disk's hash, if there is one.
    #[serde(default)]
    pub initrd_sha256: Option<Sha256Digest>,
}

/// Something that is stored and travels with the machine: a disk, or the UEFI variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume<'a> {
    /// Its name, unique in the machine.
    pub name: &'a DeviceName,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it was cloned from, if that is known.
    pub template: Option<&'a TemplateName>,
}

impl MachineDefinition {
    /// The machine's UUID: the one written down, else the one that belongs to its name.
    pub fn uuid(&self) -> MachineUuid {
        self.uuid.unwrap_or_else(|| MachineUuid::of_name(self.name.as_str()))
    }

    /// The guest's memory.
    pub fn memory(&self) -> Bytes {
        Bytes((self.memory_mib << 20).saturating_sub(self.memory_trim_kib << 10))
    }

    /// Everything that is stored and has to travel: the disks, then the UEFI variables if there are any.
    pub fn volumes(&self) -> impl Iterator<Item = Volume<'_>> {
        let vars = match &self.firmware {
            Firmware::Uefi(uefi) => {
                Some(Volume { name: &uefi.vars, size_bytes: uefi.vars_bytes, template: None })
            }
            Firmware::Bios | Firmware::Kernel(_) => None,
        };
        let disks = self.disks.iter().map(|disk| Volume {
            name: &disk.name,
            size_bytes: disk.size_bytes,
            template: disk.template.as_ref(),
        });
        disks.chain(vars)
    }

    /// All PCI devices of the definition: what it is, and where.
    pub fn pci_devices(&self) -> impl Iterator<Item = (String, PciAddress)> {
        let disks = self.disks.iter().enumerate().map(|(at, disk)| (format!("disks[{at}].pci"), disk.pci));
        let nics = self.nics.iter().enumerate().map(|(at, nic)| (format!("nics[{at}].pci"), nic.pci));
        disks.chain(nics).chain(self.rng.map(|pci| ("rng".to_owned(), pci)))
    }
}

impl Nic {
    /// The link-layer address as text: `52:54:00:12:34:56`.
    pub fn mac_text(&self) -> String {
        text::print_mac(self.mac)
    }

    /// Whether one of its home addresses is of IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.home.iter().any(|home| home.addr.is_ipv6())
    }
}

impl<'de> Deserialize<'de> for MachineDefinition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let definition = Self::deserialize(deserializer)?;
        definition.validate().map_err(D::Error::custom)?;
        Ok(definition)
    }
}

impl Serialize for MachineDefinition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// A definition that was read but not checked as a whole, for readers that report each error at its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefinitionDraft(MachineDefinition);

impl DefinitionDraft {
    /// The definition, if it is sound.
    pub fn validate(self) -> Result<MachineDefinition, InvalidDefinition> {
        self.0.validate()?;
        Ok(self.0)
    }
}

impl<'de> Deserialize<'de> for DefinitionDraft {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        MachineDefinition::deserialize(deserializer).map(Self)
    }
}

fn default_trim() -> u64 {
    8
}

fn default_cpu() -> CpuModel {
    "qemu64".parse().expect("the name is sound, as a test of this module shows")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub const WEB1: &str = r#"
        name = "web1"
        machine = "pc-q35-7.2"
        vcpus = 2
        memory_mib = 256
        dns_name = "web1.site.example"
        dns_ttl_s = 300

        [[disks]]
        name = "root"
        size_bytes = 1073741824
        pci = "04.0"

        [[disks]]
        name = "data"
        size_bytes = 67108864
        pci = "05.0"
        serial = "data-1"

        [[nics]]
        name = "lan"
        mac = "52:54:00:12:34:56"
        home = ["198.51.100.10/24", "2001:db8:a::10/64"]
        lan = "servers"
        pci = "06.0"
    "#;

    pub fn web1() -> MachineDefinition {
        toml::from_str(WEB1).unwrap()
    }

    #[test]
    fn a_definition_reads_from_toml_with_its_defaults() {
        let web1 = web1();
        assert_eq!(web1.cpu, default_cpu());
        assert_eq!(web1.firmware, Firmware::Bios);
        assert_eq!(web1.restart, Restart::Never);
        assert_eq!(web1.memory(), Bytes((256 << 20) - (8 << 10)));
        assert_eq!(web1.uuid(), MachineUuid::of_name("web1"));
        assert_eq!(web1.volumes().map(|volume| volume.size_bytes).collect::<Vec<_>>(), [1 << 30, 64 << 20]);
    }

    #[test]
    fn a_restart_policy_is_read_by_its_name() {
        let read =
            |policy: &str| toml::from_str::<MachineDefinition>(&format!("restart = \"{policy}\"{WEB1}"));
        assert_eq!(read("on-crash").unwrap().restart, Restart::OnCrash);
        assert_eq!(read("never").unwrap().restart, Restart::Never);
        assert!(read("always").unwrap_err().to_string().contains("on-crash"));
    }

    #[test]
    fn firmware_reads_in_all_its_forms() {
        let uefi = format!(
            "firmware = {{ uefi = {{ code_bytes = 1048576, vars = \"vars\", vars_bytes = 65536 }} }}{WEB1}"
        );
        let uefi: MachineDefinition = toml::from_str(&uefi).unwrap();
        assert_eq!(uefi.volumes().last().unwrap().name.as_str(), "vars");
        let hash = "ab".repeat(32);
        let kernel = format!(
            "{WEB1}\n[firmware.kernel]\nname = \"debian\"\ncmdline = \"ro quiet\"\nkernel_sha256 = \"{hash}\"\n"
        );
        let kernel: MachineDefinition = toml::from_str(&kernel).unwrap();
        assert!(matches!(kernel.firmware, Firmware::Kernel(KernelBoot { initrd_sha256: None, .. })));
    }

    #[test]
    fn a_template_is_a_name_of_a_disk_and_no_path() {
        let read = |template: &str| {
            let from = "serial = \"data-1\"";
            let to = format!("{from}\ntemplate = \"{template}\"");
            toml::from_str::<MachineDefinition>(&WEB1.replace(from, &to))
        };
        let machine = read("debian-12").unwrap();
        let named = |volume: Volume<'_>| volume.template.map(ToString::to_string);
        assert_eq!(machine.volumes().map(named).collect::<Vec<_>>(), [None, Some("debian-12".to_owned())]);
        for bad in ["", "Debian", "../shadow", "debian/12", "debian.raw", "12-debian"] {
            assert!(read(bad).unwrap_err().to_string().contains("not a template name"), "{bad}");
        }
    }

    #[test]
    fn what_is_not_in_the_schema_is_refused() {
        for extra in [
            "qemu_args = [\"-monitor\", \"stdio\"]",
            "accel = \"kvm\"",
            "firmware = { uefi = { path = \"/x\" } }",
        ] {
            let error = toml::from_str::<MachineDefinition>(&format!("{extra}\n{WEB1}")).unwrap_err();
            assert!(error.to_string().contains("unknown field"), "{error}");
        }
        let path = WEB1.replace("serial = \"data-1\"", "path = \"/etc/shadow\"");
        assert!(
            toml::from_str::<MachineDefinition>(&path)
                .unwrap_err()
                .to_string()
                .contains("unknown field `path`")
        );
    }

    #[test]
    fn an_unsound_definition_does_not_deserialise_from_the_wire() {
        let mut twice = web1();
        twice.disks[1].pci = twice.disks[0].pci;
        let bytes = postcard::to_allocvec(&twice).unwrap();
        assert!(postcard::from_bytes::<MachineDefinition>(&bytes).is_err());
    }
}
