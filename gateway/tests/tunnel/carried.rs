//! Connections by an address of an earlier visit: which of them are carried at the machine's home, and for how long they
//! are remembered there.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};

use gateway::tunnel::{CarriedRoute, CarryRequest, Leaving, VisitRequest};
use longhaul_core::tunnel::datapath::Phase;
use longhaul_core::tunnel::policy::Role;

use super::*;

/// An address that clients dialled at a third site.
const ELSEWHERE: &str = "192.0.2.200";

fn other_key() -> PortKey {
    PortKey { machine: "web2".parse().unwrap(), nic: "net0".parse().unwrap() }
}

fn carried(addresses: &[(&str, &str, &str)]) -> Vec<CarriedRoute> {
    let route = |(number, (home, addr, site)): (u32, &(&str, &str, &str))| CarriedRoute {
        number,
        home: address(home),
        addr: address(addr),
        site: site.parse().unwrap(),
    };
    (0u32..).zip(addresses).map(route).collect()
}

/// Of a machine at site a; each address as home address, address that was dialled, site that attracts it.
fn carry_request(key: PortKey, port: &str, addresses: &[(&str, &str, &str)]) -> CarryRequest {
    CarryRequest {
        key,
        from: None,
        home: vec![address(addresses[0].0)],
        carried: carried(addresses),
        port: port.to_owned(),
        lan: "br0".to_owned(),
    }
}

/// The machine is at its home, and site b attracts the addresses that it had there.
async fn carrying(lab: &Lab) -> Sites {
    let sites = lab.start_sites(TunnelConfig::default()).await;
    let left = HoldRequest {
        peer: "a".parse().unwrap(),
        from: Leaving::Visit,
        addresses: vec![address(CARE_OF), address(CARE_OF_V6)],
        port: "tapb".to_owned(),
        ..hold_request()
    };
    sites.b.tunnel.hold_begin(left).await.unwrap();
    sites.b.tunnel.hold_end_attract(key(), Vec::new()).await.unwrap();
    let brought = [(HOME, CARE_OF, "b"), (HOME_V6, CARE_OF_V6, "b")];
    sites.a.tunnel.carry(carry_request(key(), "tapa", &brought), Vec::new()).await.unwrap();
    sites
}

/// The client's ports of the connections that site a turns, with the seconds for which it will remember each.
fn turned(lab: &Lab) -> Vec<(u16, u64)> {
    let listed = lab.script(
        "t=$(x ga nft list tables netdev | sed -n 's/.*\\(lh_turn_.*\\)/\\1/p'); x ga nft -j list set netdev $t by0_4",
    );
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let sets = listed["nftables"].as_array().into_iter().flatten().map(|item| &item["set"]);
    let elements = sets.flat_map(|set| set["elem"].as_array().into_iter().flatten());
    let read = |element: &serde_json::Value| {
        let port = element["elem"]["val"]["concat"][2].as_u64()?;
        Some((port.try_into().ok()?, element["elem"]["expires"].as_u64()?))
    };
    elements.filter_map(read).collect()
}

/// A segment with RST that is not where the receiver's window is: TCP ignores it.
fn forge_reset(lab: &Lab, from_port: u16, to_port: u16) {
    let (from, to): ([u8; 4], [u8; 4]) = ([192, 0, 2, 10], [203, 0, 113, 10]);
    let mut segment = [0; 20];
    segment[..2].copy_from_slice(&from_port.to_be_bytes());
    segment[2..4].copy_from_slice(&to_port.to_be_bytes());
    (segment[12], segment[13]) = (5 << 4, 4);
    let pseudo = [&from[..], &to[..], &[0, 6, 0, 20], &segment[..]].concat();
    let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    segment[16..18].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let send = move || {
        use nix::sys::socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
        };
        use std::os::fd::AsRawFd;
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Tcp).unwrap();
        let to = SockaddrIn::new(to[0], to[1], to[2], to[3], 0);
        sendto(raw.as_raw_fd(), &segment, &to, MsgFlags::empty()).unwrap();
    };
    lab.within("c", send).join().unwrap();
}

/// The phase of the machine's tunnel at a site that it visits.
fn phase(site: &Site, of: &PortKey) -> Option<Phase> {
    let status = site.tunnel.status();
    let status = status.borrow();
    status.ports.iter().find(|port| port.key == *of && port.role == Role::Visiting).map(|port| port.phase)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_its_site_has_given_to_another_machine_is_carried_for_that_one() {
    let lab = lab_or_skip!();
    let sites = carrying(&lab).await;
    let a = &sites.a.tunnel;
    let dnat = |to: &str| format!("ip daddr {CARE_OF} dnat ip to {to}");
    assert!(lab.network("ga").contains(&dnat(HOME)));

    // That nobody uses it any more was said once, and lost.
    a.carry(carry_request(other_key(), "tapn", &[("198.51.100.20", CARE_OF, "b")]), Vec::new())
        .await
        .unwrap();
    let rules = lab.network("ga");
    assert!(rules.contains(&dnat("198.51.100.20")) && !rules.contains(&dnat(HOME)), "{rules}");
    assert!(rules.contains(&format!("ip6 daddr {CARE_OF_V6} dnat ip6 to {HOME_V6}")), "{rules}");

    // Another site cannot give it away, and what else the machine brings is carried.
    let third = PortKey { machine: "web3".parse().unwrap(), nic: "net0".parse().unwrap() };
    let brought = [("198.51.100.30", CARE_OF, "c"), ("198.51.100.30", ELSEWHERE, "c")];
    a.carry(carry_request(third, "tapn", &brought), Vec::new()).await.unwrap();
    let rules = lab.network("ga");
    assert!(rules.contains(&dnat("198.51.100.20")) && !rules.contains(&dnat("198.51.100.30")), "{rules}");
    assert!(rules.contains(&format!("ip daddr {ELSEWHERE} dnat ip to 198.51.100.30")), "{rules}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_over_has_no_rule_and_the_others_keep_theirs() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let sites = carrying(&lab).await;
    let a = &sites.a.tunnel;
    a.carry_undo(key()).await.unwrap();
    let without = lab.look("ga");
    let brought = [(HOME, ELSEWHERE, "c"), (HOME, CARE_OF, "b")];
    a.carry(carry_request(key(), "tapa", &brought), Vec::new()).await.unwrap();
    let mut open = lab.within("c", || connect(server(CARE_OF)).unwrap()).join().unwrap();
    exchange(&mut open, 100);

    a.forget_address(key(), address(ELSEWHERE)).await.unwrap();
    a.forget_address(key(), address(ELSEWHERE)).await.unwrap();

    let rules = lab.network("ga");
    assert!(!rules.contains(ELSEWHERE) && rules.contains(CARE_OF), "{rules}");
    assert!(!rules.contains("0x00001043") && rules.contains("0x00001044"), "{rules}");
    exchange(&mut open, 100);
    a.carry_undo(key()).await.unwrap();
    assert_same(&lab.look("ga"), &without);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_stays_is_reached_although_an_address_of_it_is_anothers_by_now() {
    let lab = lab_or_skip!();
    let site = lab.start_site("gb", TunnelConfig::default());
    let (mut visit, b) = (visit_request(Vec::new()), &site.tunnel);
    visit.carried = carried(&[(HOME, ELSEWHERE, "c")]);
    b.visit_prepare(visit.clone()).await.unwrap();
    b.visit_resumed(key()).await.unwrap();
    let onward = HoldRequest {
        peer: "c".parse().unwrap(),
        from: Leaving::Visit,
        addresses: vec![address(CARE_OF)],
        port: "tapb".to_owned(),
        ..hold_request()
    };
    b.hold_begin(onward.clone()).await.unwrap();

    // While it is held its site c says that the address is free, and gives it to another machine, which comes here.
    b.forget_address(key(), address(ELSEWHERE)).await.unwrap();
    assert!(!lab.network("gb").contains(ELSEWHERE), "{}", lab.network("gb"));
    let port = b.create_tap(other_key(), 0, None).await.unwrap();
    let mut others = VisitRequest { key: other_key(), port, care_of: Vec::new(), ..visit };
    for (prefix, last) in others.nic.home.iter_mut().zip(["198.51.100.11", "2001:db8:a::11"]) {
        prefix.addr = address(last);
    }
    others.carried[0].home = address("198.51.100.11");
    b.visit_prepare(others).await.unwrap();

    b.hold_undo(onward).await.unwrap();
    let passes = |phase: Option<Phase>| phase.is_some_and(|phase| phase != Phase::Holding);
    let mut status = b.status();
    while !passes(phase(&site, &key())) {
        let changed = tokio::time::timeout(Duration::from_secs(5), status.changed()).await;
        assert!(changed.is_ok(), "{:?}", status.borrow().ports);
    }
    b.visit_undo(other_key()).await.unwrap();
    b.remove_tap(other_key()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datagram_in_fragments_is_answered_the_way_it_came() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    // Where bridges hand packets to the host's tables, which some hosts have switched on, fragments are joined before.
    lab.script("x ga sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 2> /dev/null || true");
    let _sites = carrying(&lab).await;
    let ask = |to: &'static str| {
        let question = move || {
            let any = if to.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(server(to)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
            socket.send(&[7; 1900]).unwrap();
            let mut answer = [0; 2048];
            let len = socket.recv(&mut answer).unwrap_or_default();
            answer[..len] == [7; 1900]
        };
        lab.within("c", question).join().unwrap()
    };
    // By its home address too, towards a client that has a flow by the other one.
    for to in [CARE_OF, CARE_OF_V6, HOME, HOME_V6] {
        assert!(ask(to), "no answer from {to}");
    }
    lab.script("x c ping -c 1 -W 4 -s 1900 203.0.113.10");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_asks_for_a_connection_is_remembered_for_a_moment() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    let _sites = carrying(&lab).await;
    let open = lab.within("c", || connect(server(CARE_OF)).unwrap()).join().unwrap();
    exchange(&mut open.try_clone().unwrap(), 100);
    // A client that does not hear the answers is as good as a forged one.
    lab.script("x c nft 'add table ip deaf; add chain ip deaf in { type filter hook input priority 0; }; add rule ip deaf in tcp flags & (syn | ack) == (syn | ack) drop'");
    let asked = lab.within("c", || {
        std::net::TcpStream::connect_timeout(&server(CARE_OF), Duration::from_millis(300)).is_ok()
    });
    assert!(!asked.join().unwrap());

    let remembered = turned(&lab);
    let live = open.local_addr().unwrap().port();
    assert!(remembered.iter().any(|(port, _)| *port != live), "{remembered:?}");
    for (port, expires) in remembered {
        assert_eq!(expires > 60, port == live, "port {port} for {expires} s");
    }
    // It goes on, and is not shortened by who asks under its name.
    exchange(&mut open.try_clone().unwrap(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_a_forged_reset_concerns_goes_on_when_the_guest_speaks_first() {
    const OWN_PORT: u16 = 7001;
    let lab = lab_or_skip!();
    let _sites = carrying(&lab).await;
    let listening = lab.within("vm", || TcpListener::bind(("0.0.0.0", OWN_PORT)).unwrap()).join().unwrap();
    let to_guest = || connect(SocketAddr::new(address(CARE_OF), OWN_PORT)).unwrap();
    let mut client = lab.within("c", to_guest).join().unwrap();
    let (mut guest, _) = listening.accept().unwrap();
    let (mut heard, port) = ([0; 5], client.local_addr().unwrap().port());
    client.write_all(b"hello").unwrap();
    guest.read_exact(&mut heard).unwrap();
    guest.write_all(&heard).unwrap();
    client.read_exact(&mut heard).unwrap();

    forge_reset(&lab, port, OWN_PORT);
    // Until what is remembered of a connection that was reset is over.
    let begun = Instant::now();
    while turned(&lab).iter().any(|(known, _)| *known == port) {
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", turned(&lab));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    guest.write_all(b"first").unwrap();
    client.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"first");
    client.write_all(b"after").unwrap();
    guest.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"after");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_that_stand_before_the_machine_is_here_are_those_that_it_has_and_go_with_it_or_without() {
    let lab = lab_or_skip!();
    let site = lab.start_site("ga", TunnelConfig::default());
    let a = &site.tunnel;
    let without = lab.look("ga");
    let request = || carry_request(key(), "tapa", &[(HOME, CARE_OF, "b"), (HOME_V6, CARE_OF_V6, "b")]);
    a.carry_prepare(request()).await.unwrap();
    let prepared = lab.look("ga");
    a.carry_undo(key()).await.unwrap();
    assert_same(&lab.look("ga"), &without);
    a.carry_prepare(request()).await.unwrap();
    a.carry(request(), Vec::new()).await.unwrap();
    assert_same(&lab.look("ga"), &prepared);

    // What is another machine's by then is not among them.
    a.carry_undo(key()).await.unwrap();
    a.carry(carry_request(other_key(), "tapn", &[("198.51.100.20", CARE_OF, "c")]), Vec::new())
        .await
        .unwrap();
    a.carry_prepare(request()).await.unwrap();
    a.carry(request(), Vec::new()).await.unwrap();
    let rules = lab.network("ga");
    assert!(!rules.contains(&format!("ip daddr {CARE_OF} dnat ip to {HOME}")), "{rules}");
    assert!(rules.contains(&format!("ip6 daddr {CARE_OF_V6} dnat ip6 to {HOME_V6}")), "{rules}");
    a.carry_undo(key()).await.unwrap();
    a.carry_undo(other_key()).await.unwrap();
    assert_same(&lab.look("ga"), &without);
}

/// A connection from this port.
fn dial_from(port: u16, to: SocketAddr) -> std::net::TcpStream {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], port)).into()).unwrap();
    socket.connect_timeout(&to.into(), Duration::from_secs(10)).unwrap();
    let stream = std::net::TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_dials_the_other_address_from_a_port_that_it_has_used_while_the_machine_was_away() {
    const FROM: u16 = 40_001;
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    // A firewall that knows connections, as hosts have: it tracks what is attracted.
    lab.script("x ga nft 'add table inet fw; add chain inet fw in { type filter hook input priority 0; }; add rule inet fw in ct state established accept'");
    let sites = carrying(&lab).await;
    let a = &sites.a.tunnel;
    a.carry_undo(key()).await.unwrap();
    a.hold_begin(hold_request()).await.unwrap();
    let by_home = lab.within("c", || dial_from(FROM, server(HOME)));
    let tracked = || lab.script("x ga cat /proc/net/nf_conntrack").contains(&format!("sport={FROM}"));
    let begun = Instant::now();
    while !tracked() {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{}",
            lab.script("x ga cat /proc/net/nf_conntrack")
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    a.hold_undo(hold_request()).await.unwrap();
    let mut open = by_home.join().unwrap();
    exchange(&mut open, 100);
    drop(open);

    let brought = [(HOME, CARE_OF, "b"), (HOME_V6, CARE_OF_V6, "b")];
    a.carry(carry_request(key(), "tapa", &brought), Vec::new()).await.unwrap();
    assert!(tracked(), "what stands in its way is there");
    let by_visit = lab.within("c", || {
        let mut open = dial_from(FROM, server(CARE_OF));
        exchange(&mut open, 100);
    });
    by_visit.join().expect("answered");
}
