//! Which flows are remembered for how long: where the machine is at home, and where it visits.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_that_goes_on_is_known_for_as_long_as_it_does() {
    let lab = lab_or_skip!();
    serve_who_am_i(&lab, "c");
    let config = TunnelConfig { tcp_flow_timeout: Duration::from_secs(3), ..TunnelConfig::default() };
    let sites = lab.start_sites(config).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    let udp = lab.within("vm", || udp_to(server(CLIENT))).join().unwrap();
    let old = ask_udp(&udp);
    assert!(old.starts_with(HOME), "{old}");
    // The kernel forgets the flow between two questions: each is its first packet.
    lab.script("x gb sysctl -qw net.netfilter.nf_conntrack_udp_timeout=1 net.netfilter.nf_conntrack_udp_timeout_stream=1");
    sites.move_guest(&lab, visit_request(neighbours)).await;
    let moved = Instant::now();
    while moved.elapsed() < Duration::from_secs(7) {
        assert_eq!(ask_udp(&udp), old, "after {:?}", moved.elapsed());
        tokio::time::sleep(Duration::from_millis(1300)).await;
    }
}
