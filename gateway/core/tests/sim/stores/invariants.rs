//! What must hold while the machine moves and between its moves. Each by its name.

use longhaul_core::memory::PAGE_BYTES;

use super::attempt::Attempt;
use super::guest::PAGES;
use super::memory::whole_bytes;
use super::world::World;
use crate::invariants::Violation;

/// What a page costs in a stream beside what it holds, in bytes, at most.
const RECORD: u64 = 100;

impl World {
    /// Violates `invariant` unless `holds`; a test of one invariant asks for no other.
    pub fn must(
        &self,
        invariant: &'static str,
        holds: bool,
        detail: impl FnOnce() -> String,
    ) -> Result<(), Violation> {
        if holds || self.only.is_some_and(|only| only != invariant) {
            return Ok(());
        }
        Err(Violation::new(invariant, detail()))
    }

    /// After everything that happens in an attempt.
    pub fn check(&self, attempt: &Attempt) -> Result<(), Violation> {
        let Attempt { memory, terms, holds, .. } = attempt;
        let differs = || format!("what came out differs before byte {}", memory.made);
        // Each batch is proven before any of it comes out, also where something came otherwise than it was sent.
        self.must("memory_arrives", !memory.differs, differs)?;
        if attempt.is_hurt {
            return Ok(());
        }
        self.must("no_page_from_an_unacknowledged_base", !memory.differs, differs)?;
        let Some(begun) = memory.begun else { return Ok(()) };
        let is_based = begun.based_on.is_some();
        let is_named = begun.based_on == terms.named && begun.based_on == *holds;
        self.must("no_page_from_an_unacknowledged_base", is_named || !is_based, || {
            format!("{begun:?}, {terms:?}, the destination has {holds:?}")
        })?;
        self.must("a_way_back_costs_what_changed", is_based || !attempt.must_be_based, || {
            format!("attempt {} begins with nothing, and both sites kept the same", attempt.number)
        })
    }

    /// The destination has proven all of it.
    pub fn check_arrival(&self, attempt: &Attempt) -> Result<(), Violation> {
        let memory = &attempt.memory;
        let is_whole = !memory.differs && memory.made == memory.stream.bytes.len();
        self.must("memory_arrives", is_whole, || {
            format!("{} bytes of {} came", memory.made, memory.stream.bytes.len())
        })?;
        self.must("disk_arrives", attempt.disk.target_disk == self.guest.image(), || {
            format!("attempt {}: the disk is another one", attempt.number)
        })?;
        self.check_costs(attempt)
    }

    /// Where neither site forgot a page of the machine, nothing is sent again.
    fn check_costs(&self, attempt: &Attempt) -> Result<(), Violation> {
        let has_room = attempt.terms.agreed_pages as usize >= PAGES;
        let Some(kept) = self.expected.filter(|kept| kept.is_whole && has_room) else { return Ok(()) };
        if !attempt.must_be_based || attempt.is_hurt {
            return Ok(());
        }
        let (sent, whole) = (attempt.memory.sent_bytes, whole_bytes(&attempt.memory.stream.bytes));
        let changed = (self.guest.writes - kept.writes) * (PAGE_BYTES as u64 + RECORD);
        self.must("a_way_back_costs_what_changed", sent < whole / 10 + changed, || {
            format!("{sent} bytes, {whole} without what both kept; {changed} for what changed")
        })
    }

    /// What both ends of a move have kept of it is the same.
    pub fn check_files(&self) -> Result<(), Violation> {
        let kept =
            |at: usize| self.sites[at].memory.as_ref().filter(|kept| kept.of.is_some() && !kept.rotten);
        for (ours, theirs) in [(0, 1), (0, 2), (1, 2)] {
            if theirs >= self.sites.len() {
                continue;
            }
            let (Some(ours), Some(theirs)) = (kept(ours), kept(theirs)) else { continue };
            self.must("stores_identical", ours.of != theirs.of || ours == theirs, || {
                format!("{} pages of attempt {:?}, and {}", ours.pages.len(), ours.of, theirs.pages.len())
            })?;
        }
        Ok(())
    }
}
