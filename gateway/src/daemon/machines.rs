//! Machines of this site: define, forget, find again. What waits for a QEMU stands in `power`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use longhaul_core::ids::VmName;
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::generation::{Generation, behind, may_define};
use longhaul_core::migration::ledger::{MayNotRun, Ownership};
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::oneshot;

use super::{Daemon, Machine};
use crate::api::{Request, RequestError};
use crate::generation::{NoteError, arrivals, read_note, read_notes};
use crate::hypervisor::{DiskFormat, Guest, HypervisorError, parse_definition};
use crate::migration::anchor::{AnchorCommand, tell};
use crate::migration::{Adopted, Edges, MachineRow, look};

/// A machine that nothing starts here, and what to do about it.
pub(super) struct Held {
    pub why: String,
    pub remedy: String,
}

impl Daemon {
    /// Answers one API request.
    pub(super) async fn on_request(&mut self, request: Request) {
        // An asker that went away needs no answer.
        match request {
            Request::Status(reply) => self.status(reply),
            Request::Define(body, reply) => self.define(*body, reply),
            Request::Adopt(body, reply) => self.adopt(*body, reply),
            Request::Start(vm, reply) => {
                self.forget_restart(&vm);
                self.start(&vm, reply);
            }
            Request::Stop(vm, reply) => self.stop(&vm, reply),
            Request::Undefine(vm, forget, reply) => drop(reply.send(self.undefine(&vm, forget).await)),
            Request::Flows(vm, reply) => self.flows(&vm, reply),
            Request::Release(vm, reply) => self.release(&vm, reply).await,
            Request::Moved(vm, body, reply) => self.moved(&vm, body.to, reply).await,
            Request::Discard(vm, reply) => drop(reply.send(self.discard(&vm))),
            Request::DiscardKept(vm, reply) => drop(reply.send(self.discard_kept(&vm))),
            Request::Migrate(body, reply) => drop(reply.send(self.migrate(body).await)),
            Request::Migration(id, reply) => drop(reply.send(self.migration(id))),
            Request::Abort(id, reply) => drop(reply.send(self.abort(id).await)),
            Request::LimitPeer(peer, body, reply) => drop(reply.send(self.limit_peer(&peer, body).await)),
            Request::LimitMigration(id, body, reply) => {
                drop(reply.send(self.limit_migration(id, body).await))
            }
            Request::MayRun(vm, reply) => drop(reply.send(self.may_run(&vm))),
            Request::Doctor(vm, reply) => self.doctor(vm, reply),
            Request::Journal(vm, reply) => self.journal(vm, reply),
            Request::Resolve(vm, body, reply) => self.resolve(&vm, &body, reply).await,
            Request::Metrics(reply) => drop(reply.send(self.metrics())),
        }
    }

    /// No other machine of this site has one of these images.
    pub(super) fn expect_free(&self, images: &[PathBuf]) -> Result<(), RequestError> {
        let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
        let mut taken: BTreeMap<PathBuf, VmName> = BTreeMap::new();
        for (vm, row) in self.edges.journal.machines::<MachineRow>().map_err(|error| failed(&error))? {
            // What a machine that left had is set aside under another name.
            if !matches!(self.edges.journal.ownership(&vm), Ok(Some(Ownership::Away { .. }))) {
                taken.extend(row.images.iter().map(|image| (real(image), vm.clone())));
            }
        }
        let mut given = BTreeSet::new();
        for image in images {
            if let Some(vm) = taken.get(&real(image)) {
                let text = format!(
                    "Image {} is a disk of machine {vm}; two machines on one disk destroy it",
                    image.display()
                );
                return Err(RequestError::Conflict(text));
            }
            if !given.insert(real(image)) {
                return Err(RequestError::Invalid(format!("Image {} was given twice", image.display())));
            }
        }
        Ok(())
    }

    pub(super) fn expect_unknown(&self, vm: &VmName) -> Result<(), RequestError> {
        self.expect_idle(vm)?;
        match self.edges.journal.ownership(vm) {
            Ok(None) => Ok(()),
            Ok(Some(Ownership::Here { .. })) => Err(RequestError::Conflict(format!(
                "Machine {vm} is defined; `longhaul vm undefine {vm}` forgets it"
            ))),
            Ok(Some(Ownership::Away { site, .. })) => Err(RequestError::Conflict(format!(
                "Machine {vm} left for site {site}; `longhaul vm undefine {vm} --forget` forgets that it was here"
            ))),
            Ok(Some(Ownership::Arriving { .. })) => {
                Err(RequestError::Conflict(format!("Machine {vm} is just arriving here")))
            }
            Ok(Some(Ownership::Offered { site, .. })) => {
                Err(RequestError::Conflict(format!("Machine {vm} is just being handed over to site {site}")))
            }
            Err(error) => Err(RequestError::Failed(error.to_string())),
        }
    }

    pub(super) fn know(
        &mut self,
        definition: MachineDefinition,
        images: Vec<PathBuf>,
        adopted: Option<Adopted>,
        guest: Option<Guest>,
    ) -> Result<(), RequestError> {
        let vm = definition.name.clone();
        let row = MachineRow {
            definition,
            images,
            home_site: self.edges.site().clone(),
            wanted: guest.is_some(),
            settled_in: None,
            adopted,
            came_from: None,
            care_of: Vec::new(),
            carried: Vec::new(),
            over: Vec::new(),
            handover: None,
            ttl_before_s: None,
        };
        let failed = |error: crate::journal::JournalError| RequestError::Failed(error.to_string());
        let epoch = self.edges.journal.first_epoch(&vm).map_err(failed)?;
        // First what `vm undefine` asks for: whatever a full disk or a crash leaves of this can be undone by it.
        self.edges.journal.define(&vm, &Ownership::Here { epoch }).map_err(failed)?;
        self.edges.journal.put_machine(&vm, &row).map_err(failed)?;
        tracing::info!(%vm, "machine defined");
        self.machines.insert(vm.clone(), Machine { row, guest, silent: false });
        self.watch(&vm);
        Ok(())
    }

    async fn undefine(&mut self, vm: &VmName, forget: bool) -> Result<(), RequestError> {
        let ownership = self.ownership(vm)?;
        expect_forgettable(vm, &ownership, forget)?;
        self.expect_idle(vm)?;
        // The monitor of one that was adopted may be its operator's again.
        let is_silent = |machine: &Machine| machine.silent && machine.row.adopted.is_none();
        if self.machines.get(vm).is_some_and(is_silent) {
            return Err(silent(vm));
        }
        let running = self.machines.get(vm).is_some_and(|machine| machine.guest.is_some());
        if running && matches!(ownership, Ownership::Here { .. }) {
            return Err(RequestError::Conflict(format!("Machine {vm} runs; stop it first")));
        }
        self.forget_restart(vm);
        self.forget_retries(vm);
        self.end_anchor(vm).await;
        if let Some(row) = self.row(vm) {
            leave_network(&self.edges, &row).await;
        }
        self.machines.remove(vm);
        crate::migration::remembered::forget(&self.edges, vm);
        if let Err(error) = self.edges.hypervisor.remove_dir(vm) {
            tracing::warn!(%vm, error = crate::migration::chain(&error), "the folder of its QEMU could not be removed");
        }
        self.edges.journal.remove_machine(vm).map_err(|error| failed(&error))
    }

    /// Nobody works on the machine: no migration, and no task that starts or stops it.
    pub(super) fn expect_idle(&self, vm: &VmName) -> Result<(), RequestError> {
        if self.migration_of(vm).is_some() {
            return Err(MayNotRun::Moving(vm.clone()).into());
        }
        if self.working.contains(vm) {
            return Err(RequestError::Conflict(format!(
                "Machine {vm} is just being started, stopped or adopted"
            )));
        }
        Ok(())
    }

    /// Nothing is left of an anchor that could keep packets from a machine that is defined again.
    async fn end_anchor(&self, vm: &VmName) {
        let (done, ended) = oneshot::channel();
        tell(&self.anchors, AnchorCommand::End(vm.clone(), done)).await;
        // Anchors that are gone hold nothing any more.
        drop(ended.await);
    }

    /// What the journal says of a machine, here or away.
    pub(super) fn row(&self, vm: &VmName) -> Option<MachineRow> {
        self.edges.journal.machine(vm).unwrap_or_default()
    }

    pub(super) fn ownership(&self, vm: &VmName) -> Result<Ownership, RequestError> {
        match self.edges.journal.ownership(vm) {
            Ok(Some(ownership)) => Ok(ownership),
            Ok(None) => Err(no_machine(vm)),
            Err(error) => Err(RequestError::Failed(error.to_string())),
        }
    }

    fn may_run(&self, vm: &VmName) -> Result<(), RequestError> {
        self.expect_idle(vm)?;
        // The permit is not given away: whoever asks starts the machine by other means.
        let notes = self.machines.get(vm).map(|machine| notes(&self.edges, &machine.row)).transpose()?;
        self.ownership(vm)?.permit(vm, None, &notes.unwrap_or_default()).map(drop)?;
        Ok(())
    }

    /// What the journal says of `vm` now, after something has happened to it, and the QEMU it runs in.
    pub(super) async fn refresh(&mut self, vm: &VmName, guest: Option<Guest>) {
        let ownership = self.edges.journal.ownership(vm).unwrap_or_default();
        let before = self.machines.remove(vm);
        if !matches!(ownership, Some(Ownership::Here { .. })) {
            return;
        }
        let Some(row) = self.row(vm) else { return };
        let known = open([guest, before.and_then(|machine| machine.guest)], |guest| guest.qmp().is_closed());
        let found = match known {
            Some(guest) => Ok(Some(guest)),
            None => self.look_for(&row).await,
        };
        self.take_up(row, found);
    }

    /// The QEMU of a machine, if it runs. An error: there is one that does not answer.
    pub(super) async fn look_for(&self, row: &MachineRow) -> Result<Option<Guest>, HypervisorError> {
        let vm = &row.definition.name;
        let found = look(&self.edges, row).await?;
        // One that is still coming, or has left, is not meant to run here.
        let ours = matches!(self.edges.journal.ownership(vm), Ok(Some(Ownership::Here { .. })));
        if found.is_none() && row.wanted && ours {
            tracing::warn!(%vm, "machine should run, but its QEMU is not there");
        }
        Ok(found)
    }
}

/// The handle that works, if there is one. A monitor has one client: the handle that exists is kept as long as it works,
/// and what a migration used that ended long ago may be of a QEMU that has left since.
fn open<G>(handles: [Option<G>; 2], is_closed: impl Fn(&G) -> bool) -> Option<G> {
    handles.into_iter().flatten().find(|handle| !is_closed(handle))
}

/// No disk is of a machine that another site owns, or newer than what is known here.
pub(super) fn expect_current(edges: &Edges, vm: &VmName, images: &[PathBuf]) -> Result<(), RequestError> {
    let first = edges.journal.first_epoch(vm).map_err(|error| failed(&error))?;
    for image in images {
        let Some(note) = read_note(image).map_err(|error| failed(&error))? else { continue };
        if let Err(stale) = may_define(&note, vm, first, edges.site()) {
            let text = format!("{}: {stale}; {}", image.display(), stale.remedy());
            return Err(RequestError::Conflict(text));
        }
    }
    Ok(())
}

/// Why nothing starts a machine here, although the ledger says that it is this site's.
pub(super) fn held(edges: &Edges, row: &MachineRow) -> Option<Held> {
    let vm = &row.definition.name;
    let ownership = edges.journal.ownership(vm).unwrap_or_default()?;
    let notes = match all_notes(edges, row) {
        Ok(notes) => notes,
        Err(error) => {
            let remedy = "repair that file, or remove it if this is the newest copy there is".to_owned();
            return Some(Held { why: crate::migration::chain(&error), remedy });
        }
    };
    let stale = behind(&ownership, vm, &notes).err()?;
    Some(Held { why: stale.to_string(), remedy: stale.remedy() })
}

/// What stands beside a machine's disks.
pub(super) fn notes(edges: &Edges, row: &MachineRow) -> Result<Vec<Generation>, RequestError> {
    all_notes(edges, row).map_err(|error| failed(&error))
}

/// Also beside disks in the pool with which it came and of which the row does not know.
fn all_notes(edges: &Edges, row: &MachineRow) -> Result<Vec<Generation>, NoteError> {
    let mut notes = read_notes(&row.images)?;
    notes.extend(arrivals(&edges.config.storage.pool, &row.definition.name, edges.site()));
    Ok(notes)
}

/// Takes down what this gateway has made on the host for a machine that does not run.
pub(super) async fn leave_network(edges: &Edges, row: &MachineRow) {
    let vm = &row.definition.name;
    let tunnel = &edges.tunnel;
    for nic in &row.definition.nics {
        let key = PortKey { machine: vm.clone(), nic: nic.name.clone() };
        // The tap goes last: the rules name it.
        let undone = [
            tunnel.visit_undo(key.clone()).await,
            tunnel.carry_undo(key.clone()).await,
            tunnel.sample_end(key.clone()).await,
            tunnel.remove_tap(key).await,
        ];
        for error in undone.into_iter().filter_map(Result::err) {
            tracing::warn!(%vm, nic = %nic.name, error = crate::migration::chain(&error), "part of the machine's network was not removed");
        }
    }
}

/// An image's format by its name: what is not called `.qcow2` is raw.
pub(super) fn format_of(path: &Path) -> DiskFormat {
    if path.extension().is_some_and(|extension| extension == "qcow2") {
        DiskFormat::Qcow2
    } else {
        DiskFormat::Raw
    }
}

pub(super) fn parse(text: &str) -> Result<MachineDefinition, RequestError> {
    parse_definition(text, Path::new("definition"))
        .map_err(|error| RequestError::Invalid(crate::migration::chain(&error)))
}

/// What keeps a machine that left from being started here is that it is known.
fn expect_forgettable(vm: &VmName, ownership: &Ownership, forget: bool) -> Result<(), RequestError> {
    match ownership {
        Ownership::Away { site, .. } if !forget => Err(RequestError::Conflict(format!(
            "Machine {vm} is at site {site}: once it is forgotten, nothing keeps it from being started here as well, \
             and two copies of one machine destroy its data; `longhaul vm undefine {vm} --forget` forgets it"
        ))),
        Ownership::Offered { site, .. } => Err(RequestError::Conflict(format!(
            "Machine {vm} is just being handed over to site {site}; wait until that has ended"
        ))),
        Ownership::Away { .. } | Ownership::Here { .. } | Ownership::Arriving { .. } => Ok(()),
    }
}

pub(super) fn silent(vm: &VmName) -> RequestError {
    RequestError::Conflict(format!(
        "QEMU of machine {vm} is there and does not answer; it is asked again. If it never does, end its process"
    ))
}

pub(super) fn no_machine(vm: &VmName) -> RequestError {
    RequestError::NotFound(format!("No machine {vm} at this site; `longhaul vm list` lists them"))
}

pub(super) fn failed(error: &dyn std::error::Error) -> RequestError {
    RequestError::Failed(crate::migration::chain(error))
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;

    use super::*;

    #[test]
    fn a_machine_that_is_away_is_forgotten_only_when_that_is_asked_for() {
        let vm: VmName = "web1".parse().unwrap();
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(1) };
        let refused = expect_forgettable(&vm, &away, false).unwrap_err().to_string();
        assert!(refused.contains("site b") && refused.contains("--forget"), "{refused}");
        assert!(expect_forgettable(&vm, &away, true).is_ok());
        assert!(expect_forgettable(&vm, &Ownership::Here { epoch: Epoch(1) }, false).is_ok());
    }
}
