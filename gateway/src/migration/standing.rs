//! Whether a QEMU is still there. One that does not answer is asked until it does: nothing is decided on a silence.

use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::Refusal;

use super::destination::DestinationLeaf;
use super::prepare::Held;
use super::{Edges, MachineRow, chain};
use crate::hypervisor::{Guest, HypervisorError};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);

/// Reports `Stands`, or `Failed` if QEMU is gone.
pub(super) async fn run(leaf: DestinationLeaf, mut held: Held) -> Held {
    let vm = leaf.attempt.vm.clone();
    let event = loop {
        match stands(&leaf, &mut held).await {
            Ok(true) => break Event::Stands,
            Ok(false) => {
                break Event::Failed(Refusal::Hypervisor("QEMU of the loaded machine is gone".into()));
            }
            Err(error) => tracing::warn!(%vm, error = chain(&error), "QEMU cannot be asked"),
        }
        tokio::time::sleep(AGAIN).await;
    };
    leaf.report(event).await;
    held
}

/// The machine's QEMU: the one that is known, else the one that is found; `None` once it is certain that there is none.
pub(super) async fn certain(edges: &Edges, vm: &VmName, known: Option<Guest>) -> Option<Guest> {
    if let Some(guest) = known.filter(|guest| !guest.qmp().is_closed()) {
        return Some(guest);
    }
    loop {
        match edges.hypervisor.find(vm).await {
            Ok(found) => return found,
            Err(error) => tracing::warn!(%vm, error = chain(&error), "QEMU cannot be asked, trying again"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// The same for a machine that is known here. An adopted one's QEMU is not this gateway's to look for.
pub(super) async fn of_row(edges: &Edges, row: &MachineRow, known: Option<Guest>) -> Option<Guest> {
    match row.adopted {
        None => certain(edges, &row.definition.name, known).await,
        Some(_) => known,
    }
}

async fn stands(leaf: &DestinationLeaf, held: &mut Held) -> Result<bool, HypervisorError> {
    if let Some(guest) = &held.guest
        && guest.status().await.is_ok()
    {
        return Ok(true);
    }
    held.guest = leaf.edges.hypervisor.find(&leaf.attempt.vm).await?;
    Ok(held.guest.is_some())
}
