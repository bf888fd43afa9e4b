//! The tunnel between real kernels: connections survive a move, and nothing is left behind.
//!
//! Needs root for network namespaces; without, the tests say so and pass.

#[path = "tunnel/lab.rs"]
mod lab;
#[path = "tunnel/traffic.rs"]
mod traffic;

use std::net::SocketAddr;

use gateway::tunnel::TunnelConfig;
use lab::*;
use traffic::*;

macro_rules! lab_or_skip {
    () => {
        match unavailable() {
            Some(reason) => {
                println!("skipped: {reason}");
                return;
            }
            None => Lab::new(),
        }
    };
}

fn server(text: &str) -> SocketAddr {
    SocketAddr::new(address(text), PORT)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_connections_survive_a_move_and_new_ones_leave_locally() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let sites = lab.start_sites(TunnelConfig::default()).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let records = Records::start(&lab, "c", server(HOME), 64);
    let idle = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    assert!(neighbours.iter().any(|n| n.router && n.addr == address("198.51.100.1")), "{neighbours:?}");

    let pause = sites.move_guest(&lab, visit_request(neighbours)).await;

    if std::env::var("DBG").is_ok() {
        std::thread::sleep(std::time::Duration::from_secs(2));
        println!("A {:?}", *sites.a.tunnel.status().borrow());
        println!("B {:?}", *sites.b.tunnel.status().borrow());
        println!("{}", lab.script("x gb nft list ruleset; x gb ip route; x gb ip rule; x gb ip route show table 7100; x gb ip neigh; x gb ip -d link show tapb; x ga ip route; x ga ip neigh; x ga bridge fdb; x vm ip neigh; x ra ip neigh; x r nft list ruleset; x ra nft list ruleset; x gb nstat -az | grep -v ' 0 '; x gb conntrack -L || true"));
    }
    records.wait_for(20);
    let outcome = records.finish();
    println!("guest unplugged for {pause:?}; {outcome:?}");
    let mut idle = idle;
    exchange(&mut idle, 1000);
    let before = sites.a.tunnel.status().borrow().counters.clone();
    lab.within("c", || exchange(&mut connect(server(CARE_OF)).unwrap(), 100_000)).join().unwrap();
    let after = sites.a.tunnel.status().borrow().counters.clone();
    assert_eq!(before.from_peers, after.from_peers, "a new connection took the tunnel");
}
