//! What survives a crash: records of migrations, the ledger of machines, the anchors, where disks are kept.
//!
//! One redb file; every commit is fsynced before it returns, and a migration's record changes the
//! ledger in the same transaction. [`Journal::commit`] is the only way from a [`Step`] to its
//! actions, so nothing that follows from a record can come before it. The journal interprets
//! nothing but the order of records; recovery reads it back and folds it in the core.

#[cfg(test)]
mod torn;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, ReadOnlyDatabase, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use longhaul_core::ids::{Epoch, MigrationId, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::record::{Entry, IllegalRecord, Record};
use longhaul_core::migration::step::Step;

/// Records by migration and number.
const ENTRIES: TableDefinition<(u128, u32), &[u8]> = TableDefinition::new("entries");
/// The other site of each migration, by migration.
const PEERS: TableDefinition<u128, &[u8]> = TableDefinition::new("attempts");
/// Who owns which machine, by the machine's name.
const OWNERSHIP: TableDefinition<&str, &[u8]> = TableDefinition::new("ownership");
/// The highest epoch of each name that was forgotten, by the machine's name: it outlives `undefine`.
const EPOCHS: TableDefinition<&str, u64> = TableDefinition::new("epochs");
/// The highest epoch ever seen in the register of a machine that the name server decides about, by the machine's name.
const REGISTERS: TableDefinition<&str, u64> = TableDefinition::new("registers");
/// The same of registers in etcd: a pair of sites that changes its arbiter begins in an empty one.
const ETCD_REGISTERS: TableDefinition<&str, u64> = TableDefinition::new("etcd_registers");
/// What this site knows of a machine besides, by the machine's name.
const MACHINES: TableDefinition<&str, &[u8]> = TableDefinition::new("machines");
/// Machines that left and whose connections are still held here, by the machine's name.
const ANCHORS: TableDefinition<&str, &[u8]> = TableDefinition::new("anchors");
/// When an address of an anchor was last known to be needed, in milliseconds since the UNIX epoch, by the machine's name.
const NEEDED: TableDefinition<&str, u64> = TableDefinition::new("anchors_needed");
/// Disks of machines that left, by their path.
const KEPT: TableDefinition<&str, &[u8]> = TableDefinition::new("kept_disks");

/// What kept the journal from being read or written. The gateway stops deciding when it sees one.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it.
    #[error(
        "Another gateway runs on the journal {path}; end that one, or give this one a state_dir of its own"
    )]
    Taken {
        /// The file.
        path: String,
    },
    /// The file could not be opened.
    #[error(
        "Cannot open the journal {path}: its disk fails, or the file is damaged. Do not delete it: put back the newest \
         copy there is, and what moved since is held"
    )]
    Open {
        /// The file.
        path: String,
        /// The store's error.
        #[source]
        source: redb::DatabaseError,
    },
    /// The file cannot be kept from others.
    #[error("Cannot make the journal {} readable by its owner only", path.display())]
    Private {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The store failed.
    #[error("Journal cannot be read or written; check the disk it is on")]
    Store(#[source] Box<redb::Error>),
    /// A value does not decode.
    #[error("Journal holds a value that this version cannot read; do not start an older version on it")]
    Decode(#[source] postcard::Error),
    /// Records are out of order.
    #[error(transparent)]
    Order(#[from] IllegalRecord),
    /// The task that writes was cancelled by the end of the runtime.
    #[error("Gateway is shutting down")]
    Closed,
}

/// One migration as the journal holds it.
#[derive(Debug, Clone)]
pub struct History {
    /// What was attempted.
    pub attempt: Attempt,
    /// The records in order.
    pub entries: Vec<Entry>,
}

/// The gateway's durable state. Cheap to clone; the store serialises writers.
#[derive(Clone, Debug)]
pub struct Journal {
    database: Arc<Database>,
}

impl Journal {
    /// Opens or creates the journal at `path`, which nobody but its owner may read then.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        keep_private(path).map_err(|source| JournalError::Private { path: path.to_owned(), source })?;
        // Every page is looked at: a bit that has turned since must not become another owner.
        let database = Database::builder()
            .set_check_integrity_on_open(true)
            .create(path)
            .map_err(|source| not_opened(path, source))?;
        keep_entry(path).map_err(|source| JournalError::Private { path: path.to_owned(), source })?;
        Self::with_tables(database)
    }

    fn with_tables(database: Database) -> Result<Self, JournalError> {
        let journal = Self { database: Arc::new(database) };
        journal.write(|transaction| {
            transaction.open_table(ENTRIES)?;
            transaction.open_table(PEERS)?;
            transaction.open_table(OWNERSHIP)?;
            transaction.open_table(MACHINES)?;
            transaction.open_table(ANCHORS)?;
            transaction.open_table(NEEDED)?;
            transaction.open_table(KEPT)?;
            transaction.open_table(EPOCHS)?;
            transaction.open_table(REGISTERS)?;
            transaction.open_table(ETCD_REGISTERS)?;
            Ok(())
        })?;
        Ok(journal)
    }

    /// Opens a copy of the journal at `path`, to look at it while no gateway runs on it. The file itself stays
    /// as it is, also where a gateway that was killed has left something to repair.
    pub fn open_copy(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| not_opened(path, source);
        if let Err(error @ redb::DatabaseError::DatabaseAlreadyOpen) = ReadOnlyDatabase::open(path) {
            return Err(failed(error));
        }
        let copy = std::env::temp_dir().join(format!("longhaul-journal-{:032x}", rand::random::<u128>()));
        let copied = std::fs::copy(path, &copy).map_err(|error| failed(error.into()))?;
        tracing::debug!(copied, "journal copied");
        let opened = Self::open(&copy);
        // The open file stays readable; its name is not needed any more.
        drop(std::fs::remove_file(&copy));
        opened
    }

    /// Makes the step's record durable, then hands out its actions.
    pub async fn commit<A: Send + 'static>(
        &self,
        attempt: &Attempt,
        step: Step<A>,
    ) -> Result<Vec<A>, JournalError> {
        if let Some(record) = step.pending_record() {
            let (journal, attempt, record) = (self.clone(), attempt.clone(), record.clone());
            tokio::task::spawn_blocking(move || journal.append(&attempt, &record))
                .await
                .map_err(|_| JournalError::Closed)??;
        }
        Ok(step.after_record())
    }

    fn append(&self, attempt: &Attempt, record: &Record) -> Result<(), JournalError> {
        let entries = self.entries(attempt.id)?;
        Record::check_order(entries.last().map(|entry| &entry.record), record)?;
        let before = self.ownership(&attempt.vm)?;
        let after = Ownership::after(before.as_ref(), record, attempt.epoch, &attempt.peer);
        let entry = Entry {
            vm: attempt.vm.clone(),
            epoch: attempt.epoch,
            at_unix_ms: unix_ms(),
            record: record.clone(),
        };
        let entry = encode(&entry)?;
        let attempt_bytes = encode(attempt)?;
        let after = after.map(|after| encode(&after)).transpose()?;
        self.write(|transaction| {
            transaction.open_table(PEERS)?.insert(attempt.id.0, attempt_bytes.as_slice())?;
            let key = (attempt.id.0, entries.len() as u32);
            transaction.open_table(ENTRIES)?.insert(key, entry.as_slice())?;
            let mut ownership = transaction.open_table(OWNERSHIP)?;
            match &after {
                Some(after) => ownership.insert(attempt.vm.as_str(), after.as_slice())?,
                None => ownership.remove(attempt.vm.as_str())?,
            };
            Ok(())
        })
    }

    /// What migration `id` is or was, if this site has a record of it.
    pub fn attempt(&self, id: MigrationId) -> Result<Option<Attempt>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(PEERS).map_err(store)?;
        let value = table.get(id.0).map_err(store)?;
        value.map(|value| decode(value.value())).transpose()
    }

    /// The records of one migration, in order.
    pub fn entries(&self, id: MigrationId) -> Result<Vec<Entry>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(ENTRIES).map_err(store)?;
        let mut entries = Vec::new();
        for row in table.range((id.0, 0)..=(id.0, u32::MAX)).map_err(store)? {
            let (_, value) = row.map_err(store)?;
            entries.push(decode(value.value())?);
        }
        Ok(entries)
    }

    /// Every migration the journal holds.
    pub fn histories(&self) -> Result<Vec<History>, JournalError> {
        let attempts: Vec<Attempt> = {
            let transaction = self.database.begin_read().map_err(store)?;
            let table = transaction.open_table(PEERS).map_err(store)?;
            let mut attempts = Vec::new();
            for row in table.iter().map_err(store)? {
                attempts.push(decode(row.map_err(store)?.1.value())?);
            }
            attempts
        };
        attempts
            .into_iter()
            .map(|attempt| Ok(History { entries: self.entries(attempt.id)?, attempt }))
            .collect()
    }

    /// Who owns `vm`, if this site knows it.
    pub fn ownership(&self, vm: &VmName) -> Result<Option<Ownership>, JournalError> {
        self.row(OWNERSHIP, vm.as_str())
    }

    /// Takes a machine that was defined or adopted here into the ledger.
    pub fn define(&self, vm: &VmName, ownership: &Ownership) -> Result<(), JournalError> {
        self.put(OWNERSHIP, vm.as_str(), ownership)
    }

    /// What this site knows of every machine.
    pub fn machines<T: DeserializeOwned>(&self) -> Result<Vec<(VmName, T)>, JournalError> {
        self.rows(MACHINES)
    }

    /// What this site knows of `vm`, here or away.
    pub fn machine<T: DeserializeOwned>(&self, vm: &VmName) -> Result<Option<T>, JournalError> {
        self.row(MACHINES, vm.as_str())
    }

    /// Writes what this site knows of a machine.
    pub fn put_machine<T: Serialize>(&self, vm: &VmName, row: &T) -> Result<(), JournalError> {
        self.put(MACHINES, vm.as_str(), row)
    }

    /// Changes what this site knows of `vm` in one transaction: whoever else changes something of it meanwhile loses nothing.
    /// What it is then; `None` if nothing is known of it.
    pub fn change_machine<T: Serialize + DeserializeOwned>(
        &self,
        vm: &VmName,
        change: impl FnOnce(&mut T),
    ) -> Result<Option<T>, JournalError> {
        self.change(MACHINES, vm, change)
    }

    /// The epoch that a machine called `vm` begins with here: after all that one of this name was in or was
    /// to be in, so that no migration of the earlier machine is taken for one of this; 0 if there was none.
    /// Names outside remember it too.
    pub fn first_epoch(&self, vm: &VmName) -> Result<Epoch, JournalError> {
        let highest = self.highest_epoch(vm)?;
        Ok(if highest == Epoch(0) { highest } else { highest.next() })
    }

    /// The highest epoch that a machine called `vm` was in when it was forgotten; 0 if none was.
    pub fn forgotten_epoch(&self, vm: &VmName) -> Result<Epoch, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(EPOCHS).map_err(store)?;
        let epoch = table.get(vm.as_str()).map_err(store)?;
        Ok(Epoch(epoch.map_or(0, |epoch| epoch.value())))
    }

    /// The highest epoch of a machine called `vm`: when one was forgotten, or of a migration that was tried.
    fn highest_epoch(&self, vm: &VmName) -> Result<Epoch, JournalError> {
        let mut highest = self.forgotten_epoch(vm)?;
        let transaction = self.database.begin_read().map_err(store)?;
        for row in transaction.open_table(PEERS).map_err(store)?.iter().map_err(store)? {
            let attempt: Attempt = decode(row.map_err(store)?.1.value())?;
            if attempt.vm == *vm {
                highest = highest.max(attempt.epoch);
            }
        }
        Ok(highest)
    }

    /// The highest epoch that was ever seen in the register of `vm` that `arbiter` has; 0 if none was.
    pub fn register_epoch(&self, arbiter: Arbiter, vm: &VmName) -> Result<Epoch, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(registers(arbiter)).map_err(store)?;
        let epoch = table.get(vm.as_str()).map_err(store)?;
        Ok(Epoch(epoch.map_or(0, |epoch| epoch.value())))
    }

    /// Remembers that `epoch` was seen in that register of `vm`: nothing older is believed afterwards.
    pub fn saw_register(&self, arbiter: Arbiter, vm: &VmName, epoch: Epoch) -> Result<(), JournalError> {
        if epoch <= self.register_epoch(arbiter, vm)? {
            return Ok(());
        }
        self.write(|transaction| {
            transaction.open_table(registers(arbiter))?.insert(vm.as_str(), epoch.0)?;
            Ok(())
        })
    }

    /// Forgets a machine, all but the epoch it was in.
    pub fn remove_machine(&self, vm: &VmName) -> Result<(), JournalError> {
        let known = self.ownership(vm)?.map_or(Epoch(0), |ownership| ownership.epoch());
        let highest = self.highest_epoch(vm)?.max(known);
        self.write(|transaction| {
            if highest > Epoch(0) {
                transaction.open_table(EPOCHS)?.insert(vm.as_str(), highest.0)?;
            }
            transaction.open_table(MACHINES)?.remove(vm.as_str())?;
            transaction.open_table(OWNERSHIP)?.remove(vm.as_str())?;
            Ok(())
        })
    }

    /// Machines that left and are still anchored here.
    pub fn anchors<T: DeserializeOwned>(&self) -> Result<Vec<(VmName, T)>, JournalError> {
        self.rows(ANCHORS)
    }

    /// The anchor of `vm`, if it has left one.
    pub fn anchor<T: DeserializeOwned>(&self, vm: &VmName) -> Result<Option<T>, JournalError> {
        self.row(ANCHORS, vm.as_str())
    }

    /// Writes an anchor.
    pub fn put_anchor<T: Serialize>(&self, vm: &VmName, row: &T) -> Result<(), JournalError> {
        self.put(ANCHORS, vm.as_str(), row)
    }

    /// Changes the anchor of `vm` in one transaction. What it is then; `None` if there is none.
    pub fn change_anchor<T: Serialize + DeserializeOwned>(
        &self,
        vm: &VmName,
        change: impl FnOnce(&mut T),
    ) -> Result<Option<T>, JournalError> {
        self.change(ANCHORS, vm, change)
    }

    /// Forgets an anchor.
    pub fn remove_anchor(&self, vm: &VmName) -> Result<(), JournalError> {
        self.write(|transaction| {
            transaction.open_table(ANCHORS)?.remove(vm.as_str())?;
            transaction.open_table(NEEDED)?.remove(vm.as_str())?;
            Ok(())
        })
    }

    /// When an address of the anchor of `vm` was last needed, in milliseconds since the UNIX epoch, as it was noted.
    pub fn anchor_needed_ms(&self, vm: &VmName) -> Result<Option<u64>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(NEEDED).map_err(store)?;
        Ok(table.get(vm.as_str()).map_err(store)?.map(|at| at.value()))
    }

    /// Notes that, if there is an anchor.
    pub fn note_anchor_needed(&self, vm: &VmName, at_unix_ms: u64) -> Result<(), JournalError> {
        self.write(|transaction| {
            if transaction.open_table(ANCHORS)?.get(vm.as_str())?.is_some() {
                transaction.open_table(NEEDED)?.insert(vm.as_str(), at_unix_ms)?;
            }
            Ok(())
        })
    }

    /// Disks of machines that left, and what is known of each.
    pub fn kept_disks<T: DeserializeOwned>(&self) -> Result<BTreeMap<PathBuf, T>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(KEPT).map_err(store)?;
        let mut kept = BTreeMap::new();
        for row in table.iter().map_err(store)? {
            let (path, value) = row.map_err(store)?;
            kept.insert(PathBuf::from(path.value()), decode(value.value())?);
        }
        Ok(kept)
    }

    /// Writes down a disk of a machine that left. A path that is no text is not written down.
    pub fn put_kept_disk<T: Serialize>(&self, path: &Path, row: &T) -> Result<(), JournalError> {
        path.to_str().map_or(Ok(()), |path| self.put(KEPT, path, row))
    }

    /// Forgets a disk of a machine that left.
    pub fn forget_kept_disk(&self, path: &Path) -> Result<(), JournalError> {
        let Some(path) = path.to_str() else { return Ok(()) };
        self.write(|transaction| {
            transaction.open_table(KEPT)?.remove(path)?;
            Ok(())
        })
    }

    fn row<T: DeserializeOwned>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        key: &str,
    ) -> Result<Option<T>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(table).map_err(store)?;
        let value = table.get(key).map_err(store)?;
        value.map(|value| decode(value.value())).transpose()
    }

    fn rows<T: DeserializeOwned>(
        &self,
        table: TableDefinition<&str, &[u8]>,
    ) -> Result<Vec<(VmName, T)>, JournalError> {
        let transaction = self.database.begin_read().map_err(store)?;
        let table = transaction.open_table(table).map_err(store)?;
        let mut rows = Vec::new();
        for row in table.iter().map_err(store)? {
            let (key, value) = row.map_err(store)?;
            let name =
                key.value().parse().map_err(|_| JournalError::Decode(postcard::Error::SerdeDeCustom))?;
            rows.push((name, decode(value.value())?));
        }
        Ok(rows)
    }

    fn change<T: Serialize + DeserializeOwned>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        vm: &VmName,
        change: impl FnOnce(&mut T),
    ) -> Result<Option<T>, JournalError> {
        let transaction = self.database.begin_write().map_err(store)?;
        let row = {
            let mut table = transaction.open_table(table).map_err(store)?;
            let known = table.get(vm.as_str()).map_err(store)?.map(|value| decode(value.value()));
            let Some(mut row) = known.transpose()? else { return Ok(None) };
            change(&mut row);
            table.insert(vm.as_str(), encode(&row)?.as_slice()).map_err(store)?;
            row
        };
        transaction.commit().map_err(store)?;
        Ok(Some(row))
    }

    fn put<T: Serialize>(
        &self,
        table: TableDefinition<&str, &[u8]>,
        key: &str,
        row: &T,
    ) -> Result<(), JournalError> {
        let bytes = encode(row)?;
        self.write(|transaction| {
            transaction.open_table(table)?.insert(key, bytes.as_slice())?;
            Ok(())
        })
    }

    fn write(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), JournalError> {
        // redb's default durability is Immediate: commit returns after fsync.
        let transaction = self.database.begin_write().map_err(store)?;
        change(&transaction).map_err(store)?;
        transaction.commit().map_err(store)
    }
}

fn not_opened(path: &Path, source: redb::DatabaseError) -> JournalError {
    let path = path.display().to_string();
    if matches!(source, redb::DatabaseError::DatabaseAlreadyOpen) {
        return JournalError::Taken { path };
    }
    JournalError::Open { path, source }
}

/// A power loss does not take away a file that was just made.
fn keep_entry(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// The file is there and its owner's alone; the store takes an empty one for new.
fn keep_private(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))
}

/// Milliseconds since the UNIX epoch.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn registers(arbiter: Arbiter) -> TableDefinition<'static, &'static str, u64> {
    match arbiter {
        Arbiter::Dns => REGISTERS,
        Arbiter::Etcd => ETCD_REGISTERS,
    }
}

fn store(error: impl Into<redb::Error>) -> JournalError {
    JournalError::Store(Box::new(error.into()))
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, JournalError> {
    postcard::to_allocvec(value).map_err(JournalError::Decode)
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JournalError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(JournalError::Decode)?;
    if !rest.is_empty() {
        // What a later version appended may change what the beginning means.
        return Err(JournalError::Decode(postcard::Error::SerdeDeCustom));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use longhaul_core::migration::CommitMode;
    use longhaul_core::migration::message::{Handover, Refusal};
    use longhaul_core::migration::record::{DestinationRecord, SourceRecord};

    use super::*;

    fn attempt() -> Attempt {
        Attempt {
            id: MigrationId(9),
            vm: "web1".parse().unwrap(),
            peer: "b".parse().unwrap(),
            epoch: Epoch(1),
            commit: CommitMode::Confirmed,
        }
    }

    fn loaded() -> Record {
        Record::Destination(DestinationRecord::Loaded)
    }

    #[test]
    fn the_highest_epoch_seen_in_a_register_outlives_a_restart_and_is_never_lowered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let vm = attempt().vm;
        for (seen, highest) in [(3, 3), (2, 3), (5, 5)] {
            let journal = Journal::open(&path).unwrap();
            journal.saw_register(Arbiter::Dns, &vm, Epoch(seen)).unwrap();
            assert_eq!(journal.register_epoch(Arbiter::Dns, &vm).unwrap(), Epoch(highest));
            assert_eq!(journal.register_epoch(Arbiter::Etcd, &vm).unwrap(), Epoch(0), "another register");
        }
    }

    #[test]
    fn an_attempt_of_before_commit_modes_were_kept_is_read_as_confirmed() {
        let bytes = encode(&attempt()).unwrap();
        let older: Attempt = decode(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(older, attempt());
        for arbiter in [Arbiter::Dns, Arbiter::Etcd] {
            let arbitrated = Attempt { commit: CommitMode::Arbitrated(arbiter), ..attempt() };
            assert_eq!(decode::<Attempt>(&encode(&arbitrated).unwrap()).unwrap(), arbitrated);
        }
    }

    #[tokio::test]
    async fn a_record_out_of_order_is_refused_and_its_actions_are_not_handed_out() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal")).unwrap();
        let step = Step::record(loaded(), vec!["act"]);
        assert!(matches!(journal.commit(&attempt(), step).await, Err(JournalError::Order(_))));
        assert!(journal.histories().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_was_committed_is_there_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        {
            let journal = Journal::open(&path).unwrap();
            journal.define(&attempt().vm, &Ownership::Here { epoch: Epoch(0) }).unwrap();
            let records = [SourceRecord::PreCopy {
                reservation: longhaul_core::migration::message::Reservation {
                    care_of: Vec::new(),
                    shadow_pages: 0,
                    disk_window_log: 20,
                    memory_base: None,
                },
            }];
            let first = Record::Source(records[0].clone());
            assert!(journal.commit(&attempt(), Step::record(first, vec![()])).await.is_err());
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.ownership(&attempt().vm).unwrap(), Some(Ownership::Here { epoch: Epoch(0) }));
    }

    #[test]
    fn only_its_owner_reads_the_journal() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o777;
        drop(Journal::open(&path).unwrap());
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        drop(Journal::open(&path).unwrap());
        assert_eq!(mode(), 0o600, "one of an earlier version");
    }

    #[test]
    fn a_forgotten_machine_leaves_the_highest_epoch_of_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let vm = attempt().vm;
        {
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.first_epoch(&vm).unwrap(), Epoch(0));
            let away = Ownership::Away { site: attempt().peer, epoch: Epoch(3) };
            journal.define(&vm, &away).unwrap();
            journal.remove_machine(&vm).unwrap();
            journal.define(&vm, &Ownership::Here { epoch: Epoch(2) }).unwrap();
            journal.remove_machine(&vm).unwrap();
        }
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.ownership(&vm).unwrap(), None);
        assert_eq!(journal.first_epoch(&vm).unwrap(), Epoch(4));
    }

    #[test]
    fn a_machine_defined_again_begins_after_every_migration_of_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal")).unwrap();
        let tried = Attempt { epoch: Epoch(6), ..attempt() };
        let bytes = encode(&tried).unwrap();
        journal
            .write(|transaction| {
                transaction.open_table(PEERS)?.insert(tried.id.0, bytes.as_slice())?;
                Ok(())
            })
            .unwrap();
        journal.define(&tried.vm, &Ownership::Here { epoch: Epoch(5) }).unwrap();
        journal.remove_machine(&tried.vm).unwrap();
        assert_eq!(journal.first_epoch(&tried.vm).unwrap(), Epoch(7));
        assert_eq!(journal.first_epoch(&"other".parse().unwrap()).unwrap(), Epoch(0));
    }

    #[test]
    fn committed_takes_the_machine_away_and_a_durable_refusal_brings_it_back() {
        let peer = attempt().peer;
        let here = Ownership::Here { epoch: Epoch(0) };
        let committed =
            Record::Source(SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) });
        let away = Ownership::after(Some(&here), &committed, Epoch(1), &peer).unwrap();
        assert!(away.permit(&attempt().vm, None, &[]).is_err());
        let returned = Record::Source(SourceRecord::Returned { why: Refusal::Operator });
        let back = Ownership::after(Some(&away), &returned, Epoch(1), &peer).unwrap();
        assert!(back.permit(&attempt().vm, None, &[]).is_ok());
    }
}
