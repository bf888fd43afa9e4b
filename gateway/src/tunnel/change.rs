//! Changes to the host's network, each with its undo, and the one who knows which are in force.
//!
//! A plan is a list of changes. Several NICs may want the same change (a route table's default, a
//! switch on the LAN's bridge): it is made for the first and undone with the last. What was there
//! before is remembered and put back. After a crash that memory is gone, but for sysctls: then
//! [`sweep`](Changes::sweep) removes what carries our names and numbers.

mod reassert;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use longhaul_core::tunnel::handover::{Mac, Prefix};
use longhaul_core::tunnel::policy::PortKey;
use tracing::{debug, warn};

use super::config::TunnelConfig;
use super::error::TunnelError;
use super::nft::{self, Table};
use super::routes::{Netlink, PolicyRule};
use super::sysctl::Switches;

pub(super) use reassert::{Reasserted, name};

/// One change to the host's network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Change {
    /// A kernel switch; skipped where this kernel has no such switch.
    Sysctl { key: String, value: &'static str },
    /// An nft table of ours.
    Table(Table),
    /// A route to a device.
    Route { to: Prefix, device: String, table: u32 },
    /// A policy rule.
    Rule(PolicyRule),
    /// Proxy ARP or NDP for an address; of a router it is said that it is one.
    Proxy { address: IpAddr, device: String, router: bool },
    /// A neighbour that need not be asked for.
    Fixed { address: IpAddr, mac: Mac, device: String },
    /// Frames to a link-layer address go up to the host.
    BridgeAddress { mac: Mac, bridge: String },
    /// A device's own link-layer address.
    OwnAddress { device: String, mac: Mac },
    /// A device is no bridge's port, and up.
    Routed { device: String },
    /// An address that makes the kernel's loose path filter loose on a device.
    DummyAddress { address: Ipv4Addr, device: String },
}

/// On whose behalf a change is in force.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Gateway,
    Away(PortKey),
    Visit(PortKey),
    Carry(PortKey),
    Sampler(PortKey),
}

/// What was there before a change.
#[derive(Debug, Clone)]
enum Before {
    Nothing,
    Address(Mac),
    Bridge(Option<u32>),
}

#[derive(Debug)]
struct InForce {
    owners: BTreeSet<Owner>,
    before: Before,
}

/// The changes in force.
pub(super) struct Changes {
    netlink: Netlink,
    switches: Switches,
    in_force: BTreeMap<Change, InForce>,
    plans: BTreeMap<Owner, Vec<Change>>,
}

impl Changes {
    pub(super) fn new(netlink: Netlink, switches: Switches) -> Self {
        Self { netlink, switches, in_force: BTreeMap::new(), plans: BTreeMap::new() }
    }

    /// Makes the changes of `plan`, in order. A failure undoes what the owner had in force.
    pub(super) async fn apply(&mut self, owner: &Owner, plan: Vec<Change>) -> Result<(), TunnelError> {
        for change in plan {
            if let Err(error) = self.apply_one(owner, change).await {
                if let Err(undo) = self.undo(owner).await {
                    warn!(%undo, "undoing a plan that failed left something behind");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether something else than `plan` is in force for `owner`.
    pub(super) fn has_other(&self, owner: &Owner, plan: &[Change]) -> bool {
        self.plans.get(owner).is_some_and(|made| made.iter().any(|change| !plan.contains(change)))
    }

    /// Undoes one change of `owner` alone, unless somebody else needs it; [`Changes::give_back`] makes it again.
    pub(super) async fn withdraw(&mut self, owner: &Owner, change: &Change) -> Result<(), TunnelError> {
        if let Some(plan) = self.plans.get_mut(owner) {
            plan.retain(|planned| planned != change);
        }
        let Some(in_force) = self.in_force.get_mut(change) else { return Ok(()) };
        in_force.owners.remove(owner);
        if !in_force.owners.is_empty() {
            return Ok(());
        }
        let before = self.in_force.remove(change).map_or(Before::Nothing, |in_force| in_force.before);
        self.take_back(change, before).await
    }

    /// Makes a change of `owner` that was withdrawn. A failure leaves its others.
    pub(super) async fn give_back(&mut self, owner: &Owner, change: Change) -> Result<(), TunnelError> {
        self.apply_one(owner, change).await
    }

    /// Counts the changes of `plan` as made for `owner`: an earlier gateway has made them. What was there
    /// before it is not known, but for sysctls.
    pub(super) fn take_over(&mut self, owner: &Owner, plan: Vec<Change>) {
        for change in &plan {
            let nothing = || InForce { owners: BTreeSet::new(), before: Before::Nothing };
            self.in_force.entry(change.clone()).or_insert_with(nothing).owners.insert(owner.clone());
        }
        self.plans.insert(owner.clone(), plan);
    }

    /// A table of `owner` has these rules now, which the kernel was told one by one.
    pub(super) fn restate(&mut self, owner: &Owner, table: &Table) {
        for planned in self.plans.get_mut(owner).into_iter().flatten() {
            let is_it = matches!(planned, Change::Table(old) if (old.family, &old.name) == (table.family, &table.name));
            if !is_it {
                continue;
            }
            let now = Change::Table(table.clone());
            let Some(in_force) = self.in_force.remove(planned) else { continue };
            self.in_force.insert(now.clone(), in_force);
            *planned = now;
        }
    }

    /// Undoes all changes of `owner` that nobody else needs, last first. Goes on after a failure and
    /// returns the first.
    pub(super) async fn undo(&mut self, owner: &Owner) -> Result<(), TunnelError> {
        let mut result = Ok(());
        for change in self.plans.remove(owner).unwrap_or_default().into_iter().rev() {
            let Some(in_force) = self.in_force.get_mut(&change) else { continue };
            in_force.owners.remove(owner);
            if !in_force.owners.is_empty() {
                continue;
            }
            let Some(in_force) = self.in_force.remove(&change) else { continue };
            if let Err(error) = self.take_back(&change, in_force.before).await {
                debug!(?change, %error, "not undone");
                result = result.and(Err(error));
            }
        }
        result
    }

    /// Undoes everything, and removes what an earlier gateway has left.
    pub(super) async fn sweep(&mut self, config: &TunnelConfig) -> Result<(), TunnelError> {
        let owners: Vec<Owner> =
            self.plans.keys().filter(|owner| **owner != Owner::Gateway).cloned().collect();
        let mut result = Ok(());
        for owner in owners {
            result = result.and(self.undo(&owner).await);
        }
        let tables = nft::our_tables(config).await?;
        let macs: Vec<Mac> =
            tables.iter().filter_map(|(_, name)| nft::mac_of_away_name(config, name)).collect();
        self.netlink.sweep(&macs, config.device_address, &config.device).await?;
        let script: String = tables.iter().map(|(family, name)| nft::remove(family, name)).collect();
        if !script.is_empty() {
            nft::run(&script).await?;
        }
        result.and(self.restore_left_switches())
    }

    /// Puts back the sysctls that an earlier gateway had set and nobody now needs.
    fn restore_left_switches(&mut self) -> Result<(), TunnelError> {
        for left in self.switches.keys() {
            let needed = self
                .in_force
                .keys()
                .any(|change| matches!(change, Change::Sysctl { key, .. } if *key == left));
            if !needed {
                self.switches.restore(&left)?;
            }
        }
        Ok(())
    }

    async fn apply_one(&mut self, owner: &Owner, change: Change) -> Result<(), TunnelError> {
        let plan = self.plans.entry(owner.clone()).or_default();
        if plan.contains(&change) {
            return Ok(());
        }
        plan.push(change.clone());
        if let Some(in_force) = self.in_force.get_mut(&change) {
            in_force.owners.insert(owner.clone());
            return Ok(());
        }
        let before = self.remember(&change).await?;
        let owners = BTreeSet::from([owner.clone()]);
        self.in_force.insert(change.clone(), InForce { owners, before });
        self.make(&change).await
    }

    async fn remember(&self, change: &Change) -> Result<Before, TunnelError> {
        Ok(match change {
            Change::OwnAddress { device, .. } => {
                self.netlink.link(device).await?.mac.map_or(Before::Nothing, Before::Address)
            }
            Change::Routed { device } => Before::Bridge(self.netlink.link(device).await?.bridge),
            Change::Sysctl { .. }
            | Change::Table(_)
            | Change::Route { .. }
            | Change::Rule(_)
            | Change::Proxy { .. }
            | Change::Fixed { .. }
            | Change::BridgeAddress { .. }
            | Change::DummyAddress { .. } => Before::Nothing,
        })
    }

    async fn make(&mut self, change: &Change) -> Result<(), TunnelError> {
        let netlink = &self.netlink;
        match change {
            Change::Sysctl { key, value } => self.switches.set(key, value),
            Change::Table(table) => nft::run(&table.install()).await,
            Change::Route { to, device, table } => {
                netlink.add_route(*to, netlink.link(device).await?.index, *table).await
            }
            Change::Rule(rule) => netlink.add_rule(rule).await,
            Change::Proxy { address, device, router } => {
                netlink.add_proxy(*address, *router, netlink.link(device).await?.index).await
            }
            Change::Fixed { address, mac, device } => {
                netlink.add_fixed(*address, *mac, netlink.link(device).await?.index).await
            }
            Change::BridgeAddress { mac, bridge } => {
                netlink.add_bridge_address(*mac, netlink.link(bridge).await?.index).await
            }
            Change::OwnAddress { device, mac } => {
                netlink.set_mac(netlink.link(device).await?.index, *mac).await
            }
            Change::Routed { device } => {
                netlink.set_bridge(netlink.link(device).await?.index, None).await?;
                netlink.set_up(device, None).await
            }
            Change::DummyAddress { address, device } => {
                netlink.add_dummy_address(*address, netlink.link(device).await?.index).await
            }
        }
    }

    async fn take_back(&mut self, change: &Change, before: Before) -> Result<(), TunnelError> {
        let netlink = &self.netlink;
        match change {
            Change::Sysctl { key, .. } => self.switches.restore(key),
            Change::Table(table) => nft::run(&table.remove()).await,
            Change::Route { to, table, .. } => netlink.delete_route(*to, *table).await,
            Change::Rule(rule) => netlink.delete_rule(rule).await,
            Change::Proxy { address, device, .. } => match netlink.find_link(device).await? {
                Some(link) => netlink.delete_proxy(*address, link.index).await,
                None => Ok(()),
            },
            Change::Fixed { address, device, .. } => match netlink.find_link(device).await? {
                Some(link) => netlink.delete_fixed(*address, link.index).await,
                None => Ok(()),
            },
            Change::BridgeAddress { mac, bridge } => match netlink.find_link(bridge).await? {
                Some(link) => netlink.delete_bridge_address(*mac, link.index).await,
                None => Ok(()),
            },
            Change::OwnAddress { device, .. } | Change::Routed { device } => {
                match netlink.find_link(device).await? {
                    Some(link) => self.restore_link(link.index, before).await,
                    None => Ok(()),
                }
            }
            Change::DummyAddress { address, device } => match netlink.find_link(device).await? {
                Some(link) => netlink.delete_dummy_address(*address, link.index).await,
                None => Ok(()),
            },
        }
    }

    async fn restore_link(&self, index: u32, before: Before) -> Result<(), TunnelError> {
        match before {
            Before::Address(mac) => self.netlink.set_mac(index, mac).await,
            Before::Bridge(bridge) => self.netlink.set_bridge(index, bridge).await,
            Before::Nothing => Ok(()),
        }
    }
}
