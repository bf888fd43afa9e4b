//! Which flows are remembered for how long: where the machine is at home, and where it visits.

use std::net::TcpStream;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_asks_for_connections_takes_no_room_of_those_that_are_open() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let config = TunnelConfig { max_flows: 16, ..TunnelConfig::default() };
    let sites = lab.start_sites(config).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    // A client that does not hear the guest's answers is as good as a forged one.
    lab.script("x c nft 'add table ip deaf; add chain ip deaf in { type filter hook input priority 0; }; add rule ip deaf in tcp flags & (syn | ack) == (syn | ack) drop'");
    let asking = lab.within("c", || {
        let ask = || TcpStream::connect_timeout(&server(HOME), Duration::from_millis(300)).is_ok();
        let all: Vec<_> = (0..24).map(|_| lab_thread(ask)).collect();
        all.into_iter().any(|one| one.join().unwrap())
    });
    assert!(!asking.join().unwrap());
    lab.script("x c nft delete table ip deaf");

    let open = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    exchange(&mut open.try_clone().unwrap(), 10);
    let silent = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    let flows = sites.a.tunnel.sample(key()).await.unwrap();
    let port = |stream: &TcpStream| stream.local_addr().unwrap().port();
    assert_eq!(flows.len(), 16, "{flows:?}");
    assert!(flows.iter().any(|flow| flow.remote_port == port(&open)), "{flows:?}");
    drop(silent);
}

/// A thread of this one's namespace.
fn lab_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    std::thread::spawn(work)
}

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
        // Not a wait: a silence that is longer than the kernel remembers the flow.
        tokio::time::sleep(Duration::from_millis(1300)).await;
    }
}
