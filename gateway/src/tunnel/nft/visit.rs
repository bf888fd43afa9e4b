//! The rules of a NIC that visits: which way its packets leave, what it may not forge, by which address each of its
//! flows is known.
//!
//! Which addresses it has, and which flows were open before it came, is its caller's to say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use longhaul_core::tunnel::handover::{FlowTuple, Prefix};
use serde_json::Value;

use super::carry::{CarriedRule, carried_flows, carried_in, carried_marks, carried_out};
use super::{Sampled, Table, family_of, first_address, nft, sampling_rules, sampling_sets};
use crate::tunnel::config::TunnelConfig;
use crate::tunnel::error::TunnelError;

/// The rules of one visiting NIC.
pub(in crate::tunnel) struct Visit<'a> {
    pub name: String,
    /// The guest's tap.
    pub port: &'a str,
    /// This site's bridge.
    pub lan: &'a str,
    pub home: &'a [IpAddr],
    /// The home addresses of the machine's other NICs.
    pub others: &'a [IpAddr],
    pub home_prefixes: &'a [Prefix],
    /// Home address and the care-of address that stands for it.
    pub care_of: Vec<(IpAddr, IpAddr)>,
    /// Addresses of earlier visits.
    pub carried: &'a [CarriedRule],
}

/// Which way a visitor's packets leave, its care-of address, and what it may not forge.
pub(in crate::tunnel) fn visit_table(config: &TunnelConfig, visit: &Visit<'_>) -> Table {
    let mut body = String::new();
    visit_sets(&mut body, config, visit);
    for (tag, _) in sampled_marks(config, visit.carried) {
        body.push_str(&sampling_sets(config, &tag));
    }
    guard_chain(&mut body, config, visit);
    mark_chain(&mut body, config, visit);
    visitor_chains(&mut body, config, visit);
    sample_chain(&mut body, config, visit);
    nat_chains(&mut body, config, visit);
    Table { family: "inet", name: visit.name.clone(), body }
}

/// The transaction that adds flows of before the move to a visit's table; empty without flows. A flow whose other end
/// knows the machine by its home address goes back there, one by an address it has here leaves here, and one by an
/// address of an earlier visit goes there.
pub(in crate::tunnel) fn visit_flows(
    table: &str,
    flows: &[FlowTuple],
    care_of: &[IpAddr],
    carried: &[CarriedRule],
) -> String {
    let set = |flow: &FlowTuple| {
        if care_of.contains(&flow.local) {
            return "local".to_owned();
        }
        let carried = carried.iter().find(|rule| rule.addr == flow.local);
        carried.map_or_else(|| "flows".to_owned(), CarriedRule::set)
    };
    add_elements("inet", table, flows, set)
}

/// The transaction that adds flows to the sets that `set` names.
pub(super) fn add_elements(
    family: &str,
    table: &str,
    flows: &[FlowTuple],
    set: impl Fn(&FlowTuple) -> String,
) -> String {
    let mut sets: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for flow in flows.iter().filter(|flow| flow.remote.is_ipv6() == flow.local.is_ipv6()) {
        let version = if flow.remote.is_ipv6() { 6 } else { 4 };
        let element =
            format!("{} . {} . {} . {}", flow.protocol, flow.remote, flow.remote_port, flow.local_port);
        sets.entry(format!("{}{version}", set(flow))).or_default().insert(element);
    }
    element_lines(family, table, sets)
}

pub(super) fn element_lines(family: &str, table: &str, sets: BTreeMap<String, BTreeSet<String>>) -> String {
    let line = |(set, elements): (String, BTreeSet<String>)| {
        let elements: Vec<String> = elements.into_iter().collect();
        format!("add element {family} {table} {set} {{ {} }}\n", elements.join(", "))
    };
    sets.into_iter().map(line).collect()
}

/// The flows that a visitor has open, at most `max`; each by the address that its other end knows.
pub(in crate::tunnel) async fn visited(
    config: &TunnelConfig,
    table: &str,
    max: usize,
    care_of: &[(IpAddr, IpAddr)],
    carried: &[CarriedRule],
) -> Result<Vec<FlowTuple>, TunnelError> {
    let listed = nft(&["-j", "list", "table", "inet", table], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    let known_as = |flow: FlowTuple, mark: u32| {
        let here = care_of.iter().find(|(home, _)| mark == config.mark_local && *home == flow.local);
        let earlier = carried.iter().find(|rule| mark == rule.mark && rule.home == flow.local);
        let local = here.map(|(_, care_of)| *care_of).or(earlier.map(|rule| rule.addr));
        FlowTuple { local: local.unwrap_or(flow.local), ..flow }
    };
    let mut all = Sampled::default();
    for (tag, mark) in sampled_marks(config, carried) {
        let Sampled { open, half } = Sampled::read(&listed, &tag);
        all.open.extend(open.into_iter().map(|flow| known_as(flow, mark)));
        all.half.extend(half.into_iter().map(|flow| known_as(flow, mark)));
    }
    Ok(all.first(max))
}

/// Sets beside the one of flows that go home.
fn further_sets(carried: &[CarriedRule]) -> Vec<String> {
    std::iter::once("local".to_owned()).chain(carried.iter().map(CarriedRule::set)).collect()
}

fn visit_sets(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    for (version, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        let _ = writeln!(
            body,
            "\tset flows{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\
             \t\tsize {}\n\t\tflags dynamic,timeout\n\t\ttimeout {}s\n\t}}",
            config.max_flows,
            config.tcp_flow_timeout.as_secs(),
        );
        for set in further_sets(visit.carried) {
            let _ = writeln!(
                body,
                "\tset {set}{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\
                 \t\tsize {}\n\t\tflags dynamic,timeout\n\t\ttimeout {}s\n\t}}",
                config.max_flows,
                config.tcp_flow_timeout.as_secs(),
            );
        }
        let blocks: BTreeSet<String> = visit
            .home_prefixes
            .iter()
            .filter(|prefix| prefix.addr.is_ipv6() == (version == 6))
            .map(|prefix| format!("{}/{}", first_address(prefix), prefix.len))
            .collect();
        let blocks: Vec<String> = blocks.into_iter().collect();
        let elements = match blocks.is_empty() {
            true => String::new(),
            false => format!("\t\telements = {{ {} }}\n", blocks.join(", ")),
        };
        let _ = writeln!(
            body,
            "\tset home{version} {{\n\t\ttype {address}\n\t\tflags interval\n\t\tauto-merge\n{elements}\t}}"
        );
    }
}

/// A visitor sends from its own addresses only (and speaks neighbour discovery). From those of its other
/// NICs too: a guest without source routing answers for all of them through one.
fn guard_chain(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let port = visit.port;
    let _ = writeln!(
        body,
        "\tchain {}_guard {{\n\t\ttype filter hook prerouting priority raw; policy accept;",
        config.prefix
    );
    for (ip, v6) in [("ip", false), ("ip6", true)] {
        let mut own = family_of(visit.home, v6);
        own.extend(family_of(visit.others, v6));
        if v6 {
            own.extend(["::".to_owned(), "fe80::/10".to_owned()]);
        }
        let _ = match own.is_empty() {
            true => writeln!(body, "\t\tiifname \"{port}\" meta protocol {ip} counter drop"),
            false => {
                writeln!(body, "\t\tiifname \"{port}\" {ip} saddr != {{ {} }} counter drop", own.join(", "))
            }
        };
    }
    body.push_str("\t}\n");
}

/// Flows that came through the tunnel, or were open before the move, go back through it; all others
/// leave locally. The last rule that matches decides. A packet of no tracked flow goes back, because
/// leaving locally without translation it would only be dropped as forged. What is said to neighbours and to groups stays
/// on the port.
fn mark_chain(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let (port, tun) = (visit.port, &config.device);
    let (local, tunnel) = (config.mark_local, config.mark_tunnel);
    let _ = writeln!(
        body,
        "\tchain {}_mark {{\n\t\ttype filter hook prerouting priority mangle; policy accept;",
        config.prefix
    );
    for (ip, v6) in [("ip", false), ("ip6", true)] {
        let kept = |set: &str| keep_known(ip, &format!("{set}{}", if v6 { 6 } else { 4 }));
        for home in family_of(visit.home, v6) {
            let comes = format!("iifname \"{tun}\" {ip} daddr {home}");
            let _ = write!(
                body,
                "\t\t{comes} ct state new ct mark set {tunnel:#x}\n\t\t{comes} {}\n",
                kept("flows")
            );
        }
        for (_, care_of) in visit.care_of.iter().filter(|(_, care_of)| care_of.is_ipv6() == v6) {
            let comes = format!("iifname != \"{port}\" {ip} daddr {care_of}");
            let _ = write!(
                body,
                "\t\t{comes} meta mark != {tunnel:#x} ct state new ct mark set {local:#x}\n\t\t{comes} {}\n",
                kept("local")
            );
        }
        body.push_str(&carried_marks(config, visit.carried, v6));
    }
    let _ = write!(
        body,
        "\t\tiifname != \"{port}\" return\n\
         \t\tct state new ct mark set {local:#x}\n\
         \t\tct state new meta l4proto tcp tcp flags & (fin | syn | rst | ack) != syn ct mark set {tunnel:#x}\n\
         \t\tct state new ip daddr @home4 ct mark set {tunnel:#x}\n\
         \t\tct state new ip6 daddr @home6 ct mark set {tunnel:#x}\n\
         \t\tct state new meta l4proto . ip daddr . th dport . th sport @flows4 ct mark set {tunnel:#x}\n\
         \t\tct state new meta l4proto . ip6 daddr . th dport . th sport @flows6 ct mark set {tunnel:#x}\n\
         \t\tct state new meta l4proto . ip daddr . th dport . th sport @local4 ct mark set {local:#x}\n\
         \t\tct state new meta l4proto . ip6 daddr . th dport . th sport @local6 ct mark set {local:#x}\n\
         {carried}\
         \t\tmeta mark set {tunnel:#x}\n\
         \t\tct mark {local:#x} meta mark set 0\n\
         \t\tip daddr {{ 224.0.0.0/4, 255.255.255.255 }} meta mark set 0\n\
         \t\tip6 daddr {{ fe80::/10, ff00::/8 }} meta mark set 0\n\
         \t}}\n",
        carried = carried_flows(visit.carried),
    );
}

/// What goes to the visitor, whoever may have its address here: by its care-of addresses, out of the tunnel, of other
/// visitors, and what this host itself says. A visitor's packets to its home do not, although somebody there may have an
/// address that is a care-of address here.
fn visitor_chains(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let (prefix, tun, local) = (&config.prefix, &config.device, config.mark_local);
    let (home_bound, to_visitor) = (config.mark_tunnel, format!("meta mark set {:#x}", config.mark_visitor));
    let marks: Vec<String> =
        sampled_marks(config, visit.carried).iter().map(|(_, mark)| format!("{mark:#x}")).collect();
    let (mut comes, mut says) = (String::new(), String::new());
    for (_, care_of) in &visit.care_of {
        let to = format!("{} daddr {care_of}", ip_of(care_of));
        let _ = writeln!(comes, "\t\t{to} meta mark != {home_bound:#x} {to_visitor}");
        let _ = writeln!(says, "\t\t{to} ct state new ct mark set {local:#x}\n\t\t{to} {to_visitor}");
    }
    for home in visit.home {
        let to = format!("{} daddr {home}", ip_of(home));
        let _ = write!(
            comes,
            "\t\tiifname \"{tun}\" {to} {to_visitor}\n\
             \t\tiifname \"{prefix}-*\" {to} ct mark {local:#x} ct direction original {to_visitor}\n",
        );
        let _ = writeln!(says, "\t\t{to} ct mark {{ {} }} {to_visitor}", marks.join(", "));
    }
    for rule in visit.carried {
        let (ip, addr, set) = (rule.ip(), rule.addr, rule.set());
        let _ = writeln!(comes, "\t\tiifname \"{tun}\" {ip} daddr {addr} {to_visitor} comment \"{set}\"");
    }
    let _ = write!(
        body,
        "\tchain {prefix}_visitor {{\n\t\ttype filter hook prerouting priority mangle + 1; policy accept;\n{comes}\t}}\n\
         \tchain {prefix}_says {{\n\t\ttype route hook output priority mangle; policy accept;\n{says}\t}}\n",
    );
}

fn ip_of(address: &IpAddr) -> &'static str {
    if address.is_ipv6() { "ip6" } else { "ip" }
}

/// A flow of before keeps its place in `set` for as long as its other end answers: the kernel may forget it between two
/// packets however old it is, and the guest's next one must be known. What only the guest says proves no way back.
pub(super) fn keep_known(ip: &str, set: &str) -> String {
    let key = format!("meta l4proto . {ip} saddr . th sport . th dport");
    format!("{key} @{set} update @{set} {{ {key} }}")
}

/// Remembers the visitor's flows with their marks, which tell by which of its addresses the other end knows it.
fn sample_chain(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let marks = sampled_marks(config, visit.carried);
    let rules: String =
        marks.iter().map(|(tag, mark)| sampling_rules(config, tag, &format!("ct mark {mark:#x} "))).collect();
    let _ = write!(
        body,
        "\tchain {}_seen {{\n\t\ttype filter hook prerouting priority mangle + 5; policy accept;\n\
         \t\tiifname != \"{}\" return\n\t\tip frag-off & 0x1fff != 0 return\n{rules}\t}}\n",
        config.prefix, visit.port,
    );
}

/// Connection marks by which flows are told apart, and what their sets are named after.
fn sampled_marks(config: &TunnelConfig, carried: &[CarriedRule]) -> Vec<(String, u32)> {
    let own = [("home_".to_owned(), config.mark_tunnel), ("local_".to_owned(), config.mark_local)];
    own.into_iter().chain(carried.iter().map(|rule| (rule.set(), rule.mark))).collect()
}

/// A visitor's local flows are known by its care-of address. If it dials itself by that it hears it, too, and somebody of
/// the LAN who has its home address is heard by one that nobody has: its kernel takes nothing that seems to come from
/// itself.
fn nat_chains(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let (prefix, tun, port, lan) = (&config.prefix, &config.device, visit.port, visit.lan);
    let (local, home_bound) = (config.mark_local, config.mark_tunnel);
    let chains = [
        (format!("{prefix}_in"), "prerouting priority dstnat", carried_in(config, visit.carried)),
        (format!("{prefix}_own"), "output priority -100", String::new()),
    ];
    for (name, hook, carried) in chains {
        let _ = writeln!(body, "\tchain {name} {{\n\t\ttype nat hook {hook}; policy accept;");
        for (home, care_of) in &visit.care_of {
            let ip = ip_of(care_of);
            let _ = writeln!(body, "\t\tct mark != {home_bound:#x} {ip} daddr {care_of} dnat {ip} to {home}");
        }
        let _ = writeln!(body, "{carried}\t}}");
    }
    let _ = writeln!(
        body,
        "\tchain {prefix}_out {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;"
    );
    for (home, care_of) in &visit.care_of {
        let ip = ip_of(care_of);
        let _ = write!(
            body,
            "\t\tiifname != \"{lan}\" oifname != {{ \"{tun}\", \"{port}\" }} ct mark {local:#x} {ip} saddr {home} snat {ip} to {care_of}\n\
             \t\tiifname \"{port}\" oifname \"{port}\" {ip} saddr {home} snat {ip} to {care_of}\n"
        );
        if care_of.is_ipv4() {
            let stranger = format!("iifname \"{lan}\" oifname \"{port}\" ip saddr {home}");
            let _ = writeln!(body, "\t\t{stranger} snat ip to {}", config.device_address);
        }
    }
    let _ = writeln!(body, "{}\t}}", carried_out(config, visit.carried));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visitor_may_answer_for_another_of_its_nics_and_for_nobody_else() {
        let address = |text: &str| -> IpAddr { text.parse().unwrap() };
        let visit = Visit {
            name: "t".to_owned(),
            port: "lh-web1-lan",
            lan: "br0",
            home: &[address("198.51.100.10")],
            others: &[address("198.51.100.11"), address("2001:db8::11")],
            home_prefixes: &[],
            care_of: Vec::new(),
            carried: &[],
        };
        let mut body = String::new();
        guard_chain(&mut body, &TunnelConfig::default(), &visit);
        assert!(body.contains("ip saddr != { 198.51.100.10, 198.51.100.11 } counter drop"), "{body}");
        assert!(body.contains("ip6 saddr != { 2001:db8::11, ::, fe80::/10 } counter drop"), "{body}");
    }

    #[test]
    fn a_flow_is_added_to_the_set_of_the_address_its_other_end_knows_and_once() {
        let flow = |local: &str| FlowTuple {
            protocol: 17,
            local: local.parse().unwrap(),
            local_port: 9000,
            remote: "192.0.2.1".parse().unwrap(),
            remote_port: 53,
        };
        let carried = CarriedRule {
            home: "198.51.100.10".parse().unwrap(),
            addr: "203.0.113.200".parse().unwrap(),
            mark: 0x1043,
            number: 0,
        };
        let care_of = ["192.0.2.200".parse().unwrap()];
        let script = |flows: &[FlowTuple]| visit_flows("t", flows, &care_of, std::slice::from_ref(&carried));
        let element = "{ 17 . 192.0.2.1 . 53 . 9000 }";
        let home = flow("198.51.100.10");
        assert_eq!(script(&[home, home]), format!("add element inet t flows4 {element}\n"));
        assert_eq!(script(&[flow("192.0.2.200")]), format!("add element inet t local4 {element}\n"));
        assert_eq!(script(&[flow("203.0.113.200")]), format!("add element inet t by0_4 {element}\n"));
        assert_eq!(script(&[]), "");
    }
}
