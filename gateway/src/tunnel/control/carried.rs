//! Addresses of earlier visits that a machine has brought, until the site that attracts one lets go of it.
//!
//! Which packets travel by them the datapath decides, and their translation is nftables'.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::tunnel::datapath::{GivenAway, VisitRoute};
use longhaul_core::tunnel::handover::{FlowTuple, Mac};
use longhaul_core::tunnel::policy::{AddressTaken, PortKey, Role};
use tracing::{info, warn};

use super::super::change::Owner;
use super::super::config::check_device_name;
use super::super::error::TunnelError;
use super::super::nft::{self, Table};
use super::super::plan::{self, CarriedRoute, CarryRequest, Kernel};
use super::{Control, Move, Visit};

/// A machine at home that has brought addresses of its visits.
pub(super) struct Carry {
    pub request: CarryRequest,
    pub lan_mac: Mac,
    /// What was open when it came.
    pub flows: Vec<FlowTuple>,
}

impl Control {
    /// The machine is on its way home: the rules by which connections of its visits will be carried here stand before it is.
    pub(super) async fn carry_prepare(&mut self, request: &CarryRequest) -> Result<(), TunnelError> {
        check_device_name(&request.lan)?;
        check_device_name(&request.port)?;
        self.make_carry(request).await.map(drop)
    }

    /// Makes what of it is not made yet; the LAN's link-layer address.
    async fn make_carry(&mut self, request: &CarryRequest) -> Result<Mac, TunnelError> {
        let lan_mac = self.netlink.link(&request.lan).await?.mac;
        let lan_mac = lan_mac.ok_or_else(|| TunnelError::NoSuchDevice(request.lan.clone()))?;
        let owner = Owner::Carry(request.key.clone());
        let plan = plan::carry_plan(&self.config, Kernel::probe(&request.lan)?, request, lan_mac);
        if self.changes.has_other(&owner, &plan) {
            // Prepared for a bridge with another address, or with addresses that are another machine's now.
            self.changes.undo(&owner).await?;
        }
        self.apply(&owner, Ok(plan)).await.map(|()| lan_mac)
    }

    /// The machine is at home, and connections that were opened at its visits are carried here.
    pub(super) async fn carry(
        &mut self,
        mut request: CarryRequest,
        mut flows: Vec<FlowTuple>,
    ) -> Result<(), TunnelError> {
        check_device_name(&request.lan)?;
        check_device_name(&request.port)?;
        let taken = self.route_what_is_free(&request.key, plan::carry_routes(&request)).await?;
        request.carried.retain(|carried| !taken.contains(&carried.addr));
        let lan_mac = match self.make_carry(&request).await {
            Ok(lan_mac) => lan_mac,
            Err(error) => {
                self.end(&request.key, Role::Visiting).await?;
                return Err(error);
            }
        };
        flows.truncate(self.config.max_flows as usize);
        let (key, carry) = (request.key.clone(), Carry { request, lan_mac, flows });
        let script = plan::carry_flows(&self.config, &carry.request, &carry.flows);
        if !script.is_empty() {
            nft::run(&script).await?;
        }
        let port = key.clone();
        self.tell(|done| Move::Resumed { key: port, done }).await??;
        info!(port = %key, addresses = carry.request.carried.len(), "carrying connections of visits");
        self.carries.insert(key, carry);
        Ok(())
    }

    pub(super) async fn carry_undo(&mut self, key: &PortKey) -> Result<(), TunnelError> {
        let carried = self.carries.remove(key).is_some();
        let undone = self.changes.undo(&Owner::Carry(key.clone())).await;
        if carried {
            self.end(key, Role::Visiting).await?;
        }
        undone
    }

    /// The machine stays where it is, and packets to addresses of it that other sites attract go to it again, also if they
    /// were passed on already.
    pub(super) async fn take_tunnels_back(&mut self, key: &PortKey) -> Result<(), TunnelError> {
        let visit = self.visits.get(key).map(|visit| plan::visit_routes(&visit.request));
        let carry = self.carries.get(key).map(|carry| plan::carry_routes(&carry.request));
        let Some(routes) = visit.or(carry) else { return Ok(()) };
        let packets = self.end(key, Role::Relay).await?;
        self.route_what_is_free(key, routes).await?;
        let port = key.clone();
        self.tell(|done| Move::Resumed { key: port, done }).await??;
        self.tell(|done| Move::Deliver { packets, done }).await
    }

    /// Tells the datapath a machine's addresses but those that are another machine's here, and returns these: what comes by
    /// the others must not stall with them.
    async fn route_what_is_free(
        &mut self,
        key: &PortKey,
        mut routes: Vec<VisitRoute>,
    ) -> Result<BTreeSet<IpAddr>, TunnelError> {
        let mut taken = BTreeSet::new();
        loop {
            let (port, asked) = (key.clone(), routes.clone());
            let AddressTaken { address, owner } =
                match self.tell(|done| Move::Visit { key: port, routes: asked, done }).await? {
                    Ok(given) => {
                        self.give_away(given).await;
                        return Ok(taken);
                    }
                    Err(refused) => refused,
                };
            warn!(port = %key, %address, %owner, "an address that a machine has brought is another machine's here; connections by it stall");
            routes.retain(|route| route.address != address);
            taken.insert(address);
        }
    }

    /// No rule of the machines that had these addresses is left for them.
    pub(super) async fn give_away(&mut self, given: Vec<GivenAway>) {
        for GivenAway { address, from } in given {
            info!(port = %from, %address, "address of an earlier visit is another machine's now");
            if let Err(error) = self.forget_rules(&from, address).await {
                warn!(port = %from, %address, %error, "rules for an address that is another machine's now were not removed");
            }
        }
    }

    /// The site that attracted this address of a machine that is here no longer does.
    pub(super) async fn forget_address(&mut self, key: PortKey, address: IpAddr) -> Result<(), TunnelError> {
        let port = key.clone();
        self.tell(|done| Move::ForgetAddress { key: port, address, done }).await?;
        self.forget_rules(&key, address).await
    }

    async fn forget_rules(&mut self, key: &PortKey, address: IpAddr) -> Result<(), TunnelError> {
        if let Some(Visit { request, .. }) = self.visits.get_mut(key)
            && let Some(over) = take_out(&mut request.carried, address)
        {
            let tables = plan::visit_tables(&self.config, request);
            self.strike(Owner::Visit(key.clone()), &tables, over).await?;
        }
        if let Some(Carry { request, lan_mac, .. }) = self.carries.get_mut(key)
            && let Some(over) = take_out(&mut request.carried, address)
        {
            let tables = plan::carry_tables(&self.config, request, *lan_mac);
            self.strike(Owner::Carry(key.clone()), &tables, over).await?;
        }
        Ok(())
    }

    /// Takes the rules of one address out of the tables. A table that was made anew without them would forget its flows.
    async fn strike(
        &mut self,
        owner: Owner,
        without: &[Table],
        over: CarriedRoute,
    ) -> Result<(), TunnelError> {
        let rules = plan::carried_rules(&self.config, &[over]);
        for table in without {
            self.changes.restate(&owner, table);
            for rule in &rules {
                nft::strike(table, &rule.set()).await?;
            }
        }
        Ok(())
    }
}

fn take_out(carried: &mut Vec<CarriedRoute>, address: IpAddr) -> Option<CarriedRoute> {
    let place = carried.iter().position(|carried| carried.addr == address)?;
    Some(carried.remove(place))
}
