//! What is still held here of a machine that left: shown, and ended when its operator says so.

use std::collections::BTreeMap;

use longhaul_core::ids::{SiteName, VmName};
use longhaul_core::tunnel::datapath::PortStatus;
use longhaul_core::tunnel::flows::HeldBy;
use longhaul_core::tunnel::policy::{PortKey, Role};
use tokio::sync::oneshot;

use super::Daemon;
use super::machines::failed;
use crate::api::types::{AnchorView, ConflictView, FlowsView, MAX_FLOWS_SHOWN, NicFlows};
use crate::api::{Reply, RequestError};
use crate::migration::anchor::{AnchorCommand, Released, tell};

impl Daemon {
    /// What is held here of machines that left, with what the tunnel knows of it at this moment.
    pub(super) fn anchor_views(&self) -> Vec<AnchorView> {
        let (status, conflicts) = (self.edges.tunnel.status(), self.edges.tunnel.conflicts());
        let (status, conflicts) = (status.borrow(), conflicts.borrow());
        let mut views: Vec<AnchorView> = self.anchor_views.borrow().values().cloned().collect();
        for view in views.iter_mut().filter(|view| view.closed_ms.is_none()) {
            let is_its = |port: &&PortStatus| port.role == Role::Away && port.key.machine == view.vm;
            let ports: Vec<&PortStatus> = status.ports.iter().filter(is_its).collect();
            view.flows = ports.iter().filter_map(|port| port.flows_alive()).sum();
            view.flows_one_way = ports.iter().map(|port| port.one_way.flows()).sum();
            let its = conflicts.iter().filter(|conflict| conflict.key.machine == view.vm);
            view.conflicts = its
                .map(|conflict| ConflictView { address: conflict.address, mac: conflict.mac.to_string() })
                .collect();
        }
        views
    }

    /// Packets of each machine that were more than its share of the tunnel.
    pub(super) fn over_share(&self) -> BTreeMap<VmName, u64> {
        let status = self.edges.tunnel.status();
        let status = status.borrow();
        let over = status.ports.iter().filter(|port| port.over_share > 0);
        over.map(|port| (port.key.machine.clone(), port.over_share)).collect()
    }

    /// What holds the tunnel of each NIC that left.
    pub(super) fn held(&self) -> Vec<(String, String, HeldBy)> {
        let status = self.edges.tunnel.status();
        let status = status.borrow();
        let away = status.ports.iter().filter(|port| port.role == Role::Away);
        let held = away.filter_map(|port| Some((&port.key, port.held_by.clone()?)));
        held.map(|(key, held)| (key.machine.to_string(), key.nic.to_string(), held)).collect()
    }

    /// Packets that did not travel, by reason.
    pub(super) fn dropped(&self) -> Vec<(&'static str, u64)> {
        let status = self.edges.tunnel.status();
        let status = status.borrow();
        status.counters.dropped.iter().map(|(reason, packets)| (reason.label(), *packets)).collect()
    }

    /// Connections that stall when this gateway ends, and break when its host does, by machine; `None`: there are none.
    pub(super) fn connections_through_here(&self) -> Option<(u64, String)> {
        let held: Vec<AnchorView> = self.anchor_views().into_iter().filter(|view| view.flows > 0).collect();
        let machines: Vec<String> = held.iter().map(|view| format!("{} ({})", view.vm, view.flows)).collect();
        let flows: u64 = held.iter().map(|view| view.flows).sum();
        (flows > 0).then(|| (flows, machines.join(", ")))
    }

    /// `longhaul flows`: a task, for the tunnel may be busy.
    pub(super) fn flows(&self, vm: &VmName, reply: Reply<FlowsView>) {
        let anchor = self.anchor_views.borrow().get(vm).filter(|view| view.closed_ms.is_none()).cloned();
        let row = self.row(vm);
        let (Some(anchor), Some(row)) = (anchor, row) else {
            return drop(reply.send(Err(nothing_held(vm))));
        };
        let (tunnel, vm) = (self.edges.tunnel.clone(), vm.clone());
        tokio::spawn(async move {
            let mut nics = Vec::new();
            for nic in row.definition.nics {
                let key = PortKey { machine: vm.clone(), nic: nic.name.clone() };
                match tunnel.flows(key, MAX_FLOWS_SHOWN).await {
                    Ok(listing) => {
                        let (held_by, flows) = (listing.held_by, listing.flows);
                        nics.push(NicFlows { nic: nic.name, held_by, flows });
                    }
                    Err(error) => return drop(reply.send(Err(failed(&error)))),
                }
            }
            drop(reply.send(Ok(FlowsView { at: anchor.at, nics })));
        });
    }

    /// `longhaul release`: its address here is free, and connections by it end.
    pub(super) async fn release(&self, vm: &VmName, reply: Reply<()>) {
        let (done, ended) = oneshot::channel();
        tell(&self.anchors, AnchorCommand::Release(vm.clone(), done)).await;
        let vm = vm.clone();
        tokio::spawn(async move {
            let answer = match ended.await {
                Ok(Released::Ended) => Ok(()),
                Ok(Released::Nothing) => Err(nothing_held(&vm)),
                Ok(Released::StillMoving) => {
                    Err(RequestError::Conflict(format!("Machine {vm} is not known to run elsewhere yet")))
                }
                Err(_) => Err(RequestError::Failed("The gateway is stopping".into())),
            };
            drop(reply.send(answer));
        });
    }
}

impl Daemon {
    /// `longhaul moved`: its operator says where the machine is, because the site that it went to cannot.
    pub(super) async fn moved(&self, vm: &VmName, to: SiteName, reply: Reply<()>) {
        if self.edges.config.peer(&to).is_none() {
            let text = format!("{to} is none of this site's peers");
            return drop(reply.send(Err(RequestError::Invalid(text))));
        }
        let (done, said) = oneshot::channel();
        tell(&self.anchors, AnchorCommand::Said { vm: vm.clone(), to, done }).await;
        let vm = vm.clone();
        tokio::spawn(async move {
            let answer = match said.await {
                Ok(true) => Ok(()),
                Ok(false) => Err(RequestError::NotFound(format!(
                    "Machine {vm} is not known here to run at another site"
                ))),
                Err(_) => Err(RequestError::Failed("The gateway is stopping".into())),
            };
            drop(reply.send(answer));
        });
    }
}

fn nothing_held(vm: &VmName) -> RequestError {
    RequestError::NotFound(format!("Nothing is held here for connections of a machine {vm}"))
}
