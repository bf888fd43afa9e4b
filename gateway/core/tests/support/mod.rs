//! What tests of the machines need and do not care about.

use std::sync::LazyLock;
use std::time::Duration;

use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::convergence::Progress;
use longhaul_core::units::{Bytes, Rate};

static WEB1: LazyLock<MachineDefinition> = LazyLock::new(|| {
    let text = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 256\n\
        [[disks]]\nname = \"root\"\nsize_bytes = 1073741824\npci = \"03.0\"\n";
    toml::from_str(text).expect("a literal definition")
});

/// A small machine called `web1`.
pub fn definition() -> MachineDefinition {
    WEB1.clone()
}

/// A measurement at which the guest is stopped.
pub fn converged() -> Progress {
    Progress {
        memory_remaining: Bytes(4096),
        dirty_rate: Rate(0),
        since_sync: Duration::ZERO,
        goodput: Rate::mbit(100),
        unacknowledged: Bytes(0),
        reduction_permille: 500,
        round: 3,
        disks_in_step: true,
        rtt: Duration::from_millis(100),
        waited: Duration::from_millis(100),
        names_unread: false,
    }
}
