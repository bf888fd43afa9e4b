//! The TTL of a name whose machine stayed: who undoes a move restores it once, and where that fails it is tried here until
//! it is done.
//!
//! Not of a machine that has left: that is its anchor's. Nothing is tried while a move of the machine is under way, which
//! lowers the TTL itself.

use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::migration::ledger::Ownership;
use tokio::task::{JoinError, JoinSet};

use super::Daemon;
use crate::migration::{MachineRow, chain};

/// Between two tries.
pub(super) const AGAIN: Duration = Duration::from_secs(60);

impl Daemon {
    /// Tries every TTL that is owed; each task ends with the machine whose name has it again.
    pub(super) fn restore_ttls(&self, restoring: &mut JoinSet<Option<VmName>>) {
        let Some(names) = &self.edges.names else { return };
        for (vm, row) in self.edges.journal.machines::<MachineRow>().unwrap_or_default() {
            let (Some(name), Some(ttl_s)) = (row.definition.dns_name.clone(), self.owed_ttl_s(&row)) else {
                continue;
            };
            let names = names.clone();
            restoring.spawn(async move {
                match names.set_ttl(&name, ttl_s).await {
                    Ok(()) => {
                        tracing::info!(%vm, name, ttl_s, "TTL restored");
                        Some(vm)
                    }
                    Err(error) => {
                        tracing::debug!(%vm, name, ttl_s, error = chain(&error), "TTL could not be restored yet");
                        None
                    }
                }
            });
        }
    }

    /// The TTL that a move which was undone owes to the name of a machine here, in seconds.
    pub(super) fn owed_ttl_s(&self, row: &MachineRow) -> Option<u32> {
        let vm = &row.definition.name;
        let is_here = matches!(self.edges.journal.ownership(vm), Ok(Some(Ownership::Here { .. })));
        row.ttl_before_s.filter(|_| is_here && self.migration_of(vm).is_none())
    }

    pub(super) fn on_ttl_restored(&mut self, restored: Result<Option<VmName>, JoinError>) {
        // A move that has begun meanwhile has lowered it again, perhaps.
        let Ok(Some(vm)) = restored else { return };
        if self.migration_of(&vm).is_some() {
            return;
        }
        let restored = |row: &mut MachineRow| row.ttl_before_s = None;
        if let Err(error) = self.edges.journal.change_machine(&vm, restored) {
            return tracing::warn!(%vm, error = chain(&error), "the restored TTL could not be written down");
        }
        if let Some(machine) = self.machines.get_mut(&vm) {
            restored(&mut machine.row);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longhaul_core::ids::Epoch;

    use super::*;
    use crate::identity::Identity;
    use crate::migration::Edges;
    use crate::test_site::{TestSite, machine_row, names_of, silent_names};

    #[tokio::test]
    async fn a_ttl_that_an_undone_move_could_not_restore_is_owed_until_its_name_server_answers() {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (_server, names) = names_of("web1 5 IN A 198.51.100.10\n").await;
        let (names, vm) = (Arc::new(names), "web1".parse::<VmName>().unwrap());
        let mut row = MachineRow { ttl_before_s: Some(3600), ..machine_row(&site.edges) };
        row.definition.dns_name = Some("web1.vm.example".to_owned());
        site.edges.journal.put_machine(&vm, &row).unwrap();
        site.edges.journal.define(&vm, &Ownership::Here { epoch: Epoch(1) }).unwrap();
        let owed = || site.edges.journal.machine::<MachineRow>(&vm).unwrap().unwrap().ttl_before_s;
        for (answers, left) in [(Arc::new(silent_names()), Some(3600)), (names.clone(), None)] {
            let mut daemon = Daemon::idle(Edges { names: Some(answers), ..site.edges.clone() });
            assert_eq!(daemon.owed_ttl_s(&row), Some(3600));
            let mut restoring = JoinSet::new();
            daemon.restore_ttls(&mut restoring);
            daemon.on_ttl_restored(restoring.join_next().await.expect("one is owed"));
            assert_eq!(owed(), left);
        }
        assert_eq!(names.ttl_s("web1.vm.example").await.unwrap(), 3600);
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(2) };
        site.edges.journal.define(&vm, &away).unwrap();
        assert_eq!(Daemon::idle(site.edges.clone()).owed_ttl_s(&row), None, "its anchor restores it");
    }
}
