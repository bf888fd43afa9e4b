//! Another host on the home LAN uses the addresses of a machine that is away.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::*;

const SILENT: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(20);

fn config() -> TunnelConfig {
    TunnelConfig { duplicate_silent: SILENT, ..TunnelConfig::default() }
}

/// The neighbour has both addresses and says nothing.
fn take(lab: &Lab) {
    lab.script(
        "ip -n ${P}n addr add 198.51.100.10/24 dev n0
         ip -n ${P}n addr add 2001:db8:a::10/64 dev n0 nodad",
    );
}

/// It speaks from them to the gateway's host, whose link-layer address it has to ask for.
fn speak(lab: &Lab) {
    lab.script(
        "ip -n ${P}n neigh flush dev n0; ip -n ${P}n -6 neigh flush dev n0
         x n ping -c 1 -W 1 -I 198.51.100.10 198.51.100.2 > /dev/null || true
         x n ping -6 -c 1 -W 1 -I 2001:db8:a::10 2001:db8:a::2 > /dev/null || true",
    );
}

fn give_back(lab: &Lab) {
    lab.script(
        "ip -n ${P}n addr del 198.51.100.10/24 dev n0
         ip -n ${P}n addr del 2001:db8:a::10/64 dev n0",
    );
}

fn mac_of_neighbour(lab: &Lab) -> String {
    lab.script("x n cat /sys/class/net/n0/address 2>/dev/null || ip -n ${P}n -o link show n0")
        .split_whitespace()
        .find(|word| word.matches(':').count() == 5)
        .unwrap()
        .to_owned()
}

/// Waits until others use exactly these addresses, as the tunnel says.
async fn conflicts(site: &Site, lab: &Lab, expected: &[&str]) {
    let (mac, expected) = (mac_of_neighbour(lab), expected.iter().map(|text| address(text)));
    let expected: BTreeSet<IpAddr> = expected.collect();
    let mut seen = site.tunnel.conflicts();
    let waited = tokio::time::timeout(LIMIT, async {
        let are_these = |all: &Vec<gateway::tunnel::AddressConflict>| {
            assert!(all.iter().all(|conflict| conflict.mac.to_string() == mac), "{all:?}");
            all.iter().map(|conflict| conflict.address).collect::<BTreeSet<_>>() == expected
        };
        seen.wait_for(are_these).await.unwrap();
    });
    let ended = waited.await;
    assert!(ended.is_ok(), "{:?}", site.tunnel.conflicts().borrow());
}

/// The addresses that the host at home answers for.
fn answered_for(lab: &Lab) -> String {
    lab.script("ip -n ${P}ga neigh show proxy; ip -n ${P}ga -6 neigh show proxy")
}

/// Who the router finds at the address.
fn found_by_router(lab: &Lab) -> String {
    lab.script(
        "ip -n ${P}ra neigh flush dev lan
         x ra ping -c 1 -W 2 198.51.100.10 > /dev/null || true
         ip -n ${P}ra neigh show 198.51.100.10 dev lan",
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_another_host_takes_is_given_up_and_attracted_again_when_it_is_free() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let sites = lab.start_sites(config()).await;
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    sites.move_guest(&lab, visit_request(neighbours)).await;
    lab.within("c", || exchange(&mut connect(server(HOME)).unwrap(), 1000)).join().unwrap();
    assert!(sites.a.tunnel.conflicts().borrow().is_empty(), "neither the guest nor this host is another");

    take(&lab);
    speak(&lab);
    conflicts(&sites.a, &lab, &[HOME, HOME_V6]).await;
    let given_up = || {
        let answered = answered_for(&lab);
        !answered.contains(HOME) && !answered.contains(HOME_V6)
    };
    until(given_up, "it answers for what another host has").await;
    let found = found_by_router(&lab);
    assert!(found.contains(&mac_of_neighbour(&lab)), "{found}");
    // It is asked for, and answers, so that its silence would be heard.
    tokio::time::sleep(2 * SILENT).await;
    conflicts(&sites.a, &lab, &[HOME, HOME_V6]).await;
    let found = found_by_router(&lab);
    assert!(found.contains(&mac_of_neighbour(&lab)), "announced although another has it: {found}");

    give_back(&lab);
    conflicts(&sites.a, &lab, &[]).await;
    let attracted = || answered_for(&lab).contains(HOME) && answered_for(&lab).contains(HOME_V6);
    until(attracted, "it does not answer for its own").await;
    lab.within("c", || exchange(&mut connect(server(HOME)).unwrap(), 1000)).join().unwrap();
    let before = lab.look("gb");
    sites.a.tunnel.attract_end(key()).await.unwrap();
    assert_same(&lab.look("gb"), &before);
    assert!(answered_for(&lab).trim().is_empty(), "{}", answered_for(&lab));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_comes_back_asks_before_it_announces_and_leaves_an_address_that_was_taken() {
    let lab = lab_or_skip!();
    let mut sites = lab.start_sites(config()).await;
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    sites.move_guest(&lab, visit_request(neighbours)).await;
    sites.a.crash();
    take(&lab);

    let site = lab.start_site("ga", config());
    site.tunnel.hold_begin(hold_request()).await.unwrap();
    site.tunnel.attract_again(key(), Vec::new(), Duration::ZERO).await.unwrap();
    conflicts(&site, &lab, &[HOME, HOME_V6]).await;
    until(|| !answered_for(&lab).contains(HOME), "it answers for what another host has").await;
    let found = found_by_router(&lab);
    assert!(found.contains(&mac_of_neighbour(&lab)), "{found}");
    give_back(&lab);
    conflicts(&site, &lab, &[]).await;
    until(|| answered_for(&lab).contains(HOME), "it does not answer for its own").await;
}

async fn until(is_so: impl Fn() -> bool, otherwise: &str) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < LIMIT, "{otherwise}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
