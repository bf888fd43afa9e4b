//! Takes a QEMU that somebody else started, if it is what the definition says it is.
//!
//! Every difference is named with its field, what the definition has and what QEMU has, for the
//! destination will be started from the definition alone. Devices that the definition does not know are
//! differences too. Adopting changes nothing in that QEMU.

use std::collections::BTreeMap;
use std::path::Path;

use longhaul_core::ids::DeviceName;
use longhaul_core::machine::{Firmware, MachineDefinition, Mismatch, PciAddress};
use serde::Deserialize;
use serde_json::{Value, json};

use super::guest::{Guest, VolumeNode};
use super::inspect::{self, BlockDevice, Device};
use super::qmp::{QmpClient, QmpConfig, QmpError};

/// Why a running QEMU was not adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// It could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It is not what the definition says.
    #[error("The running machine is not as defined: {}", list(.0))]
    Differs(Vec<Mismatch>),
}

fn list(differences: &[Mismatch]) -> String {
    differences.iter().map(Mismatch::to_string).collect::<Vec<_>>().join("; ")
}

/// Connects to the monitor at `socket` and takes the machine if it equals `definition`.
pub(super) async fn adopt(
    socket: &Path,
    definition: &MachineDefinition,
    config: QmpConfig,
) -> Result<Guest, AdoptError> {
    let qmp = QmpClient::connect(socket, config).await?;
    let volumes = verify(&qmp, definition).await?;
    Ok(Guest { name: definition.name.clone(), qmp, volumes, home: None })
}

/// Compares the machine behind `qmp` with `definition`; its volumes if they are equal.
pub(super) async fn verify(
    qmp: &QmpClient,
    definition: &MachineDefinition,
) -> Result<BTreeMap<DeviceName, VolumeNode>, AdoptError> {
    let mut comparison = Comparison { definition, found: Vec::new() };
    comparison.machine(qmp).await?;
    comparison.firmware(qmp).await?;
    let devices = inspect::devices(qmp).await?;
    let volumes = comparison.disks(qmp, &devices).await?;
    comparison.nics(qmp, &devices).await?;
    comparison.others(qmp, &devices).await?;
    if comparison.found.is_empty() { Ok(volumes) } else { Err(AdoptError::Differs(comparison.found)) }
}

struct Comparison<'a> {
    definition: &'a MachineDefinition,
    found: Vec<Mismatch>,
}

impl Comparison<'_> {
    fn equal(&mut self, field: &str, defined: impl ToString, running: impl ToString) {
        let (defined, running) = (defined.to_string(), running.to_string());
        if defined != running {
            self.differs(field, format!("the definition has {defined}, QEMU has {running}"));
        }
    }

    fn differs(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.found.push(Mismatch { field: field.into(), reason: reason.into() });
    }

    async fn machine(&mut self, qmp: &QmpClient) -> Result<(), QmpError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Cpu {
            qom_path: String,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Memory {
            base_memory: u64,
            #[serde(default)]
            plugged_memory: u64,
        }
        #[derive(Deserialize)]
        struct Uuid {
            #[serde(rename = "UUID")]
            uuid: String,
        }
        let definition = self.definition;
        let machine: String = inspect::property(qmp, "/machine", "type").await?;
        self.equal("machine", &definition.machine, machine.trim_end_matches("-machine"));
        let cpus: Vec<Cpu> = qmp.query("query-cpus-fast", json!({})).await?;
        self.equal("vcpus", definition.vcpus, cpus.len());
        if let Some(cpu) = cpus.first() {
            let model: String = inspect::property(qmp, &cpu.qom_path, "type").await?;
            self.equal("cpu", &definition.cpu, model.trim_end_matches("-cpu").trim_end_matches("-x86_64"));
        }
        let memory: Memory = qmp.query("query-memory-size-summary", json!({})).await?;
        let total = memory.base_memory + memory.plugged_memory;
        let kib = |bytes: u64| format!("{} KiB", bytes >> 10);
        self.equal("memory_mib, memory_trim_kib", kib(definition.memory().0), kib(total));
        if memory.plugged_memory > 0 {
            self.differs(
                "memory_mib",
                "memory was plugged in while the machine ran, which a definition cannot say",
            );
        }
        let uuid: Uuid = qmp.query("query-uuid", json!({})).await?;
        self.equal("uuid", definition.uuid(), uuid.uuid);
        Ok(())
    }

    async fn firmware(&mut self, qmp: &QmpClient) -> Result<(), QmpError> {
        let text = async |name: &str| -> Result<String, QmpError> {
            Ok(inspect::property::<Option<String>>(qmp, "/machine", name).await?.unwrap_or_default())
        };
        let (kernel, cmdline) = (text("kernel").await?, text("append").await?);
        let flash = match text("pflash0").await {
            Ok(node) => !node.is_empty(),
            // A machine without that property has no flash.
            Err(QmpError::Refused { .. }) => false,
            Err(error) => return Err(error),
        };
        let running = match (kernel.is_empty(), flash) {
            (false, _) => "a kernel of its own",
            (true, true) => "UEFI",
            (true, false) => "BIOS",
        };
        let defined = match &self.definition.firmware {
            Firmware::Bios => "BIOS",
            Firmware::Uefi(_) => "UEFI",
            Firmware::Kernel(boot) => {
                if !kernel.is_empty() {
                    self.equal(
                        "firmware.kernel.cmdline",
                        format!("{:?}", boot.cmdline.as_str()),
                        format!("{cmdline:?}"),
                    );
                }
                "a kernel of its own"
            }
        };
        self.equal("firmware", defined, running);
        Ok(())
    }

    async fn disks(
        &mut self,
        qmp: &QmpClient,
        devices: &[Device],
    ) -> Result<BTreeMap<DeviceName, VolumeNode>, QmpError> {
        let blocks = inspect::block_devices(qmp).await?;
        let mut volumes = BTreeMap::new();
        for (at, disk) in self.definition.disks.iter().enumerate() {
            let field = format!("disks[{at}]");
            let Some(device) = self.device_at(&field, disk.pci, "virtio-blk-pci", devices) else { continue };
            let Some(inserted) =
                blocks.iter().find(|it| it.belongs_to(&device.path)).and_then(|it| it.inserted.clone())
            else {
                self.differs(field, format!("the device at {} has no disk in it", disk.pci));
                continue;
            };
            self.equal(&format!("{field}.size_bytes"), disk.size_bytes, inserted.image.virtual_size);
            let serial: Option<String> = inspect::property(qmp, &device.path, "serial").await?;
            let defined = disk.serial.as_ref().map_or("", |serial| serial.as_str());
            self.equal(
                &format!("{field}.serial"),
                format!("{defined:?}"),
                format!("{:?}", serial.unwrap_or_default()),
            );
            let node = VolumeNode {
                node: inserted.node,
                device: Some(device.path.clone()),
                size_bytes: inserted.image.virtual_size,
            };
            volumes.insert(disk.name.clone(), node);
        }
        self.flash(qmp, &mut volumes).await?;
        Ok(volumes)
    }

    /// The UEFI variables are a block node that no device of the guest's PCI bus shows.
    async fn flash(
        &mut self,
        qmp: &QmpClient,
        volumes: &mut BTreeMap<DeviceName, VolumeNode>,
    ) -> Result<(), QmpError> {
        let Firmware::Uefi(uefi) = &self.definition.firmware else { return Ok(()) };
        let node = match inspect::property::<Option<String>>(qmp, "/machine", "pflash1").await {
            Ok(node) => node.unwrap_or_default(),
            Err(QmpError::Refused { .. }) => String::new(),
            Err(error) => return Err(error),
        };
        let nodes: Vec<Value> = qmp.query("query-named-block-nodes", json!({ "flat": true })).await?;
        let size = nodes
            .iter()
            .find(|it| it["node-name"] == node)
            .and_then(|it| it["image"]["virtual-size"].as_u64());
        let Some(size_bytes) = size else {
            self.differs("firmware.uefi.vars", "QEMU has no second flash chip with variables");
            return Ok(());
        };
        self.equal("firmware.uefi.vars_bytes", uefi.vars_bytes, size_bytes);
        volumes.insert(uefi.vars.clone(), VolumeNode { node, device: None, size_bytes });
        Ok(())
    }

    async fn nics(&mut self, qmp: &QmpClient, devices: &[Device]) -> Result<(), QmpError> {
        for (at, nic) in self.definition.nics.iter().enumerate() {
            let field = format!("nics[{at}]");
            let Some(device) = self.device_at(&field, nic.pci, "virtio-net-pci", devices) else { continue };
            let mac: String = inspect::property(qmp, &device.path, "mac").await?;
            self.equal(&format!("{field}.mac"), nic.mac_text(), mac.to_lowercase());
            let rom: Option<String> = inspect::property(qmp, &device.path, "romfile").await?;
            if let Some(rom) = rom.filter(|rom| !rom.is_empty()) {
                self.differs(
                    field,
                    format!(
                        "QEMU has the network boot image {rom} in it; start the machine with romfile= there"
                    ),
                );
            }
        }
        if let Some(pci) = self.definition.rng {
            self.device_at("rng", pci, "virtio-rng-pci", devices);
        }
        Ok(())
    }

    /// Devices that the definition does not know, and serial ports.
    async fn others(&mut self, qmp: &QmpClient, devices: &[Device]) -> Result<(), QmpError> {
        let defined: Vec<PciAddress> = self.definition.pci_devices().map(|(_, pci)| pci).collect();
        for device in devices {
            if device.pci.is_none_or(|pci| !defined.contains(&pci)) {
                let place = device.pci.map_or(String::new(), |pci| format!(" at PCI {pci}"));
                self.differs(
                    "devices",
                    format!("QEMU has a {}{place}, the definition has none", device.kind),
                );
            }
        }
        for pci in inspect::pci_bus(qmp).await? {
            let address = PciAddress::new(pci.slot, pci.function);
            let known = devices.iter().any(|device| device.pci == address);
            if !pci.is_chipset() && !known {
                let what = pci
                    .class_info
                    .desc
                    .unwrap_or_else(|| format!("device of class {:#x}", pci.class_info.class));
                self.differs(
                    "devices",
                    format!(
                        "QEMU has a {what} at PCI {:02x}.{}, the definition has none",
                        pci.slot, pci.function
                    ),
                );
            }
        }
        let built_in = inspect::built_in(qmp).await?;
        let serial_ports = built_in.iter().filter(|kind| *kind == "isa-serial").count();
        self.equal("serial ports", 1, serial_ports);
        Ok(())
    }

    fn device_at<'d>(
        &mut self,
        field: &str,
        pci: PciAddress,
        kind: &str,
        devices: &'d [Device],
    ) -> Option<&'d Device> {
        let Some(device) = devices.iter().find(|device| device.pci == Some(pci)) else {
            self.differs(format!("{field}.pci"), format!("the definition has {pci}, QEMU has nothing there"));
            return None;
        };
        // QEMU has the same device under names that fix its virtio version.
        if device.kind.trim_end_matches("-transitional").trim_end_matches("-non") != kind {
            self.equal(field, kind, &device.kind);
            return None;
        }
        Some(device)
    }
}

/// The volumes of a machine that this gateway started, found by the names it gave them.
pub(super) async fn volumes_by_name(qmp: &QmpClient) -> Result<BTreeMap<DeviceName, VolumeNode>, QmpError> {
    let nodes: Vec<Value> = qmp.query("query-named-block-nodes", json!({ "flat": true })).await?;
    let blocks = inspect::block_devices(qmp).await?;
    let volume = |node: &Value| {
        let name = node["node-name"].as_str()?;
        let disk: DeviceName = name.strip_prefix("disk-")?.parse().ok()?;
        let shown = |block: &&BlockDevice| block.inserted.as_ref().is_some_and(|it| it.node == name);
        let device =
            blocks.iter().find(shown).map(|block| block.qdev.trim_end_matches("/virtio-backend").to_owned());
        let size_bytes = node["image"]["virtual-size"].as_u64()?;
        Some((disk, VolumeNode { node: name.to_owned(), device, size_bytes }))
    };
    Ok(nodes.iter().filter_map(volume).collect())
}
