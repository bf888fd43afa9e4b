//! A journal that is older than the world, noticed: what stands beside each disk, and whether the ledger is
//! behind it.
//!
//! A journal that was restored from a backup believes that the machine of then is still here. The note
//! beside its disk was written when the machine came or left, and is not part of that backup. Where the two
//! disagree, nothing is started: this site does not know what has happened since. The files are not read here.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, SiteName, VmName};
use crate::migration::ledger::Ownership;

/// Whose a disk's content is, as the note beside it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// The machine.
    pub vm: VmName,
    /// The epoch in which this was written.
    pub epoch: Epoch,
    /// The site that owned the machine then.
    pub owner: SiteName,
}

/// A journal or a disk that is not of now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    /// The ledger is behind the note.
    #[error(
        "Machine {vm} is held: the journal knows it in epoch {known}, and the note beside its disk says that site {} \
         has owned it since epoch {}", .found.owner, .found.epoch
    )]
    Ledger {
        /// The machine.
        vm: VmName,
        /// What the ledger says.
        known: Epoch,
        /// What the note says.
        found: Generation,
    },
    /// The disk belongs to a machine of another site, or of a later epoch than is known here.
    #[error(
        "The note beside this disk says that it is machine {}'s, which site {} has owned since epoch {}",
        .0.vm, .0.owner, .0.epoch
    )]
    Disk(Generation),
}

impl Stale {
    /// What an operator can do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::Ledger { vm, found, .. } => format!(
                "put the newest journal back; or, if {vm} runs at site {}, forget it here (`longhaul vm undefine {vm} \
                 --forget`); or, if this is the newest copy there is, remove the .generation files of its disks",
                found.owner
            ),
            Self::Disk(found) => format!(
                "use it at site {}; or, if this is the newest copy there is, remove its .generation file first",
                found.owner
            ),
        }
    }
}

/// Whether the ledger is behind a note: then no permit is given for the machine.
///
/// A note of the same epoch is not newer, whatever owner it names: a machine that was refused comes back
/// in the epoch in which it left, and its note may be written after a crash only.
pub fn behind(ledger: &Ownership, vm: &VmName, notes: &[Generation]) -> Result<(), Stale> {
    let newest = notes.iter().filter(|note| note.vm == *vm).max_by_key(|note| note.epoch);
    match newest {
        Some(found) if found.epoch > ledger.epoch() => {
            Err(Stale::Ledger { vm: vm.clone(), known: ledger.epoch(), found: found.clone() })
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether a machine that was to come in `epoch` came and ran at `site`, whatever the journal says: its note is
/// written after `Activated` only.
pub fn has_come(vm: &VmName, epoch: Epoch, site: &SiteName, notes: &[Generation]) -> bool {
    notes.iter().any(|note| note.vm == *vm && note.owner == *site && note.epoch >= epoch)
}

/// Whether a disk may be given to a machine that begins in `first` at `site`.
pub fn may_define(note: &Generation, vm: &VmName, first: Epoch, site: &SiteName) -> Result<(), Stale> {
    let elsewhere = note.owner != *site;
    let later = note.vm == *vm && note.epoch > first;
    if elsewhere || later { Err(Stale::Disk(note.clone())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(epoch: u64, owner: &str) -> Generation {
        Generation { vm: vm(), epoch: Epoch(epoch), owner: owner.parse().unwrap() }
    }

    fn vm() -> VmName {
        "web1".parse().unwrap()
    }

    #[test]
    fn a_ledger_behind_the_note_holds_and_says_where_the_machine_went() {
        let old = Ownership::Here { epoch: Epoch(4) };
        let stale = behind(&old, &vm(), &[note(3, "a"), note(5, "b")]).unwrap_err().to_string();
        assert!(stale.contains("site b") && stale.contains("epoch 5"), "{stale}");
    }

    #[test]
    fn a_ledger_that_knows_as_much_as_the_note_does_not_hold() {
        let returned = Ownership::Here { epoch: Epoch(5) };
        assert_eq!(behind(&returned, &vm(), &[note(5, "b")]), Ok(()));
        assert_eq!(behind(&returned, &vm(), &[note(4, "a")]), Ok(()));
        assert_eq!(behind(&returned, &vm(), &[]), Ok(()));
        let cloned = Generation { vm: "web2".parse().unwrap(), ..note(9, "b") };
        assert_eq!(behind(&returned, &vm(), &[cloned]), Ok(()), "another machine's disk");
    }

    #[test]
    fn only_a_note_of_this_site_and_of_that_epoch_or_later_says_that_a_machine_has_come() {
        let here: SiteName = "b".parse().unwrap();
        assert!(has_come(&vm(), Epoch(5), &here, &[note(5, "b")]));
        assert!(!has_come(&vm(), Epoch(5), &here, &[note(4, "b")]), "of an earlier stay");
        assert!(!has_come(&vm(), Epoch(5), &here, &[note(5, "a")]));
        assert!(!has_come(&"web2".parse().unwrap(), Epoch(5), &here, &[note(5, "b")]));
        assert!(!has_come(&vm(), Epoch(5), &here, &[]));
    }

    #[test]
    fn a_disk_of_another_site_or_a_later_epoch_is_not_defined() {
        let here: SiteName = "a".parse().unwrap();
        assert!(may_define(&note(5, "b"), &vm(), Epoch(9), &here).is_err());
        assert!(may_define(&note(5, "a"), &vm(), Epoch(4), &here).is_err());
        assert!(may_define(&note(5, "a"), &vm(), Epoch(5), &here).is_ok());
        assert!(may_define(&note(5, "a"), &"copy".parse().unwrap(), Epoch(0), &here).is_ok());
    }
}
