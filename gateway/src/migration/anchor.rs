//! What stays at a site that a machine left: the address it had there, its old connections, its name.
//!
//! At its home that is its home address, at a site it visited its care-of address. An anchor has its own row in the
//! journal, apart from the migration that made it: it outlives it. The name belongs to the home's anchor, which stays in
//! the journal after its last connection for as long as the machine is away. What an anchor does, and when, is
//! [`super::anchors`]' to say.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use longhaul_core::ids::{DeviceName, Epoch, SiteName, VmName};
use longhaul_core::migration::Attempt;
use longhaul_core::migration::message::{Handover, Proposal, Reservation};
use longhaul_core::tunnel::handover::{FlowTuple, Mac};
use longhaul_core::tunnel::policy::PortKey;
use longhaul_core::wire::{AnchorMessage, MAX_ADDRESSES};

use super::stay::{left_behind, takes_along};
use super::{Edges, MachineRow, chain};
use crate::api::types::AnchorView;
use crate::journal::{Journal, unix_ms};
use crate::tunnel::{HoldRequest, Leaving};

/// For how long resolvers may believe an answer whose TTL nobody has said.
const UNKNOWN_TTL_S: u32 = 300;

/// How far a name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NameState {
    /// It does not follow.
    None,
    /// The machine is not known to run at its new place yet.
    Waiting,
    /// It is owed: to the primary, or to a name server of the zone that has not heard of the move yet.
    Pending,
    /// It points at the new place, wherever it is asked for; answers given before may still be believed.
    Moved {
        /// When the last name server had it, milliseconds since the UNIX epoch.
        at_unix_ms: u64,
    },
    /// Nothing more is to be done.
    Settled {
        /// When the last name server had it, milliseconds since the UNIX epoch.
        at_unix_ms: u64,
    },
}

impl NameState {
    /// When the last name server had it, milliseconds since the UNIX epoch.
    pub(super) fn moved_unix_ms(self) -> Option<u64> {
        match self {
            Self::None | Self::Waiting | Self::Pending => None,
            Self::Moved { at_unix_ms } | Self::Settled { at_unix_ms } => Some(at_unix_ms),
        }
    }
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
    /// Addresses that the name may have, and what replaces each: itself where nothing stands in for an address of this
    /// site, and the name lists it.
    pub moves: Vec<(IpAddr, IpAddr)>,
    /// The name's TTL before the move; 0 if it is to be asked for.
    pub ttl_s: u32,
    /// How far the name is.
    pub names: NameState,
    /// Since when.
    pub since_unix_ms: u64,
    /// Sites that attract other addresses of the machine, and are to hear where it is: those that are not known to have.
    pub tell: Vec<SiteName>,
    /// The machine is known to run at its new place: nothing is said of it, and nothing ends, before.
    pub runs_there: bool,
    /// No connection is left; only the name is followed, and other sites are told where the machine is.
    pub ended: bool,
}

/// One NIC of an anchor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AnchorNic {
    /// The NIC.
    pub nic: DeviceName,
    /// Its link-layer address.
    pub mac: Mac,
    /// What it was to the machine.
    pub from: Leaving,
    /// The addresses by which clients reach it here.
    pub addresses: Vec<IpAddr>,
    /// The bridge of the LAN.
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
    /// It stayed after all, and this epoch does not begin elsewhere. What goes with the command is dropped when nothing of what
    /// came before it is done any more.
    Forget(VmName, Epoch, oneshot::Sender<()>),
    /// It is here again; `names` is what its name needs, at its home. Answered when nothing is done for it any more.
    CameBack {
        /// The machine.
        vm: VmName,
        /// An anchor for its name alone.
        names: Option<Box<Anchor>>,
        /// The answer.
        done: oneshot::Sender<()>,
    },
    /// Its operator ends what is held for its old connections; its name goes on following it. Answered when the host is
    /// as it was.
    Release(VmName, oneshot::Sender<Released>),
    /// Its operator says that the site it went to has handed it on to this one, and cannot say so itself.
    Said {
        /// The machine.
        vm: VmName,
        /// Where it is.
        to: SiteName,
        /// Answered with whether there is an anchor.
        done: oneshot::Sender<bool>,
    },
    /// Another site said something about an anchor.
    Heard {
        /// The site.
        from: SiteName,
        /// What it said.
        message: AnchorMessage,
    },
    /// Its operator forgets it: its old connections end. Answered when the host is as it was.
    End(VmName, oneshot::Sender<()>),
}

/// What became of an operator's wish to end an anchor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// It has ended.
    Ended,
    /// There is none.
    Nothing,
    /// The machine is not known to run at its new place yet: it may come back.
    StillMoving,
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
        let nics = definition.nics.iter().map(|nic| {
            let (from, addresses) = left_behind(edges.site(), row, nic);
            AnchorNic {
                nic: nic.name.clone(),
                mac: nic.mac,
                from,
                addresses,
                bridge: bridge(nic.lan.as_str()),
                port: edges.port(row, &nic.name),
                flows: flows(&nic.name),
            }
        });
        let visits = row.visits(edges.site());
        let name = definition.dns_name.clone().filter(|_| follows.is_some() && !visits);
        let care_of = reservation.map_or(&[][..], |reservation| &reservation.care_of);
        let care_of: Vec<_> = care_of.iter().map(|care_of| (care_of.home.addr, care_of.addr)).collect();
        let believed_s =
            definition.dns_name.as_ref().map_or(0, |_| definition.dns_ttl_s.unwrap_or(UNKNOWN_TTL_S));
        Self {
            vm: attempt.vm.clone(),
            epoch: attempt.epoch,
            peer: attempt.peer.clone(),
            nics: nics.collect(),
            moves: replaced(row, &care_of),
            care_of,
            names: if name.is_some() { NameState::Waiting } else { NameState::None },
            name,
            ttl_s: if visits { believed_s } else { follows.unwrap_or(0) },
            since_unix_ms: unix_ms(),
            tell: others(edges.site(), row, &attempt.peer),
            runs_there: false,
            ended: false,
        }
    }

    /// The machine has moved on, as the site it was at says.
    pub(super) fn moved_on(self, epoch: Epoch, to: &SiteName, moves: &[(IpAddr, IpAddr)]) -> Self {
        let addresses: Vec<IpAddr> = self.nics.iter().flat_map(|nic| nic.addresses.clone()).collect();
        let ours = moves.iter().filter(|(from, _)| addresses.contains(from));
        if moves.is_empty() {
            // It can be reached by no other address there, or nobody has said by which: its name stays as it is.
            return Self { epoch, peer: to.clone(), since_unix_ms: unix_ms(), runs_there: true, ..self };
        }
        let names = if self.name.is_some() { NameState::Pending } else { NameState::None };
        let left = self.clone();
        let on = Self {
            epoch,
            peer: to.clone(),
            care_of: ours.copied().collect(),
            moves: moves.to_vec(),
            names,
            ttl_s: self.owed_ttl_s().unwrap_or(0),
            since_unix_ms: unix_ms(),
            runs_there: true,
            ..self
        };
        on.looks_also_at(&left)
    }

    /// The same in the place of `left`. A name that is not known to have moved is owed on, also by a move without DNS: it may
    /// say an address that somebody else gets next.
    pub(super) fn in_place_of(self, left: &Self) -> Self {
        if self.name.is_some() || left.name.is_none() || left.places().is_empty() {
            return self.looks_also_at(left);
        }
        let (name, ttl_s) = (left.name.clone(), left.owed_ttl_s().unwrap_or(0));
        Self { name, ttl_s, names: NameState::Pending, ..self }.looks_also_at(left)
    }

    /// The machine stays at its home after all: what its anchor owes to its name since before, which comes home.
    pub(super) fn stayed(self, site: &SiteName) -> Option<Self> {
        let owes_since_before = self.names == NameState::Pending && !self.runs_there;
        let homes = self.addresses();
        let home = |now: &IpAddr| {
            let stands_in = |(at, new): &&(IpAddr, IpAddr)| new == now && homes.contains(at);
            let of = self.moves.iter().find(stands_in).map(|(at, _)| *at);
            of.or(homes.contains(now).then_some(*now))
        };
        let elsewhere = self.moves.iter().filter(|(old, _)| !homes.contains(old));
        let moves = elsewhere.filter_map(|(old, new)| Some((*old, home(new)?))).collect();
        owes_since_before.then(|| Self {
            // The epoch of the move that was undone begins with the next.
            epoch: Epoch(self.epoch.0.saturating_sub(1)),
            peer: site.clone(),
            nics: Vec::new(),
            care_of: Vec::new(),
            moves,
            tell: Vec::new(),
            runs_there: true,
            ..self
        })
    }

    /// The same for the name of a machine that is here again after `left`.
    pub(super) fn of_return(self, left: &Self) -> Self {
        Self { ttl_s: left.owed_ttl_s().unwrap_or(0), ..self }.looks_also_at(left)
    }

    /// Where earlier moves may have left the name, and what was to replace each: nothing once it has moved.
    fn places(&self) -> Vec<(IpAddr, IpAddr)> {
        match self.names {
            NameState::None | NameState::Moved { .. } | NameState::Settled { .. } => Vec::new(),
            NameState::Waiting | NameState::Pending => self.moves.clone(),
        }
    }

    /// Looks for the name also where `left` did, for what replaces an address now. Others are told of no more than they
    /// listen to.
    fn looks_also_at(mut self, left: &Self) -> Self {
        let here: Vec<IpAddr> = self.addresses().into_iter().chain(left.addresses()).collect();
        for (old, then) in left.places() {
            let next = self.moves.iter().find(|(at, _)| *at == then).map(|(_, now)| *now);
            let now = next.or(here.contains(&then).then_some(then));
            let is_known = self.moves.iter().any(|(at, _)| *at == old);
            match now.filter(|now| *now != old && !is_known) {
                Some(now) if self.moves.len() < MAX_ADDRESSES => self.moves.push((old, now)),
                Some(_) | None => {}
            }
        }
        self
    }

    /// The name's TTL before the move, until the name has it again. Asked for meanwhile, the name says the lowered one.
    pub(super) fn owed_ttl_s(&self) -> Option<u32> {
        match self.names {
            NameState::Settled { .. } => None,
            NameState::None | NameState::Waiting | NameState::Pending | NameState::Moved { .. } => {
                Some(self.ttl_s).filter(|ttl_s| *ttl_s > 0)
            }
        }
    }

    /// What the name's addresses become. One of this site for which nothing stands in at the new place stays: the machine is
    /// reached by it as long as it is attracted here.
    pub(super) fn replacements(&self) -> Vec<(IpAddr, IpAddr)> {
        let moves = |address: &IpAddr| self.moves.iter().any(|(old, _)| old == address);
        let stay = self.addresses().into_iter().filter(|address| !moves(address));
        self.moves.iter().copied().chain(stay.map(|address| (address, address))).collect()
    }

    /// The name has moved and lists these now.
    pub(super) fn note_listed(&mut self, listed: &[IpAddr]) {
        let mut moves = self.replacements();
        moves.retain(|(old, new)| old != new || listed.contains(old));
        self.moves = moves;
    }

    /// New clients are sent to one of these addresses of a NIC here: nothing else is known of the machine, or its name lists
    /// one that nothing stands in for.
    pub(super) fn is_still_given(&self, from: Leaving, addresses: &[IpAddr]) -> bool {
        let is_of_name = match self.names {
            NameState::None | NameState::Waiting | NameState::Pending => true,
            NameState::Moved { .. } | NameState::Settled { .. } => {
                addresses.iter().any(|address| self.moves.contains(&(*address, *address)))
            }
        };
        from == Leaving::Home && is_of_name
    }

    /// These sites know where it is.
    pub(super) fn forget_told(&mut self, heard: &BTreeSet<SiteName>) {
        self.tell.retain(|site| !heard.contains(site));
    }

    /// These of its connections are over.
    pub(super) fn forget_flows(&mut self, ended: &BTreeSet<FlowTuple>) {
        for nic in &mut self.nics {
            nic.flows.retain(|flow| !ended.contains(flow));
        }
    }

    /// Its name is not where the machine is, or its TTL is not what it was.
    pub(super) fn owes_name(&self) -> bool {
        self.name.is_some() && !matches!(self.names, NameState::None | NameState::Settled { .. })
    }

    /// What the tunnel is asked to hold for it.
    pub(super) fn holds(&self) -> Vec<HoldRequest> {
        self.nics
            .iter()
            .map(|nic| {
                let key = PortKey { machine: self.vm.clone(), nic: nic.nic.clone() };
                HoldRequest {
                    port: nic.port.clone(),
                    key,
                    peer: self.peer.clone(),
                    mac: nic.mac,
                    from: nic.from,
                    addresses: nic.addresses.clone(),
                    lan: nic.bridge.clone(),
                }
            })
            .collect()
    }

    /// The addresses that it attracts.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.nics.iter().flat_map(|nic| nic.addresses.iter().copied()).collect()
    }

    /// The site is one that the machine visited.
    pub(crate) fn is_of_visit(&self) -> bool {
        self.nics.iter().any(|nic| nic.from == Leaving::Visit)
    }

    pub(super) fn view(&self) -> AnchorView {
        let names = match self.names {
            NameState::None => "none",
            NameState::Waiting | NameState::Pending => "pending",
            NameState::Moved { .. } => "moved",
            NameState::Settled { .. } => "settled",
        };
        AnchorView {
            vm: self.vm.clone(),
            at: self.peer.clone(),
            home: self.addresses(),
            care_of: self.care_of.iter().map(|(_, care_of)| *care_of).collect(),
            flows: 0,
            flows_one_way: 0,
            conflicts: Vec::new(),
            attract_error: None,
            names: names.to_owned(),
            names_moved_ms: self.names.moved_unix_ms(),
            names_error: None,
            names_behind: Vec::new(),
            since_ms: self.since_unix_ms,
            closed_ms: self.ended.then(unix_ms),
        }
    }
}

/// The TTL that the name of a machine is to have again and does not have yet, as its anchor here knows it.
pub(super) fn owed_ttl_s(journal: &Journal, vm: &VmName) -> Option<u32> {
    let anchor: Option<Anchor> = journal.anchor(vm).unwrap_or_else(|error| {
        tracing::error!(%vm, error = chain(&error), "anchor could not be read");
        None
    });
    anchor?.owed_ttl_s()
}

/// At the home of a machine that returns: an anchor that gives its name the home addresses again.
pub(super) fn names_of_return(edges: &Edges, attempt: &Attempt, proposal: &Proposal) -> Option<Anchor> {
    let definition = &proposal.definition;
    let name = definition.dns_name.clone()?;
    if proposal.home_site != *edges.site() || edges.names.is_none() {
        return None;
    }
    Some(Anchor {
        vm: attempt.vm.clone(),
        epoch: attempt.epoch,
        peer: edges.site().clone(),
        nics: Vec::new(),
        care_of: Vec::new(),
        name: Some(name),
        moves: proposal.carried.iter().map(|carried| (carried.addr, carried.home)).collect(),
        ttl_s: 0,
        names: NameState::Pending,
        since_unix_ms: unix_ms(),
        tell: Vec::new(),
        runs_there: true,
        ended: false,
    })
}

/// Every address that the machine's name may have, with the one that clients are to find from now on: its stand-in at
/// the new place, or the home address itself. Its home attracts that, and a place that it left may give its own away.
fn replaced(row: &MachineRow, care_of: &[(IpAddr, IpAddr)]) -> Vec<(IpAddr, IpAddr)> {
    let new =
        |home: IpAddr| care_of.iter().find(|(of, _)| *of == home).map_or(home, |(_, stand_in)| *stand_in);
    let homes = row.definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| (home.addr, home.addr)));
    let carried = row.carried.iter().map(|carried| (carried.addr, carried.home));
    let here = row.care_of.iter().map(|care_of| (care_of.addr, care_of.home.addr));
    let all = homes.chain(carried).chain(here);
    all.map(|(old, home)| (old, new(home))).filter(|(old, new)| old != new).collect()
}

/// The other sites that attract an address of the machine.
fn others(site: &SiteName, row: &MachineRow, peer: &SiteName) -> Vec<SiteName> {
    let carried = takes_along(site, row).into_iter().map(|carried| carried.site);
    let all: BTreeSet<SiteName> = carried.chain([row.home_site.clone()]).collect();
    all.into_iter().filter(|other| other != site && other != peer).collect()
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
    use crate::test_site::anchor;

    #[test]
    fn a_machine_that_moves_on_before_its_name_has_settled_keeps_the_names_ttl() {
        let settled = NameState::Settled { at_unix_ms: 1 };
        let moved = NameState::Moved { at_unix_ms: 1 };
        let moves = [([198, 51, 100, 10].into(), [203, 0, 113, 200].into())];
        for (names, kept) in
            [(NameState::Pending, 3600), (NameState::Waiting, 3600), (moved, 3600), (settled, 0)]
        {
            let on = Anchor { names, ..anchor("b") }.moved_on(Epoch(2), &"c".parse().unwrap(), &moves);
            assert_eq!((on.names, on.ttl_s), (NameState::Pending, kept), "{names:?}");
            let unsaid = Anchor { names, ..anchor("b") }.moved_on(Epoch(2), &"c".parse().unwrap(), &[]);
            assert_eq!(
                (unsaid.names, unsaid.peer.as_str()),
                (names, "c"),
                "nobody has said by which address"
            );
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn new_clients_are_sent_to_a_home_address_as_long_as_the_name_is_there_or_lists_it() {
        let settled = NameState::Settled { at_unix_ms: 1 };
        let (v4, v6, away) = (ip("198.51.100.10"), ip("2001:db8::10"), ip("203.0.113.10"));
        let given = |from, names, moves: &[(IpAddr, IpAddr)]| {
            let anchor = Anchor { names, moves: moves.to_vec(), ..anchor("b") };
            anchor.is_still_given(from, &[v4, v6])
        };
        let (moved, kept) = ([(v4, away)], [(v4, away), (v6, v6)]);
        assert!(given(Leaving::Home, NameState::None, &moved), "nothing else is known of the machine");
        assert!(given(Leaving::Home, NameState::Pending, &moved), "the name has not moved");
        assert!(!given(Leaving::Home, settled, &moved));
        assert!(given(Leaving::Home, settled, &kept), "nothing stands in for it");
        for names in [NameState::None, settled] {
            assert!(!given(Leaving::Visit, names, &kept), "the home's name gives it");
        }
    }

    #[test]
    fn the_name_is_looked_for_where_earlier_moves_may_have_left_it() {
        let (home, at_b, at_c) = (ip("198.51.100.10"), ip("203.0.113.10"), ip("203.0.113.200"));
        let earlier = ip("203.0.113.99");
        let left = |names| {
            let moves = vec![(home, at_b), (earlier, at_b)];
            let anchor = Anchor { names, moves, ..anchor("b") };
            anchor.moved_on(Epoch(2), &"c".parse().unwrap(), &[(home, at_c), (at_b, at_c)]).moves
        };
        assert_eq!(left(NameState::Pending), [(home, at_c), (at_b, at_c), (earlier, at_c)]);
        assert_eq!(left(NameState::Settled { at_unix_ms: 1 }), [(home, at_c), (at_b, at_c)], "it was at b");
        let many = |moves: Vec<_>| Anchor { moves, ..anchor("b") };
        let told: Vec<_> = (0..MAX_ADDRESSES as u8).map(|n| (IpAddr::from([192, 0, 2, n]), at_c)).collect();
        let from = many(vec![(earlier, ip("192.0.2.1"))]);
        assert_eq!(
            from.moved_on(Epoch(2), &"c".parse().unwrap(), &told).moves,
            told,
            "others are told of them"
        );
    }
}
