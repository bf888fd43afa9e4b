//! The demo's world: a client and a name server on an internet core, and sites of their own subnets behind routers. The
//! core drops what a site sends with foreign sources (BCP 38), the routers have stateful firewalls that admit only
//! connections they saw begin. The emulated WAN is one site's uplink.
//!
//! ```text
//!  client ---+                +--- ra (firewall) --- lan bridge --- ha (br0 198.51.100.2)
//!            +--- net (core) -+
//!  dns ------+                +=WAN= rb (firewall) --- lan bridge --- hb (br0 203.0.113.2)
//! ```
//!
//! Addresses, routes and filters only: guests, gateways and servers are put in by others.

mod filters;
mod nat;
mod plan;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub use filters::{FirewallCounts, Watch, Watched};
pub use plan::{SiteSpec, WorldSpec};

use crate::cleanup::Lab;
use crate::exec;
use crate::netns::Namespace;
use crate::wan::{Wan, WanEnd, WanSpec};

/// The client on the internet.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The client on the IPv6 internet.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc1, 0, 0, 0, 0, 0x10);
/// The name server's host.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 53, 53);
/// The name server's host, IPv6.
pub const NAME_SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x53, 0, 0, 0, 0, 0x53);
/// The bridge on every hypervisor host that guests are attached to.
pub const BRIDGE: &str = "br0";

/// How long a host's bridge may take to see its port.
const CONNECTED_LIMIT: Duration = Duration::from_secs(10);
/// The interface that an end host has.
const HOST_DEVICE: &str = "eth0";
/// A router's interface to its site.
const LAN_DEVICE: &str = "lan";
/// A router's interface to the core.
const UPLINK_DEVICE: &str = "wan";

/// One site: a router, a LAN, a hypervisor host.
#[derive(Clone, Debug)]
pub struct Site {
    /// What it was built from: name and addresses.
    pub spec: SiteSpec,
    /// The router with the firewall.
    pub router: Namespace,
    /// The hypervisor host: runs the gateway and QEMU, has [`BRIDGE`] with its address `.2`.
    pub host: Namespace,
}

/// Everything; dropping it removes everything.
#[derive(Debug)]
pub struct World {
    /// The emulated WAN. Declared first: it ends before its namespaces are removed.
    pub wan: Wan,
    /// The client.
    pub client: Namespace,
    /// The internet core.
    pub net: Namespace,
    /// The name server's host.
    pub dns: Namespace,
    /// The sites, in the order asked for.
    pub sites: Vec<Site>,
    /// What removes it all.
    pub lab: Lab,
}

impl World {
    /// Builds the world in a lab that was started for it. Takes about a second.
    pub fn build(lab: Lab, spec: &WorldSpec) -> Result<Self> {
        spec.check()?;
        let role = |role: &str| -> Result<Namespace> {
            let namespace = lab.namespace(role)?;
            prepare(&namespace)?;
            Ok(namespace)
        };
        let (client, net, dns) = (role("client")?, role("net")?, role("dns")?);
        let mut sites = Vec::new();
        for site in &spec.sites {
            let (router, host) = (role(&format!("r{}", site.name))?, role(&format!("h{}", site.name))?);
            sites.push(Site { spec: site.clone(), router, host });
        }
        connect_edge(&net, &client, "client0", CLIENT, CLIENT6)?;
        connect_edge(&net, &dns, "dns0", NAME_SERVER, NAME_SERVER6)?;
        forward(&net)?;
        let far = sites.iter().find(|site| site.spec.name == spec.wan_site);
        let far = far.context("No site has the WAN")?;
        let wan = Wan::build(WanSpec {
            near: WanEnd { namespace: net.clone(), device: far.spec.uplink_device() },
            far: WanEnd { namespace: far.router.clone(), device: UPLINK_DEVICE.to_owned() },
            profile: spec.wan.clone(),
            classes: spec.classes.clone(),
            emulator: spec.emulator,
        })?;
        for site in &sites {
            if site.spec.name != spec.wan_site {
                link(&net, &site.spec.uplink_device(), &site.router, UPLINK_DEVICE)?;
            }
            site.connect(&net)?;
            filters::firewall(site, spec)?;
        }
        filters::ingress(&net, &spec.sites)?;
        Ok(Self { wan, client, net, dns, sites, lab })
    }

    /// The site of this name.
    pub fn site(&self, name: &str) -> Result<&Site> {
        self.sites.iter().find(|site| site.spec.name == name).with_context(|| format!("No site {name}"))
    }

    /// The addresses of the WAN's two ends, for [`crate::wan::measure()`].
    pub fn wan_addresses(&self) -> Result<(IpAddr, IpAddr)> {
        let far = &self.wan.far().namespace;
        let site = self.sites.iter().find(|site| site.router == *far).context("No site has the WAN")?;
        Ok((site.spec.core_address().into(), site.spec.uplink_address().into()))
    }

    /// Puts one more machine on a site's LAN (a neighbour, a database), with address number `number` there.
    pub fn add_lan_host(&self, site: &str, role: &str, number: u8) -> Result<Namespace> {
        let site = self.site(site)?;
        let namespace = self.lab.namespace(role)?;
        prepare(&namespace)?;
        let port = format!("port{number}");
        link(&site.router, &port, &namespace, HOST_DEVICE)?;
        site.router.ip(&[format!("link set {port} master {LAN_DEVICE} up")])?;
        namespace.ip(&[
            format!("addr add {}/{} dev {HOST_DEVICE}", site.spec.address(number), site.spec.lan_prefix),
            format!("addr add {}/64 dev {HOST_DEVICE} nodad", site.spec.address6(number)),
            format!("link set {HOST_DEVICE} up"),
            format!("route add default via {}", site.spec.router_address()),
            format!("route add default via {}", site.spec.address6(1)),
        ])?;
        Ok(namespace)
    }

    /// Removes everything and says what is left nevertheless.
    pub fn close(self) -> Vec<String> {
        let Self { wan, lab, .. } = self;
        drop(wan);
        lab.close()
    }
}

impl Site {
    /// The hypervisor host's address; the gateway's too.
    pub fn host_address(&self) -> Ipv4Addr {
        self.spec.host_address()
    }

    fn connect(&self, net: &Namespace) -> Result<()> {
        let spec = &self.spec;
        let (core, uplink) = (spec.uplink_device(), UPLINK_DEVICE);
        net.ip(&[
            format!("addr add {}/30 dev {core}", spec.core_address()),
            format!("addr add {}/64 dev {core} nodad", spec.core_address6()),
            format!("link set {core} up"),
            format!("route add {} via {}", spec.lan_network(), spec.uplink_address()),
        ])?;
        self.router.ip(&[
            format!("addr add {}/30 dev {uplink}", spec.uplink_address()),
            format!("addr add {}/64 dev {uplink} nodad", spec.uplink_address6()),
            format!("link set {uplink} up"),
            format!("route add default via {}", spec.core_address()),
            format!("route add default via {} dev {uplink}", spec.core_address6()),
            // Its own address, as a router has: without one a bridge takes the lowest of its ports', and a guest that
            // never asks anew would lose its router as soon as another host is plugged in.
            format!("link add {LAN_DEVICE} address 02:00:00:00:01:{:02x} type bridge", spec.number),
            format!("addr add {}/{} dev {LAN_DEVICE}", spec.router_address(), spec.lan_prefix),
            format!("addr add {}/64 dev {LAN_DEVICE} nodad", spec.address6(1)),
            format!("link set {LAN_DEVICE} up"),
        ])?;
        net.ip(&[format!("route add {} via {} dev {core}", spec.lan_network6(), spec.uplink_address6())])?;
        forward(&self.router)?;
        self.connect_host()
    }

    fn connect_host(&self) -> Result<()> {
        let spec = &self.spec;
        link(&self.router, "port2", &self.host, HOST_DEVICE)?;
        self.router.ip(&[format!("link set port2 master {LAN_DEVICE} up")])?;
        // Debian's default (loose) on every interface made from now on, as on a real host.
        self.host.sysctl("net.ipv4.conf.default.rp_filter", "2")?;
        self.host.ip(&[
            // Its own address: without one a bridge takes the lowest of its ports', which changes with every tap.
            format!("link add {BRIDGE} address 02:00:00:00:00:{:02x} type bridge", spec.number),
            format!("link set {HOST_DEVICE} master {BRIDGE} up"),
            format!("addr add {}/{} dev {BRIDGE}", spec.host_address(), spec.lan_prefix),
            format!("addr add {}/64 dev {BRIDGE} nodad", spec.address6(2)),
            format!("link set {BRIDGE} up"),
            format!("route add default via {}", spec.router_address()),
            format!("route add default via {}", spec.address6(1)),
        ])?;
        forward(&self.host)?;
        // As with Docker or firewalld: the kernel tracks connections whether a machine visits or not.
        self.host.nft(
            "table inet lab_host {\n  chain c_in {\n    type filter hook input priority 0; policy accept;\n    \
             ct state established accept\n  }\n}\n",
        )?;
        self.wait_until_connected()
    }

    /// The kernel takes a moment to see that the bridge's port is up, and gives the bridge its link-local address then.
    fn wait_until_connected(&self) -> Result<()> {
        let deadline = Instant::now() + CONNECTED_LIMIT;
        let asked = ["-6", "addr", "show", "dev", BRIDGE, "scope", "link"];
        while !self.host.output("ip", &asked)?.contains("fe80:") {
            if Instant::now() >= deadline {
                bail!("The bridge of site {} has no link", self.spec.name);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// What every machine has: IPv6 without waiting for duplicate detection, bridges that do not ask the firewall, and TCP
/// buffers for a long fat path.
fn prepare(namespace: &Namespace) -> Result<()> {
    for (key, value) in [
        ("net.ipv6.conf.all.disable_ipv6", "0"),
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_ra", "0"),
        ("net.ipv4.tcp_rmem", "4096 131072 33554432"),
        ("net.ipv4.tcp_wmem", "4096 131072 33554432"),
    ] {
        namespace.sysctl(key, value)?;
    }
    // On a real host br_netfilter is not loaded; a kernel with it built in asks the firewall about every bridged frame.
    for family in ["iptables", "ip6tables", "arptables"] {
        namespace.sysctl_if_present(&format!("net.bridge.bridge-nf-call-{family}"), "0")?;
    }
    Ok(())
}

fn forward(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("net.ipv4.ip_forward", "1")?;
    namespace.sysctl("net.ipv6.conf.all.forwarding", "1")
}

fn link(one: &Namespace, one_device: &str, other: &Namespace, other_device: &str) -> Result<()> {
    let (one, other) = (one.name(), other.name());
    let line = format!("link add {one_device} netns {one} type veth peer name {other_device} netns {other}");
    exec::run_with_input("ip", &["-batch", "-"], &line).map(drop)
}

/// Connects a machine of the internet: `.1` of its network is the core.
fn connect_edge(net: &Namespace, edge: &Namespace, device: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
    let [a, b, c, _] = v4.octets();
    let core = Ipv4Addr::new(a, b, c, 1);
    let [first, second, third, ..] = v6.segments();
    let core6 = Ipv6Addr::new(first, second, third, 0, 0, 0, 0, 1);
    link(net, device, edge, HOST_DEVICE)?;
    net.ip(&[
        format!("addr add {core}/24 dev {device}"),
        format!("addr add {core6}/64 dev {device} nodad"),
        format!("link set {device} up"),
    ])?;
    edge.ip(&[
        format!("addr add {v4}/24 dev {HOST_DEVICE}"),
        format!("addr add {v6}/64 dev {HOST_DEVICE} nodad"),
        format!("link set {HOST_DEVICE} up"),
        format!("route add default via {core}"),
        format!("route add default via {core6}"),
    ])
}
