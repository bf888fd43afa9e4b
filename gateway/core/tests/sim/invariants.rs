//! What must hold after every event, and once everything is well again. Each by its name.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};

use crate::parts::{Guest, Id, Site};
use crate::world::World;

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
        Err(Violation::new(invariant, if self.terse { String::new() } else { detail() }))
    }

    /// After every event.
    pub fn check(&self) -> Result<(), Violation> {
        self.must("never_two_running", self.running().count() <= 1, || self.guests())?;
        let owners = self.sites.iter().filter(|site| site.journal.is_here()).count();
        self.must("never_two_owners", owners <= 1, || self.owners())?;
        for (site, id, last) in self.last_records() {
            if let Record::Source(SourceRecord::Returned { .. }) = last {
                let won = self.has_won(site, id);
                self.must("unknown_is_not_refused", won || self.refused(id), || format!("attempt {id}"))?;
            }
        }
        Ok(())
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.sites.len()).filter(|site| self.sites[*site].guest == Guest::Running)
    }

    fn guests(&self) -> String {
        format!("{:?}", self.sites.iter().map(|site| site.guest).collect::<Vec<_>>())
    }

    fn owners(&self) -> String {
        format!("{:?}", self.sites.iter().map(|site| site.journal.owner.as_ref()).collect::<Vec<_>>())
    }

    /// How every attempt stands at both its sites.
    pub fn last_records(&self) -> impl Iterator<Item = (usize, Id, &Record)> {
        let sites = self.sites.iter().enumerate();
        sites.flat_map(|(at, site)| {
            let records = site.journal.records.iter();
            records.filter_map(move |(id, records)| Some((at, *id, records.last()?)))
        })
    }

    pub fn refused(&self, id: Id) -> bool {
        let durably = matches!(
            self.sites[self.moves[&id].destination].journal.last(id),
            Some(Record::Destination(
                DestinationRecord::Refused { .. } | DestinationRecord::HandedBack { .. }
            ))
        );
        durably || self.refused_before.contains(&id)
    }

    /// With an arbiter: its register gave the attempt's epoch to `site`, whatever came after.
    fn has_won(&self, site: usize, id: Id) -> bool {
        let attempt = &self.moves[&id];
        self.arbiter(attempt.commit).is_some_and(|register| register.gave(site, attempt.epoch))
    }

    /// An offered machine runs where the register says, or where the other side has given it up.
    fn won_before_it_runs(&self, site: usize, epoch: Epoch) -> Result<(), Violation> {
        let records = |id: &Id| self.sites[self.moves[id].source].journal.records.get(id);
        let newest = self.moves.iter().rfind(|(id, each)| each.epoch == epoch && records(id).is_some());
        let offered = |record: &Record| matches!(record, Record::Source(SourceRecord::Offered { .. }));
        let Some((id, attempt)) = newest else { return Ok(()) };
        let Some(records) = records(id).filter(|records| records.iter().any(offered)) else {
            return Ok(());
        };
        let given_up = if site == attempt.source {
            self.refused(*id)
        } else {
            let promised = |record: &Record| {
                matches!(
                    record,
                    Record::Source(SourceRecord::Promised { .. } | SourceRecord::Committed { .. })
                )
            };
            site == attempt.destination && records.iter().any(promised)
        };
        let won = self.has_won(site, *id);
        self.must("nobody_runs_before_it_won", given_up || won, || {
            format!("site {site}, epoch {epoch}: {:?}", self.arbiter(attempt.commit))
        })
    }

    /// The WAN has been cut for some time, and all reach the arbiter.
    pub fn check_partitioned(&self) -> Result<(), Violation> {
        let away = |site: &Site| matches!(site.journal.owner, Some(Ownership::Away { .. }));
        let lost = self.sites.iter().any(|site| site.guest == Guest::Dead && !away(site));
        let holds = self.running().count() == 1 || lost || self.waits_in_a_cut();
        self.must("somebody_runs_in_a_partition", holds, || self.everything())
    }

    /// Refused by a word that was lost in the cut, after a promise: only the other site knows. Or without an arbiter:
    /// given away, and nobody has heard it.
    fn waits_in_a_cut(&self) -> bool {
        self.last_records().any(|(_, id, last)| {
            let given = matches!(
                last,
                Record::Source(SourceRecord::Promised { .. } | SourceRecord::Committed { .. })
            );
            given && (self.refused(id) || !self.moves[&id].commit.is_arbitrated())
        })
    }

    fn everything(&self) -> String {
        let drivers: Vec<_> = self.sites.iter().map(|site| (&site.sources, &site.destinations)).collect();
        format!("{} {} {:?} {drivers:#?}", self.guests(), self.owners(), self.moves)
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

    /// A machine whose memory is known to be lost here is not taken, nor asked for: the other side has it still.
    pub fn takes_what_is_there(&self, site: usize, record: &Record) -> Result<(), Violation> {
        let takes = matches!(
            record,
            Record::Destination(DestinationRecord::Activated { .. })
                | Record::Source(SourceRecord::Reclaiming { .. })
        );
        let lost = takes && self.sites[site].found_dead && self.sites[site].guest == Guest::Dead;
        self.must("no_lost_memory_is_taken", !lost, || format!("{} without a QEMU", record.name()))
    }

    /// A register that is behind what `site` has seen in it is not changed by it.
    pub fn believes_nothing_older(&self, site: usize, held: Epoch, changed: bool) -> Result<(), Violation> {
        let seen = self.sites[site].journal.seen;
        self.must("a_register_put_back_decides_nothing", held >= seen || !changed, || {
            format!("site {site} changed epoch {held}, and has seen {seen}")
        })
    }

    pub fn rolled_back(&self, id: Id) -> Result<(), Violation> {
        let site = &self.sites[self.moves[&id].source];
        let newest = site.journal.records.keys().max().is_none_or(|newest| *newest <= id);
        let runs = matches!(site.guest, Guest::Running | Guest::Dead);
        self.must("rollback_leaves_source_running", runs || !newest, || format!("attempt {id}"))
    }

    /// Something is said: the record it follows from is on disk.
    pub fn said(&self, from: usize, id: Id, message: &MigrationMessage) -> Result<(), Violation> {
        let last = self.sites[from].journal.last(id);
        let on_disk = match message {
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
            MigrationMessage::Abort { .. } => {
                // Behind a pipelined Commit it asks: what was on its way is lost.
                let asks = matches!(last, Some(Record::Source(SourceRecord::Committed { .. })))
                    && self.moves[&id].commit == CommitMode::Pipelined;
                asks || matches!(
                    last,
                    Some(Record::Source(
                        SourceRecord::Aborted { .. }
                            | SourceRecord::Returned { .. }
                            | SourceRecord::Settled
                            | SourceRecord::TakenBack { .. }
                    ))
                )
            }
            MigrationMessage::Loaded { .. } => {
                matches!(last, Some(Record::Destination(DestinationRecord::Loaded)))
            }
            MigrationMessage::Activated { .. } => {
                matches!(
                    last,
                    Some(Record::Destination(
                        DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. }
                    ))
                )
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
        self.must("journal_precedes_message", on_disk, || format!("{message:?} after {last:?}"))
    }

    /// Everything was mended some time ago.
    pub fn check_settled(&self) -> Result<(), Violation> {
        let running = self.running().count();
        self.must("exactly_one_runs_once_healed", running == 1, || self.everything())?;
        let quiet = self.sites.iter().all(|site| site.held.is_empty() && site.destinations.is_empty());
        self.must("nothing_reserved_once_settled", quiet, || self.everything())?;
        let told = self.sites.iter().all(|site| site.sources.is_empty());
        self.must("everybody_knows_once_settled", told, || self.everything())?;
        let left = self.sites.iter().any(|site| site.guest == Guest::Still);
        self.must("no_copy_is_left_once_settled", !left, || self.everything())?;
        let elsewhere =
            |site: usize| self.sites[site].journal.anchor.as_ref().is_some_and(|anchor| anchor.peer != site);
        let attracted = self.running().any(elsewhere);
        self.must("its_addresses_are_its_own_once_settled", !attracted, || self.anchors())?;
        let follows = self.running().any(|owner| owner == self.name_server.site);
        self.must("dns_points_at_the_owner_once_settled", follows, || {
            format!("{:?}, {}", self.name_server, self.anchors())
        })
    }

    fn anchors(&self) -> String {
        let anchors: Vec<_> = self.sites.iter().map(|site| &site.journal.anchor).collect();
        format!("{}, {anchors:?}", self.guests())
    }
}
