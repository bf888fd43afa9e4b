//! The servers of a machine's home, gathered: what its operator says, or what is seen of them. Which of those the machine
//! goes on asking there is the core's to say.

use std::collections::BTreeSet;
use std::net::IpAddr;

use longhaul_core::machine::Nic;
use longhaul_core::migration::message::Refusal;
use longhaul_core::tunnel::handover::{FlowTuple, Neighbour, Prefix};
use longhaul_core::tunnel::home_servers::{KnownServers, home_prefixes, left_behind};
use longhaul_core::tunnel::policy::PortKey;

use super::{Edges, MachineRow, chain, host};

/// What a NIC of a machine at its home reaches through the tunnel once it has left. `neighbours` are those of its LAN.
pub(super) async fn prefixes(
    edges: &Edges,
    row: &MachineRow,
    nic: &Nic,
    neighbours: &[Neighbour],
) -> Result<Vec<Prefix>, Refusal> {
    prefixes_among(edges, nic, neighbours, sampled(edges, row, nic).await, host::asked_here())
}

/// The same, as far as it is known without the machine and its LAN.
pub(super) fn known(edges: &Edges, nic: &Nic) -> Result<Vec<Prefix>, Refusal> {
    prefixes_among(edges, nic, &[], Vec::new(), host::asked_here())
}

/// Private addresses at which a machine at its home was seen to use a service, and its port, that it does not reach through
/// the tunnel once it has left.
pub(crate) async fn not_reached(edges: &Edges, row: &MachineRow) -> BTreeSet<(IpAddr, u16)> {
    let mut all = BTreeSet::new();
    for nic in &row.definition.nics {
        let neighbours = match edges.config.lan.get(nic.lan.as_str()) {
            Some(lan) => edges.tunnel.home_neighbours(lan.bridge.clone()).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let flows = sampled(edges, row, nic).await;
        let prefixes = prefixes_among(edges, nic, &neighbours, flows.clone(), host::asked_here());
        // The configuration was checked when it was read.
        all.extend(prefixes.map(|prefixes| left_behind(&prefixes, &flows)).unwrap_or_default());
    }
    all
}

fn prefixes_among(
    edges: &Edges,
    nic: &Nic,
    neighbours: &[Neighbour],
    flows: Vec<FlowTuple>,
    resolvers: BTreeSet<IpAddr>,
) -> Result<Vec<Prefix>, Refusal> {
    if let Some(configured) = &edges.config.tunnel.home_prefixes {
        return configured.iter().map(|text| parse_prefix(text)).collect();
    }
    let advertised = neighbours.iter().filter_map(Neighbour::advertises);
    let advertised = advertised.flat_map(|(_, said)| said.name_servers()).map(IpAddr::from).collect();
    Ok(home_prefixes(&nic.home, &KnownServers { flows, advertised, resolvers }))
}

/// The flows that the guest was seen to have. A move does not depend on them.
async fn sampled(edges: &Edges, row: &MachineRow, nic: &Nic) -> Vec<FlowTuple> {
    let key = PortKey { machine: row.definition.name.clone(), nic: nic.name.clone() };
    edges.tunnel.sample(key).await.unwrap_or_else(|error| {
        tracing::debug!(vm = %row.definition.name, nic = %nic.name, error = chain(&error), "nobody knows which servers the guest asks");
        Vec::new()
    })
}

fn parse_prefix(text: &str) -> Result<Prefix, Refusal> {
    crate::config::parse_prefix(text)
        .ok_or_else(|| Refusal::Other(format!("tunnel.home_prefixes: {text:?} is not ADDRESS/LENGTH")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use longhaul_core::tunnel::advertisement::Advertisement;
    use longhaul_core::tunnel::handover::{Mac, NeighbourKind};

    use super::*;
    use crate::identity::Identity;
    use crate::test_site::{TestSite, machine_row};
    use crate::tunnel::{Tunnel, TunnelError};

    fn prefix(text: &str) -> Prefix {
        crate::config::parse_prefix(text).unwrap()
    }

    fn flow(remote: &str, remote_port: u16) -> FlowTuple {
        let (local, local_port) = ("198.51.100.10".parse().unwrap(), 40_000);
        FlowTuple { protocol: 17, local, local_port, remote: remote.parse().unwrap(), remote_port }
    }

    /// Site a, at which the guest of web1 was seen to have these flows.
    async fn seen(flows: Option<Vec<FlowTuple>>) -> (TestSite, Edges, MachineRow) {
        let site = TestSite::open("a", &Identity::generate().unwrap(), &[]).await;
        let (tunnel, _) =
            Tunnel::noted_with(move |key| flows.clone().ok_or_else(|| TunnelError::NotSampled(key.clone())));
        let edges = Edges { tunnel, ..site.edges.clone() };
        let row = machine_row(&edges);
        (site, edges, row)
    }

    /// A router that advertises this name server.
    fn router(name_server: &str) -> Neighbour {
        let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 25, 3, 0, 0, 0, 0, 4, 0];
        message.extend(name_server.parse::<std::net::Ipv6Addr>().unwrap().octets());
        let kind = NeighbourKind::Advertiser(Box::new(Advertisement::parse(&message).unwrap()));
        Neighbour { addr: "fe80::1".parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 1]), kind }
    }

    #[tokio::test]
    async fn without_a_list_a_machine_reaches_its_lan_and_the_private_servers_of_its_home() {
        let flows = vec![flow("10.0.0.53", 53), flow("192.0.2.53", 53), flow("10.0.0.7", 5432)];
        let (_site, edges, mut row) = seen(Some(flows)).await;
        let lan = row.definition.nics[0].home.clone();
        let found = prefixes(&edges, &row, &row.definition.nics[0], &[]).await.unwrap();
        assert_eq!((&found[..1], found[1]), (lan.as_slice(), prefix("10.0.0.53/32")));

        row.definition.nics[0].home.push(prefix("2001:db8:a::10/64"));
        let (nic, resolvers) = (&row.definition.nics[0], BTreeSet::from(["10.0.0.54".parse().unwrap()]));
        let flows = sampled(&edges, &row, nic).await;
        let found = prefixes_among(&edges, nic, &[router("fd00::53")], flows, resolvers).unwrap();
        let servers = ["10.0.0.53/32", "fd00::53/128", "10.0.0.54/32"].map(prefix);
        assert_eq!(found, [nic.home.as_slice(), &servers].concat());
    }

    #[tokio::test]
    async fn a_machine_whose_flows_nobody_knows_moves_all_the_same() {
        let (_site, edges, row) = seen(None).await;
        let found = prefixes(&edges, &row, &row.definition.nics[0], &[]).await.unwrap();
        assert!(found.starts_with(&row.definition.nics[0].home));
        assert_eq!(not_reached(&edges, &row).await, BTreeSet::new());
    }

    #[tokio::test]
    async fn what_the_operator_lists_is_all_there_is_and_what_is_left_out_is_named() {
        let (_site, edges, row) = seen(Some(vec![flow("10.0.0.53", 53), flow("10.0.0.7", 5432)])).await;
        let db = ("10.0.0.7".parse().unwrap(), 5432);
        assert_eq!(not_reached(&edges, &row).await, BTreeSet::from([db]));

        let mut config = (*edges.config).clone();
        config.tunnel.home_prefixes = Some(vec!["10.0.0.7/32".to_owned()]);
        let edges = Edges { config: Arc::new(config), ..edges };
        let found = prefixes(&edges, &row, &row.definition.nics[0], &[]).await.unwrap();
        assert_eq!(found, [prefix("10.0.0.7/32")]);
        let resolver = ("10.0.0.53".parse().unwrap(), 53);
        assert_eq!(not_reached(&edges, &row).await, BTreeSet::from([resolver]));
    }
}
