//! Two sites, their routers, a client and a guest, in network namespaces that go when the lab does.
//!
//! ```text
//!   client ── core (drops forged sources) ──┬── ra (stateful, strict) ── ga: br0 ── tapa ─┐
//!   192.0.2.10                              │            198.51.100.0/24   neighbour       ├─ plug ── guest
//!                                           └── rb ────────────────────── gb: br0   tapb ─┘    198.51.100.10
//!                                                        203.0.113.0/24
//! ```
//!
//! The guest hangs on a bridge in `plug`, which is connected to the port of one site or the other: like
//! a real machine it never sees its link go down, and the ports exist at both sites all the time.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use gateway::tunnel::{CareOf, DatagramPath, HoldRequest, Leaving, Tunnel, TunnelConfig, VisitRequest};
use longhaul_core::tunnel::handover::{Mac, Neighbour, NicHandover, Prefix};
use longhaul_core::tunnel::policy::PortKey;
use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

pub const HOME: &str = "198.51.100.10";
pub const HOME_V6: &str = "2001:db8:a::10";
pub const CARE_OF: &str = "203.0.113.10";
pub const CARE_OF_V6: &str = "2001:db8:b::10";
pub const CLIENT: &str = "192.0.2.10";
pub const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0xaa, 0, 0x10]);
pub const DATAGRAM: usize = 1200;
const ONE_WAY: Duration = Duration::from_millis(20);

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Lab {
    prefix: String,
}

/// A gateway's tunnel on a thread that lives in a site's namespace.
pub struct Site {
    pub tunnel: Tunnel,
    quit: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Both sites' tunnels, connected.
pub struct Sites {
    pub a: Site,
    pub b: Site,
    pub link_is_up: Arc<AtomicBool>,
    /// Of a thousand datagrams so many are lost, in either direction.
    pub lost_per_mille: Arc<AtomicU32>,
}

struct ChannelPath {
    datagrams: mpsc::Sender<(Instant, Bytes)>,
    is_up: Arc<AtomicBool>,
    lost_per_mille: Arc<AtomicU32>,
    draws: AtomicU32,
}

impl ChannelPath {
    /// The same losses in every run (a linear congruential generator: Numerical Recipes, 7.1).
    fn is_lost(&self) -> bool {
        let next = |draw: u32| Some(draw.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        let drawn =
            self.draws.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).expect("always a next");
        (drawn >> 16) % 1000 < self.lost_per_mille.load(Ordering::Relaxed)
    }
}

impl DatagramPath for ChannelPath {
    fn try_send(&self, datagram: Bytes) -> bool {
        assert!(datagram.len() <= DATAGRAM);
        if self.is_up.load(Ordering::Relaxed) && self.is_lost() {
            return true;
        }
        self.is_up.load(Ordering::Relaxed)
            && self.datagrams.try_send((Instant::now() + ONE_WAY, datagram)).is_ok()
    }

    fn max_len(&self) -> usize {
        if self.is_up.load(Ordering::Relaxed) { DATAGRAM } else { 0 }
    }

    fn rtt(&self) -> Option<Duration> {
        self.is_up.load(Ordering::Relaxed).then_some(2 * ONE_WAY)
    }
}

/// Why the lab cannot be built here, if so.
pub fn unavailable() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    let missing = ["ip", "bridge", "nft"].into_iter().find(|tool| {
        !Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output()
            .is_ok_and(|o| o.status.success())
    });
    missing.map(|tool| format!("{tool} is not installed"))
}

impl Lab {
    pub fn new() -> Self {
        let prefix = format!("lhtunnel{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lab = Self { prefix };
        lab.script(include_str!("topology.sh"));
        lab
    }

    pub fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Runs a shell script with `$P` being the lab's prefix and `x NAME COMMAND` running in a namespace.
    pub fn script(&self, script: &str) -> String {
        let prelude = "set -e; x() { n=$1; shift; ip netns exec $P$n \"$@\"; }\n";
        let output = Command::new("sh")
            .args(["-c", &format!("{prelude}{script}")])
            .env("P", &self.prefix)
            .output()
            .expect("sh runs");
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{script}: {stderr}");
        stdout.into_owned()
    }

    /// Runs `work` on a thread inside a namespace.
    pub fn within<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let path = format!("/run/netns/{}", self.namespace(name));
        std::thread::spawn(move || {
            let namespace = File::open(&path).expect("the namespace is there");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("we are root");
            work()
        })
    }

    /// Pulls the guest's plug: it runs, and nothing reaches it or leaves it.
    pub fn unplug_guest(&self) {
        self.script("ip -n ${P}plug link set pa nomaster; ip -n ${P}plug link set pb nomaster");
    }

    /// Plugs the guest in at site `a` or `b`.
    pub fn plug_guest(&self, site: &str) {
        self.script(&format!("ip -n ${{P}}plug link set p{site} master sw"));
    }

    pub fn start_site(&self, name: &str, config: TunnelConfig) -> Site {
        let (send_tunnel, tunnel) = std::sync::mpsc::channel();
        let (quit, quitting) = oneshot::channel();
        let thread = self.within(name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                send_tunnel.send(start(&config).await).unwrap();
                let _ = quitting.await;
            });
        });
        let tunnel = tunnel.recv().expect("the tunnel starts");
        Site { tunnel, quit: Some(quit), thread: Some(thread) }
    }

    pub async fn start_sites(&self, config: TunnelConfig) -> Sites {
        let (a, b) = (self.start_site("ga", config.clone()), self.start_site("gb", config));
        let link_is_up = Arc::new(AtomicBool::new(true));
        let lost_per_mille = Arc::new(AtomicU32::new(0));
        connect(&a, &b, &link_is_up, &lost_per_mille).await;
        Sites { a, b, link_is_up, lost_per_mille }
    }

    /// All that a gateway may have changed at a host, as text.
    pub fn look(&self, host: &str) -> String {
        self.network(host) + &self.switches(host)
    }

    /// Routes, rules, neighbours, links and nft rules of a host, as text.
    pub fn network(&self, name: &str) -> String {
        self.script(&format!(
            "x {name} ip route show table all; echo; x {name} ip -6 route show table all; echo
             x {name} ip rule; echo; x {name} ip -6 rule; echo
             x {name} ip neigh show proxy; echo; x {name} ip -6 neigh show proxy; echo
             x {name} ip neigh show nud permanent; echo; x {name} ip -6 neigh show nud permanent; echo
             x {name} bridge fdb show | grep permanent | sort
             x {name} ip -o link | sed 's/ state [A-Z]*//;s/<[^>]*>//'
             x {name} nft -s -t list ruleset"
        ))
    }

    /// The kernel switches of a host's network, as text.
    pub fn switches(&self, name: &str) -> String {
        self.script(&format!(
            "x {name} sh -c 'cd /proc/sys/net; grep -rs . ipv4/conf ipv4/neigh ipv4/ip_forward \\
               ipv6/conf ipv6/neigh netfilter/nf_conntrack_tcp_loose netfilter/nf_conntrack_tcp_be_liberal' \\
               | grep -vE 'stable_secret|expires|/lh0/' | sort"
        ))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in ["c", "r", "ra", "rb", "ga", "gb", "plug", "vm", "n", "s"] {
            // One that was never made cannot be deleted.
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(name)]).output();
        }
    }
}

/// The device of a site that crashed is there for as long as a program that another test is just starting has it open, which is
/// until it is executed.
async fn start(config: &TunnelConfig) -> Tunnel {
    for _ in 0..40 {
        match Tunnel::start(config.clone()).await {
            Ok(tunnel) => return tunnel,
            Err(error) => println!("the tunnel is started again: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the tunnel does not start");
}

impl Site {
    /// Ends the gateway's thread without any tidying, as a crash would.
    pub fn crash(&mut self) {
        drop(self.quit.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the site's thread ends");
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        drop(self.quit.take());
    }
}

impl Sites {
    /// The order of a migration: rules, hold, stop, flows, attract, resume. Returns how long the guest was
    /// unplugged.
    pub async fn move_guest(&self, lab: &Lab, visit: VisitRequest) -> Duration {
        let begun = Instant::now();
        self.b.tunnel.visit_prepare(visit).await.unwrap();
        let prepared = begun.elapsed();
        let flows = self.a.tunnel.sample(key()).await.unwrap_or_default();
        let sampled = begun.elapsed() - prepared;
        self.a.tunnel.hold_begin(hold_request()).await.unwrap();
        let stopped = Instant::now();
        println!(
            "prepared in {prepared:?}, sampled in {sampled:?}, held in {:?}",
            begun.elapsed() - sampled - prepared
        );
        lab.unplug_guest();
        self.b.tunnel.visit_flows(key(), flows.clone()).await.unwrap();
        self.a.tunnel.hold_end_attract(key(), flows).await.unwrap();
        lab.plug_guest("b");
        self.b.tunnel.visit_resumed(key()).await.unwrap();
        stopped.elapsed()
    }
}

/// Fails with the lines that differ.
pub fn assert_same(now: &str, before: &str) {
    let (now, before): (BTreeSet<_>, BTreeSet<_>) = (now.lines().collect(), before.lines().collect());
    let added: Vec<_> = now.difference(&before).collect();
    let gone: Vec<_> = before.difference(&now).collect();
    assert!(added.is_empty() && gone.is_empty(), "added {added:#?}\ngone {gone:#?}");
}

pub fn key() -> PortKey {
    PortKey { machine: "web1".parse().unwrap(), nic: "net0".parse().unwrap() }
}

pub fn hold_request() -> HoldRequest {
    HoldRequest {
        key: key(),
        peer: "b".parse().unwrap(),
        mac: GUEST_MAC,
        from: Leaving::Home,
        addresses: vec![address(HOME), address(HOME_V6)],
        port: "tapa".to_owned(),
        lan: "br0".to_owned(),
    }
}

pub fn visit_request(neighbours: Vec<Neighbour>) -> VisitRequest {
    let prefix = |addr: &str, len| Prefix { addr: address(addr), len };
    VisitRequest {
        key: key(),
        peer: "a".parse().unwrap(),
        from: None,
        carried: Vec::new(),
        nic: NicHandover {
            nic: "net0".parse().unwrap(),
            mac: GUEST_MAC,
            home: vec![prefix(HOME, 24), prefix(HOME_V6, 64)],
            neighbours,
            home_prefixes: vec![prefix(HOME, 24), prefix(HOME_V6, 64)],
            flows: Vec::new(),
        },
        others: Vec::new(),
        port: "tapb".to_owned(),
        lan: "br0".to_owned(),
        care_of: vec![
            CareOf { home: address(HOME), care_of: address(CARE_OF) },
            CareOf { home: address(HOME_V6), care_of: address(CARE_OF_V6) },
        ],
    }
}

pub fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

async fn connect(a: &Site, b: &Site, is_up: &Arc<AtomicBool>, lost: &Arc<AtomicU32>) {
    let (a_to_b, into_b) = channel(is_up, lost);
    let (b_to_a, into_a) = channel(is_up, lost);
    a.tunnel.add_peer("b".parse().unwrap(), a_to_b, into_a).await.unwrap();
    b.tunnel.add_peer("a".parse().unwrap(), b_to_a, into_b).await.unwrap();
}

/// One direction of a link with a delay.
fn channel(is_up: &Arc<AtomicBool>, lost: &Arc<AtomicU32>) -> (Arc<ChannelPath>, mpsc::Receiver<Bytes>) {
    let (datagrams, mut delayed) = mpsc::channel::<(Instant, Bytes)>(4096);
    let (arrive, incoming) = mpsc::channel(4096);
    tokio::spawn(async move {
        while let Some((due, datagram)) = delayed.recv().await {
            tokio::time::sleep_until(due).await;
            if arrive.send(datagram).await.is_err() {
                return;
            }
        }
    });
    let (is_up, lost_per_mille) = (is_up.clone(), lost.clone());
    (Arc::new(ChannelPath { datagrams, is_up, lost_per_mille, draws: AtomicU32::new(1) }), incoming)
}
