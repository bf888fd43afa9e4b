//! Which of the connections that a machine left behind have ended since: they are taken out of the anchor's row, so that a
//! gateway that begins anew does not hold a tunnel for connections that are over.
//!
//! What is written down may be older than the truth by one look. New connections are not: whoever uses one shows it.
//!
//! A look asks the task that moves packets for every connection, so it is made when fewer of them are alive than before, and
//! less often while those that end are none of these; otherwise once a second.

use std::collections::BTreeSet;
use std::time::Duration;

use longhaul_core::tunnel::flows::FlowState;
use longhaul_core::tunnel::handover::FlowTuple;
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::watch;

use super::task::standing;
use crate::migration::anchor::Anchor;
use crate::migration::{Edges, chain};

/// How often it is looked at most while few are left, and while many are or nothing seems to end: what ends in between and
/// is followed by the gateway's death holds the tunnel for its idle time.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_AT_MANY: Duration = Duration::from_secs(1);
/// How many are many.
const FEW_FLOWS: usize = 256;
/// Connections of one NIC that are looked at; of a NIC with more of them none is noted, for a look costs as much as they are.
const MAX_FLOWS: usize = 10_000;

/// Notes what has ended in the row, and in `ended` for whoever writes the row as a whole.
pub(super) async fn note_ended(edges: Edges, anchor: Anchor, ended: watch::Sender<BTreeSet<FlowTuple>>) {
    let keys: Vec<PortKey> = anchor.holds().into_iter().map(|hold| hold.key).collect();
    let (status, mut pace) = (edges.tunnel.status(), Pace::new());
    loop {
        let known = ended.borrow().clone();
        let Some(least) = pause(&anchor, &known) else { return };
        pace.wait_for_look(least, || standing(&status.borrow(), &keys).0).await;
        let mut news = BTreeSet::new();
        for nic in &anchor.nics {
            let left: Vec<&FlowTuple> = nic.flows.iter().filter(|flow| !known.contains(flow)).collect();
            let key = PortKey { machine: anchor.vm.clone(), nic: nic.nic.clone() };
            if let Some(alive) = alive(&edges, key, &left).await {
                news.extend(left.into_iter().filter(|flow| !alive.contains(flow)).copied());
            }
        }
        pace.looked(!news.is_empty());
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

/// When a look is worth what it costs.
struct Pace {
    wait: Duration,
    since_look: Duration,
    /// Connections that were alive a moment ago, new ones among them.
    alive: u64,
    /// There were more of them since the last look.
    fell: bool,
}

impl Pace {
    fn new() -> Self {
        Self { wait: LOOK, since_look: Duration::ZERO, alive: 0, fell: false }
    }

    async fn wait_for_look(&mut self, least: Duration, alive: impl Fn() -> u64) {
        loop {
            let wait = self.wait.max(least);
            tokio::time::sleep(wait).await;
            if self.is_due(wait, alive()) {
                return;
            }
        }
    }

    fn is_due(&mut self, waited: Duration, alive: u64) -> bool {
        self.since_look = self.since_look.saturating_add(waited);
        self.fell |= alive < self.alive;
        self.alive = alive;
        self.fell || self.since_look >= LOOK_AT_MANY
    }

    fn looked(&mut self, found: bool) {
        let in_vain = self.fell && !found;
        self.wait = if in_vain { (self.wait * 2).min(LOOK_AT_MANY) } else { LOOK };
        (self.since_look, self.fell) = (Duration::ZERO, false);
    }
}

/// Until the next look at least; `None` if there is nothing left to look at.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks within ten seconds in which `alive` connections are there after so many milliseconds; which looks find one of
    /// ours that has ended says `found`.
    fn looks_ms(alive: impl Fn(u64) -> u64, found: impl Fn(u64) -> bool) -> Vec<u64> {
        let (mut pace, mut now_ms, mut looks) = (Pace::new(), 0, Vec::new());
        while now_ms < 10_000 {
            let wait = pace.wait;
            now_ms += wait.as_millis() as u64;
            if pace.is_due(wait, alive(now_ms)) {
                looks.push(now_ms);
                pace.looked(found(now_ms));
            }
        }
        looks
    }

    #[test]
    fn a_connection_that_stays_is_looked_at_once_a_second_and_its_end_at_once() {
        assert_eq!(looks_ms(|_| 1, |_| false).len(), 10);
        let ends_ms = 4550;
        let looks = looks_ms(|now_ms| u64::from(now_ms < ends_ms), |_| true);
        assert!(looks.iter().any(|at_ms| (ends_ms..=ends_ms + 100).contains(at_ms)), "{looks:?}");
    }

    #[test]
    fn new_connections_that_come_and_go_do_not_make_it_look_all_the_time() {
        let busy = |now_ms: u64| 1 + now_ms / 100 % 2;
        let looks = looks_ms(busy, |_| false);
        assert!(looks.len() <= 25, "{looks:?}");
        let looks = looks_ms(|now_ms| if now_ms < 5000 { busy(now_ms) } else { 1 }, |_| false);
        assert!(looks.len() <= 25, "{looks:?}");
        let ends_ms = 8050;
        let looks = looks_ms(
            |now_ms| match now_ms {
                0..5000 => busy(now_ms),
                5000.. => u64::from(now_ms < ends_ms),
            },
            |_| true,
        );
        assert!(looks.iter().any(|at_ms| (ends_ms..=ends_ms + 100).contains(at_ms)), "{looks:?}");
    }
}
