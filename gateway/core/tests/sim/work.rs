//! What the gateways of the simulation are busy with, done: copies and guests. Questions to arbiters are asked elsewhere.

use longhaul_core::ids::Epoch;
use longhaul_core::migration::message::Refusal;
use longhaul_core::migration::{destination, source};

use crate::broken::Broken;
use crate::invariants::Violation;
use crate::parts::{Disk, Guest, Id, Names, Work, handover, proposal};
use crate::scene::A;
use crate::support;
use crate::world::World;

impl World {
    /// What is next for this driver is done.
    pub fn works(&mut self, site: usize, id: Id) -> Result<(), Violation> {
        if site == self.moves[&id].source { self.source_works(id) } else { self.destination_works(id) }
    }

    fn source_works(&mut self, id: Id) -> Result<(), Violation> {
        let site = self.moves[&id].source;
        let driver = self.sites[site].sources.get_mut(&id).expect("a driver with work");
        let Some(work) = driver.work.pop_front() else { return Ok(()) };
        let guest = self.sites[site].guest;
        let lost = matches!(guest, Guest::Dead | Guest::Gone);
        let event = match work {
            Work::Preflight | Work::Copy | Work::StopGuest | Work::SendRest if lost => {
                source::Event::Failed(Refusal::Hypervisor("QEMU is gone".into()))
            }
            Work::Preflight => self.checks(id),
            Work::Copy => {
                // Until it is stopped it reports again and again.
                self.sources_work(id, Work::Copy);
                if id.is_multiple_of(2) {
                    // An idle guest is stopped by its QEMU, not by its gateway.
                    self.sites[site].guest = Guest::Still;
                    source::Event::SwitchoverReached
                } else {
                    source::Event::Progress(support::converged())
                }
            }
            Work::StopGuest => {
                self.sites[site].guest = Guest::Still;
                source::Event::GuestStopped
            }
            Work::SendRest => {
                self.all_sent.insert(id, self.sites[site].disk.written);
                let driver = self.sites[site].sources.get_mut(&id).expect("it works");
                driver.work.retain(|work| !matches!(work, Work::Copy));
                source::Event::Parked(handover())
            }
            Work::Rollback(permit) => {
                if guest == Guest::Still && self.broken != Some(Broken::RollsBackWithoutResuming) {
                    self.resumes(site, permit.epoch())?;
                }
                self.rolled_back(id)?;
                source::Event::RolledBack
            }
            Work::Release => {
                self.sites[site].guest = Guest::Gone;
                source::Event::TidiedUp
            }
            Work::Ask(request) => {
                self.looks_for_what_was_offered(id, guest);
                source::Event::Arbiter(self.arbitrates(site, id, request)?)
            }
            Work::Prepare | Work::Load | Work::Activate(_) | Work::Discard | Work::Check => return Ok(()),
        };
        self.source(id, event);
        Ok(())
    }

    /// What is asked with a dead guest must not bring it back from a destination that has it whole.
    fn looks_for_what_was_offered(&mut self, id: Id, guest: Guest) {
        if guest == Guest::Dead && self.broken != Some(Broken::AsksForTheDead) {
            self.source(id, source::Event::GuestLost);
        }
    }

    /// Before anything is proposed: the name is at its home and can be moved, and so can the arbiter's register.
    fn checks(&self, id: Id) -> source::Event {
        let attempt = &self.moves[&id];
        let name_is_here = self.name_server.site == A && self.name_server.epoch < attempt.epoch;
        let anchor = self.sites[attempt.source].journal.anchor.as_ref();
        // An anchor that is replaced owes nothing any more.
        let is_owed = anchor.is_some_and(|anchor| anchor.names == Names::Owed);
        if attempt.source == A && (!name_is_here || is_owed) {
            return source::Event::Failed(Refusal::Names("it does not point at the machine".into()));
        }
        let seen = self.sites[attempt.source].journal.seen;
        if self.arbiter(attempt.commit).is_some_and(|it| it.epoch >= attempt.epoch || it.epoch < seen) {
            return source::Event::Failed(Refusal::Other("the register cannot decide".into()));
        }
        source::Event::PreflightPassed(proposal(Epoch(attempt.epoch.0 - 1), attempt.commit))
    }

    fn destination_works(&mut self, id: Id) -> Result<(), Violation> {
        let site = self.moves[&id].destination;
        let sent = self.all_sent.get(&id).copied();
        let state = &mut self.sites[site];
        let driver = state.destinations.get_mut(&id).expect("a driver with work");
        let Some(work) = driver.work.pop_front() else { return Ok(()) };
        let event = match work {
            Work::Prepare => {
                driver.work.push_back(Work::Load);
                destination::Event::Prepared
            }
            Work::Load => {
                let Some(written) = sent else {
                    driver.work.push_back(Work::Load);
                    return Ok(());
                };
                let unflushed = self.broken == Some(Broken::LoadsBeforeItFlushes);
                state.disk = Disk { written, stable: if unflushed { 0 } else { written } };
                (state.guest, state.found_dead) = (Guest::Still, false);
                destination::Event::Loaded
            }
            Work::Activate(permit) => {
                self.came_back(site, id);
                if self.sites[site].guest == Guest::Still {
                    self.resumes(site, permit.epoch())?;
                }
                destination::Event::Activated
            }
            Work::Discard => {
                // What was not made for this attempt is not its to end.
                if state.held.remove(&id) {
                    state.guest = Guest::Gone;
                }
                destination::Event::Discarded
            }
            Work::Check if state.guest == Guest::Still => destination::Event::Stands,
            Work::Check => destination::Event::Failed(Refusal::Hypervisor("QEMU is gone".into())),
            Work::Ask(request) => destination::Event::Arbiter(self.arbitrates(site, id, request)?),
            Work::Preflight
            | Work::Copy
            | Work::StopGuest
            | Work::SendRest
            | Work::Rollback(_)
            | Work::Release => {
                return Ok(());
            }
        };
        self.destination(id, event);
        Ok(())
    }
}
