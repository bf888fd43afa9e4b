//! A visited site whose LAN has the same private addresses as the machine's home: a stranger has its home address, another
//! that of its old neighbour, the host that of the host it left. Everybody reaches whom they mean.

use std::io::{Read, Write};
use std::net::TcpListener;

use gateway::tunnel::{CareOf, VisitRequest};
use longhaul_core::tunnel::handover::Prefix;

use super::*;

const NEIGHBOUR: &str = "198.51.100.20";
const NEIGHBOUR_V6: &str = "2001:db8:a::20";
const HOST: &str = "198.51.100.2";
const HOST_V6: &str = "2001:db8:a::2";
/// In the network that both sites have.
const SECOND_CARE_OF: &str = "198.51.100.200";
const NAMES: u16 = 7001;
/// How long a visited host might wait before it answers for another.
const PROXY_DELAY: Duration = Duration::from_millis(800);

/// Whoever connects hears `name`.
fn serve_name(lab: &Lab, namespace: &str, name: &'static str) {
    let bound = lab.within(namespace, move || {
        let tcp = TcpListener::bind(("::", NAMES)).expect("the port is free");
        std::thread::spawn(move || {
            for mut stream in tcp.incoming().flatten() {
                let _ = stream.write_all(name.as_bytes());
            }
        });
    });
    bound.join().expect("the server starts");
}

/// Who answers in a namespace at an address.
fn who(lab: &Lab, from: &str, at: &str) -> String {
    let server = SocketAddr::new(address(at), NAMES);
    let heard = lab.within(from, move || {
        let mut name = String::new();
        connect(server)?.read_to_string(&mut name).map(|_| name)
    });
    heard.join().expect("no panic").unwrap_or_else(|error| format!("nobody: {error}"))
}

/// Site b's LAN gets a second network, which is that of site a.
fn same_addresses(lab: &Lab) {
    lab.script(
        "ip netns add ${P}s; ip -n ${P}s link set lo up
         x s sysctl -qw net.ipv6.conf.default.accept_dad=0
         ip link add taps netns ${P}gb type veth peer name s0 netns ${P}s
         ip -n ${P}gb link set taps up master br0; ip -n ${P}s link set s0 up
         for a in 203.0.113.30/24 198.51.100.20/24 198.51.100.10/24; do ip -n ${P}s addr add $a dev s0; done
         for a in 2001:db8:a::20/64 2001:db8:a::10/64; do ip -n ${P}s addr add $a dev s0 nodad; done
         ip -n ${P}s route add 198.18.2.2/32 via 203.0.113.2 src 198.51.100.10
         ip -n ${P}rb route add 198.51.100.10/32 dev lan
         ip -n ${P}n addr add 198.51.100.200/24 dev n0
         ip -n ${P}gb addr add 198.51.100.2/24 dev br0
         ip -n ${P}gb addr add 2001:db8:a::2/64 dev br0 nodad",
    );
}

fn name_everybody(lab: &Lab) {
    for (namespace, name) in [
        ("vm", "guest"),
        ("n", "neighbour"),
        ("s", "stranger"),
        ("ga", "host a"),
        ("gb", "host b"),
        ("rb", "router b"),
    ] {
        serve_name(lab, namespace, name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_with_the_same_private_addresses_takes_nobody_for_another() {
    let lab = lab_or_skip!();
    same_addresses(&lab);
    name_everybody(&lab);
    for namespace in ["vm", "n", "c"] {
        serve_echo(&lab, namespace);
    }
    let look = |lab: &Lab| lab.look("gb");
    let (sites, neighbours) = begin(&lab).await;
    let before = look(&lab);
    let records = [
        Records::start(&lab, "c", server(HOME), 64),
        Records::start(&lab, "n", server(HOME), 64),
        Records::start(&lab, "n", server(HOME_V6), 64),
        Records::start(&lab, "vm", server(NEIGHBOUR), 64),
        Records::start(&lab, "vm", server(NEIGHBOUR_V6), 64),
        Records::start(&lab, "ga", server(HOME), 64),
    ];

    let mut visit = visit_request(neighbours);
    visit.care_of.push(CareOf { home: address(HOME), care_of: address(SECOND_CARE_OF) });
    sites.move_guest(&lab, visit).await;

    for records in records {
        records.wait_for(10);
        println!("{:?}", records.finish());
    }
    let meant = [
        // The guest means its home.
        ("vm", NEIGHBOUR, "neighbour"),
        ("vm", NEIGHBOUR_V6, "neighbour"),
        ("vm", HOST, "host a"),
        ("vm", HOST_V6, "host a"),
        ("n", HOME, "guest"),
        ("ga", HOME_V6, "guest"),
        // Everybody here means who is here.
        ("gb", NEIGHBOUR, "stranger"),
        ("gb", HOME, "stranger"),
        ("gb", HOME_V6, "stranger"),
        ("s", HOST, "host b"),
        ("gb", CARE_OF, "guest"),
        ("gb", CARE_OF_V6, "guest"),
        ("c", CARE_OF, "guest"),
        // And by the name that moved the guest finds itself.
        ("vm", CARE_OF, "guest"),
        ("vm", CARE_OF_V6, "guest"),
        // An address of the guest's here may be somebody's at its home.
        ("vm", SECOND_CARE_OF, "neighbour"),
        ("s", SECOND_CARE_OF, "guest"),
        ("gb", SECOND_CARE_OF, "guest"),
        // What the host forwards for a stranger stays the stranger's.
        ("s", "198.18.2.2", "router b"),
    ];
    for (from, at, name) in meant {
        assert_eq!(who(&lab, from, at), name, "{at} from {from}");
    }
    // Strangers with addresses of the guest's home, and with its own, reach it by its care-of address.
    for source in ["203.0.113.30", NEIGHBOUR, HOME] {
        lab.script(&format!("ip -n ${{P}}s route replace 203.0.113.10/32 dev s0 src {source}"));
        assert_eq!(who(&lab, "s", CARE_OF), "guest", "from {source}");
    }
    sites.b.tunnel.visit_undo(key()).await.unwrap();
    assert_same(&look(&lab), &before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_where_addresses_clash_a_rule_of_ours_stands_before_the_hosts_own_and_no_others_rule_moves() {
    let lab = lab_or_skip!();
    let first = |lab: &Lab| lab.script("x gb ip rule show pref 0; x gb ip -6 rule show pref 0");
    let tables = |listed: &str| -> Vec<String> {
        listed
            .lines()
            .map(|line| line.split("lookup ").nth(1).unwrap().split(' ').next().unwrap().into())
            .collect()
    };
    lab.script("x gb ip rule add pref 0 fwmark 0x77 lookup 77; x gb ip rule add pref 0 iif br0 lookup local");
    let before = first(&lab);
    let site = lab.start_site("gb", TunnelConfig::default());
    site.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    assert_eq!(first(&lab), before);
    site.tunnel.visit_undo(key()).await.unwrap();

    same_addresses(&lab);
    site.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    assert_eq!(tables(&first(&lab)), ["7100", "local", "77", "local", "7100", "local"], "{}", first(&lab));
    // A second time changes nothing.
    site.tunnel.visit_prepare(visit_request(Vec::new())).await.unwrap();
    assert_eq!(tables(&first(&lab)), ["7100", "local", "77", "local", "7100", "local"]);
    site.tunnel.visit_undo(key()).await.unwrap();
    assert_eq!(first(&lab), before);
}

/// A visitor from elsewhere whose address here is in the guest's home LAN.
async fn another_visitor(site: &Site) -> VisitRequest {
    let key = PortKey { machine: "web2".parse().unwrap(), nic: "net0".parse().unwrap() };
    let port = site.tunnel.create_tap(key.clone(), 0, None).await.unwrap();
    let mut visit = VisitRequest { key, port, peer: "c".parse().unwrap(), ..visit_request(Vec::new()) };
    visit.nic.home = vec![Prefix { addr: address("10.5.0.7"), len: 24 }];
    visit.nic.home_prefixes = visit.nic.home.clone();
    visit.care_of = vec![CareOf { home: address("10.5.0.7"), care_of: address(SECOND_CARE_OF) }];
    visit
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_at_home_is_not_taken_for_another_visitor_whoever_of_them_came_first() {
    for guest_is_first in [true, false] {
        let lab = lab_or_skip!();
        same_addresses(&lab);
        name_everybody(&lab);
        let (sites, neighbours) = begin(&lab).await;
        let b = &sites.b;
        let other = another_visitor(b).await;
        if !guest_is_first {
            b.tunnel.visit_prepare(other.clone()).await.unwrap();
        }
        sites.move_guest(&lab, visit_request(neighbours)).await;
        if guest_is_first {
            b.tunnel.visit_prepare(other).await.unwrap();
        }
        assert_eq!(who(&lab, "vm", SECOND_CARE_OF), "neighbour", "the guest came first: {guest_is_first}");
        assert_eq!(who(&lab, "gb", CARE_OF), "guest");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_visited_host_says_about_a_visitors_packets_reaches_it_and_no_stranger() {
    let lab = lab_or_skip!();
    same_addresses(&lab);
    serve_echo(&lab, "c");
    serve_echo(&lab, "vm");
    let (sites, neighbours) = begin(&lab).await;
    let mut old = lab.within("n", || connect(server(HOME)).unwrap()).join().unwrap();
    sites.move_guest(&lab, visit_request(neighbours)).await;

    // Full-size segments do not pass, and only the host says so.
    lab.script("ip -n ${P}gb route add 192.0.2.10/32 via 203.0.113.1 mtu 1300");
    lab.within("vm", || exchange(&mut connect(server(CLIENT)).unwrap(), 200_000)).join().unwrap();
    let learnt = lab.script("x vm ip route get 192.0.2.10");
    assert!(learnt.contains("mtu 1300"), "{learnt}");
    exchange(&mut old, 10_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_visitor_that_asks_whether_its_own_address_is_free_hears_nobody() {
    let lab = lab_or_skip!();
    same_addresses(&lab);
    let site = lab.start_site("gb", TunnelConfig::default());
    let port = site.tunnel.create_tap(key(), 0, None).await.unwrap();
    let mut visit = visit_request(Vec::new());
    visit.port = port.clone();
    site.tunnel.visit_prepare(visit).await.unwrap();
    let tap = lab.within("gb", move || plug_into(&port)).join().unwrap();
    site.tunnel.visit_resumed(key()).await.unwrap();

    let own = [198, 51, 100, 10];
    let begun = Instant::now();
    let mut answered = None;
    // The kernel hears a tap a moment after it is plugged in.
    while answered.is_none() && begun.elapsed() < Duration::from_secs(10) {
        tap.send(&asks([0; 4], own)).unwrap();
        tap.send(&asks(own, [198, 51, 100, 20])).unwrap();
        answered = answers(&tap, PROXY_DELAY / 4).first().copied();
    }
    let mut all = vec![answered.expect("somebody answers for the neighbour")];
    all.extend(answers(&tap, 2 * PROXY_DELAY));
    assert!(all.iter().all(|answer| *answer == [198, 51, 100, 20]), "{all:?}");
    site.tunnel.visit_undo(key()).await.unwrap();
}

/// An ARP request (RFC 826); from nobody it is a probe (RFC 5227).
fn asks(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(GUEST_MAC.0);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(GUEST_MAC.0);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

/// For which addresses somebody answers until it is silent for so long.
fn answers(tap: &tun::Device, silent: Duration) -> Vec<[u8; 4]> {
    let mut answered = Vec::new();
    let mut frame = [0; 2048];
    while let Ok(len) = tap.recv_timeout(&mut frame, silent) {
        let is_reply = len >= 42 && frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 2];
        if is_reply {
            answered.push([frame[28], frame[29], frame[30], frame[31]]);
        }
    }
    answered
}
