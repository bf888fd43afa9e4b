//! One migration, decided: stages 0 to 5 as two journaled state machines, one at each side.
//!
//! ```text
//!  source                                            destination
//!  ------                                            -----------
//!  Preflight                                         (no machine)
//!    | Propose ------------------------------------> policy, capabilities
//!  Proposed  <------------------------------ Accept
//!    | [Reserved]  Reserve ------------------------> [Reserved]
//!  Reserving                                         Preparing
//!    |        <------------------------------ Reserved
//!  PreCopy [PreCopy]   disks, then memory =========> Receiving
//!    | the pause: hold, stop, last bytes, barriers
//!  Parked [Parked]                                   |  barriers proven, QEMU says loaded
//!    |        <------------------------------ Loaded [Loaded]
//!  Committed [Committed]  Commit ------------------> [Activated]
//!    |                                               Activating: rules, resume, announce
//!    |        <--------------------------- Activated Active
//!  Released [Released]
//! ```
//!
//! A word in brackets is a record: it is durable before any action that follows from it is performed.
//!
//! **The safety argument.** Before `Committed` is durable the source owns the machine; after, the
//! destination does. The source makes a [`RunPermit`](permit::RunPermit) only in a state from which
//! `Committed` was never written, or on a durable refusal of the same epoch by a peer that had
//! reserved. The destination makes one only in the step whose record is `Activated`, and `Activated`
//! and `Refused` are both terminal in its table, so one journal can never hold the two. *Unknown is
//! not Refused*: a peer that has no record answers `Unknown`, which changes nothing. No deadline
//! makes a permit after `Committed`.
//!
//! **Pipelined** the source commits right behind the last byte, so that no round trip is in the pause. The Commit lies at
//! the destination until the machine is loaded, and then is what it waits for: it activates without saying Loaded, unless it was
//! loaded before the Commit came. The argument is the same; what changes is what a cut costs. Behind its Commit a source whose gateway died, which has lost what
//! was still on its way, whose budget is over, or whose operator wants it back (`source/pipelined.rs`) asks a destination that
//! says that it still receives to refuse:
//!
//! ```text
//!  Committed [Committed]  Commit ------------------> Receiving, the Commit lies
//!    | it asks                                          |  loaded: [Activated]
//!    |        <------------------------------ Reserved  Receiving still
//!    |                        Abort ---------------->   |
//!    |        <------------------------------- Refused  [Refused]   or, if it was loaded by then, Activated
//!  Returned [Returned]
//! ```
//!
//! **With an arbiter** the source does not commit but offers, and the destination wins the register's epoch
//! before it owns the machine. Whoever is in doubt asks the register, so that in a cut of the WAN nobody waits
//! for the other side:
//!
//! ```text
//!  Offered [Offered]  Offer -----------------------> Claiming [Claiming]   compare-and-swap: for itself
//!    | in doubt, and the register answers:              |  won
//!    | Reclaiming [Reclaiming], compare-and-swap        Owned [Owned]      the loaded QEMU still stands
//!    | in doubt, and it does not: Promised [Promised]   |  [Activated]
//!    |   the register is the destination's              Activating, then Settling until the register says so
//!  Committed [Committed]                                |
//!    |   or it is the source's, or refused              `- QEMU was lost: HandingBack [HandedBack]
//!  Returned [Returned], then [Settled] once the register says so
//! ```
//!
//! A source that has asked for itself never promises, a destination that has claimed never refuses before it
//! has read that it lost. The model (`tests/model/arbiter.rs`) has the same table.
//!
//! Nothing here measures time or talks to anybody; the gateway's driver feeds events and performs
//! the actions.

pub mod arbiter;
pub mod convergence;
pub mod destination;
pub mod disk_pace;
pub mod generation;
pub mod lag;
pub mod late;
pub mod ledger;
pub mod message;
pub mod permit;
pub mod record;
pub mod recovery;
pub mod resolve;
pub mod retry;
pub mod source;
pub mod spread;
pub mod step;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::{Epoch, MigrationId, SiteName, VmName};

/// What one migration attempts: who, with whom, and the epoch that would begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Drawn by the source.
    pub id: MigrationId,
    /// The machine.
    pub vm: VmName,
    /// The site at the other side.
    pub peer: SiteName,
    /// The epoch that begins at the destination if the machine is handed over.
    pub epoch: Epoch,
    /// How it is handed over. The last field: attempts of before it was kept end here and are confirmed.
    #[serde(deserialize_with = "confirmed_where_it_ends")]
    pub commit: CommitMode,
}

fn confirmed_where_it_ends<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CommitMode, D::Error> {
    Ok(CommitMode::deserialize(deserializer).unwrap_or_default())
}

/// The stages of Clark 2005, as users see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// 0: nothing has moved; capabilities, names and policy are checked.
    PreMigration,
    /// 1: the destination holds memory, disk and an address for the machine.
    Reservation,
    /// 2: disks, then rounds of memory, while the guest runs.
    PreCopy,
    /// 3: the guest stands still while the rest travels.
    StopAndCopy,
    /// 4: the machine changes its owner.
    Commitment,
    /// 5: the destination runs it; connections and names follow.
    Activation,
}

impl Stage {
    /// The stage's number in the paper.
    pub fn number(self) -> u8 {
        match self {
            Self::PreMigration => 0,
            Self::Reservation => 1,
            Self::PreCopy => 2,
            Self::StopAndCopy => 3,
            Self::Commitment => 4,
            Self::Activation => 5,
        }
    }

    /// The stage's name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreMigration => "pre-migration",
            Self::Reservation => "reservation",
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Commitment => "commitment",
            Self::Activation => "activation",
        }
    }
}

/// How the machine is handed over. Decides what a cut of the WAN costs, not whether it is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum CommitMode {
    /// The source commits after the destination has said Loaded: one round trip more of pause.
    #[default]
    Confirmed,
    /// The source offers after Loaded, and the destination wins a compare-and-swap at an arbiter before it
    /// runs: that round trip more of pause, and in a cut neither side waits for the other.
    Arbitrated(arbiter::Arbiter),
    /// The source commits as soon as everything is on its way. A cut, or the end of the source's gateway, while the rest
    /// travels leaves the machine standing until the gateways reach each other again.
    Pipelined,
}

impl CommitMode {
    /// Whose register decides in doubt.
    pub fn arbiter(self) -> Option<arbiter::Arbiter> {
        match self {
            Self::Confirmed | Self::Pipelined => None,
            Self::Arbitrated(arbiter) => Some(arbiter),
        }
    }

    /// A register decides in doubt.
    pub fn is_arbitrated(self) -> bool {
        self.arbiter().is_some()
    }

    /// How often the pause goes from one site to the other, whatever is copied: the last byte, and Loaded and Commit behind
    /// it where the source waits for that.
    pub fn ways_in_pause(self) -> u32 {
        match self {
            Self::Confirmed | Self::Arbitrated(_) => 3,
            Self::Pipelined => 1,
        }
    }
}
