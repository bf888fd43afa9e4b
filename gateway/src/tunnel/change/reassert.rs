//! What is in force and others have removed is made again: a firewall's reload begins with `flush ruleset`, and a network
//! service that is restarted takes away what it does not know.
//!
//! Sysctls, link-layer addresses and bridges' ports are not looked at: whoever changes one of those means it.

use tracing::debug;

use super::{Change, Changes};
use crate::tunnel::error::TunnelError;
use crate::tunnel::nft;
use crate::tunnel::routes::Standing;

/// What a look has found.
#[derive(Debug, Default)]
pub(in crate::tunnel) struct Reasserted {
    /// It was gone, and stands again.
    pub made: Vec<Change>,
    /// It was gone, and could not be made.
    pub failed: Vec<Change>,
}

impl Changes {
    /// Looks once. Tables come first: no packet takes a route before its rules stand.
    pub(in crate::tunnel) async fn reassert(&mut self) -> Result<Reasserted, TunnelError> {
        let mut found = Reasserted::default();
        let tables: Vec<Change> = self.looked_at().filter(|change| is_table(change)).cloned().collect();
        let others: Vec<Change> = self.looked_at().filter(|change| !is_table(change)).cloned().collect();
        if !tables.is_empty() {
            let standing = nft::all_tables().await?;
            for change in tables {
                let Change::Table(table) = &change else { continue };
                if !standing.contains(&(table.family.to_owned(), table.name.clone())) {
                    let made = nft::run(&table.install()).await;
                    found.note(change, made.map(|()| true));
                }
            }
        }
        if !others.is_empty() {
            let standing = self.netlink.standing().await?;
            for change in others {
                let made = self.make_if_gone(&change, &standing).await;
                found.note(change, made);
            }
        }
        Ok(found)
    }

    fn looked_at(&self) -> impl Iterator<Item = &Change> {
        self.in_force.keys().filter(|change| match change {
            Change::Table(_)
            | Change::Route { .. }
            | Change::Rule(_)
            | Change::Proxy { .. }
            | Change::Fixed { .. }
            | Change::BridgeAddress { .. }
            | Change::DummyAddress { .. } => true,
            Change::Sysctl { .. } | Change::OwnAddress { .. } | Change::Routed { .. } => false,
        })
    }

    /// Says whether it was gone. What a device had is no loss while the device is not there.
    async fn make_if_gone(&self, change: &Change, standing: &Standing) -> Result<bool, TunnelError> {
        let netlink = &self.netlink;
        let device = match change {
            Change::Rule(rule) => return netlink.add_missing_rule(rule).await,
            Change::Route { device, .. }
            | Change::Proxy { device, .. }
            | Change::Fixed { device, .. }
            | Change::BridgeAddress { bridge: device, .. }
            | Change::DummyAddress { device, .. } => device,
            Change::Table(_) | Change::Sysctl { .. } | Change::OwnAddress { .. } | Change::Routed { .. } => {
                return Ok(false);
            }
        };
        let Some(link) = netlink.find_link(device).await? else { return Ok(false) };
        let index = link.index;
        match change {
            Change::Route { to, table, .. } => netlink.add_missing_route(*to, index, *table).await,
            Change::DummyAddress { address, .. } => netlink.add_missing_dummy_address(*address, index).await,
            Change::Proxy { address, router, .. } if !standing.proxies.contains(&(*address, index)) => {
                netlink.add_proxy(*address, *router, index).await.map(|()| true)
            }
            Change::Fixed { address, mac, .. } if !standing.fixed.contains(&(*address, *mac, index)) => {
                netlink.add_fixed(*address, *mac, index).await.map(|()| true)
            }
            Change::BridgeAddress { mac, .. } if !standing.bridges.contains(&(*mac, index)) => {
                netlink.add_bridge_address(*mac, index).await.map(|()| true)
            }
            Change::Proxy { .. }
            | Change::Fixed { .. }
            | Change::BridgeAddress { .. }
            | Change::Rule(_)
            | Change::Table(_)
            | Change::Sysctl { .. }
            | Change::OwnAddress { .. }
            | Change::Routed { .. } => Ok(false),
        }
    }
}

impl Reasserted {
    fn note(&mut self, change: Change, made: Result<bool, TunnelError>) {
        match made {
            Ok(true) => self.made.push(change),
            Ok(false) => {}
            Err(error) => {
                debug!(?change, %error, "gone and not made again");
                self.failed.push(change);
            }
        }
    }
}

fn is_table(change: &Change) -> bool {
    matches!(change, Change::Table(_))
}

/// For people.
pub(in crate::tunnel) fn name(change: &Change) -> String {
    match change {
        Change::Table(table) => format!("table {} {}", table.family, table.name),
        Change::Route { to, device, .. } => format!("route {}/{} to {device}", to.addr, to.len),
        Change::Rule(rule) => rule.to_string(),
        Change::Proxy { address, device, .. } => format!("proxy entry {address} on {device}"),
        Change::Fixed { address, device, .. } => format!("neighbour {address} on {device}"),
        Change::BridgeAddress { mac, bridge } => format!("entry {mac} of bridge {bridge}"),
        Change::DummyAddress { address, device } => format!("address {address} on {device}"),
        Change::Sysctl { key, .. } => format!("sysctl {key}"),
        Change::OwnAddress { device, .. } => format!("link-layer address of {device}"),
        Change::Routed { device } => format!("routed port {device}"),
    }
}
