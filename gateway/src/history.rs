//! What the journal tells of each migration: its records, who owns the machine, and what is done next.
//!
//! The judgement is the core's; this brings together what it is judged by. Recovery acts on the same judgement
//! that the listing prints. Nothing is changed here.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use longhaul_core::ids::{Epoch, SiteName, VmName};
use longhaul_core::migration::generation::{behind, has_come};
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::Proposal;
use longhaul_core::migration::record::{DestinationRecord, Entry, Record, SourceRecord};
use longhaul_core::migration::recovery::{Facts, NextStep, Qemu, next_step};

use crate::api::types::{JournalView, RecordView};
use crate::generation::{arrivals, read_notes};
use crate::journal::{History, Journal, JournalError};
use crate::migration::anchor::{Anchor, arriving_images};
use crate::migration::{MachineRow, moved_name};

/// How long after its release a QEMU may still write: as long as it is given to end, and some more.
const QEMU_ENDS_MS: u64 = 60_000;

/// The migrations of `vm`, or of every machine, oldest first. `seen` is what is known of QEMUs here; one that
/// is not in it was not asked. Without `site` what stands beside disks that came is not looked at.
pub fn views(
    journal: &Journal,
    vm: Option<&VmName>,
    seen: &BTreeMap<VmName, Seen>,
    site: Option<Site<'_>>,
) -> Result<Vec<JournalView>, JournalError> {
    let histories = journal.histories()?;
    let rows: BTreeMap<VmName, MachineRow> = journal.machines()?.into_iter().collect();
    let mut views = Vec::new();
    for history in histories.iter().filter(|history| vm.is_none_or(|vm| history.attempt.vm == *vm)) {
        let attempt = &history.attempt;
        let owner = journal.ownership(&attempt.vm)?;
        let known = Known {
            owner: owner.as_ref(),
            row: rows.get(&attempt.vm),
            shares_images: shares_images(&attempt.vm, rows.iter()),
            seen: seen.get(&attempt.vm).copied().unwrap_or(Qemu::Unknown.into()),
            anchor: anchored(journal, &attempt.vm)?,
            site,
        };
        let Some(next) = judge(history, &histories, &known) else { continue };
        views.push(view(history, owner.as_ref(), next));
    }
    views.sort_by_key(|view| view.records.first().map(|record| record.at_ms));
    Ok(views)
}

/// The site whose journal it is.
#[derive(Clone, Copy)]
pub struct Site<'a> {
    /// Its name.
    pub name: &'a SiteName,
    /// Where disks of machines that arrive are.
    pub pool: &'a Path,
}

/// What was seen of a machine's QEMU here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// How it stands.
    pub qemu: Qemu,
    /// It holds what an attempt made in it.
    pub encumbered: bool,
}

impl From<Qemu> for Seen {
    fn from(qemu: Qemu) -> Self {
        Self { qemu, encumbered: false }
    }
}

/// What is known besides the records.
pub struct Known<'a> {
    /// Who owns the machine, by the ledger.
    pub owner: Option<&'a Ownership>,
    /// What this site knows of the machine.
    pub row: Option<&'a MachineRow>,
    /// A file that it had as a disk is another machine's by now.
    pub shares_images: bool,
    /// Its QEMU here.
    pub seen: Seen,
    /// The epoch of its anchor here.
    pub anchor: Option<Epoch>,
    /// This site, if its disks can be looked at.
    pub site: Option<Site<'a>>,
}

/// What is done about one migration; `None` if it has no records.
pub fn judge(history: &History, all: &[History], known: &Known<'_>) -> Option<NextStep> {
    let last = &history.entries.last()?.record;
    Some(next_step(&Facts {
        last,
        epoch: history.attempt.epoch,
        owner: known.owner,
        arbitrated: history.attempt.commit.is_arbitrated(),
        wanted: wanted(history),
        settled: known.row.is_some_and(|row| row.settled_in == Some(history.attempt.epoch)),
        qemu: known.seen.qemu,
        // One driver takes away what all attempts left.
        encumbered: known.seen.encumbered && is_latest(history, all),
        untidied: untidied(history, known),
        owes_names: known.row.is_some_and(|row| row.ttl_before_s.is_some()),
        overtaken: is_overtaken(history, all),
        came_again: came_again(history, all),
        stale: is_stale(history, known),
        anchor: known.anchor,
    }))
}

/// Whether a disk of `vm` stands in another machine's row, too.
pub fn shares_images<'a>(
    vm: &VmName,
    rows: impl Iterator<Item = (&'a VmName, &'a MachineRow)> + Clone,
) -> bool {
    let Some((_, own)) = rows.clone().find(|(name, _)| *name == vm) else { return false };
    let real = |image: &PathBuf| image.canonicalize().unwrap_or_else(|_| image.clone());
    let own: Vec<PathBuf> = own.images.iter().map(real).collect();
    let mut others = rows.filter(|(name, _)| *name != vm);
    others.any(|(_, row)| row.images.iter().any(|image| own.contains(&real(image))))
}

/// Whether disks lie here under the names that they had while the machine was here, or was coming. A gateway that is killed
/// while it tidies up leaves them.
fn untidied(history: &History, known: &Known<'_>) -> bool {
    let attempt = &history.attempt;
    let Some(Site { pool, .. }) = known.site else { return false };
    let Some(last) = history.entries.last() else { return false };
    match &last.record {
        Record::Source(SourceRecord::Released) if !known.shares_images => {
            let left = matches!(known.owner, Some(Ownership::Away { epoch, .. }) if *epoch == attempt.epoch);
            let lies = |image: &PathBuf| {
                was_here(image, last.at_unix_ms) && !moved_name(image, attempt.epoch.0).exists()
            };
            left && known.row.is_some_and(|row| row.images.iter().any(lies))
        }
        Record::Destination(DestinationRecord::Refused { .. }) => {
            let mut proposals = history.entries.iter().filter_map(proposal);
            proposals.any(|proposal| arriving_images(pool, attempt, proposal).iter().any(|it| it.exists()))
        }
        Record::Source(_) | Record::Destination(_) => false,
    }
}

/// A file that lay there when its machine was released. What was put there after that, when the disk had been set aside and
/// perhaps deleted, is somebody else's: its change time, which nobody can set back, is later.
fn was_here(image: &Path, released_unix_ms: u64) -> bool {
    let Ok(about) = std::fs::symlink_metadata(image) else { return false };
    let changed_ms = u64::try_from(about.ctime()).unwrap_or(u64::MAX).saturating_mul(1000);
    about.is_file() && changed_ms <= released_unix_ms.saturating_add(QEMU_ENDS_MS)
}

/// The epoch of the anchor that stands here for `vm`.
pub fn anchored(journal: &Journal, vm: &VmName) -> Result<Option<Epoch>, JournalError> {
    Ok(journal.anchor::<Anchor>(vm)?.map(|anchor| anchor.epoch))
}

/// The guest ran when it was proposed.
fn wanted(history: &History) -> bool {
    history.entries.iter().any(|entry| match &entry.record {
        Record::Source(SourceRecord::Reserved { proposal, .. })
        | Record::Destination(DestinationRecord::Reserved { proposal, .. }) => proposal.running,
        Record::Source(_) | Record::Destination(_) => false,
    })
}

/// Whether another attempt of the same machine to come here was not refused: what runs is that one's.
fn is_overtaken(history: &History, all: &[History]) -> bool {
    all.iter().any(|other| {
        let refused = matches!(
            other.entries.last().map(|entry| &entry.record),
            None | Some(
                Record::Source(_)
                    | Record::Destination(
                        DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }
                    )
            )
        );
        let is_later = other.attempt.id != history.attempt.id && other.attempt.epoch >= history.attempt.epoch;
        other.attempt.vm == history.attempt.vm && is_later && !refused
    })
}

/// Whether no other attempt with the machine began after this one.
fn is_latest(history: &History, all: &[History]) -> bool {
    let begun = |it: &History| {
        let first = it.entries.first().map(|entry| entry.at_unix_ms);
        (it.attempt.epoch, first, it.attempt.id)
    };
    let mut others = all.iter().filter(|other| other.attempt.vm == history.attempt.vm);
    others.all(|other| begun(other) <= begun(history))
}

/// Whether an attempt to bring the machine here began after this one.
fn came_again(history: &History, all: &[History]) -> bool {
    let brings = |other: &&History| {
        other.attempt.vm == history.attempt.vm
            && other.attempt.epoch > history.attempt.epoch
            && other.entries.iter().any(|entry| matches!(entry.record, Record::Destination(_)))
    };
    all.iter().any(|other| brings(&other))
}

/// Whether the ledger is older than a disk of the machine; a note that cannot be read may say that it is.
fn is_stale(history: &History, known: &Known<'_>) -> bool {
    if has_come_unknown(history, known.site) {
        return true;
    }
    let (vm, Some(owner)) = (&history.attempt.vm, known.owner) else { return false };
    let mut notes = known.site.map_or_else(Vec::new, |site| arrivals(site.pool, vm, site.name));
    match known.row.map(|row| read_notes(&row.images)) {
        Some(Ok(beside)) => notes.extend(beside),
        Some(Err(_)) => return true,
        None => {}
    }
    behind(owner, vm, &notes).is_err()
}

/// Whether a machine came by this attempt and ran, and the records end before that.
fn has_come_unknown(history: &History, site: Option<Site<'_>>) -> bool {
    let (Some(Site { name, pool }), Some(last)) = (site, history.entries.last()) else { return false };
    let before = match &last.record {
        Record::Source(_)
        | Record::Destination(
            DestinationRecord::Activated { .. }
            | DestinationRecord::TakenOver { .. }
            | DestinationRecord::Overruled,
        ) => false,
        Record::Destination(
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::Refused { .. }
            | DestinationRecord::HandedBack { .. },
        ) => true,
    };
    let attempt = &history.attempt;
    let proposals = history.entries.iter().filter_map(proposal);
    let images: Vec<_> = proposals.flat_map(|proposal| arriving_images(pool, attempt, proposal)).collect();
    before && read_notes(&images).map_or(true, |notes| has_come(&attempt.vm, attempt.epoch, name, &notes))
}

/// What was proposed to this site.
fn proposal(entry: &Entry) -> Option<&Proposal> {
    match &entry.record {
        Record::Destination(DestinationRecord::Reserved { proposal, .. }) => Some(proposal),
        Record::Source(_) | Record::Destination(_) => None,
    }
}

fn view(history: &History, owner: Option<&Ownership>, next: NextStep) -> JournalView {
    let attempt = &history.attempt;
    let is_source = history.entries.iter().any(|entry| matches!(entry.record, Record::Source(_)));
    let records = history.entries.iter().map(|entry| RecordView {
        at_ms: entry.at_unix_ms,
        name: entry.record.name().to_owned(),
        why: why(&entry.record),
    });
    JournalView {
        id: attempt.id.to_string(),
        vm: attempt.vm.clone(),
        peer: attempt.peer.clone(),
        epoch: attempt.epoch.0,
        role: if is_source { "source" } else { "destination" }.to_owned(),
        records: records.collect(),
        owner: owner_text(owner),
        next,
        next_text: next.text(&attempt.vm, &attempt.peer),
        under_way: false,
    }
}

fn owner_text(owner: Option<&Ownership>) -> String {
    match owner {
        Some(Ownership::Here { epoch }) => format!("this site, since epoch {epoch}"),
        Some(Ownership::Away { site, epoch }) => format!("site {site}, since epoch {epoch}"),
        Some(Ownership::Offered { site, epoch }) => {
            format!("this site or site {site} in epoch {epoch}: the arbiter says which")
        }
        Some(Ownership::Arriving { epoch }) => format!("not this site: it would be in epoch {epoch}"),
        None => "not known here".to_owned(),
    }
}

fn why(record: &Record) -> Option<String> {
    match record {
        Record::Source(SourceRecord::Aborted { why } | SourceRecord::Returned { why })
        | Record::Destination(DestinationRecord::Refused { why } | DestinationRecord::HandedBack { why }) => {
            Some(why.to_string())
        }
        Record::Source(SourceRecord::TakenBack { destroyed })
        | Record::Destination(DestinationRecord::TakenOver { destroyed, .. }) => {
            Some(format!("said that the copy at site {destroyed} is destroyed"))
        }
        Record::Source(
            SourceRecord::Reserved { .. }
            | SourceRecord::PreCopy { .. }
            | SourceRecord::Parked
            | SourceRecord::Committed { .. }
            | SourceRecord::Released
            | SourceRecord::Offered { .. }
            | SourceRecord::Reclaiming { .. }
            | SourceRecord::Promised { .. }
            | SourceRecord::Settled,
        )
        | Record::Destination(
            DestinationRecord::Reserved { .. }
            | DestinationRecord::Loaded
            | DestinationRecord::Activated { .. }
            | DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::Overruled,
        ) => None,
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::MigrationId;
    use longhaul_core::migration::generation::Generation;
    use longhaul_core::migration::message::{Handover, Refusal, Reservation};
    use longhaul_core::migration::record::Entry;
    use longhaul_core::migration::{Attempt, CommitMode};

    use super::*;
    use crate::generation::write_notes;

    fn history(id: u128, epoch: u64, record: Record) -> History {
        let attempt = Attempt {
            id: MigrationId(id),
            vm: "web1".parse().unwrap(),
            peer: "b".parse().unwrap(),
            epoch: Epoch(epoch),
            commit: CommitMode::Confirmed,
        };
        let entry = Entry { vm: attempt.vm.clone(), epoch: attempt.epoch, at_unix_ms: 7, record };
        History { attempt, entries: vec![entry] }
    }

    fn activated() -> Record {
        Record::Destination(DestinationRecord::Activated {
            handover: Box::new(Handover { nics: Vec::new() }),
        })
    }

    fn refused() -> Record {
        Record::Destination(DestinationRecord::Refused { why: Refusal::Operator })
    }

    #[test]
    fn a_refused_attempt_is_overtaken_by_one_of_the_same_epoch_and_not_by_an_earlier_stay() {
        let first = history(1, 3, refused());
        assert!(is_overtaken(&first, &[first.clone(), history(2, 3, activated())]));
        assert!(!is_overtaken(&first, &[first.clone(), history(2, 1, activated())]));
        assert!(!is_overtaken(&first, &[first.clone(), history(2, 3, refused())]));
        assert!(came_again(&first, &[first.clone(), history(2, 4, refused())]), "its QEMU may be that one's");
        assert!(!came_again(&first, &[first.clone(), history(2, 3, refused())]), "the attempt itself, again");
        assert!(!came_again(&first, &[first.clone(), history(2, 1, activated())]));
    }

    #[test]
    fn what_attempts_left_in_a_qemu_is_undone_by_the_latest_of_them() {
        let aborted = |id, at_unix_ms| {
            let mut aborted =
                history(id, 3, Record::Source(SourceRecord::Aborted { why: Refusal::Operator }));
            aborted.entries[0].at_unix_ms = at_unix_ms;
            aborted
        };
        let all = [aborted(9, 1000), aborted(4, 2000), aborted(2, 3000)];
        let here = Ownership::Here { epoch: Epoch(2) };
        let known = Known {
            owner: Some(&here),
            row: None,
            shares_images: false,
            seen: Seen { qemu: Qemu::Runs, encumbered: true },
            anchor: None,
            site: None,
        };
        let next = all.each_ref().map(|history| judge(history, &all, &known).unwrap());
        assert_eq!(next, [NextStep::Nothing, NextStep::Nothing, NextStep::RollBack]);
    }

    #[test]
    fn a_view_says_what_was_decided_why_and_what_comes_next() {
        let here = Ownership::Here { epoch: Epoch(3) };
        let history = history(1, 3, refused());
        let known = Known {
            owner: Some(&here),
            row: None,
            shares_images: false,
            seen: Qemu::Runs.into(),
            anchor: None,
            site: None,
        };
        let next = judge(&history, std::slice::from_ref(&history), &known).unwrap();
        let view = view(&history, Some(&here), next);
        assert_eq!((view.role.as_str(), view.next), ("destination", NextStep::Nothing));
        assert_eq!(view.records[0].why.as_deref(), Some("Aborted by the operator"));
        assert!(view.owner.contains("this site"), "{}", view.owner);
    }

    #[test]
    fn a_journal_of_between_two_moves_ends_nothing_that_has_come_back_since() {
        let pool = tempfile::tempdir().unwrap();
        let released = history(1, 1, Record::Source(SourceRecord::Released));
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(1) };
        let a: SiteName = "a".parse().unwrap();
        let site = Some(Site { name: &a, pool: pool.path() });
        let known = Known {
            owner: Some(&away),
            row: None,
            shares_images: false,
            seen: Qemu::Runs.into(),
            anchor: None,
            site,
        };
        let next = || judge(&released, std::slice::from_ref(&released), &known).unwrap();
        assert_eq!(next(), NextStep::Release, "what is left of it");
        let image = pool.path().join("web1-root-e2.raw");
        std::fs::write(&image, "").unwrap();
        let note = Generation { vm: "web1".parse().unwrap(), epoch: Epoch(2), owner: a.clone() };
        write_notes(&[image], &note).unwrap();
        assert_eq!(next(), NextStep::Hold, "it is home again, and this journal does not know");
    }

    #[test]
    fn a_disk_that_a_killed_gateway_left_under_its_name_is_put_aside_unless_it_is_another_machines_by_now() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("web1.raw");
        let row = MachineRow {
            definition: proposal().definition,
            images: vec![image.clone()],
            home_site: "a".parse().unwrap(),
            wanted: true,
            settled_in: None,
            adopted: None,
            came_from: None,
            care_of: Vec::new(),
            carried: Vec::new(),
            over: Vec::new(),
            handover: None,
            ttl_before_s: None,
        };
        let mut released = history(1, 1, Record::Source(SourceRecord::Released));
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(1) };
        let a: SiteName = "a".parse().unwrap();
        let site = Some(Site { name: &a, pool: folder.path() });
        let judged = |released: &History, shares_images| {
            let (owner, row) = (Some(&away), Some(&row));
            let known = Known { owner, row, shares_images, seen: Qemu::Gone.into(), anchor: None, site };
            judge(released, std::slice::from_ref(released), &known).unwrap()
        };
        assert_eq!(judged(&released, false), NextStep::Nothing, "there is none");
        std::fs::write(&image, "").unwrap();
        assert_eq!(judged(&released, false), NextStep::Nothing, "it was put there since");
        released.entries[0].at_unix_ms = crate::journal::unix_ms();
        let next = |shares_images| judged(&released, shares_images);
        assert_eq!(next(false), NextStep::Release);
        assert_eq!(next(true), NextStep::Nothing);
        std::fs::write(moved_name(&image, 1), "").unwrap();
        assert_eq!(next(false), NextStep::Nothing, "it was put aside, and what lies there is something else");
        let vm = |name: &str| name.parse::<VmName>().unwrap();
        let rows = BTreeMap::from([(vm("web1"), row.clone()), (vm("web2"), row.clone())]);
        assert!(shares_images(&vm("web1"), rows.iter()));
        assert!(!shares_images(&vm("web1"), rows.iter().take(1)));
    }

    #[test]
    fn what_came_of_a_refused_attempt_is_discarded_although_its_qemu_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let mut refused = history(1, 3, refused());
        let reserved = DestinationRecord::Reserved {
            peer: "b".parse().unwrap(),
            proposal: Box::new(proposal()),
            reservation: Reservation {
                care_of: Vec::new(),
                shadow_pages: 0,
                disk_window_log: 20,
                memory_base: None,
            },
        };
        let first = Entry { record: Record::Destination(reserved), ..refused.entries[0].clone() };
        refused.entries.insert(0, first);
        let a: SiteName = "a".parse().unwrap();
        let next = || {
            let site = Some(Site { name: &a, pool: folder.path() });
            let known = Known {
                owner: None,
                row: None,
                shares_images: false,
                seen: Qemu::Gone.into(),
                anchor: None,
                site,
            };
            judge(&refused, std::slice::from_ref(&refused), &known).unwrap()
        };
        assert_eq!(next(), NextStep::Nothing);
        std::fs::write(&arriving_images(folder.path(), &refused.attempt, &proposal())[0], "").unwrap();
        assert_eq!(next(), NextStep::Discard);
    }

    #[tokio::test]
    async fn a_journal_that_was_written_is_listed_from_a_copy_of_its_file() {
        use longhaul_core::migration::step::Step;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.redb");
        let reserved = Record::Destination(DestinationRecord::Reserved {
            peer: "b".parse().unwrap(),
            proposal: Box::new(proposal()),
            reservation: Reservation {
                care_of: Vec::new(),
                shadow_pages: 0,
                disk_window_log: 20,
                memory_base: None,
            },
        });
        let attempt = history(1, 3, refused()).attempt;
        {
            let journal = Journal::open(&path).unwrap();
            journal.commit(&attempt, Step::record(reserved, vec![()])).await.unwrap();
            assert!(Journal::open_copy(&path).is_err(), "a gateway runs on it");
        }
        let before = std::fs::read(&path).unwrap();
        let list = |site| views(&Journal::open_copy(&path).unwrap(), None, &BTreeMap::new(), site).unwrap();
        let views = list(None);
        assert_eq!(views.len(), 1);
        assert_eq!((views[0].next, views[0].epoch), (NextStep::Refuse, 3));
        let b: SiteName = "b".parse().unwrap();
        let site = Site { name: &b, pool: folder.path() };
        assert_eq!(list(Some(site))[0].next, NextStep::Refuse, "it never ran here");
        let note = Generation { vm: attempt.vm.clone(), epoch: Epoch(3), owner: b.clone() };
        write_notes(&arriving_images(folder.path(), &attempt, &proposal()), &note).unwrap();
        assert_eq!(list(Some(site))[0].next, NextStep::Hold, "it has run here since this journal was copied");
        assert!(std::fs::read(&path).unwrap() == before, "the file was changed");
    }

    fn proposal() -> Proposal {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            [[disks]]\nname = \"root\"\nsize_bytes = 1048576\npci = \"03.0\"\n";
        Proposal {
            definition: toml::from_str(definition).unwrap(),
            home_site: "b".parse().unwrap(),
            hypervisor: "7.2".into(),
            epoch: Epoch(2),
            running: true,
            commit: CommitMode::Confirmed,
            nics: Vec::new(),
            carried: Vec::new(),
        }
    }
}
