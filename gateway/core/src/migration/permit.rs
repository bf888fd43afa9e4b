//! The right to run a machine, as a type.
//!
//! A [`RunPermit`] has no public constructor, is neither `Clone` nor `Copy`, and is what a hypervisor
//! asks for before it lets a guest run. It is made in these places only: by the source machine while
//! neither `Committed` nor `Offered` was ever written (or on a durable refusal, or when the arbiter's register
//! gives it the epoch), by the destination machine in the step that records `Activated`, and by the
//! ledger for a machine that this site owns, and for a source whose journal fails before it has given the
//! machine away. In both machines an operator's word can stand in for that of a
//! peer that is gone for good: a `Resolution`, which `resolve` alone makes. Reviewing those is reviewing the
//! product's promise.

use super::Attempt;
use super::record::SourceRecord;
use crate::ids::{Epoch, VmName};

/// The right to let one guest run once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a permit that is dropped leaves the machine stopped"]
pub struct RunPermit {
    vm: VmName,
    epoch: Epoch,
}

impl RunPermit {
    /// The caller states, by calling, that its own table allows it: see the module's text.
    pub(super) fn grant(vm: VmName, epoch: Epoch) -> Self {
        Self { vm, epoch }
    }

    /// For the source's guest when the journal did not take `failed`, if the machine cannot have been given away
    /// by then. `Committed` or `Offered` may be durable although the journal says that it failed, and what follows
    /// them proves that they were written: there is no permit then.
    pub fn not_given_away(attempt: &Attempt, failed: &SourceRecord) -> Option<Self> {
        match failed {
            SourceRecord::Reserved { .. }
            | SourceRecord::PreCopy { .. }
            | SourceRecord::Parked
            | SourceRecord::Aborted { .. } => Some(Self::grant(attempt.vm.clone(), attempt.epoch)),
            SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. }
            | SourceRecord::Committed { .. }
            | SourceRecord::Released
            | SourceRecord::Returned { .. }
            | SourceRecord::Settled
            | SourceRecord::TakenBack { .. } => None,
        }
    }

    /// The machine that may run.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    /// The epoch under which it may run.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::MigrationId;
    use crate::migration::CommitMode;
    use crate::migration::message::{Handover, Refusal};

    #[test]
    fn a_record_that_failed_leaves_a_permit_only_if_nothing_can_have_been_given_away() {
        let attempt = Attempt {
            id: MigrationId(1),
            vm: "web1".parse().unwrap(),
            peer: "b".parse().unwrap(),
            epoch: Epoch(1),
            commit: CommitMode::Confirmed,
        };
        let permit = |record: SourceRecord| RunPermit::not_given_away(&attempt, &record).is_some();
        assert!(permit(SourceRecord::Parked));
        assert!(permit(SourceRecord::Aborted { why: Refusal::Operator }));
        assert!(!permit(SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) }));
        assert!(!permit(SourceRecord::Returned { why: Refusal::Operator }));
        assert!(!permit(SourceRecord::Offered { handover: Box::new(Handover { nics: Vec::new() }) }));
        assert!(!permit(SourceRecord::Released));
    }
}
