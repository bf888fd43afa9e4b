//! What tests of the machines need and do not care about.

use std::time::Duration;

use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::convergence::Progress;
use longhaul_core::units::{Bytes, Rate};

/// A small machine.
pub fn definition(name: &str) -> MachineDefinition {
    MachineDefinition { name: name.parse().expect("a literal name") }
}

/// A measurement at which the guest is stopped.
pub fn converged() -> Progress {
    Progress {
        memory_remaining: Bytes(4096),
        dirty_rate: Rate(0),
        goodput: Rate::mbit(100),
        unacknowledged: Bytes(0),
        reduction_permille: 500,
        round: 3,
        disks_in_step: true,
        rtt: Duration::from_millis(100),
    }
}
