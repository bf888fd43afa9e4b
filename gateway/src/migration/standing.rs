//! Whether what was loaded is still there, looked at once it is ours and before that is final.

use std::time::Duration;

use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::Refusal;

use super::chain;
use super::destination::DestinationLeaf;
use super::prepare::Held;
use crate::hypervisor::HypervisorError;

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

async fn stands(leaf: &DestinationLeaf, held: &mut Held) -> Result<bool, HypervisorError> {
    if let Some(guest) = &held.guest
        && guest.status().await.is_ok()
    {
        return Ok(true);
    }
    held.guest = leaf.edges.hypervisor.find(&leaf.attempt.vm).await?;
    Ok(held.guest.is_some())
}
