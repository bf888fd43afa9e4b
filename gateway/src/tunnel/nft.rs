//! nftables: the rules of a visit, of an attraction and of the flow sampler, each in a table of its own.
//!
//! A table is replaced in one transaction and removed as a whole, so that applying twice and undoing
//! twice are harmless and nobody else's rules are touched. Rules are written in nft's language and not
//! in its JSON, because they are read by operators in `nft list ruleset` as well; all chain names carry
//! a prefix, as `fwd`, `dnat` and `snat` are keywords to nft 1.0.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::Stdio;

use longhaul_core::tunnel::handover::{FlowTuple, Mac, Prefix};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::config::TunnelConfig;
use super::error::TunnelError;

/// A table of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Table {
    /// `inet` or `netdev`.
    pub family: &'static str,
    pub name: String,
    /// What stands between its braces.
    pub body: String,
}

impl Table {
    /// The transaction that makes the table exactly this one.
    pub(super) fn install(&self) -> String {
        let Self { family, name, body } = self;
        format!(
            "add table {family} {name}\ndelete table {family} {name}\ntable {family} {name} {{\n{body}}}\n"
        )
    }

    /// The transaction that removes the table, there or not.
    pub(super) fn remove(&self) -> String {
        remove(self.family, &self.name)
    }
}

/// The rules of one visiting NIC.
pub(super) struct Visit<'a> {
    pub name: String,
    /// The guest's tap.
    pub port: &'a str,
    pub home: &'a [IpAddr],
    /// The home addresses of the machine's other NICs.
    pub others: &'a [IpAddr],
    pub home_prefixes: &'a [Prefix],
    /// Home address and the care-of address that stands for it.
    pub care_of: Vec<(IpAddr, IpAddr)>,
}

/// Applies a script as one transaction.
pub(super) async fn run(script: &str) -> Result<(), TunnelError> {
    nft(&["-f", "-"], script).await.map(drop)
}

/// Frames to the machine's address that the bridge hands up are for us.
pub(super) fn attract_table(config: &TunnelConfig, id: &str, mac: Mac, lan: &str) -> Table {
    let body = format!(
        "\tchain {prefix}_take {{\n\
         \t\ttype filter hook ingress device \"{lan}\" priority 0; policy accept;\n\
         \t\tether daddr {mac} meta pkttype set host\n\
         \t}}\n",
        prefix = config.prefix,
        mac = mac_text(mac),
    );
    Table { family: "netdev", name: away_name(config, id, mac), body }
}

/// Frames to whatever address the guest still believes in are for us.
pub(super) fn stale_mac_table(config: &TunnelConfig, id: &str, port: &str) -> Table {
    let body = format!(
        "\tchain {prefix}_stale {{\n\
         \t\ttype filter hook ingress device \"{port}\" priority 0; policy accept;\n\
         \t\tether type {{ ip, ip6 }} meta pkttype other meta pkttype set host\n\
         \t}}\n",
        prefix = config.prefix,
    );
    Table { family: "netdev", name: format!("{}_port_{id}", config.prefix), body }
}

/// Which way a visitor's packets leave, its care-of address, and what it may not forge.
pub(super) fn visit_table(config: &TunnelConfig, visit: &Visit<'_>) -> Table {
    let mut body = String::new();
    visit_sets(&mut body, config, visit);
    guard_chain(&mut body, config, visit);
    mark_chain(&mut body, config, visit);
    nat_chains(&mut body, config, visit);
    Table { family: "inet", name: visit.name.clone(), body }
}

/// The transaction that adds flows of before the move to a visit's table; empty without flows.
pub(super) fn preflows(table: &str, flows: &[FlowTuple]) -> String {
    let mut script = String::new();
    for (set, v6) in [("flows4", false), ("flows6", true)] {
        let elements: Vec<String> = flows
            .iter()
            .filter(|flow| flow.remote.is_ipv6() == v6 && flow.local.is_ipv6() == v6)
            .map(|flow| {
                format!("{} . {} . {} . {}", flow.protocol, flow.remote, flow.remote_port, flow.local_port)
            })
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        if !elements.is_empty() {
            let _ = writeln!(script, "add element inet {table} {set} {{ {} }}", elements.join(", "));
        }
    }
    script
}

/// Remembers the flows of a machine at home, by the packets it sends.
pub(super) fn sampler_table(config: &TunnelConfig, id: &str, port: &str) -> Table {
    let mut body = String::new();
    for (version, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        for set in ["open", "closed"] {
            let _ = writeln!(
                body,
                "\tset {set}{version} {{\n\t\ttype inet_proto . {address} . inet_service . {address} . inet_service\n\
                 \t\tsize {}\n\t\tflags dynamic,timeout\n\t}}",
                config.max_flows,
            );
        }
    }
    let (tcp, udp) = (config.tcp_flow_timeout.as_secs(), config.udp_flow_timeout.as_secs());
    let _ = writeln!(
        body,
        "\tchain {}_sample {{\n\t\ttype filter hook ingress device \"{port}\" priority -10; policy accept;\n\
         \t\tip frag-off & 0x1fff != 0 return",
        config.prefix
    );
    for (version, ip) in [(4, "ip"), (6, "ip6")] {
        let key = format!("meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport");
        let family = format!("meta protocol {ip}");
        let _ = write!(
            body,
            "\t\t{family} meta l4proto tcp tcp flags & syn == syn delete @closed{version} {{ {key} }}\n\
             \t\t{family} meta l4proto tcp tcp flags & (fin | rst) != 0 update @closed{version} {{ {key} timeout {tcp}s }}\n\
             \t\t{family} meta l4proto tcp update @open{version} {{ {key} timeout {tcp}s }}\n\
             \t\t{family} meta l4proto udp update @open{version} {{ {key} timeout {udp}s }}\n",
        );
    }
    body.push_str("\t}\n");
    Table { family: "netdev", name: sampler_name(config, id), body }
}

/// The name of a sampler's table.
pub(super) fn sampler_name(config: &TunnelConfig, id: &str) -> String {
    format!("{}_flow_{id}", config.prefix)
}

/// The flows a sampler's table remembers as open, at most `max`.
pub(super) async fn sampled(table: &str, max: usize) -> Result<Vec<FlowTuple>, TunnelError> {
    let listed = nft(&["-j", "list", "table", "netdev", table], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    Ok(read_sampled(&listed, max))
}

/// The names of our tables and their families, by prefix.
pub(super) async fn our_tables(config: &TunnelConfig) -> Result<Vec<(String, String)>, TunnelError> {
    let listed = nft(&["-j", "list", "tables"], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    let ours = format!("{}_", config.prefix);
    let tables = listed["nftables"].as_array().into_iter().flatten().filter_map(|item| {
        let (family, name) = (item["table"]["family"].as_str()?, item["table"]["name"].as_str()?);
        name.starts_with(&ours).then(|| (family.to_owned(), name.to_owned()))
    });
    Ok(tables.collect())
}

/// The transaction that removes a table, there or not.
pub(super) fn remove(family: &str, name: &str) -> String {
    format!("add table {family} {name}\ndelete table {family} {name}\n")
}

/// Whether frames to a machine's address are taken off its LAN: by this gateway or one before it.
pub(super) async fn is_away(config: &TunnelConfig, id: &str, mac: Mac) -> Result<bool, TunnelError> {
    let name = away_name(config, id, mac);
    Ok(our_tables(config).await?.iter().any(|(_, ours)| *ours == name))
}

/// The machine's address in the name of an attraction's table, by which a crash's leavings are found.
pub(super) fn mac_of_away_name(config: &TunnelConfig, name: &str) -> Option<Mac> {
    let rest = name.strip_prefix(&format!("{}_away_", config.prefix))?;
    let octets = hex::decode(rest.get(..12)?).ok()?;
    octets.first_chunk().map(|octets| Mac(*octets))
}

fn away_name(config: &TunnelConfig, id: &str, mac: Mac) -> String {
    format!("{}_away_{}_{id}", config.prefix, hex::encode(mac.0))
}

fn visit_sets(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    for (version, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        let _ = writeln!(
            body,
            "\tset flows{version} {{\n\t\ttype inet_proto . {address} . inet_service . inet_service\n\
             \t\tsize {}\n\t\tflags timeout\n\t\ttimeout {}s\n\t}}",
            config.max_flows,
            config.tcp_flow_timeout.as_secs(),
        );
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
/// leaving locally without translation it would only be dropped as forged.
fn mark_chain(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let (port, tun) = (visit.port, &config.device);
    let (local, tunnel) = (config.mark_local, config.mark_tunnel);
    let _ = writeln!(
        body,
        "\tchain {}_mark {{\n\t\ttype filter hook prerouting priority mangle; policy accept;",
        config.prefix
    );
    for (ip, v6) in [("ip", false), ("ip6", true)] {
        for home in family_of(visit.home, v6) {
            let _ = writeln!(
                body,
                "\t\tiifname \"{tun}\" {ip} daddr {home} ct state new ct mark set {tunnel:#x}"
            );
        }
        for (_, care_of) in visit.care_of.iter().filter(|(_, care_of)| care_of.is_ipv6() == v6) {
            let _ = writeln!(
                body,
                "\t\tiifname != {{ \"{tun}\", \"{port}\" }} {ip} daddr {care_of} ct state new ct mark set {local:#x}"
            );
        }
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
         \t\tmeta mark set {tunnel:#x}\n\
         \t\tct mark {local:#x} meta mark set 0\n\
         \t}}\n",
    );
}

fn nat_chains(body: &mut String, config: &TunnelConfig, visit: &Visit<'_>) {
    let (prefix, tun, port) = (&config.prefix, &config.device, visit.port);
    let chains = [
        (format!("{prefix}_in"), "prerouting priority dstnat", format!("iifname != \"{tun}\" ")),
        (format!("{prefix}_own"), "output priority -100", String::new()),
    ];
    for (name, hook, from) in chains {
        let _ = writeln!(body, "\tchain {name} {{\n\t\ttype nat hook {hook}; policy accept;");
        for (home, care_of) in &visit.care_of {
            let ip = if care_of.is_ipv6() { "ip6" } else { "ip" };
            let _ = writeln!(body, "\t\t{from}{ip} daddr {care_of} dnat {ip} to {home}");
        }
        body.push_str("\t}\n");
    }
    let _ = writeln!(
        body,
        "\tchain {prefix}_out {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;"
    );
    for (home, care_of) in &visit.care_of {
        let ip = if care_of.is_ipv6() { "ip6" } else { "ip" };
        let _ = writeln!(
            body,
            "\t\toifname != {{ \"{tun}\", \"{port}\" }} {ip} saddr {home} snat {ip} to {care_of}"
        );
    }
    body.push_str("\t}\n");
}

fn family_of(addresses: &[IpAddr], v6: bool) -> Vec<String> {
    addresses.iter().filter(|address| address.is_ipv6() == v6).map(IpAddr::to_string).collect()
}

/// The block's first address: nft refuses host bits in an interval.
fn first_address(prefix: &Prefix) -> IpAddr {
    match prefix.addr {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.len.min(32))).unwrap_or(0);
            IpAddr::V4((u32::from(v4) & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.len.min(128))).unwrap_or(0);
            IpAddr::V6((u128::from(v6) & mask).into())
        }
    }
}

fn mac_text(mac: Mac) -> String {
    mac.0.map(|octet| format!("{octet:02x}")).join(":")
}

fn read_sampled(listed: &Value, max: usize) -> Vec<FlowTuple> {
    let (mut open, mut closed) = (BTreeSet::new(), BTreeSet::new());
    for set in listed["nftables"].as_array().into_iter().flatten().map(|item| &item["set"]) {
        let into = match set["name"].as_str() {
            Some("open4" | "open6") => &mut open,
            Some("closed4" | "closed6") => &mut closed,
            Some(_) | None => continue,
        };
        into.extend(set["elem"].as_array().into_iter().flatten().filter_map(read_flow));
    }
    let unicast = |flow: &&FlowTuple| !flow.remote.is_multicast() && flow.remote != IpAddr::from([255; 4]);
    open.difference(&closed).filter(unicast).take(max).copied().collect()
}

fn read_flow(element: &Value) -> Option<FlowTuple> {
    let value = element.get("elem").map_or(element, |elem| &elem["val"]);
    let [protocol, local, local_port, remote, remote_port] = value["concat"].as_array()?.as_slice() else {
        return None;
    };
    let protocol = match protocol.as_str() {
        Some("tcp") => 6,
        Some("udp") => 17,
        Some(other) => other.parse().ok()?,
        None => protocol.as_u64()?.try_into().ok()?,
    };
    Some(FlowTuple {
        protocol,
        local: local.as_str()?.parse().ok()?,
        local_port: local_port.as_u64()?.try_into().ok()?,
        remote: remote.as_str()?.parse().ok()?,
        remote_port: remote_port.as_u64()?.try_into().ok()?,
    })
}

async fn nft(arguments: &[&str], input: &str) -> Result<String, TunnelError> {
    let mut child = Command::new("nft")
        .arg("-n")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(TunnelError::io("run nft; install the package nftables"))?;
    let mut stdin = child.stdin.take();
    let feed = async move {
        if let Some(stdin) = &mut stdin {
            // A closed pipe means that nft gave up: what it says follows.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    let output = output.map_err(TunnelError::io("run nft"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(TunnelError::Nft { message });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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
            home: &[address("198.51.100.10")],
            others: &[address("198.51.100.11"), address("2001:db8::11")],
            home_prefixes: &[],
            care_of: Vec::new(),
        };
        let mut body = String::new();
        guard_chain(&mut body, &TunnelConfig::default(), &visit);
        assert!(body.contains("ip saddr != { 198.51.100.10, 198.51.100.11 } counter drop"), "{body}");
        assert!(body.contains("ip6 saddr != { 2001:db8::11, ::, fe80::/10 } counter drop"), "{body}");
    }

    #[test]
    fn flows_that_were_closed_are_not_handed_over() {
        let flow = |port: u16| {
            serde_json::json!({"elem": {"val": {"concat":
            ["tcp", "198.51.100.10", 80, "192.0.2.1", port]}, "timeout": 7440, "expires": 7000}})
        };
        let multicast = serde_json::json!({"elem": {"val": {"concat":
            [17, "198.51.100.10", 5353, "224.0.0.251", 5353]}}});
        let listed = serde_json::json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"set": {"name": "open4", "elem": [flow(1), flow(2), multicast]}},
            {"set": {"name": "closed4", "elem": [flow(2)]}},
        ]});
        let flows = read_sampled(&listed, 10);
        assert_eq!(flows.iter().map(|flow| flow.remote_port).collect::<Vec<_>>(), [1]);
        assert!(read_sampled(&listed, 0).is_empty());
    }

    #[test]
    fn flows_are_added_by_family_and_once() {
        let flow = FlowTuple {
            protocol: 17,
            local: "198.51.100.10".parse().unwrap(),
            local_port: 9000,
            remote: "192.0.2.1".parse().unwrap(),
            remote_port: 53,
        };
        let script = preflows("t", &[flow, flow]);
        assert_eq!(script, "add element inet t flows4 { 17 . 192.0.2.1 . 53 . 9000 }\n");
        assert_eq!(preflows("t", &[]), "");
    }

    #[test]
    fn blocks_are_written_without_host_bits() {
        let first = |text: &str, len| first_address(&Prefix { addr: text.parse().unwrap(), len }).to_string();
        assert_eq!(first("198.51.100.10", 24), "198.51.100.0");
        assert_eq!(first("198.51.100.10", 0), "0.0.0.0");
        assert_eq!(first("198.51.100.10", 32), "198.51.100.10");
        assert_eq!(first("2001:db8::10", 64), "2001:db8::");
    }

    #[test]
    fn the_machines_address_is_found_in_the_tables_name() {
        let config = TunnelConfig::default();
        let mac = Mac([0x52, 0x54, 0, 0xaa, 0, 0x10]);
        assert_eq!(mac_of_away_name(&config, &away_name(&config, "00ff", mac)), Some(mac));
        assert_eq!(mac_of_away_name(&config, "lh_visit_1234567890ab"), None);
    }
}
