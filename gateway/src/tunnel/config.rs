//! Names, numbers and limits of the tunnel, with their defaults and what they cost.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use longhaul_core::migration::message::MAX_CARRIED;
use longhaul_core::tunnel::datapath::DatapathConfig;

use super::error::TunnelError;

/// Everything that can be chosen about the tunnel.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// The TUN device all tunnels of this gateway share. Default `lh0`.
    pub device: String,
    /// An address for it that nobody uses and that is never a source: without one, hosts with a reverse
    /// path filter refuse what comes out of the device. Default 192.0.0.8 (RFC 7600's dummy address).
    pub device_address: Ipv4Addr,
    /// Its MTU in bytes: that of the LANs the machines live on. Default 1500. A larger one splits more.
    pub mtu: u16,
    /// Packets the device queues while the gateway is busy. Default 4096: at most 6 MiB, or 256 MiB if all of them are
    /// super-packets, which takes TCP windows as large.
    pub device_queue: u32,
    /// The device outlives the gateway, so that packets are dropped silently while it restarts instead
    /// of being answered with "unreachable", which would reset connections. Default true.
    pub persistent: bool,
    /// Packets a machine's tap queues while the machine does not read, at most 12 MiB. Default 8192.
    pub tap_queue: u32,
    /// What all our nft tables (`PREFIX_...`) and taps (`PREFIX-...`) begin with: 1 to 4 lower-case
    /// letters. Default `lh`. `undo_all` removes what begins so.
    pub prefix: String,
    /// The routing table whose default route is the tunnel. Default 7100.
    pub route_table: u32,
    /// The routing table of the ways to visitors, which is looked up for what carries `mark_visitor` alone: this host's LAN
    /// may have the same private addresses. Default 7101.
    pub visit_table: u32,
    /// The priority of the policy rules that lead into the tunnel; the next one is ours, too, and leads to visitors.
    /// Default 95. Where this host has an address of a visitor's home, those into the tunnel come before all others.
    pub rule_priority: u32,
    /// The connection mark of flows that leave locally. The marks' defaults keep clear of the bits that Kubernetes, Cilium,
    /// Calico and Tailscale test. Default 0x1041.
    pub mark_local: u32,
    /// The connection and packet mark of flows that go back through the tunnel. Default 0x1042. Flows by addresses of
    /// earlier visits have the marks behind it, one for each address that a machine may bring.
    pub mark_tunnel: u32,
    /// The packet mark of what goes to a visitor. Default 0x1040.
    pub mark_visitor: u32,
    /// The routing protocol number by which our routes, rules and neighbours are told from others'.
    /// Default 176; `/etc/iproute2/rt_protos` may name it.
    pub route_protocol: u8,
    /// How long a TCP flow is remembered by the sampler and at the visited site. Default 2 h 4 min.
    pub tcp_flow_timeout: Duration,
    /// The same for UDP, at the sampler. Default 5 min.
    pub udp_flow_timeout: Duration,
    /// Flows sampled and handed over per NIC. Default 65535, about 8 MiB of kernel memory when full.
    pub max_flows: u32,
    /// A file that says what sysctls were before they were set, so that the gateway that follows one that
    /// crashed can put them back. Default none: they then stay set after a crash. Choose one under `/run`,
    /// as a reboot resets them anyway; its folder must exist.
    pub switches_file: Option<PathBuf>,
    /// When addresses are announced.
    pub announce: AnnounceConfig,
    /// How often a visitor hears the routers of its home, if nothing they say runs out sooner. Default 200 s.
    pub router_advertisements: Duration,
    /// An address that is attracted here and that another host uses is that host's until it was silent for this long,
    /// although it was asked. Default 60 s.
    pub duplicate_silent: Duration,
    /// How often it is looked whether what was changed on the host still stands: as long does a reload of its firewall
    /// interrupt visitors. Default 10 s.
    pub reassert_interval: Duration,
    /// How often the status is published while nothing happens. Default 200 ms.
    pub status_interval: Duration,
    /// Bounds of what is held, joined and tracked.
    pub datapath: DatapathConfig,
}

/// When gratuitous announcements are sent: a burst, then every second for a while, then rarely, as
/// neighbours whose cache lost the address may have missed all of the earlier ones.
#[derive(Debug, Clone)]
pub struct AnnounceConfig {
    /// Offsets of the burst. Default 0, 50, 150, 300 and 550 ms.
    pub burst: Vec<Duration>,
    /// Announcements at one per second after it. Default 10.
    pub every_second: u32,
    /// The interval after those. Default 30 s.
    pub then_every: Duration,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            device: "lh0".to_owned(),
            device_address: Ipv4Addr::new(192, 0, 0, 8),
            mtu: 1500,
            device_queue: 4096,
            persistent: true,
            tap_queue: 8192,
            prefix: "lh".to_owned(),
            route_table: 7100,
            visit_table: 7101,
            rule_priority: 95,
            mark_local: 0x1041,
            mark_tunnel: 0x1042,
            mark_visitor: 0x1040,
            route_protocol: 176,
            tcp_flow_timeout: Duration::from_secs(7440),
            udp_flow_timeout: Duration::from_secs(300),
            max_flows: 65_535,
            switches_file: None,
            announce: AnnounceConfig::default(),
            router_advertisements: Duration::from_secs(200),
            duplicate_silent: Duration::from_secs(60),
            reassert_interval: Duration::from_secs(10),
            status_interval: Duration::from_millis(200),
            datapath: DatapathConfig::default(),
        }
    }
}

impl Default for AnnounceConfig {
    fn default() -> Self {
        let burst = [0, 50, 150, 300, 550].map(Duration::from_millis).to_vec();
        Self { burst, every_second: 10, then_every: Duration::from_secs(30) }
    }
}

impl TunnelConfig {
    /// Refuses values that would collide or that the kernel would refuse later.
    pub fn check(&self) -> Result<(), TunnelError> {
        check_device_name(&self.device)?;
        let prefix_ok =
            (1..=4).contains(&self.prefix.len()) && self.prefix.bytes().all(|b| b.is_ascii_lowercase());
        if !prefix_ok {
            return Err(TunnelError::Config("prefix must be 1 to 4 lower-case letters"));
        }
        let tunnel = self.mark_tunnel..=self.mark_tunnel.saturating_add(MAX_CARRIED as u32);
        let others = [self.mark_local, self.mark_visitor];
        let clash = others.iter().any(|mark| *mark == 0 || tunnel.contains(mark));
        if clash || self.mark_tunnel == 0 || self.mark_local == self.mark_visitor {
            return Err(TunnelError::Config(
                "mark_local and mark_visitor must differ from each other, from mark_tunnel and from the 16 marks behind \
                 it, and none may be 0",
            ));
        }
        let tables = [self.route_table, self.visit_table];
        if tables.iter().any(|table| matches!(table, 0 | 253..=255)) || tables[0] == tables[1] {
            return Err(TunnelError::Config(
                "route_table and visit_table must be two of our own, not 0 or 253 to 255",
            ));
        }
        if !(1..32_765).contains(&self.rule_priority) {
            return Err(TunnelError::Config(
                "rule_priority must be 1 to 32764, between the kernel's own rules",
            ));
        }
        if self.route_protocol < 5 {
            return Err(TunnelError::Config("route_protocol must be 5 or more; lower ones are the kernel's"));
        }
        if self.mtu < 1280 {
            return Err(TunnelError::Config("mtu must be 1280 or more, IPv6's minimum"));
        }
        Ok(())
    }
}

/// Refuses what the kernel would not take as a device name, and what would end a quoted nft string.
pub(super) fn check_device_name(name: &str) -> Result<(), TunnelError> {
    let fits = (1..=15).contains(&name.len()) && name != "." && name != "..";
    let plain = name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b'"' | b'\\' | b':' | b'*'));
    if fits && plain { Ok(()) } else { Err(TunnelError::InvalidDeviceName(name.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        TunnelConfig::default().check().unwrap();
    }

    #[test]
    fn colliding_values_are_refused() {
        let refused = |change: fn(&mut TunnelConfig)| {
            let mut config = TunnelConfig::default();
            change(&mut config);
            config.check().is_err()
        };
        assert!(refused(|c| c.mark_local = c.mark_tunnel));
        assert!(refused(|c| c.mark_local = c.mark_tunnel + MAX_CARRIED as u32));
        assert!(!refused(|c| c.mark_local = c.mark_tunnel + MAX_CARRIED as u32 + 1));
        assert!(refused(|c| c.mark_visitor = c.mark_local));
        assert!(refused(|c| c.mark_visitor = c.mark_tunnel));
        assert!(refused(|c| c.route_table = 254));
        assert!(refused(|c| c.visit_table = 254));
        assert!(refused(|c| c.visit_table = c.route_table));
        assert!(refused(|c| c.rule_priority = 0) && refused(|c| c.rule_priority = 32_765));
        assert!(refused(|c| c.prefix = "LH".to_owned()));
        assert!(refused(|c| c.device = "a-name-of-sixteen".to_owned()));
        assert!(refused(|c| c.device = "a\"b".to_owned()));
        assert!(refused(|c| c.mtu = 1279));
        assert!(refused(|c| c.route_protocol = 4));
    }
}
