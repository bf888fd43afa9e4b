//! Which servers of its home a machine goes on asking through the tunnel where its operator names none.
//!
//! One with a private address answers at home only: asked from a visited site, by a care-of address, it is another host
//! or nobody. One with a public address answers whoever asks, and asked through the tunnel it would hold that for ever. What
//! a home is known to have is gathered by the gateway; whether anybody answers there is not looked at.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use super::handover::{FlowTuple, Prefix};
use super::packet::{TCP, UDP};

/// Servers outside of the home LAN that one NIC reaches through the tunnel: more than a home has, and few enough to look at.
pub const MAX_SERVERS: usize = 32;

/// Names, also over TLS, DTLS and QUIC (RFC 7858, RFC 8094, RFC 9250).
const NAME_PORTS: [u16; 2] = [53, 853];
/// The time (RFC 5905).
const TIME_PORT: u16 = 123;

/// What is known of a home's servers.
#[derive(Debug, Clone, Default)]
pub struct KnownServers {
    /// Flows that the guest was seen to have.
    pub flows: Vec<FlowTuple>,
    /// Name servers that the home's routers advertise.
    pub advertised: BTreeSet<IpAddr>,
    /// Name servers that the home's gateway asks itself.
    pub resolvers: BTreeSet<IpAddr>,
}

/// What a NIC with these home addresses reaches through the tunnel: its own LANs, then the private servers outside of them,
/// name servers first that the guest was seen to ask, time servers last.
pub fn home_prefixes(home: &[Prefix], known: &KnownServers) -> Vec<Prefix> {
    let asked = |is_of_kind: fn(&FlowTuple) -> bool| -> BTreeSet<IpAddr> {
        known.flows.iter().filter(|flow| is_of_kind(flow)).map(|flow| flow.remote.to_canonical()).collect()
    };
    let (names, times) = (asked(is_of_name_server), asked(is_of_time_server));
    let all = names.iter().chain(&known.advertised).chain(&known.resolvers).chain(&times);
    let speaks = |server: &IpAddr| home.iter().any(|lan| lan.addr.is_ipv4() == server.is_ipv4());
    let mut servers: Vec<Prefix> = Vec::new();
    for server in all.map(IpAddr::to_canonical).filter(|server| is_private(*server) && speaks(server)) {
        let is_known = home.iter().chain(&servers).any(|prefix| prefix.contains(server));
        if !is_known && servers.len() < MAX_SERVERS {
            servers.push(Prefix::host(server));
        }
    }
    home.iter().copied().chain(servers).collect()
}

/// Private addresses outside of `prefixes` at which the guest was seen to use a service, and its port.
pub fn left_behind(prefixes: &[Prefix], flows: &[FlowTuple]) -> BTreeSet<(IpAddr, u16)> {
    // Nobody has written down who began: the lower port is the service's, as ports for own connections are high ones.
    let asks = |flow: &&FlowTuple| matches!(flow.protocol, TCP | UDP) && flow.remote_port < flow.local_port;
    let services = flows.iter().filter(asks).map(|flow| (flow.remote.to_canonical(), flow.remote_port));
    let is_outside = |address: IpAddr| !prefixes.iter().any(|prefix| prefix.contains(address));
    services.filter(|(address, _)| is_private(*address) && is_outside(*address)).collect()
}

fn is_of_name_server(flow: &FlowTuple) -> bool {
    matches!(flow.protocol, TCP | UDP) && NAME_PORTS.contains(&flow.remote_port)
}

/// Those that ask the guest, itself a time server, may do so from the same port.
fn is_of_time_server(flow: &FlowTuple) -> bool {
    flow.protocol == UDP && flow.remote_port == TIME_PORT && flow.local_port != TIME_PORT
}

/// RFC 1918, RFC 6598 and RFC 4193: the same address may be another host elsewhere.
fn is_private(address: IpAddr) -> bool {
    const SHARED: Prefix = Prefix { addr: IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), len: 10 };
    match address {
        IpAddr::V4(v4) => v4.is_private() || SHARED.contains(address),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn prefix(text: &str, len: u8) -> Prefix {
        Prefix { addr: address(text), len }
    }

    fn flow(protocol: u8, remote: &str, remote_port: u16) -> FlowTuple {
        let (local, local_port) = (address("10.1.0.10"), 40_000);
        FlowTuple { protocol, local, local_port, remote: address(remote), remote_port }
    }

    fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| address(text)).collect()
    }

    const HOME: &str = "10.1.0.10";

    #[test]
    fn a_private_server_outside_of_the_lan_is_reached_through_the_tunnel_and_no_other() {
        let home = [prefix(HOME, 24), prefix("fd00:1::10", 64)];
        let cases: [(u8, &str, u16, bool); 16] = [
            (UDP, "10.9.0.53", 53, true),
            (TCP, "172.16.0.53", 53, true),
            (TCP, "192.168.7.53", 853, true),
            (UDP, "100.64.0.53", 853, true),
            (UDP, "100.127.255.255", 123, true),
            (UDP, "fd00:9::53", 53, true),
            (UDP, "::ffff:10.9.0.53", 53, true),
            (UDP, "10.1.0.53", 53, false),
            (UDP, "fd00:1::53", 53, false),
            (UDP, "192.0.2.53", 53, false),
            (UDP, "100.63.255.255", 53, false),
            (UDP, "100.128.0.0", 53, false),
            (UDP, "2001:db8::53", 53, false),
            (UDP, "fe80::53", 53, false),
            (TCP, "10.9.0.53", 443, false),
            (1, "10.9.0.53", 53, false),
        ];
        for (protocol, remote, port, is_added) in cases {
            let flows = vec![flow(protocol, remote, port)];
            let found = home_prefixes(&home, &KnownServers { flows, ..KnownServers::default() });
            let added = is_added.then(|| Prefix::host(address(remote).to_canonical()));
            assert_eq!(found, home.iter().copied().chain(added).collect::<Vec<_>>(), "{remote} port {port}");
        }
    }

    #[test]
    fn the_homes_own_resolvers_and_those_it_advertises_count_once_and_those_that_are_asked_come_first() {
        let home = [prefix(HOME, 24), prefix("2001:db8:a::10", 64)];
        let known = KnownServers {
            flows: vec![
                flow(UDP, "10.8.0.1", 123),
                flow(UDP, "10.9.0.2", 53),
                FlowTuple { local_port: 123, ..flow(UDP, "10.7.0.1", 123) },
            ],
            advertised: addresses(&["fd00::53", "2001:db8::53", "2001:db8:a::53"]),
            resolvers: addresses(&["10.9.0.1", "10.9.0.2", "127.0.0.53", "192.0.2.53", "::1", "fd00::53"]),
        };
        let time = prefix("10.8.0.1", 32);
        let servers = [prefix("10.9.0.2", 32), prefix("fd00::53", 128), prefix("10.9.0.1", 32), time];
        assert_eq!(home_prefixes(&home, &known), [home.as_slice(), &servers].concat());
        let only_v4 = [prefix(HOME, 24), prefix("10.9.0.2", 32), prefix("10.9.0.1", 32), time];
        assert_eq!(home_prefixes(&home[..1], &known), only_v4, "a NIC asks in the versions that it speaks");
        assert_eq!(home_prefixes(&home, &KnownServers::default()), home);
    }

    #[test]
    fn what_the_guest_uses_at_home_outside_of_its_prefixes_is_named_with_its_port() {
        let prefixes = [prefix(HOME, 24), prefix("10.9.0.53", 32)];
        let client = FlowTuple { local_port: 443, remote_port: 51_000, ..flow(TCP, "10.8.0.7", 0) };
        let flows = [
            flow(TCP, "10.5.0.7", 5432),
            flow(TCP, "10.5.0.7", 5432),
            flow(UDP, "10.9.0.53", 53),
            flow(TCP, "10.1.0.7", 389),
            flow(TCP, "192.0.2.7", 443),
            flow(1, "10.5.0.8", 0),
            client,
        ];
        assert_eq!(left_behind(&prefixes, &flows), BTreeSet::from([(address("10.5.0.7"), 5432)]));
    }

    fn known() -> impl Strategy<Value = (Vec<FlowTuple>, BTreeSet<IpAddr>)> {
        let near = (0u8..4, 0u8..80).prop_map(|(net, host)| IpAddr::from([10, net, 0, host]));
        let any_address = prop_oneof![near, any::<IpAddr>()];
        let port = prop_oneof![Just(53), Just(123), any::<u16>()];
        let flow = (any_address.clone(), port).prop_map(|(remote, remote_port)| FlowTuple {
            remote,
            remote_port,
            ..flow(UDP, HOME, 0)
        });
        let flows = prop::collection::vec(flow, 0..80);
        (flows, prop::collection::btree_set(any_address, 0..80))
    }

    proptest! {
        #[test]
        fn the_lan_stays_and_what_is_added_is_bounded_private_outside_and_the_same_in_any_order(
            (flows, resolvers) in known(),
        ) {
            let home = [prefix(HOME, 24)];
            let turned: Vec<FlowTuple> = flows.iter().rev().copied().collect();
            let of = |flows: Vec<FlowTuple>| {
                home_prefixes(&home, &KnownServers { flows, resolvers: resolvers.clone(), ..KnownServers::default() })
            };
            let found = of(flows);
            prop_assert_eq!(&found[..1], &home);
            prop_assert!(found.len() <= 1 + MAX_SERVERS);
            for server in &found[1..] {
                prop_assert!(server.len == 32 && is_private(server.addr) && !home[0].contains(server.addr));
            }
            let distinct: BTreeSet<&Prefix> = found.iter().collect();
            prop_assert_eq!(distinct.len(), found.len());
            prop_assert_eq!(of(turned), found);
        }
    }
}
