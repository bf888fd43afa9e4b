//! What a running QEMU shows its guest, asked over QMP: devices, where they sit, what is behind them.
//!
//! It only reads. What differs from a definition is [`super::adopt`]'s to say, what cannot travel
//! [`super::travel`]'s.

use longhaul_core::machine::PciAddress;
use serde::Deserialize;
use serde_json::{Value, json};

use super::qmp::{QmpClient, QmpError};

/// A device that was added to the machine (`-device`), as QOM knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Its QOM path: `/machine/peripheral/disk-root`.
    pub path: String,
    /// Its type: `virtio-blk-pci`.
    pub kind: String,
    /// Where it sits on PCI, if it does: bus 0 or behind a bridge.
    pub pci: Option<PciAddress>,
    /// It may share its disk with other writers.
    pub share_rw: bool,
}

/// A disk as the guest's device sees it (`query-block`).
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockDevice {
    /// The device's QOM path or id; empty for a drive without device.
    #[serde(default)]
    pub qdev: String,
    #[serde(default)]
    pub removable: bool,
    #[serde(default)]
    pub inserted: Option<Inserted>,
}

/// What is in a block device.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Inserted {
    #[serde(rename = "node-name")]
    pub node: String,
    #[serde(rename = "drv")]
    pub format: String,
    #[serde(rename = "ro")]
    pub read_only: bool,
    #[serde(default)]
    pub backing_file_depth: u32,
    pub image: Image,
}

/// What an image is.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Image {
    pub virtual_size: u64,
    /// Internal snapshots.
    #[serde(default)]
    pub snapshots: Vec<Value>,
}

/// A device on PCI bus 0 (`query-pci`).
#[derive(Debug, Clone, Deserialize)]
pub(super) struct PciDevice {
    pub slot: u8,
    pub function: u8,
    pub qdev_id: String,
    pub class_info: PciClass,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct PciClass {
    pub class: u32,
    #[serde(default)]
    pub desc: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// A property of a QOM object. QMP `qom-get`.
pub(super) async fn property<T: for<'de> Deserialize<'de>>(
    qmp: &QmpClient,
    path: &str,
    property: &str,
) -> Result<T, QmpError> {
    qmp.query("qom-get", json!({ "path": path, "property": property })).await
}

/// The devices that were added to the machine. QMP `qom-list`, `qom-get`.
pub(super) async fn devices(qmp: &QmpClient) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for parent in ["/machine/peripheral", "/machine/peripheral-anon"] {
        for (name, kind) in children(qmp, parent).await? {
            let path = format!("{parent}/{name}");
            let properties: Vec<Property> = qmp.query("qom-list", json!({ "path": path })).await?;
            let has = |wanted: &str| properties.iter().any(|property| property.name == wanted);
            let pci = match has("addr") && has("romfile") {
                true => pci_address(property(qmp, &path, "addr").await?),
                false => None,
            };
            let share_rw = has("share-rw") && property(qmp, &path, "share-rw").await?;
            devices.push(Device { path, kind, pci, share_rw });
        }
    }
    Ok(devices)
}

/// The types of the devices that the machine brought by itself.
pub(super) async fn built_in(qmp: &QmpClient) -> Result<Vec<String>, QmpError> {
    Ok(children(qmp, "/machine/unattached").await?.into_iter().map(|(_, kind)| kind).collect())
}

async fn children(qmp: &QmpClient, parent: &str) -> Result<Vec<(String, String)>, QmpError> {
    let properties: Vec<Property> = qmp.query("qom-list", json!({ "path": parent })).await?;
    let child = |property: Property| {
        let kind = property.kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        Some((property.name, kind))
    };
    Ok(properties.into_iter().filter_map(child).collect())
}

/// PCI's device-and-function number; negative means "not placed yet".
fn pci_address(devfn: i64) -> Option<PciAddress> {
    let devfn = u8::try_from(devfn).ok()?;
    PciAddress::new(devfn >> 3, devfn & 7)
}

/// The guest's disks. QMP `query-block`.
pub(super) async fn block_devices(qmp: &QmpClient) -> Result<Vec<BlockDevice>, QmpError> {
    qmp.query("query-block", json!({})).await
}

/// What sits on PCI bus 0. QMP `query-pci`.
pub(super) async fn pci_bus(qmp: &QmpClient) -> Result<Vec<PciDevice>, QmpError> {
    #[derive(Deserialize)]
    struct Bus {
        bus: u32,
        devices: Vec<PciDevice>,
    }
    let buses: Vec<Bus> = qmp.query("query-pci", json!({})).await?;
    Ok(buses.into_iter().filter(|bus| bus.bus == 0).flat_map(|bus| bus.devices).collect())
}

impl PciDevice {
    /// Whether the machine itself brings it: bridges to the host and ISA, IDE or SATA, SMBus, ACPI.
    pub fn is_chipset(&self) -> bool {
        self.qdev_id.is_empty()
            && matches!(self.class_info.class, 0x600 | 0x601 | 0x101 | 0x106 | 0x680 | 0xc05)
    }
}

impl BlockDevice {
    /// Whether it belongs to the device at this QOM path.
    pub fn belongs_to(&self, path: &str) -> bool {
        let id = path.rsplit('/').next();
        self.qdev.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            || (!self.qdev.contains('/') && !self.qdev.is_empty() && id == Some(self.qdev.as_str()))
    }
}
