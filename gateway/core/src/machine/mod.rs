//! What a guest is: a closed definition that two sites understand alike, and whether a host can run it.
//!
//! The definition travels between sites and stands in TOML files. It holds what the guest can see
//! (machine type, CPU model, devices and where they sit on the PCI bus) and nothing that belongs to
//! one site: no host path, no bridge, no accelerator, no raw argument for QEMU. Each site maps the
//! names in it to its own pools, networks and kernel files.

mod capabilities;
mod definition;
pub mod restart;
#[cfg(test)]
mod round_trip;
mod text;
mod validate;
mod values;

pub use capabilities::{
    CpuSupport, HostCapabilities, Incompatible, KernelFiles, MachineSupport, Mismatch, QemuVersion,
};
pub use definition::{
    DefinitionDraft, Disk, Firmware, KernelBoot, MachineDefinition, Nic, Restart, UefiFirmware, Volume,
};
pub use validate::{InvalidDefinition, limits};
pub use values::{
    CpuModel, InvalidValue, KernelCommandLine, KernelName, LanName, MachineType, MachineUuid, PciAddress,
    Serial, Sha256Digest,
};
