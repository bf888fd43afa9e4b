//! The right to run a guest, as a value: without one nothing resumes a machine.
//!
//! It cannot be copied or made out of nothing. Whoever resumes a guest gives the permit away.

/// The right to run one machine at this site.
#[derive(Debug)]
pub struct RunPermit(());

impl RunPermit {
    /// Stands in for the reasons that the stage machines will give; only tests may call it.
    #[doc(hidden)]
    pub fn for_lead_to_replace() -> Self {
        Self(())
    }
}
