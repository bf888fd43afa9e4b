//! Migrations, carried out: the drivers of the two machines, and one leaf per stage.
//!
//! ```text
//!   source driver        preflight -> precopy -> park -> (commit) -> release      rollback
//!   destination driver   admission -> prepare -> load -> (commit) -> activate     discard
//! ```
//!
//! A driver selects an event, gives it to its machine, has the journal make the record durable, and
//! performs the actions; long ones run as leaf tasks that report back as events, so the loop never
//! waits for anything but the journal. This is the only place where the edges meet.

mod activate;
pub mod admission;
pub mod anchor;
pub mod anchors;
mod arbitrate;
mod damage;
pub mod descriptors;
mod destination;
mod discard;
pub(crate) mod home_servers;
mod host;
pub mod journal_room;
pub mod kept;
mod neighbourhood;
mod park;
pub mod partial;
mod precopy;
mod preflight;
mod prepare;
mod reins;
mod release;
pub mod remembered;
mod rollback;
pub mod source;
mod standing;
pub mod stay;
pub mod templates;
pub mod view;
mod work;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use longhaul_core::ids::{DeviceName, Epoch, MigrationId, SiteName, VmName};
use longhaul_core::machine::MachineDefinition;
use longhaul_core::migration::Attempt;
use longhaul_core::migration::generation::Generation;
use longhaul_core::migration::message::{CareOf, Carried, Handover, MigrationMessage, Refusal};
use longhaul_core::migration::resolve::Resolution;
use longhaul_core::tunnel::policy::PortKey;

use crate::config::Config;
use crate::dns::Names;
use crate::etcd::Registers;
use crate::generation::write_notes;
use crate::hypervisor::{Guest, Hypervisor};
use crate::journal::Journal;
use crate::link::{Link, PeerHandle};
use crate::tunnel::{Tunnel, TunnelConfig, tap_name};

pub use destination::DestinationDriver;
pub(crate) use release::{keep_aside, moved_name};
pub(crate) use rollback::end_what_is_left;
pub use source::SourceDriver;
pub(crate) use standing::look;
use view::Viewer;

/// QEMU opens its taps before it becomes the machine's user.
pub const TAP_OWNER: u32 = 0;

/// Everything a migration works with. Cheap to clone.
#[derive(Clone)]
pub struct Edges {
    /// The configuration.
    pub config: Arc<Config>,
    /// Durable state.
    pub journal: Journal,
    /// QEMU.
    pub hypervisor: Arc<Hypervisor>,
    /// The other sites.
    pub link: Arc<Link>,
    /// Guests' packets.
    pub tunnel: Tunnel,
    /// How the tunnel was configured: it names the taps.
    pub tunnel_config: Arc<TunnelConfig>,
    /// The name server, if there is one.
    pub names: Option<Arc<Names>>,
    /// The registers in etcd, if there are any.
    pub etcd: Option<Arc<Registers>>,
    /// What times are counted from.
    pub start: Instant,
}

/// What this site knows of a machine, besides who owns it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineRow {
    /// The machine.
    pub definition: MachineDefinition,
    /// Each volume's image here, in the definition's order.
    pub images: Vec<PathBuf>,
    /// The site at which its home addresses live.
    pub home_site: SiteName,
    /// The site it came from, if it came.
    pub came_from: Option<SiteName>,
    /// What is known of a machine that something else started.
    pub adopted: Option<Adopted>,
    /// What it was given here; empty at home.
    pub care_of: Vec<CareOf>,
    /// Addresses of earlier visits, by which connections may still be open. Their places are the marks of those
    /// connections, and do not change while it is here.
    pub carried: Vec<Carried>,
    /// Those of them that are attracted nowhere any more.
    pub over: Vec<IpAddr>,
    /// What keeps its connections alive here, if it came from another site.
    pub handover: Option<Handover>,
    /// It is meant to run.
    pub wanted: bool,
    /// The epoch of the arrival that is over: it ran here, or was not to.
    pub settled_in: Option<Epoch>,
    /// Its name's TTL before a move lowered it, until that is undone.
    #[serde(default)]
    pub ttl_before_s: Option<u32>,
}

/// What a machine has that something else started: neither is this gateway's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// Its monitor's socket.
    pub monitor: PathBuf,
    /// The tap of each of its NICs.
    pub ports: BTreeMap<DeviceName, String>,
}

impl MachineRow {
    /// Its home addresses live at another site than this one.
    pub fn visits(&self, site: &SiteName) -> bool {
        self.home_site != *site
    }
}

/// What reaches a driver from outside its own leaves.
#[derive(Debug)]
pub enum Inbound {
    /// The link to the peer is up.
    LinkUp,
    /// It is down.
    LinkDown,
    /// The peer said something.
    Message(MigrationMessage),
    /// The operator wants it to end.
    Abort,
    /// An operator decided for a peer that is gone for good.
    Resolve(Resolution),
}

/// What a leaf works with: the edges, what is attempted, and the ways back.
pub(crate) struct Leaf<E> {
    pub edges: Edges,
    pub attempt: Attempt,
    pub viewer: Viewer,
    pub events: mpsc::Sender<E>,
    /// The machine's QEMU at this site, for whoever goes on after the migration.
    pub guest: watch::Sender<Option<Guest>>,
}

impl Edges {
    /// Time since the daemon started, as the core counts it.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// This site.
    pub fn site(&self) -> &SiteName {
        &self.config.site.name
    }

    /// The folder for the gateway's own sockets of `vm`'s migration.
    pub fn socket_dir(&self, vm: &VmName) -> PathBuf {
        self.config.site.run_dir.join("migration").join(vm.as_str())
    }

    /// The tap of a machine's NIC.
    pub fn tap_name(&self, key: &PortKey) -> String {
        tap_name(&self.tunnel_config, key)
    }

    /// The tap a machine of this site is plugged into by that NIC: an adopted one has its own.
    pub fn port(&self, row: &MachineRow, nic: &DeviceName) -> String {
        let adopted = row.adopted.as_ref().and_then(|adopted| adopted.ports.get(nic));
        let key = || PortKey { machine: row.definition.name.clone(), nic: nic.clone() };
        adopted.cloned().unwrap_or_else(|| self.tap_name(&key()))
    }

    /// The peer at the other side of an attempt.
    pub fn peer(&self, site: &SiteName) -> Option<PeerHandle> {
        self.link.peer(site)
    }

    /// Says something to a peer. Never waits, so that a peer that reads nothing holds up nobody; what is
    /// lost is repeated by the machines.
    pub fn send(&self, peer: &SiteName, id: MigrationId, message: &MigrationMessage) {
        let Some(handle) = self.link.peer(peer) else { return };
        match message.to_wire(id) {
            Ok(wire) => {
                if let Err(error) = handle.try_send(wire) {
                    tracing::debug!(%peer, %error, "message lost");
                }
            }
            Err(error) => tracing::warn!(%peer, %error, "message does not fit a frame"),
        }
    }
}

impl<E> Clone for Leaf<E> {
    fn clone(&self) -> Self {
        Self {
            edges: self.edges.clone(),
            attempt: self.attempt.clone(),
            viewer: self.viewer.clone(),
            events: self.events.clone(),
            guest: self.guest.clone(),
        }
    }
}

impl<E> Leaf<E> {
    /// Reports to the driver; a driver that is gone needs no reports.
    pub async fn report(&self, event: E) {
        if self.events.send(event).await.is_err() {
            tracing::debug!(vm = %self.attempt.vm, "event after the end of the migration");
        }
    }
}

/// Writes beside each image that `owner` has owned the machine since this attempt's epoch.
pub(crate) async fn note(attempt: &Attempt, images: Vec<PathBuf>, owner: &SiteName) {
    let note = Generation { vm: attempt.vm.clone(), epoch: attempt.epoch, owner: owner.clone() };
    let written = tokio::task::spawn_blocking(move || write_notes(&images, &note)).await;
    // A task that was cancelled ends with the gateway, which repeats it.
    if let Ok(Err(error)) = written {
        tracing::error!(vm = %attempt.vm, error = chain(&error), "an old journal would not be noticed");
    }
}

/// Waits until a leaf is told to hand on what it works with.
pub(crate) async fn told_to_stop(stop: &mut watch::Receiver<bool>) {
    // A driver that is gone will not tell any more, and wants nothing more either.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A hypervisor's failure, as the other side may hear of it.
pub(crate) fn hypervisor_failed(error: impl std::error::Error) -> Refusal {
    Refusal::Hypervisor(Refusal::text(chain(&error)))
}

/// An error with its causes, on one line; what an error says of its cause itself is not said again.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text += &format!(": {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Chained {
        #[error("disk is full")]
        Root,
        #[error("cannot write")]
        Silent(#[source] Box<Chained>),
        #[error("cannot write ({0})")]
        Telling(#[source] Box<Chained>),
    }

    #[test]
    fn a_cause_is_said_once() {
        assert_eq!(chain(&Chained::Silent(Box::new(Chained::Root))), "cannot write: disk is full");
        assert_eq!(chain(&Chained::Telling(Box::new(Chained::Root))), "cannot write (disk is full)");
    }
}
