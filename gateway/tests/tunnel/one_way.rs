//! Connections of a machine that is away, when only one of their ends is heard.

use std::io::Write;

use longhaul_core::tunnel::flows::OneWay;
use longhaul_core::tunnel::packet::Side;
use longhaul_core::tunnel::policy::Role;

use super::*;

/// Waits until the flows of the machine that is away are so.
async fn counted_one_way(site: &Site, is_so: impl Fn(OneWay) -> bool) {
    let mut status = site.tunnel.status();
    let of_away = |status: &gateway::tunnel::TunnelStatus| {
        let away = status.ports.iter().find(|port| port.key == key() && port.role == Role::Away);
        away.is_some_and(|port| is_so(port.one_way))
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), status.wait_for(of_away)).await.is_ok();
    assert!(waited, "{:?}", site.tunnel.status().borrow().ports);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_guest_falls_silent_is_shown_until_it_speaks_again() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let mut config = TunnelConfig::default();
    config.datapath.flows.one_way = Duration::from_secs(1);
    let sites = lab.start_sites(config).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    let mut open = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    exchange(&mut open, 1000);
    sites.move_guest(&lab, visit_request(neighbours)).await;
    exchange(&mut open, 1000);
    counted_one_way(&sites.a, |counted| counted.active > 0 && counted.flows() == 0).await;

    lab.script("x vm nft 'add table ip mute; add chain ip mute out { type filter hook output priority 0; policy drop; }'");
    open.write_all(&[1; 100]).unwrap();
    counted_one_way(&sites.a, |counted| counted.only_remote == 1 && counted.is_most()).await;
    let listed = sites.a.tunnel.flows(key(), 10).await.unwrap().flows;
    assert!(listed.iter().any(|flow| flow.heard_only == Some(Side::Remote)), "{listed:?}");

    lab.script("x vm nft delete table ip mute");
    counted_one_way(&sites.a, |counted| counted.active > 0 && counted.flows() == 0).await;
}
