//! Whether a QEMU is still there. One that does not answer is asked until it does: nothing is decided on a silence.

use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::Refusal;

use super::destination::DestinationLeaf;
use super::prepare::Held;
use super::{Edges, MachineRow, chain};
use crate::hypervisor::{AdoptError, Guest, HypervisorError, QmpError};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);
/// How long an adopted QEMU that does not answer is asked: its monitor may be its operator's again.
const ADOPTED_LIMIT: Duration = Duration::from_secs(60);

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

/// The same for a machine that is known here. Whether an adopted one's QEMU is still there nobody can say for certain.
pub(super) async fn of_row(edges: &Edges, row: &MachineRow, known: Option<Guest>) -> Option<Guest> {
    let vm = &row.definition.name;
    if row.adopted.is_none() {
        return certain(edges, vm, known).await;
    }
    if let Some(guest) = known.filter(|guest| !guest.qmp().is_closed()) {
        return Some(guest);
    }
    let asked = async {
        loop {
            match look(edges, row).await {
                Ok(found) => return found,
                Err(error) => {
                    tracing::warn!(%vm, error = chain(&error), "QEMU cannot be asked, trying again")
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::time::timeout(ADOPTED_LIMIT, asked).await.unwrap_or_else(|_| {
        tracing::error!(%vm, "the adopted QEMU does not answer and is left as it is: look whether its guest stands still");
        None
    })
}

/// The QEMU of a machine, if it runs. An error: there is one that does not answer.
pub(crate) async fn look(edges: &Edges, row: &MachineRow) -> Result<Option<Guest>, HypervisorError> {
    let name = &row.definition.name;
    let Some(adopted) = &row.adopted else { return edges.hypervisor.find(name).await };
    match edges.hypervisor.adopt(&adopted.monitor, &row.definition).await {
        Ok(guest) => Ok(Some(guest)),
        // Nobody listens there, or something else does.
        Err(AdoptError::Qmp(QmpError::Connect { .. } | QmpError::Gone { .. }) | AdoptError::Differs(_)) => {
            Ok(None)
        }
        Err(AdoptError::Qmp(source)) => Err(HypervisorError::Qmp { name: name.clone(), source }),
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
