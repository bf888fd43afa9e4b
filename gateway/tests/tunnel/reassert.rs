//! What others remove from the host's network is made again: a reload of its firewall flushes every table.

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

/// Waits until a host's network is as it was.
async fn same_again(lab: &Lab, host: &str, before: &str) {
    let begun = Instant::now();
    while begun.elapsed() < LIMIT && lab.network(host) != before {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_same(&lab.network(host), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_reload_of_the_hosts_firewall_and_network_removes_is_made_again() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    serve_who_am_i(&lab, "c");
    // Sooner than the client's patience ends.
    let config = TunnelConfig { reassert_interval: Duration::from_millis(500), ..TunnelConfig::default() };
    let sites = lab.start_sites(config).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    let records = Records::start(&lab, "c", server(HOME), 64);
    let udp = lab.within("vm", || udp_to(server(CLIENT))).join().unwrap();
    let known_as = ask_udp(&udp);
    assert!(known_as.starts_with(HOME), "{known_as}");
    sites.move_guest(&lab, visit_request(neighbours)).await;
    records.wait_for(5);
    let before = ["ga", "gb"].map(|host| (host, lab.network(host)));

    // Each `del` fails where there is nothing, and the script with it.
    lab.script(
        "for n in ga gb; do
           x $n nft flush ruleset
           x $n ip route flush table all proto 176
           x $n ip -6 route flush table all proto 176
         done
         x gb ip rule del pref 96; x gb ip -6 rule del pref 96
         x gb ip rule del fwmark 0x1042; x gb ip -6 rule del fwmark 0x1042
         x ga ip neigh del proxy 198.51.100.10 dev br0; x gb ip neigh del proxy 203.0.113.10 dev br0
         x gb ip neigh del 198.51.100.10 dev tapb; x gb ip addr del 192.0.0.8/32 dev tapb
         x ga bridge fdb del 52:54:00:aa:00:10 dev br0 self",
    );
    for (host, before) in &before {
        same_again(&lab, host, before).await;
    }

    // Flows of before the move are known again, and the kernel need not have kept them.
    let listed = lab.script("x gb nft list ruleset | grep -c 'udp . 192.0.2.10' || true");
    assert_ne!(listed.trim(), "0");
    assert_eq!(ask_udp(&udp), known_as);
    records.wait_for(10);
    println!("{:?}", records.finish());
    for to in [HOME, CARE_OF, HOME_V6, CARE_OF_V6] {
        lab.within("c", move || exchange(&mut connect(server(to)).unwrap(), 1000)).join().unwrap();
    }
    // What is undone stays undone.
    let (a, b) = (sites.a.tunnel.clone(), sites.b.tunnel.clone());
    b.visit_undo(key()).await.unwrap();
    a.attract_end(key()).await.unwrap();
    a.stop().await.unwrap();
    b.stop().await.unwrap();
    for host in ["ga", "gb"] {
        assert!(!lab.network(host).contains("lh_"), "{}", lab.network(host));
    }
}
