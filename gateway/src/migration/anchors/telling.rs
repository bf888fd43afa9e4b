//! The word of where a machine is, for every site that attracts an address of it, until each of them has noted it.
//!
//! It outlives what the anchor holds. A site that never hears it sends its packets here, where the address may be another
//! machine's by then, and believes nobody else: the word of each later move comes from a site of which it does not know.

use std::collections::BTreeSet;
use std::time::Duration;

use longhaul_core::ids::SiteName;
use longhaul_core::wire::AnchorMessage;
use tokio::sync::watch;

use super::say;
use super::task::AGAIN_AT_MOST;
use crate::migration::Edges;
use crate::migration::anchor::Anchor;

/// Between the first two tries.
const AGAIN: Duration = Duration::from_secs(1);

/// Sites that can be told where the machine is and have not heard it.
pub(super) fn unheard(edges: &Edges, anchor: &Anchor, heard: &BTreeSet<SiteName>) -> Vec<SiteName> {
    let left = anchor.tell.iter().filter(|site| !heard.contains(*site));
    left.filter(|site| edges.link.peer(site).is_some()).cloned().collect()
}

/// Some site is still to be told.
pub(super) fn is_owed(edges: &Edges, anchor: &Anchor) -> bool {
    anchor.runs_there && !unheard(edges, anchor, &BTreeSet::new()).is_empty()
}

/// Says where the machine is until every other site that attracts an address of it has heard.
pub(super) async fn tell_others(
    edges: Edges,
    anchor: Anchor,
    mut heard: watch::Receiver<BTreeSet<SiteName>>,
) {
    for site in anchor.tell.iter().filter(|site| edges.link.peer(site).is_none()) {
        tracing::warn!(vm = %anchor.vm, %site, "a site that attracts an address of the machine is no peer of this one and does not hear where it is; add it as a [[peer]]");
    }
    let mut wait = AGAIN;
    loop {
        let left = unheard(&edges, &anchor, &heard.borrow_and_update());
        if left.is_empty() {
            return;
        }
        for site in left {
            let (vm, to) = (anchor.vm.clone(), anchor.peer.clone());
            // What the name keeps is this site's to attract.
            let care_of = anchor.moves.iter().filter(|(old, new)| old != new).copied().collect();
            let moved = AnchorMessage::Moved { vm, epoch: anchor.epoch, to, care_of };
            say(&edges, &site, moved);
        }
        tokio::select! {
            changed = heard.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(AGAIN_AT_MOST),
        }
    }
}
