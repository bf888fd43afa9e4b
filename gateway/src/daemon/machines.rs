//! Machines of this site: define, adopt, start, stop, forget.
//!
//! Starting wants a permit, and the ledger gives one only for a machine that this site owns and that
//! is not moving.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use longhaul_core::ids::{DeviceName, VmName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::generation::{Generation, behind, may_define};
use longhaul_core::migration::ledger::{MayNotRun, Ownership};
use longhaul_core::migration::message::Reservation;
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::oneshot;

use super::{Daemon, Machine};
use crate::api::types::{AdoptRequest, DefineRequest};
use crate::api::{Request, RequestError};
use crate::generation::{read_note, read_notes};
use crate::hypervisor::{DiskFile, DiskFormat, Guest, Placement, RunState, StartMode, parse_definition};
use crate::migration::anchor::{AnchorCommand, tell, visits};
use crate::migration::{Adopted, MachineRow, TAP_OWNER};
use crate::tunnel::TunnelError;

const QEMU_LIMIT: Duration = Duration::from_secs(10);

/// A machine that nothing starts here, and what to do about it.
pub(super) struct Held {
    pub why: String,
    pub remedy: String,
}

/// The tap of each NIC.
type Ports = BTreeMap<DeviceName, String>;

impl Daemon {
    /// Answers one API request.
    pub(super) async fn on_request(&mut self, request: Request) {
        // An asker that went away needs no answer.
        match request {
            Request::Status(reply) => drop(reply.send(self.status().await)),
            Request::Define(body, reply) => drop(reply.send(self.define(&body))),
            Request::Adopt(body, reply) => drop(reply.send(self.adopt(&body).await)),
            Request::Start(vm, reply) => drop(reply.send(self.start(&vm).await)),
            Request::Stop(vm, reply) => drop(reply.send(self.stop(&vm).await)),
            Request::Undefine(vm, forget, reply) => drop(reply.send(self.undefine(&vm, forget).await)),
            Request::Discard(vm, reply) => drop(reply.send(self.discard(&vm))),
            Request::Migrate(body, reply) => drop(reply.send(self.migrate(body).await)),
            Request::Migration(id, reply) => drop(reply.send(self.migration(id))),
            Request::Abort(id, reply) => drop(reply.send(self.abort(id).await)),
            Request::MayRun(vm, reply) => drop(reply.send(self.may_run(&vm))),
            Request::Doctor(vm, reply) => drop(reply.send(self.doctor(vm).await)),
            Request::Journal(vm, reply) => drop(reply.send(self.journal(vm.as_ref()).await)),
            Request::Metrics(reply) => drop(reply.send(self.metrics())),
        }
    }

    fn define(&mut self, request: &DefineRequest) -> Result<(), RequestError> {
        let definition = parse(&request.definition)?;
        let vm = definition.name.clone();
        self.expect_unknown(&vm)?;
        let volumes = definition.volumes().count();
        if request.disks.len() != volumes {
            let text =
                format!("The definition has {volumes} volumes, {} images were given", request.disks.len());
            return Err(RequestError::Invalid(text));
        }
        for image in &request.disks {
            if !image.exists() {
                return Err(RequestError::Invalid(format!("There is no image {}", image.display())));
            }
        }
        self.expect_current(&vm, &request.disks)?;
        self.know(definition, request.disks.clone(), None, None)
    }

    async fn adopt(&mut self, request: &AdoptRequest) -> Result<(), RequestError> {
        let definition = parse(&request.definition)?;
        let vm = definition.name.clone();
        self.expect_unknown(&vm)?;
        let guest = self
            .edges
            .hypervisor
            .adopt(&request.qmp, &definition)
            .await
            .map_err(|error| RequestError::Failed(crate::migration::chain(&error)))?;
        let differs = |error| RequestError::Failed(crate::migration::chain(&error));
        let ports = guest.taps(&definition).await.map_err(differs)?;
        let images = guest.image_files(&definition).await.map_err(differs)?;
        self.expect_current(&vm, &images)?;
        for port in ports.values() {
            // Not sysfs: what is mounted there may show another network namespace.
            if nix::net::if_::if_nametoindex(port.as_str()).is_err() {
                let text = format!("QEMU's tap {port} is not in the gateway's network namespace");
                return Err(RequestError::Failed(text));
            }
        }
        if let Err(error) = self.sample(&vm, &ports).await {
            self.sample_end(&vm, &ports).await;
            return Err(failed(&error));
        }
        let adopted = Adopted { monitor: request.qmp.clone(), ports };
        self.know(definition, images, Some(adopted), Some(guest))
    }

    /// Remembers the flows of an adopted machine from now on.
    async fn sample(&self, vm: &VmName, ports: &Ports) -> Result<(), TunnelError> {
        for (nic, port) in ports {
            let key = PortKey { machine: vm.clone(), nic: nic.clone() };
            self.edges.tunnel.sample_begin(key, port.clone()).await?;
        }
        Ok(())
    }

    async fn sample_end(&self, vm: &VmName, ports: &Ports) {
        for nic in ports.keys() {
            let key = PortKey { machine: vm.clone(), nic: nic.clone() };
            if let Err(error) = self.edges.tunnel.sample_end(key).await {
                tracing::warn!(%vm, %nic, %error, "sampler could not be removed");
            }
        }
    }

    fn expect_unknown(&self, vm: &VmName) -> Result<(), RequestError> {
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
            Err(error) => Err(RequestError::Failed(error.to_string())),
        }
    }

    /// No disk is of a machine that another site owns, or newer than what is known here.
    fn expect_current(&self, vm: &VmName, images: &[PathBuf]) -> Result<(), RequestError> {
        let first = self.edges.journal.first_epoch(vm).map_err(|error| failed(&error))?;
        for image in images {
            let Some(note) = read_note(image).map_err(|error| failed(&error))? else { continue };
            if let Err(stale) = may_define(&note, vm, first, self.edges.site()) {
                let text = format!("{}: {stale}; {}", image.display(), stale.remedy());
                return Err(RequestError::Conflict(text));
            }
        }
        Ok(())
    }

    /// Why nothing starts a machine here, although the ledger says that it is this site's.
    pub(super) fn held(&self, row: &MachineRow) -> Option<Held> {
        let vm = &row.definition.name;
        let ownership = self.edges.journal.ownership(vm).unwrap_or_default()?;
        let notes = match read_notes(&row.images) {
            Ok(notes) => notes,
            Err(error) => {
                let remedy = "repair that file, or remove it if this is the newest copy there is".to_owned();
                return Some(Held { why: crate::migration::chain(&error), remedy });
            }
        };
        let stale = behind(&ownership, vm, &notes).err()?;
        Some(Held { why: stale.to_string(), remedy: stale.remedy() })
    }

    fn know(
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
            adopted,
            care_of: Vec::new(),
            handover: None,
            ttl_before_s: None,
        };
        let failed = |error: crate::journal::JournalError| RequestError::Failed(error.to_string());
        self.edges.journal.put_machine(&vm, &row).map_err(failed)?;
        let epoch = self.edges.journal.first_epoch(&vm).map_err(failed)?;
        self.edges.journal.define(&vm, &Ownership::Here { epoch }).map_err(failed)?;
        tracing::info!(%vm, "machine defined");
        self.machines.insert(vm, Machine { row, guest });
        Ok(())
    }

    async fn start(&mut self, vm: &VmName) -> Result<(), RequestError> {
        let ownership = self.ownership(vm)?;
        if self.migration_of(vm).is_some() {
            return Err(MayNotRun::Moving(vm.clone()).into());
        }
        let Some(machine) = self.machines.get(vm) else {
            return Err(ownership.permit(vm, None, &[]).err().map_or_else(|| no_machine(vm), Into::into));
        };
        let permit = ownership.permit(vm, None, &notes(&machine.row)?)?;
        if let Some(guest) = &machine.guest
            && let Ok(state) = guest.status().await
        {
            if state.is_running() {
                return Err(RequestError::Conflict(format!("Machine {vm} runs already")));
            }
            if state == RunState::Shutdown {
                guest.quit(QEMU_LIMIT).await.map_err(|error| failed(&error))?;
            }
        }
        let (row, known) = (machine.row.clone(), machine.guest.clone());
        let known = known.filter(|guest| !guest.qmp().is_closed());
        let found = match known {
            Some(guest) => Some(guest),
            None if row.adopted.is_some() => self.find(&row).await,
            None => self.edges.hypervisor.find(vm).await.map_err(|error| failed(&error))?,
        };
        let guest = match found {
            Some(guest) => guest,
            None if row.adopted.is_some() => {
                let text =
                    format!("Machine {vm} was adopted and its QEMU is gone; start it with what started it");
                return Err(RequestError::Conflict(text));
            }
            None => self.launch(&row).await?,
        };
        guest.resume(permit).await.map_err(|error| failed(&error))?;
        self.visit_resumed(&row).await;
        tracing::info!(%vm, "machine started");
        let row = MachineRow { wanted: true, ..row };
        self.edges.journal.put_machine(vm, &row).map_err(|error| failed(&error))?;
        self.machines.insert(vm.clone(), Machine { row, guest: Some(guest) });
        Ok(())
    }

    async fn launch(&self, row: &MachineRow) -> Result<Guest, RequestError> {
        let definition = &row.definition;
        let mut taps = BTreeMap::new();
        for nic in &definition.nics {
            let key = PortKey { machine: definition.name.clone(), nic: nic.name.clone() };
            let lan = self.edges.config.lan.get(nic.lan.as_str()).ok_or_else(|| {
                RequestError::Invalid(format!(
                    "This site has no [lan.{}], which NIC {} wants",
                    nic.lan, nic.name
                ))
            })?;
            let visiting = row.handover.is_some();
            let bridge = (!visiting).then(|| lan.bridge.clone());
            let tap = self
                .edges
                .tunnel
                .create_tap(key.clone(), TAP_OWNER, bridge)
                .await
                .map_err(|error| failed(&error))?;
            if !visiting {
                self.edges.tunnel.sample_begin(key, tap.clone()).await.map_err(|error| failed(&error))?;
            }
            taps.insert(nic.name.clone(), tap);
        }
        self.visit_prepare(row).await?;
        let names = definition.volumes().map(|volume| volume.name.clone());
        let disks = names
            .zip(&row.images)
            .map(|(name, path)| (name, DiskFile { path: path.clone(), format: format_of(path) }));
        let placement = Placement { disks: disks.collect(), taps };
        self.edges
            .hypervisor
            .start(definition, &placement, StartMode::Boot)
            .await
            .map_err(|error| failed(&error))
    }

    /// The rules of a visitor that boots here: they went with its tap when the host was rebooted. It has no
    /// flows of before its move any more.
    async fn visit_prepare(&self, row: &MachineRow) -> Result<(), RequestError> {
        let Some(handover) = &row.handover else { return Ok(()) };
        let reservation = Reservation { care_of: row.care_of.clone() };
        let visits = visits(&self.edges, &row.definition, &reservation, &handover.nics, &row.home_site);
        for visit in visits.map_err(|why| RequestError::Invalid(why.to_string()))? {
            self.edges.tunnel.visit_prepare(visit).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    async fn visit_resumed(&self, row: &MachineRow) {
        let vm = &row.definition.name;
        for nic in row.handover.iter().flat_map(|_| &row.definition.nics) {
            let key = PortKey { machine: vm.clone(), nic: nic.name.clone() };
            if let Err(error) = self.edges.tunnel.visit_resumed(key).await {
                tracing::warn!(%vm, error = crate::migration::chain(&error), "care-of address could not be announced");
            }
        }
    }

    async fn stop(&mut self, vm: &VmName) -> Result<(), RequestError> {
        if self.migration_of(vm).is_some() {
            return Err(MayNotRun::Moving(vm.clone()).into());
        }
        let Some(machine) = self.machines.get_mut(vm) else { return Err(no_machine(vm)) };
        let Some(guest) = machine.guest.clone() else {
            return Err(RequestError::Conflict(format!("Machine {vm} is not running")));
        };
        guest.quit(QEMU_LIMIT).await.map_err(|error| failed(&error))?;
        machine.guest = None;
        machine.row.wanted = false;
        self.edges.journal.put_machine(vm, &machine.row).map_err(|error| failed(&error))?;
        tracing::info!(%vm, "machine stopped");
        Ok(())
    }

    async fn undefine(&mut self, vm: &VmName, forget: bool) -> Result<(), RequestError> {
        let ownership = self.ownership(vm)?;
        expect_forgettable(vm, &ownership, forget)?;
        if self.migration_of(vm).is_some() {
            return Err(MayNotRun::Moving(vm.clone()).into());
        }
        let running = self.machines.get(vm).is_some_and(|machine| machine.guest.is_some());
        if running && matches!(ownership, Ownership::Here { .. }) {
            return Err(RequestError::Conflict(format!("Machine {vm} runs; stop it first")));
        }
        self.end_anchor(vm).await;
        if let Some(row) = self.row(vm) {
            self.leave_network(&row).await;
        }
        self.machines.remove(vm);
        self.edges.journal.remove_machine(vm).map_err(|error| failed(&error))
    }

    /// Nothing is left of an anchor that could keep packets from a machine that is defined again.
    async fn end_anchor(&self, vm: &VmName) {
        let (done, ended) = oneshot::channel();
        tell(&self.anchors, AnchorCommand::End(vm.clone(), done)).await;
        // Anchors that are gone hold nothing any more.
        drop(ended.await);
    }

    /// Takes down what this gateway has made on the host for a machine that does not run.
    async fn leave_network(&self, row: &MachineRow) {
        let vm = &row.definition.name;
        let tunnel = &self.edges.tunnel;
        for nic in &row.definition.nics {
            let key = PortKey { machine: vm.clone(), nic: nic.name.clone() };
            // The tap goes last: the rules name it.
            let undone = [
                tunnel.visit_undo(key.clone()).await,
                tunnel.sample_end(key.clone()).await,
                tunnel.remove_tap(key).await,
            ];
            for error in undone.into_iter().filter_map(Result::err) {
                tracing::warn!(%vm, nic = %nic.name, error = crate::migration::chain(&error), "part of the machine's network was not removed");
            }
        }
    }

    /// What the journal says of a machine, here or away.
    fn row(&self, vm: &VmName) -> Option<MachineRow> {
        let rows = self.edges.journal.machines::<MachineRow>().unwrap_or_default();
        rows.into_iter().find(|(name, _)| name == vm).map(|(_, row)| row)
    }

    pub(super) fn ownership(&self, vm: &VmName) -> Result<Ownership, RequestError> {
        match self.edges.journal.ownership(vm) {
            Ok(Some(ownership)) => Ok(ownership),
            Ok(None) => Err(no_machine(vm)),
            Err(error) => Err(RequestError::Failed(error.to_string())),
        }
    }

    fn may_run(&self, vm: &VmName) -> Result<(), RequestError> {
        if self.migration_of(vm).is_some() {
            return Err(MayNotRun::Moving(vm.clone()).into());
        }
        // The permit is not given away: whoever asks starts the machine by other means.
        let notes = self.machines.get(vm).map(|machine| notes(&machine.row)).transpose()?;
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
        // A monitor has one client: the handle that exists is kept as long as it works.
        let known = guest.or_else(|| before.and_then(|machine| machine.guest));
        let guest = match known.filter(|guest| !guest.qmp().is_closed()) {
            Some(guest) => Some(guest),
            None => self.find(&row).await,
        };
        self.machines.insert(vm.clone(), Machine { row, guest });
    }

    /// The QEMU of a machine, if it runs.
    pub(super) async fn find(&self, row: &MachineRow) -> Option<Guest> {
        let found = match &row.adopted {
            Some(adopted) => self.edges.hypervisor.adopt(&adopted.monitor, &row.definition).await.ok(),
            None => self.edges.hypervisor.find(&row.definition.name).await.ok().flatten(),
        };
        let vm = &row.definition.name;
        // One that is still coming, or has left, is not meant to run here.
        let ours = matches!(self.edges.journal.ownership(vm), Ok(Some(Ownership::Here { .. })));
        if found.is_none() && row.wanted && ours {
            tracing::warn!(%vm, "machine should run, but its QEMU is not there");
        }
        found
    }
}

/// What stands beside a machine's disks.
fn notes(row: &MachineRow) -> Result<Vec<Generation>, RequestError> {
    read_notes(&row.images).map_err(|error| failed(&error))
}

/// An image's format by its name: what is not called `.qcow2` is raw.
fn format_of(path: &Path) -> DiskFormat {
    if path.extension().is_some_and(|extension| extension == "qcow2") {
        DiskFormat::Qcow2
    } else {
        DiskFormat::Raw
    }
}

fn parse(text: &str) -> Result<MachineDefinition, RequestError> {
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
        Ownership::Away { .. } | Ownership::Here { .. } | Ownership::Arriving { .. } => Ok(()),
    }
}

fn no_machine(vm: &VmName) -> RequestError {
    RequestError::NotFound(format!("No machine {vm} at this site; `longhaul vm list` lists them"))
}

fn failed(error: &dyn std::error::Error) -> RequestError {
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
