//! What one host's QEMU can run, and whether that is enough for a definition.
//!
//! The gateway fills [`HostCapabilities`] by asking QEMU itself; nothing here assumes what a version
//! can do. The answer to [`MachineDefinition::check`] lists everything that does not fit, so that an
//! operator mends it in one go.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::definition::{Firmware, KernelBoot, MachineDefinition};
use super::values::{CpuModel, KernelName, Sha256Digest};
use crate::units::Bytes;

/// A version of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QemuVersion {
    /// 7 in 7.2.22.
    pub major: u16,
    /// 2 in 7.2.22.
    pub minor: u16,
    /// 22 in 7.2.22.
    pub micro: u16,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU says of one machine type (`query-machines`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSupport {
    /// The most virtual CPUs it can have.
    pub max_vcpus: u16,
    /// A later QEMU will not have it any more.
    pub deprecated: bool,
}

/// What QEMU says of one CPU model (`query-cpu-definitions`) under the host's accelerator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSupport {
    /// The features that the accelerator lacks for it; empty if it can run.
    pub missing_features: Vec<String>,
    /// It means the same CPU on every host.
    pub migration_safe: bool,
}

/// The hashes of the files that a host has under a kernel's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelFiles {
    /// The kernel's.
    pub kernel_sha256: Sha256Digest,
    /// The initial RAM disk's, if there is one.
    pub initrd_sha256: Option<Sha256Digest>,
}

/// What one host can run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCapabilities {
    /// The version of its QEMU.
    pub qemu: QemuVersion,
    /// Its machine types by name, versioned ones only.
    pub machines: BTreeMap<String, MachineSupport>,
    /// Its CPU models by name.
    pub cpus: BTreeMap<String, CpuSupport>,
    /// Policy: guests may use the CPU model `host`, because all sites have equal processors.
    pub allow_host_cpu: bool,
    /// Memory that a guest may still take.
    pub free_memory: Bytes,
    /// Kernels for direct boot, by name.
    pub kernels: BTreeMap<KernelName, KernelFiles>,
    /// The size of its UEFI code image, if it has one.
    pub uefi_code: Option<Bytes>,
    /// The features of QMP that it has, of those the gateway knows to use (`block-job-change`, ...).
    pub features: BTreeSet<String>,
}

/// One thing in a definition that a host cannot do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Mismatch {
    /// The field of the definition.
    pub field: String,
    /// What the host has instead, and what helps.
    pub reason: String,
}

/// Everything in a definition that a host cannot do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incompatible(pub Vec<Mismatch>);

impl fmt::Display for Incompatible {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, mismatch) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            write!(f, "{separator}{mismatch}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Incompatible {}

impl MachineDefinition {
    /// Whether a host with these capabilities can run this machine; all reasons why not.
    pub fn check(&self, host: &HostCapabilities) -> Result<(), Incompatible> {
        let found: Vec<Mismatch> = [
            self.check_machine(host),
            self.check_cpu(host),
            self.check_memory(host),
            self.check_firmware(host),
        ]
        .into_iter()
        .filter_map(Result::err)
        .collect();
        if found.is_empty() { Ok(()) } else { Err(Incompatible(found)) }
    }

    fn check_machine(&self, host: &HostCapabilities) -> Result<(), Mismatch> {
        let Some(machine) = host.machines.get(&self.machine.to_string()) else {
            return mismatch("machine", format!("QEMU {} has no {}", host.qemu, self.machine));
        };
        if self.vcpus > machine.max_vcpus {
            let reason =
                format!("{} has at most {}, {} are asked for", self.machine, machine.max_vcpus, self.vcpus);
            return mismatch("vcpus", reason);
        }
        Ok(())
    }

    fn check_cpu(&self, host: &HostCapabilities) -> Result<(), Mismatch> {
        if self.cpu.as_str() == "host" && !host.allow_host_cpu {
            return mismatch(
                "cpu",
                "\"host\" is not allowed here; name a model that all sites have".to_owned(),
            );
        }
        let Some(cpu) = host.cpus.get(self.cpu.as_str()) else {
            return mismatch("cpu", format!("QEMU {} has no model {}", host.qemu, self.cpu));
        };
        if cpu.missing_features.is_empty() {
            return Ok(());
        }
        mismatch(
            "cpu",
            format!("{} needs {}, which this host lacks", self.cpu, cpu.missing_features.join(", ")),
        )
    }

    fn check_memory(&self, host: &HostCapabilities) -> Result<(), Mismatch> {
        let needed = self.memory();
        if needed <= host.free_memory {
            return Ok(());
        }
        mismatch("memory_mib", format!("{needed} are asked for, {} are free", host.free_memory))
    }

    fn check_firmware(&self, host: &HostCapabilities) -> Result<(), Mismatch> {
        match &self.firmware {
            Firmware::Bios => Ok(()),
            Firmware::Kernel(boot) => check_kernel(boot, host),
            Firmware::Uefi(uefi) => match host.uefi_code {
                None => mismatch(
                    "firmware",
                    "This host has no UEFI image; name one in its configuration".to_owned(),
                ),
                Some(Bytes(size)) if size != uefi.code_bytes => mismatch(
                    "firmware.uefi.code_bytes",
                    format!("The UEFI image here has {size} bytes, the machine's has {}", uefi.code_bytes),
                ),
                Some(_) => Ok(()),
            },
        }
    }
}

fn check_kernel(boot: &KernelBoot, host: &HostCapabilities) -> Result<(), Mismatch> {
    let Some(files) = host.kernels.get(&boot.name) else {
        let reason = format!("This host has no kernel {}; name its files in the configuration", boot.name);
        return mismatch("firmware.kernel.name", reason);
    };
    if files.kernel_sha256 != boot.kernel_sha256 {
        return mismatch(
            "firmware.kernel.kernel_sha256",
            format!("The file here has {}", files.kernel_sha256),
        );
    }
    if files.initrd_sha256 != boot.initrd_sha256 {
        let here = files.initrd_sha256.map_or("no initial RAM disk".to_owned(), |hash| hash.to_string());
        return mismatch("firmware.kernel.initrd_sha256", format!("Here is {here}"));
    }
    Ok(())
}

fn mismatch(field: &str, reason: String) -> Result<(), Mismatch> {
    Err(Mismatch { field: field.to_owned(), reason })
}

impl HostCapabilities {
    /// Whether this host's QEMU knows `feature`.
    pub fn has(&self, feature: &str) -> bool {
        self.features.contains(feature)
    }

    /// Whether `cpu` means the same processor on every host that has it.
    pub fn is_migration_safe(&self, cpu: &CpuModel) -> bool {
        self.cpus.get(cpu.as_str()).is_some_and(|support| support.migration_safe)
    }
}

#[cfg(test)]
mod tests {
    use super::super::definition::tests::web1;
    use super::*;

    fn host() -> HostCapabilities {
        let cpu = |missing: &[&str]| CpuSupport {
            missing_features: missing.iter().map(|&name| name.to_owned()).collect(),
            migration_safe: true,
        };
        HostCapabilities {
            qemu: QemuVersion { major: 7, minor: 2, micro: 22 },
            machines: [("pc-q35-7.2".to_owned(), MachineSupport { max_vcpus: 288, deprecated: false })]
                .into(),
            cpus: [
                ("qemu64".to_owned(), cpu(&[])),
                ("host".to_owned(), cpu(&[])),
                ("Denverton".to_owned(), cpu(&["sha-ni"])),
            ]
            .into(),
            allow_host_cpu: false,
            free_memory: Bytes::mib(512),
            kernels: BTreeMap::new(),
            uefi_code: None,
            features: BTreeSet::new(),
        }
    }

    #[track_caller]
    fn fields(definition: &MachineDefinition, host: &HostCapabilities) -> Vec<String> {
        let Err(Incompatible(found)) = definition.check(host) else { return Vec::new() };
        found.into_iter().map(|mismatch| mismatch.field).collect()
    }

    #[test]
    fn a_host_that_has_everything_may_run_it() {
        assert_eq!(web1().check(&host()), Ok(()));
    }

    #[test]
    fn every_reason_is_given_at_once() {
        let mut definition = web1();
        definition.machine = "pc-q35-9.0".parse().unwrap();
        definition.cpu = "Denverton".parse().unwrap();
        definition.memory_mib = 513;
        assert_eq!(fields(&definition, &host()), ["machine", "cpu", "memory_mib"]);
        let text = definition.check(&host()).unwrap_err().to_string();
        assert!(text.contains("7.2.22 has no pc-q35-9.0") && text.contains("sha-ni"), "{text}");
    }

    #[test]
    fn the_host_cpu_needs_the_policy_flag() {
        let mut definition = web1();
        definition.cpu = "host".parse().unwrap();
        assert_eq!(fields(&definition, &host()), ["cpu"]);
        assert_eq!(definition.check(&HostCapabilities { allow_host_cpu: true, ..host() }), Ok(()));
    }

    #[test]
    fn a_kernel_of_the_same_name_and_another_content_is_refused() {
        let boot = KernelBoot {
            name: "debian".parse().unwrap(),
            cmdline: "ro".parse().unwrap(),
            kernel_sha256: Sha256Digest([1; 32]),
            initrd_sha256: None,
        };
        let mut definition = web1();
        definition.firmware = Firmware::Kernel(boot.clone());
        let mut host = host();
        assert_eq!(fields(&definition, &host), ["firmware.kernel.name"]);
        let mut files = KernelFiles { kernel_sha256: Sha256Digest([2; 32]), initrd_sha256: None };
        host.kernels.insert(boot.name.clone(), files.clone());
        assert_eq!(fields(&definition, &host), ["firmware.kernel.kernel_sha256"]);
        files.kernel_sha256 = boot.kernel_sha256;
        host.kernels.insert(boot.name, files);
        assert_eq!(definition.check(&host), Ok(()));
    }
}
