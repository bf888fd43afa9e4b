//! What a site answers about a migration that has no machine any more: its journal's word.
//!
//! A driver ends when its side is done, or its gateway was restarted and owed nothing more. The peer
//! may not know: it repeats what it still needs answered. Without an answer from the journal a
//! destination would hold memory, disks and addresses for ever for an attempt that was given up.

use crate::ids::Epoch;
use crate::migration::message::{MigrationMessage, Refusal};
use crate::migration::record::{DestinationRecord, Record, SourceRecord};

/// The answer to `heard`, given the `last` record of its migration and the epoch that stands in it.
///
/// `None` where silence is right: a driver that is being restored answers, or nothing depends on it.
pub fn answer(last: Option<(Epoch, &Record)>, heard: &MigrationMessage) -> Option<MigrationMessage> {
    match heard {
        MigrationMessage::Reserve { .. }
        | MigrationMessage::Offer { .. }
        | MigrationMessage::Commit { .. }
        | MigrationMessage::Abort { .. } => as_destination(last),
        MigrationMessage::Reserved(_) | MigrationMessage::Loaded { .. } => as_source(last),
        MigrationMessage::Propose(_)
        | MigrationMessage::Accept
        | MigrationMessage::Decline(_)
        | MigrationMessage::Activated { .. }
        | MigrationMessage::Refused { .. }
        | MigrationMessage::TakenBack { .. }
        | MigrationMessage::Unknown => None,
    }
}

fn as_destination(last: Option<(Epoch, &Record)>) -> Option<MigrationMessage> {
    let Some((epoch, last)) = last else { return Some(MigrationMessage::Unknown) };
    match last {
        Record::Destination(DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }) => {
            Some(MigrationMessage::Activated { epoch })
        }
        Record::Destination(DestinationRecord::Overruled) => {
            Some(MigrationMessage::Refused { epoch, why: Refusal::Operator })
        }
        Record::Destination(DestinationRecord::Refused { why } | DestinationRecord::HandedBack { why }) => {
            Some(MigrationMessage::Refused { epoch, why: why.clone() })
        }
        Record::Destination(
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. },
        )
        | Record::Source(_) => None,
    }
}

/// The peer holds things for us. Without a record that says otherwise it goes on holding them: the
/// journal may be older than the world.
fn as_source(last: Option<(Epoch, &Record)>) -> Option<MigrationMessage> {
    let (epoch, last) = last?;
    match last {
        Record::Source(SourceRecord::Aborted { why } | SourceRecord::Returned { why }) => {
            Some(MigrationMessage::Abort { epoch, why: why.clone() })
        }
        Record::Source(SourceRecord::TakenBack { .. }) => {
            Some(MigrationMessage::Abort { epoch, why: Refusal::Operator })
        }
        Record::Source(SourceRecord::Settled) => {
            let why = Refusal::Other("The source took the machine back".into());
            Some(MigrationMessage::Abort { epoch, why })
        }
        Record::Source(
            SourceRecord::Reserved { .. }
            | SourceRecord::PreCopy { .. }
            | SourceRecord::Parked
            | SourceRecord::Committed { .. }
            | SourceRecord::Released
            | SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. },
        )
        | Record::Destination(_) => None,
    }
}
