//! How machines run on this host, and what can go wrong with that.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::machine::KernelName;
use longhaul_core::units::Bytes;

use super::accelerator::AcceleratorChoice;
use super::adopt::AdoptError;
use super::command_line::{CommandLineError, KernelPaths};
use super::probe::ProbeError;
use super::qmp::{QmpConfig, QmpError};

/// User ids of which each machine gets one of its own, as user and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidRange {
    /// The first.
    pub first: u32,
    /// How many: the most machines at once.
    pub count: u32,
}

/// How machines run on this host.
#[derive(Debug, Clone)]
pub struct HypervisorConfig {
    /// The program: `qemu-system-x86_64`, from the search path if it is no path.
    pub qemu: PathBuf,
    /// Where machines have their sockets and logs: `/run/longhaul`. A short path, for sockets' sake.
    pub run_dir: PathBuf,
    /// Users for machines; without, QEMU runs as the gateway does. Needs root.
    pub uids: Option<UidRange>,
    /// The accelerator: `auto`, which costs one trial of at most `kvm_limit` after the gateway's start.
    pub accelerator: AcceleratorChoice,
    /// How long the trial guest may take under KVM. 3 s: where KVM works it takes 0.3 s.
    pub kvm_limit: Duration,
    /// How long QEMU may take to start. 20 s, of which a busy host needs some for a large guest's memory.
    pub start_limit: Duration,
    /// The longest console log; twice this is kept. 4 MiB for each machine.
    pub console_limit: Bytes,
    /// Filter QEMU's system calls. On; off only for a QEMU built without seccomp.
    pub sandbox: bool,
    /// Run machines in transient units where systemd runs. On.
    pub systemd: bool,
    /// Guests may have the CPU model `host`: all sites have equal processors. Off.
    pub allow_host_cpu: bool,
    /// Kernels for machines that boot one directly.
    pub kernels: BTreeMap<KernelName, KernelPaths>,
    /// The UEFI code image, for machines that boot by UEFI.
    pub uefi_code: Option<PathBuf>,
    /// Limits of the monitors.
    pub qmp: QmpConfig,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            run_dir: "/run/longhaul".into(),
            uids: None,
            accelerator: AcceleratorChoice::Auto,
            kvm_limit: Duration::from_secs(3),
            start_limit: Duration::from_secs(20),
            console_limit: Bytes::mib(4),
            sandbox: true,
            systemd: true,
            allow_host_cpu: false,
            kernels: BTreeMap::new(),
            uefi_code: None,
            qmp: QmpConfig::default(),
        }
    }
}

/// Why a machine was not started or found.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// A file or folder of this edge.
    #[error("Cannot {action} {}", path.display())]
    Files {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The placement does not fit the definition.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// QEMU could not be asked what it can do.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A machine of this name runs already.
    #[error("Machine {name} runs already, as process {pid}")]
    Runs {
        /// The machine.
        name: VmName,
        /// Its QEMU.
        pid: u32,
    },
    /// QEMU ended, or did not answer in time.
    #[error("QEMU does not start machine {name}: {reason}")]
    Start {
        /// The machine.
        name: VmName,
        /// What QEMU printed.
        reason: String,
    },
    /// The machine that started is not the one that was defined.
    #[error("Machine {name} did not start as defined")]
    NotAsDefined {
        /// The machine.
        name: VmName,
        /// What differs.
        #[source]
        source: AdoptError,
    },
    /// All users for machines are taken.
    #[error("All {count} users for machines are taken; enlarge the range of uids")]
    NoUid {
        /// How many there are.
        count: u32,
    },
    /// A running machine cannot be asked.
    #[error("Machine {name} runs but cannot be asked")]
    Qmp {
        /// The machine.
        name: VmName,
        /// Why.
        #[source]
        source: QmpError,
    },
}

/// Turns what the system said about `path` into an error.
pub(super) fn files<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> HypervisorError + 'a {
    move |source| HypervisorError::Files { action, path: path.to_owned(), source }
}
