//! What stays at a site that a machine left: its home address, its old connections, its name.
//!
//! ```text
//!  attract ---> packets go to the machine's new place ------------------------> end, when no old
//!     |                                                                         flow is left
//!     `-- machine runs there --> name moved --> old answers expired --> TTL restored
//! ```
//!
//! An anchor has its own row in the journal and its own task, apart from the migration that made it:
//! it outlives it, and a gateway that restarts takes it up again before it listens. The name is owed
//! until it has moved: a name server that is away delays new clients, it does not lose them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use longhaul_core::ids::{DeviceName, Epoch, SiteName, VmName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::Attempt;
use longhaul_core::migration::message::{Handover, Proposal, Refusal, Reservation};
use longhaul_core::tunnel::handover::{FlowTuple, Mac, NicHandover};
use longhaul_core::tunnel::policy::PortKey;

use super::{Edges, MachineRow, chain};
use crate::api::types::AnchorView;
use crate::dns::NameMove;
use crate::journal::unix_ms;
use crate::tunnel::{CareOf, HoldRequest, VisitRequest};

/// How far a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NameState {
    /// It does not follow.
    None,
    /// The machine is not known to run at its new place yet.
    Waiting,
    /// It is owed.
    Pending,
    /// It points at the new place; answers given before may still be believed.
    Moved {
        /// When it moved, milliseconds since the UNIX epoch.
        at_unix_ms: u64,
    },
    /// Nothing more is to be done.
    Settled {
        /// When it moved, milliseconds since the UNIX epoch.
        at_unix_ms: u64,
    },
}

/// An anchor as the journal holds it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Anchor {
    /// The machine.
    pub vm: VmName,
    /// The epoch that began at its new place.
    pub epoch: Epoch,
    /// Its new place.
    pub peer: SiteName,
    /// Its NICs and their link-layer and home addresses.
    pub nics: Vec<AnchorNic>,
    /// Its home addresses that have a stand-in there, and the stand-ins.
    pub care_of: Vec<(IpAddr, IpAddr)>,
    /// Its name, if it follows.
    pub name: Option<String>,
    /// The name's TTL before the move.
    pub ttl_s: u32,
    /// How far the name is.
    pub names: NameState,
    /// Since when.
    pub since_unix_ms: u64,
}

/// One NIC of an anchor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AnchorNic {
    /// The NIC.
    pub nic: DeviceName,
    /// Its link-layer address.
    pub mac: Mac,
    /// Its home addresses.
    pub home: Vec<IpAddr>,
    /// The bridge of the home LAN.
    pub bridge: String,
    /// The tap it was plugged into.
    pub port: String,
    /// Flows that were open when the machine left.
    pub flows: Vec<FlowTuple>,
}

/// What a migration tells the anchors.
#[derive(Debug)]
pub enum AnchorCommand {
    /// The machine left: attract its home address.
    Attract(Box<Anchor>),
    /// It runs there: move its name.
    MoveNames(VmName),
    /// It stayed after all, or came back.
    Forget(VmName),
    /// Its operator forgets it: its old connections end. Answered when the host is as it was.
    End(VmName, oneshot::Sender<()>),
}

/// Tells the anchors; they outlive every migration.
pub(crate) async fn tell(anchors: &mpsc::Sender<AnchorCommand>, command: AnchorCommand) {
    if anchors.send(command).await.is_err() {
        tracing::debug!("anchors are gone: the gateway is stopping");
    }
}

impl Anchor {
    /// An anchor for the machine of an attempt. `follows` is the TTL its name had, if the name follows; 0 for
    /// unknown.
    pub(super) fn new(
        edges: &Edges,
        attempt: &Attempt,
        row: &MachineRow,
        reservation: Option<&Reservation>,
        handover: &Handover,
        follows: Option<u32>,
    ) -> Self {
        let definition = &row.definition;
        let bridge = |lan: &str| edges.config.lan.get(lan).map(|lan| lan.bridge.clone()).unwrap_or_default();
        let flows = |name: &DeviceName| {
            let handed = handover.nics.iter().find(|handed| handed.nic == *name);
            handed.map(|handed| handed.flows.clone()).unwrap_or_default()
        };
        let nics = definition.nics.iter().map(|nic| AnchorNic {
            nic: nic.name.clone(),
            mac: nic.mac,
            home: nic.home.iter().map(|home| home.addr).collect(),
            bridge: bridge(nic.lan.as_str()),
            port: edges.port(row, &nic.name),
            flows: flows(&nic.name),
        });
        let name = definition.dns_name.clone().filter(|_| follows.is_some());
        let care_of = reservation.map_or(&[][..], |reservation| &reservation.care_of);
        Self {
            vm: attempt.vm.clone(),
            epoch: attempt.epoch,
            peer: attempt.peer.clone(),
            nics: nics.collect(),
            care_of: care_of.iter().map(|care_of| (care_of.home.addr, care_of.addr)).collect(),
            names: if name.is_some() { NameState::Waiting } else { NameState::None },
            name,
            ttl_s: follows.unwrap_or(0),
            since_unix_ms: unix_ms(),
        }
    }

    /// What the tunnel is asked to hold for it.
    fn holds(&self) -> Vec<HoldRequest> {
        self.nics
            .iter()
            .map(|nic| {
                let key = PortKey { machine: self.vm.clone(), nic: nic.nic.clone() };
                HoldRequest {
                    port: nic.port.clone(),
                    key,
                    peer: self.peer.clone(),
                    mac: nic.mac,
                    home: nic.home.clone(),
                    lan: nic.bridge.clone(),
                }
            })
            .collect()
    }

    fn home(&self) -> Vec<IpAddr> {
        self.nics.iter().flat_map(|nic| nic.home.iter().copied()).collect()
    }

    fn view(&self) -> AnchorView {
        let (names, moved) = match self.names {
            NameState::None => ("none", None),
            NameState::Waiting | NameState::Pending => ("pending", None),
            NameState::Moved { at_unix_ms } => ("moved", Some(at_unix_ms)),
            NameState::Settled { at_unix_ms } => ("settled", Some(at_unix_ms)),
        };
        AnchorView {
            vm: self.vm.clone(),
            at: self.peer.clone(),
            home: self.home(),
            care_of: self.care_of.iter().map(|(_, care_of)| *care_of).collect(),
            flows: 0,
            names: names.to_owned(),
            names_moved_ms: moved,
            names_error: None,
            since_ms: self.since_unix_ms,
            closed_ms: None,
        }
    }
}

/// Takes up every anchor that the journal holds. When it returns their home addresses are attracted, so that
/// connections stalled for the gateway's absence only.
pub async fn restore(edges: &Edges, views: &watch::Sender<BTreeMap<VmName, AnchorView>>) -> Anchors {
    let rows: Vec<(VmName, Anchor)> = edges.journal.anchors().unwrap_or_else(|error| {
        tracing::error!(
            error = chain(&error),
            "anchors could not be read; old connections of machines that left stall"
        );
        Vec::new()
    });
    let mut running = Anchors::default();
    for (vm, anchor) in rows {
        running.insert(vm, start(edges, anchor, Begin::Restored, views).await);
    }
    running
}

/// Runs every anchor of this site, beginning with those that were restored; `views` shows them.
pub async fn run(
    edges: Edges,
    mut anchors: Anchors,
    mut commands: mpsc::Receiver<AnchorCommand>,
    views: watch::Sender<BTreeMap<VmName, AnchorView>>,
) {
    while let Some(command) = commands.recv().await {
        match command {
            AnchorCommand::Attract(anchor) if !anchors.is_news(&anchor.vm, anchor.epoch) => {}
            AnchorCommand::Attract(anchor) => {
                anchors.end(&anchor.vm).await;
                if let Err(error) = edges.journal.put_anchor(&anchor.vm, &*anchor) {
                    tracing::error!(vm = %anchor.vm, error = chain(&error), "anchor could not be written down");
                }
                anchors.insert(anchor.vm.clone(), start(&edges, *anchor, Begin::Held, &views).await);
            }
            AnchorCommand::MoveNames(vm) => anchors.move_names(&vm),
            AnchorCommand::Forget(vm) => {
                anchors.end(&vm).await;
                forget(&edges, &vm);
                views.send_modify(|views| drop(views.remove(&vm)));
            }
            AnchorCommand::End(vm, done) => {
                anchors.end(&vm).await;
                let row = edges
                    .journal
                    .anchors::<Anchor>()
                    .unwrap_or_default()
                    .into_iter()
                    .find(|(name, _)| *name == vm);
                if let Some((_, anchor)) = row {
                    release(&edges, &anchor).await;
                }
                views.send_modify(|views| drop(views.remove(&vm)));
                // Who asked may have gone.
                let _ = done.send(());
            }
        }
    }
}

/// The anchors that were begun, ended or not.
#[derive(Default)]
pub struct Anchors {
    known: BTreeMap<VmName, Known>,
}

struct Known {
    epoch: Epoch,
    runs_there: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Anchors {
    /// Nothing is known of a hand-over as late as this. One that has ended is not begun again by a late
    /// word, so it stays known; the machine's next move has a higher epoch.
    fn is_news(&self, vm: &VmName, epoch: Epoch) -> bool {
        self.known.get(vm).is_none_or(|known| known.epoch < epoch)
    }

    fn insert(&mut self, vm: VmName, known: Known) {
        self.known.insert(vm, known);
    }

    fn move_names(&self, vm: &VmName) {
        if let Some(known) = self.known.get(vm) {
            known.runs_there.send_replace(true);
        }
    }

    /// Ends the task of an anchor: when this returns it does nothing more. What it changed stays.
    async fn end(&mut self, vm: &VmName) {
        let Some(known) = self.known.remove(vm) else { return };
        known.task.abort();
        // Only that it has ended matters, not how.
        drop(known.task.await);
    }
}

/// What the tunnel knows when an anchor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// Packets are held already.
    Held,
    /// Nothing: the gateway was restarted.
    Restored,
}

async fn start(
    edges: &Edges,
    anchor: Anchor,
    begin: Begin,
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
) -> Known {
    let known_to_run = !matches!(anchor.names, NameState::Waiting);
    let (runs_there, told) = watch::channel(known_to_run);
    views.send_modify(|views| drop(views.insert(anchor.vm.clone(), anchor.view())));
    let epoch = anchor.epoch;
    let mut task = AnchorTask { edges: edges.clone(), anchor, views: views.clone(), told };
    task.attract(begin).await;
    Known { epoch, runs_there, task: tokio::spawn(task.run()) }
}

/// Takes down what an anchor has on this host, and forgets it.
async fn release(edges: &Edges, anchor: &Anchor) {
    for hold in anchor.holds() {
        let key = hold.key;
        if let Err(error) = edges.tunnel.attract_end(key.clone()).await {
            tracing::warn!(vm = %anchor.vm, error = chain(&error), "tunnel could not be taken down cleanly");
        }
        if let Err(error) = edges.tunnel.sample_end(key.clone()).await {
            tracing::warn!(vm = %anchor.vm, error = chain(&error), "sampler could not be removed");
        }
        // The tap of an adopted machine stays its operator's.
        let ours = hold.port == edges.tap_name(&key);
        if ours && let Err(error) = edges.tunnel.remove_tap(key).await {
            tracing::warn!(vm = %anchor.vm, error = chain(&error), "tap could not be removed");
        }
    }
    forget(edges, &anchor.vm);
}

fn forget(edges: &Edges, vm: &VmName) {
    if let Err(error) = edges.journal.remove_anchor(vm) {
        tracing::error!(%vm, error = chain(&error), "anchor could not be removed from the journal");
    }
}

struct AnchorTask {
    edges: Edges,
    anchor: Anchor,
    views: watch::Sender<BTreeMap<VmName, AnchorView>>,
    told: watch::Receiver<bool>,
}

/// Between two tries at the name server, at most.
const NAMES_AGAIN: Duration = Duration::from_secs(30);

impl AnchorTask {
    async fn run(mut self) {
        if self.told.wait_for(|runs| *runs).await.is_err() {
            return;
        }
        self.settle().await;
        self.end().await;
    }

    async fn attract(&mut self, begin: Begin) {
        let holds = self.anchor.holds();
        for (hold, nic) in holds.into_iter().zip(&self.anchor.nics) {
            let key = hold.key.clone();
            let held = match begin {
                Begin::Held => Ok(()),
                Begin::Restored => self.edges.tunnel.hold_begin(hold).await,
            };
            let attracted = match held {
                Ok(()) => self.edges.tunnel.hold_end_attract(key, nic.flows.clone()).await,
                Err(error) => Err(error),
            };
            if let Err(error) = attracted {
                tracing::error!(vm = %self.anchor.vm, error = chain(&error), "home address cannot be attracted");
            }
        }
        tracing::info!(vm = %self.anchor.vm, to = %self.anchor.peer, "home address attracted");
    }

    /// Names, then flows: until the tunnel may end.
    async fn settle(&mut self) {
        self.move_name().await;
        self.let_old_answers_expire().await;
        self.wait_for_flows().await;
    }

    async fn move_name(&mut self) {
        if !matches!(self.anchor.names, NameState::Waiting | NameState::Pending) {
            return;
        }
        let (Some(name), Some(names)) = (self.anchor.name.clone(), self.edges.names.clone()) else { return };
        self.anchor.names = NameState::Pending;
        self.write();
        let mut wait = Duration::from_millis(200);
        loop {
            let wanted = NameMove {
                name: &name,
                addresses: &self.anchor.care_of,
                ttl_s: names.move_ttl_s(),
                epoch: self.anchor.epoch,
                owner: &self.anchor.peer,
            };
            match names.swap(&wanted).await {
                Ok(()) => break,
                Err(error) => {
                    let text = chain(&error);
                    tracing::warn!(vm = %self.anchor.vm, name, error = text, "name could not be moved yet; new clients still come through the tunnel");
                    self.show(|view| view.names_error = Some(text));
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(NAMES_AGAIN);
        }
        let at_unix_ms = unix_ms();
        self.anchor.names = NameState::Moved { at_unix_ms };
        self.write();
        self.show(|view| {
            view.names = "moved".into();
            view.names_error = None;
            view.names_moved_ms = Some(at_unix_ms);
        });
        tracing::info!(vm = %self.anchor.vm, name, "name moved");
    }

    /// Resolvers may believe an old answer for as long as its TTL; then the TTL can be what it was.
    async fn let_old_answers_expire(&mut self) {
        let NameState::Moved { at_unix_ms } = self.anchor.names else { return };
        let (Some(name), Some(names)) = (self.anchor.name.clone(), self.edges.names.clone()) else { return };
        let believed = Duration::from_secs(names.move_ttl_s().into());
        let passed = Duration::from_millis(unix_ms().saturating_sub(at_unix_ms));
        tokio::time::sleep(believed.saturating_sub(passed)).await;
        let mut wait = Duration::from_secs(1);
        let ttl_s = if self.anchor.ttl_s == 0 { names.move_ttl_s() } else { self.anchor.ttl_s };
        while let Err(error) = names.set_ttl(&name, ttl_s).await {
            tracing::warn!(vm = %self.anchor.vm, name, error = chain(&error), "TTL could not be restored yet");
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(NAMES_AGAIN);
        }
        self.anchor.names = NameState::Settled { at_unix_ms };
        self.write();
        self.show(|view| view.names = "settled".into());
    }

    /// Until no old flow is left and nobody asks for the home address any more.
    async fn wait_for_flows(&mut self) {
        let keys: Vec<PortKey> = self.anchor.holds().into_iter().map(|hold| hold.key).collect();
        // A resolver that asked before the TTL was lowered believes its answer for the TTL of then.
        let believed_until_ms = self.anchor.since_unix_ms + u64::from(self.anchor.ttl_s) * 1000;
        let left = Duration::from_millis(believed_until_ms.saturating_sub(unix_ms()));
        for key in &keys {
            if let Err(error) = self.edges.tunnel.names_expire(key.clone(), left).await {
                tracing::warn!(vm = %self.anchor.vm, error = chain(&error), "tunnel lost the machine");
            }
        }
        let mut status = self.edges.tunnel.status();
        loop {
            let (flows, may_end) = {
                let status = status.borrow_and_update();
                let ports: Vec<_> = status.ports.iter().filter(|port| keys.contains(&port.key)).collect();
                (
                    ports.iter().filter_map(|port| port.flows_alive).sum(),
                    !ports.is_empty() && ports.iter().all(|port| port.may_end),
                )
            };
            self.show(|view| view.flows = flows);
            if may_end || status.changed().await.is_err() {
                return;
            }
        }
    }

    async fn end(&mut self) {
        release(&self.edges, &self.anchor).await;
        self.show(|view| {
            view.flows = 0;
            view.closed_ms = Some(unix_ms());
        });
        tracing::info!(vm = %self.anchor.vm, "no old connection is left; home address is free");
    }

    fn write(&self) {
        if let Err(error) = self.edges.journal.put_anchor(&self.anchor.vm, &self.anchor) {
            tracing::error!(vm = %self.anchor.vm, error = chain(&error), "anchor could not be written down");
        }
    }

    fn show(&self, change: impl FnOnce(&mut AnchorView)) {
        self.views.send_modify(|views| {
            if let Some(view) = views.get_mut(&self.anchor.vm) {
                change(view);
            }
        });
    }
}

/// What the tunnel is to hold for a machine that is about to leave for `peer`.
pub fn ports(edges: &Edges, row: &MachineRow, peer: &SiteName) -> Result<Vec<HoldRequest>, Refusal> {
    let definition = &row.definition;
    definition
        .nics
        .iter()
        .map(|nic| {
            let lan = edges.config.lan.get(nic.lan.as_str()).ok_or_else(|| {
                Refusal::Incompatible(format!("site {} has no [lan.{}]", edges.site(), nic.lan))
            })?;
            let key = PortKey { machine: definition.name.clone(), nic: nic.name.clone() };
            Ok(HoldRequest {
                port: edges.port(row, &nic.name),
                key,
                peer: peer.clone(),
                mac: nic.mac,
                home: nic.home.iter().map(|home| home.addr).collect(),
                lan: lan.bridge.clone(),
            })
        })
        .collect()
}

/// What the tunnel is to prepare for a machine that visits.
pub fn visits(
    edges: &Edges,
    definition: &MachineDefinition,
    reservation: &Reservation,
    nics: &[NicHandover],
    peer: &SiteName,
) -> Result<Vec<VisitRequest>, Refusal> {
    definition
        .nics
        .iter()
        .map(|nic| {
            let lan = edges.config.lan.get(nic.lan.as_str()).ok_or_else(|| {
                Refusal::Incompatible(format!("site {} has no [lan.{}]", edges.site(), nic.lan))
            })?;
            let handed =
                nics.iter().find(|handed| handed.nic == nic.name).cloned().ok_or_else(|| {
                    Refusal::PeerMisbehaved(format!("nothing was said about NIC {}", nic.name))
                })?;
            let key = PortKey { machine: definition.name.clone(), nic: nic.name.clone() };
            let care_of = reservation
                .care_of
                .iter()
                .filter(|care_of| care_of.nic == nic.name)
                .map(|care_of| CareOf { home: care_of.home.addr, care_of: care_of.addr })
                .collect();
            Ok(VisitRequest {
                port: edges.tap_name(&key),
                key,
                peer: peer.clone(),
                others: other_homes(definition, &nic.name),
                nic: handed,
                lan: lan.bridge.clone(),
                care_of,
            })
        })
        .collect()
}

fn other_homes(definition: &MachineDefinition, nic: &DeviceName) -> Vec<IpAddr> {
    let others = definition.nics.iter().filter(|other| other.name != *nic);
    others.flat_map(|other| other.home.iter().map(|home| home.addr)).collect()
}

/// Where a machine that comes by this attempt has its disks. Named after the attempt, so that nothing
/// else can have the same name.
pub(super) fn pool_images(edges: &Edges, attempt: &Attempt, proposal: &Proposal) -> Vec<PathBuf> {
    arriving_images(&edges.config.storage.pool, attempt, proposal)
}

/// The same in this folder.
pub(crate) fn arriving_images(pool: &Path, attempt: &Attempt, proposal: &Proposal) -> Vec<PathBuf> {
    let short = &attempt.id.to_string()[..8];
    let name = &proposal.definition.name;
    proposal
        .definition
        .volumes()
        .map(|volume| pool.join(format!("{name}-{}.{short}.raw", volume.name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(epoch: u64) -> Known {
        let runs_there = watch::Sender::new(false);
        let mut told = runs_there.subscribe();
        let task = tokio::spawn(async move { drop(told.wait_for(|runs| *runs).await) });
        Known { epoch: Epoch(epoch), runs_there, task }
    }

    #[tokio::test]
    async fn a_machine_that_left_before_is_anchored_again_when_it_leaves_again() {
        let vm: VmName = "web1".parse().unwrap();
        let mut anchors = Anchors::default();
        assert!(anchors.is_news(&vm, Epoch(1)));
        anchors.insert(vm.clone(), known(1));
        assert!(!anchors.is_news(&vm, Epoch(1)), "the same word again");
        anchors.move_names(&vm);
        (&mut anchors.known.get_mut(&vm).unwrap().task).await.unwrap();
        assert!(!anchors.is_news(&vm, Epoch(1)), "a late word");
        assert!(anchors.is_news(&vm, Epoch(2)), "the machine was moved again");
    }

    #[tokio::test]
    async fn the_task_of_an_anchor_that_is_ended_does_nothing_more() {
        let vm: VmName = "web1".parse().unwrap();
        let mut anchors = Anchors::default();
        let anchor = known(1);
        let runs_there = anchor.runs_there.clone();
        anchors.insert(vm.clone(), anchor);
        anchors.end(&vm).await;
        assert_eq!(runs_there.receiver_count(), 0, "the task is gone");
        assert!(anchors.is_news(&vm, Epoch(1)));
    }
}
