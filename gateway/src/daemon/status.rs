//! What the daemon shows: machines, migrations, peers, the tunnel.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use longhaul_core::ids::{MigrationId, VmName};
use longhaul_core::migration::Stage;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::units::Rate;
use tokio::sync::oneshot;

use super::machines::held;
use super::recovery::seen;
use super::{Daemon, Machine};
use crate::api::types::{
    AnchorView, JournalView, MachineView, MigrationView, PartialView, PeerView, Progressing, StatusView,
    TunnelView,
};
use crate::api::{Reply, RequestError};
use crate::history::{self, Seen, Site};
use crate::hypervisor::{Guest, QmpError};
use crate::link::PeerHandle;
use crate::metrics::{Figures, LinkFigures, page};
use crate::migration::partial::{self, Partial};
use crate::migration::{Edges, Inbound, MachineRow};

/// How long a QEMU may take to say its state: a look at all machines takes no longer.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

impl Daemon {
    pub(super) fn status(&self, reply: oneshot::Sender<StatusView>) {
        let rows = self.edges.journal.machines::<MachineRow>().unwrap_or_default();
        let looks: Vec<Look> = rows.iter().map(|(vm, _)| self.look(vm)).collect();
        let mut view = self.view(rows.iter().map(|(_, row)| self.machine_view(row)).collect());
        tokio::spawn(async move {
            let states = join_all(looks.iter().map(run_state)).await;
            for (machine, state) in view.machines.iter_mut().zip(states) {
                machine.state = state;
            }
            // An asker that went away needs no answer.
            drop(reply.send(view));
        });
    }

    fn look(&self, vm: &VmName) -> Look {
        match self.machines.get(vm) {
            Some(machine) if is_crashed(&self.edges, machine) && self.watches.waits(vm) => Look::Restarting,
            Some(machine) if is_crashed(&self.edges, machine) => Look::Crashed,
            Some(machine) if machine.silent => Look::Silent,
            Some(Machine { guest: Some(guest), .. }) => Look::Ask(guest.clone()),
            Some(Machine { guest: None, .. }) | None => Look::Stopped,
        }
    }

    fn view(&self, machines: Vec<MachineView>) -> StatusView {
        StatusView {
            site: self.edges.site().clone(),
            peers: self.edges.link.peers().map(peer_view).collect(),
            machines,
            migrations: self.migration_views(),
            anchors: self.anchor_views(),
            partials: self.partial_views(),
            tunnel: self.tunnel_view(),
            kept: self.kept_disks(),
            kept_memory: self.kept_memory(),
            over_share: self.over_share(),
        }
    }

    /// In the order in which they began.
    fn migration_views(&self) -> Vec<MigrationView> {
        let mut views: Vec<_> = self.migrations.values().map(|running| running.viewer.current()).collect();
        views.sort_by_key(|view| view.started_ms);
        views
    }

    fn partial_views(&self) -> Vec<PartialView> {
        let kept = partial::list(&self.edges.config.storage.pool).into_iter();
        let view = |partial: Partial| PartialView {
            vm: partial.of.vm,
            disk: partial.of.disk.to_string(),
            from: partial.of.from,
            bytes: partial.taken.0,
            kept_ms: in_unix_ms(partial.since),
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

    fn machine_view(&self, row: &MachineRow) -> MachineView {
        let definition = &row.definition;
        let ownership = self.edges.journal.ownership(&definition.name).unwrap_or_default();
        let (owner, at) = match &ownership {
            Some(Ownership::Here { .. }) => ("here", None),
            Some(Ownership::Away { site, .. }) => ("away", Some(site.clone())),
            Some(Ownership::Arriving { .. }) => ("arriving", None),
            Some(Ownership::Offered { site, .. }) => ("offered", Some(site.clone())),
            None => ("unknown", None),
        };
        MachineView {
            name: definition.name.clone(),
            owner: owner.to_owned(),
            at,
            epoch: ownership.map_or(0, |ownership| ownership.epoch().0),
            // QEMU has not been asked yet.
            state: String::new(),
            ttl_owed_s: self.owed_ttl_s(row),
            hold: held(&self.edges, row).map(|held| format!("{}; {}", held.why, held.remedy)),
            memory_bytes: definition.memory().0,
            disk_bytes: definition.volumes().map(|volume| volume.size_bytes).collect(),
            home: definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)).collect(),
            care_of: row.care_of.iter().map(|care_of| care_of.addr).collect(),
        }
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
    pub(super) fn journal(&self, vm: Option<VmName>, reply: Reply<Vec<JournalView>>) {
        let guests: Vec<(VmName, Option<Guest>)> =
            self.machines.iter().map(|(vm, machine)| (vm.clone(), machine.guest.clone())).collect();
        let ended = |id: &MigrationId| self.migrations[id].inbox.is_none();
        let under_way: BTreeSet<String> =
            self.migrations.keys().filter(|id| !ended(id)).map(ToString::to_string).collect();
        let edges = self.edges.clone();
        tokio::spawn(async move {
            let site = Site { name: edges.site(), pool: &edges.config.storage.pool };
            let asked = guests.into_iter().map(async |(vm, guest)| (vm, seen(guest.as_ref()).await));
            let seen: BTreeMap<VmName, Seen> = join_all(asked).await.into_iter().collect();
            let views = history::views(&edges.journal, vm.as_ref(), &seen, Some(site)).map(|mut views| {
                for view in &mut views {
                    view.under_way = under_way.contains(&view.id);
                }
                views
            });
            // An asker that went away needs no answer.
            drop(reply.send(views.map_err(|error| RequestError::Failed(error.to_string()))));
        });
    }

    pub(super) fn migration(&self, id: MigrationId) -> Result<MigrationView, RequestError> {
        match self.migrations.get(&id) {
            Some(running) => Ok(running.viewer.current()),
            None => Err(no_such_migration(id)),
        }
    }

    pub(super) async fn abort(&mut self, id: MigrationId) -> Result<(), RequestError> {
        let Some(running) = self.migrations.get(&id) else {
            return Err(no_such_migration(id));
        };
        let Some(inbox) = &running.inbox else {
            if self.forget_retry_after(id) {
                return Ok(());
            }
            return Err(RequestError::Conflict(format!("Migration {id} is over")));
        };
        let view = running.viewer.current();
        // One that is being undone already is what is asked for.
        let may_be_given = view.stage >= Stage::Commitment && view.reason.is_none();
        if view.to == *self.edges.site() && may_be_given {
            return Err(RequestError::Conflict(format!(
                "Machine {} is loaded here, and site {} may have given it away; abort at that site, or see `longhaul resolve --help`",
                view.vm, view.from
            )));
        }
        // A driver that ends at this moment has nothing to abort any more.
        drop(inbox.send(Inbound::Abort).await);
        Ok(())
    }

    pub(super) fn metrics(&self) -> String {
        let tunnel = self.tunnel_view();
        let anchors = self.anchor_views();
        let sum = |of: fn(&AnchorView) -> u64| anchors.iter().map(of).sum::<u64>();
        let running = |view: &MigrationView| view.progressing == Progressing::Running;
        let links = self.edges.link.peers().map(|peer| {
            let stats = peer.stats();
            LinkFigures {
                peer: peer.name().to_string(),
                up: stats.up,
                rtt_s: stats.rtt.as_secs_f64(),
                min_rtt_s: stats.min_rtt.as_secs_f64(),
                bandwidth: stats.bandwidth.unwrap_or_default().0,
                sent_bytes: stats.udp_sent.payload_bytes,
                received_bytes: stats.udp_received.payload_bytes,
            }
        });
        page(&Figures {
            links: links.collect(),
            machines_running: self.machines.values().filter(|machine| machine.has_qemu()).count() as u64,
            machines_crashed: self
                .machines
                .values()
                .filter(|machine| is_crashed(&self.edges, machine))
                .count() as u64,
            migrations_running: self
                .migrations
                .values()
                .filter(|each| running(&each.viewer.current()))
                .count() as u64,
            migrations_with_notices: self
                .migrations
                .values()
                .map(|each| each.viewer.current())
                .filter(|view| running(view) && !view.notices.is_empty())
                .count() as u64,
            anchors: sum(|view| view.closed_ms.is_none().into()),
            names_behind: sum(|view| view.names_behind.len() as u64),
            address_conflicts: sum(|view| view.conflicts.len() as u64),
            flows: sum(|view| view.flows),
            flows_one_way: sum(|view| view.flows_one_way),
            over_share: self
                .over_share()
                .into_iter()
                .map(|(vm, packets)| (vm.to_string(), packets))
                .collect(),
            held: self.held(),
            tunnel_packets_out: tunnel.packets_out,
            tunnel_packets_in: tunnel.packets_in,
            tunnel_dropped: self.dropped(),
        })
    }
}

/// A file's time.
pub(super) fn in_unix_ms(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// What somebody asked for by a wrong id.
pub(super) fn no_such_migration(id: MigrationId) -> RequestError {
    RequestError::NotFound(format!("No migration {id}; `longhaul status` lists them"))
}

fn peer_view(peer: &PeerHandle) -> PeerView {
    let in_mbit = |rate: Rate| rate.0 as f64 * 8.0 / 1e6;
    let stats = peer.stats();
    let in_ms = |time: Duration| stats.up.then_some(time.as_secs_f64() * 1e3);
    PeerView {
        name: peer.name().clone(),
        up: stats.up,
        rtt_ms: in_ms(stats.rtt),
        min_rtt_ms: in_ms(stats.min_rtt),
        estimated_mbit: stats.bandwidth.map(in_mbit),
        limit_mbit: peer.limited_to().map(in_mbit),
    }
}

/// Nobody stopped it, and its QEMU is gone. The machine is this site's: one that left has none here.
pub(super) fn is_crashed(edges: &Edges, machine: &Machine) -> bool {
    let owner = edges.journal.ownership(&machine.row.definition.name).unwrap_or_default();
    machine.row.wanted
        && !machine.silent
        && !machine.has_qemu()
        && matches!(owner, Some(Ownership::Here { .. }))
}

/// Where a machine's state is to be learned.
enum Look {
    Stopped,
    Crashed,
    Restarting,
    /// Its QEMU does not answer.
    Silent,
    Ask(Guest),
}

/// What the machine's QEMU says of it.
async fn run_state(look: &Look) -> String {
    let guest = match look {
        Look::Silent => return "no answer".to_owned(),
        Look::Stopped => return "stopped".to_owned(),
        Look::Crashed => return "crashed".to_owned(),
        Look::Restarting => return "restarting".to_owned(),
        Look::Ask(guest) => guest,
    };
    match guest.status_within(LOOK_LIMIT).await {
        Ok(state) => state.to_string(),
        Err(QmpError::Timeout { .. }) => "no answer".to_owned(),
        Err(_) => "gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use longhaul_core::ids::Epoch;
    use longhaul_core::migration::{Attempt, CommitMode};
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::migration::view::Viewer;
    use crate::test_site::TestSite;

    #[tokio::test]
    async fn what_may_have_been_given_to_this_site_is_not_aborted_here_unless_it_is_refused_already() {
        let (site, _peer) = TestSite::pair().await;
        let mut daemon = Daemon::idle(site.edges.clone());
        let (id, peer) = (MigrationId(1), "b".parse().unwrap());
        let vm = "web1".parse().unwrap();
        let attempt = Attempt { id, vm, peer, epoch: Epoch(1), commit: CommitMode::Pipelined };
        let viewer = Viewer::new(&attempt, &attempt.peer, daemon.edges.site());
        let (inbox, mut heard) = mpsc::channel(4);
        daemon.spawn(attempt, inbox, viewer.clone(), watch::channel(None).1, std::future::pending());
        viewer.enter(Stage::PreCopy);
        daemon.abort(id).await.unwrap();
        assert!(matches!(heard.try_recv(), Ok(Inbound::Abort)));
        viewer.enter(Stage::Commitment);
        assert!(matches!(daemon.abort(id).await, Err(RequestError::Conflict(_))));
        assert!(heard.try_recv().is_err());
        viewer.reason("QEMU died".into());
        daemon.abort(id).await.unwrap();
    }
}
