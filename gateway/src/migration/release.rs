//! Stage 5 at the source, after the destination runs the machine: nothing of it runs here any more.
//!
//! The disks stay, renamed, so that nothing starts them by accident: until their time is over, or the machine has
//! been here once more and newer ones take their place. Names and packets are the anchor's business, which outlives
//! the migration. The note beside a disk stands by its old name and by the new one: an older journal looks for the
//! first, an operator may define the second.

use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::ids::DeviceName;
use longhaul_core::migration::Attempt;
use longhaul_core::migration::source::Event;
use longhaul_core::tunnel::policy::PortKey;

use super::precopy::Transfer;
use super::source::SourceLeaf;
use super::stay::Stay;
use super::{Edges, MachineRow, chain, kept, remembered, standing};
use crate::hypervisor::Guest;
use crate::memory::SourceHandle;

const QEMU_LIMIT: Duration = Duration::from_secs(10);

/// Forgets the guest and keeps its disks aside.
pub(super) async fn run(
    leaf: SourceLeaf,
    guest: Option<Guest>,
    row: MachineRow,
    mut transfer: Transfer,
) -> Transfer {
    let vm = &leaf.attempt.vm;
    let memory = transfer.memory.as_mut().and_then(SourceHandle::take_remembered);
    drop(transfer);
    leaf.guest.send_replace(None);
    let guest = standing::of_row(&leaf.edges, &row, guest).await;
    let images = images(guest.as_ref(), &row).await;
    if let Some(guest) = guest
        && let Err(error) = guest.quit(QEMU_LIMIT).await
    {
        tracing::warn!(%vm, error = chain(&error), "QEMU of the machine that left could not be ended");
    }
    keep_aside(&leaf.edges, &leaf.attempt, &row, &images).await;
    kept::supersede(&leaf.edges, vm);
    leave_taps(&leaf, &row).await;
    leave_network(&leaf, &row).await;
    if let Some(peer) = leaf.edges.peer(&leaf.attempt.peer) {
        peer.close_bulk(leaf.attempt.id).await;
    }
    leaf.report(Event::TidiedUp).await;
    remembered::keep(&leaf.edges, vm, memory);
    Transfer::default()
}

/// Leaves nothing of a machine that has no QEMU here any more but its disks, renamed, with a note that they are the
/// peer's of `attempt` since that epoch.
pub(crate) async fn keep_aside(edges: &Edges, attempt: &Attempt, row: &MachineRow, images: &[PathBuf]) {
    let vm = &attempt.vm;
    let aside = images.iter().map(|image| moved_name(image, attempt.epoch.0));
    super::note(attempt, images.iter().cloned().chain(aside).collect(), &attempt.peer).await;
    if row.adopted.is_none()
        && let Err(error) = edges.hypervisor.remove_dir(vm)
    {
        tracing::warn!(%vm, error = chain(&error), "the folder of its QEMU could not be removed");
    }
    for (volume, image) in row.definition.volumes().zip(images) {
        put_aside(edges, attempt, row, volume.name, image);
    }
}

/// May have been done before a crash: then the disk has its new name.
fn put_aside(edges: &Edges, attempt: &Attempt, row: &MachineRow, volume: &DeviceName, image: &Path) {
    let vm = &attempt.vm;
    let aside = moved_name(image, attempt.epoch.0);
    match std::fs::rename(image, &aside) {
        Ok(()) => tracing::info!(%vm, kept = %aside.display(), "disk kept aside"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(%vm, image = %image.display(), %error, "disk could not be renamed"),
    }
    kept::remember(edges, attempt, volume, &aside, row.adopted.is_some());
}

/// The machine's images. Something else may have put an adopted machine on other files since.
async fn images(guest: Option<&Guest>, row: &MachineRow) -> Vec<PathBuf> {
    let (Some(guest), Some(_)) = (guest, &row.adopted) else { return row.images.clone() };
    guest.image_files(&row.definition).await.unwrap_or_else(|error| {
        tracing::debug!(vm = %row.definition.name, error = chain(&error), "images as they were when it was adopted");
        row.images.clone()
    })
}

/// The tap of an adopted machine is its operator's and stays, with nothing of ours on it.
async fn leave_taps(leaf: &SourceLeaf, row: &MachineRow) {
    for nic in row.adopted.iter().flat_map(|adopted| adopted.ports.keys()) {
        let key = PortKey { machine: leaf.attempt.vm.clone(), nic: nic.clone() };
        if let Err(error) = leaf.edges.tunnel.sample_end(key).await {
            tracing::warn!(vm = %leaf.attempt.vm, %nic, error = chain(&error), "sampler could not be removed");
        }
    }
}

/// Rules of a visit end with it, and so do those for what it had brought home. A tap at home stays the anchor's.
async fn leave_network(leaf: &SourceLeaf, row: &MachineRow) {
    if row.visits(leaf.edges.site()) {
        return Stay::of_row(&leaf.edges, row).end(&leaf.edges).await;
    }
    for nic in &row.definition.nics {
        let key = PortKey { machine: leaf.attempt.vm.clone(), nic: nic.name.clone() };
        if let Err(error) = leaf.edges.tunnel.carry_undo(key).await {
            tracing::warn!(vm = %leaf.attempt.vm, error = chain(&error), "rules of its visits were not removed");
        }
    }
}

/// The name under which a disk of a machine that left is kept: `IMAGE.moved-eEPOCH`.
pub fn moved_name(image: &Path, epoch: u64) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(format!(".moved-e{epoch}"));
    PathBuf::from(name)
}
