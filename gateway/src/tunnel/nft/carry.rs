//! Rules for addresses of earlier visits: connections that were opened there go on there.
//!
//! ```text
//!   client --> site it visited --tunnel--> lh0: to the address it dialled ==> to the home address --> guest
//!          <--                 <--tunnel-- lh0: from that address        <== marked connection    <--
//! ```
//!
//! Each such address has a connection mark and a set of flows of its own. A machine that visits hands all its packets to
//! this host anyway. One that is at home is on its LAN's bridge: the frames of those flows alone are turned to the host
//! where they leave the guest. A site that the machine has left translates nothing of these flows any more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use longhaul_core::tunnel::handover::{FlowTuple, Mac};
use serde_json::Value;

use super::visit::{add_elements, element_lines, keep_known};
use super::{Table, mac_text, nft, read_turned};
use crate::tunnel::config::TunnelConfig;
use crate::tunnel::error::TunnelError;

/// One carried address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::tunnel) struct CarriedRule {
    /// The address the guest believes it has.
    pub home: IpAddr,
    /// The address its clients dialled.
    pub addr: IpAddr,
    /// The connection mark of its flows.
    pub mark: u32,
    /// Its place among the machine's carried addresses.
    pub number: u32,
}

impl CarriedRule {
    /// The name of its set of flows, without the IP version; also the comment of its rules, by which they are removed when
    /// nobody uses the address any more.
    pub fn set(&self) -> String {
        format!("by{}_", self.number)
    }

    pub(super) fn ip(&self) -> &'static str {
        if self.addr.is_ipv6() { "ip6" } else { "ip" }
    }
}

/// A NIC of a machine that is at home.
pub(in crate::tunnel) struct Home<'a> {
    /// What its tables are named after.
    pub id: &'a str,
    /// The tap.
    pub port: &'a str,
    /// The bridge, and its link-layer address.
    pub lan: &'a str,
    pub lan_mac: Mac,
    pub carried: &'a [CarriedRule],
}

/// Packets by a care-of address that the machine has left go into the tunnel and come out of it as they are.
pub(in crate::tunnel) fn left_table(config: &TunnelConfig, id: &str, addresses: &[IpAddr]) -> Table {
    let (prefix, tun) = (&config.prefix, &config.device);
    let mut body = format!(
        "\tchain {prefix}_left {{\n\t\ttype filter hook prerouting priority raw - 5; policy accept;\n"
    );
    for address in addresses {
        let ip = if address.is_ipv6() { "ip6" } else { "ip" };
        let _ = write!(
            body,
            "\t\tiifname != \"{tun}\" {ip} daddr {address} notrack\n\t\tiifname \"{tun}\" {ip} saddr {address} notrack\n"
        );
    }
    body.push_str("\t}\n");
    Table { family: "inet", name: left_name(config, id), body }
}

/// Its name.
pub(in crate::tunnel) fn left_name(config: &TunnelConfig, id: &str) -> String {
    format!("{}_left_{id}", config.prefix)
}

/// Flows by carried addresses of a machine at home: the tables that turn and translate them.
pub(in crate::tunnel) fn carry_tables(config: &TunnelConfig, home: &Home<'_>) -> [Table; 2] {
    [turn_table(config, home), translate_table(config, home)]
}

/// The names of both.
pub(in crate::tunnel) fn carry_names(config: &TunnelConfig, id: &str) -> [String; 2] {
    [turn_name(config, id), carry_name(config, id)]
}

fn turn_name(config: &TunnelConfig, id: &str) -> String {
    format!("{}_turn_{id}", config.prefix)
}

/// The transaction that adds flows of before the return.
pub(in crate::tunnel) fn carry_flows(
    config: &TunnelConfig,
    id: &str,
    carried: &[CarriedRule],
    flows: &[FlowTuple],
) -> String {
    let ours: Vec<FlowTuple> =
        flows.iter().filter(|flow| carried.iter().any(|rule| rule.addr == flow.local)).copied().collect();
    let set = |flow: &FlowTuple| {
        carried.iter().find(|rule| rule.addr == flow.local).map(CarriedRule::set).unwrap_or_default()
    };
    add_elements("netdev", &turn_name(config, id), &ours, set)
        + &add_peers(&turn_name(config, id), &ours, set)
        + &add_elements("inet", &carry_name(config, id), &ours, set)
}

/// Whom the machine has sent datagrams that may have come in fragments.
fn add_peers(table: &str, flows: &[FlowTuple], set: impl Fn(&FlowTuple) -> String) -> String {
    const UDP: u8 = 17;
    let mut sets: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for flow in flows.iter().filter(|flow| flow.protocol == UDP) {
        if flow.remote.is_ipv6() == flow.local.is_ipv6() {
            let version = if flow.remote.is_ipv6() { 6 } else { 4 };
            sets.entry(format!("{}peer{version}", set(flow))).or_default().insert(flow.remote.to_string());
        }
    }
    element_lines("netdev", table, sets)
}

/// Of a machine at home: the flows that are turned, each by the address that its other end knows.
pub(in crate::tunnel) async fn turned(
    config: &TunnelConfig,
    id: &str,
    carried: &[CarriedRule],
) -> Result<Vec<FlowTuple>, TunnelError> {
    let listed = nft(&["-j", "list", "table", "netdev", &turn_name(config, id)], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    Ok(carried.iter().flat_map(|rule| read_turned(&listed, &rule.set(), rule.addr)).collect())
}

/// New connections by a carried address, as they come out of the tunnel; those of before are kept in mind.
pub(super) fn carried_marks(config: &TunnelConfig, carried: &[CarriedRule], v6: bool) -> String {
    let rule = |rule: &CarriedRule| {
        let (ip, set) = (rule.ip(), rule.set());
        let comes = format!("iifname \"{}\" {ip} daddr {}", config.device, rule.addr);
        let kept = keep_known(ip, &format!("{set}{}", if v6 { 6 } else { 4 }));
        format!(
            "\t\t{comes} ct state new ct mark set {:#x} comment \"{set}\"\n\t\t{comes} {kept} comment \"{set}\"\n",
            rule.mark,
        )
    };
    carried.iter().filter(|rule| rule.addr.is_ipv6() == v6).map(rule).collect()
}

/// Connections of before that the guest's own packet is the first of.
pub(super) fn carried_flows(carried: &[CarriedRule]) -> String {
    let rule = |rule: &CarriedRule| {
        let (ip, version) = (rule.ip(), if rule.addr.is_ipv6() { 6 } else { 4 });
        format!(
            "\t\tct state new meta l4proto . {ip} daddr . th dport . th sport @{set}{version} ct mark set {:#x} comment \"{set}\"\n",
            rule.mark,
            set = rule.set(),
        )
    };
    carried.iter().map(rule).collect()
}

/// The address that was dialled becomes the home address.
pub(super) fn carried_in(config: &TunnelConfig, carried: &[CarriedRule]) -> String {
    let rule = |rule: &CarriedRule| {
        let (ip, tun) = (rule.ip(), &config.device);
        format!(
            "\t\tiifname \"{tun}\" {ip} daddr {} dnat {ip} to {} comment \"{}\"\n",
            rule.addr,
            rule.home,
            rule.set()
        )
    };
    carried.iter().map(rule).collect()
}

/// And the other way round.
pub(super) fn carried_out(config: &TunnelConfig, carried: &[CarriedRule]) -> String {
    let rule = |rule: &CarriedRule| {
        let (ip, tun) = (rule.ip(), &config.device);
        format!(
            "\t\toifname \"{tun}\" ct mark {:#x} {ip} saddr {} snat {ip} to {} comment \"{}\"\n",
            rule.mark,
            rule.home,
            rule.addr,
            rule.set()
        )
    };
    carried.iter().map(rule).collect()
}

fn carry_name(config: &TunnelConfig, id: &str) -> String {
    format!("{}_carry_{id}", config.prefix)
}

/// The bits of a mark that are its zone.
const ZONES: u32 = 0xffff;
/// For how long the last words of a connection are turned after the guest has closed it and nobody has answered: a cut of the
/// link in that moment may last as long.
const CLOSING_S: u64 = 60;
/// And after the other end has answered, or reset it and the guest is silent. A client may use the same port for a connection to the home address next:
/// its answers must not be taken for the old one's.
const LAST_WORDS_S: u64 = 5;

/// And of a connection of which one segment has come, until there is another, or on which an end speaks after a reset: whoever sends SYNs under foreign addresses must not
/// fill the set for hours.
const ASKED_S: u64 = 60;

/// A flow is known by what came for it out of the tunnel, or from before, and is forgotten soon after its end: `gone` holds
/// those that have ended, whose stragglers keep them for a moment only. A reset by the other end may be forged, and only the
/// guest knows: `reset` holds what is turned if it speaks on, until either end begins anew. ICMP echo has no ports; its askers are kept. Nor has a
/// later fragment, and nothing is joined before this: all fragments to whoever may get a large answer are turned, and the
/// host joins them and forwards those of other flows.
fn turn_table(config: &TunnelConfig, home: &Home<'_>) -> Table {
    let prefix = &config.prefix;
    let of_each = |lines: &dyn Fn(&CarriedRule) -> String| home.carried.iter().map(lines).collect::<String>();
    let body = format!(
        "{}\tchain {prefix}_come {{\n\t\ttype filter hook ingress device \"{}\" priority 0; policy accept;\n{}\t}}\n\
         \tchain {prefix}_turn {{\n\t\ttype filter hook ingress device \"{}\" priority -5; policy accept;\n{}\t}}\n",
        of_each(&|rule| turn_sets(config, rule)),
        config.device,
        of_each(&|rule| come_rules(config, rule)),
        home.port,
        of_each(&|rule| turn_rules(home, rule)),
    );
    Table { family: "netdev", name: turn_name(config, home.id), body }
}

fn turn_sets(config: &TunnelConfig, rule: &CarriedRule) -> String {
    let (tcp, udp) = (config.tcp_flow_timeout.as_secs(), config.udp_flow_timeout.as_secs());
    let (version, address) = if rule.addr.is_ipv6() { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
    let (set, size) = (rule.set(), config.max_flows);
    format!(
        "\tset {set}{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\t\tsize {size}\n\
         \t\tflags dynamic,timeout\n\t\ttimeout {tcp}s\n\t}}\n\
         \tset {set}gone{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\t\tsize {size}\n\
         \t\tflags dynamic,timeout\n\t\ttimeout {CLOSING_S}s\n\t}}\n\
         \tset {set}reset{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\t\tsize {size}\n\
         \t\tflags dynamic,timeout\n\t\ttimeout {tcp}s\n\t}}\n\
         \tset {set}ping{version} {{\n\t\ttype {address}\n\t\tsize {size}\n\t\tflags dynamic,timeout\n\t\ttimeout 1m\n\t}}\n\
         \tset {set}peer{version} {{\n\t\ttype {address}\n\t\tsize {size}\n\t\tflags dynamic,timeout\n\t\ttimeout {udp}s\n\t}}\n",
    )
}

/// What comes out of the tunnel for it.
fn come_rules(config: &TunnelConfig, rule: &CarriedRule) -> String {
    let udp = config.udp_flow_timeout.as_secs();
    let (ip, set, addr) = (rule.ip(), rule.set(), rule.addr);
    let comment = format!("comment \"{set}\"");
    let key = format!("meta l4proto . {ip} saddr . th sport . th dport");
    let (version, echo) = if rule.addr.is_ipv6() { (6, "icmpv6 type") } else { (4, "icmp type") };
    format!(
        "\t\t{ip} daddr {addr} meta l4proto udp update @{set}{version} {{ {key} timeout {udp}s }} {comment}\n\
         \t\t{ip} daddr {addr} meta l4proto udp update @{set}peer{version} {{ {ip} saddr }} {comment}\n\
         \t\t{ip} daddr {addr} tcp flags & syn == syn delete @{set}gone{version} {{ {key} }} delete @{set}reset{version} {{ {key} }} {comment}\n\
         \t\t{ip} daddr {addr} tcp flags & rst == rst {key} @{set}{version} update @{set}reset{version} {{ {key} }} {comment}\n\
         \t\t{ip} daddr {addr} tcp flags & rst == rst {key} @{set}{version} update @{set}{version} {{ {key} timeout {LAST_WORDS_S}s }} {comment}\n\
         \t\t{ip} daddr {addr} tcp flags & rst == rst return {comment}\n\
         \t\t{ip} daddr {addr} meta l4proto tcp {key} @{set}reset{version} update @{set}{version} {{ {key} timeout {ASKED_S}s }} return {comment}\n\
         \t\t{ip} daddr {addr} meta l4proto tcp {key} @{set}gone{version} update @{set}{version} {{ {key} timeout {LAST_WORDS_S}s }} return {comment}\n\
         \t\t{ip} daddr {addr} tcp flags & syn == 0 {key} @{set}{version} update @{set}{version} {{ {key} }} {comment}\n\
         \t\t{ip} daddr {addr} meta l4proto tcp add @{set}{version} {{ {key} timeout {ASKED_S}s }} {comment}\n\
         \t\t{ip} daddr {addr} {echo} echo-request update @{set}ping{version} {{ {ip} saddr }} {comment}\n",
    )
}

/// What leaves the guest.
fn turn_rules(home: &Home<'_>, rule: &CarriedRule) -> String {
    let (ip, set, own) = (rule.ip(), rule.set(), rule.home);
    let comment = format!("comment \"{set}\"");
    let key = format!("meta l4proto . {ip} daddr . th dport . th sport");
    let (version, echo) = if rule.addr.is_ipv6() { (6, "icmpv6 type") } else { (4, "icmp type") };
    let fragment = if rule.addr.is_ipv6() { "exthdr frag exists" } else { "ip frag-off & 0x3fff != 0" };
    let to_host = format!(
        "meta mark set {:#x} ether daddr set {} meta pkttype set host accept",
        rule.mark,
        mac_text(home.lan_mac)
    );
    format!(
        "\t\t{ip} saddr {own} {fragment} {ip} daddr @{set}peer{version} {to_host} {comment}\n\
         \t\t{ip} saddr {own} {fragment} {ip} daddr @{set}ping{version} {to_host} {comment}\n\
         \t\t{ip} saddr {own} tcp flags & (fin | rst) != 0 {key} @{set}{version} update @{set}gone{version} {{ {key} }} update @{set}{version} {{ {key} timeout {CLOSING_S}s }} {comment}\n\
         \t\t{ip} saddr {own} tcp flags & syn == syn {key} @{set}reset{version} delete @{set}{version} {{ {key} }} delete @{set}reset{version} {{ {key} }} {comment}\n\
         \t\t{ip} saddr {own} tcp flags & (syn | rst) == 0 {key} @{set}reset{version} update @{set}reset{version} {{ {key} }} update @{set}{version} {{ {key} timeout {ASKED_S}s }} {comment}\n\
         \t\t{ip} saddr {own} tcp flags & (syn | rst) == 0 {key} @{set}reset{version} {to_host} {comment}\n\
         \t\t{ip} saddr {own} tcp flags & syn == syn {key} @{set}{version} update @{set}{version} {{ {key} timeout {ASKED_S}s }} {comment}\n\
         \t\t{ip} saddr {own} meta l4proto {{ tcp, udp }} {key} @{set}{version} {to_host} {comment}\n\
         \t\t{ip} saddr {own} {echo} echo-reply {ip} daddr @{set}ping{version} {to_host} {comment}\n",
    )
}

/// Each carried address has a conntrack zone of its own, both ways. A client may use one port towards it and towards the home
/// address; where this host knows of both, it would change the port of one, which is not the one that was turned.
fn zone_chain(config: &TunnelConfig, home: &Home<'_>) -> String {
    let (prefix, tun, lan) = (&config.prefix, &config.device, home.lan);
    let rules = home.carried.iter().map(|rule| {
        let (ip, addr, mark, set) = (rule.ip(), rule.addr, rule.mark, rule.set());
        let zone = mark & ZONES;
        format!(
            "\t\tiifname \"{tun}\" {ip} daddr {addr} ct zone set {zone} comment \"{set}\"\n\
             \t\tiifname \"{lan}\" meta mark {mark:#x} ct zone set {zone} comment \"{set}\"\n",
        )
    });
    let rules: String = rules.collect();
    format!(
        "\tchain {prefix}_zone {{\n\t\ttype filter hook prerouting priority raw; policy accept;\n{rules}\t}}\n"
    )
}

fn translate_table(config: &TunnelConfig, home: &Home<'_>) -> Table {
    let (prefix, lan, tunnel) = (&config.prefix, home.lan, config.mark_tunnel);
    let mut body = String::new();
    for rule in home.carried {
        let (version, address) = if rule.addr.is_ipv6() { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
        let _ = writeln!(
            body,
            "\tset {}{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\t\tsize {}\n\
             \t\tflags dynamic,timeout\n\t\ttimeout {}s\n\t}}",
            rule.set(),
            config.max_flows,
            config.tcp_flow_timeout.as_secs(),
        );
    }
    body.push_str(&zone_chain(config, home));
    let _ = write!(
        body,
        "\tchain {prefix}_mark {{\n\t\ttype filter hook prerouting priority mangle; policy accept;\n{}{}\t\tiifname != \"{lan}\" return\n{}",
        carried_marks(config, home.carried, false),
        carried_marks(config, home.carried, true),
        carried_flows(home.carried),
    );
    for rule in home.carried {
        let _ = writeln!(
            body,
            "\t\t{} saddr {} ct mark {:#x} meta mark set {tunnel:#x} comment \"{}\"",
            rule.ip(),
            rule.home,
            rule.mark,
            rule.set(),
        );
    }
    let _ = write!(
        body,
        "\t}}\n\tchain {prefix}_in {{\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n{}\t}}\n\
         \tchain {prefix}_out {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n{}\t}}\n",
        carried_in(config, home.carried),
        carried_out(config, home.carried),
    );
    Table { family: "inet", name: carry_name(config, home.id), body }
}
