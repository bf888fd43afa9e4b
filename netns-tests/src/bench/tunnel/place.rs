//! Where tunnels are compared: two hosts and the path between them, and a guest behind the second.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::cleanup::Lab;
use crate::exec;
use crate::netns::Namespace;
use crate::wan::{Emulator, Wan, WanEnd, WanProfile, WanSpec};

/// The first host, outside of all tunnels.
pub(super) const A: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The second host.
pub(super) const B: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// The home LAN's address of the first host.
pub(super) const HOME_HOST: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 1);
/// The guest's address, of the same LAN.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 10);
/// The guest's link-layer address.
pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x90, 0, 0x10];
/// The bridge on both hosts.
pub(super) const BRIDGE: &str = "br0";
/// The guest's port on the second host.
pub(super) const GUEST_PORT: &str = "port0";
const PATH_DEVICE: &str = "path0";

/// The rate of the long path, in Mbit/s.
pub(super) const LOSSY_MBIT: u64 = 500;
const LOSSY_RTT: Duration = Duration::from_millis(100);
const LOSSY_LOSS: f64 = 0.001;

/// The path between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Path {
    /// A veth pair.
    Clean,
    /// 500 Mbit/s, 100 ms, 0.1 % loss.
    Lossy,
}

impl Path {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Lossy => "lossy",
        }
    }

    /// How long a sender looks for the rate before it is measured: at a round trip of 100 ms a CUBIC sender that takes a
    /// delay for a full queue needs some 7 s.
    pub(super) fn unseen(self) -> Duration {
        match self {
            Self::Clean => Duration::ZERO,
            Self::Lossy => Duration::from_secs(8),
        }
    }
}

/// The namespaces; dropping it removes them.
#[derive(Debug)]
pub(super) struct Place {
    // Ends before its namespaces are removed.
    wan: Option<Wan>,
    pub path: Path,
    pub a: Namespace,
    pub b: Namespace,
    servers: Vec<Child>,
    lab: Lab,
}

impl Place {
    /// Builds the hosts and the path, and starts iperf3's servers.
    pub fn build(path: Path) -> Result<Self> {
        let lab = Lab::start()?;
        let [a, b, guest] = [lab.namespace("a")?, lab.namespace("b")?, lab.namespace("guest")?];
        for namespace in [&a, &b, &guest] {
            prepare(namespace)?;
        }
        let wan = match path {
            Path::Clean => {
                connect(&a, PATH_DEVICE, &b, PATH_DEVICE)?;
                None
            }
            Path::Lossy => Some(emulate(&a, &b)?),
        };
        for (namespace, address) in [(&a, A), (&b, B)] {
            namespace.ip(&[
                format!("addr add {address}/24 dev {PATH_DEVICE}"),
                format!("link set {PATH_DEVICE} up"),
                format!("link add {BRIDGE} type bridge"),
                format!("link set {BRIDGE} up"),
            ])?;
        }
        a.ip(&[format!("addr add {HOME_HOST}/24 dev {BRIDGE}")])?;
        // As every host has one: a source without any route to it is refused.
        b.ip(&[format!("route add default via {A}")])?;
        connect_guest(&b, &guest)?;
        let servers = vec![serve(&b)?, serve(&guest)?];
        Ok(Self { wan, path, a, b, servers, lab })
    }

    /// Removes everything; fails if something is left.
    pub fn close(mut self) -> Result<()> {
        for server in &mut self.servers {
            server.kill()?;
            server.wait()?;
        }
        drop(self.wan);
        let left = self.lab.close();
        if left.is_empty() { Ok(()) } else { bail!("The benchmark leaves behind: {}", left.join(", ")) }
    }

    /// A short name that is this place's alone, for a device.
    pub fn device(&self, name: &str) -> String {
        format!("{}{name}", self.lab.id())
    }

    /// The folder for files.
    pub fn scratch(&self) -> &std::path::Path {
        self.lab.scratch()
    }
}

fn prepare(namespace: &Namespace) -> Result<()> {
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv4.tcp_rmem", "4096 131072 33554432"),
        ("net.ipv4.tcp_wmem", "4096 131072 33554432"),
        ("net.ipv6.conf.all.disable_ipv6", "0"),
        ("net.ipv4.conf.default.rp_filter", "2"),
    ] {
        namespace.sysctl(key, value)?;
    }
    Ok(())
}

fn connect(one: &Namespace, one_device: &str, other: &Namespace, other_device: &str) -> Result<()> {
    let line = format!(
        "link add {one_device} netns {} type veth peer name {other_device} netns {}",
        one.name(),
        other.name()
    );
    exec::run_with_input("ip", &["-batch", "-"], &line).map(drop)
}

fn emulate(a: &Namespace, b: &Namespace) -> Result<Wan> {
    let end = |namespace: &Namespace| WanEnd { namespace: namespace.clone(), device: PATH_DEVICE.to_owned() };
    Wan::build(WanSpec {
        near: end(a),
        far: end(b),
        profile: WanProfile::symmetric(LOSSY_MBIT as f64, LOSSY_RTT, LOSSY_LOSS),
        classes: Vec::new(),
        emulator: Emulator::detect()?,
    })
}

fn connect_guest(b: &Namespace, guest: &Namespace) -> Result<()> {
    connect(b, GUEST_PORT, guest, "eth0")?;
    b.ip(&[format!("link set {GUEST_PORT} up")])?;
    let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    guest.ip(&[
        format!("link set eth0 address {mac}"),
        format!("addr add {GUEST}/24 dev eth0"),
        "link set eth0 up".to_owned(),
        format!("route add default via {HOME_HOST}"),
    ])
}

fn serve(namespace: &Namespace) -> Result<Child> {
    let mut command = Command::new("iperf3");
    command.args(["--server"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    namespace.spawn(&mut command)
}

/// An IPv4 address as any address.
pub(super) fn ip(address: Ipv4Addr) -> IpAddr {
    address.into()
}
