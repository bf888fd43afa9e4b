//! Stages 4 and 5 at the destination: the machine is ours; rules first, then it runs.
//!
//! Nothing here may fail into anything but trying again: the other side has let go of the machine. A QEMU
//! that died before it was resumed is a crash of the guest here: the machine is ours all the same, and the
//! source must hear it. What runs next is its disk at this site, never the source's older copy.

use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::{Handover, Proposal, Reservation};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::tunnel::handover::NicHandover;
use tokio::sync::{mpsc, oneshot};

use super::anchor::{self, AnchorCommand};
use super::destination::DestinationLeaf;
use super::prepare::Held;
use super::stay::{Stay, brought};
use super::{MachineRow, chain, standing};
use super::{partial, remembered};
use crate::hypervisor::{Guest, QmpError};
use crate::memory::TargetHandle;

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);

/// Resumes the machine here and reports `Activated`.
pub(super) async fn run(
    leaf: DestinationLeaf,
    proposal: Proposal,
    reservation: Reservation,
    handover: Handover,
    mut held: Held,
    permit: RunPermit,
    anchors: mpsc::Sender<AnchorCommand>,
) -> Held {
    let vm = leaf.attempt.vm.clone();
    let stay = Stay::of_arrival(&leaf.edges, &leaf.attempt.peer, &proposal, &reservation);
    let here = async {
        came_back(&leaf, &proposal, &anchors).await;
        stay.take_over(&leaf.edges, &handover).await;
    };
    tokio::join!(here, note_arrival(&leaf, &proposal));
    held.guest = standing::certain(&leaf.edges, &vm, held.guest.take()).await;
    if let Some(guest) = &held.guest {
        mark_disks(&leaf, guest, &proposal).await;
        if proposal.running {
            resume(&leaf, guest, &vm, permit).await;
        }
    }
    held.guest = held.guest.take().filter(|guest| !guest.qmp().is_closed());
    leaf.guest.send_replace(held.guest.clone());
    leaf.report(Event::Activated).await;
    stay.resumed(&leaf.edges).await;
    remember(&leaf, &proposal, &reservation, Some(&handover));
    partial::forget(&leaf.edges.config.storage.pool, &vm);
    let memory = held.memory.as_mut().and_then(TargetHandle::take_remembered);
    remembered::keep(&leaf.edges, &vm, memory);
    match &held.guest {
        Some(_) => tracing::info!(%vm, "machine runs here"),
        None => say_crashed(&leaf, &vm),
    }
    held
}

fn say_crashed(leaf: &DestinationLeaf, vm: &VmName) {
    tracing::warn!(%vm, "the guest crashed: its QEMU ended before it was resumed; `longhaul vm start` boots it from its disk here");
    let notice = format!(
        "QEMU at site {} ended before the guest was resumed: `longhaul vm start {vm}` there boots it from its disk",
        leaf.edges.site()
    );
    leaf.viewer.change(|view| view.notices.push(notice));
}

/// What stayed here for a machine that had left is over: it is here again. At its home the name comes back, too.
async fn came_back(leaf: &DestinationLeaf, proposal: &Proposal, anchors: &mpsc::Sender<AnchorCommand>) {
    let names = anchor::names_of_return(&leaf.edges, &leaf.attempt, proposal).map(Box::new);
    let (done, ended) = oneshot::channel();
    anchor::tell(anchors, AnchorCommand::CameBack { vm: leaf.attempt.vm.clone(), names, done }).await;
    // A gateway that is stopping answers nothing, and the next one begins anew.
    let _ = ended.await;
}

/// Beside its disks stands that the machine is ours before it runs.
async fn note_arrival(leaf: &DestinationLeaf, proposal: &Proposal) {
    let images = anchor::pool_images(&leaf.edges, &leaf.attempt, proposal);
    super::note(&leaf.attempt, images, leaf.edges.site()).await;
}

/// Bitmaps that tell, from the first instruction on, which blocks have changed here.
async fn mark_disks(leaf: &DestinationLeaf, guest: &Guest, proposal: &Proposal) {
    let name = format!("longhaul-e{}", leaf.attempt.epoch);
    for volume in proposal.definition.volumes() {
        if let Err(error) = guest.dirty_bitmap_add(volume.name, &name, 65536).await {
            tracing::debug!(vm = %leaf.attempt.vm, error = chain(&error), "bitmap was not added");
        }
    }
}

async fn resume(leaf: &DestinationLeaf, guest: &Guest, vm: &VmName, permit: RunPermit) {
    let failed = |error: &QmpError| {
        tracing::error!(%vm, error = chain(error), "the guest was not resumed, trying again");
        leaf.viewer.notice_once(format!(
            "QEMU at site {} does not resume the guest yet: {error}",
            leaf.edges.site()
        ));
    };
    guest.resume_until_it_runs(permit, AGAIN, failed).await;
}

/// Writes down the machine as this site will run it. First when everything is held, so that a machine
/// that runs is always known; again when its flows are.
pub(super) fn remember(
    leaf: &DestinationLeaf,
    proposal: &Proposal,
    reservation: &Reservation,
    handover: Option<&Handover>,
) {
    let vm = &leaf.attempt.vm;
    let row = MachineRow {
        definition: proposal.definition.clone(),
        images: anchor::pool_images(&leaf.edges, &leaf.attempt, proposal),
        home_site: proposal.home_site.clone(),
        came_from: Some(leaf.attempt.peer.clone()),
        adopted: None,
        care_of: reservation.care_of.clone(),
        carried: brought(leaf.edges.site(), proposal),
        over: Vec::new(),
        handover: Some(merge(&proposal.nics, handover)),
        wanted: proposal.running,
        settled_in: handover.map(|_| leaf.attempt.epoch),
        ttl_before_s: None,
    };
    if let Err(error) = leaf.edges.journal.put_machine(vm, &row) {
        tracing::error!(%vm, error = chain(&error), "the machine could not be written down; `vm list` will not show it");
    }
}

/// Neighbours and prefixes of the proposal, flows of the hand-over.
fn merge(nics: &[NicHandover], handover: Option<&Handover>) -> Handover {
    let mut nics = nics.to_vec();
    let handed = handover.map_or(&[][..], |handover| &handover.nics);
    for nic in &mut nics {
        if let Some(handed) = handed.iter().find(|handed| handed.nic == nic.nic) {
            nic.flows.clone_from(&handed.flows);
        }
    }
    Handover { nics }
}
