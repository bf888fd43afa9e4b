//! The one owner of what the tunnel has changed on this host: commands in, changes made and undone.
//!
//! Commands are carried out one after the other. Packets move in a task of their own meanwhile; this
//! one tells it when a NIC's packets are to be kept, to pass or to come back.

mod attract;
mod carried;
mod reassert;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use longhaul_core::ids::SiteName;
use longhaul_core::tunnel::duplicates::Finding;
use longhaul_core::tunnel::handover::{FlowTuple, Mac, Neighbour};
use longhaul_core::tunnel::host::HostAddresses;
use longhaul_core::tunnel::policy::{PortKey, Role};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};

use super::announce::{self, Announcement, FrameSocket, Repeating};
use super::change::{Change, Changes, Owner};
use super::config::{TunnelConfig, check_device_name};
use super::duplicates;
use super::error::TunnelError;
use super::mover::{Command as Move, FlowListing, PeerPath};
use super::nft;
use super::plan::{self, CareOf, CarryRequest, HoldRequest, Kernel, Leaving, VisitRequest};
use super::routers;
use super::routes::{self, Netlink};
use super::sysctl::Switches;
use super::tap;

pub use attract::AddressConflict;
pub(super) use attract::Since;
use attract::Spoken;
use carried::Carry;

/// Neighbours sampled per LAN.
const MAX_NEIGHBOURS: usize = 256;
/// How long a router that is not in the neighbour table is asked for.
const ROUTER_WAIT: Duration = Duration::from_secs(1);

/// An anchor that is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnchorClosed {
    /// When it was closed.
    pub at: SystemTime,
    /// How long the home address had been attracted.
    pub open_for: Duration,
}

type Reply<T> = oneshot::Sender<Result<T, TunnelError>>;

/// What the owner is asked for.
pub(super) enum Command {
    AddPeer { site: SiteName, path: PeerPath, reply: Reply<()> },
    CreateTap { key: PortKey, owner: u32, bridge: Option<String>, reply: Reply<String> },
    RemoveTap { key: PortKey, reply: Reply<()> },
    SampleBegin { key: PortKey, port: String, reply: Reply<()> },
    Sample { key: PortKey, reply: Reply<Vec<FlowTuple>> },
    SampleEnd { key: PortKey, reply: Reply<()> },
    HomeNeighbours { lan: String, reply: Reply<Vec<Neighbour>> },
    SolicitRouters { lan: String, asked: oneshot::Sender<()>, reply: Reply<()> },
    HostAddresses { reply: Reply<HostAddresses> },
    HoldBegin { request: HoldRequest, reply: Reply<()> },
    HoldEndAttract { key: PortKey, flows: Vec<FlowTuple>, since: Since, reply: Reply<()> },
    HoldUndo { request: HoldRequest, reply: Reply<()> },
    NamesExpire { key: PortKey, after: Duration, reply: Reply<()> },
    AttractEnd { key: PortKey, reply: Reply<AnchorClosed> },
    LetGo { request: HoldRequest, reply: Reply<()> },
    Retarget { key: PortKey, peer: SiteName, reply: Reply<()> },
    ExpectReturn { key: PortKey, returning: bool, reply: Reply<()> },
    ComeBack { key: PortKey, neighbours: Vec<Neighbour>, reply: Reply<()> },
    CarryPrepare { request: CarryRequest, reply: Reply<()> },
    Carry { request: CarryRequest, flows: Vec<FlowTuple>, reply: Reply<()> },
    CarryUndo { key: PortKey, reply: Reply<()> },
    ForgetAddress { key: PortKey, address: IpAddr, reply: Reply<()> },
    PeerRestarted { site: SiteName, reply: Reply<()> },
    Flows { key: PortKey, max: usize, reply: Reply<FlowListing> },
    VisitPrepare { request: VisitRequest, reply: Reply<()> },
    VisitFlows { key: PortKey, flows: Vec<FlowTuple>, reply: Reply<()> },
    VisitResumed { key: PortKey, reply: Reply<()> },
    VisitUndo { key: PortKey, reply: Reply<()> },
    UndoAll { reply: Reply<()> },
    Stop { reply: Reply<()> },
}

struct Away {
    request: HoldRequest,
    /// Since when the home address is attracted; `None` while it is only held.
    attracted: Option<Instant>,
    /// The machine is on its way back.
    returning: bool,
    spoken: Spoken,
    announcing: Option<Repeating>,
}

struct Visit {
    request: VisitRequest,
    /// What was open before the move.
    flows: BTreeSet<FlowTuple>,
    announcing: Option<Repeating>,
}

/// The tasks beside the owner, and where it shows what it has been told.
pub(super) struct Tasks {
    pub moves: mpsc::Sender<Move>,
    pub routers: mpsc::Sender<routers::Command>,
    pub duplicates: mpsc::Sender<duplicates::Command>,
    pub conflicts: watch::Sender<Vec<AddressConflict>>,
}

/// The owner task's state.
pub(super) struct Control {
    config: TunnelConfig,
    netlink: Netlink,
    frames: Arc<FrameSocket>,
    changes: Changes,
    moves: mpsc::Sender<Move>,
    routers: mpsc::Sender<routers::Command>,
    duplicates: mpsc::Sender<duplicates::Command>,
    conflicts: watch::Sender<Vec<AddressConflict>>,
    away: BTreeMap<PortKey, Away>,
    visits: BTreeMap<PortKey, Visit>,
    /// Machines at home that have brought addresses of their visits.
    carries: BTreeMap<PortKey, Carry>,
    /// Others have removed it, and it could not be made again.
    not_standing: Vec<Change>,
}

impl Control {
    pub(super) fn new(
        config: TunnelConfig,
        netlink: Netlink,
        frames: Arc<FrameSocket>,
        tasks: Tasks,
    ) -> Self {
        let switches = Switches::open(config.switches_file.clone());
        Self {
            config,
            changes: Changes::new(netlink.clone(), switches),
            netlink,
            frames,
            moves: tasks.moves,
            routers: tasks.routers,
            duplicates: tasks.duplicates,
            conflicts: tasks.conflicts,
            away: BTreeMap::new(),
            visits: BTreeMap::new(),
            carries: BTreeMap::new(),
            not_standing: Vec::new(),
        }
    }

    /// Sets the device's switches and sets it up.
    pub(super) async fn begin(&mut self) -> Result<(), TunnelError> {
        self.changes.apply(&Owner::Gateway, plan::device_plan(&self.config)).await?;
        let device = self.netlink.link(&self.config.device).await?.index;
        self.netlink.add_dummy_address(self.config.device_address, device).await?;
        self.netlink.set_up(&self.config.device, Some(self.config.device_queue)).await
    }

    /// Carries out commands until `Stop` or until the last handle is gone. In the latter case what is
    /// in force stays, for the next gateway to take over.
    pub(super) async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut findings: mpsc::Receiver<Finding>,
    ) {
        let first_look = Instant::now() + self.config.reassert_interval;
        let mut looks = tokio::time::interval_at(first_look, self.config.reassert_interval);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let command = tokio::select! {
                command = commands.recv() => command,
                _ = looks.tick() => {
                    self.reassert().await;
                    continue;
                }
                Some(finding) = findings.recv() => {
                    self.handle_finding(finding).await;
                    continue;
                }
            };
            match command {
                None => return,
                Some(Command::Stop { reply }) => {
                    let stopped = self.stop().await;
                    let _ = reply.send(stopped);
                    return;
                }
                Some(command) => self.handle(command).await,
            }
        }
    }

    /// One arm per command; a caller that gave up does not want the answer.
    async fn handle(&mut self, command: Command) {
        match command {
            Command::AddPeer { site, path, reply } => drop(reply.send(self.add_peer(site, path).await)),
            Command::CreateTap { key, owner, bridge, reply } => {
                let created = tap::create(&self.netlink, &self.config, &key, owner, bridge.as_deref()).await;
                drop(reply.send(created));
            }
            Command::RemoveTap { key, reply } => {
                let removed = self.netlink.delete_link(&tap::tap_name(&self.config, &key)).await;
                drop(reply.send(removed));
            }
            Command::SampleBegin { key, port, reply } => {
                drop(reply.send(self.sample_begin(key, &port).await));
            }
            Command::Sample { key, reply } => drop(reply.send(self.sample(&key).await)),
            Command::SampleEnd { key, reply } => drop(reply.send(self.sample_end(key).await)),
            Command::HomeNeighbours { lan, reply } => drop(reply.send(self.home_neighbours(&lan).await)),
            Command::SolicitRouters { lan, asked, reply } => {
                drop(reply.send(self.solicit_routers(&lan, asked).await));
            }
            Command::HostAddresses { reply } => drop(reply.send(self.host_addresses().await)),
            Command::HoldBegin { request, reply } => drop(reply.send(self.hold_begin(request).await)),
            Command::HoldEndAttract { key, flows, since, reply } => {
                drop(reply.send(self.hold_end_attract(key, flows, since).await));
            }
            Command::HoldUndo { request, reply } => drop(reply.send(self.hold_undo(request).await)),
            Command::NamesExpire { key, after, reply } => {
                let set = self.tell(|done| Move::NamesExpire { key, after, done }).await;
                drop(reply.send(set.and_then(|set| Ok(set?))));
            }
            Command::AttractEnd { key, reply } => drop(reply.send(self.attract_end(&key).await)),
            Command::LetGo { request, reply } => drop(reply.send(self.let_go(request).await)),
            Command::Retarget { key, peer, reply } => {
                let set = self.tell(|done| Move::Retarget { key, peer, done }).await;
                drop(reply.send(set.and_then(|set| Ok(set?))));
            }
            Command::ExpectReturn { key, returning, reply } => {
                drop(reply.send(self.expect_return(key, returning).await));
            }
            Command::ComeBack { key, neighbours, reply } => {
                drop(reply.send(self.come_back(&key, &neighbours).await));
            }
            Command::CarryPrepare { request, reply } => {
                drop(reply.send(self.carry_prepare(&request).await));
            }
            Command::Carry { request, flows, reply } => {
                drop(reply.send(self.carry(request, flows).await));
            }
            Command::CarryUndo { key, reply } => drop(reply.send(self.carry_undo(&key).await)),
            Command::PeerRestarted { site, reply } => {
                let set = self.tell(|done| Move::PeerRestarted { site, done }).await;
                drop(reply.send(set));
            }
            Command::Flows { key, max, reply } => {
                let listed = self.tell(|done| Move::Flows { key, max, done }).await;
                drop(reply.send(listed.and_then(|listed| Ok(listed?))));
            }
            Command::ForgetAddress { key, address, reply } => {
                drop(reply.send(self.forget_address(key, address).await));
            }
            Command::VisitPrepare { request, reply } => drop(reply.send(self.visit_prepare(request).await)),
            Command::VisitFlows { key, flows, reply } => {
                drop(reply.send(self.visit_flows(&key, flows).await));
            }
            Command::VisitResumed { key, reply } => drop(reply.send(self.visit_resumed(&key).await)),
            Command::VisitUndo { key, reply } => drop(reply.send(self.visit_undo(&key).await)),
            Command::UndoAll { reply } | Command::Stop { reply } => drop(reply.send(self.undo_all().await)),
        }
    }

    async fn add_peer(&mut self, site: SiteName, path: PeerPath) -> Result<(), TunnelError> {
        self.tell(|done| Move::AddPeer { site, path, done }).await
    }

    async fn sample_begin(&mut self, key: PortKey, port: &str) -> Result<(), TunnelError> {
        check_device_name(port)?;
        let plan = plan::sampler_plan(&self.config, &key, port);
        self.changes.apply(&Owner::Sampler(key), plan).await
    }

    /// Reads the table that this gateway or the one before it has made. Each flow has the machine's address that its
    /// other end knows.
    async fn sample(&self, key: &PortKey) -> Result<Vec<FlowTuple>, TunnelError> {
        let (config, max) = (&self.config, self.config.max_flows as usize);
        let sampled = match self.visits.get(key) {
            Some(Visit { request, .. }) => {
                let care_of: Vec<_> = request.care_of.iter().map(|pair| (pair.home, pair.care_of)).collect();
                let carried = plan::carried_rules(config, &request.carried);
                nft::visited(config, &plan::visit_table_name(config, key), max, &care_of, &carried).await
            }
            None => nft::sampled(&nft::sampler_name(config, &tap::port_id(key)), max).await,
        };
        let mut flows = match sampled {
            Err(TunnelError::Nft { .. }) => return Err(TunnelError::NotSampled(key.clone())),
            other => other?,
        };
        if let Some(Carry { request, .. }) = self.carries.get(key) {
            let carried = plan::carried_rules(config, &request.carried);
            let turned = nft::turned(config, &tap::port_id(key), &carried).await?;
            known_elsewhere(&mut flows, &turned);
        }
        Ok(flows)
    }

    async fn sample_end(&mut self, key: PortKey) -> Result<(), TunnelError> {
        let table = nft::sampler_name(&self.config, &tap::port_id(&key));
        self.changes.undo(&Owner::Sampler(key)).await?;
        nft::run(&nft::remove("netdev", &table)).await
    }

    /// The LAN's neighbours, routers first and asked for if their link-layer address is not known.
    async fn home_neighbours(&self, lan: &str) -> Result<Vec<Neighbour>, TunnelError> {
        let device = self.netlink.link(lan).await?.index;
        let routers = self.netlink.default_routers(device).await?;
        let (reply, heard) = oneshot::channel();
        self.tell_routers(routers::Command::Heard { device, reply }).await?;
        let heard = heard.await.map_err(|_| TunnelError::Stopped)?;
        let unnamed = heard.iter().filter(|router| router.link_layer.is_none());
        let wanted: Vec<IpAddr> =
            routers.iter().copied().chain(unnamed.map(|router| router.source.into())).collect();
        let started = Instant::now();
        loop {
            let known = self.netlink.neighbours(device).await?;
            let is_missing = |router: &&IpAddr| !known.iter().any(|neighbour| neighbour.addr == **router);
            let missing: Vec<&IpAddr> = wanted.iter().filter(is_missing).collect();
            if missing.is_empty() || started.elapsed() > ROUTER_WAIT {
                let known = [known, self.netlink.own_neighbours(lan).await?].concat();
                return Ok(routes::as_handover(&routers, &known, heard, MAX_NEIGHBOURS));
            }
            missing.into_iter().for_each(|router| routes::make_kernel_ask(*router, device));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Only passes the question on: nothing waits here for the answer.
    async fn solicit_routers(&self, lan: &str, reply: oneshot::Sender<()>) -> Result<(), TunnelError> {
        let device = self.netlink.link(lan).await?.index;
        self.tell_routers(routers::Command::Solicit { device, reply }).await
    }

    async fn host_addresses(&self) -> Result<HostAddresses, TunnelError> {
        let routers = self.netlink.routers().await?;
        let own = self.netlink.addresses().await?;
        let own = own.into_iter().flat_map(|(_, prefix)| [Some(prefix.addr), prefix.broadcast()]);
        let own = own.flatten().collect();
        Ok(HostAddresses { own, routers, ..HostAddresses::default() })
    }

    async fn hold_begin(&mut self, request: HoldRequest) -> Result<(), TunnelError> {
        check_device_name(&request.lan)?;
        check_device_name(&request.port)?;
        let (key, peer, home) = (request.key.clone(), request.peer.clone(), request.addresses.clone());
        self.tell(|done| Move::BeginHold { key, peer, home, done }).await??;
        let owner = Owner::Away(request.key.clone());
        let plan = Kernel::probe(&request.lan).map(|kernel| plan::hold_plan(&self.config, kernel, &request));
        if let Err(error) = self.apply(&owner, plan).await {
            self.end(&request.key, Role::Away).await?;
            return Err(error);
        }
        if self.has_tunnels(&request.key) {
            let key = request.key.clone();
            self.tell(|done| Move::Pause { key, done }).await??;
        }
        info!(port = %request.key, peer = %request.peer, "holding packets");
        let key = request.key.clone();
        self.away.entry(key).or_insert(Away {
            request,
            attracted: None,
            returning: false,
            spoken: Spoken::default(),
            announcing: None,
        });
        Ok(())
    }

    /// The guest runs here again: what was kept is delivered, first before and then after the capture
    /// ends, so that nothing overtakes it.
    async fn hold_undo(&mut self, request: HoldRequest) -> Result<(), TunnelError> {
        let Some(Away { request, announcing, .. }) = self.away.remove(&request.key) else {
            return self.hold_undo_left(&request).await;
        };
        drop(announcing);
        let key = &request.key;
        self.unwatch(key).await;
        let undone = match request.from {
            Leaving::Home => self.give_back_at_home(&request).await,
            Leaving::Visit => self.give_back_at_visit(&request).await,
        };
        self.take_tunnels_back(key).await?;
        info!(port = %key, "hold undone");
        undone
    }

    async fn give_back_at_home(&mut self, request: &HoldRequest) -> Result<(), TunnelError> {
        let key = &request.key;
        let port = key.clone();
        let kept = self.tell(|done| Move::TakeKept { key: port, role: Role::Away, done }).await?;
        self.redeliver(request, kept).await?;
        let undone = self.changes.undo(&Owner::Away(key.clone())).await;
        let kept = self.end(key, Role::Away).await?;
        self.redeliver(request, kept).await?;
        self.announce_guest(request).await?;
        undone
    }

    /// What was kept comes by a care-of address, which the kernel translates again once the rules are gone.
    async fn give_back_at_visit(&mut self, request: &HoldRequest) -> Result<(), TunnelError> {
        let undone = self.changes.undo(&Owner::Away(request.key.clone())).await;
        let packets = self.end(&request.key, Role::Away).await?;
        self.tell(|done| Move::Deliver { packets, done }).await?;
        undone
    }

    /// The machine is here, and addresses of it are attracted at other sites.
    fn has_tunnels(&self, key: &PortKey) -> bool {
        self.visits.contains_key(key) || self.carries.contains_key(key)
    }

    /// A gateway that was killed while it held has left its changes, and this one has never made them.
    async fn hold_undo_left(&mut self, request: &HoldRequest) -> Result<(), TunnelError> {
        self.end(&request.key, Role::Away).await?;
        let id = tap::port_id(&request.key);
        let left = match request.from {
            Leaving::Home => nft::is_away(&self.config, &id, request.mac).await?,
            Leaving::Visit => nft::has_table(&self.config, &nft::left_name(&self.config, &id)).await?,
        };
        if !left {
            return Ok(());
        }
        let owner = Owner::Away(request.key.clone());
        let plan = plan::hold_plan(&self.config, Kernel::probe(&request.lan)?, request);
        self.changes.take_over(&owner, plan);
        let undone = self.changes.undo(&owner).await;
        match request.from {
            Leaving::Home => self.announce_guest(request).await?,
            Leaving::Visit => {}
        }
        info!(port = %request.key, "hold of an earlier gateway undone");
        undone
    }

    /// The machine is back: its addresses here are its own again. At home its LAN learns its address, and it learns its
    /// neighbours'.
    async fn come_back(&mut self, key: &PortKey, neighbours: &[Neighbour]) -> Result<(), TunnelError> {
        self.end(key, Role::Relay).await?;
        let Some(request) = self.away.get(key).map(|away| away.request.clone()) else { return Ok(()) };
        self.hold_undo(request.clone()).await?;
        if request.from == Leaving::Visit {
            return Ok(());
        }
        let port = self.netlink.link(&request.port).await?.index;
        for neighbour in neighbours {
            let truth = Announcement {
                device: port,
                address: neighbour.addr,
                mac: neighbour.mac,
                router: neighbour.is_router(),
            };
            let same_version =
                request.addresses.iter().find(|home| home.is_ipv6() == neighbour.addr.is_ipv6());
            if let Some(home) = same_version {
                self.frames
                    .tell(request.mac, *home, &truth)
                    .map_err(TunnelError::io("tell the guest its neighbours"))?;
            }
        }
        Ok(())
    }

    async fn visit_prepare(&mut self, request: VisitRequest) -> Result<(), TunnelError> {
        check_device_name(&request.lan)?;
        check_device_name(&request.port)?;
        for CareOf { home, care_of } in &request.care_of {
            if home.is_ipv6() != care_of.is_ipv6() {
                return Err(TunnelError::FamilyMismatch { home: *home, care_of: *care_of });
            }
        }
        let (key, routes) = (request.key.clone(), plan::visit_routes(&request));
        let given = self.tell(|done| Move::Visit { key, routes, done }).await??;
        self.give_away(given).await;
        let owner = Owner::Visit(request.key.clone());
        let own = self.host_addresses().await?.own;
        let plan =
            Kernel::probe(&request.lan).map(|kernel| plan::visit_plan(&self.config, kernel, &request, &own));
        if let Err(error) = self.apply(&owner, plan).await {
            self.end(&request.key, Role::Visiting).await?;
            return Err(error);
        }
        info!(port = %request.key, home = %request.peer, "ready for a visitor");
        let key = request.key.clone();
        self.visits.entry(key).or_insert(Visit { request, flows: BTreeSet::new(), announcing: None });
        Ok(())
    }

    async fn visit_flows(&mut self, key: &PortKey, mut flows: Vec<FlowTuple>) -> Result<(), TunnelError> {
        let max = self.config.max_flows as usize;
        flows.truncate(max);
        let Some(visit) = self.visits.get_mut(key) else { return Ok(()) };
        let room = max.saturating_sub(visit.flows.len());
        visit.flows.extend(flows.iter().take(room));
        let script = plan::visit_flows(&self.config, &visit.request, &flows);
        if script.is_empty() { Ok(()) } else { nft::run(&script).await }
    }

    async fn visit_resumed(&mut self, key: &PortKey) -> Result<(), TunnelError> {
        let port = key.clone();
        self.tell(|done| Move::Resumed { key: port, done }).await??;
        let Some(visit) = self.visits.get(key) else { return Ok(()) };
        let care_of: Vec<IpAddr> = visit.request.care_of.iter().map(|pair| pair.care_of).collect();
        let announcements = self.announcements(&visit.request.lan.clone(), &care_of).await?;
        let announcing = announce::repeat(self.frames.clone(), announcements, self.config.announce.clone());
        if let Some(visit) = self.visits.get_mut(key) {
            visit.announcing = Some(announcing);
        }
        info!(port = %key, "visitor runs");
        self.imitate_routers(key).await
    }

    /// The visitor hears the routers of its home, if it has an address there that they concern.
    async fn imitate_routers(&self, key: &PortKey) -> Result<(), TunnelError> {
        let Some(Visit { request, .. }) = self.visits.get(key) else { return Ok(()) };
        if !request.nic.home.iter().any(|home| home.addr.is_ipv6()) {
            return Ok(());
        }
        let (key, device) = (key.clone(), self.netlink.link(&request.port).await?.index);
        let neighbours = request.nic.neighbours.clone();
        self.tell_routers(routers::Command::Imitate { key, device, neighbours }).await
    }

    async fn visit_undo(&mut self, key: &PortKey) -> Result<(), TunnelError> {
        drop(self.visits.remove(key));
        let silent = self.tell_routers(routers::Command::End { key: key.clone() }).await;
        let undone = self.changes.undo(&Owner::Visit(key.clone())).await;
        self.end(key, Role::Visiting).await?;
        undone.and(silent)
    }

    async fn undo_all(&mut self) -> Result<(), TunnelError> {
        let held = self.away.values().filter(|away| away.attracted.is_none());
        for request in held.map(|away| away.request.clone()).collect::<Vec<_>>() {
            self.hold_undo(request).await?;
        }
        let attracted: Vec<PortKey> = self.away.keys().cloned().collect();
        for key in attracted {
            self.attract_end(&key).await?;
        }
        let visits: Vec<PortKey> = self.visits.keys().cloned().collect();
        for key in visits {
            self.visit_undo(&key).await?;
        }
        let carries: Vec<PortKey> = self.carries.keys().cloned().collect();
        for key in carries {
            self.carry_undo(&key).await?;
        }
        self.changes.sweep(&self.config).await
    }

    async fn stop(&mut self) -> Result<(), TunnelError> {
        let undone = self.undo_all().await;
        let undone = undone.and(self.changes.undo(&Owner::Gateway).await);
        let deleted = self.netlink.delete_link(&self.config.device).await;
        undone.and(deleted)
    }

    async fn apply(
        &mut self,
        owner: &Owner,
        plan: Result<Vec<Change>, TunnelError>,
    ) -> Result<(), TunnelError> {
        self.changes.apply(owner, plan?).await
    }

    async fn end(&self, key: &PortKey, role: Role) -> Result<Vec<Bytes>, TunnelError> {
        let key = key.clone();
        self.tell(|done| Move::End { key, role, done }).await
    }

    /// Puts kept packets on the guest's own port, as if they came from this host.
    async fn redeliver(&self, request: &HoldRequest, kept: Vec<Bytes>) -> Result<(), TunnelError> {
        if kept.is_empty() {
            return Ok(());
        }
        let Some(port) = self.netlink.find_link(&request.port).await? else { return Ok(()) };
        let from = self.netlink.link(&request.lan).await?.mac.unwrap_or(request.mac);
        let packets = kept.len();
        let refused = kept
            .iter()
            .filter(|packet| self.frames.deliver(port.index, request.mac, from, packet).is_err())
            .count();
        if refused > 0 {
            warn!(port = %request.key, packets, refused, "the guest's tap did not take all kept packets");
        }
        Ok(())
    }

    /// Tells the LAN the guest's own address: on every port of the bridge but the guest's, as a frame
    /// with the guest's address as its source must not come back to where the guest is.
    async fn announce_guest(&self, request: &HoldRequest) -> Result<(), TunnelError> {
        let lan = self.netlink.link(&request.lan).await?.index;
        let own = self.netlink.find_link(&request.port).await?.map(|port| port.index);
        let ports = self.netlink.ports(lan).await?;
        let devices = if ports.is_empty() { vec![lan] } else { ports };
        let announcement =
            |device, address| Announcement { device, address, mac: request.mac, router: false };
        let announcements = devices
            .into_iter()
            .filter(|device| Some(*device) != own)
            .flat_map(|device| request.addresses.iter().map(move |address| announcement(device, *address)))
            .collect();
        announce::burst(self.frames.clone(), announcements, &self.config.announce);
        Ok(())
    }

    /// This host says on `lan` that `addresses` are its own.
    async fn announcements(&self, lan: &str, addresses: &[IpAddr]) -> Result<Vec<Announcement>, TunnelError> {
        let link = self.netlink.link(lan).await?;
        let mac: Mac = link.mac.ok_or_else(|| TunnelError::NoSuchDevice(lan.to_owned()))?;
        let announcement =
            |address: &IpAddr| Announcement { device: link.index, address: *address, mac, router: false };
        Ok(addresses.iter().map(announcement).collect())
    }

    async fn tell<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Move) -> Result<T, TunnelError> {
        let (done, answer) = oneshot::channel();
        self.moves.send(command(done)).await.map_err(|_| TunnelError::Stopped)?;
        answer.await.map_err(|_| TunnelError::Stopped)
    }

    async fn tell_routers(&self, command: routers::Command) -> Result<(), TunnelError> {
        self.routers.send(command).await.map_err(|_| TunnelError::Stopped)
    }
}

/// Flows that are turned have the address by which their other end knows the machine.
fn known_elsewhere(flows: &mut [FlowTuple], turned: &[FlowTuple]) {
    let rest = |flow: &FlowTuple| (flow.protocol, flow.local_port, flow.remote, flow.remote_port);
    for flow in flows {
        if let Some(known) = turned.iter().find(|known| rest(known) == rest(flow)) {
            flow.local = known.local;
        }
    }
}
