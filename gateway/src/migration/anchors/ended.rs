//! Which of the connections that a machine left behind have ended since: they are taken out of the anchor's row, so that a
//! gateway that begins anew does not hold a tunnel for connections that are over.
//!
//! What is written down may be older than the truth by one look. New connections are not: whoever uses one shows it.

use std::collections::BTreeSet;
use std::time::Duration;

use longhaul_core::tunnel::flows::FlowState;
use longhaul_core::tunnel::handover::FlowTuple;
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::watch;

use crate::migration::anchor::Anchor;
use crate::migration::{Edges, chain};

/// How often it is looked while few are left, and while many are: what ends in between and is followed by the gateway's
/// death holds the tunnel for its idle time.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_AT_MANY: Duration = Duration::from_secs(1);
/// How many are many.
const FEW_FLOWS: usize = 256;
/// Connections of one NIC that are looked at; of a NIC with more of them none is noted, for a look costs as much as they are.
const MAX_FLOWS: usize = 10_000;

/// Notes what has ended in the row, and in `ended` for whoever writes the row as a whole.
pub(super) async fn note_ended(edges: Edges, anchor: Anchor, ended: watch::Sender<BTreeSet<FlowTuple>>) {
    loop {
        let known = ended.borrow().clone();
        let Some(pause) = pause(&anchor, &known) else { return };
        tokio::time::sleep(pause).await;
        let mut news = BTreeSet::new();
        for nic in &anchor.nics {
            let left: Vec<&FlowTuple> = nic.flows.iter().filter(|flow| !known.contains(flow)).collect();
            let key = PortKey { machine: anchor.vm.clone(), nic: nic.nic.clone() };
            if let Some(alive) = alive(&edges, key, &left).await {
                news.extend(left.into_iter().filter(|flow| !alive.contains(flow)).copied());
            }
        }
        if news.is_empty() {
            continue;
        }
        ended.send_modify(|ended| ended.extend(&news));
        let forget = |anchor: &mut Anchor| anchor.forget_flows(&news);
        if let Err(error) = edges.journal.change_anchor(&anchor.vm, forget) {
            tracing::warn!(vm = %anchor.vm, error = chain(&error), "the end of connections could not be written down");
        }
    }
}

/// Until the next look; `None` if there is nothing left to look at.
fn pause(anchor: &Anchor, ended: &BTreeSet<FlowTuple>) -> Option<Duration> {
    let flows = anchor.nics.iter().flat_map(|nic| &nic.flows);
    let left = flows.filter(|flow| !ended.contains(flow)).count();
    (left > 0).then_some(if left <= FEW_FLOWS { LOOK } else { LOOK_AT_MANY })
}

/// The connections of a NIC that are not over; `None` if nobody can say, or nobody asks.
async fn alive(edges: &Edges, key: PortKey, left: &[&FlowTuple]) -> Option<BTreeSet<FlowTuple>> {
    if left.is_empty() || left.len() > MAX_FLOWS {
        return None;
    }
    // Until the address is attracted there is no listing.
    let listing = edges.tunnel.flows(key, MAX_FLOWS + 1).await.ok()?;
    if listing.flows.len() > MAX_FLOWS {
        return None;
    }
    let alive = listing.flows.into_iter().filter(|flow| flow.state != FlowState::Closed);
    Some(alive.map(|flow| flow.tuple).collect())
}
