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
use longhaul_core::tunnel::policy::PortKey;

use super::destination::DestinationLeaf;
use super::partial;
use super::prepare::Held;
use super::{MachineRow, chain};
use crate::hypervisor::{Guest, QmpError};

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
) -> Held {
    let vm = leaf.attempt.vm.clone();
    tokio::join!(install_flows(&leaf, &vm, &handover), note_arrival(&leaf, &proposal));
    held.guest = find(&leaf, &vm, held.guest.take()).await;
    if let Some(guest) = &held.guest {
        mark_disks(&leaf, guest, &proposal).await;
        if proposal.running {
            resume(&leaf, guest, &vm, permit).await;
        }
    }
    held.guest = held.guest.take().filter(|guest| !guest.qmp().is_closed());
    leaf.guest.send_replace(held.guest.clone());
    leaf.report(Event::Activated).await;
    for nic in &proposal.definition.nics {
        let key = PortKey { machine: vm.clone(), nic: nic.name.clone() };
        if let Err(error) = leaf.edges.tunnel.visit_resumed(key).await {
            tracing::warn!(%vm, error = chain(&error), "care-of address could not be announced");
        }
    }
    remember(&leaf, &proposal, &reservation, Some(&handover));
    partial::forget(&leaf.edges.config.storage.pool, &vm);
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

/// The flows of before the move, so that the guest's own packets find the tunnel.
async fn install_flows(leaf: &DestinationLeaf, vm: &VmName, handover: &Handover) {
    for nic in &handover.nics {
        let key = PortKey { machine: vm.clone(), nic: nic.nic.clone() };
        if let Err(error) = leaf.edges.tunnel.visit_flows(key, nic.flows.clone()).await {
            // The machine must run; flows that it opened itself by UDP may change their address.
            tracing::warn!(%vm, error = chain(&error), "flows of before the move could not be installed");
        }
    }
}

/// Beside its disks stands that the machine is ours before it runs.
async fn note_arrival(leaf: &DestinationLeaf, proposal: &Proposal) {
    let images = super::anchor::pool_images(&leaf.edges, &leaf.attempt, proposal);
    super::note(&leaf.attempt, images, leaf.edges.site()).await;
}

/// The QEMU that waits; `None` once it is certain that there is none.
async fn find(leaf: &DestinationLeaf, vm: &VmName, known: Option<Guest>) -> Option<Guest> {
    if let Some(guest) = known.filter(|guest| !guest.qmp().is_closed()) {
        return Some(guest);
    }
    loop {
        match leaf.edges.hypervisor.find(vm).await {
            Ok(found) => return found,
            Err(error) => tracing::warn!(%vm, error = chain(&error), "QEMU cannot be asked, trying again"),
        }
        tokio::time::sleep(AGAIN).await;
    }
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
        images: super::anchor::pool_images(&leaf.edges, &leaf.attempt, proposal),
        home_site: proposal.home_site.clone(),
        adopted: None,
        care_of: reservation.care_of.clone(),
        handover: Some(merge(&proposal.nics, handover)),
        wanted: proposal.running,
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
