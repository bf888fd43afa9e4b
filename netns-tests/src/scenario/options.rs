//! What can be chosen about a scene.

use std::time::Duration;

use anyhow::{Result, bail};
use gateway::config::ArbiterChoice;

use crate::wan::WanProfile;

/// What a scene is like. The defaults are the demo's.
#[derive(Debug, Clone)]
pub struct SceneOptions {
    /// The folder below `target/lab` for its report and logs.
    pub name: String,
    /// The WAN between the sites.
    pub rate_mbit: f64,
    /// Its round trip.
    pub rtt: Duration,
    /// Its random loss, 0 to 1.
    pub loss: f64,
    /// Its jitter, one way.
    pub jitter: Duration,
    /// Guest memory.
    pub memory_mib: u64,
    /// The guest's root disk.
    pub disk_bytes: u64,
    /// A second disk and a second NIC.
    pub two_of_each: bool,
    /// KiB of memory the guest dirties per second.
    pub dirty_memory_kib_per_s: u64,
    /// KiB of disk the guest rewrites per second.
    pub dirty_disk_kib_per_s: u64,
    /// The name server.
    pub dns: DnsServer,
    /// The name's TTL before and after the move.
    pub ttl_s: u32,
    /// Lines for `[migration]` of both sites' configuration.
    pub migration: Vec<String>,
    /// How long nobody may have opened a connection to the home address before the tunnel ends.
    pub quiet_s: u64,
    /// How long a connection that one end has closed counts: four minutes by default, which are proved in virtual time.
    pub closing_s: u64,
    /// Size of the file whose blocks the guest rewrites.
    pub dirt_bytes: u64,
    /// A third site, c.
    pub third_site: bool,
    /// Home and care-of addresses of both IP versions.
    pub dual_stack: bool,
    /// The guest learns its IPv6 router from what that says of itself, and knows none otherwise.
    pub router_advertised: bool,
    /// The guest boots again when its QEMU has crashed.
    pub restart_on_crash: bool,
    /// A guest whose kernel makes it hard: it takes packets only from where it would send to, answers ARP only within
    /// its own subnet, and never forgets its router's link-layer address.
    pub strict_guest: bool,
    /// A DHCP client in the guest.
    pub dhcp_client: bool,
    /// The routers let no ICMP through and send none: nobody hears that a packet was too large.
    pub mute_icmp: bool,
    /// Sites whose router translates the gateway's address and lets nobody in who was not spoken to first.
    pub behind_nat: Vec<String>,
    /// Lines for `[link]` of all sites' configuration.
    pub link: Vec<String>,
    /// Lines for `[tunnel]` of all sites' configuration.
    pub tunnel: Vec<String>,
    /// The guests' root disks are clones of a template. Each site has a folder for it, and may tell the others of it.
    pub cloned: bool,
    /// What arbitrates. Both sites have the name server's key where it is the name server.
    pub arbiter: ArbiterChoice,
}

/// The name server of a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DnsServer {
    /// hickory, embedded.
    Hickory,
    /// Debian's BIND 9.
    Bind9,
}

impl Default for SceneOptions {
    fn default() -> Self {
        Self {
            name: "demo".into(),
            rate_mbit: 100.0,
            rtt: Duration::from_millis(100),
            loss: 0.001,
            jitter: Duration::ZERO,
            memory_mib: 256,
            disk_bytes: 1 << 30,
            two_of_each: false,
            dirty_memory_kib_per_s: 1024,
            dirty_disk_kib_per_s: 128,
            dns: DnsServer::Hickory,
            ttl_s: 20,
            migration: Vec::new(),
            quiet_s: 3,
            closing_s: 20,
            dirt_bytes: 64 << 20,
            third_site: false,
            dual_stack: false,
            router_advertised: false,
            restart_on_crash: false,
            strict_guest: false,
            dhcp_client: false,
            mute_icmp: false,
            behind_nat: Vec::new(),
            link: Vec::new(),
            tunnel: Vec::new(),
            cloned: false,
            arbiter: ArbiterChoice::None,
        }
    }
}

impl SceneOptions {
    /// A small machine on a WAN that loses nothing, for tests: two hosts, two machines and a client share few cores, and a
    /// faster copy would starve a guest that has no hardware help.
    pub fn small(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            rate_mbit: 100.0,
            rtt: Duration::from_millis(20),
            loss: 0.0,
            memory_mib: 128,
            disk_bytes: 512 << 20,
            ..Self::default()
        }
    }

    /// The WAN as the emulator wants it.
    pub fn wan(&self) -> WanProfile {
        WanProfile::symmetric(self.rate_mbit, self.rtt, self.loss).with_jitter(self.jitter)
    }
}

/// A rate like `100mbit`, `1gbit`, `500kbit`, in Mbit/s.
pub fn parse_rate(text: &str) -> Result<f64> {
    let units = [("gbit", 1000.0), ("mbit", 1.0), ("kbit", 0.001)];
    for (unit, factor) in units {
        if let Some(number) = text.strip_suffix(unit) {
            let rate = number.trim().parse::<f64>()? * factor;
            if rate > 0.0 {
                return Ok(rate);
            }
        }
    }
    bail!("{text:?} is no rate; expected something like 100mbit, 1gbit or 500kbit")
}

/// A time like `100ms` or `2s`.
pub fn parse_time(text: &str) -> Result<Duration> {
    if let Some(number) = text.strip_suffix("ms") {
        return Ok(Duration::from_secs_f64(number.trim().parse::<f64>()? / 1e3));
    }
    if let Some(number) = text.strip_suffix('s') {
        return Ok(Duration::from_secs_f64(number.trim().parse()?));
    }
    bail!("{text:?} is no time; expected something like 100ms or 2s")
}

/// A share like `0.1%`, as 0 to 1.
pub fn parse_share(text: &str) -> Result<f64> {
    let share = match text.strip_suffix('%') {
        Some(number) => number.trim().parse::<f64>()? / 100.0,
        None => text.parse()?,
    };
    if !(0.0..1.0).contains(&share) {
        bail!("{text:?} is no share; expected something like 0.1%")
    }
    Ok(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_times_and_shares_are_read_with_their_units() {
        assert_eq!(parse_rate("5mbit").unwrap(), 5.0);
        assert_eq!(parse_rate("1gbit").unwrap(), 1000.0);
        assert_eq!(parse_time("100ms").unwrap(), Duration::from_millis(100));
        assert!((parse_share("0.1%").unwrap() - 0.001).abs() < 1e-9);
        assert!(parse_rate("5").is_err() && parse_time("5").is_err() && parse_share("200%").is_err());
    }
}
