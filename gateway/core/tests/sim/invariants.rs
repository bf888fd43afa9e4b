//! What must hold after every event, and once everything is well again. Each by its name.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};

use crate::parts::{Guest, Id, Packet};
use crate::world::{A, B, World};

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub detail: String,
}

impl Violation {
    pub fn new(invariant: &'static str, detail: impl Into<String>) -> Self {
        Self { invariant, detail: detail.into() }
    }
}

impl World {
    /// Violates `invariant` unless `holds`; a test of one invariant asks for no other.
    fn must(
        &self,
        invariant: &'static str,
        holds: bool,
        detail: impl FnOnce() -> String,
    ) -> Result<(), Violation> {
        if holds || self.only.is_some_and(|only| only != invariant) {
            return Ok(());
        }
        Err(Violation::new(invariant, detail()))
    }

    /// After every event.
    pub fn check(&self) -> Result<(), Violation> {
        let [a, b] = &self.sites;
        let both = a.guest == Guest::Running && b.guest == Guest::Running;
        self.must("never_two_running", !both, String::new)?;
        let both = a.journal.is_here() && b.journal.is_here();
        self.must("never_two_owners", !both, String::new)?;
        for (id, records) in &a.journal.records {
            if let Some(Record::Source(SourceRecord::Returned { .. })) = records.last() {
                let refused = matches!(
                    b.journal.last(*id),
                    Some(Record::Destination(DestinationRecord::Refused { .. }))
                );
                self.must("unknown_is_not_refused", refused, || format!("attempt {id}"))?;
            }
        }
        Ok(())
    }

    /// A guest is resumed with a permit of `epoch`.
    pub fn resumes(&mut self, site: usize, epoch: Epoch) -> Result<(), Violation> {
        self.sites[site].guest = Guest::Running;
        let here = self.sites[site].journal.is_here();
        self.must("no_resume_without_permit", here, || format!("site {site}, epoch {epoch}"))
    }

    /// A machine whose memory is known to be lost here is not taken: the source still has it.
    pub fn takes_what_is_there(&self, site: usize, record: &Record) -> Result<(), Violation> {
        let takes = matches!(record, Record::Destination(DestinationRecord::Activated { .. }));
        let lost = takes && self.sites[site].found_dead;
        self.must("no_lost_memory_is_taken", !lost, || "activated without a QEMU".into())
    }

    pub fn rolled_back(&self, id: Id) -> Result<(), Violation> {
        let newest = self.sites[A].journal.records.keys().max().is_none_or(|newest| *newest <= id);
        let runs = matches!(self.sites[A].guest, Guest::Running | Guest::Dead);
        self.must("rollback_leaves_source_running", runs || !newest, || format!("attempt {id}"))
    }

    /// Something is said: the record it follows from is on disk.
    pub fn said(&self, from: usize, packet: &Packet) -> Result<(), Violation> {
        let last = self.sites[from].journal.last(packet.id);
        let on_disk = match &packet.message {
            MigrationMessage::Commit { .. } => {
                matches!(last, Some(Record::Source(SourceRecord::Committed { .. })))
            }
            MigrationMessage::Reserve { .. } => matches!(last, Some(Record::Source(_))),
            MigrationMessage::Abort { .. } => matches!(
                last,
                Some(Record::Source(SourceRecord::Aborted { .. } | SourceRecord::Returned { .. }))
            ),
            MigrationMessage::Loaded { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Loaded)))
            }
            MigrationMessage::Activated { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Activated { .. })))
            }
            MigrationMessage::Refused { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Refused { .. })))
            }
            MigrationMessage::TakenBack { .. } => {
                matches!(last, Some(Record::Source(SourceRecord::TakenBack { .. })))
            }
            MigrationMessage::Reserved(_) => matches!(last, Some(Record::Destination(_))),
            MigrationMessage::Propose(_)
            | MigrationMessage::Accept
            | MigrationMessage::Decline(_)
            | MigrationMessage::Unknown => true,
        };
        self.must("journal_precedes_message", on_disk, || format!("{:?} after {last:?}", packet.message))
    }

    /// Everything was mended some time ago.
    pub fn check_settled(&self) -> Result<(), Violation> {
        let [a, b] = &self.sites;
        let running = [a, b].iter().filter(|site| site.guest == Guest::Running).count();
        self.must("exactly_one_runs_once_healed", running == 1, || {
            format!("{:?} {:?}; {:#?} {:#?}", a.guest, b.guest, a.sources, b.destinations)
        })?;
        let held = b.held.is_empty() && b.destinations.is_empty();
        self.must("nothing_reserved_once_settled", held, || format!("{:?} {:#?}", b.held, b.destinations))?;
        let told = a.sources.is_empty();
        self.must("everybody_knows_once_settled", told, || format!("{:#?}", a.sources))?;
        let owner = if b.guest == Guest::Running { B } else { A };
        self.must("dns_points_at_the_owner_once_settled", self.name_server.site == owner, || {
            format!("{:?}, {:?}", self.name_server, a.journal.anchor)
        })
    }
}
