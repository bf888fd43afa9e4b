//! nftables: the rules of a visit, of an attraction and of the flow sampler, each in a table of its own.
//!
//! A table is replaced in one transaction and removed as a whole, so that applying twice and undoing
//! twice are harmless and nobody else's rules are touched. Rules are written in nft's language and not
//! in its JSON, because they are read by operators in `nft list ruleset` as well; all chain names carry
//! a prefix, as `fwd`, `dnat` and `snat` are keywords to nft 1.0.

mod carry;
mod visit;

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

pub(super) use carry::{
    CarriedRule, Home, carry_flows, carry_names, carry_tables, left_name, left_table, turned,
};
pub(super) use visit::{Visit, visit_flows, visit_table, visited};

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

/// Applies a script as one transaction.
pub(super) async fn run(script: &str) -> Result<(), TunnelError> {
    nft(&["-f", "-"], script).await.map(drop)
}

/// Removes the rules that have this comment; a table that is not there has none.
pub(super) async fn strike(table: &Table, comment: &str) -> Result<(), TunnelError> {
    let Table { family, name, .. } = table;
    let listed = match nft(&["-t", "-a", "-j", "list", "table", family, name], "").await {
        Err(TunnelError::Nft { .. }) => return Ok(()),
        other => other?,
    };
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    let rules = listed["nftables"].as_array().into_iter().flatten().map(|item| &item["rule"]);
    let lines = rules.filter(|rule| rule["comment"] == comment).filter_map(|rule| {
        let (chain, handle) = (rule["chain"].as_str()?, rule["handle"].as_u64()?);
        Some(format!("delete rule {family} {name} {chain} handle {handle}\n"))
    });
    let script: String = lines.collect();
    if script.is_empty() { Ok(()) } else { run(&script).await }
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

/// Frames to whatever address the guest still believes in are for us. Whether somebody has its own is not: a station of this
/// LAN may, and the host would answer for it.
pub(super) fn stale_mac_table(config: &TunnelConfig, id: &str, port: &str, home: &[IpAddr]) -> Table {
    let probe = |own: &IpAddr| format!("\t\tether type arp arp daddr ip {own} drop\n");
    let probes: String = home.iter().filter(|own| own.is_ipv4()).map(probe).collect();
    let body = format!(
        "\tchain {prefix}_stale {{\n\
         \t\ttype filter hook ingress device \"{port}\" priority 0; policy accept;\n{probes}\
         \t\tether type {{ ip, ip6 }} meta pkttype other meta pkttype set host\n\
         \t}}\n",
        prefix = config.prefix,
    );
    Table { family: "netdev", name: format!("{}_port_{id}", config.prefix), body }
}

/// Remembers the flows of a machine at home, by the packets it sends.
pub(super) fn sampler_table(config: &TunnelConfig, id: &str, port: &str) -> Table {
    let mut body = sampling_sets(config, "");
    let _ = writeln!(
        body,
        "\tchain {}_sample {{\n\t\ttype filter hook ingress device \"{port}\" priority -10; policy accept;\n\
         \t\tip frag-off & 0x1fff != 0 return",
        config.prefix
    );
    body.push_str(&sampling_rules(config, "", ""));
    body.push_str("\t}\n");
    Table { family: "netdev", name: sampler_name(config, id), body }
}

/// The sets of flows that were seen; `tag` tells them from others in the same table. (nft 1.0 forgets the first type of
/// a key of more than five, so that a mark cannot be part of it.)
fn sampling_sets(config: &TunnelConfig, tag: &str) -> String {
    let mut sets = String::new();
    for (version, address) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        for set in ["open", "half", "closed"] {
            let _ = writeln!(
                sets,
                "\tset {set}{tag}{version} {{\n\t\ttype inet_proto . {address} . inet_service . {address} . inet_service\n\
                 \t\tsize {}\n\t\tflags dynamic,timeout\n\t}}",
                config.max_flows,
            );
        }
    }
    sets
}

/// The rules that fill them, with what fulfils `condition`. A server's short connections must not fill a set that its
/// long ones need: what has ended leaves `open` at once and `closed` soon. A connection of which only the guest's SYN was seen
/// may be one that is silent for hours: it stays, in a set of its own, which whoever sends SYNs under foreign addresses can
/// fill without taking room of those that have spoken.
fn sampling_rules(config: &TunnelConfig, tag: &str, condition: &str) -> String {
    let (tcp, udp) = (config.tcp_flow_timeout.as_secs(), config.udp_flow_timeout.as_secs());
    let mut rules = String::new();
    for (version, ip) in [(4, "ip"), (6, "ip6")] {
        let key = format!("meta l4proto . {ip} saddr . th sport . {ip} daddr . th dport");
        let (family, set) = (format!("{condition}meta protocol {ip}"), format!("{tag}{version}"));
        let tcp_rule = format!("{family} meta l4proto tcp");
        let _ = write!(
            rules,
            "\t\t{tcp_rule} tcp flags & syn == syn delete @closed{set} {{ {key} }}\n\
             \t\t{tcp_rule} tcp flags & (fin | rst) != 0 delete @open{set} {{ {key} }} delete @half{set} {{ {key} }}\n\
             \t\t{tcp_rule} tcp flags & (fin | rst) != 0 update @closed{set} {{ {key} timeout {CLOSED_S}s }}\n\
             \t\t{tcp_rule} tcp flags & (fin | rst) != 0 return\n\
             \t\t{tcp_rule} {key} @closed{set} update @closed{set} {{ {key} timeout {CLOSED_S}s }} return\n\
             \t\t{tcp_rule} tcp flags & syn == syn update @half{set} {{ {key} timeout {tcp}s }}\n\
             \t\t{tcp_rule} tcp flags & syn == syn return\n\
             \t\t{tcp_rule} delete @half{set} {{ {key} }} update @open{set} {{ {key} timeout {tcp}s }}\n\
             \t\t{family} meta l4proto udp update @open{set} {{ {key} timeout {udp}s }}\n",
        );
    }
    rules
}

/// How long it is remembered that a connection has ended: Linux says its last word within this (TIME-WAIT). A set of 65,536
/// holds those of a thousand connections a second.
const CLOSED_S: u64 = 60;

/// The name of a sampler's table.
pub(super) fn sampler_name(config: &TunnelConfig, id: &str) -> String {
    format!("{}_flow_{id}", config.prefix)
}

/// The flows a sampler's table remembers as open, at most `max`.
pub(super) async fn sampled(table: &str, max: usize) -> Result<Vec<FlowTuple>, TunnelError> {
    let listed = nft(&["-j", "list", "table", "netdev", table], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    Ok(Sampled::read(&listed, "").first(max))
}

/// The families and names of our tables, by prefix.
pub(super) async fn our_tables(config: &TunnelConfig) -> Result<Vec<(String, String)>, TunnelError> {
    let ours = format!("{}_", config.prefix);
    let tables = all_tables().await?;
    Ok(tables.into_iter().filter(|(_, name)| name.starts_with(&ours)).collect())
}

/// The families and names of all tables on this host.
pub(super) async fn all_tables() -> Result<BTreeSet<(String, String)>, TunnelError> {
    let listed = nft(&["-j", "list", "tables"], "").await?;
    let listed: Value = serde_json::from_str(&listed).map_err(TunnelError::NftOutput)?;
    let table = |item: &Value| {
        let (family, name) = (item["table"]["family"].as_str()?, item["table"]["name"].as_str()?);
        Some((family.to_owned(), name.to_owned()))
    };
    Ok(listed["nftables"].as_array().into_iter().flatten().filter_map(table).collect())
}

/// The transaction that removes a table, there or not.
pub(super) fn remove(family: &str, name: &str) -> String {
    format!("add table {family} {name}\ndelete table {family} {name}\n")
}

/// Whether frames to a machine's address are taken off its LAN: by this gateway or one before it.
pub(super) async fn is_away(config: &TunnelConfig, id: &str, mac: Mac) -> Result<bool, TunnelError> {
    has_table(config, &away_name(config, id, mac)).await
}

/// Whether there is a table of that name: this gateway's or one before it's.
pub(super) async fn has_table(config: &TunnelConfig, name: &str) -> Result<bool, TunnelError> {
    Ok(our_tables(config).await?.iter().any(|(_, ours)| ours == name))
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

/// What a sampler remembers.
#[derive(Debug, Default)]
struct Sampled {
    open: BTreeSet<FlowTuple>,
    /// Nothing but the guest's SYN was seen of them.
    half: BTreeSet<FlowTuple>,
}

impl Sampled {
    /// Of the sets with this tag, without what has ended.
    fn read(listed: &Value, tag: &str) -> Self {
        let (mut sampled, mut closed) = (Self::default(), BTreeSet::new());
        for set in listed["nftables"].as_array().into_iter().flatten().map(|item| &item["set"]) {
            let name =
                set["name"].as_str().and_then(|name| name.strip_suffix(['4', '6'])).unwrap_or_default();
            let into = match name.split_at_checked(name.len().saturating_sub(tag.len())) {
                Some(("open", of)) if of == tag => &mut sampled.open,
                Some(("half", of)) if of == tag => &mut sampled.half,
                Some(("closed", of)) if of == tag => &mut closed,
                Some(_) | None => continue,
            };
            into.extend(set["elem"].as_array().into_iter().flatten().filter_map(read_flow));
        }
        let goes_on = |flow: &FlowTuple| {
            !closed.contains(flow) && !flow.remote.is_multicast() && flow.remote != IpAddr::from([255; 4])
        };
        sampled.open.retain(goes_on);
        sampled.half.retain(goes_on);
        sampled
    }

    /// At most `max` of them, those first that have spoken.
    fn first(self, max: usize) -> Vec<FlowTuple> {
        let silent = self.half.difference(&self.open);
        self.open.iter().chain(silent).take(max).copied().collect()
    }
}

/// The flows in the sets `set`4 and `set`6, which hold remote address, remote port and the guest's port.
fn read_turned(listed: &Value, set: &str, local: IpAddr) -> Vec<FlowTuple> {
    let sets = listed["nftables"].as_array().into_iter().flatten().map(|item| &item["set"]);
    let ours = sets.filter(|found| {
        found["name"]
            .as_str()
            .and_then(|name| name.strip_prefix(set))
            .is_some_and(|rest| rest == "4" || rest == "6")
    });
    let elements = ours.flat_map(|found| found["elem"].as_array().into_iter().flatten());
    let read = |element: &Value| {
        let value = element.get("elem").map_or(element, |elem| &elem["val"]);
        let [protocol, remote, remote_port, local_port] = value["concat"].as_array()?.as_slice() else {
            return None;
        };
        Some(FlowTuple {
            protocol: read_protocol(protocol)?,
            local,
            local_port: read_port(local_port)?,
            remote: remote.as_str()?.parse().ok()?,
            remote_port: read_port(remote_port)?,
        })
    };
    elements.filter_map(read).collect()
}

fn read_flow(element: &Value) -> Option<FlowTuple> {
    let value = element.get("elem").map_or(element, |elem| &elem["val"]);
    let [protocol, local, local_port, remote, remote_port] = value["concat"].as_array()?.as_slice() else {
        return None;
    };
    Some(FlowTuple {
        protocol: read_protocol(protocol)?,
        local: local.as_str()?.parse().ok()?,
        local_port: read_port(local_port)?,
        remote: remote.as_str()?.parse().ok()?,
        remote_port: read_port(remote_port)?,
    })
}

fn read_port(value: &Value) -> Option<u16> {
    value.as_u64()?.try_into().ok()
}

fn read_protocol(value: &Value) -> Option<u8> {
    match value.as_str() {
        Some("tcp") => Some(6),
        Some("udp") => Some(17),
        Some(other) => other.parse().ok(),
        None => value.as_u64()?.try_into().ok(),
    }
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
        let ports = |listed, tag, max| {
            let flows = Sampled::read(listed, tag).first(max);
            flows.iter().map(|flow| flow.remote_port).collect::<Vec<_>>()
        };
        assert_eq!(ports(&listed, "", 10), [1]);
        assert!(ports(&listed, "", 0).is_empty() && ports(&listed, "by0_", 10).is_empty());
        let tagged = serde_json::json!({"nftables": [
            {"set": {"name": "openby0_4", "elem": [flow(1), flow(2)]}},
            {"set": {"name": "closedby0_4", "elem": [flow(2)]}},
            {"set": {"name": "open4", "elem": [flow(3)]}},
        ]});
        assert_eq!(ports(&tagged, "by0_", 10), [1]);
        let asked = serde_json::json!({"nftables": [
            {"set": {"name": "half4", "elem": [flow(1), flow(2), flow(5), flow(6)]}},
            {"set": {"name": "open4", "elem": [flow(5), flow(7)]}},
            {"set": {"name": "closed4", "elem": [flow(2)]}},
        ]});
        assert_eq!(ports(&asked, "", 10), [5, 7, 1, 6]);
        assert_eq!(ports(&asked, "", 3), [5, 7, 1]);
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
