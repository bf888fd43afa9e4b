//! The journal on a disk that loses, at a power loss, whatever was not synced: all of it, some of it, or the half of a
//! write. What a commit has returned for must be there afterwards, and nothing that was never written.

use std::io;
use std::sync::{Arc, Mutex};

use longhaul_core::ids::{Epoch, MigrationId};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::Refusal;
use longhaul_core::migration::record::{DestinationRecord, Record};
use longhaul_core::migration::{Attempt, CommitMode};
use proptest::prelude::*;
use redb::{Database, StorageBackend};

use super::{Journal, unix_ms};

#[derive(Debug, Default)]
struct Platter {
    stable: Vec<u8>,
    /// What is read.
    cached: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    /// How much of each unsynced write outlives a power loss, of 255, while somebody wants to know.
    shares: Option<Vec<u8>>,
    /// What a power loss just before each sync would have left.
    images: Vec<Vec<u8>>,
}

/// A disk that the test keeps a hand on.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

impl Disk {
    fn of(content: Vec<u8>) -> Self {
        let platter = Platter { stable: content.clone(), cached: content, ..Platter::default() };
        Self(Arc::new(Mutex::new(platter)))
    }
}

impl Platter {
    fn lose_power(&mut self) {
        let Some(shares) = &self.shares else { return };
        let mut left = self.stable.clone();
        if shares[0] > 0 {
            left.resize(self.cached.len(), 0);
        }
        for ((at, data), share) in self.unsynced.iter().zip(shares.iter().cycle()) {
            let outlives = data.len() * usize::from(*share) / 255;
            let end = (at + outlives).min(left.len());
            if *at < end {
                left[*at..end].copy_from_slice(&data[..end - at]);
            }
        }
        self.images.push(left);
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        let platter = self.0.lock().unwrap();
        let found = platter.cached.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.cached.resize(len as usize, 0);
        platter.unsynced.retain(|(at, data)| at + data.len() <= len as usize);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.lose_power();
        platter.stable = platter.cached.clone();
        platter.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        let mut platter = self.0.lock().unwrap();
        platter.cached[at..at + data.len()].copy_from_slice(data);
        platter.unsynced.push((at, data.to_vec()));
        Ok(())
    }
}

fn open(disk: &Disk) -> Result<Journal, String> {
    let database =
        Database::builder().create_with_backend(disk.clone()).map_err(|error| error.to_string())?;
    Journal::with_tables(database).map_err(|error| error.to_string())
}

fn attempt(id: u128) -> Attempt {
    let (vm, peer) = ("web1".parse().unwrap(), "b".parse().unwrap());
    Attempt { id: MigrationId(id), vm, peer, epoch: Epoch(1), commit: CommitMode::Confirmed }
}

impl Journal {
    /// An attempt whose only record says why it was refused: the shortest history that a test can make.
    fn remember(&self, attempt: &Attempt) -> Result<(), super::JournalError> {
        let record = Record::Destination(DestinationRecord::Refused { why: Refusal::Operator });
        let entry =
            super::Entry { vm: attempt.vm.clone(), epoch: attempt.epoch, at_unix_ms: unix_ms(), record };
        let (entry, bytes) = (super::encode(&entry)?, super::encode(attempt)?);
        self.write(|transaction| {
            transaction.open_table(super::PEERS)?.insert(attempt.id.0, bytes.as_slice())?;
            transaction.open_table(super::ENTRIES)?.insert((attempt.id.0, 0), entry.as_slice())?;
            Ok(())
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_was_committed_outlives_a_power_loss_in_the_middle_of_the_next_commit(
        written in 0u128..12,
        shares in prop::collection::vec(prop_oneof![Just(0u8), Just(255u8), any::<u8>()], 1..9),
    ) {
        let disk = Disk::default();
        let journal = open(&disk).map_err(TestCaseError::fail)?;
        for id in 0..written {
            journal.remember(&attempt(id)).unwrap();
        }
        disk.0.lock().unwrap().shares = Some(shares);
        journal.remember(&attempt(written)).unwrap();
        let images = std::mem::take(&mut disk.0.lock().unwrap().images);
        prop_assert!(!images.is_empty(), "a commit syncs");
        for image in images {
            let journal = open(&Disk::of(image)).map_err(TestCaseError::fail)?;
            let found = journal.histories().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(found.len() as u128 >= written && found.len() as u128 <= written + 1);
            prop_assert!(found.iter().all(|history| history.entries.len() == 1), "half a transaction");
        }
    }
}

/// A bit in each of this many places, spread over the file.
const PLACES: usize = 600;

#[test]
fn a_bit_that_has_turned_in_the_file_is_refused_or_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    let fold = |journal: &Journal| {
        let owner = journal.ownership(&attempt(0).vm).map_err(|error| error.to_string())?;
        let histories = journal.histories().map_err(|error| error.to_string())?;
        Ok::<_, String>((owner, histories.into_iter().map(|history| history.entries).collect::<Vec<_>>()))
    };
    let whole = {
        let journal = Journal::open(&path).unwrap();
        (0..20).for_each(|id| journal.remember(&attempt(id)).unwrap());
        let owner = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(1) };
        journal.define(&attempt(0).vm, &owner).unwrap();
        fold(&journal).unwrap()
    };
    let content = std::fs::read(&path).unwrap();
    let written: Vec<usize> = (0..content.len()).filter(|&at| content[at] != 0).collect();
    let mut refused = 0;
    for place in 0..PLACES {
        let at = written[place * written.len() / PLACES];
        let mut damaged = content.clone();
        damaged[at] ^= 1 << (place % 8);
        std::fs::write(&path, damaged).unwrap();
        match Journal::open(&path).map_err(|error| error.to_string()).and_then(|journal| fold(&journal)) {
            Ok(found) => assert_eq!(found, whole, "byte {at}, bit {}", place % 8),
            Err(_) => refused += 1,
        }
    }
    // Most pages hold what earlier commits wrote, and nobody reads them again.
    assert!(refused > 0, "a record was damaged among {PLACES} places");
}
