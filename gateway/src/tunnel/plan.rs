//! Which changes to the host's network a hold, a visit and a sampler consist of, and in which order.
//!
//! Pure: the same request gives the same plan. Order matters twice. In a hold the bridge entry comes
//! last, because frames go up to the host from that moment and must find their route there. In a visit
//! all rules stand before the route to the guest.
//!
//! A visitor and its home LAN may have the private addresses of this site's LAN and of this host. Which of the two is
//! meant follows from where a packet comes from, and the routing tables of the host are as they were:
//!
//! | priority | packets | look up |
//! |---|---|---|
//! | 95; 0 if this host has an address of the visitor's home | of a visitor, to its home | the tunnel |
//! | 96 | to a visitor: out of the tunnel, to its care-of address, of other visitors | the visitors |
//!
//! Priority 0 is before the host's own addresses, and rules that others add without a priority land there as well, so that
//! it is taken only where it must be.
//!
//! Sysctls and why:
//!
//! | key | value | why |
//! |---|---|---|
//! | `conf/DEVICE/forwarding` | 1 | packets are routed between LAN, tunnel and tap; not the host-wide `ip_forward` |
//! | `conf/TUN/accept_local` | 1 | somebody at a visitor's home may have an address that this host has |
//! | `conf/TUN/rp_filter` | 2 | packets of any source come out of the tunnel; loose holds even where `all` is strict, given an address |
//! | `conf/TAP/rp_filter` | 2 | the same for a visitor's replies, by whichever of its NICs; forged sources are dropped by our rules |
//! | `conf/TAP/proxy_arp` | 1 | the visitor asks for its old neighbours |
//! | `conf/DEVICE/send_redirects` | 0 | a visitor must not be told a shorter way |
//! | `neigh/DEVICE/proxy_delay` | 0 | the kernel waits up to 0.8 s before it answers for another |
//! | `netfilter/nf_conntrack_tcp_loose` | 1 | connections of before the move are tracked from their middle |
//! | `netfilter/nf_conntrack_tcp_be_liberal` | 1 | a machine that comes again has gone on meanwhile, and the kernel would refuse what is outside of the windows it knows |
//! | IPv6 `conf/LAN/accept_ra` | 2 | the host keeps its own default route while it forwards |
//! | IPv6 `conf/all/proxy_ndp` | 1 | who asks a proxied address itself whether it is still there is answered, and not forwarded |
//! | IPv6 `proxy_ndp`, `accept_dad`, `force_forwarding` or `all/forwarding` | | the same for IPv6 |

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::ids::SiteName;
use longhaul_core::tunnel::datapath::VisitRoute;
use longhaul_core::tunnel::handover::{FlowTuple, Mac, Neighbour, NicHandover, Prefix};
use longhaul_core::tunnel::policy::PortKey;

use serde::{Deserialize, Serialize};

use super::change::Change;
use super::config::TunnelConfig;
use super::error::TunnelError;
use super::nft::{self, Table};
use super::routes::PolicyRule;
use super::sysctl;
use super::tap::port_id;

const MAIN_TABLE: u32 = 254;
/// Before the host's own addresses.
pub(super) const FIRST: u32 = 0;

/// A machine that is about to leave this site, one of its NICs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HoldRequest {
    /// The NIC.
    pub key: PortKey,
    /// Where the machine goes.
    pub peer: SiteName,
    /// The guest's link-layer address.
    pub mac: Mac,
    /// What it leaves here.
    pub from: Leaving,
    /// The addresses by which clients reach it here: its home addresses at home, its care-of addresses where it visits.
    pub addresses: Vec<IpAddr>,
    /// The device the guest is plugged into (its tap).
    pub port: String,
    /// The bridge of the home LAN, on which the host has an address.
    pub lan: String,
}

/// What a machine leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Leaving {
    /// Its home, where it is on the LAN's bridge.
    Home,
    /// A site it visits, where it is routed.
    Visit,
}

/// An address of an earlier visit, by which connections are still open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CarriedRoute {
    /// Its place among the machine's carried addresses; it tells the marks of its connections.
    pub number: u32,
    /// The address the guest believes it has.
    pub home: IpAddr,
    /// The address its clients dialled.
    pub addr: IpAddr,
    /// The site that attracts it.
    pub site: SiteName,
}

/// A machine that is back at home with addresses of its visits, one of its NICs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CarryRequest {
    /// The NIC.
    pub key: PortKey,
    /// Where it came from: what that site held for its home addresses is still under way.
    pub from: Option<SiteName>,
    /// The guest's home addresses.
    pub home: Vec<IpAddr>,
    /// The addresses it has brought.
    pub carried: Vec<CarriedRoute>,
    /// The device the guest is plugged into (its tap).
    pub port: String,
    /// The bridge of the home LAN.
    pub lan: String,
}

/// A care-of address and the home address it stands for; both of one IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CareOf {
    /// The address the guest believes it has.
    pub home: IpAddr,
    /// The address this site gives it.
    pub care_of: IpAddr,
}

/// A machine that will visit this site, one of its NICs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisitRequest {
    /// The NIC.
    pub key: PortKey,
    /// Where the machine's home is.
    pub peer: SiteName,
    /// Where it comes from, if that is not its home: that site passes on what comes for it until its home has heard.
    pub from: Option<SiteName>,
    /// Addresses of earlier visits that it brings.
    pub carried: Vec<CarriedRoute>,
    /// What its home says about it. `flows` is not read: they come later.
    pub nic: NicHandover,
    /// The home addresses of the machine's other NICs, which it may answer for through this one.
    pub others: Vec<IpAddr>,
    /// The device the guest will be plugged into (its tap).
    pub port: String,
    /// The device of this site's LAN, on which care-of addresses are answered for.
    pub lan: String,
    /// Its care-of addresses; none: only the tunnel reaches it.
    pub care_of: Vec<CareOf>,
}

/// What this kernel offers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    /// IPv6 can be forwarded per device (Linux 6.17 and newer).
    pub force_forwarding: bool,
    /// The host takes its own IPv6 routes from announcements on the LAN.
    pub lan_accepts_ra: bool,
}

impl Kernel {
    /// Looks at the switches of the running kernel.
    pub(super) fn probe(lan: &str) -> Result<Self, TunnelError> {
        let accept_ra = sysctl::read(&format!("net/ipv6/conf/{lan}/accept_ra"))?;
        Ok(Self {
            force_forwarding: sysctl::read("net/ipv6/conf/all/force_forwarding")?.is_some(),
            lan_accepts_ra: accept_ra.is_some_and(|value| value != "0"),
        })
    }
}

/// What the tunnel device needs, once.
pub(super) fn device_plan(config: &TunnelConfig) -> Vec<Change> {
    let device = &config.device;
    vec![
        switch(format!("net/ipv4/conf/{device}/forwarding"), "1"),
        switch(format!("net/ipv4/conf/{device}/accept_local"), "1"),
        switch(format!("net/ipv4/conf/{device}/rp_filter"), "2"),
        switch(format!("net/ipv4/conf/{device}/send_redirects"), "0"),
        switch(format!("net/ipv6/conf/{device}/addr_gen_mode"), "1"),
        switch(format!("net/ipv6/conf/{device}/accept_ra"), "0"),
    ]
}

/// Packets to a machine on the LAN, or to one that visits and leaves, come to us.
pub(super) fn hold_plan(config: &TunnelConfig, kernel: Kernel, request: &HoldRequest) -> Vec<Change> {
    let HoldRequest { key, mac, from, addresses, lan, .. } = request;
    let mut plan = lan_switches(lan);
    if addresses.iter().any(IpAddr::is_ipv6) {
        plan.extend(keep_ra(kernel, lan));
        plan.extend(ipv6_switches(kernel, [lan, &config.device]));
    }
    if *from == Leaving::Home {
        plan.push(Change::Table(nft::attract_table(config, &port_id(key), *mac, lan)));
    }
    for address in addresses {
        plan.push(Change::Proxy { address: *address, device: lan.clone(), router: false });
        plan.push(Change::Route {
            to: Prefix::host(*address),
            device: config.device.clone(),
            table: MAIN_TABLE,
        });
    }
    plan.push(match from {
        Leaving::Home => Change::BridgeAddress { mac: *mac, bridge: lan.clone() },
        Leaving::Visit => Change::Table(nft::left_table(config, &port_id(key), addresses)),
    });
    plan
}

/// A machine at home whose clients dialled it elsewhere: those flows go the way they came.
pub(super) fn carry_plan(
    config: &TunnelConfig,
    kernel: Kernel,
    request: &CarryRequest,
    lan_mac: Mac,
) -> Vec<Change> {
    let lan = &request.lan;
    let mut plan = lan_switches(lan);
    let has_v6 = request.carried.iter().any(|carried| carried.addr.is_ipv6());
    if has_v6 {
        plan.extend(keep_ra(kernel, lan));
        plan.extend(ipv6_switches(kernel, [lan, &config.device]));
    }
    plan.extend(tunnel_routes(config, lan, has_v6, config.rule_priority));
    plan.extend(carry_tables(config, request, lan_mac).map(Change::Table));
    plan
}

/// Its tables.
pub(super) fn carry_tables(config: &TunnelConfig, request: &CarryRequest, lan_mac: Mac) -> [Table; 2] {
    let carried = carried_rules(config, &request.carried);
    let (id, port, lan) = (port_id(&request.key), &request.port, &request.lan);
    nft::carry_tables(config, &nft::Home { id: &id, port, lan, lan_mac, carried: &carried })
}

/// The rules of a machine's carried addresses.
pub(super) fn carried_rules(config: &TunnelConfig, carried: &[CarriedRoute]) -> Vec<nft::CarriedRule> {
    let rule = |route: &CarriedRoute| nft::CarriedRule {
        home: route.home,
        addr: route.addr,
        mark: config.mark_tunnel + 1 + route.number,
        number: route.number,
    };
    carried.iter().map(rule).collect()
}

/// Marked packets that come in by `input` go into the tunnel.
fn tunnel_routes(config: &TunnelConfig, input: &str, has_v6: bool, priority: u32) -> Vec<Change> {
    let switches = ["tcp_loose", "tcp_be_liberal"];
    let mut plan: Vec<Change> =
        switches.map(|name| switch(format!("net/netfilter/nf_conntrack_{name}"), "1")).into();
    for v6 in [false, true].into_iter().filter(|v6| !v6 || has_v6) {
        let unspecified: IpAddr = if v6 { [0; 16].into() } else { [0; 4].into() };
        let (device, table) = (config.device.clone(), config.route_table);
        plan.push(Change::Route { to: Prefix { addr: unspecified, len: 0 }, device, table });
        let (input, mark) = (Some(input.to_owned()), Some(config.mark_tunnel));
        plan.push(Change::Rule(PolicyRule { v6, priority, input, mark, table }));
    }
    plan
}

/// Where the ways to visitors are looked for.
fn visitor_rule(config: &TunnelConfig, v6: bool) -> Change {
    let (priority, mark, table) = (config.rule_priority + 1, Some(config.mark_visitor), config.visit_table);
    Change::Rule(PolicyRule { v6, priority, input: None, mark, table })
}

/// A visitor finds everything as it was at home, and its replies their way.
/// `own` are this host's addresses.
pub(super) fn visit_plan(
    config: &TunnelConfig,
    kernel: Kernel,
    request: &VisitRequest,
    own: &BTreeSet<IpAddr>,
) -> Vec<Change> {
    let VisitRequest { port, lan, nic, .. } = request;
    let home: Vec<IpAddr> = nic.home.iter().map(|prefix| prefix.addr).collect();
    let has_v6 = home.iter().any(IpAddr::is_ipv6);
    let mut plan = port_changes(config, request);
    plan.extend(lan_switches(lan));
    if has_v6 {
        plan.extend(keep_ra(kernel, lan));
        plan.extend(ipv6_switches(kernel, [lan, port, &config.device]));
    }
    plan.extend(visit_tables(config, request).map(Change::Table));
    let clash = own.iter().any(|own| nic.home_prefixes.iter().any(|prefix| prefix.contains(*own)));
    let priority = if clash { FIRST } else { config.rule_priority };
    plan.extend(tunnel_routes(config, port, has_v6, priority));
    plan.extend([false, true].into_iter().filter(|v6| !v6 || has_v6).map(|v6| visitor_rule(config, v6)));
    plan.extend(nic.neighbours.iter().filter(|neighbour| neighbour.addr.is_ipv6()).map(|neighbour| {
        // IPv4 is answered for whatever is asked; IPv6 has no such switch.
        Change::Proxy { address: neighbour.addr, device: port.clone(), router: neighbour.is_router() }
    }));
    for address in &home {
        plan.push(Change::Fixed { address: *address, mac: nic.mac, device: port.clone() });
        plan.push(Change::Route {
            to: Prefix::host(*address),
            device: port.clone(),
            table: config.visit_table,
        });
    }
    for CareOf { care_of, .. } in &request.care_of {
        // Translation comes before routing; untranslated it is for a machine that has left.
        plan.push(Change::Route {
            to: Prefix::host(*care_of),
            device: config.device.clone(),
            table: MAIN_TABLE,
        });
        plan.push(Change::Proxy { address: *care_of, device: lan.clone(), router: false });
    }
    plan
}

/// By which site packets of each of a visitor's addresses travel.
pub(super) fn visit_routes(request: &VisitRequest) -> Vec<VisitRoute> {
    let (home, from) = (&request.peer, request.from.as_ref().filter(|from| **from != request.peer));
    let routed = |prefix: &Prefix| match from {
        Some(from) => uncarried(prefix.addr, from, Some(home.clone())),
        None => uncarried(prefix.addr, home, None),
    };
    request.nic.home.iter().map(routed).chain(request.carried.iter().map(carried_route)).collect()
}

/// The same for a machine at home; what its last visit held for its home addresses comes from there.
pub(super) fn carry_routes(request: &CarryRequest) -> Vec<VisitRoute> {
    let held = request
        .from
        .iter()
        .flat_map(|from| request.home.iter().map(|address| uncarried(*address, from, None)));
    request.carried.iter().map(carried_route).chain(held).collect()
}

fn carried_route(carried: &CarriedRoute) -> VisitRoute {
    VisitRoute { address: carried.addr, peer: carried.site.clone(), also: None, carried: true }
}

fn uncarried(address: IpAddr, peer: &SiteName, also: Option<SiteName>) -> VisitRoute {
    VisitRoute { address, peer: peer.clone(), also, carried: false }
}

/// The flows of a machine at home are remembered.
pub(super) fn sampler_plan(config: &TunnelConfig, key: &PortKey, port: &str) -> Vec<Change> {
    vec![Change::Table(nft::sampler_table(config, &port_id(key), port))]
}

/// The name of a visit's table, to which flows are added.
pub(super) fn visit_table_name(config: &TunnelConfig, key: &PortKey) -> String {
    format!("{}_visit_{}", config.prefix, port_id(key))
}

/// The transaction that adds flows of before the move to it.
pub(super) fn visit_flows(config: &TunnelConfig, request: &VisitRequest, flows: &[FlowTuple]) -> String {
    let care_of: Vec<IpAddr> = request.care_of.iter().map(|pair| pair.care_of).collect();
    let (table, carried) = (visit_table_name(config, &request.key), carried_rules(config, &request.carried));
    nft::visit_flows(&table, flows, &care_of, &carried)
}

/// The same at the machine's home.
pub(super) fn carry_flows(config: &TunnelConfig, request: &CarryRequest, flows: &[FlowTuple]) -> String {
    nft::carry_flows(config, &port_id(&request.key), &carried_rules(config, &request.carried), flows)
}

fn port_changes(config: &TunnelConfig, request: &VisitRequest) -> Vec<Change> {
    let VisitRequest { port, nic, .. } = request;
    let mut plan = vec![
        switch(format!("net/ipv6/conf/{port}/accept_dad"), "0"),
        switch(format!("net/ipv6/conf/{port}/accept_ra"), "0"),
    ];
    plan.push(Change::Routed { device: port.clone() });
    plan.push(Change::DummyAddress { address: config.device_address, device: port.clone() });
    if let Some(mac) = router_mac(&nic.neighbours) {
        plan.push(Change::OwnAddress { device: port.clone(), mac });
    }
    for (name, value) in
        [("forwarding", "1"), ("proxy_arp", "1"), ("rp_filter", "2"), ("send_redirects", "0")]
    {
        plan.push(switch(format!("net/ipv4/conf/{port}/{name}"), value));
    }
    plan.push(switch(format!("net/ipv4/neigh/{port}/proxy_delay"), "0"));
    plan
}

/// A visit's tables.
pub(super) fn visit_tables(config: &TunnelConfig, request: &VisitRequest) -> [Table; 2] {
    let home: Vec<IpAddr> = request.nic.home.iter().map(|prefix| prefix.addr).collect();
    let carried = carried_rules(config, &request.carried);
    let visit = nft::Visit {
        name: visit_table_name(config, &request.key),
        port: &request.port,
        lan: &request.lan,
        home: &home,
        others: &request.others,
        home_prefixes: &request.nic.home_prefixes,
        care_of: request.care_of.iter().map(|pair| (pair.home, pair.care_of)).collect(),
        carried: &carried,
    };
    let stale = nft::stale_mac_table(config, &port_id(&request.key), &request.port, &home);
    [stale, nft::visit_table(config, &visit)]
}

fn lan_switches(lan: &str) -> Vec<Change> {
    vec![
        switch(format!("net/ipv4/conf/{lan}/forwarding"), "1"),
        switch(format!("net/ipv4/neigh/{lan}/proxy_delay"), "0"),
    ]
}

/// A device that forwards ignores router announcements unless told otherwise, and the host would lose
/// its own default route.
fn keep_ra(kernel: Kernel, lan: &str) -> Option<Change> {
    kernel.lan_accepts_ra.then(|| switch(format!("net/ipv6/conf/{lan}/accept_ra"), "2"))
}

fn ipv6_switches<'a>(kernel: Kernel, devices: impl IntoIterator<Item = &'a String>) -> Vec<Change> {
    let mut plan = vec![switch("net/ipv6/conf/all/proxy_ndp".to_owned(), "1")];
    if !kernel.force_forwarding {
        plan.push(switch("net/ipv6/conf/all/forwarding".to_owned(), "1"));
    }
    for device in devices {
        plan.push(switch(format!("net/ipv6/conf/{device}/forwarding"), "1"));
        if kernel.force_forwarding {
            plan.push(switch(format!("net/ipv6/conf/{device}/force_forwarding"), "1"));
        }
        plan.push(switch(format!("net/ipv6/conf/{device}/proxy_ndp"), "1"));
        plan.push(switch(format!("net/ipv6/neigh/{device}/proxy_delay"), "0"));
    }
    plan
}

/// The address the guest sends to: its router's, IPv4's before IPv6's.
fn router_mac(neighbours: &[Neighbour]) -> Option<Mac> {
    let mut routers: Vec<&Neighbour> = neighbours.iter().filter(|neighbour| neighbour.is_router()).collect();
    routers.sort_by_key(|router| router.addr.is_ipv6());
    routers.first().map(|router| router.mac)
}

fn switch(key: String, value: &'static str) -> Change {
    Change::Sysctl { key, value }
}

#[cfg(test)]
mod tests {
    use longhaul_core::tunnel::handover::NeighbourKind;

    use super::*;

    fn kernel(force_forwarding: bool) -> Kernel {
        Kernel { force_forwarding, lan_accepts_ra: true }
    }

    fn request(home: &[&str]) -> HoldRequest {
        HoldRequest {
            key: PortKey { machine: "web1".parse().unwrap(), nic: "net0".parse().unwrap() },
            peer: "b".parse().unwrap(),
            mac: Mac([0x52, 0x54, 0, 0, 0, 1]),
            from: Leaving::Home,
            addresses: home.iter().map(|address| address.parse().unwrap()).collect(),
            port: "lh-web1-net0".to_owned(),
            lan: "br0".to_owned(),
        }
    }

    #[test]
    fn frames_are_taken_off_the_bridge_only_when_their_route_stands() {
        let plan = hold_plan(&TunnelConfig::default(), kernel(true), &request(&["198.51.100.10"]));
        let bridge = plan.iter().position(|change| matches!(change, Change::BridgeAddress { .. }));
        assert_eq!(bridge, Some(plan.len() - 1));
    }

    #[test]
    fn ipv6_is_switched_for_the_whole_host_only_where_the_kernel_knows_no_other_way() {
        let for_all = switch("net/ipv6/conf/all/forwarding".to_owned(), "1");
        let has = |home: &str, force_forwarding| {
            hold_plan(&TunnelConfig::default(), kernel(force_forwarding), &request(&[home]))
                .contains(&for_all)
        };
        assert!(has("2001:db8::10", false));
        assert!(!has("2001:db8::10", true));
        assert!(!has("198.51.100.10", false));
    }

    #[test]
    fn the_taps_address_is_the_ipv4_routers() {
        let neighbour = |addr: &str, last, kind| Neighbour {
            addr: addr.parse().unwrap(),
            mac: Mac([0, 0, 0, 0, 0, last]),
            kind,
        };
        let neighbours = [
            neighbour("2001:db8::1", 1, NeighbourKind::Router),
            neighbour("198.51.100.1", 2, NeighbourKind::Router),
            neighbour("198.51.100.9", 3, NeighbourKind::Host),
        ];
        assert_eq!(router_mac(&neighbours), Some(Mac([0, 0, 0, 0, 0, 2])));
        assert_eq!(router_mac(&neighbours[2..]), None);
    }
}
