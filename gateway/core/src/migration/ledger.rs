//! Which machines this site owns, folded from the records.
//!
//! The ledger is written in the same transaction as the record that changes it, so the two cannot
//! disagree. It is what a start gate asks: a machine that was committed to another site is not
//! started here again, whatever disk is still lying around.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, SiteName, VmName};
use crate::migration::generation::{self, Generation, Stale};
use crate::migration::permit::RunPermit;
use crate::migration::record::{DestinationRecord, Record, SourceRecord};

/// Where one machine stands, as far as this site knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ownership {
    /// Ours.
    Here {
        /// Since this hand-over; 0 for a machine that was defined here.
        epoch: Epoch,
    },
    /// Somebody else's: it left in this epoch.
    Away {
        /// The site it was committed to.
        site: SiteName,
        /// The epoch that began there.
        epoch: Epoch,
    },
    /// On its way to us, not ours.
    Arriving {
        /// The epoch that would begin here.
        epoch: Epoch,
    },
    /// Offered: ours or the other site's, as the arbiter's register says.
    Offered {
        /// The site it was offered to.
        site: SiteName,
        /// The epoch that begins, here or there.
        epoch: Epoch,
    },
}

impl Ownership {
    /// The epoch known here.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Here { epoch }
            | Self::Away { epoch, .. }
            | Self::Arriving { epoch }
            | Self::Offered { epoch, .. } => *epoch,
        }
    }

    /// What the ownership is after `record` of the migration that creates `epoch` with `peer`;
    /// `None` where the machine is no longer known here.
    pub fn after(before: Option<&Self>, record: &Record, epoch: Epoch, peer: &SiteName) -> Option<Self> {
        match record {
            Record::Source(SourceRecord::Committed { .. } | SourceRecord::Promised { .. }) => {
                Some(Self::Away { site: peer.clone(), epoch })
            }
            Record::Source(SourceRecord::Offered { .. } | SourceRecord::Reclaiming { .. }) => {
                Some(Self::Offered { site: peer.clone(), epoch })
            }
            Record::Source(SourceRecord::Returned { .. }) => Some(Self::Here { epoch }),
            Record::Source(SourceRecord::TakenBack { .. }) => Some(Self::Here { epoch: epoch.next() }),
            Record::Source(
                SourceRecord::Reserved { .. }
                | SourceRecord::PreCopy { .. }
                | SourceRecord::Parked
                | SourceRecord::Released
                | SourceRecord::Aborted { .. }
                | SourceRecord::Settled,
            ) => before.cloned(),
            Record::Destination(
                DestinationRecord::Reserved { .. }
                | DestinationRecord::Loaded
                | DestinationRecord::Claiming { .. }
                | DestinationRecord::Owned { .. },
            ) => match before {
                Some(away @ (Self::Away { .. } | Self::Offered { .. })) => Some(away.clone()),
                Some(Self::Here { .. } | Self::Arriving { .. }) | None => Some(Self::Arriving { epoch }),
            },
            Record::Destination(
                DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. },
            ) => Some(Self::Here { epoch }),
            Record::Destination(DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }) => {
                match before {
                    Some(Self::Arriving { .. }) | None => None,
                    Some(other @ (Self::Here { .. } | Self::Away { .. } | Self::Offered { .. })) => {
                        Some(other.clone())
                    }
                }
            }
            Record::Destination(DestinationRecord::Overruled) => {
                Some(Self::Away { site: peer.clone(), epoch: epoch.next() })
            }
        }
    }

    /// Whether a restarted gateway may still undo an attempt that it gave up and that would have begun
    /// `epoch`.
    ///
    /// A retry has the same epoch as the attempt before it, so the epoch alone does not tell whether
    /// the machine has left since: only a machine that is here is resumed.
    pub fn may_undo(&self, attempt: Epoch) -> bool {
        match self {
            Self::Here { epoch } => *epoch <= attempt,
            Self::Away { .. } | Self::Arriving { .. } | Self::Offered { .. } => false,
        }
    }

    /// The permit to start a machine that this site owns and that is not in a migration.
    ///
    /// The caller gives the last source record of an unfinished migration, if there is one: a machine
    /// that was stopped for the hand-over is resumed by its own migration only. `notes` are what stands
    /// beside its disks: a ledger that is behind them gives none.
    pub fn permit(
        &self,
        vm: &VmName,
        unfinished: Option<&SourceRecord>,
        notes: &[Generation],
    ) -> Result<RunPermit, MayNotRun> {
        generation::behind(self, vm, notes).map_err(|stale| MayNotRun::Stale { stale })?;
        match (self, unfinished) {
            (Self::Here { epoch }, None) => Ok(RunPermit::grant(vm.clone(), *epoch)),
            (Self::Here { .. }, Some(_)) => Err(MayNotRun::Moving(vm.clone())),
            (Self::Away { site, epoch }, _) => {
                Err(MayNotRun::Away { vm: vm.clone(), site: site.clone(), epoch: *epoch })
            }
            (Self::Arriving { .. } | Self::Offered { .. }, _) => Err(MayNotRun::Moving(vm.clone())),
        }
    }
}

/// Why a machine may not be started here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MayNotRun {
    /// It left.
    #[error("Machine {vm} left for site {site} in epoch {epoch}; start or move it there")]
    Away {
        /// The machine.
        vm: VmName,
        /// Its owner.
        site: SiteName,
        /// Since when.
        epoch: Epoch,
    },
    /// The journal is older than a disk of it.
    #[error("{stale}; {}", .stale.remedy())]
    Stale {
        /// How much older.
        stale: Stale,
    },
    /// It is being moved.
    #[error("Machine {0} is being moved; wait for the migration or abort it")]
    Moving(VmName),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_behind_a_note_gives_no_permit() {
        let vm: VmName = "web1".parse().unwrap();
        let here = Ownership::Here { epoch: Epoch(4) };
        let note = Generation { vm: vm.clone(), epoch: Epoch(5), owner: "b".parse().unwrap() };
        assert!(here.permit(&vm, None, &[]).is_ok());
        let refused = here.permit(&vm, None, &[note]).unwrap_err().to_string();
        assert!(refused.contains("site b") && refused.contains("undefine"), "{refused}");
    }

    #[test]
    fn an_attempt_given_up_is_not_undone_where_a_retry_of_its_epoch_has_left() {
        let here = Ownership::Here { epoch: Epoch(4) };
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        assert!(here.may_undo(Epoch(5)));
        assert!(!away.may_undo(Epoch(5)), "the copy at the other site would run too");
        assert!(!Ownership::Here { epoch: Epoch(6) }.may_undo(Epoch(5)), "it came back since");
    }
}
