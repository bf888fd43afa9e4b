//! What the journal holds of a migration, and the order in which it may come.
//!
//! A record says what was decided, never what was done: after a crash the fold of the records tells
//! which actions are owed again. Records of one migration form a path through the table below;
//! anything else is a damaged journal and is refused. `Parked` is left out when the destination has
//! said `Loaded` before the source was done parking. Pipelined it is written when the guest is being stopped, and `Loaded` is
//! left out if the Commit was there first.
//!
//! ```text
//! source:       Reserved -> PreCopy -> [Parked] -> Committed -> Released
//!                   \          \          \            \-> Returned
//!                    `----------`----------`-> Aborted   `-> TakenBack
//! destination:  Reserved -> [Loaded] -> Activated -------> Overruled
//!                   \          \   \-> TakenOver ---------^
//!                    `-> Refused `-> Refused
//! with an arbiter:
//! source:       ... [Parked] -> Offered -> [Reclaiming | Promised] -> Committed -> Released
//!                                   `-----------------`-------------------`-> Returned -> Settled
//! destination:  Reserved -> Loaded -> [Claiming] -> Owned -> Activated
//!                                \         \           `-> HandedBack
//!                                 `---------`-> Refused
//! ```
//!
//! `TakenBack` and `TakenOver` are an operator's word for a peer that is gone for good; `Overruled` is written by one
//! that comes back nevertheless.

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::{Epoch, SiteName, VmName};
use crate::migration::message::{Handover, Proposal, Refusal, Reservation};

/// One durable decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record {
    /// Decided at the site the machine leaves.
    Source(SourceRecord),
    /// Decided at the site the machine comes to.
    Destination(DestinationRecord),
}

/// Decisions of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceRecord {
    /// The destination is about to hold things for us.
    Reserved {
        /// The destination.
        peer: SiteName,
        /// What was proposed.
        proposal: Box<Proposal>,
        /// The operator said that the machine's name is not to follow. The last field of the last field of an
        /// entry: records of before it was kept end here, and are read as `false`.
        #[serde(deserialize_with = "false_where_it_ends")]
        without_names: bool,
    },
    /// The copy begins.
    PreCopy {
        /// What the destination holds.
        reservation: Reservation,
    },
    /// The guest was stopped and everything was sent.
    Parked,
    /// The machine is the destination's.
    Committed {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// The destination runs it; the copy here is no longer anybody's machine.
    Released,
    /// Given up before `Committed`: the machine stays.
    Aborted {
        /// Why.
        why: Refusal,
    },
    /// Durably refused by the destination after `Committed` or `Offered`, or won at the arbiter: the machine came
    /// back.
    Returned {
        /// Why.
        why: Refusal,
    },
    /// An operator took it back after `Committed`; a new epoch begins.
    TakenBack {
        /// The site whose copy is destroyed, as the operator said.
        destroyed: SiteName,
    },
    /// The machine is whose the register says: nobody's word alone decides any more.
    Offered {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// The register is asked for this side: nothing may be promised any more.
    Reclaiming {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// The destination may run it whatever the register says: it is never asked for this side any more.
    Promised {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// The register names this side, after `Returned`.
    Settled,
}

/// Decisions of the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DestinationRecord {
    /// Things are held for a machine that may come.
    Reserved {
        /// The source.
        peer: SiteName,
        /// What was proposed.
        proposal: Box<Proposal>,
        /// What is held.
        reservation: Reservation,
    },
    /// The machine's state is complete here and proven.
    Loaded,
    /// The machine is ours.
    Activated {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// We will never run it under this epoch.
    Refused {
        /// Why.
        why: Refusal,
    },
    /// An operator made it ours without the source's word.
    TakenOver {
        /// What keeps its connections alive.
        handover: Box<Handover>,
        /// The site whose copy is destroyed, as the operator said.
        destroyed: SiteName,
    },
    /// It was ours, and an operator took it back at the source while we were gone.
    Overruled,
    /// The register was asked for us: refused only once it is read that we lost.
    Claiming {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// Won at the register, or promised by the source: ours, if what was loaded still stands.
    Owned {
        /// What keeps its connections alive.
        handover: Box<Handover>,
    },
    /// It was ours and did not stand any more: we will never run it under this epoch.
    HandedBack {
        /// Why.
        why: Refusal,
    },
}

/// A record that cannot follow the one before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Journal holds {next} after {last}: it was damaged or written by something else")]
pub struct IllegalRecord {
    last: &'static str,
    next: &'static str,
}

impl Record {
    /// The record's name in the journal listing.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Source(record) => record.name(),
            Self::Destination(record) => record.name(),
        }
    }

    /// Whether `next` may stand right after `last` in one migration's records.
    pub fn check_order(last: Option<&Record>, next: &Record) -> Result<(), IllegalRecord> {
        let legal = match (last, next) {
            (None, Self::Source(next)) => next.may_follow(None),
            (None, Self::Destination(next)) => next.may_follow(None),
            (Some(Self::Source(last)), Self::Source(next)) => next.may_follow(Some(last)),
            (Some(Self::Destination(last)), Self::Destination(next)) => next.may_follow(Some(last)),
            (Some(Self::Source(_)), Self::Destination(_)) | (Some(Self::Destination(_)), Self::Source(_)) => {
                false
            }
        };
        if legal {
            return Ok(());
        }
        Err(IllegalRecord { last: last.map_or("nothing", Record::name), next: next.name() })
    }
}

impl SourceRecord {
    /// The record's name in the journal listing.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reserved { .. } => "reserved",
            Self::PreCopy { .. } => "pre-copy",
            Self::Parked => "parked",
            Self::Committed { .. } => "committed",
            Self::Released => "released",
            Self::Aborted { .. } => "aborted",
            Self::Returned { .. } => "returned",
            Self::TakenBack { .. } => "taken back by an operator",
            Self::Offered { .. } => "offered",
            Self::Reclaiming { .. } => "reclaiming",
            Self::Promised { .. } => "promised",
            Self::Settled => "settled",
        }
    }

    fn may_follow(&self, last: Option<&Self>) -> bool {
        match (last, self) {
            (None, Self::Reserved { .. }) => true,
            (Some(Self::Reserved { .. }), Self::PreCopy { .. } | Self::Aborted { .. }) => true,
            (Some(Self::PreCopy { .. }), Self::Parked) => true,
            (
                Some(Self::PreCopy { .. } | Self::Parked),
                Self::Committed { .. } | Self::Offered { .. } | Self::Aborted { .. },
            ) => true,
            (Some(Self::Offered { .. }), Self::Reclaiming { .. } | Self::Promised { .. }) => true,
            (
                Some(Self::Offered { .. } | Self::Reclaiming { .. } | Self::Promised { .. }),
                Self::Committed { .. } | Self::Returned { .. },
            ) => true,
            (
                Some(Self::Committed { .. }),
                Self::Released | Self::Returned { .. } | Self::TakenBack { .. },
            ) => true,
            (Some(Self::Returned { .. }), Self::Settled) => true,
            (_, _) => false,
        }
    }
}

impl DestinationRecord {
    /// The record's name in the journal listing.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Reserved { .. } => "reserved",
            Self::Loaded => "loaded",
            Self::Activated { .. } => "activated",
            Self::Refused { .. } => "refused",
            Self::TakenOver { .. } => "taken over by an operator",
            Self::Overruled => "overruled by an operator at the other site",
            Self::Claiming { .. } => "claiming",
            Self::Owned { .. } => "owned",
            Self::HandedBack { .. } => "handed back",
        }
    }

    fn may_follow(&self, last: Option<&Self>) -> bool {
        match (last, self) {
            (None, Self::Reserved { .. }) => true,
            (Some(Self::Reserved { .. }), Self::Loaded | Self::Activated { .. } | Self::Refused { .. }) => {
                true
            }
            (Some(Self::Loaded), Self::Activated { .. } | Self::Claiming { .. } | Self::TakenOver { .. }) => {
                true
            }
            (Some(Self::Loaded | Self::Claiming { .. }), Self::Owned { .. } | Self::Refused { .. }) => true,
            (Some(Self::Owned { .. }), Self::Activated { .. } | Self::HandedBack { .. }) => true,
            (Some(Self::Activated { .. } | Self::TakenOver { .. }), Self::Overruled) => true,
            (_, _) => false,
        }
    }
}

fn false_where_it_ends<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(bool::deserialize(deserializer).unwrap_or(false))
}

/// What every record of one migration shares; the journal's key besides the migration's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The machine.
    pub vm: VmName,
    /// The epoch this migration would create or has created.
    pub epoch: Epoch,
    /// Milliseconds since the UNIX epoch, for people; nothing is decided by it.
    pub at_unix_ms: u64,
    /// The decision.
    pub record: Record,
}
