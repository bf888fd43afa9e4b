//! The right to run a machine, as a type.
//!
//! A [`RunPermit`] has no public constructor, is neither `Clone` nor `Copy`, and is what a hypervisor
//! asks for before it lets a guest run. It is made in three places only: by the source machine while
//! neither `Committed` nor `Offered` was ever written (or on a durable refusal, or when the arbiter's register
//! gives it the epoch), by the destination machine in the step that records `Activated`, and by the
//! ledger for a machine that this site owns. In both machines an operator's word can stand in for that of a
//! peer that is gone for good: a `Resolution`, which `resolve` alone makes. Reviewing those is reviewing the
//! product's promise.

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

    /// The machine that may run.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    /// The epoch under which it may run.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}
