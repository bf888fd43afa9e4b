//! What the daemon shows: machines, migrations, peers, the tunnel.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use longhaul_core::ids::{MigrationId, VmName};
use longhaul_core::migration::ledger::Ownership;

use super::recovery::qemu;
use super::{Daemon, Machine};
use crate::api::RequestError;
use crate::api::types::{
    JournalView, MachineView, MigrationView, PartialView, PeerView, Progressing, StatusView, TunnelView,
};
use crate::history;
use crate::metrics::{Figures, LinkFigures, page};
use crate::migration::partial::{self, Partial};
use crate::migration::{Inbound, MachineRow};

impl Daemon {
    pub(super) async fn status(&self) -> StatusView {
        let mut machines = Vec::new();
        for (vm, row) in self.edges.journal.machines::<MachineRow>().unwrap_or_default() {
            machines.push(self.machine_view(&row, self.machines.get(&vm)).await);
        }
        StatusView {
            site: self.edges.site().clone(),
            peers: self
                .edges
                .link
                .peers()
                .map(|peer| {
                    let up = peer.is_up();
                    let rtt_ms = up.then(|| peer.stats().rtt.as_secs_f64() * 1e3);
                    PeerView { name: peer.name().clone(), up, rtt_ms }
                })
                .collect(),
            machines,
            migrations: self.migrations.values().map(|running| running.viewer.current()).collect(),
            anchors: self.anchor_views.borrow().values().cloned().collect(),
            partials: self.partial_views(),
            tunnel: self.tunnel_view(),
        }
    }

    fn partial_views(&self) -> Vec<PartialView> {
        let kept = partial::list(&self.edges.config.storage.pool).into_iter();
        let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let view = |partial: Partial| PartialView {
            vm: partial.of.vm,
            disk: partial.of.disk.to_string(),
            from: partial.of.from,
            bytes: partial.taken.0,
            kept_ms: since(partial.since),
        };
        kept.map(view).collect()
    }

    /// Throws away what is kept of a machine that did not come.
    pub(super) fn discard(&self, vm: &VmName) -> Result<(), RequestError> {
        match partial::forget(&self.edges.config.storage.pool, vm) {
            0 => Err(RequestError::NotFound(format!("No disks of {vm} are kept here"))),
            _ => Ok(()),
        }
    }

    async fn machine_view(&self, row: &MachineRow, machine: Option<&Machine>) -> MachineView {
        let definition = &row.definition;
        let ownership = self.edges.journal.ownership(&definition.name).unwrap_or_default();
        let (owner, at) = match &ownership {
            Some(Ownership::Here { .. }) => ("here", None),
            Some(Ownership::Away { site, .. }) => ("away", Some(site.clone())),
            Some(Ownership::Arriving { .. }) => ("arriving", None),
            None => ("unknown", None),
        };
        let state = match machine {
            Some(machine) if self.is_crashed(machine) => "crashed".to_owned(),
            Some(Machine { guest: Some(guest), .. }) => {
                guest.status().await.map_or("gone".to_owned(), |state| state.to_string())
            }
            Some(Machine { guest: None, .. }) | None => "stopped".to_owned(),
        };
        MachineView {
            name: definition.name.clone(),
            owner: owner.to_owned(),
            at,
            epoch: ownership.map_or(0, |ownership| ownership.epoch().0),
            state,
            hold: self.held(row).map(|held| format!("{}; {}", held.why, held.remedy)),
            memory_bytes: definition.memory().0,
            disk_bytes: definition.volumes().map(|volume| volume.size_bytes).collect(),
            home: definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)).collect(),
            care_of: row.care_of.iter().map(|care_of| care_of.addr).collect(),
        }
    }

    /// Nobody stopped it, and its QEMU is gone. The machine is this site's: one that left has none here.
    pub(super) fn is_crashed(&self, machine: &Machine) -> bool {
        let owner = self.edges.journal.ownership(&machine.row.definition.name).unwrap_or_default();
        machine.row.wanted && !machine.has_qemu() && matches!(owner, Some(Ownership::Here { .. }))
    }

    pub(super) fn tunnel_view(&self) -> TunnelView {
        let status = self.edges.tunnel.status();
        let status = status.borrow();
        TunnelView {
            packets_out: status.counters.to_peers.packets,
            packets_in: status.counters.from_peers.packets,
            dropped: status.counters.dropped_total(),
            held: status.ports.iter().map(|port| port.held_packets).sum(),
        }
    }

    /// What the journal holds, judged by what runs here now.
    pub(super) async fn journal(&self, vm: Option<&VmName>) -> Result<Vec<JournalView>, RequestError> {
        let mut qemus = BTreeMap::new();
        for (name, machine) in &self.machines {
            qemus.insert(name.clone(), qemu(machine.guest.as_ref()).await);
        }
        let views = history::views(&self.edges.journal, vm, &qemus);
        let mut views = views.map_err(|error| RequestError::Failed(error.to_string()))?;
        for view in &mut views {
            let running = self.migrations.values().find(|running| running.attempt.id.to_string() == view.id);
            view.under_way = running.is_some_and(|running| running.inbox.is_some());
        }
        Ok(views)
    }

    pub(super) fn migration(&self, id: MigrationId) -> Result<MigrationView, RequestError> {
        match self.migrations.get(&id) {
            Some(running) => Ok(running.viewer.current()),
            None => Err(RequestError::NotFound(format!("No migration {id}; `longhaul status` lists them"))),
        }
    }

    pub(super) async fn abort(&mut self, id: MigrationId) -> Result<(), RequestError> {
        let Some(running) = self.migrations.get(&id) else {
            return Err(RequestError::NotFound(format!("No migration {id}; `longhaul status` lists them")));
        };
        let Some(inbox) = &running.inbox else {
            if self.forget_retry_after(id) {
                return Ok(());
            }
            return Err(RequestError::Conflict(format!("Migration {id} is over")));
        };
        if running.viewer.current().from != *self.edges.site() {
            return Err(RequestError::Conflict("Only the site that a machine leaves can abort".into()));
        }
        // A driver that ends at this moment has nothing to abort any more.
        drop(inbox.send(Inbound::Abort).await);
        Ok(())
    }

    pub(super) fn metrics(&self) -> String {
        let tunnel = self.tunnel_view();
        let running = |view: &MigrationView| view.progressing == Progressing::Running;
        let links = self.edges.link.peers().map(|peer| {
            let stats = peer.stats();
            LinkFigures {
                peer: peer.name().to_string(),
                up: stats.up,
                rtt_s: stats.rtt.as_secs_f64(),
                sent_bytes: stats.udp_sent.payload_bytes,
                received_bytes: stats.udp_received.payload_bytes,
            }
        });
        page(&Figures {
            links: links.collect(),
            machines_running: self.machines.values().filter(|machine| machine.has_qemu()).count() as u64,
            machines_crashed: self.machines.values().filter(|machine| self.is_crashed(machine)).count()
                as u64,
            migrations_running: self
                .migrations
                .values()
                .filter(|each| running(&each.viewer.current()))
                .count() as u64,
            anchors: self.anchor_views.borrow().values().filter(|view| view.closed_ms.is_none()).count()
                as u64,
            tunnel_packets_out: tunnel.packets_out,
            tunnel_packets_in: tunnel.packets_in,
            tunnel_dropped: tunnel.dropped,
        })
    }
}
