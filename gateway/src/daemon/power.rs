//! Defining, starting, stopping and adopting machines: each in a task of its own, for a QEMU may take long to answer, or
//! never do so, and the daemon's task has other machines.
//!
//! ```text
//!   request -> daemon: allowed? nobody works on it -> task: asks QEMU -> daemon: takes note, answers
//! ```
//!
//! Starting wants a permit, and the ledger gives one only for a machine that this site owns and that is not
//! moving. Until the task has reported, nothing else is begun with the machine. What is wanted is written
//! down before it is done.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use longhaul_core::ids::{DeviceName, VmName};
use longhaul_core::machine::{HostCapabilities, MachineDefinition};
use longhaul_core::migration::permit::RunPermit;
use longhaul_core::tunnel::policy::PortKey;
use longhaul_core::units::Bytes;
use tokio::sync::mpsc;

use super::machines::{expect_current, failed, format_of, leave_network, no_machine, notes, parse, silent};
use super::{Daemon, Machine, image};
use crate::api::types::{AdoptRequest, DefineRequest};
use crate::api::{Reply, RequestError};
use crate::hypervisor::{DiskFile, Guest, Placement, RunState, StartMode};
use crate::migration::stay::Stay;
use crate::migration::{Adopted, Edges, MachineRow, end_what_is_left, look};
use crate::tunnel::TunnelError;

const QEMU_LIMIT: Duration = Duration::from_secs(10);

/// The tap of each NIC.
type Ports = BTreeMap<DeviceName, String>;

/// A task has ended.
pub(super) struct Worked {
    vm: VmName,
    outcome: Result<Change, RequestError>,
    reply: Reply<()>,
}

/// What has become of a machine.
enum Change {
    /// It can run here.
    Defined(Box<MachineDefinition>, Vec<PathBuf>),
    /// It was taken over.
    Adopted(Box<Taken>),
    /// It runs.
    Started(Box<MachineRow>, Guest),
    /// It does not run.
    Stopped(Box<MachineRow>),
}

struct Taken {
    definition: MachineDefinition,
    images: Vec<PathBuf>,
    adopted: Adopted,
    guest: Guest,
}

impl Daemon {
    pub(super) fn define(&mut self, request: DefineRequest, reply: Reply<()>) {
        let definition = parse(&request.definition).and_then(|definition| {
            self.expect_unknown(&definition.name)?;
            self.expect_free(&request.disks)?;
            expect_current(&self.edges, &definition.name, &request.disks)?;
            Ok(definition)
        });
        match definition {
            Ok(definition) => {
                let (vm, power) = (definition.name.clone(), self.power());
                self.work(vm, reply, async move { power.define(definition, request.disks).await });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn adopt(&mut self, request: AdoptRequest, reply: Reply<()>) {
        let definition = parse(&request.definition).and_then(|definition| {
            self.expect_unknown(&definition.name)?;
            Ok(definition)
        });
        match definition {
            Ok(definition) => {
                let (vm, power) = (definition.name.clone(), self.power());
                self.work(vm, reply, async move { power.adopt(request, definition).await });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn start(&mut self, vm: &VmName, reply: Reply<()>) {
        match self.may_start(vm) {
            Ok((permit, row, guest)) => {
                let power = self.power();
                self.work(vm.clone(), reply, async move { power.start(row, guest, permit).await });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn stop(&mut self, vm: &VmName, reply: Reply<()>) {
        self.forget_restart(vm);
        self.forget_retries(vm);
        match self.may_stop(vm) {
            Ok((row, guest)) => {
                let power = self.power();
                self.work(vm.clone(), reply, async move { power.stop(row, guest).await });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    fn may_start(&self, vm: &VmName) -> Result<(RunPermit, MachineRow, Option<Guest>), RequestError> {
        let ownership = self.ownership(vm)?;
        self.expect_idle(vm)?;
        let Some(machine) = self.machines.get(vm) else {
            return Err(ownership.permit(vm, None, &[]).err().map_or_else(|| no_machine(vm), Into::into));
        };
        if machine.silent {
            return Err(silent(vm));
        }
        let permit = ownership.permit(vm, None, &notes(&self.edges, &machine.row)?)?;
        Ok((permit, machine.row.clone(), machine.guest.clone()))
    }

    fn may_stop(&self, vm: &VmName) -> Result<(MachineRow, Option<Guest>), RequestError> {
        self.expect_idle(vm)?;
        let Some(machine) = self.machines.get(vm) else { return Err(no_machine(vm)) };
        // One that crashed is stopped by not being wanted any more.
        if machine.guest.is_none() && !machine.row.wanted && !machine.silent {
            return Err(RequestError::Conflict(format!("Machine {vm} is not running")));
        }
        Ok((machine.row.clone(), machine.guest.clone()))
    }

    fn power(&self) -> Power {
        Power { edges: self.edges.clone() }
    }

    fn work(
        &mut self,
        vm: VmName,
        reply: Reply<()>,
        task: impl Future<Output = Result<Change, RequestError>> + Send + 'static,
    ) {
        self.working.insert(vm.clone());
        let worked: mpsc::Sender<Worked> = self.worked.clone();
        tokio::spawn(async move {
            let outcome = task.await;
            // The daemon's task outlives this one.
            drop(worked.send(Worked { vm, outcome, reply }).await);
        });
    }

    /// Takes note of what a task has done.
    pub(super) fn on_worked(&mut self, worked: Worked) {
        let Worked { vm, outcome, reply } = worked;
        self.working.remove(&vm);
        let answer = outcome.and_then(|change| match change {
            Change::Defined(definition, images) => {
                // Another definition may have taken them meanwhile.
                self.expect_free(&images)?;
                self.know(*definition, images, None, None)
            }
            Change::Adopted(taken) => {
                let Taken { definition, images, adopted, guest } = *taken;
                self.know(definition, images, Some(adopted), Some(guest))
            }
            Change::Started(row, guest) => {
                self.machines.insert(vm.clone(), Machine { row: *row, guest: Some(guest), silent: false });
                self.watch(&vm);
                Ok(())
            }
            Change::Stopped(row) => {
                self.machines.insert(vm.clone(), Machine { row: *row, guest: None, silent: false });
                Ok(())
            }
        });
        self.decide_restart(&vm);
        // An asker that went away needs no answer.
        drop(reply.send(answer));
    }
}

/// What a task works with.
struct Power {
    edges: Edges,
}

impl Power {
    /// Finds now what would make the machine's start fail.
    async fn define(
        &self,
        definition: MachineDefinition,
        images: Vec<PathBuf>,
    ) -> Result<Change, RequestError> {
        for nic in &definition.nics {
            if !self.edges.config.lan.contains_key(nic.lan.as_str()) {
                let text = format!("This site has no [lan.{}], which NIC {} wants", nic.lan, nic.name);
                return Err(RequestError::Invalid(text));
            }
        }
        image::check(&definition, &images).map_err(RequestError::Invalid)?;
        let host = self.edges.hypervisor.capabilities().await.map_err(|error| failed(&error))?;
        // Memory is looked for when it starts.
        let host = HostCapabilities { free_memory: Bytes(u64::MAX), ..host };
        definition.check(&host).map_err(|error| RequestError::Invalid(error.to_string()))?;
        Ok(Change::Defined(Box::new(definition), images))
    }

    async fn adopt(
        &self,
        request: AdoptRequest,
        definition: MachineDefinition,
    ) -> Result<Change, RequestError> {
        let vm = &definition.name;
        let differs = |error| RequestError::Failed(crate::migration::chain(&error));
        let guest = self.edges.hypervisor.adopt(&request.qmp, &definition).await.map_err(differs)?;
        let ports = guest.taps(&definition).await.map_err(differs)?;
        let images = guest.image_files(&definition).await.map_err(differs)?;
        expect_current(&self.edges, vm, &images)?;
        for port in ports.values() {
            // Not sysfs: what is mounted there may show another network namespace.
            if nix::net::if_::if_nametoindex(port.as_str()).is_err() {
                let text = format!("QEMU's tap {port} is not in the gateway's network namespace");
                return Err(RequestError::Failed(text));
            }
        }
        if let Err(error) = self.sample(vm, &ports).await {
            self.sample_end(vm, ports.keys()).await;
            return Err(failed(&error));
        }
        let adopted = Adopted { monitor: request.qmp, ports };
        Ok(Change::Adopted(Box::new(Taken { definition, images, adopted, guest })))
    }

    /// Remembers the flows of an adopted machine from now on.
    async fn sample(&self, vm: &VmName, ports: &Ports) -> Result<(), TunnelError> {
        for (nic, port) in ports {
            let key = PortKey { machine: vm.clone(), nic: nic.clone() };
            self.edges.tunnel.sample_begin(key, port.clone()).await?;
        }
        Ok(())
    }

    async fn sample_end(&self, vm: &VmName, nics: impl Iterator<Item = &DeviceName>) {
        for nic in nics {
            let key = PortKey { machine: vm.clone(), nic: nic.clone() };
            if let Err(error) = self.edges.tunnel.sample_end(key).await {
                tracing::warn!(%vm, %nic, %error, "sampler could not be removed");
            }
        }
    }

    async fn start(
        &self,
        row: MachineRow,
        known: Option<Guest>,
        permit: RunPermit,
    ) -> Result<Change, RequestError> {
        let vm = &row.definition.name;
        let found = self.running(&row, known).await?;
        let launched = found.is_none();
        let guest = match found {
            Some(guest) => {
                // What goes on in a QEMU that was adopted may be its operator's.
                if row.adopted.is_none() {
                    end_what_is_left(&guest, &row).await.map_err(|error| failed(&error))?;
                }
                guest
            }
            None => match self.launch(&row).await {
                Ok(guest) => guest,
                Err(error) => {
                    leave_network(&self.edges, &row).await;
                    return Err(error);
                }
            },
        };
        let row = match self.want(&row, true) {
            Ok(row) => row,
            Err(error) => {
                if launched {
                    // Nothing runs that is not written down; what this error says is the cause.
                    drop(guest.quit(QEMU_LIMIT).await);
                }
                return Err(error);
            }
        };
        guest.resume(permit).await.map_err(|error| failed(&error.why))?;
        Stay::of_row(&self.edges, &row).resumed(&self.edges).await;
        tracing::info!(%vm, "machine started");
        Ok(Change::Started(Box::new(row), guest))
    }

    /// Writes down whether the machine is to run. What else stands in its row may be newer than what is known here.
    fn want(&self, row: &MachineRow, wanted: bool) -> Result<MachineRow, RequestError> {
        let change = |row: &mut MachineRow| row.wanted = wanted;
        let written = self.edges.journal.change_machine(&row.definition.name, change);
        let written = written.map_err(|error| failed(&error))?;
        Ok(written.unwrap_or_else(|| MachineRow { wanted, ..row.clone() }))
    }

    /// The machine's QEMU, if there is one that can be resumed.
    async fn running(&self, row: &MachineRow, known: Option<Guest>) -> Result<Option<Guest>, RequestError> {
        let vm = &row.definition.name;
        if let Some(guest) = &known
            && let Ok(state) = guest.status().await
        {
            if state.is_running() {
                return Err(RequestError::Conflict(format!("Machine {vm} runs already")));
            }
            if state == RunState::Shutdown {
                guest.quit(QEMU_LIMIT).await.map_err(|error| failed(&error))?;
            }
        }
        if let Some(guest) = known.filter(|guest| !guest.qmp().is_closed()) {
            return Ok(Some(guest));
        }
        let Some(adopted) = &row.adopted else {
            return self.edges.hypervisor.find(vm).await.map_err(|error| failed(&error));
        };
        let found = self.edges.hypervisor.adopt(&adopted.monitor, &row.definition).await;
        found.map(Some).map_err(|error| {
            tracing::debug!(%vm, error = crate::migration::chain(&error), "an adopted QEMU is not there");
            RequestError::Conflict(format!(
                "Machine {vm} was adopted and its QEMU is gone; start it with what started it"
            ))
        })
    }

    async fn launch(&self, row: &MachineRow) -> Result<Guest, RequestError> {
        let definition = &row.definition;
        // The rules of a visitor went with its tap when the host was rebooted.
        let prepared = Stay::of_row(&self.edges, row).prepare(&self.edges).await;
        let taps = prepared.map_err(|why| RequestError::Invalid(why.to_string()))?;
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

    async fn stop(&self, row: MachineRow, guest: Option<Guest>) -> Result<Change, RequestError> {
        let vm = &row.definition.name;
        // What did not answer once may be there all the same, and is not stopped by being forgotten.
        let guest = match guest.filter(|guest| !guest.qmp().is_closed()) {
            Some(guest) => Some(guest),
            None => look(&self.edges, &row).await.map_err(|error| failed(&error))?,
        };
        let stopped = self.want(&row, false)?;
        if let Some(guest) = guest
            && let Err(error) = guest.quit(QEMU_LIMIT).await
        {
            if let Err(error) = self.want(&row, row.wanted) {
                tracing::warn!(%vm, %error, "the machine is written down as stopped, but was not");
            }
            return Err(failed(&error));
        }
        tracing::info!(%vm, "machine stopped");
        Ok(Change::Stopped(Box::new(stopped)))
    }
}
