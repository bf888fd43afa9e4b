//! An operator who decides where a site is gone for good: he destroys it, says so, and its machine goes on elsewhere.
//!
//! He tells the truth. What a site says that comes back although it was said to be destroyed is the core's own test
//! (`migration/resolve.rs`).

use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::resolve::{Keep, Resolution, resolution};
use longhaul_core::migration::{destination, source};

use crate::broken::Broken;
use crate::invariants::Violation;
use crate::parts::{Guest, Id, Site, VM, handover, name};
use crate::world::World;

impl World {
    /// Where a move waits for a site that does not answer.
    pub fn resolve(&mut self, number: usize) -> Result<(), Violation> {
        let waits = |(site, id, _): &(usize, Id, &Record)| self.waits_for_the_other(*site, *id);
        let Some((site, id, last)) = self.last_records().find(waits) else { return Ok(()) };
        let (last, peer) = (last.clone(), self.moves[&id].peer_of(site));
        match last {
            Record::Source(SourceRecord::Committed { .. }) => {
                self.destroy(peer, site)?;
                self.source(id, source::Event::Resolved(decided(&last, Keep::Here, peer)));
            }
            Record::Destination(DestinationRecord::Loaded) if number.is_multiple_of(2) => {
                let theirs = decided(&last, Keep::There, peer);
                self.destination(id, destination::Event::Resolved(theirs, handover()));
            }
            Record::Destination(DestinationRecord::Loaded) => {
                self.destroy(peer, site)?;
                // Nobody else is left who owes the name.
                self.name_server.correct(site, self.moves[&id].epoch);
                let ours = decided(&last, Keep::Here, peer);
                self.destination(id, destination::Event::Resolved(ours, handover()));
            }
            Record::Source(_) | Record::Destination(_) => {}
        }
        // He says it until the journal has it: nobody else is left who could.
        self.sync(site, id)
    }

    /// A driver is there, has nothing to write, and takes its link for cut.
    fn waits_for_the_other(&self, site: usize, id: Id) -> bool {
        let state = &self.sites[site];
        let source = state.sources.get(&id).is_some_and(|driver| driver.unsynced.is_none());
        let destination = state.destinations.get(&id).is_some_and(|driver| driver.unsynced.is_none());
        let cut = self.noticed_down[site][self.moves[&id].peer_of(site)];
        let decides = matches!(
            state.journal.last(id),
            Some(
                Record::Source(SourceRecord::Committed { .. })
                    | Record::Destination(DestinationRecord::Loaded)
            )
        );
        cut && decides && (source || destination)
    }

    /// Host, disks and journal. What the machine wrote there is lost, and the operator knows.
    fn destroy(&mut self, site: usize, kept: usize) -> Result<(), Violation> {
        if self.broken == Some(Broken::DestroysNothing) {
            return Ok(());
        }
        self.crash(site, 0)?;
        let refused: Vec<Id> = self.moves.keys().copied().filter(|id| self.refused(*id)).collect();
        self.refused_before.extend(refused);
        self.sites[site] = Site { up: false, ..Site::new(Guest::Gone) };
        self.flushed = self.sites[kept].disk.written;
        Ok(())
    }
}

fn decided(last: &Record, keep: Keep, peer: usize) -> Resolution {
    resolution(last, keep, Some(name(peer)), &VM, name(peer), false).expect("what waits is decided")
}
