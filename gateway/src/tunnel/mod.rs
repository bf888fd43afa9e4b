//! The tunnel's edge: open connections follow a machine that moved.
//!
//! ```text
//!     client                                                             guest
//!       |                                                                  |
//!   home LAN (bridge) ──> host ──> lh0 ─ datapath ─ link ─ datapath ─ lh0 ──> routed tap
//!       ^   proxy ARP/NDP, /32 route,      |                  |      policy rule, marks,
//!       |   bridge entry, announcements    hold            hold      care-of address (nft)
//! ```
//!
//! [`Tunnel`] is a handle on one task that owns all changes to this host's network, on one that moves packets, on one
//! that hears routers and imitates them, and on one that hears whether another host uses an address which is attracted
//! here. The order at a source: [`hold_begin`](Tunnel::hold_begin), stop the guest, commit,
//! [`hold_end_attract`](Tunnel::hold_end_attract), and when the status says so,
//! [`attract_end`](Tunnel::attract_end); a rollback is [`hold_undo`](Tunnel::hold_undo). At a
//! destination: [`visit_prepare`](Tunnel::visit_prepare) at reservation,
//! [`visit_flows`](Tunnel::visit_flows) right before the guest resumes,
//! [`visit_resumed`](Tunnel::visit_resumed) right after, [`visit_undo`](Tunnel::visit_undo) to take it
//! back. All of them may be repeated.
//!
//! A machine that moves on from a visit is held and attracted by its care-of addresses there, and what still comes for
//! its other addresses is passed on; [`come_back`](Tunnel::come_back) ends an attraction where it returns to, and
//! [`carry`](Tunnel::carry) keeps connections of its visits alive at its home.
//!
//! It does not decide when any of this happens, and it knows no link: a peer is a [`DatagramPath`] and
//! a channel of datagrams.

mod announce;
mod change;
mod config;
mod control;
mod device;
mod duplicates;
mod error;
mod mover;
mod nft;
#[cfg(test)]
mod noted;
mod plan;
mod routers;
mod routes;
mod sysctl;
mod tap;
mod unread;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use longhaul_core::ids::SiteName;
use longhaul_core::tunnel::handover::{FlowTuple, Neighbour};
use longhaul_core::tunnel::host::HostAddresses;
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::{mpsc, oneshot, watch};

pub use config::{AnnounceConfig, TunnelConfig};
pub use control::{AddressConflict, AnchorClosed};
pub use error::TunnelError;
pub use mover::{DatagramPath, FlowListing, TunnelStatus};
pub use plan::{CareOf, CarriedRoute, CarryRequest, HoldRequest, Leaving, VisitRequest};
pub use tap::tap_name;
pub use unread::wait_until_read;

use announce::FrameSocket;
use control::{Command, Control, Since, Tasks};
use device::TunDevice;
use duplicates::DuplicateTask;
use mover::{Mover, PeerPath};
use routers::RouterTask;
use routes::Netlink;

/// Commands that wait for the owner task; a caller beyond that waits to be let in.
const COMMANDS: usize = 32;

/// A handle on this gateway's tunnel. Cheap to clone. When the last one is dropped the tasks end and
/// everything in force stays, so that a restarted gateway can take over; [`Tunnel::stop`] cleans up.
#[derive(Debug, Clone)]
pub struct Tunnel {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<TunnelStatus>,
    conflicts: watch::Receiver<Vec<AddressConflict>>,
}

impl Tunnel {
    /// Opens the packet socket and those that hear routers and neighbours (CAP_NET_RAW, now and never again) and the TUN
    /// device (CAP_NET_ADMIN, always), and starts the four tasks on the current runtime. What an earlier gateway has left stays
    /// until [`Tunnel::undo_all`].
    pub async fn start(config: TunnelConfig) -> Result<Self, TunnelError> {
        config.check()?;
        let frames = Arc::new(FrameSocket::open()?);
        let routers = RouterTask::open(frames.clone(), config.router_advertisements)?;
        let (found, findings) = mpsc::channel(COMMANDS);
        let listener = DuplicateTask::open(frames.clone(), config.duplicate_silent, found)?;
        let netlink = Netlink::open(config.route_protocol)?;
        let device = TunDevice::open(&config)?;
        let (publish, status) = watch::channel(TunnelStatus::default());
        let (moves, move_commands) = mpsc::channel(COMMANDS);
        let mover = Mover::new(device, &config, publish);
        let interval = config.status_interval;
        let (router_commands, commands_of_routers) = mpsc::channel(COMMANDS);
        let (duplicates, commands_of_listener) = mpsc::channel(COMMANDS);
        let (show, conflicts) = watch::channel(Vec::new());
        let tasks = Tasks { moves, routers: router_commands, duplicates, conflicts: show };
        let mut control = Control::new(config, netlink, frames, tasks);
        control.begin().await?;
        tokio::spawn(listener.run(commands_of_listener));
        tokio::spawn(routers.run(commands_of_routers));
        tokio::spawn(mover.run(move_commands, interval));
        let (commands, control_commands) = mpsc::channel(COMMANDS);
        tokio::spawn(control.run(control_commands, findings));
        Ok(Self { commands, status, conflicts })
    }

    /// Connects a peer: datagrams go out through `path` and come in through `incoming`. Replaces an
    /// earlier connection of that peer.
    pub async fn add_peer(
        &self,
        site: SiteName,
        path: Arc<dyn DatagramPath>,
        incoming: mpsc::Receiver<Bytes>,
    ) -> Result<(), TunnelError> {
        let path = PeerPath { path, incoming };
        self.ask(|reply| Command::AddPeer { site, path, reply }).await
    }

    /// Makes the tap of a NIC, or finds it: persistent, owned by the uid `owner`, a port of `bridge` for a
    /// machine at home, or routed for a visitor. Returns its name, which [`tap_name`] foretells.
    pub async fn create_tap(
        &self,
        key: PortKey,
        owner: u32,
        bridge: Option<String>,
    ) -> Result<String, TunnelError> {
        self.ask(|reply| Command::CreateTap { key, owner, bridge, reply }).await
    }

    /// Removes the tap of a NIC; a machine still plugged in loses its network.
    pub async fn remove_tap(&self, key: PortKey) -> Result<(), TunnelError> {
        self.ask(|reply| Command::RemoveTap { key, reply }).await
    }

    /// Begins to remember the flows of a machine at home, by the packets that come out of `port`.
    pub async fn sample_begin(&self, key: PortKey, port: String) -> Result<(), TunnelError> {
        self.ask(|reply| Command::SampleBegin { key, port, reply }).await
    }

    /// The flows remembered as open, at most `max_flows`.
    pub async fn sample(&self, key: PortKey) -> Result<Vec<FlowTuple>, TunnelError> {
        self.ask(|reply| Command::Sample { key, reply }).await
    }

    /// Forgets the flows and stops.
    pub async fn sample_end(&self, key: PortKey) -> Result<(), TunnelError> {
        self.ask(|reply| Command::SampleEnd { key, reply }).await
    }

    /// Asks the routers on `lan` to advertise themselves if none is known to, and waits up to a second for the first.
    pub async fn solicit_routers(&self, lan: String) -> Result<(), TunnelError> {
        let (asked, answer) = oneshot::channel();
        self.ask(|reply| Command::SolicitRouters { lan, asked, reply }).await?;
        answer.await.map_err(|_| TunnelError::Stopped)
    }

    /// The neighbours on `lan` that this host knows, its default routers and those that advertise themselves first. A
    /// router whose link-layer address is not known is asked for, up to a second.
    pub async fn home_neighbours(&self, lan: String) -> Result<Vec<Neighbour>, TunnelError> {
        self.ask(|reply| Command::HomeNeighbours { lan, reply }).await
    }

    /// What this host has and where its routes go: its own addresses and its routers. What the kernel does not know
    /// stays empty.
    pub async fn host_addresses(&self) -> Result<HostAddresses, TunnelError> {
        self.ask(|reply| Command::HostAddresses { reply }).await
    }

    /// From now, packets to the guest are kept; its own still leave. Call it before the guest is stopped.
    pub async fn hold_begin(&self, request: HoldRequest) -> Result<(), TunnelError> {
        self.ask(|reply| Command::HoldBegin { request, reply }).await
    }

    /// After the hand-over: kept packets leave for the peer, new ones pass, the home address is
    /// announced as this host's. `flows` are those that were open.
    pub async fn hold_end_attract(&self, key: PortKey, flows: Vec<FlowTuple>) -> Result<(), TunnelError> {
        self.ask(|reply| Command::HoldEndAttract { key, flows, since: Since::JustNow, reply }).await
    }

    /// The same by a gateway that was started anew: before it announces an address it asks whether another host has taken
    /// it meanwhile. Nobody had needed the addresses for `quiet`.
    pub async fn attract_again(
        &self,
        key: PortKey,
        flows: Vec<FlowTuple>,
        quiet: Duration,
    ) -> Result<(), TunnelError> {
        let since = Since::Earlier { quiet };
        self.ask(|reply| Command::HoldEndAttract { key, flows, since, reply }).await
    }

    /// The guest stays: everything as it was, and what was kept is delivered to it. A hold that a gateway
    /// before this one has left is undone as well; where there is none, nothing changes.
    pub async fn hold_undo(&self, request: HoldRequest) -> Result<(), TunnelError> {
        self.ask(|reply| Command::HoldUndo { request, reply }).await
    }

    /// No resolver knows the old address any more once `after` has passed. Until this is said the tunnel
    /// does not report that it may end; say zero where no name was ever given out for it.
    pub async fn names_expire(&self, key: PortKey, after: Duration) -> Result<(), TunnelError> {
        self.ask(|reply| Command::NamesExpire { key, after, reply }).await
    }

    /// Stops attracting a home address and takes its routes away.
    pub async fn attract_end(&self, key: PortKey) -> Result<AnchorClosed, TunnelError> {
        self.ask(|reply| Command::AttractEnd { key, reply }).await
    }

    /// Ends all that this host has of a machine that is away: attraction and, at its home, sampler and tap, if the tap is
    /// of [`create_tap`](Self::create_tap). Not while it is on its way back ([`TunnelError::Returning`]): from then on
    /// they are what it comes to.
    pub async fn let_go(&self, request: HoldRequest) -> Result<(), TunnelError> {
        self.ask(|reply| Command::LetGo { request, reply }).await
    }

    /// Waits until nobody needs the anchor of `key`, then ends it. Cancel-safe.
    pub async fn end_when_unneeded(&self, key: PortKey) -> Result<AnchorClosed, TunnelError> {
        let mut status = self.status.clone();
        status
            .wait_for(|status| status.ports.iter().any(|port| port.key == key && port.may_end))
            .await
            .map_err(|_| TunnelError::Stopped)?;
        self.attract_end(key).await
    }

    /// A machine that is away has moved on to `peer`.
    pub async fn retarget(&self, key: PortKey, peer: SiteName) -> Result<(), TunnelError> {
        self.ask(|reply| Command::Retarget { key, peer, reply }).await
    }

    /// A machine that is away is on its way back: what the other site held for it is kept until it is here, and what this
    /// host has of it is not let go. To be said before anything is made for it.
    pub async fn expect_return(&self, key: PortKey, returning: bool) -> Result<(), TunnelError> {
        self.ask(|reply| Command::ExpectReturn { key, returning, reply }).await
    }

    /// The machine came back: its addresses here are no longer attracted, what was kept is delivered. At home
    /// the guest is told the true addresses of its `neighbours`; call it when the guest runs.
    pub async fn come_back(&self, key: PortKey, neighbours: Vec<Neighbour>) -> Result<(), TunnelError> {
        self.ask(|reply| Command::ComeBack { key, neighbours, reply }).await
    }

    /// The rules of [`Tunnel::carry`], made while the machine is on its way and its tap is there; [`Tunnel::carry_undo`] removes
    /// them.
    pub async fn carry_prepare(&self, request: CarryRequest) -> Result<(), TunnelError> {
        self.ask(|reply| Command::CarryPrepare { request, reply }).await
    }

    /// A machine at home has brought addresses of its visits: connections by them go the way they came.
    /// `flows` were open when it came.
    pub async fn carry(&self, request: CarryRequest, flows: Vec<FlowTuple>) -> Result<(), TunnelError> {
        self.ask(|reply| Command::Carry { request, flows, reply }).await
    }

    /// No connection is carried for it any more.
    pub async fn carry_undo(&self, key: PortKey) -> Result<(), TunnelError> {
        self.ask(|reply| Command::CarryUndo { key, reply }).await
    }

    /// The site that attracted this address of a machine that is here no longer does.
    pub async fn forget_address(&self, key: PortKey, address: IpAddr) -> Result<(), TunnelError> {
        self.ask(|reply| Command::ForgetAddress { key, address, reply }).await
    }

    /// Makes the port of a visitor what its home was, and its rules; packets to it are kept until it runs.
    pub async fn visit_prepare(&self, request: VisitRequest) -> Result<(), TunnelError> {
        self.ask(|reply| Command::VisitPrepare { request, reply }).await
    }

    /// The flows that were open before the move; call it right before the guest resumes.
    pub async fn visit_flows(&self, key: PortKey, flows: Vec<FlowTuple>) -> Result<(), TunnelError> {
        self.ask(|reply| Command::VisitFlows { key, flows, reply }).await
    }

    /// The guest runs: what was kept is delivered, its care-of addresses are announced.
    pub async fn visit_resumed(&self, key: PortKey) -> Result<(), TunnelError> {
        self.ask(|reply| Command::VisitResumed { key, reply }).await
    }

    /// The visit is over, or never began: everything as it was.
    pub async fn visit_undo(&self, key: PortKey) -> Result<(), TunnelError> {
        self.ask(|reply| Command::VisitUndo { key, reply }).await
    }

    /// Ends every tunnel and removes everything of ours that is found, that of an earlier gateway
    /// included: by the prefix of nft tables and by the protocol number of routes, rules and neighbours.
    /// Sysctls that an earlier gateway had set are put back if there is a `switches_file`. Taps stay, as
    /// machines may be plugged in.
    pub async fn undo_all(&self) -> Result<(), TunnelError> {
        self.ask(|reply| Command::UndoAll { reply }).await
    }

    /// Like [`Tunnel::undo_all`], then removes the device and ends the tasks.
    pub async fn stop(self) -> Result<(), TunnelError> {
        self.ask(|reply| Command::Stop { reply }).await
    }

    /// A peer's gateway was started anew, and has forgotten which of our datagrams it had.
    pub async fn peer_restarted(&self, site: SiteName) -> Result<(), TunnelError> {
        self.ask(|reply| Command::PeerRestarted { site, reply }).await
    }

    /// What holds the tunnel of a NIC that is away, and its flows, those first that were silent for the longest;
    /// `max` at most.
    pub async fn flows(&self, key: PortKey, max: usize) -> Result<FlowListing, TunnelError> {
        self.ask(|reply| Command::Flows { key, max, reply }).await
    }

    /// Waits until a task without which there is no tunnel has ended, which none does while there is a handle. Cancel-safe.
    pub async fn ended(&self) {
        let mut status = self.status.clone();
        tokio::select! {
            _ = status.wait_for(|_| false) => {}
            () = self.commands.closed() => {}
        }
    }

    /// What passes, what is kept, which tunnels may end.
    pub fn status(&self) -> watch::Receiver<TunnelStatus> {
        self.status.clone()
    }

    /// Addresses that are attracted here and that other hosts use.
    pub fn conflicts(&self) -> watch::Receiver<Vec<AddressConflict>> {
        self.conflicts.clone()
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, TunnelError>>) -> Command,
    ) -> Result<T, TunnelError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| TunnelError::Stopped)?;
        answer.await.map_err(|_| TunnelError::Stopped)?
    }
}
