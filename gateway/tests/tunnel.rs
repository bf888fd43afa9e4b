//! The tunnel between real kernels: connections survive a move, and nothing is left behind.
//!
//! Needs root for network namespaces; without, the tests say so and pass.

// Helpers of tests are not covered by clippy.toml's allow-unwrap-in-tests.
#![allow(clippy::unwrap_used)]

#[path = "tunnel/lab.rs"]
mod lab;
#[path = "tunnel/traffic.rs"]
mod traffic;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use gateway::tunnel::{HoldRequest, TunnelConfig, TunnelError, tap_name};
use lab::*;
use longhaul_core::tunnel::datapath::Counters;
use longhaul_core::tunnel::handover::{FlowTuple, Neighbour};
use longhaul_core::tunnel::policy::{DropReason, PortKey};
use longhaul_core::tunnel::repair::Treatment;
use nix::sys::socket::{setsockopt, sockopt};
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

#[path = "tunnel/advertised.rs"]
mod advertised;

#[path = "tunnel/carried.rs"]
mod carried;

#[path = "tunnel/duplicates.rs"]
mod duplicates;

#[path = "tunnel/one_way.rs"]
mod one_way;

#[path = "tunnel/unread.rs"]
mod unread;

#[path = "tunnel/reassert.rs"]
mod reassert;

#[path = "tunnel/remembered.rs"]
mod remembered;

#[path = "tunnel/strangers.rs"]
mod strangers;

fn server(text: &str) -> SocketAddr {
    SocketAddr::new(address(text), PORT)
}

/// A site's tunnel, its sampler running, and what the site knows of its LAN.
async fn begin(lab: &Lab) -> (Sites, Vec<Neighbour>) {
    let sites = lab.start_sites(TunnelConfig::default()).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    assert!(neighbours.iter().any(|n| n.is_router() && n.addr == address("198.51.100.1")), "{neighbours:?}");
    (sites, neighbours)
}

const NEW_BYTES: usize = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_connections_survive_a_move_and_new_ones_leave_locally() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (sites, neighbours) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);
    let records_v6 = Records::start(&lab, "c", server(HOME_V6), 64);
    let mut idle = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();

    let pause = sites.move_guest(&lab, visit_request(neighbours)).await;

    records.wait_for(20);
    records_v6.wait_for(20);
    let (outcome, outcome_v6) = (records.finish(), records_v6.finish());
    println!("guest unplugged for {pause:?}; IPv4 {outcome:?}; IPv6 {outcome_v6:?}");
    assert!(outcome.longest < pause + Duration::from_millis(1500), "{outcome:?}");
    exchange(&mut idle, 1000);
    let before = sites.a.tunnel.status().borrow().counters.clone();
    for care_of in [CARE_OF, CARE_OF_V6] {
        lab.within("c", || exchange(&mut connect(server(care_of)).unwrap(), NEW_BYTES)).join().unwrap();
    }
    let after = sites.a.tunnel.status().borrow().counters.clone();
    // The old connections' last acknowledgements may still come.
    let came = after.from_peers.bytes - before.from_peers.bytes;
    assert!(came < NEW_BYTES as u64 / 2, "{came} bytes of new connections took the tunnel");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_size_segments_pass_a_link_of_smaller_datagrams() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (sites, neighbours) = begin(&lab).await;
    let mut open = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    exchange(&mut open, 10_000);

    sites.move_guest(&lab, visit_request(neighbours)).await;

    // The client's kernel hands over super-packets: they are cut to what the link takes.
    exchange(&mut open, 1_000_000);
    let counters = counted(&sites.a, |counters| counters.to_peers.bytes > 1_000_000).await;
    println!("{counters:?}");
    assert!(counters.split < 100, "{counters:?}");
    // The same over IPv6, joined for the kernel at either side.
    let mut open_v6 = lab.within("c", || connect(server(HOME_V6)).unwrap()).join().unwrap();
    exchange(&mut open_v6, 1_000_000);
    // A datagram stays whole for the guest.
    let udp = lab.within("c", || udp_to(server(HOME))).join().unwrap();
    for number in 0..100 {
        udp.send(&[number; 1472]).unwrap();
        let mut answer = [0; 2048];
        assert_eq!(udp.recv(&mut answer).unwrap(), 1472);
        assert_eq!(answer[..1472], [number; 1472]);
    }
    counted(&sites.a, |now| now.split >= counters.split + 100).await;
    // Forty in one super-packet.
    setsockopt(&udp, sockopt::UdpGsoSegment, &500).unwrap();
    for number in 0..10 {
        udp.send(&[number; 40 * 500]).unwrap();
        for _ in 0..40 {
            let mut answer = [0; 2048];
            assert_eq!(udp.recv(&mut answer).unwrap(), 500);
            assert_eq!(answer[..500], [number; 500]);
        }
    }
}

/// Waits until a site's counters are so; they are published now and then.
async fn counted(site: &Site, so: impl Fn(&Counters) -> bool) -> Counters {
    let mut status = site.tunnel.status();
    let seen = status.wait_for(|status| so(&status.counters));
    let seen = tokio::time::timeout(Duration::from_secs(5), seen).await;
    match seen {
        Ok(status) => status.unwrap().counters.clone(),
        Err(_elapsed) => panic!("{:?}", site.tunnel.status().borrow().counters),
    }
}

/// How long an old connection takes for an exchange on a path that loses 1 % at 40 ms.
async fn exchange_on_a_lossy_path(lab: &Lab, treatment: Treatment) -> Duration {
    // Every kernel has Reno, and lets a namespace choose it; it takes loss as CUBIC does.
    lab.script("for n in c vm; do x $n sysctl -qw net.ipv4.tcp_congestion_control=reno; done");
    serve_echo(lab, "vm");
    let mut config = TunnelConfig::default();
    config.datapath.repair_policy.tcp = treatment;
    let sites = lab.start_sites(config).await;
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    let mut open = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    exchange(&mut open, 10_000);
    sites.move_guest(lab, visit_request(neighbours)).await;
    exchange(&mut open, 10_000);
    sites.lost_per_mille.store(10, Ordering::Relaxed);
    let begun = Instant::now();
    exchange(&mut open, 3_000_000);
    let took = begun.elapsed();
    println!("{treatment:?}: {took:?}, {:?}", sites.a.tunnel.status().borrow().repair);
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_paths_loss_is_hidden_from_old_connections() {
    let plain = exchange_on_a_lossy_path(&lab_or_skip!(), Treatment::AtOnce).await;
    let hidden = exchange_on_a_lossy_path(&lab_or_skip!(), Treatment::Repair).await;
    println!("hidden takes {:.2} of the time", hidden.as_secs_f64() / plain.as_secs_f64());
    assert!(hidden * 2 < plain, "{hidden:?} with repair, {plain:?} without");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flows_the_guest_opened_before_keep_their_address_and_later_ones_get_the_new() {
    let lab = lab_or_skip!();
    serve_who_am_i(&lab, "c");
    let (sites, neighbours) = begin(&lab).await;
    let open = || (connect(server(CLIENT)).unwrap(), udp_to(server(CLIENT)));
    let (mut tcp, udp) = lab.within("vm", open).join().unwrap();
    let (old_tcp, old_udp) = (ask_tcp(&mut tcp), ask_udp(&udp));
    assert!(old_tcp.starts_with(HOME) && old_udp.starts_with(HOME));

    sites.move_guest(&lab, visit_request(neighbours)).await;

    assert_eq!((ask_tcp(&mut tcp), ask_udp(&udp)), (old_tcp, old_udp));
    let (mut tcp, udp) = lab.within("vm", open).join().unwrap();
    assert!(ask_tcp(&mut tcp).starts_with(CARE_OF));
    assert!(ask_udp(&udp).starts_with(CARE_OF));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_home_lan_and_the_host_reach_the_guest_and_it_them() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    serve_echo(&lab, "n");
    let (sites, neighbours) = begin(&lab).await;
    let from_neighbour = Records::start(&lab, "n", server(HOME), 64);
    let from_host = Records::start(&lab, "ga", server(HOME), 64);

    let pause = sites.move_guest(&lab, visit_request(neighbours)).await;

    from_neighbour.wait_for(20);
    from_host.wait_for(20);
    let (neighbour, host) = (from_neighbour.finish(), from_host.finish());
    println!("guest unplugged for {pause:?}; neighbour {neighbour:?}; host {host:?}");
    for (from, to) in [("n", HOME), ("ga", HOME), ("vm", "198.51.100.20"), ("gb", CARE_OF), ("rb", CARE_OF)] {
        lab.within(from, move || exchange(&mut connect(server(to)).unwrap(), 5000)).join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_believes_in_stale_link_layer_addresses_is_heard() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (sites, _) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);

    // Without neighbours the port keeps an address of its own, and the guest sends to the old router's.
    sites.move_guest(&lab, visit_request(Vec::new())).await;

    records.wait_for(20);
    println!("{:?}", records.finish());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_delivers_what_was_held_in_order() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (sites, _) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);
    let udp = lab.within("c", || udp_to(server(HOME))).join().unwrap();
    udp.send(&[0]).unwrap();
    udp.recv(&mut [0; 8]).unwrap();
    let before = lab.look("ga");

    sites.a.tunnel.hold_begin(hold_request()).await.unwrap();
    lab.unplug_guest();
    for number in 0..100u8 {
        udp.send(&[number]).unwrap();
    }
    let mut status = sites.a.tunnel.status();
    status
        .wait_for(|status| status.ports.first().is_some_and(|port| port.held_packets >= 100))
        .await
        .unwrap();
    lab.plug_guest("a");
    sites.a.tunnel.hold_undo(hold_request()).await.unwrap();

    let mut answers = Vec::new();
    for _ in 0..100 {
        let mut answer = [0; 8];
        udp.recv(&mut answer).unwrap();
        answers.push(answer[0]);
    }
    assert_eq!(answers, (0..100).collect::<Vec<u8>>());
    records.wait_for(10);
    println!("{:?}", records.finish());
    assert_same(&lab.look("ga"), &before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undoing_leaves_both_hosts_exactly_as_they_were() {
    let lab = lab_or_skip!();
    let look = |lab: &Lab| lab.look("ga") + &lab.look("gb");
    let untouched = look(&lab);
    let (sites, neighbours) = begin(&lab).await;
    let (a, b) = (sites.a.tunnel.clone(), sites.b.tunnel.clone());
    a.sample_end(key()).await.unwrap();
    let started = look(&lab);

    for _ in 0..2 {
        b.visit_prepare(visit_request(neighbours.clone())).await.unwrap();
        a.hold_begin(hold_request()).await.unwrap();
        a.hold_end_attract(key(), Vec::new()).await.unwrap();
        b.visit_resumed(key()).await.unwrap();
        a.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    }
    assert_ne!(look(&lab), started);
    for _ in 0..2 {
        a.attract_end(key()).await.unwrap();
        b.visit_undo(key()).await.unwrap();
        a.sample_end(key()).await.unwrap();
        a.hold_undo(hold_request()).await.unwrap();
    }
    assert_same(&look(&lab), &started);
    a.stop().await.unwrap();
    b.stop().await.unwrap();
    assert_same(&look(&lab), &untouched);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_home_has_of_a_machine_is_not_let_go_while_it_is_on_its_way_back() {
    let lab = lab_or_skip!();
    let (sites, _) = begin(&lab).await;
    let a = sites.a.tunnel.clone();
    let tap = a.create_tap(key(), 0, Some("br0".to_owned())).await.unwrap();
    let away = HoldRequest { port: tap.clone(), ..hold_request() };
    a.hold_begin(away.clone()).await.unwrap();
    a.hold_end_attract(key(), Vec::new()).await.unwrap();
    let attracting = lab.look("ga");

    a.expect_return(key(), true).await.unwrap();
    assert!(matches!(a.let_go(away.clone()).await, Err(TunnelError::Returning(_))));
    assert_same(&lab.look("ga"), &attracting);
    // It did not come after all.
    a.expect_return(key(), false).await.unwrap();
    a.let_go(away.clone()).await.unwrap();
    assert!(!lab.look("ga").contains(&tap), "the tap is still there");

    // It leaves, which it could not if it had not come.
    a.expect_return(key(), true).await.unwrap();
    a.hold_begin(away.clone()).await.unwrap();
    a.let_go(away.clone()).await.unwrap();

    // It came, and left again.
    a.expect_return(key(), true).await.unwrap();
    a.create_tap(key(), 0, Some("br0".to_owned())).await.unwrap();
    a.come_back(key(), Vec::new()).await.unwrap();
    a.hold_begin(away.clone()).await.unwrap();
    a.hold_end_attract(key(), Vec::new()).await.unwrap();
    a.let_go(away).await.unwrap();
    assert!(!lab.look("ga").contains(&tap), "the tap is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_gateway_finds_and_removes_what_one_that_crashed_has_left() {
    let lab = lab_or_skip!();
    let folder = tempfile::tempdir().unwrap();
    let config = |host: &str| TunnelConfig {
        switches_file: Some(folder.path().join(host)),
        ..TunnelConfig::default()
    };
    let untouched = ["ga", "gb"].map(|host| lab.look(host));
    let (mut a, mut b) = (lab.start_site("ga", config("ga")), lab.start_site("gb", config("gb")));
    b.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    a.tunnel.hold_begin(hold_request()).await.unwrap();
    a.tunnel.hold_end_attract(key(), Vec::new()).await.unwrap();
    a.crash();
    b.crash();
    assert!(lab.network("ga").contains("lh0"), "the device outlives its gateway");

    for (host, untouched) in ["ga", "gb"].into_iter().zip(untouched) {
        let site = lab.start_site(host, config(host));
        site.tunnel.undo_all().await.unwrap();
        site.tunnel.clone().stop().await.unwrap();
        assert_same(&lab.look(host), &untouched);
    }
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_that_a_killed_gateway_has_left_is_undone_by_the_next_one() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let folder = tempfile::tempdir().unwrap();
    let config = || TunnelConfig { switches_file: Some(folder.path().join("ga")), ..TunnelConfig::default() };
    let mut site = lab.start_site("ga", config());
    let before = lab.look("ga");
    site.tunnel.hold_begin(hold_request()).await.unwrap();
    site.crash();
    assert_ne!(lab.look("ga"), before);

    let site = lab.start_site("ga", config());
    for _ in 0..2 {
        site.tunnel.hold_undo(hold_request()).await.unwrap();
        assert_same(&lab.look("ga"), &before);
    }
    lab.within("c", || exchange(&mut connect(server(HOME)).unwrap(), 1000)).join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_comes_back_takes_its_tunnels_over_and_no_connection_breaks() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (mut sites, neighbours) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);
    let visit = visit_request(neighbours);
    sites.move_guest(&lab, visit.clone()).await;
    records.wait_for(5);

    sites.a.crash();
    sites.b.crash();
    let sites = lab.start_sites(TunnelConfig::default()).await;
    sites.b.tunnel.visit_prepare(visit).await.unwrap();
    sites.b.tunnel.visit_resumed(key()).await.unwrap();
    sites.a.tunnel.hold_begin(hold_request()).await.unwrap();
    sites.a.tunnel.hold_end_attract(key(), Vec::new()).await.unwrap();

    records.wait_for(20);
    println!("{:?}", records.finish());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_down_delays_connections_and_resets_none() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (sites, neighbours) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);
    sites.move_guest(&lab, visit_request(neighbours)).await;
    records.wait_for(5);

    sites.link_is_up.store(false, Ordering::Relaxed);
    let mut status = sites.a.tunnel.status();
    let refused =
        |counters: &Counters| counters.dropped.get(&DropReason::LinkBusy).is_some_and(|refused| *refused > 1);
    status.wait_for(|status| refused(&status.counters)).await.unwrap();
    sites.link_is_up.store(true, Ordering::Relaxed);

    records.wait_for(20);
    println!("{:?}", records.finish());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tunnel_ends_by_itself_after_the_last_old_connection() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let mut config = TunnelConfig::default();
    config.datapath.flows.quiet = Duration::from_millis(300);
    config.datapath.flows.closed_linger = Duration::from_millis(100);
    let sites = lab.start_sites(config).await;
    let (a, b) = (sites.a.tunnel.clone(), sites.b.tunnel.clone());
    a.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let records = Records::start(&lab, "c", server(HOME), 64);
    let neighbours = b.home_neighbours("br0".to_owned()).await.unwrap();
    let before = lab.network("ga");
    sites.move_guest(&lab, visit_request(neighbours)).await;
    a.names_expire(key(), Duration::ZERO).await.unwrap();
    let ending = tokio::spawn(async move { a.end_when_unneeded(key()).await });

    records.wait_for(80);
    assert!(!ending.is_finished(), "a connection is open");
    assert_eq!(sites.a.tunnel.status().borrow().ports[0].flows_alive(), Some(1));
    records.finish();
    let closed = tokio::time::timeout(Duration::from_secs(5), ending).await.unwrap().unwrap().unwrap();
    println!("{closed:?}");
    assert!(sites.a.tunnel.status().borrow().ports.is_empty());
    assert_same(&lab.network("ga"), &before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sampler_lists_open_flows_and_not_closed_ones() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let (mut sites, _) = begin(&lab).await;
    let mut open = lab.within("c", || connect(server(HOME)).unwrap()).join().unwrap();
    exchange(&mut open, 10);
    lab.within("c", || exchange(&mut connect(server(HOME)).unwrap(), 10)).join().unwrap();
    let udp = lab.within("c", || udp_to(server(HOME))).join().unwrap();
    udp.send(&[1]).unwrap();
    udp.recv(&mut [0; 8]).unwrap();

    // The next gateway reads what this one has begun.
    sites.a.crash();
    let site = lab.start_site("ga", TunnelConfig::default());
    let flows = site.tunnel.sample(key()).await.unwrap();

    let mut expected = [(6, open.local_addr().unwrap().port()), (17, udp.local_addr().unwrap().port())];
    let mut listed: Vec<_> = flows.iter().map(|flow| (flow.protocol, flow.remote_port)).collect();
    expected.sort();
    listed.sort();
    assert_eq!(listed, expected);
    assert!(flows.iter().all(|flow| flow.local == address(HOME) && flow.local_port == PORT));
    site.tunnel.sample_end(key()).await.unwrap();
    assert!(matches!(site.tunnel.sample(key()).await, Err(TunnelError::NotSampled(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_connections_leave_the_sampler_room_for_long_ones() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    // Twelve that come and go and eight that stay: more than there is room for, if those that went were kept.
    let config = TunnelConfig { max_flows: 16, ..TunnelConfig::default() };
    let sites = lab.start_sites(config).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    let long = lab.within("c", || {
        for _ in 0..12 {
            exchange(&mut connect(server(HOME)).unwrap(), 2);
        }
        // The kernel collects what was deleted once a second (`gc-interval`); until then it counts.
        std::thread::sleep(Duration::from_millis(2500));
        let mut long: Vec<_> = (0..8).map(|_| connect(server(HOME)).unwrap()).collect();
        long.iter_mut().for_each(|stream| exchange(stream, 2));
        long
    });
    let long = long.join().unwrap();
    let flows = sites.a.tunnel.sample(key()).await.unwrap();
    let mut expected: Vec<_> = long.iter().map(|stream| stream.local_addr().unwrap().port()).collect();
    let mut listed: Vec<_> = flows.iter().map(|flow| flow.remote_port).collect();
    expected.sort_unstable();
    listed.sort_unstable();
    assert_eq!(listed, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_comes_home_keeps_its_connections() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    serve_echo(&lab, "n");
    let (sites, neighbours) = begin(&lab).await;
    let records = Records::start(&lab, "c", server(HOME), 64);
    let mut to_neighbour = lab.within("vm", || connect(server("198.51.100.20")).unwrap()).join().unwrap();
    exchange(&mut to_neighbour, 100);
    sites.move_guest(&lab, visit_request(neighbours)).await;
    records.wait_for(10);
    exchange(&mut to_neighbour, 100);

    lab.unplug_guest();
    sites.b.tunnel.visit_undo(key()).await.unwrap();
    lab.plug_guest("a");
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    sites.a.tunnel.come_back(key(), neighbours).await.unwrap();

    records.wait_for(20);
    println!("{:?}", records.finish());
    exchange(&mut to_neighbour, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_visitor_that_plugs_into_its_tap_after_the_rules_stand_is_reached_and_heard() {
    let lab = lab_or_skip!();
    let site = lab.start_site("gb", TunnelConfig::default());
    let port = site.tunnel.create_tap(key(), 0, None).await.unwrap();
    let mut visit = visit_request(Vec::new());
    visit.port = port.clone();
    site.tunnel.visit_prepare(visit).await.unwrap();
    let (device, tap) = (port.clone(), lab.within("gb", move || plug_into(&port)).join().unwrap());
    // Until the kernel has noticed the plug it drops what is sent; a real machine waits here for its memory.
    lab.script(&format!("for i in $(seq 500); do x gb ip -o link show {device} | grep -q 'state UP' && exit; sleep 0.01; done; exit 1"));
    site.tunnel.visit_resumed(key()).await.unwrap();
    let client = lab.within("c", || udp_to(server(CARE_OF))).join().unwrap();

    client.send(b"who is there?").unwrap();
    let question = frame_with(&tap, b"who is there?");
    assert_eq!((&question[..6], &question[30..34]), (&GUEST_MAC.0[..], &[198, 51, 100, 10][..]));
    let stale_router = [0x02, 0xde, 0xad, 0, 0, 1];
    tap.send(&echo_of(&question, stale_router)).unwrap();
    let mut answer = [0; 64];
    let len = client.recv(&mut answer).unwrap();
    assert_eq!(&answer[..len], b"who is there?");
    site.tunnel.clone().stop().await.unwrap();
    assert!(lab.network("gb").contains("lh-web1-net0"), "a machine's tap stays");
    lab.script("ip -n ${P}gb link del lh-web1-net0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_tells_its_addresses_and_its_routers() {
    let lab = lab_or_skip!();
    let site = lab.start_site("ga", TunnelConfig::default());
    let host = site.tunnel.host_addresses().await.unwrap();
    for own in ["198.51.100.2", "2001:db8:a::2", "127.0.0.1"] {
        assert!(host.own.contains(&address(own)), "{host:?}");
    }
    for router in ["198.51.100.1", "2001:db8:a::1"] {
        assert!(host.routers.contains(&address(router)), "{host:?}");
    }
    assert!(host.check([address(HOME), address(HOME_V6)]).is_ok(), "{host:?}");
    assert!(host.check([address("198.51.100.1")]).is_err(), "{host:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_flows_are_handed_over() {
    let lab = lab_or_skip!();
    let site = lab.start_site("gb", TunnelConfig::default());
    site.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    let flow = |number: u16| FlowTuple {
        protocol: 17,
        local: address(HOME),
        local_port: PORT,
        remote: address(CLIENT),
        remote_port: number,
    };
    let begun = Instant::now();
    site.tunnel.visit_flows(key(), (1..=10_000).map(flow).collect()).await.unwrap();
    println!("10000 flows in {:?}", begun.elapsed());
    let begun = Instant::now();
    site.tunnel.visit_flows(key(), (10_001..=10_100).map(flow).collect()).await.unwrap();
    println!("100 flows in {:?}", begun.elapsed());
    let listed = lab.script("x gb nft list ruleset | grep -c 'udp . 192.0.2.10'");
    assert!(listed.trim().parse::<u32>().unwrap() >= 10_000 / 2, "{listed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_do_not_disturb_each_other() {
    let lab = lab_or_skip!();
    let site = lab.start_site("gb", TunnelConfig::default());
    let second = PortKey { machine: "database-of-accounts".parse().unwrap(), nic: "net0".parse().unwrap() };
    let port = site.tunnel.create_tap(second.clone(), 12345, Some("br0".to_owned())).await.unwrap();
    assert_eq!(port, tap_name(&TunnelConfig::default(), &second));
    let shown = lab.script(&format!("x gb ip -d link show {port}; x gb ip tuntap"));
    assert!(shown.contains("master br0") && shown.contains("persist user 12345"), "{shown}");
    let mut visit = visit_request(Vec::new());
    visit.key = second.clone();
    visit.port = port;
    site.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    let one = lab.network("gb");

    let taken = site.tunnel.visit_prepare(visit.clone()).await.unwrap_err();
    assert!(matches!(taken, TunnelError::AddressTaken(_)), "{taken}");
    assert_same(&lab.network("gb"), &one);
    for (prefix, last) in visit.nic.home.iter_mut().zip(["198.51.100.11", "2001:db8:a::11"]) {
        prefix.addr = address(last);
    }
    visit.care_of.clear();
    site.tunnel.visit_prepare(visit).await.unwrap();
    site.tunnel.visit_undo(second.clone()).await.unwrap();
    assert_same(&lab.network("gb"), &one);
    site.tunnel.remove_tap(second).await.unwrap();
    site.tunnel.clone().stop().await.unwrap();
}
