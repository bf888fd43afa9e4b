//! The way back at the destination: nothing of the attempt stays but what it copied of the disks.
//!
//! May run twice; what is gone already is no failure. As long as it is not certain that the waiting QEMU is
//! gone it may have its disks open: then nothing of it is taken away, and it is asked again.

use std::path::PathBuf;
use std::time::Duration;

use longhaul_core::migration::destination::Event;
use longhaul_core::migration::message::{Proposal, Reservation};

use super::anchor::pool_images;
use super::chain;
use super::destination::DestinationLeaf;
use super::partial;
use super::prepare::{Held, partial_of};
use super::stay::Stay;
use crate::hypervisor::Guest;

const QEMU_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// Gives back everything that was held.
pub(super) async fn run(
    leaf: DestinationLeaf,
    proposal: Proposal,
    reservation: Reservation,
    mut held: Held,
) -> Held {
    let vm = &leaf.attempt.vm;
    if !made_anything(&pool_images(&leaf.edges, &leaf.attempt, &proposal)) {
        // Whatever runs under this name was here before; its QEMU, taps and routes are not ours to end.
        tracing::debug!(%vm, "nothing was made for the machine");
        leaf.report(Event::Discarded).await;
        return Held::default();
    }
    let stay = Stay::of_arrival(&leaf.edges, &leaf.attempt.peer, &proposal, &reservation);
    if held.images.is_empty() {
        know_rules(&leaf, &stay).await;
    }
    held.maps.clear();
    end_qemu(&leaf, held.guest.take()).await;
    if let Some(peer) = leaf.edges.peer(&leaf.attempt.peer) {
        peer.close_bulk(leaf.attempt.id).await;
    }
    if let Err(error) = leaf.edges.hypervisor.remove_dir(vm) {
        tracing::warn!(%vm, error = chain(&error), "the folder of its QEMU could not be removed");
    }
    stay.end(&leaf.edges).await;
    keep_disks(&leaf, &proposal);
    // A machine of an earlier stay that is away keeps its row; one that never came has none.
    if matches!(leaf.edges.journal.ownership(vm), Ok(None))
        && let Err(error) = leaf.edges.journal.remove_machine(vm)
    {
        tracing::warn!(%vm, error = chain(&error), "the machine could not be forgotten");
    }
    leaf.report(Event::Discarded).await;
    Held::default()
}

/// Ends the waiting QEMU; returns only when it is gone.
async fn end_qemu(leaf: &DestinationLeaf, mut known: Option<Guest>) {
    let vm = &leaf.attempt.vm;
    let mut told = false;
    loop {
        let tried = match known.take().filter(|guest| !guest.qmp().is_closed()) {
            Some(guest) => guest.quit(QEMU_LIMIT).await.map(|()| None).map_err(|error| chain(&error)),
            None => leaf.edges.hypervisor.find(vm).await.map(Some).map_err(|error| chain(&error)),
        };
        match tried {
            Ok(None | Some(None)) => return,
            Ok(Some(found)) => known = found,
            Err(error) => {
                if !told {
                    tracing::warn!(%vm, error, "the waiting QEMU cannot be ended; its disks stay until it is gone, and no other attempt is taken");
                }
                told = true;
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// What a killed gateway installed can be undone only by a tunnel that knows it: it is prepared once more.
async fn know_rules(leaf: &DestinationLeaf, stay: &Stay) {
    if let Err(why) = stay.prepare_rules(&leaf.edges).await {
        tracing::debug!(vm = %leaf.attempt.vm, %why, "nothing of the visit was left");
    }
}

/// What was copied of the disks stays for the next attempt, as long as the configuration wants it.
fn keep_disks(leaf: &DestinationLeaf, proposal: &Proposal) {
    let images = pool_images(&leaf.edges, &leaf.attempt, proposal);
    let short = &leaf.attempt.id.to_string()[..8];
    for (volume, image) in proposal.definition.volumes().zip(images) {
        let of = partial_of(leaf, volume.name);
        if let Err(error) = partial::keep(&leaf.edges.config.storage, &of, short, &image) {
            tracing::warn!(vm = %of.vm, image = %image.display(), %error, "partial disk could not be put aside");
            // Under its own name nothing would ever remove it; it may have another one by now.
            drop(std::fs::remove_file(&image));
        }
    }
}

/// Images are the first that is made and the last that is removed, and named after the attempt: where none
/// of them is, this attempt has nothing else either. A machine without disks leaves no such mark.
fn made_anything(images: &[PathBuf]) -> bool {
    images.is_empty() || images.iter().any(|image| image.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_that_made_no_image_has_nothing_to_discard() {
        let folder = tempfile::tempdir().unwrap();
        let images = ["root", "data"].map(|name| folder.path().join(name));
        assert!(!made_anything(&images));
        std::fs::write(&images[0], "").unwrap();
        assert!(made_anything(&images));
        assert!(made_anything(&[]));
    }
}
