//! A guest whose IPv6 address and default route come from the router of its home keeps them where it visits.
//!
//! The guest is a kernel that takes advertisements. The router of its home is a thread with a socket, and says what it is
//! only when it is asked; in the visited site's LAN somebody listens.

use std::io::{ErrorKind, Read};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::*;

const CLIENT_V6: &str = "2001:db8:c::10";
const LIMIT: Duration = Duration::from_secs(30);

struct HomeRouter {
    quit: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HomeRouter {
    /// Answers solicitations at home; what it says holds for `lifetime_s`.
    fn start(lab: &Lab, lifetime_s: u16) -> Self {
        let mac = lab.script("x ra cat /sys/class/net/lan/address");
        let mac: Vec<u8> =
            mac.trim().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
        let quit = Arc::new(AtomicBool::new(false));
        let (quitting, (ready, opened)) = (quit.clone(), std::sync::mpsc::channel());
        let thread = lab.within("ra", move || {
            let mut socket = icmp_socket();
            ready.send(()).unwrap();
            while !quitting.load(Ordering::Relaxed) {
                if message(&mut socket).is_some_and(|message| message[0] == 133) {
                    let device = nix::net::if_::if_nametoindex("lan").unwrap();
                    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
                    let to = SockAddr::from(SocketAddrV6::new(all_nodes, 0, 0, device));
                    socket.send_to(&advertisement(&mac, lifetime_s), &to).unwrap();
                }
            }
        });
        opened.recv().unwrap();
        Self { quit, thread: Some(thread) }
    }
}

impl Drop for HomeRouter {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the router ends");
        }
    }
}

fn advertisement(mac: &[u8], lifetime_s: u16) -> Vec<u8> {
    let mut message = vec![134, 0, 0, 0, 64, 0];
    message.extend(lifetime_s.to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(mac);
    message.extend([3, 4, 64, 0xc0]);
    message.extend([u32::from(lifetime_s).to_be_bytes(); 2].concat());
    message.extend([0; 4]);
    message.extend("2001:db8:a::".parse::<Ipv6Addr>().unwrap().octets());
    message
}

/// Hears and says ICMPv6 on the device `lan` of the namespace it is opened in.
fn icmp_socket() -> Socket {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
    socket.bind_device(Some(b"lan")).unwrap();
    socket.set_multicast_hops_v6(255).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    socket
}

fn message(socket: &mut Socket) -> Option<Vec<u8>> {
    let mut buffer = [0; 1500];
    match socket.read(&mut buffer) {
        Ok(len) => Some(buffer[..len].to_vec()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

/// The guest's IPv6 begins anew, as after a boot: it knows nothing and asks for its routers.
fn boot(lab: &Lab) {
    lab.script(
        "x vm sysctl -qw net.ipv6.conf.v0.disable_ipv6=1
         x vm sysctl -qw net.ipv6.conf.v0.accept_ra=1 net.ipv6.conf.v0.autoconf=1 net.ipv6.conf.v0.use_tempaddr=0 \\
           net.ipv6.conf.v0.router_solicitation_delay=0
         x vm sysctl -qw net.ipv6.conf.v0.disable_ipv6=0
         x vm ip token set ::10 dev v0",
    );
}

fn default_route(lab: &Lab) -> String {
    lab.script("x vm ip -6 route show default")
}

/// Seconds until the default route runs out; the kernel lists one that did for a while.
fn left_s(lab: &Lab) -> Option<i32> {
    let route = default_route(lab);
    let (_, expires) = route.split_once("expires ")?;
    expires.split("sec").next()?.parse().ok()
}

fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < LIMIT, "not in {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A guest at home that has all it knows of IPv6 from its router, and both sites. The router is silent afterwards.
async fn begin_with_router(lab: &Lab, lifetime_s: u16) -> (Sites, Vec<Neighbour>) {
    let router = HomeRouter::start(lab, lifetime_s);
    let sites = lab.start_sites(TunnelConfig::default()).await;
    sites.a.tunnel.sample_begin(key(), "tapa".to_owned()).await.unwrap();
    sites.a.tunnel.solicit_routers("br0".to_owned()).await.unwrap();
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    assert_eq!(neighbours.iter().filter_map(|it| it.advertises()).count(), 1, "{neighbours:?}");
    boot(lab);
    wait_until("an address and a route of the router", || {
        default_route(lab).contains("via fe80:") && lab.script("x vm ip -6 addr").contains(HOME_V6)
    });
    drop(router);
    (sites, neighbours)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_keeps_a_route_and_a_prefix_of_seconds_and_its_connections_for_as_long_as_it_visits() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "vm");
    serve_echo(&lab, "c");
    let mut listener = lab.within("rb", icmp_socket).join().unwrap();
    let (sites, neighbours) = begin_with_router(&lab, 9).await;
    let mut open = lab.within("c", || connect(server(HOME_V6)).unwrap()).join().unwrap();
    exchange(&mut open, 1000);

    sites.move_guest(&lab, visit_request(neighbours)).await;

    let mut renewed = 0;
    let mut last = left_s(&lab).expect("a route that ends");
    wait_until("a route that was renewed for two of its lifetimes", || {
        let now = left_s(&lab).expect("a route that ends");
        assert!(now > 0, "it has run out");
        renewed += u32::from(now > last);
        last = now;
        renewed == 7
    });
    exchange(&mut open, 1000);
    lab.within("vm", || exchange(&mut connect(server(CLIENT_V6)).unwrap(), 1000)).join().unwrap();
    sites.b.tunnel.visit_undo(key()).await.unwrap();
    wait_until("a route that runs out after the visit", || left_s(&lab).is_none_or(|left| left <= 0));
    let heard = std::iter::from_fn(|| message(&mut listener));
    assert_eq!(heard.filter(|message| message[0] == 134).count(), 0, "the visited LAN hears nothing of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_boots_where_it_visits_asks_for_its_router_and_finds_it_there() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "c");
    let (sites, neighbours) = begin_with_router(&lab, 1800).await;
    let (router, _) = neighbours.iter().find_map(|it| it.advertises()).unwrap();
    sites.move_guest(&lab, visit_request(neighbours)).await;

    let begun = Instant::now();
    boot(&lab);
    wait_until("a route after a boot", || !default_route(&lab).is_empty());
    // Unasked it would be said again after 16 seconds.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // A router that is asked whether it is there and answers as a host is none any more (RFC 4861, 7.2.5).
    let mac = lab.script(&format!("x vm ip -6 neigh show {router} | sed 's/.*lladdr //;s/ .*//'"));
    lab.script(&format!("x vm ip -6 neigh change {router} lladdr {} dev v0 router nud probe", mac.trim()));
    wait_until("a router that answers", || {
        lab.script(&format!("x vm ip -6 neigh show {router}")).contains("REACHABLE")
    });
    let neighbour = lab.script(&format!("x vm ip -6 neigh show {router}"));
    assert!(neighbour.contains("router") && !default_route(&lab).is_empty(), "{neighbour}");
    lab.within("vm", || exchange(&mut connect(server(CLIENT_V6)).unwrap(), 1000)).join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_comes_home_does_not_lose_its_router() {
    let lab = lab_or_skip!();
    serve_echo(&lab, "c");
    serve_echo(&lab, "n");
    let (sites, neighbours) = begin_with_router(&lab, 1800).await;
    sites.move_guest(&lab, visit_request(neighbours)).await;

    lab.unplug_guest();
    sites.b.tunnel.visit_undo(key()).await.unwrap();
    lab.plug_guest("a");
    let neighbours = sites.a.tunnel.home_neighbours("br0".to_owned()).await.unwrap();
    sites.a.tunnel.come_back(key(), neighbours).await.unwrap();

    // What is answered here was sent after the guest was told its neighbours.
    lab.within("vm", || exchange(&mut connect(server("198.51.100.20")).unwrap(), 1000)).join().unwrap();
    assert!(default_route(&lab).contains("via fe80:"), "{}", default_route(&lab));
    lab.within("vm", || exchange(&mut connect(server(CLIENT_V6)).unwrap(), 1000)).join().unwrap();
}
