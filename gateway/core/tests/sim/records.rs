//! Records of an earlier version are read by this one. How a journal keeps them is not looked at here.

use std::time::Duration;

use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::migration::message::{MigrationMessage, Proposal};
use longhaul_core::migration::record::{Entry, Record, SourceRecord};
use longhaul_core::migration::source::{Event as SourceEvent, Source, SourceLimits};
use longhaul_core::migration::{Attempt, CommitMode};

use crate::support;

fn site(name: &str) -> SiteName {
    name.parse().expect("a literal name")
}

fn proposal() -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: site("a"),
        hypervisor: "7.2".into(),
        epoch: Epoch(4),
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
        carried: Vec::new(),
    })
}

fn attempt() -> Attempt {
    Attempt {
        id: MigrationId(7),
        vm: "web1".parse().expect("a literal name"),
        peer: site("b"),
        epoch: Epoch(5),
        commit: CommitMode::Confirmed,
    }
}

#[test]
fn a_reserved_record_keeps_that_the_name_stays_behind_and_older_ones_are_still_read() {
    let (source, _) = Source::begin(attempt(), SourceLimits::default(), true, Duration::ZERO);
    let (source, _) = source.handle(SourceEvent::PreflightPassed(proposal()), Duration::ZERO);
    let (_, step) = source.handle(SourceEvent::Peer(MigrationMessage::Accept), Duration::ZERO);
    let record = step.pending_record().expect("an accepted proposal is recorded").clone();
    let without = |record: &Record| {
        let Record::Source(SourceRecord::Reserved { without_names, .. }) = record else {
            panic!("{} instead of reserved", record.name());
        };
        *without_names
    };
    assert!(without(&record));
    let entry = Entry { vm: attempt().vm, epoch: Epoch(5), at_unix_ms: 0, record };
    let bytes = postcard::to_allocvec(&entry).expect("an entry can be written");
    let read: Entry = postcard::from_bytes(&bytes).expect("what was written");
    assert!(without(&read.record));
    // A version that did not keep it wrote the same without the last byte.
    let older: Entry = postcard::from_bytes(&bytes[..bytes.len() - 1]).expect("an older record");
    assert!(!without(&older.record));
}
