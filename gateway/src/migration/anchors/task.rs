//! One anchor at work: it attracts, moves the name, waits until nobody needs it any more, and ends; then only its word is
//! owed to sites that have not heard it.
//!
//! Where an anchor comes from and who may speak of it is [`super`]'s; how the name gets to its servers is [`super::names`]'.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::time::Duration;

use longhaul_core::ids::{SiteName, VmName};
use longhaul_core::tunnel::datapath::PortStatus;
use longhaul_core::tunnel::handover::FlowTuple;
use longhaul_core::tunnel::policy::{PortKey, Role};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::attract::{Unattracted, again, attract_rest, beside};
use super::ended::note_ended;
use super::needed::note_needed;
use super::telling::{tell_others, unheard};
use super::{keep_rest, leave, put, release};
use crate::api::types::AnchorView;
use crate::journal::unix_ms;
use crate::migration::anchor::{Anchor, AnchorNic};
use crate::migration::{Edges, chain};
use crate::tunnel::TunnelStatus;

/// What it works with.
pub(super) struct AnchorTask {
    pub edges: Edges,
    pub anchor: Anchor,
    pub views: watch::Sender<BTreeMap<VmName, AnchorView>>,
    /// The machine runs at its new place.
    pub told: watch::Receiver<bool>,
    /// The sites that have heard where it is.
    pub heard: watch::Receiver<BTreeSet<SiteName>>,
    /// Connections of before the move that are over.
    pub over: watch::Sender<BTreeSet<FlowTuple>>,
    /// NICs whose addresses could not be attracted yet.
    pub unattracted: watch::Sender<Vec<Unattracted>>,
    /// When an earlier gateway knew its addresses to be needed last, milliseconds since the UNIX epoch.
    pub needed_ms: Option<u64>,
}

/// How long addresses are attracted for sites that have not heard where the machine is.
const TELL_LIMIT: Duration = Duration::from_secs(3600);
/// Between two looks at a machine that is on its way back: once it is here this task is ended.
const RETURN_LOOKS: Duration = Duration::from_secs(1);
/// Between two tries at the name server, or at another site, at most.
pub(super) const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

impl AnchorTask {
    pub async fn run(mut self) {
        let (tunnel, unattracted) = (self.edges.tunnel.clone(), self.unattracted.clone());
        let attract = move |nic| again(tunnel.clone(), nic);
        let mut rest = pin!(attract_rest(self.anchor.vm.clone(), unattracted, self.views.clone(), attract));
        if beside(rest.as_mut(), self.told.wait_for(|runs| *runs)).await.is_err() {
            return;
        }
        if !self.anchor.runs_there {
            self.anchor.runs_there = true;
            self.write();
        }
        let telling = tokio::spawn(tell_others(self.edges.clone(), self.anchor.clone(), self.heard.clone()));
        let telling = AbortOnDrop(telling);
        let noting = tokio::spawn(note_ended(self.edges.clone(), self.anchor.clone(), self.over.clone()));
        let noting = AbortOnDrop(noting);
        let status = self.edges.tunnel.status();
        let needed = note_needed(self.edges.clone(), self.anchor.clone(), self.needed_ms, status);
        let needed = AbortOnDrop(tokio::spawn(needed));
        let limit = self.hold_left();
        if beside(rest.as_mut(), within(limit, self.settle())).await.is_none() && !self.anchor.ended {
            tracing::warn!(vm = %self.anchor.vm, "the tunnel has reached its limit, whatever it is still held for");
        }
        if !self.anchor.ended {
            // A site that does not hear it has a detour over this one. One that is gone for good must not hold this for
            // ever.
            let limit = self.hold_left().unwrap_or(TELL_LIMIT).min(TELL_LIMIT);
            let _ = beside(rest, within(Some(limit), self.others_have_heard())).await;
            while !self.end().await {
                tokio::time::sleep(RETURN_LOOKS).await;
                let _ = within(self.hold_left(), self.wait_for_flows()).await;
            }
        }
        // The name is owed whatever became of the tunnel.
        self.settle().await;
        drop((noting, needed));
        self.others_have_heard().await;
        drop(telling);
        self.note_news();
        keep_rest(&self.edges, &self.anchor);
    }

    /// How long the operator lets it attract, counted from the move and not from the gateway's start.
    fn hold_left(&self) -> Option<Duration> {
        let limit = self.edges.config.tunnel.hold.limit()?;
        let held = Duration::from_millis(unix_ms().saturating_sub(self.anchor.since_unix_ms));
        Some(limit.saturating_sub(held))
    }

    async fn others_have_heard(&mut self) {
        let (edges, anchor) = (&self.edges, &self.anchor);
        // Who hears for it has ended only with this task.
        let _ = self.heard.wait_for(|heard| unheard(edges, anchor, heard).is_empty()).await;
    }

    /// Names, then flows: until the tunnel may end, or if it has ended, until the name is as it was.
    async fn settle(&mut self) {
        self.move_name().await;
        self.wait_for_servers().await;
        if let Some(lowered) = self.lowered_ttl() {
            if !lowered.restore_in_time().await {
                // Nothing waits for a name server that may be gone.
                tokio::select! {
                    () = lowered.restore_late() => {}
                    () = self.wait_for_flows(), if self.attracts() => return,
                }
            }
            self.settled(&lowered);
        }
        self.wait_for_flows().await;
    }

    pub fn attracts(&self) -> bool {
        !self.anchor.nics.is_empty() && !self.anchor.ended
    }

    /// Until no old flow is left and nobody asks for the home address any more.
    async fn wait_for_flows(&self) {
        if !self.attracts() {
            return;
        }
        // Of what is not attracted nobody can say whether it is needed.
        if self.unattracted.subscribe().wait_for(Vec::is_empty).await.is_err() {
            return;
        }
        // A resolver that asked before the TTL was lowered believes its answer for the TTL of then, and so does one that
        // asked a name server which had not heard of that either.
        let told_ms = self.anchor.since_unix_ms.max(self.anchor.names.moved_unix_ms().unwrap_or(0));
        let believed_until_ms = told_ms + u64::from(self.anchor.ttl_s) * 1000;
        let left = Duration::from_millis(believed_until_ms.saturating_sub(unix_ms()));
        let is_given = |nic: &AnchorNic| self.anchor.is_still_given(nic.from, &nic.addresses);
        for nic in self.anchor.nics.iter().filter(|nic| !is_given(nic)) {
            let key = PortKey { machine: self.anchor.vm.clone(), nic: nic.nic.clone() };
            if let Err(error) = self.edges.tunnel.names_expire(key, left).await {
                tracing::warn!(vm = %self.anchor.vm, error = chain(&error), "tunnel lost the machine");
            }
        }
        // At an earlier place something may have stood in for what is given now, and the tunnel was told so.
        let is_needed = self.anchor.nics.iter().any(is_given);
        let (keys, mut status) = (self.keys(), self.edges.tunnel.status());
        loop {
            let (flows, may_end) = standing(&status.borrow_and_update(), &keys);
            self.show(|view| view.flows = flows);
            if (may_end && !is_needed) || status.changed().await.is_err() {
                return;
            }
        }
    }

    /// False if the machine is on its way back.
    async fn end(&mut self) -> bool {
        if !release(&self.edges, &self.anchor).await {
            tracing::debug!(vm = %self.anchor.vm, "no old connection is left, and the machine is on its way back");
            return false;
        }
        self.note_news();
        leave(&self.edges, &mut self.anchor);
        self.show(|view| {
            view.flows = 0;
            view.closed_ms = Some(unix_ms());
        });
        tracing::info!(vm = %self.anchor.vm, "no old connection is left; its address here is free");
        true
    }

    pub fn keys(&self) -> Vec<PortKey> {
        self.anchor.holds().into_iter().map(|hold| hold.key).collect()
    }

    pub fn write(&mut self) {
        self.note_news();
        put(&self.edges, &self.anchor);
    }

    /// Who has heard is not told again, and for what is over nothing is held: not by the next gateway either.
    fn note_news(&mut self) {
        self.anchor.forget_told(&self.heard.borrow());
        self.anchor.forget_flows(&self.over.borrow());
    }

    pub fn show(&self, change: impl FnOnce(&mut AnchorView)) {
        show(&self.views, &self.anchor.vm, change);
    }
}

/// Changes what is shown of an anchor, if it is.
pub(super) fn show(
    views: &watch::Sender<BTreeMap<VmName, AnchorView>>,
    vm: &VmName,
    change: impl FnOnce(&mut AnchorView),
) {
    views.send_modify(|views| {
        if let Some(view) = views.get_mut(vm) {
            change(view);
        }
    });
}

/// What `work` gives, or nothing when `limit` is over first.
async fn within<T>(limit: Option<Duration>, work: impl Future<Output = T>) -> Option<T> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}

/// Flows that are held for these NICs, and whether nothing holds their tunnels any more.
pub(super) fn standing(status: &TunnelStatus, keys: &[PortKey]) -> (u64, bool) {
    // Beside it may stand what is passed on for the machine's other addresses.
    let is_ours = |port: &&PortStatus| port.role == Role::Away && keys.contains(&port.key);
    let ports: Vec<_> = status.ports.iter().filter(is_ours).collect();
    let flows = ports.iter().filter_map(|port| port.flows_alive()).sum();
    (flows, !ports.is_empty() && ports.iter().all(|port| port.may_end))
}

/// A task that ends with its owner.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
