//! QEMUs that are there and did not answer when the gateway looked for them: asked again until they do.
//!
//! Until then the machine is neither running nor crashed nor stopped for its operator, and nothing is taken away from it.

use std::time::Duration;

use longhaul_core::ids::VmName;

use super::{Daemon, Machine};
use crate::hypervisor::{Guest, HypervisorError};
use crate::migration::{MachineRow, chain, look};

/// Between two tries.
const AGAIN: Duration = Duration::from_secs(2);

/// A QEMU that was silent has answered, or is gone.
pub(super) struct Answered {
    vm: VmName,
    guest: Option<Guest>,
}

impl Daemon {
    /// Takes a machine up with what was found of its QEMU.
    pub(super) fn take_up(&mut self, row: MachineRow, found: Result<Option<Guest>, HypervisorError>) {
        let vm = row.definition.name.clone();
        let silent = found.is_err();
        let guest = found.unwrap_or_else(|error| {
            tracing::error!(%vm, error = chain(&error), "the machine's QEMU does not answer; it is asked again");
            None
        });
        self.machines.insert(vm.clone(), Machine { row: row.clone(), guest, silent });
        self.watch(&vm);
        // A driver that works on it asks by itself, and a monitor serves one client; at its end this comes again.
        if silent && self.migration_of(&vm).is_none() {
            let (edges, answered) = (self.edges.clone(), self.answered.clone());
            tokio::spawn(async move {
                let guest = loop {
                    tokio::time::sleep(AGAIN).await;
                    match look(&edges, &row).await {
                        Ok(guest) => break guest,
                        Err(error) => tracing::debug!(%vm, error = chain(&error), "QEMU does not answer yet"),
                    }
                };
                // The daemon's task outlives this one.
                drop(answered.send(Answered { vm, guest }).await);
            });
        }
    }

    /// Takes note of it, unless somebody else has found the QEMU meanwhile or is asking it.
    pub(super) fn on_answered(&mut self, answered: Answered) {
        let Answered { vm, guest } = answered;
        if self.migration_of(&vm).is_some() {
            return;
        }
        let Some(machine) = self.machines.get_mut(&vm).filter(|machine| machine.silent) else { return };
        tracing::info!(%vm, runs = guest.is_some(), "the machine's QEMU has answered");
        (machine.guest, machine.silent) = (guest, false);
        self.watch(&vm);
        self.decide_restart(&vm);
    }
}
