//! What must hold after every event, and once everything is well again. Each by its name.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::CommitMode;
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
                let won = self.has_won(A, self.epochs[id]);
                self.must("unknown_is_not_refused", won || self.refused(*id), || format!("attempt {id}"))?;
            }
        }
        Ok(())
    }

    fn refused(&self, id: Id) -> bool {
        matches!(
            self.sites[B].journal.last(id),
            Some(Record::Destination(
                DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }
            ))
        )
    }

    /// With an arbiter: its register gave the epoch to `site`, whatever came after.
    fn has_won(&self, site: usize, epoch: Epoch) -> bool {
        let register = &self.name_server;
        self.commit != CommitMode::Confirmed
            && (register.epoch > epoch || (register.epoch == epoch && register.site == site))
    }

    /// An offered machine runs where the register says, or where the other side has given it up.
    fn won_before_it_runs(&self, site: usize, epoch: Epoch) -> Result<(), Violation> {
        let offered = |record: &Record| matches!(record, Record::Source(SourceRecord::Offered { .. }));
        let newest =
            |at: usize| self.sites[at].journal.records.iter().rfind(|(id, _)| self.epochs[id] == epoch);
        let Some((id, records)) = newest(A).filter(|(_, records)| records.iter().any(offered)) else {
            return Ok(());
        };
        let given_up = if site == A {
            self.refused(*id)
        } else {
            let promised = |record: &Record| {
                matches!(
                    record,
                    Record::Source(SourceRecord::Promised { .. } | SourceRecord::Committed { .. })
                )
            };
            records.iter().any(promised)
        };
        let won = self.has_won(site, epoch);
        self.must("nobody_runs_before_it_won", given_up || won, || {
            format!("site {site}, epoch {epoch}: {:?}", self.name_server)
        })
    }

    /// The WAN has been cut for some time, and both reach the arbiter.
    pub fn check_partitioned(&self) -> Result<(), Violation> {
        let [a, b] = &self.sites;
        let running = [a, b].iter().filter(|site| site.guest == Guest::Running).count();
        let lost = [a, b].iter().any(|site| site.guest == Guest::Dead);
        // Refused by a word that was lost in the cut, after a promise: only the other site knows.
        let promised = |records: &Vec<Record>| {
            matches!(
                records.last(),
                Some(Record::Source(SourceRecord::Promised { .. } | SourceRecord::Committed { .. }))
            )
        };
        let mut given = a.journal.records.iter().filter(|(_, records)| promised(records));
        let unheard = given.any(|(id, _)| self.refused(*id));
        self.must("somebody_runs_in_a_partition", running == 1 || lost || unheard, || {
            format!("{:?} {:?}; {:#?} {:#?}", a.guest, b.guest, a.sources, b.destinations)
        })
    }

    /// A guest is resumed with a permit of `epoch`.
    pub fn resumes(&mut self, site: usize, epoch: Epoch) -> Result<(), Violation> {
        self.sites[site].guest = Guest::Running;
        let (disk, flushed) = (self.sites[site].disk, self.flushed);
        self.must("flushed_writes_survive_power_loss", disk.written >= flushed, || {
            format!("site {site} runs on {disk:?}, {flushed} was flushed")
        })?;
        self.won_before_it_runs(site, epoch)?;
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
                matches!(
                    last,
                    Some(Record::Source(SourceRecord::Committed { .. } | SourceRecord::Promised { .. }))
                )
            }
            MigrationMessage::Offer { .. } => {
                matches!(last, Some(Record::Source(SourceRecord::Offered { .. })))
            }
            MigrationMessage::Reserve { .. } => matches!(last, Some(Record::Source(_))),
            MigrationMessage::Abort { .. } => matches!(
                last,
                Some(Record::Source(
                    SourceRecord::Aborted { .. } | SourceRecord::Returned { .. } | SourceRecord::Settled
                ))
            ),
            MigrationMessage::Loaded { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Loaded)))
            }
            MigrationMessage::Activated { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Activated { .. })))
            }
            MigrationMessage::Refused { .. } => {
                matches!(
                    last,
                    Some(Record::Destination(
                        DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }
                    ))
                )
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
