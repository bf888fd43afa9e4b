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

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// Connections of one NIC that are looked at; of a NIC with more of them none is noted, for a look costs as much as they are.
const MAX_FLOWS: usize = 10_000;

/// Notes what has ended in the row, and in `ended` for whoever writes the row as a whole.
pub(super) async fn note_ended(edges: Edges, anchor: Anchor, ended: watch::Sender<BTreeSet<FlowTuple>>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let known = ended.borrow().clone();
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
