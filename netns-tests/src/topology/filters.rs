//! nftables of the world: ingress filters in the core, stateful firewalls in the routers, and counters that prove which
//! way packets went. The gateways' own rules are not here.

use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::{LAN_DEVICE, Site, SiteSpec, UPLINK_DEVICE, World, WorldSpec, nat};
use crate::netns::Namespace;
use crate::wan::netem::{named_counters, nft_conditions};
use crate::wan::{PacketMatch, Tally};

/// What a router refused since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirewallCounts {
    /// Belonged to no connection that the router saw begin.
    pub invalid: Tally,
    /// New, but not admitted.
    pub denied: Tally,
}

/// Packets to count where they are forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// The counter's name: letters, digits, underscores; unique in its namespace.
    pub name: String,
    /// The namespace that forwards.
    pub place: Namespace,
    /// The interface they come from, if that matters.
    pub from_device: Option<String>,
    /// The interface they go to, if that matters.
    pub to_device: Option<String>,
    /// Which packets.
    pub packets: PacketMatch,
}

/// A running [`Watch`].
#[derive(Clone, Debug)]
pub struct Watched {
    name: String,
    place: Namespace,
}

impl Watched {
    /// What was counted so far.
    pub fn tally(&self) -> Result<Tally> {
        counter(&self.place, &format!("watch_{}", self.name))
    }
}

impl World {
    /// Counts packets from now on, before any filter of the namespace sees them. A super-packet counts as one packet.
    pub fn watch(&self, watch: &Watch) -> Result<Watched> {
        let name = format!("watch_{}", watch.name);
        let mut interfaces = String::new();
        for (word, device) in [("iifname", &watch.from_device), ("oifname", &watch.to_device)] {
            if let Some(device) = device {
                interfaces += &format!("{word} \"{device}\" ");
            }
        }
        let rules: String = nft_conditions(&watch.packets)
            .iter()
            .map(|condition| format!("    {interfaces}{condition}counter name {name}\n"))
            .collect();
        watch.place.nft(&format!(
            "table inet lab_watch {{\n  counter {name} {{}}\n  chain c_{name} {{\n    \
             type filter hook forward priority -50;\n{rules}  }}\n}}\n"
        ))?;
        Ok(Watched { name: watch.name.clone(), place: watch.place.clone() })
    }

    /// From now on the core changes a byte in so many of a thousand datagrams to this port, and makes their checksums fit:
    /// only who authenticates what it reads can tell. 0 ends it.
    pub fn damage(&self, port: u16, per_mille: u32) -> Result<()> {
        let rule = format!("udp dport {port} numgen random mod 1000 < {per_mille} @th,256,8 set 0xee");
        let chain = format!("chain spoil {{\n  type filter hook forward priority -40;\n  {rule}\n }}");
        let chain = if per_mille > 0 { chain } else { String::new() };
        self.net.nft(&format!(
            "table inet lab_damage\ndelete table inet lab_damage\ntable inet lab_damage {{\n {chain}\n}}\n"
        ))
    }

    /// Counts packets to or from `address` that a site's router forwards between its LAN and the internet.
    pub fn watch_router(&self, site: &str, name: &str, packets: PacketMatch) -> Result<Watched> {
        let place = self.site(site)?.router.clone();
        self.watch(&Watch { name: name.to_owned(), place, from_device: None, to_device: None, packets })
    }

    /// Counts packets that the core forwards from the client straight to a site.
    pub fn watch_client_to(&self, site: &str, name: &str, packets: PacketMatch) -> Result<Watched> {
        let to_device = Some(self.site(site)?.spec.uplink_device());
        let from_device = Some("client0".to_owned());
        self.watch(&Watch { name: name.to_owned(), place: self.net.clone(), from_device, to_device, packets })
    }

    /// Packets with foreign sources that the core dropped from a site.
    pub fn foreign_dropped(&self, site: &str) -> Result<Tally> {
        counter(&self.net, &format!("foreign_{site}"))
    }

    /// What a site's firewall refused.
    pub fn firewall_counts(&self, site: &str) -> Result<FirewallCounts> {
        let router = &self.site(site)?.router;
        Ok(FirewallCounts { invalid: counter(router, "invalid")?, denied: counter(router, "denied")? })
    }

    /// Makes a router forget all connections, as after its restart: those that go on are then refused.
    pub fn forget_connections(&self, site: &str) -> Result<()> {
        let router = &self.site(site)?.router;
        router.run(|| flush_conntrack(None))?.context("Cannot flush the connection table")
    }
}

/// BCP 38 in the core: a site may send only with its own addresses.
pub(super) fn ingress(net: &Namespace, sites: &[SiteSpec]) -> Result<()> {
    let mut counters = String::new();
    let mut rules = String::new();
    for site in sites {
        let (name, device) = (&site.name, site.uplink_device());
        let (lan, uplink) = (site.lan_network(), site.uplink_network());
        let (lan6, uplink6) = (site.lan_network6(), site.uplink_network6());
        counters += &format!("  counter foreign_{name} {{}}\n");
        rules += &format!(
            "    iifname \"{device}\" ip saddr != {{ {lan}, {uplink} }} counter name foreign_{name} drop\n    \
             iifname \"{device}\" ip6 saddr != {{ {lan6}, {uplink6} }} counter name foreign_{name} drop\n"
        );
    }
    net.nft(&format!(
        "table inet lab_ingress {{\n{counters}  chain c_forward {{\n    \
         type filter hook forward priority 0; policy accept;\n{rules}  }}\n}}\n"
    ))
}

/// A strict stateful firewall: connections that it did not see begin do not pass.
pub(super) fn firewall(site: &Site, spec: &WorldSpec) -> Result<()> {
    let router = &site.router;
    if spec.mute_icmp {
        mute_icmp(router)?;
    }
    let gateways = match spec.behind_nat.contains(&site.spec.name) {
        true => {
            nat::translate(site, spec.gateway_port)?;
            Vec::new()
        }
        false => vec![spec.gateway_port],
    };
    router.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0")?;
    let admit = |protocol: &str, ports: &[u16]| {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        match ports.is_empty() {
            true => String::new(),
            false => format!(
                "    iifname \"{UPLINK_DEVICE}\" {protocol} dport {{ {} }} ct state new accept\n",
                ports.join(", ")
            ),
        }
    };
    let open =
        admit("tcp", &spec.open_tcp_ports) + &admit("udp", &[&spec.open_udp_ports[..], &gateways].concat());
    router.nft(&format!(
        "table inet lab_firewall {{
  counter invalid {{}}
  counter denied {{}}
  chain c_forward {{
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    ct state invalid counter name invalid drop
    iifname \"{LAN_DEVICE}\" accept
{open}    icmp type echo-request accept
    icmpv6 type echo-request accept
    counter name denied drop
  }}
}}
"
    ))
}

/// Neither passes ICMP on nor says anything by it, as some operators have it. Its LANs' own neighbour discovery goes on.
fn mute_icmp(router: &Namespace) -> Result<()> {
    router.nft(
        "table inet lab_mute {
  chain c_forward {
    type filter hook forward priority -10; policy accept;
    meta l4proto { icmp, icmpv6 } drop
  }
  chain c_output {
    type filter hook output priority -10; policy accept;
    icmp type { destination-unreachable, time-exceeded } drop
    icmpv6 type { destination-unreachable, packet-too-big, time-exceeded } drop
  }
}
",
    )
}

/// `IPCTNL_MSG_CT_DELETE` without a tuple deletes all entries, or all with one mark
/// (`nfnetlink_conntrack.h`); nft itself cannot.
pub(super) fn flush_conntrack(mark: Option<u32>) -> nix::Result<()> {
    const DELETE: u16 = (1 << 8) | 2;
    const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    const MARK: u16 = 8;
    const MARK_MASK: u16 = 21;
    let marked = mark.map(|mark| [(MARK, mark), (MARK_MASK, u32::MAX)]);
    let attributes: Vec<u8> = marked
        .iter()
        .flatten()
        .flat_map(|(kind, value)| {
            [&8u16.to_ne_bytes()[..], &kind.to_ne_bytes(), &value.to_be_bytes()].concat()
        })
        .collect();
    let mut message = Vec::with_capacity(20 + attributes.len());
    message.extend_from_slice(&(20 + attributes.len() as u32).to_ne_bytes());
    message.extend_from_slice(&DELETE.to_ne_bytes());
    message.extend_from_slice(&REQUEST_AND_ACK.to_ne_bytes());
    // Sequence number, sender, and `nfgenmsg`: any family, version 0, resource 0.
    message.extend_from_slice(&[0; 12]);
    message.extend_from_slice(&attributes);
    let protocol = SockProtocol::NetlinkNetFilter;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    send(netlink.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let code =
        answer[..length].get(16..20).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code != 0 {
        return Err(nix::Error::from_raw(-code));
    }
    Ok(())
}

fn counter(place: &Namespace, name: &str) -> Result<Tally> {
    let found = named_counters(place)?.into_iter().find(|(known, _)| known == name);
    found.map(|(_, tally)| tally).with_context(|| format!("No counter {name} in {}", place.name()))
}
