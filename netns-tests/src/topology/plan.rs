//! Names and addresses of the world, before anything of it exists. Only documentation and benchmark ranges
//! (RFC 5737, RFC 2544, RFC 3849).

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::wan::{Emulator, PacketClass, PacketMatch, WanProfile};

/// One site's names and addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteSpec {
    /// Short: it becomes part of interface names.
    pub name: String,
    /// Tells uplinks and IPv6 networks of the sites apart; 1 to 50.
    pub number: u8,
    /// The LAN's network address.
    pub lan: Ipv4Addr,
    /// Its prefix length.
    pub lan_prefix: u8,
}

impl SiteSpec {
    /// Site a: 198.51.100.0/24.
    pub fn a() -> Self {
        Self { name: "a".to_owned(), number: 1, lan: Ipv4Addr::new(198, 51, 100, 0), lan_prefix: 24 }
    }

    /// Site b: 203.0.113.0/24.
    pub fn b() -> Self {
        Self { name: "b".to_owned(), number: 2, lan: Ipv4Addr::new(203, 0, 113, 0), lan_prefix: 24 }
    }

    /// Site c: 198.18.103.0/24.
    pub fn c() -> Self {
        Self { name: "c".to_owned(), number: 3, lan: Ipv4Addr::new(198, 18, 103, 0), lan_prefix: 24 }
    }

    /// Address `number` on the LAN.
    pub fn address(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.lan.to_bits() + u32::from(number))
    }

    /// The router on the LAN: `.1`.
    pub fn router_address(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// The hypervisor host on the LAN: `.2`.
    pub fn host_address(&self) -> Ipv4Addr {
        self.address(2)
    }

    /// The LAN as network and prefix length.
    pub fn lan_network(&self) -> String {
        format!("{}/{}", self.lan, self.lan_prefix)
    }

    /// Address `number` on the IPv6 LAN, `2001:db8:a<number>::/64`.
    pub fn address6(&self, number: u8) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xa00 + u16::from(self.number), 0, 0, 0, 0, number.into())
    }

    /// The IPv6 LAN as network and prefix length.
    pub fn lan_network6(&self) -> String {
        format!("{}/64", self.address6(0))
    }

    /// The core's end of the uplink.
    pub fn core_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 1)
    }

    /// The router's end of the uplink.
    pub fn uplink_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, self.number, 2)
    }

    /// The uplink as network and prefix length.
    pub fn uplink_network(&self) -> String {
        format!("198.18.{}.0/30", self.number)
    }

    /// The core's end of the uplink, IPv6.
    pub fn core_address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xf00 + u16::from(self.number), 0, 0, 0, 0, 1)
    }

    /// The router's end of the uplink, IPv6.
    pub fn uplink_address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xf00 + u16::from(self.number), 0, 0, 0, 0, 2)
    }

    /// The uplink as IPv6 network and prefix length.
    pub fn uplink_network6(&self) -> String {
        format!("2001:db8:{:x}::/64", 0xf00 + u16::from(self.number))
    }

    /// The core's interface to this site.
    pub fn uplink_device(&self) -> String {
        format!("up-{}", self.name)
    }
}

/// What world to build.
#[derive(Clone, Debug)]
pub struct WorldSpec {
    /// The sites.
    pub sites: Vec<SiteSpec>,
    /// The site whose uplink is the emulated WAN.
    pub wan_site: String,
    /// What the WAN does at first.
    pub wan: WanProfile,
    /// What emulates it.
    pub emulator: Emulator,
    /// What the WAN counts apart.
    pub classes: Vec<PacketClass>,
    /// The gateways' UDP port; the firewalls admit it.
    pub gateway_port: u16,
    /// TCP ports that the firewalls admit from the internet.
    pub open_tcp_ports: Vec<u16>,
    /// UDP ports that the firewalls admit from the internet, beside the gateways'.
    pub open_udp_ports: Vec<u16>,
    /// Sites behind a NAT: their router gives the gateway's packets its own address, keeps its port where that is free,
    /// and admits none that begin outside.
    pub behind_nat: Vec<String>,
    /// The routers drop all ICMP, their own included.
    pub mute_icmp: bool,
}

impl WorldSpec {
    /// Sites a and b, the WAN at b, the gateways' port counted apart as class `gateways`.
    pub fn two_sites(wan: WanProfile, emulator: Emulator, gateway_port: u16) -> Self {
        Self {
            sites: vec![SiteSpec::a(), SiteSpec::b()],
            wan_site: "b".to_owned(),
            wan,
            emulator,
            classes: vec![PacketClass::new("gateways", PacketMatch::udp_port(gateway_port))],
            gateway_port,
            open_tcp_ports: vec![22, 80, 7000, 7001, 7002],
            open_udp_ports: Vec::new(),
            behind_nat: Vec::new(),
            mute_icmp: false,
        }
    }

    /// The demo's default: 100 Mbit/s, 100 ms, 0.1 % loss.
    pub fn default_wan() -> WanProfile {
        WanProfile::symmetric(100.0, Duration::from_millis(100), 0.001)
    }

    pub(super) fn check(&self) -> Result<()> {
        for (index, site) in self.sites.iter().enumerate() {
            if site.name.is_empty()
                || site.name.len() > 8
                || !site.name.bytes().all(|b| b.is_ascii_alphanumeric())
            {
                bail!("Site name {:?} must have 1 to 8 letters or digits", site.name);
            }
            if !(1..=50).contains(&site.number) || !(16..=29).contains(&site.lan_prefix) {
                bail!("Site {} needs a number from 1 to 50 and a LAN from /16 to /29", site.name);
            }
            let mut others = self.sites[..index].iter();
            if others.any(|other| other.number == site.number || other.name == site.name) {
                bail!("Two sites share the name {} or the number {}", site.name, site.number);
            }
        }
        if !self.sites.iter().any(|site| site.name == self.wan_site) {
            bail!("The WAN belongs to site {}, which is not among the sites", self.wan_site);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_the_site() {
        let b = SiteSpec::b();
        assert_eq!(b.host_address().to_string(), "203.0.113.2");
        assert_eq!(b.address(200).to_string(), "203.0.113.200");
        assert_eq!(b.uplink_network(), "198.18.2.0/30");
        assert_eq!(b.lan_network6(), "2001:db8:a02::/64");
    }

    #[test]
    fn impossible_worlds_are_refused() {
        let world = WorldSpec::two_sites(WorldSpec::default_wan(), Emulator::Userspace, 4433);
        assert!(world.check().is_ok());
        let twice = WorldSpec { sites: vec![SiteSpec::a(), SiteSpec::b(), SiteSpec::a()], ..world.clone() };
        assert!(twice.check().is_err());
        let elsewhere = WorldSpec { wan_site: "z".to_owned(), ..world };
        assert!(elsewhere.check().is_err());
    }
}
