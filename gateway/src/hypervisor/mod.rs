//! The hypervisor edge: starts QEMU, finds it again, adopts it, and speaks QMP with it.
//!
//! ```text
//!   definition (core)  --command_line-->  arguments  --launch-->  QEMU, a process of its own
//!   placement (site)  ------^                                       |
//!                                      Guest  <---- qmp.sock -------+---- observer.sock  (anybody who measures)
//! ```
//!
//! A machine outlives the gateway: dropping a [`Guest`] changes nothing about it, and
//! [`Hypervisor::find`] takes it up again. This edge decides nothing. In particular it never resumes a
//! guest by itself: [`Guest::resume`] wants a [`RunPermit`](longhaul_core::migration::permit::RunPermit).
//! It makes no taps, bridges or disk files either; it is told their names in a [`Placement`].

mod accelerator;
mod adopt;
mod command_line;
mod config;
mod console;
mod definition_file;
mod disks;
mod encumbered;
mod foreign;
mod guest;
mod inspect;
mod launch;
mod memory;
mod mirror;
mod probe;
mod process;
mod qmp;
mod run_dir;
#[cfg(test)]
mod test_guest;
mod travel;

pub use accelerator::{Accelerator, AcceleratorChoice};
pub use adopt::AdoptError;
pub use command_line::{CommandLineError, DiskFile, DiskFormat, KernelPaths, Placement, StartMode};
pub use config::{HypervisorConfig, HypervisorError, UidRange};
pub use definition_file::{DefinitionFileError, parse_definition, read_definition};
pub(crate) use disks::export_id;
pub use disks::{Access, Export};
pub use guest::{Guest, NotResumed, RunState, VolumeNode};
pub use launch::Hypervisor;
pub use memory::{MigrationInfo, MigrationStatus, MigrationStep, MigrationSteps, OutgoingParameters};
pub use mirror::{JobState, MirrorMode, MirrorStatus};
pub use probe::{KNOWN_FEATURES, ProbeError};
pub use qmp::{EventLoss, Events, QmpClient, QmpConfig, QmpError, QmpEvent};
pub use travel::{Obstacle, Travel};
