//! A machine's network at one site: at home it is on its LAN's bridge, elsewhere it is routed and translated.
//!
//! Which of the two it is depends on the site alone, and this is the one place that asks. Which addresses a machine
//! has, and when it may run, is decided elsewhere.

use std::collections::BTreeMap;
use std::net::IpAddr;

use longhaul_core::ids::{DeviceName, SiteName};
use longhaul_core::machine::{MachineDefinition, Nic};
use longhaul_core::migration::message::{
    CareOf as Reserved, Carried, Handover, MAX_CARRIED, Proposal, Refusal, Reservation,
};
use longhaul_core::tunnel::handover::{FlowTuple, NicHandover};
use longhaul_core::tunnel::policy::PortKey;

use super::park::tunnel_failed;
use super::{Edges, MachineRow, TAP_OWNER, chain};
use crate::config::LanConfig;
use crate::tunnel::{CareOf, CarriedRoute, CarryRequest, HoldRequest, Leaving, TunnelError, VisitRequest};

/// A machine that is here, or comes.
#[derive(Debug, Clone)]
pub struct Stay {
    definition: MachineDefinition,
    home_site: SiteName,
    /// Where it comes from; none after a restart, when its home is known to be told.
    from: Option<SiteName>,
    care_of: Vec<Reserved>,
    carried: Vec<Carried>,
    /// Those of them that are attracted nowhere any more.
    over: Vec<IpAddr>,
    nics: Vec<NicHandover>,
}

impl Stay {
    /// Of a machine that comes from `from`.
    pub fn of_arrival(
        edges: &Edges,
        from: &SiteName,
        proposal: &Proposal,
        reservation: &Reservation,
    ) -> Self {
        Self {
            definition: proposal.definition.clone(),
            home_site: proposal.home_site.clone(),
            from: Some(from.clone()),
            care_of: reservation.care_of.clone(),
            carried: brought(edges.site(), proposal),
            over: Vec::new(),
            nics: proposal.nics.clone(),
        }
    }

    /// Of a machine that is here.
    pub fn of_row(edges: &Edges, row: &MachineRow) -> Self {
        let home_is_peer = edges.config.peer(&row.home_site).is_some();
        Self {
            definition: row.definition.clone(),
            home_site: row.home_site.clone(),
            from: row.came_from.clone().filter(|_| !home_is_peer),
            care_of: row.care_of.clone(),
            carried: row.carried.clone(),
            over: row.over.clone(),
            nics: row.handover.as_ref().map(|handover| handover.nics.clone()).unwrap_or_default(),
        }
    }

    /// Its home addresses live at this site.
    pub fn is_home(&self, edges: &Edges) -> bool {
        self.home_site == *edges.site()
    }

    /// Makes what QEMU is plugged into, and the rules of a visitor. Returns the tap of each NIC. Nothing reaches the
    /// guest by it before [`Stay::take_over`].
    pub async fn prepare(&self, edges: &Edges) -> Result<BTreeMap<DeviceName, String>, Refusal> {
        let mut taps = BTreeMap::new();
        for nic in &self.definition.nics {
            let (key, lan) = (self.key(nic), self.lan(edges, nic)?);
            let bridge = self.is_home(edges).then(|| lan.bridge.clone());
            if let Some(bridge) = bridge.clone().filter(|_| nic.has_ipv6()) {
                // In the pause there would be no time for it, and the guest will be told which neighbours are routers.
                edges.tunnel.solicit_routers(bridge).await.map_err(tunnel_failed)?;
            }
            let tap = edges.tunnel.create_tap(key.clone(), TAP_OWNER, bridge).await.map_err(tunnel_failed)?;
            if self.is_home(edges) {
                edges.tunnel.sample_begin(key, tap.clone()).await.map_err(tunnel_failed)?;
            }
            taps.insert(nic.name.clone(), tap);
        }
        if !self.is_home(edges) {
            self.prepare_visits(edges).await?;
        }
        Ok(taps)
    }

    /// The same for one that comes from another site. What its home still holds for it is held until it is here: an
    /// anchor that ended by itself would take away what is made now.
    pub async fn prepare_arrival(&self, edges: &Edges) -> Result<BTreeMap<DeviceName, String>, Refusal> {
        if !self.is_home(edges) {
            return self.prepare(edges).await;
        }
        self.expect_return(edges).await?;
        let taps = self.prepare(edges).await?;
        self.prepare_carry(edges).await;
        Ok(taps)
    }

    /// The rules alone, of one that comes from another site: the taps are there, but the tunnel forgot them with the
    /// gateway.
    pub async fn prepare_rules(&self, edges: &Edges) -> Result<(), Refusal> {
        if !self.is_home(edges) {
            return self.prepare_visits(edges).await;
        }
        self.expect_return(edges).await?;
        self.prepare_carry(edges).await;
        Ok(())
    }

    async fn expect_return(&self, edges: &Edges) -> Result<(), Refusal> {
        for nic in &self.definition.nics {
            edges.tunnel.expect_return(self.key(nic), true).await.map_err(tunnel_failed)?;
        }
        Ok(())
    }

    /// The rules for connections of its visits, which would take their time in the pause. What fails is tried again then.
    async fn prepare_carry(&self, edges: &Edges) {
        for nic in &self.definition.nics {
            let Ok(lan) = self.lan(edges, nic) else { continue };
            let carry = self.carry(edges, nic, lan.bridge.clone());
            if !carry.carried.is_empty() {
                let prepared = edges.tunnel.carry_prepare(carry).await;
                self.warner(nic)(prepared, "connections of its visits may stall when it is here");
            }
        }
    }

    async fn prepare_visits(&self, edges: &Edges) -> Result<(), Refusal> {
        for nic in &self.definition.nics {
            let visit = self.visit(edges, nic)?;
            edges.tunnel.visit_prepare(visit).await.map_err(tunnel_failed)?;
        }
        Ok(())
    }

    /// The machine is this site's: its addresses here are its own, and its open connections find their way. Right before
    /// it runs. What fails is reported; the machine must run.
    pub async fn take_over(&self, edges: &Edges, handover: &Handover) {
        for nic in &self.definition.nics {
            let flows = flows(handover, nic);
            let (lan, warn) = (self.lan(edges, nic).map(|lan| lan.bridge.clone()), self.warner(nic));
            if !self.is_home(edges) {
                // Neighbours are what it has been told already.
                warn(
                    edges.tunnel.come_back(self.key(nic), Vec::new()).await,
                    "care-of address is still attracted",
                );
                warn(
                    edges.tunnel.visit_flows(self.key(nic), flows).await,
                    "flows of before the move were not installed",
                );
                continue;
            }
            let Ok(lan) = lan else { continue };
            let neighbours = edges.tunnel.home_neighbours(lan.clone()).await.unwrap_or_default();
            warn(edges.tunnel.come_back(self.key(nic), neighbours).await, "home address is still attracted");
            warn(
                edges.tunnel.carry(self.carry(edges, nic, lan), flows).await,
                "connections of its visits stall",
            );
        }
    }

    /// It runs.
    pub async fn resumed(&self, edges: &Edges) {
        if self.is_home(edges) {
            return;
        }
        for nic in &self.definition.nics {
            let resumed = edges.tunnel.visit_resumed(self.key(nic)).await;
            self.warner(nic)(resumed, "care-of address could not be announced");
        }
    }

    /// Everything again for a machine that runs here while its gateway was away.
    pub async fn restore(&self, edges: &Edges) -> Result<(), TunnelError> {
        for nic in &self.definition.nics {
            let flows = self.nics.iter().find(|handed| handed.nic == nic.name);
            let flows = flows.map(|handed| handed.flows.clone()).unwrap_or_default();
            let (Ok(lan), key) = (self.lan(edges, nic), self.key(nic)) else { continue };
            if self.is_home(edges) {
                if !self.carried.is_empty() {
                    edges.tunnel.carry(self.carry(edges, nic, lan.bridge.clone()), flows).await?;
                }
                continue;
            }
            let Ok(visit) = self.visit(edges, nic) else { continue };
            edges.tunnel.visit_prepare(visit).await?;
            edges.tunnel.visit_flows(key.clone(), flows).await?;
            edges.tunnel.visit_resumed(key).await?;
        }
        Ok(())
    }

    /// It did not come, or has left: nothing of it stays on this host but what an anchor has.
    pub async fn end(&self, edges: &Edges) {
        for nic in &self.definition.nics {
            let (key, warn) = (self.key(nic), self.warner(nic));
            match self.is_home(edges) {
                true => {
                    warn(
                        edges.tunnel.expect_return(key.clone(), false).await,
                        "tunnel still waits for its return",
                    );
                    warn(edges.tunnel.carry_undo(key.clone()).await, "rules of its visits were not removed");
                    warn(edges.tunnel.sample_end(key.clone()).await, "sampler was not removed");
                }
                false => {
                    warn(edges.tunnel.visit_undo(key.clone()).await, "routes of the visit were not removed")
                }
            }
            warn(edges.tunnel.remove_tap(key).await, "tap was not removed");
        }
    }

    fn visit(&self, edges: &Edges, nic: &Nic) -> Result<VisitRequest, Refusal> {
        let lan = self.lan(edges, nic)?;
        let handed = self
            .nics
            .iter()
            .find(|handed| handed.nic == nic.name)
            .cloned()
            .ok_or_else(|| Refusal::PeerMisbehaved(format!("nothing was said about NIC {}", nic.name)))?;
        let key = self.key(nic);
        let ours = self.care_of.iter().filter(|care_of| care_of.nic == nic.name);
        let others = self.definition.nics.iter().filter(|other| other.name != nic.name);
        Ok(VisitRequest {
            port: edges.tap_name(&key),
            key,
            peer: self.home_site.clone(),
            from: self.from.clone(),
            carried: self.carried(nic),
            nic: handed,
            others: others.flat_map(|other| other.home.iter().map(|home| home.addr)).collect(),
            lan: lan.bridge.clone(),
            care_of: ours.map(|care_of| CareOf { home: care_of.home.addr, care_of: care_of.addr }).collect(),
        })
    }

    fn carry(&self, edges: &Edges, nic: &Nic, lan: String) -> CarryRequest {
        let key = self.key(nic);
        CarryRequest {
            port: edges.tap_name(&key),
            key,
            from: self.from.clone(),
            home: nic.home.iter().map(|home| home.addr).collect(),
            carried: self.carried(nic),
            lan,
        }
    }

    fn carried(&self, nic: &Nic) -> Vec<CarriedRoute> {
        let ours = (0u32..).zip(&self.carried).filter(|(_, carried)| carried.nic == nic.name);
        let attracted = ours.filter(|(_, carried)| !self.over.contains(&carried.addr));
        let route = |(number, carried): (u32, &Carried)| CarriedRoute {
            number,
            home: carried.home,
            addr: carried.addr,
            site: carried.site.clone(),
        };
        attracted.map(route).collect()
    }

    fn key(&self, nic: &Nic) -> PortKey {
        PortKey { machine: self.definition.name.clone(), nic: nic.name.clone() }
    }

    fn lan<'a>(&self, edges: &'a Edges, nic: &Nic) -> Result<&'a LanConfig, Refusal> {
        let lan = edges.config.lan.get(nic.lan.as_str());
        lan.ok_or_else(|| Refusal::Incompatible(format!("site {} has no [lan.{}]", edges.site(), nic.lan)))
    }

    fn warner<'a>(&'a self, nic: &'a Nic) -> impl Fn(Result<(), TunnelError>, &'static str) + 'a {
        move |done, what| {
            if let Err(error) = done {
                tracing::warn!(vm = %self.definition.name, nic = %nic.name, error = chain(&error), what);
            }
        }
    }
}

/// What the tunnel is to hold for a machine that is about to leave for `peer`.
pub fn holds(edges: &Edges, row: &MachineRow, peer: &SiteName) -> Result<Vec<HoldRequest>, Refusal> {
    let definition = &row.definition;
    let hold = |nic: &Nic| {
        let lan = edges.config.lan.get(nic.lan.as_str()).ok_or_else(|| {
            Refusal::Incompatible(format!("site {} has no [lan.{}]", edges.site(), nic.lan))
        })?;
        let (from, addresses) = left_behind(edges.site(), row, nic);
        let key = PortKey { machine: definition.name.clone(), nic: nic.name.clone() };
        Ok(HoldRequest {
            port: edges.port(row, &nic.name),
            key,
            peer: peer.clone(),
            mac: nic.mac,
            from,
            addresses,
            lan: lan.bridge.clone(),
        })
    };
    definition.nics.iter().map(hold).collect()
}

/// The addresses by which clients reach a machine at this site.
pub fn left_behind(site: &SiteName, row: &MachineRow, nic: &Nic) -> (Leaving, Vec<IpAddr>) {
    if row.home_site == *site {
        return (Leaving::Home, nic.home.iter().map(|home| home.addr).collect());
    }
    let ours = row.care_of.iter().filter(|care_of| care_of.nic == nic.name);
    (Leaving::Visit, ours.map(|care_of| care_of.addr).collect())
}

/// What a machine takes along when it leaves this site: the addresses it has brought, and those it had here. The newest
/// are kept.
pub fn takes_along(site: &SiteName, row: &MachineRow) -> Vec<Carried> {
    let here = row.care_of.iter().map(|care_of| Carried {
        nic: care_of.nic.clone(),
        home: care_of.home.addr,
        addr: care_of.addr,
        site: site.clone(),
    });
    let brought = row.carried.iter().filter(|carried| !row.over.contains(&carried.addr));
    let mut all: Vec<Carried> = brought.cloned().chain(here).collect();
    all.drain(..all.len().saturating_sub(MAX_CARRIED));
    all
}

/// What an arriving machine brings: not the addresses that it had here before, which are its own again.
pub fn brought(site: &SiteName, proposal: &Proposal) -> Vec<Carried> {
    proposal.carried.iter().filter(|carried| carried.site != *site).cloned().collect()
}

fn flows(handover: &Handover, nic: &Nic) -> Vec<FlowTuple> {
    let handed = handover.nics.iter().find(|handed| handed.nic == nic.name);
    handed.map(|handed| handed.flows.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::handover::Prefix;

    use super::*;

    fn row(home_site: &str, care_of: &[&str], carried: &[(&str, &str)]) -> MachineRow {
        let definition = "name = \"web1\"\nmachine = \"pc-q35-7.2\"\nvcpus = 1\nmemory_mib = 64\n\
            [[nics]]\nname = \"lan\"\nmac = \"52:54:00:00:00:01\"\nlan = \"lan\"\npci = \"05.0\"\n\
            home = [\"198.51.100.10/24\"]\n";
        let home = Prefix { addr: "198.51.100.10".parse().unwrap(), len: 24 };
        let nic = || "lan".parse().unwrap();
        let reserved = |addr: &&str| Reserved { nic: nic(), home, addr: addr.parse().unwrap() };
        let brought = |(addr, site): &(&str, &str)| Carried {
            nic: nic(),
            home: home.addr,
            addr: addr.parse().unwrap(),
            site: site.parse().unwrap(),
        };
        MachineRow {
            definition: toml::from_str(definition).unwrap(),
            images: Vec::new(),
            home_site: home_site.parse().unwrap(),
            came_from: None,
            adopted: None,
            care_of: care_of.iter().map(reserved).collect(),
            carried: carried.iter().map(brought).collect(),
            over: Vec::new(),
            handover: None,
            wanted: true,
            settled_in: None,
            ttl_before_s: None,
        }
    }

    fn addresses(carried: &[Carried]) -> Vec<String> {
        carried.iter().map(|carried| format!("{} at {}", carried.addr, carried.site)).collect()
    }

    #[test]
    fn a_visitor_leaves_its_care_of_address_behind_and_takes_it_along() {
        let (site, row) = ("b".parse().unwrap(), row("a", &["203.0.113.200"], &[("192.0.2.200", "c")]));
        let (from, left) = left_behind(&site, &row, &row.definition.nics[0]);
        assert_eq!((from, left), (Leaving::Visit, vec!["203.0.113.200".parse().unwrap()]));
        let along = takes_along(&site, &row);
        assert_eq!(addresses(&along), ["192.0.2.200 at c", "203.0.113.200 at b"]);
        let over = MachineRow { over: vec!["192.0.2.200".parse().unwrap()], ..row };
        assert_eq!(addresses(&takes_along(&site, &over)), ["203.0.113.200 at b"]);
    }

    #[test]
    fn at_home_it_leaves_its_home_address_behind() {
        let (site, row) = ("a".parse().unwrap(), row("a", &[], &[("203.0.113.200", "b")]));
        let (from, left) = left_behind(&site, &row, &row.definition.nics[0]);
        assert_eq!((from, left), (Leaving::Home, vec!["198.51.100.10".parse().unwrap()]));
        assert_eq!(addresses(&takes_along(&site, &row)), ["203.0.113.200 at b"]);
    }

    #[test]
    fn more_addresses_than_may_be_carried_are_left_behind_oldest_first() {
        let site = "b".parse().unwrap();
        let texts: Vec<String> = (0..MAX_CARRIED).map(|n| format!("192.0.2.{n}")).collect();
        let brought: Vec<(&str, &str)> = texts.iter().map(|text| (text.as_str(), "c")).collect();
        let along = takes_along(&site, &row("a", &["203.0.113.200"], &brought));
        assert_eq!(along.len(), MAX_CARRIED);
        assert_eq!(addresses(&along)[0], "192.0.2.1 at c");
        assert_eq!(addresses(&along)[MAX_CARRIED - 1], "203.0.113.200 at b");
    }
}
