//! Proposals of peers between their arrival and their reservation.
//!
//! ```text
//!   Propose -> begin -> looked at (a task) -> end: accepted -> Reserve: take
//!                 |-> accepted already: the answer is said again, nothing is looked at
//!                 \-> dropped: too many of this peer, or this one is being looked at already
//! ```
//!
//! Kept per peer: whatever one of them sends, it crowds out its own proposals alone and cannot take
//! another's. Nothing is answered here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use longhaul_core::ids::{MigrationId, SiteName};
use longhaul_core::migration::message::Proposal;

/// Proposals of one peer that are looked at at the same time; more are dropped, and the peer repeats them.
const MAX_LOOKED_AT: usize = 8;
/// Accepted proposals of one peer that wait for their reservation; beyond it the oldest is forgotten.
const MAX_ACCEPTED: usize = 16;

/// What peers have proposed. At most 24 proposals of one frame each are held per peer.
#[derive(Debug, Default)]
pub(super) struct Proposals {
    peers: BTreeMap<SiteName, OfPeer>,
}

#[derive(Debug, Default)]
struct OfPeer {
    looked_at: BTreeSet<MigrationId>,
    accepted: VecDeque<(MigrationId, Proposal)>,
}

/// What is done about a proposal that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// It is looked at.
    Look,
    /// It was accepted: a second look could only contradict what the peer may be acting on.
    Accepted,
    /// Nothing: the peer repeats it.
    Dropped,
}

impl Proposals {
    /// A proposal came.
    pub(super) fn begin(&mut self, peer: &SiteName, id: MigrationId) -> Begun {
        let of_peer = self.peers.entry(peer.clone()).or_default();
        if of_peer.accepted.iter().any(|(known, _)| *known == id) {
            return Begun::Accepted;
        }
        let looked_at = &mut of_peer.looked_at;
        if looked_at.len() < MAX_LOOKED_AT && looked_at.insert(id) { Begun::Look } else { Begun::Dropped }
    }

    /// It was looked at; `accepted` is kept for its reservation.
    pub(super) fn end(&mut self, peer: &SiteName, id: MigrationId, accepted: Option<Proposal>) {
        let of_peer = self.peers.entry(peer.clone()).or_default();
        of_peer.looked_at.remove(&id);
        let Some(proposal) = accepted else { return };
        of_peer.accepted.retain(|(known, _)| *known != id);
        while of_peer.accepted.len() >= MAX_ACCEPTED {
            of_peer.accepted.pop_front();
        }
        of_peer.accepted.push_back((id, proposal));
    }

    /// The accepted proposal that `peer` wants to make good now.
    pub(super) fn take(&mut self, peer: &SiteName, id: MigrationId) -> Option<Proposal> {
        let accepted = &mut self.peers.get_mut(peer)?.accepted;
        let at = accepted.iter().position(|(known, _)| *known == id)?;
        accepted.remove(at).map(|(_, proposal)| proposal)
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::CommitMode;

    use super::*;

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn proposal() -> Proposal {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n";
        Proposal {
            definition: toml::from_str(definition).unwrap(),
            home_site: site("a"),
            hypervisor: String::new(),
            epoch: Epoch(1),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
            carried: Vec::new(),
        }
    }

    #[test]
    fn a_flood_of_proposals_is_looked_at_in_a_bounded_number_and_does_not_stop_another_peers() {
        let mut proposals = Proposals::default();
        let begun = (0..1000).map(|id| proposals.begin(&site("liar"), MigrationId(id)));
        assert_eq!(begun.filter(|begun| *begun == Begun::Look).count(), MAX_LOOKED_AT);
        assert_eq!(proposals.begin(&site("a"), MigrationId(1)), Begun::Look);
        assert_eq!(proposals.begin(&site("a"), MigrationId(1)), Begun::Dropped, "it is being looked at");
        proposals.end(&site("liar"), MigrationId(0), None);
        assert_eq!(proposals.begin(&site("liar"), MigrationId(2000)), Begun::Look);
    }

    #[test]
    fn a_proposal_that_is_repeated_after_its_acceptance_is_not_looked_at_again() {
        let mut proposals = Proposals::default();
        assert_eq!(proposals.begin(&site("a"), MigrationId(1)), Begun::Look);
        proposals.end(&site("a"), MigrationId(1), Some(proposal()));
        assert_eq!(proposals.begin(&site("a"), MigrationId(1)), Begun::Accepted);
        assert!(proposals.take(&site("a"), MigrationId(1)).is_some());
    }

    #[test]
    fn accepted_proposals_crowd_out_only_the_oldest_of_their_own_peer() {
        let mut proposals = Proposals::default();
        proposals.end(&site("a"), MigrationId(1), Some(proposal()));
        for id in 0..=MAX_ACCEPTED as u128 {
            proposals.end(&site("liar"), MigrationId(id), Some(proposal()));
        }
        assert!(proposals.take(&site("liar"), MigrationId(0)).is_none());
        assert!(proposals.take(&site("liar"), MigrationId(MAX_ACCEPTED as u128)).is_some());
        assert!(proposals.take(&site("a"), MigrationId(1)).is_some());
    }

    #[test]
    fn another_peer_neither_gets_nor_removes_an_accepted_proposal() {
        let mut proposals = Proposals::default();
        proposals.end(&site("a"), MigrationId(1), Some(proposal()));
        assert!(proposals.take(&site("liar"), MigrationId(1)).is_none());
        proposals.end(&site("liar"), MigrationId(1), Some(proposal()));
        assert!(proposals.take(&site("liar"), MigrationId(1)).is_some());
        assert!(proposals.take(&site("a"), MigrationId(1)).is_some());
        assert!(proposals.take(&site("a"), MigrationId(1)).is_none(), "a reservation is made once");
    }
}
