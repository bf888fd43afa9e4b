//! What a machine answers to an event: at most one record, and the actions that follow from it.
//!
//! The actions of a step are performed only after its record is durable. [`Step`] keeps them out of
//! reach until [`Step::after_record`] is called by the journal.

use crate::migration::record::Record;

/// The outcome of one event.
#[derive(Debug)]
#[must_use = "a step that is dropped loses a decision"]
pub struct Step<A> {
    record: Option<Record>,
    actions: Vec<A>,
}

impl<A> Step<A> {
    /// Nothing to write, nothing to do.
    pub fn nothing() -> Self {
        Self { record: None, actions: Vec::new() }
    }

    /// Actions that follow from what is durable already.
    pub fn act(actions: Vec<A>) -> Self {
        Self { record: None, actions }
    }

    /// Actions that follow from a record that must be durable first.
    pub fn record(record: Record, actions: Vec<A>) -> Self {
        Self { record: Some(record), actions }
    }

    /// The same without the actions that `unneeded` names.
    pub(super) fn without(mut self, unneeded: impl Fn(&A) -> bool) -> Self {
        self.actions.retain(|action| !unneeded(action));
        self
    }

    /// The record that must be durable before the actions are taken out.
    pub fn pending_record(&self) -> Option<&Record> {
        self.record.as_ref()
    }

    /// The actions. The caller states that the pending record, if any, is durable.
    pub fn after_record(self) -> Vec<A> {
        self.actions
    }
}
