//! Machines that this site owns by what stands beside their disks, and that its journal does not know: it was put
//! back to an older state.
//!
//! Nothing is done about them: whether one runs here, ran here or was moved on since, only the newer journal says.
//! Nothing is ended or started either.

use std::path::PathBuf;

use longhaul_core::migration::generation::Generation;
use longhaul_core::migration::ledger::Ownership;

use super::machines::Held;
use crate::generation::notes_in;
use crate::journal::{Journal, JournalError};
use crate::migration::Edges;

/// A disk in the pool whose machine the journal has lost.
#[derive(Debug)]
pub(super) struct Unknown {
    pub image: PathBuf,
    pub note: Generation,
}

/// Those there are now.
pub(super) fn unknown(edges: &Edges) -> Result<Vec<Unknown>, JournalError> {
    let mut unknown = Vec::new();
    for (image, note) in notes_in(&edges.config.storage.pool) {
        if note.owner == *edges.site() && is_unknown(&edges.journal, &note)? {
            unknown.push(Unknown { image, note });
        }
    }
    Ok(unknown)
}

impl Unknown {
    /// What an operator is told.
    pub(super) fn held(&self) -> Held {
        let (vm, image) = (&self.note.vm, self.image.display());
        Held {
            why: format!(
                "the note beside {image} says that this site has owned {vm} since epoch {}, and the journal does not \
                 know it: it is older than that",
                self.note.epoch
            ),
            remedy: format!(
                "put the newest journal back; or, if this is the newest copy of {vm} and none runs elsewhere, remove \
                 {image}.generation and adopt or define {vm}"
            ),
        }
    }
}

/// One that was forgotten on purpose left its epoch. One that is known from an earlier stay is not known.
fn is_unknown(journal: &Journal, note: &Generation) -> Result<bool, JournalError> {
    let owner = journal.ownership(&note.vm)?;
    let known = match &owner {
        Some(owner @ (Ownership::Here { .. } | Ownership::Away { .. } | Ownership::Offered { .. })) => {
            owner.epoch() >= note.epoch
        }
        Some(Ownership::Arriving { .. }) | None => false,
    };
    Ok(!known && journal.forgotten_epoch(&note.vm)? < note.epoch)
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;

    use super::*;

    #[test]
    fn a_machine_that_no_journal_knows_is_found_and_one_that_was_forgotten_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.redb")).unwrap();
        let note = Generation { vm: "web1".parse().unwrap(), epoch: Epoch(2), owner: "b".parse().unwrap() };
        assert!(is_unknown(&journal, &note).unwrap());
        journal.define(&note.vm, &Ownership::Arriving { epoch: Epoch(2) }).unwrap();
        assert!(is_unknown(&journal, &note).unwrap(), "the records end before it had come");
        journal.define(&note.vm, &Ownership::Here { epoch: Epoch(2) }).unwrap();
        assert!(!is_unknown(&journal, &note).unwrap());
        journal.define(&note.vm, &Ownership::Away { site: "a".parse().unwrap(), epoch: Epoch(1) }).unwrap();
        assert!(is_unknown(&journal, &note).unwrap(), "it has come back since this journal was copied");
        journal.define(&note.vm, &Ownership::Here { epoch: Epoch(2) }).unwrap();
        journal.remove_machine(&note.vm).unwrap();
        assert!(!is_unknown(&journal, &note).unwrap(), "forgotten on purpose");
    }
}
