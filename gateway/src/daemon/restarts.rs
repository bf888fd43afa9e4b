//! Machines whose QEMU is gone although nobody stopped them: seen at once, and booted again where their definition
//! says so.
//!
//! ```text
//!   QEMU's events -> a task per QEMU -> Gone -> daemon: moving? (then when that has ended) -> the core's verdict
//!                                                  -> its time -> the same start as an operator's, permit and all
//! ```
//!
//! Whether a machine may run here is not decided here: a start asks the ledger like any other. Only an end that this
//! gateway has seen is followed by a start: while it was down itself, a peer's operator may have taken the machine back.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use longhaul_core::ids::{MigrationId, VmName};
use longhaul_core::machine::restart::{End, RestartLimits, Restarts, Verdict};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::Daemon;
use super::status::is_crashed;
use crate::api::RequestError;
use crate::config::HypervisorSection;
use crate::hypervisor::{EventLoss, Events, QmpEvent};
use crate::migration::{MachineRow, chain};

/// What is kept of the ends of machines.
pub(super) struct Watches {
    began: Instant,
    gone: mpsc::Sender<Gone>,
    /// The monitor that a task listens to, by the machine.
    watched: BTreeMap<VmName, u64>,
    /// How a QEMU ended whose machine was not idle then.
    ends: BTreeMap<VmName, End>,
    /// Migrations that were begun by a gateway before this one.
    inherited: BTreeSet<MigrationId>,
    rows: BTreeMap<VmName, Restarts>,
    due: BTreeMap<VmName, Instant>,
}

/// A QEMU is gone, or a start came to nothing.
pub(super) struct Gone {
    vm: VmName,
    monitor: Option<u64>,
    end: End,
}

impl Watches {
    pub(super) fn new(gone: mpsc::Sender<Gone>) -> Self {
        Self {
            began: Instant::now(),
            gone,
            watched: BTreeMap::new(),
            ends: BTreeMap::new(),
            inherited: BTreeSet::new(),
            rows: BTreeMap::new(),
            due: BTreeMap::new(),
        }
    }

    /// When [`Daemon::begin_restarts`] has something to do.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.due.values().min().copied()
    }

    /// A migration goes on that an earlier gateway began.
    pub(super) fn inherit(&mut self, id: MigrationId) {
        self.inherited.insert(id);
    }

    /// Whether a machine waits for its start.
    pub(super) fn waits(&self, vm: &VmName) -> bool {
        self.due.contains_key(vm)
    }
}

impl Daemon {
    /// Listens to the machine's QEMU, if it has one that is not listened to yet.
    pub(super) fn watch(&mut self, vm: &VmName) {
        let Some(guest) = self.machines.get(vm).and_then(|machine| machine.guest.as_ref()) else { return };
        let monitor = guest.qmp().id();
        if guest.qmp().is_closed() || self.watches.watched.get(vm) == Some(&monitor) {
            return;
        }
        self.watches.watched.insert(vm.clone(), monitor);
        self.watches.ends.remove(vm);
        self.watches.due.remove(vm);
        tokio::spawn(listen(vm.clone(), monitor, guest.events(), self.watches.gone.clone()));
    }

    /// Takes note of an end.
    pub(super) fn on_gone(&mut self, gone: Gone) {
        let Gone { vm, monitor, end } = gone;
        let latest = self.watches.watched.get(&vm).copied();
        if monitor.is_some() && monitor != latest {
            return;
        }
        self.watches.watched.remove(&vm);
        self.watches.ends.insert(vm.clone(), end);
        self.decide_restart(&vm);
    }

    /// A migration has ended. A QEMU that it has brought and lost, and that was not listened to yet, crashed.
    pub(super) fn after_migration(&mut self, vm: &VmName, id: MigrationId) {
        let ours = !self.watches.inherited.remove(&id);
        if ours && !self.watches.watched.contains_key(vm) {
            self.watches.ends.entry(vm.clone()).or_insert(End::Crashed);
        }
        self.decide_restart(vm);
    }

    /// Decides what becomes of a machine that is down without having been stopped. Does nothing while
    /// somebody works on it: whoever does that calls this again at the end.
    pub(super) fn decide_restart(&mut self, vm: &VmName) {
        let Some(machine) = self.machines.get(vm) else {
            self.watches.ends.remove(vm);
            return;
        };
        if !is_crashed(&self.edges, machine) || self.expect_idle(vm).is_err() || self.watches.waits(vm) {
            return;
        }
        let row = machine.row.clone();
        let end = match self.watches.ends.remove(vm) {
            Some(end) => end,
            // Its task has not reported yet.
            None if self.watches.watched.contains_key(vm) => return,
            None => End::Unseen,
        };
        let limits = limits(&self.edges.config.hypervisor);
        let now = self.watches.began.elapsed();
        let verdict = self.watches.rows.entry(vm.clone()).or_default().handle_end(
            end,
            row.definition.restart,
            &limits,
            now,
        );
        self.obey(row, end, verdict, limits.starts);
    }

    fn obey(&mut self, row: MachineRow, end: End, verdict: Verdict, most: u32) {
        let vm = row.definition.name.clone();
        match verdict {
            Verdict::StaysDown => {
                tracing::warn!(%vm, ?end, "machine is down; `longhaul vm start` boots it");
            }
            Verdict::WantsToBeOff => self.powered_off(&vm),
            Verdict::GivenUp => {
                tracing::error!(%vm, starts = most, "machine crashes again and again and stays down; `longhaul vm start` boots it");
            }
            Verdict::StartsAgain { .. } if row.adopted.is_some() => {
                tracing::warn!(%vm, "machine is down; it was adopted, and what started it starts it again");
            }
            Verdict::StartsAgain { number, delay } => {
                tracing::warn!(%vm, number, of = most, delay_s = delay.as_secs_f64(), "machine crashed and is started again");
                self.watches.due.insert(vm, Instant::now() + delay);
            }
        }
    }

    /// A guest that has switched itself off is not meant to run. What else its row says by now stays.
    fn powered_off(&mut self, vm: &VmName) {
        let stays_off = |row: &mut MachineRow| row.wanted = false;
        let row = match self.edges.journal.change_machine(vm, stays_off) {
            Ok(Some(row)) => row,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%vm, error = chain(&error), "the machine is written down as running, but its guest powered itself off");
                return;
            }
        };
        tracing::info!(%vm, "guest powered itself off");
        if let Some(machine) = self.machines.get_mut(vm) {
            machine.row = row;
            machine.guest = None;
        }
    }

    /// Starts what is due.
    pub(super) fn begin_restarts(&mut self) {
        let now = Instant::now();
        let due: Vec<VmName> =
            self.watches.due.iter().filter(|(_, due)| **due <= now).map(|(vm, _)| vm.clone()).collect();
        for vm in due {
            self.watches.due.remove(&vm);
            let crashed = self.machines.get(&vm).is_some_and(|machine| is_crashed(&self.edges, machine));
            if crashed && self.expect_idle(&vm).is_ok() {
                self.begin_restart(vm);
            }
        }
    }

    fn begin_restart(&mut self, vm: VmName) {
        let now = self.watches.began.elapsed();
        self.watches.rows.entry(vm.clone()).or_default().handle_started(now);
        let (reply, answer) = oneshot::channel();
        self.start(&vm, reply);
        tokio::spawn(report(vm, answer, self.watches.gone.clone()));
    }

    /// An operator wants the machine down, or somebody else has it: nothing starts it any more.
    pub(super) fn forget_restart(&mut self, vm: &VmName) {
        self.watches.rows.remove(vm);
        self.watches.due.remove(vm);
    }
}

/// Listens until the monitor ends, and says how the guest ended. Holds no handle on the guest, which would keep the
/// monitor open.
async fn listen(vm: VmName, monitor: u64, mut events: Events, gone: mpsc::Sender<Gone>) {
    let mut end = End::Crashed;
    loop {
        match events.next().await {
            Ok(event) => end = seen(&event).unwrap_or(end),
            Err(EventLoss::Missed(_)) => {}
            Err(EventLoss::Gone) => break,
        }
    }
    // The daemon's task outlives this one.
    drop(gone.send(Gone { vm, monitor: Some(monitor), end }).await);
}

/// What an event says of the end that follows it (`qapi/run-state.json`: SHUTDOWN, `ShutdownCause`).
fn seen(event: &QmpEvent) -> Option<End> {
    if event.name != "SHUTDOWN" {
        return None;
    }
    Some(match event.data.get("reason").and_then(Value::as_str) {
        Some("guest-shutdown") => End::PoweredOff,
        Some("host-signal" | "host-qmp-quit" | "host-ui") => End::Told,
        Some(_) | None => End::Crashed,
    })
}

/// A start that came to nothing is one more end.
async fn report(vm: VmName, answer: oneshot::Receiver<Result<(), RequestError>>, gone: mpsc::Sender<Gone>) {
    // What was dropped with the daemon's task has nobody to report to.
    if let Ok(Err(error)) = answer.await {
        tracing::warn!(%vm, error = error.to_string(), "machine could not be started again");
        drop(gone.send(Gone { vm, monitor: None, end: End::Crashed }).await);
    }
}

fn limits(hypervisor: &HypervisorSection) -> RestartLimits {
    RestartLimits {
        starts: hypervisor.restart_starts,
        first_delay: Duration::from_millis(hypervisor.restart_delay_ms),
        steady: Duration::from_secs(hypervisor.restart_steady_s),
    }
}
