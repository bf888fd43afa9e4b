//! `longhaul resolve`: an operator decides for a peer that is gone for good, and what a peer hears that comes back.
//!
//! What may be decided is the core's; that the peer cannot be asked is looked at here.

use longhaul_core::ids::{MigrationId, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::resolve::{CannotResolve, resolution};
use longhaul_core::migration::step::Step;

use super::Daemon;
use crate::api::RequestError;
use crate::api::types::ResolveRequest;
use crate::migration::{Inbound, chain};

impl Daemon {
    /// Decides a move that waits for a peer's word.
    pub(super) async fn resolve(&self, vm: &VmName, request: &ResolveRequest) -> Result<(), RequestError> {
        let nothing = || RequestError::Conflict(CannotResolve::NothingWaits(vm.clone()).to_string());
        // Not one that has ended for this site and still has to tell the other.
        let running = self.migration_of(vm).ok_or_else(nothing)?;
        let (attempt, inbox) = (&running.attempt, running.inbox.as_ref().ok_or_else(nothing)?);
        let reached = self.edges.peer(&attempt.peer).is_some_and(|peer| peer.is_up());
        let entries =
            self.edges.journal.entries(attempt.id).map_err(|error| RequestError::Failed(chain(&error)))?;
        let last = &entries.last().ok_or_else(nothing)?.record;
        let resolution =
            resolution(last, request.keep, request.destroyed.as_ref(), vm, &attempt.peer, reached)
                .map_err(|why| RequestError::Conflict(why.to_string()))?;
        tracing::warn!(%vm, peer = %attempt.peer, keep = ?request.keep, "an operator decides for the other site");
        inbox.send(Inbound::Resolve(resolution)).await.map_err(|_| nothing())
    }

    /// Tells a peer that came back what an operator took back from it.
    pub(super) fn tell_taken_back(&self, peer: &SiteName) {
        for history in self.edges.journal.histories().unwrap_or_default() {
            let last = history.entries.last().map(|entry| &entry.record);
            let taken = matches!(last, Some(Record::Source(SourceRecord::TakenBack { .. })));
            if taken && history.attempt.peer == *peer {
                let message = MigrationMessage::TakenBack { epoch: history.attempt.epoch.next() };
                self.edges.send(peer, history.attempt.id, &message);
            }
        }
    }

    /// The source says that an operator took a machine back while this site was gone.
    pub(super) async fn on_taken_back(&mut self, id: MigrationId, peer: &SiteName) {
        let histories = self.edges.journal.histories().unwrap_or_default();
        let Some(history) = histories.into_iter().find(|history| history.attempt.id == id) else { return };
        let attempt = history.attempt;
        let last = history.entries.last().map(|entry| &entry.record);
        let activated = matches!(
            last,
            Some(Record::Destination(
                DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }
            ))
        );
        let still = self.edges.journal.ownership(&attempt.vm).unwrap_or_default();
        if !activated || attempt.peer != *peer || still != Some(Ownership::Here { epoch: attempt.epoch }) {
            return;
        }
        if self.machines.get(&attempt.vm).is_some_and(super::Machine::has_qemu) {
            tracing::error!(vm = %attempt.vm, %peer, "an operator took the machine back at the other site, and it runs here too: end one of the two copies at once");
            return;
        }
        self.overrule(&attempt).await;
    }

    async fn overrule(&mut self, attempt: &Attempt) {
        let record = Record::Destination(DestinationRecord::Overruled);
        match self.edges.journal.commit(attempt, Step::record(record, vec![()])).await {
            Ok(_) => {
                tracing::warn!(vm = %attempt.vm, peer = %attempt.peer, "an operator took the machine back at the other site; it does not start here any more");
                self.refresh(&attempt.vm, None).await;
            }
            Err(error) => {
                tracing::error!(vm = %attempt.vm, error = chain(&error), "journal cannot be written")
            }
        }
    }
}
