//! The way back at the source: the guest first, then everything else.
//!
//! Every step is tried whatever became of the one before, and all of it may run twice: after a crash
//! the transfer is empty and only QEMU knows what is going on.

use std::time::Duration;

use tokio::sync::{oneshot, watch};

use longhaul_core::ids::{DeviceName, VmName};
use longhaul_core::migration::generation::Generation;
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::migration::source::Event;

use super::precopy::Transfer;
use super::source::SourceLeaf;
use super::{MachineRow, chain, standing};
use crate::generation::read_notes;
use crate::hypervisor::{Guest, QmpError, RunState, export_id};
use crate::migration::stay::holds;

const QEMU_LIMIT: Duration = Duration::from_secs(10);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);

/// Undoes everything this side did; the permit lets the guest run if it ran before. `forgotten`: nothing is attracted for the
/// other site any more.
pub(super) async fn run(
    leaf: SourceLeaf,
    guest: Option<Guest>,
    row: MachineRow,
    ttl_before_s: watch::Sender<Option<u32>>,
    mut transfer: Transfer,
    permit: RunPermit,
    forgotten: oneshot::Receiver<()>,
) -> Transfer {
    let vm = &leaf.attempt.vm;
    note_return(&leaf, &row).await;
    let guest = standing::of_row(&leaf.edges, &row, guest).await;
    leaf.guest.send_replace(guest.clone());
    match &guest {
        Some(guest) => {
            end_memory_surely(&leaf, guest, &mut transfer).await;
            resume(&leaf, guest, permit, row.wanted).await;
        }
        None => {
            tracing::warn!(%vm, "QEMU of the machine is gone; `longhaul vm start` boots it from its disk")
        }
    }
    // An attraction that was still being made would stand after what is undone here; it is over when this is dropped.
    let _ = forgotten.await;
    match holds(&leaf.edges, &row, &leaf.attempt.peer) {
        Ok(holds) => {
            for hold in holds {
                if let Err(error) = leaf.edges.tunnel.hold_undo(hold).await {
                    tracing::warn!(%vm, error = chain(&error), "held packets could not be given back");
                }
            }
        }
        Err(why) => tracing::warn!(%vm, %why, "held packets could not be given back"),
    }
    if let Some(guest) = &guest {
        end_disks(guest, &row, &mut transfer).await;
    }
    if let Some(peer) = leaf.edges.peer(&leaf.attempt.peer) {
        peer.close_bulk(leaf.attempt.id).await;
    }
    restore_ttl(&leaf, &row, ttl_before_s.send_replace(None).or(row.ttl_before_s)).await;
    leaf.report(Event::RolledBack).await;
    transfer
}

/// A machine that was refused after it had been given away has a note that says so.
async fn note_return(leaf: &SourceLeaf, row: &MachineRow) {
    let (attempt, site) = (&leaf.attempt, leaf.edges.site());
    let gone = |note: &Generation| note.epoch == attempt.epoch && note.owner != *site;
    if read_notes(&row.images).is_ok_and(|notes| notes.iter().any(gone)) {
        super::note(attempt, row.images.clone(), site).await;
    }
}

/// Ends it before the guest is resumed: one that goes on would stop the guest again. Tries until QEMU is gone.
async fn end_memory_surely(leaf: &SourceLeaf, guest: &Guest, transfer: &mut Transfer) {
    while let Err(error) = end_memory(guest, transfer).await {
        if guest.qmp().is_closed() {
            return;
        }
        tracing::warn!(vm = %leaf.attempt.vm, error = chain(&error), "QEMU's migration could not be ended, trying again");
        let site = leaf.edges.site();
        leaf.viewer.notice_once(format!("QEMU at site {site} does not end the migration yet: {error}"));
        // Without its socket it cannot go on.
        if let Some(memory) = transfer.memory.take() {
            memory.abort();
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn end_memory(guest: &Guest, transfer: &mut Transfer) -> Result<(), QmpError> {
    guest.end_migration(QEMU_LIMIT).await?;
    unlimit(guest).await;
    if let Some(memory) = transfer.memory.take() {
        memory.abort();
    }
    Ok(())
}

/// A migration that somebody else begins, such as a backup, is not to be as slow as the end of ours.
async fn unlimit(guest: &Guest) {
    if let Err(error) = guest.limit_bandwidth(None).await {
        tracing::debug!(error = chain(&error), "QEMU's own limit on migrations stays");
    }
}

/// Lets the guest run if its user wants it to and it stands still for us. A QEMU that does not answer may still have our
/// `stop` before it, so nothing is over until it has said how the guest stands.
async fn resume(leaf: &SourceLeaf, guest: &Guest, permit: RunPermit, wanted: bool) {
    if !wanted {
        return;
    }
    let vm = &leaf.attempt.vm;
    let failed = |error: &QmpError| {
        tracing::error!(%vm, error = chain(error), "the guest could not be resumed, trying again");
        leaf.viewer.notice_once(format!(
            "QEMU at site {} does not resume the guest yet: {error}",
            leaf.edges.site()
        ));
    };
    loop {
        match guest.status().await {
            Ok(RunState::Paused | RunState::Postmigrate | RunState::FinishMigrate) => {
                guest.resume_until_it_runs(permit, AGAIN, failed).await;
                return;
            }
            // It runs, or is stopped for a reason that is not ours.
            Ok(
                RunState::Running
                | RunState::Prelaunch
                | RunState::Inmigrate
                | RunState::Shutdown
                | RunState::IoError
                | RunState::Other(_),
            ) => return,
            Err(_) if guest.qmp().is_closed() => return,
            Err(error) => failed(&error),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn end_disks(guest: &Guest, row: &MachineRow, transfer: &mut Transfer) {
    end_mirrors(guest, row).await;
    transfer.disks.clear();
    transfer.server = None;
    end_exports(guest, row).await;
}

/// What a gateway left in QEMU that did not go on with its attempt: a machine with an active migration cannot be
/// resumed, and another attempt finds its names taken.
pub(crate) async fn end_what_is_left(guest: &Guest, row: &MachineRow) -> Result<(), QmpError> {
    guest.end_migration(QEMU_LIMIT).await?;
    unlimit(guest).await;
    end_mirrors(guest, row).await;
    end_exports(guest, row).await;
    Ok(())
}

async fn end_mirrors(guest: &Guest, row: &MachineRow) {
    let vm = &row.definition.name;
    for volume in row.definition.volumes() {
        lift_limit(guest, vm, volume.name).await;
        if let Err(error) = guest.mirror_abort(volume.name, true, QEMU_LIMIT).await {
            tracing::warn!(%vm, disk = %volume.name, error = chain(&error), "mirror could not be ended");
        }
    }
}

/// What the guest may write is its own again. Tried until QEMU has done it, says that it cannot, or is gone.
async fn lift_limit(guest: &Guest, vm: &VmName, disk: &DeviceName) {
    while let Err(error) = guest.limit_writes(disk, None).await {
        tracing::warn!(%vm, %disk, error = chain(&error), "the limit of the guest's writes is not lifted yet");
        if guest.qmp().is_closed() || matches!(error, QmpError::Refused { .. }) {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn end_exports(guest: &Guest, row: &MachineRow) {
    let vm = &row.definition.name;
    let ours: Vec<String> = row.definition.volumes().map(|volume| export_id(volume.name)).collect();
    match guest.exports().await {
        Ok(exports) => {
            let (ours, others): (Vec<_>, Vec<_>) =
                exports.into_iter().partition(|export| ours.contains(&export.id));
            for export in ours {
                if let Err(error) = guest.unexport(&export.id, true).await {
                    tracing::warn!(%vm, error = chain(&error), "an export could not be closed");
                }
            }
            // A backup's, for example: it needs the server, too.
            if !others.is_empty() {
                return;
            }
        }
        Err(error) => tracing::warn!(%vm, error = chain(&error), "exports could not be listed"),
    }
    if let Err(error) = guest.nbd_stop().await {
        // There is none when the attempt ended before the disks.
        tracing::debug!(%vm, error = chain(&error), "no NBD server to stop");
    }
}

async fn restore_ttl(leaf: &SourceLeaf, row: &MachineRow, before_s: Option<u32>) {
    let (Some(ttl_s), Some(name), Some(names)) = (before_s, &row.definition.dns_name, &leaf.edges.names)
    else {
        return;
    };
    if let Err(error) = names.set_ttl(name, ttl_s).await {
        tracing::warn!(vm = %leaf.attempt.vm, name, ttl_s, error = chain(&error), "TTL could not be restored, trying again until it is");
        return;
    }
    let restored = |row: &mut MachineRow| row.ttl_before_s = None;
    if let Err(error) = leaf.edges.journal.change_machine(&leaf.attempt.vm, restored) {
        tracing::warn!(vm = %leaf.attempt.vm, error = chain(&error), "the restored TTL could not be written down");
    }
}
