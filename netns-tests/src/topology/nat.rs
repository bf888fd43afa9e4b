//! A router that translates its gateway's address: as a site has it that may speak to others but is not spoken to. The
//! machines' own addresses are not translated.

use std::net::{IpAddr, SocketAddrV4};

use anyhow::{Context, Result};

use super::filters::flush_conntrack;
use super::{Site, UPLINK_DEVICE, World};

/// Marks what is translated in the router's table of connections.
const MARK: u32 = 1;

impl World {
    /// The NAT forgets what it has translated for the gateway, as after its restart.
    pub fn forget_translations(&self, site: &str) -> Result<()> {
        let router = &self.site(site)?.router;
        router.run(|| flush_conntrack(Some(MARK)))?.context("Cannot flush the table of translations")
    }

    /// The site's provider gives it another public address: what its gateway says to `to` comes from `public` from now on,
    /// and answers to its address of before go nowhere.
    pub fn renumber(&self, site: &str, to: IpAddr, public: SocketAddrV4) -> Result<()> {
        let Site { spec, router, .. } = self.site(site)?;
        router.nft(&format!(
            "table ip lab_renumbered {{\n  chain c_out {{\n    \
             type nat hook postrouting priority 90;\n    \
             oifname \"{UPLINK_DEVICE}\" ip saddr {} ip daddr {to} meta l4proto udp ct mark set {MARK} snat to {public}\n  \
             }}\n}}\n",
            spec.host_address()
        ))?;
        self.forget_translations(site)
    }
}

/// Gives the gateway's packets the router's own address. What comes to that address uninvited is dropped before it makes
/// an entry that would take the port away from the gateway.
pub(super) fn translate(site: &Site, gateway_port: u16) -> Result<()> {
    let host = site.spec.host_address();
    site.router.nft(&format!(
        "table ip lab_nat {{
  chain c_out {{
    type nat hook postrouting priority 100;
    oifname \"{UPLINK_DEVICE}\" ip saddr {host} udp sport {gateway_port} ct mark set {MARK} masquerade
    oifname \"{UPLINK_DEVICE}\" ip saddr {host} masquerade
  }}
  chain c_in {{
    type filter hook input priority 0; policy accept;
    iifname \"{UPLINK_DEVICE}\" meta l4proto {{ tcp, udp }} drop
  }}
}}
"
    ))
}
