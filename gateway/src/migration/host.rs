//! What this host needs of its network, gathered: a machine that has one of these addresses does not move
//! through it. What follows from the facts is the core's to say.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::machine::MachineDefinition;
use longhaul_core::tunnel::host::{HomeNeeded, HostAddresses};

use super::Edges;
use crate::tunnel::TunnelError;

/// Where the C library finds the name servers it asks (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What a host needs where the machine is at home, and its home addresses are routed to the tunnel while it is away.
pub(super) async fn as_home(edges: &Edges) -> Result<HostAddresses, TunnelError> {
    let mut host = as_visited(edges).await?;
    host.routers = edges.tunnel.host_addresses().await?.routers;
    host.name_servers = asked_here();
    let updated = edges.config.dns.iter().flat_map(|dns| &dns.servers);
    host.name_servers.extend(updated.map(|server| server.ip().to_canonical()));
    Ok(host)
}

/// What a host needs where the machine visits. The way to it is one of its own: routers, name servers and stations of
/// this LAN may have its home addresses.
pub(super) async fn as_visited(edges: &Edges) -> Result<HostAddresses, TunnelError> {
    let config = &edges.config;
    let own = edges.tunnel.host_addresses().await?.own;
    let mut host = HostAddresses { own, ..HostAddresses::default() };
    for peer in &config.peer {
        let now = edges.peer(&peer.name).and_then(|peer| peer.remote()).map(|(remote, _)| remote);
        let addresses = [peer.address, now].into_iter().flatten();
        host.peers.extend(addresses.map(|address| (address.ip().to_canonical(), peer.name.clone())));
    }
    // A pool that does not parse gives nobody an address.
    host.care_of = config.lan.values().filter_map(|lan| lan.care_of_addresses().ok()).flatten().collect();
    Ok(host)
}

/// Whether the machine's home addresses can be routed here.
pub(super) fn check(host: &HostAddresses, definition: &MachineDefinition) -> Result<(), HomeNeeded> {
    host.check(definition.nics.iter().flat_map(|nic| nic.home.iter().map(|home| home.addr)))
}

/// The name servers that this host asks.
pub(super) fn asked_here() -> BTreeSet<IpAddr> {
    // Without the file the C library asks this host itself.
    resolvers(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

fn resolvers(resolv_conf: &str) -> BTreeSet<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver"));
    // A link-local server carries its device after a percent sign.
    servers.filter_map(|server| server.trim().split('%').next()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_c_library_reads_them() {
        let text = "# nameserver 192.0.2.9\nsearch example.net\nnameserver 192.0.2.53\n nameserver\tfe80::1%eth0\n\
            nameserver nonsense\n";
        let expected = ["192.0.2.53", "fe80::1"].map(|address| address.parse().unwrap());
        assert_eq!(resolvers(text), BTreeSet::from(expected));
    }
}
