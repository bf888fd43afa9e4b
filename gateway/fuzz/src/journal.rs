//! What the journal holds: rows that a torn disk or another program may have written.
//!
//! A row that can be read is written to bytes that read as the same; one that cannot is an error, and
//! the gateway stops rather than guesses.

use std::fmt::Debug;

use gateway::migration::MachineRow;
use gateway::migration::anchor::{Anchor, AnchorNic, NameState};
use gateway::migration::kept::KeptRow;
use gateway::tunnel::Leaving;
use longhaul_core::ids::{Epoch, MigrationId};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::Refusal;
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use longhaul_core::migration::{Attempt, CommitMode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sample;

/// Reads `data` behind its first byte as the row that the byte names.
pub fn run(data: &[u8]) {
    let Some((kind, row)) = data.split_first() else { return };
    match kind % 6 {
        0 => entry(row),
        1 => again::<Attempt>(row),
        2 => again::<Ownership>(row),
        3 => again::<MachineRow>(row),
        4 => again::<KeptRow>(row),
        _ => again::<Anchor>(row),
    }
}

fn entry(row: &[u8]) {
    again::<Entry>(row);
    if let Ok(entry) = postcard::from_bytes::<Entry>(row) {
        let peer = sample::site("b");
        let _ = Record::check_order(None, &entry.record);
        let after = Ownership::after(None, &entry.record, entry.epoch, &peer);
        assert!(after.is_none_or(|ownership| ownership.epoch() >= entry.epoch));
    }
}

fn again<T: Serialize + DeserializeOwned + Debug>(row: &[u8]) {
    let Ok(value) = postcard::from_bytes::<T>(row) else { return };
    let written = postcard::to_allocvec(&value).expect("it was read");
    let read = postcard::from_bytes::<T>(&written).expect("it reads again");
    assert_eq!(format!("{value:?}"), format!("{read:?}"));
}

/// A row that can be read.
pub fn reads(data: &[u8]) -> bool {
    fn is<T: DeserializeOwned>(row: &[u8]) -> bool {
        postcard::from_bytes::<T>(row).is_ok()
    }
    let Some((kind, row)) = data.split_first() else { return false };
    match kind % 6 {
        0 => is::<Entry>(row),
        1 => is::<Attempt>(row),
        2 => is::<Ownership>(row),
        3 => is::<MachineRow>(row),
        4 => is::<KeptRow>(row),
        _ => is::<Anchor>(row),
    }
}

/// One row of each kind, and one entry per kind of record.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let vm = sample::definition().name;
    let (peer, proposal) = (sample::site("b"), Box::new(sample::proposal()));
    let handover = Box::new(sample::handover());
    let entry =
        |record| row(0, &Entry { vm: vm.clone(), epoch: Epoch(4), at_unix_ms: 1_700_000_000_000, record });
    let source = |record| entry(Record::Source(record));
    let destination = |record| entry(Record::Destination(record));
    let volume = "root".parse().expect("a name");
    let kept = KeptRow { vm: vm.clone(), volume, epoch: Epoch(3), owner: 200_000 };
    let (reservation, without_names) = (sample::reservation(), true);
    let why = Refusal::Link("601 s".to_owned());
    let mut seeds = vec![
        ("source-pre-copy", source(SourceRecord::PreCopy { reservation: reservation.clone() })),
        ("source-parked", source(SourceRecord::Parked)),
        ("source-offered", source(SourceRecord::Offered { handover: handover.clone() })),
        ("source-reclaiming", source(SourceRecord::Reclaiming { handover: handover.clone() })),
        ("source-promised", source(SourceRecord::Promised { handover: handover.clone() })),
        ("source-released", source(SourceRecord::Released)),
        ("source-returned", source(SourceRecord::Returned { why: why.clone() })),
        ("source-settled", source(SourceRecord::Settled)),
        ("source-taken-back", source(SourceRecord::TakenBack { destroyed: peer.clone() })),
        ("destination-loaded", destination(DestinationRecord::Loaded)),
        ("destination-claiming", destination(DestinationRecord::Claiming { handover: handover.clone() })),
        ("destination-owned", destination(DestinationRecord::Owned { handover: handover.clone() })),
        ("destination-handed-back", destination(DestinationRecord::HandedBack { why: why.clone() })),
        ("destination-overruled", destination(DestinationRecord::Overruled)),
        ("anchor", row(5, &anchor())),
    ];
    seeds.extend([
        (
            "source-reserved",
            source(SourceRecord::Reserved { peer: peer.clone(), proposal: proposal.clone(), without_names }),
        ),
        ("source-committed", source(SourceRecord::Committed { handover: handover.clone() })),
        ("source-aborted", source(SourceRecord::Aborted { why: why.clone() })),
        (
            "destination-reserved",
            destination(DestinationRecord::Reserved { peer: peer.clone(), proposal, reservation }),
        ),
        ("destination-activated", destination(DestinationRecord::Activated { handover })),
        ("destination-refused", destination(DestinationRecord::Refused { why })),
        (
            "attempt",
            row(
                1,
                &Attempt {
                    id: MigrationId(9),
                    vm,
                    peer: peer.clone(),
                    epoch: Epoch(4),
                    commit: CommitMode::Confirmed,
                },
            ),
        ),
        ("ownership", row(2, &Ownership::Away { site: peer, epoch: Epoch(4) })),
        ("machine", row(3, &machine())),
        ("kept", row(4, &kept)),
    ]);
    seeds
}

fn machine() -> MachineRow {
    MachineRow {
        definition: sample::definition(),
        images: vec!["/var/lib/longhaul/disks/web1-root.raw".into()],
        home_site: sample::site("a"),
        came_from: Some(sample::site("a")),
        carried: sample::proposal().carried,
        over: vec![[192, 0, 2, 200].into()],
        adopted: None,
        care_of: sample::reservation().care_of,
        handover: Some(sample::handover()),
        wanted: true,
        settled_in: None,
        ttl_before_s: Some(60),
    }
}

fn anchor() -> Anchor {
    let (home, care_of) = ([198, 51, 100, 10].into(), [203, 0, 113, 200].into());
    let nic = AnchorNic {
        nic: "lan".parse().expect("a name"),
        mac: sample::definition().nics.first().expect("it has one").mac,
        from: Leaving::Home,
        addresses: vec![home],
        bridge: "br0".to_owned(),
        port: "lh-web1-lan".to_owned(),
        flows: Vec::new(),
    };
    Anchor {
        vm: sample::definition().name,
        epoch: Epoch(4),
        peer: sample::site("b"),
        nics: vec![nic],
        care_of: vec![(home, care_of)],
        name: Some("web1.vm.example".to_owned()),
        moves: vec![(home, care_of)],
        ttl_s: 60,
        names: NameState::Pending,
        since_unix_ms: 1_700_000_000_000,
        tell: vec![sample::site("c")],
        runs_there: true,
        ended: false,
    }
}

fn row<T: Serialize>(kind: u8, value: &T) -> Vec<u8> {
    let mut row = vec![kind];
    row.extend(postcard::to_allocvec(value).expect("it can be written"));
    row
}
