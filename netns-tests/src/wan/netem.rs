//! The WAN by the kernel's netem, where the kernel has it: a veth pair with a netem qdisc at each end, packets counted by
//! nftables. Deliberately small. What it does not have, unlike the userspace emulator: samples over time, pairs of
//! addresses, and drops told apart by their cause (offered minus delivered is all it knows).
//!
//! Written from tc-netem(8); the machine it was written on has no netem.

use std::time::Duration;

use anyhow::{Context, Result};

use super::counters::{ClassCounters, PacketClass, PacketMatch, PathCounters, Tally};
use super::profile::PathProfile;
use super::{Direction, WanEnd};
use crate::netns::{LabId, Namespace};

const CUT_TABLE: &str = "longhaul_wan_cut";
const COUNT_TABLE: &str = "longhaul_wan_count";

/// Whether this kernel knows netem: tried in a namespace made for it.
pub fn is_available() -> Result<bool> {
    let scratch = Namespace::create(&LabId::random(), "netem")?;
    let tried = scratch.output("tc", &["qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]);
    crate::exec::run("ip", &["netns", "del", scratch.name()])?;
    Ok(tried.is_ok())
}

/// Both directions.
#[derive(Debug)]
pub(super) struct Netem {
    near: WanEnd,
    far: WanEnd,
    classes: Vec<PacketClass>,
}

impl Netem {
    pub fn build(near: WanEnd, far: WanEnd, classes: Vec<PacketClass>) -> Result<Self> {
        let (near_name, far_name) = (near.namespace.name(), far.namespace.name());
        let link = format!(
            "link add {} netns {near_name} type veth peer name {} netns {far_name}",
            near.device, far.device
        );
        crate::exec::run_with_input("ip", &["-batch", "-"], &link)?;
        let netem = Self { near, far, classes };
        for end in [&netem.near, &netem.far] {
            // netem takes its decisions per buffer: a super-packet would be lost as a whole.
            end.namespace.ip(&[format!("link set {} gso_max_segs 1 gro_max_size 1500 up", end.device)])?;
        }
        netem.reset_counters()?;
        Ok(netem)
    }

    pub fn set_profile(&self, direction: Direction, profile: &PathProfile) -> Result<()> {
        let end = self.entrance(direction);
        let line = qdisc(&end.device, profile);
        let arguments: Vec<&str> = line.split(' ').collect();
        end.namespace.output("tc", &arguments).map(drop)
    }

    pub fn set_cut(&self, direction: Direction, cut: bool) -> Result<()> {
        let exit = self.exit(direction);
        let mut rules = format!("table inet {CUT_TABLE} {{}}\ndelete table inet {CUT_TABLE}\n");
        if cut {
            rules += &format!(
                "table inet {CUT_TABLE} {{\n  chain c_cut {{\n    type filter hook prerouting priority -400;\n    \
                 iifname \"{}\" drop\n  }}\n}}\n",
                exit.device
            );
        }
        exit.namespace.nft(&rules)
    }

    pub fn reset_counters(&self) -> Result<()> {
        for end in [&self.near, &self.far] {
            end.namespace.nft(&count_rules(&end.device, &self.classes))?;
        }
        Ok(())
    }

    pub fn counters(&self, direction: Direction) -> Result<PathCounters> {
        let offered = named_counters(&self.entrance(direction).namespace)?;
        let delivered = named_counters(&self.exit(direction).namespace)?;
        let tally = |of: &[(String, Tally)], name: &str| {
            of.iter().find(|(known, _)| known == name).map(|(_, tally)| *tally).unwrap_or_default()
        };
        let mut counters = PathCounters::default();
        let names = self.classes.iter().map(|class| class.name.as_str()).chain(["other"]);
        for (index, name) in names.enumerate() {
            let class = ClassCounters {
                name: name.to_owned(),
                offered: tally(&offered, &format!("out{index}")),
                delivered: tally(&delivered, &format!("in{index}")),
                ..ClassCounters::default()
            };
            counters.offered.merge(class.offered);
            counters.delivered.merge(class.delivered);
            counters.classes.push(class);
        }
        Ok(counters)
    }

    fn entrance(&self, direction: Direction) -> &WanEnd {
        match direction {
            Direction::ToFar => &self.near,
            Direction::ToNear => &self.far,
        }
    }

    fn exit(&self, direction: Direction) -> &WanEnd {
        match direction {
            Direction::ToFar => &self.far,
            Direction::ToNear => &self.near,
        }
    }
}

/// netem's `limit` counts packets, on their way or queued: the delay's worth and the queue's worth of full packets.
fn qdisc(device: &str, profile: &PathProfile) -> String {
    let micros = |time: Duration| time.as_micros();
    let packets = (profile.bytes_in(profile.delay) + profile.queue_bytes).div_ceil(1500).max(1000);
    let mut line =
        format!("qdisc replace dev {device} root netem limit {packets} delay {}us", micros(profile.delay));
    if !profile.jitter.is_zero() {
        line += &format!(" {}us", micros(profile.jitter));
    }
    for (word, probability) in
        [("loss", profile.loss), ("duplicate", profile.duplicate), ("reorder", profile.reorder)]
    {
        if probability > 0.0 {
            line += &format!(" {word} {}%", probability * 100.0);
        }
    }
    if let Some(rate) = profile.rate_bits_per_second {
        line += &format!(" rate {rate}bit");
    }
    line
}

fn count_rules(device: &str, classes: &[PacketClass]) -> String {
    let mut counters = String::new();
    let mut inbound = String::new();
    let mut outbound = String::new();
    let conditions = classes.iter().map(|class| class.any_of.clone()).chain([vec![PacketMatch::default()]]);
    for (index, any_of) in conditions.enumerate() {
        counters += &format!("  counter in{index} {{}}\n  counter out{index} {{}}\n");
        for condition in any_of.iter().flat_map(nft_conditions) {
            inbound += &format!("    iifname \"{device}\" {condition}counter name in{index} accept\n");
            outbound += &format!("    oifname \"{device}\" {condition}counter name out{index} accept\n");
        }
    }
    format!(
        "table inet {COUNT_TABLE} {{}}\ndelete table inet {COUNT_TABLE}\ntable inet {COUNT_TABLE} {{\n{counters}\
         \x20 chain c_in {{ type filter hook prerouting priority -390;\n{inbound}  }}\n\
         \x20 chain c_out {{ type filter hook postrouting priority 390;\n{outbound}  }}\n}}\n"
    )
}

/// nft expressions, each followed by a space; one per direction of the port, since nft has no "either port".
pub(crate) fn nft_conditions(condition: &PacketMatch) -> Vec<String> {
    let family = |address: &std::net::IpAddr| if address.is_ipv4() { "ip" } else { "ip6" };
    let mut common = String::new();
    if let Some(protocol) = condition.protocol {
        common += &format!("meta l4proto {protocol} ");
    }
    if let Some(source) = &condition.source {
        common += &format!("{} saddr {source} ", family(source));
    }
    if let Some(destination) = &condition.destination {
        common += &format!("{} daddr {destination} ", family(destination));
    }
    match condition.port {
        Some(port) => ["sport", "dport"].map(|side| format!("{common}th {side} {port} ")).to_vec(),
        None => vec![common],
    }
}

/// All named counters of a namespace, as nft's JSON lists them.
pub(crate) fn named_counters(namespace: &Namespace) -> Result<Vec<(String, Tally)>> {
    let text = namespace.output("nft", &["-j", "list", "counters"])?;
    let listing: serde_json::Value = serde_json::from_str(&text).context("nft printed no JSON")?;
    let entries = listing["nftables"].as_array().context("nft printed no list")?;
    let counters = entries.iter().filter_map(|entry| {
        let counter = entry.get("counter")?;
        let tally = Tally { packets: counter["packets"].as_u64()?, bytes: counter["bytes"].as_u64()? };
        Some((counter["name"].as_str()?.to_owned(), tally))
    });
    Ok(counters.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_becomes_one_tc_line() {
        let mut profile = PathProfile::new(Some(100_000_000), Duration::from_millis(100), 0.001);
        profile.jitter = Duration::from_millis(2);
        let line = qdisc("wan", &profile);
        let asked =
            "qdisc replace dev wan root netem limit 1250 delay 50000us 2000us loss 0.1% rate 100000000bit";
        assert_eq!(line, asked);
    }

    #[test]
    fn classes_become_counters_and_a_port_counts_in_both_places() {
        let rules = count_rules("wan", &[PacketClass::new("gateways", PacketMatch::udp_port(4433))]);
        assert!(
            rules.contains("iifname \"wan\" meta l4proto 17 th dport 4433 counter name in0 accept"),
            "{rules}"
        );
        assert!(rules.contains("oifname \"wan\" meta l4proto 17 th sport 4433 counter name out0 accept"));
        assert!(rules.contains("oifname \"wan\" counter name out1 accept"));
    }

    /// Everything but the qdisc itself, which the kernel may not have.
    #[test]
    fn the_veth_pair_counts_and_cuts() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        let lab = crate::cleanup::Lab::start().unwrap();
        let end = |role: &str| WanEnd { namespace: lab.namespace(role).unwrap(), device: "wan".to_owned() };
        let classes = vec![PacketClass::new("gateways", PacketMatch::udp_port(4433))];
        let netem = Netem::build(end("near"), end("far"), classes).unwrap();
        netem.near.namespace.ip(&["addr add 198.18.0.1/30 dev wan"]).unwrap();
        netem.far.namespace.ip(&["addr add 198.18.0.2/30 dev wan"]).unwrap();
        let target: std::net::SocketAddr = "198.18.0.2:4433".parse().unwrap();
        let from = netem.near.namespace.udp_socket("198.18.0.1:0".parse().unwrap()).unwrap();
        let to = netem.far.namespace.udp_socket(target).unwrap();
        to.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let arrives = || {
            from.send_to(&[0; 100], target).unwrap();
            to.recv(&mut [0; 200]).is_ok()
        };
        netem.reset_counters().unwrap();
        assert!(arrives());
        netem.set_cut(Direction::ToFar, true).unwrap();
        assert!(!arrives());
        netem.set_cut(Direction::ToFar, false).unwrap();
        assert!(arrives());
        let counters = netem.counters(Direction::ToFar).unwrap();
        let class = counters.class("gateways").unwrap();
        assert_eq!((class.offered, class.delivered.packets), (Tally { packets: 3, bytes: 384 }, 2));
        assert_eq!(netem.counters(Direction::ToNear).unwrap().class("gateways").unwrap().offered.packets, 0);
        assert_eq!(lab.close(), Vec::<String>::new());
    }
}
