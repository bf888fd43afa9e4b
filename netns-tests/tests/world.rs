//! The world that the demo runs in: reachability, filters, and that nothing of it stays behind, however the lab ends.
//! Without root every test is skipped. The tests of one process take turns.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use netns_tests::cleanup::{self, Lab, Snapshot, left_behind};
use netns_tests::install;
use netns_tests::netns::{self, LabId, Namespace};
use netns_tests::topology::{CLIENT, CLIENT6, NAME_SERVER, SiteSpec, World, WorldSpec};
use netns_tests::wan::{Direction, Emulator, PacketMatch, WanProfile};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Set for the copy of this test binary that plays a lab to be ended from outside; its value is what to do.
const PART: &str = "LONGHAUL_TEST_PART";
const TIMEOUT: Duration = Duration::from_secs(5);

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn not_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    println!("skipped: network namespaces need root");
    true
}

/// Two sites, 20 ms apart from the client at b, no loss.
fn world() -> World {
    let wan = WanProfile::symmetric(100.0, Duration::from_millis(20), 0.0);
    World::build(Lab::start().unwrap(), &WorldSpec::two_sites(wan, Emulator::Userspace, 4433)).unwrap()
}

fn close(world: World) {
    let left = world.close();
    assert!(left.is_empty(), "{left:?}");
}

/// Accepts connections and returns what they send, until the process ends.
fn echo_on(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut reader, &mut &stream);
            });
        }
    });
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<Duration> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let begun = Instant::now();
    stream.write_all(b"record")?;
    let mut answer = [0; 6];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"record");
    Ok(begun.elapsed())
}

#[test]
fn the_client_reaches_both_sites_and_the_far_one_over_the_wan() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let begun = Instant::now();
    let world = world();
    println!("world built in {:?}", begun.elapsed());
    let direct =
        world.watch_client_to("b", "to_b", PacketMatch::to(SiteSpec::b().host_address().into())).unwrap();
    let through_a =
        world.watch_router("a", "b_via_a", PacketMatch::to(SiteSpec::b().host_address().into())).unwrap();
    for site in &world.sites {
        let wan_ms = if site.spec.name == "b" { 20 } else { 0 };
        for address in [IpAddr::from(site.host_address()), site.spec.address6(2).into()] {
            let listener = SocketAddr::new(address, 80);
            echo_on(site.host.tcp_listener(listener).unwrap());
            let mut stream = world.client.tcp_connect(listener, TIMEOUT).unwrap();
            let time = exchange(&mut stream).unwrap().as_millis();
            assert!((wan_ms..wan_ms + 100).contains(&time), "{address}: {time} ms");
        }
        world.client.output("ping", &["-c1", "-W2", &site.host_address().to_string()]).unwrap();
        world.dns.output("ping", &["-c1", "-W2", &site.host_address().to_string()]).unwrap();
        site.host.output("ping", &["-c1", "-W2", &NAME_SERVER.to_string()]).unwrap();
        site.host.output("ping", &["-6", "-c1", "-W2", &CLIENT6.to_string()]).unwrap();
    }
    let (hosts, b) = (&world.sites, world.sites[1].host_address());
    hosts[0].host.output("ping", &["-c1", "-W2", &b.to_string()]).unwrap();
    assert!(direct.tally().unwrap().packets >= 4, "requests to b go straight to b");
    assert_eq!(through_a.tally().unwrap().packets, 1, "only site a's own ping went that way");
    let counted = world.wan.counters(Direction::ToFar).unwrap();
    assert!(counted.class("other").unwrap().pairs.contains_key(&(CLIENT.into(), b.into())));
    close(world);
}

#[test]
fn a_neighbour_on_the_lan_is_reached_from_its_host_and_from_the_other_site() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let world = world();
    let database = world.add_lan_host("a", "db", 20).unwrap();
    let address = SiteSpec::a().address(20).to_string();
    world.sites[0].host.output("ping", &["-c1", "-W2", &address]).unwrap();
    world.sites[1].host.output("ping", &["-c1", "-W2", &address]).unwrap();
    database.output("ping", &["-c1", "-W2", &CLIENT.to_string()]).unwrap();
    close(world);
}

#[test]
fn a_router_keeps_its_link_layer_address_whatever_is_plugged_in() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let world = world();
    let router = &world.site("a").unwrap().router;
    let address = || router.output("ip", &["-brief", "link", "show", "lan"]).unwrap().trim().to_owned();
    let before = address();
    for number in 20..25 {
        world.add_lan_host("a", &format!("plugged{number}"), number).unwrap();
        assert_eq!(address(), before, "host {number}");
    }
    close(world);
}

#[test]
fn the_core_drops_foreign_sources_of_a_site() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let world = world();
    let home = SiteSpec::a().address(10);
    world.sites[1].host.ip(&[format!("addr add {home}/32 dev lo")]).unwrap();
    let client = world.client.udp_socket(SocketAddr::new(CLIENT.into(), 9000)).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let send = |source: Ipv4Addr| {
        let socket = world.sites[1].host.udp_socket(SocketAddr::new(source.into(), 0)).unwrap();
        socket.send_to(b"reply", SocketAddr::new(CLIENT.into(), 9000)).unwrap();
        client.recv(&mut [0; 16])
    };
    assert_eq!(send(SiteSpec::b().host_address()).unwrap(), 5);
    assert_eq!(send(home).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(world.foreign_dropped("b").unwrap().packets, 1);
    assert_eq!(world.foreign_dropped("a").unwrap().packets, 0);
    close(world);
}

#[test]
fn a_router_that_forgot_a_connection_drops_it_and_admits_only_open_ports() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let world = world();
    let host = &world.sites[0].host;
    let open = SocketAddr::new(world.sites[0].host_address().into(), 80);
    let shut = SocketAddr::new(world.sites[0].host_address().into(), 81);
    echo_on(host.tcp_listener(open).unwrap());
    echo_on(host.tcp_listener(shut).unwrap());
    let mut old = world.client.tcp_connect(open, TIMEOUT).unwrap();
    exchange(&mut old).unwrap();
    assert_eq!(world.firewall_counts("a").unwrap().invalid.packets, 0);
    world.forget_connections("a").unwrap();
    assert_eq!(exchange(&mut old).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(world.firewall_counts("a").unwrap().invalid.packets > 0);
    exchange(&mut world.client.tcp_connect(open, TIMEOUT).unwrap()).unwrap();
    assert!(world.client.tcp_connect(shut, Duration::from_millis(300)).is_err());
    assert!(world.firewall_counts("a").unwrap().denied.packets > 0);
    close(world);
}

/// Super-packets cross TUN, firewall, veth and bridge in both directions and both families; big pings come in fragments.
#[test]
fn content_arrives_whole_across_the_lossy_wan() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let wan = WanProfile::symmetric(300.0, Duration::from_millis(6), 0.002);
    let spec = WorldSpec::two_sites(wan, Emulator::Userspace, 4433);
    let world = World::build(Lab::start().unwrap(), &spec).unwrap();
    let site = world.site("b").unwrap();
    let content: Vec<u8> = (0..5_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for address in [IpAddr::from(site.host_address()), site.spec.address6(2).into()] {
        let listener = SocketAddr::new(address, 7000);
        echo_on(site.host.tcp_listener(listener).unwrap());
        let stream = world.client.tcp_connect(listener, TIMEOUT).unwrap();
        let mut back = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                (&stream).write_all(&content).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            });
            (&stream).read_to_end(&mut back).unwrap();
        });
        assert!(back == content, "{address}: the content is not what was sent");
    }
    world.client.output("ping", &["-c1", "-W2", "-s", "4000", &site.host_address().to_string()]).unwrap();
    for direction in Direction::BOTH {
        let counters = world.wan.counters(direction).unwrap();
        assert!(counters.lost.packets > 0, "{direction:?}");
        assert_eq!((counters.write_failed.packets, counters.kernel_dropped), (0, 0));
    }
    close(world);
}

#[test]
fn without_root_there_is_one_line_and_exit_code_two() {
    if std::env::var(PART).as_deref() == Ok("unprivileged") {
        install::ensure_root();
        return;
    }
    if not_root() {
        return;
    }
    // A process forked meanwhile by another test would hold the copy open for writing: "text file busy".
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new(&program)
        .args(["--exact", "without_root_there_is_one_line_and_exit_code_two", "--nocapture"])
        .env(PART, "unprivileged")
        .current_dir("/")
        .stdin(Stdio::null())
        .gid(65534)
        .uid(65534)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn three_sites_reach_each_other() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let wan = WanProfile::symmetric(100.0, Duration::from_millis(2), 0.0);
    let mut spec = WorldSpec::two_sites(wan, Emulator::Userspace, 4433);
    spec.sites.push(SiteSpec::c());
    let world = World::build(Lab::start().unwrap(), &spec).unwrap();
    for from in &world.sites {
        for to in &world.sites {
            from.host.output("ping", &["-c1", "-W2", &to.host_address().to_string()]).unwrap();
        }
    }
    close(world);
}

#[test]
fn a_closed_world_leaves_nothing_not_even_a_stubborn_process() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let before = Snapshot::take().unwrap();
    let world = world();
    let (id, scratch) = (world.lab.id().clone(), world.lab.scratch().to_owned());
    std::fs::write(scratch.join("disk.raw"), "blocks").unwrap();
    let mut stubborn = Command::new("sh");
    stubborn.args(["-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]).stdout(Stdio::piped());
    let mut child = world.client.spawn(&mut stubborn).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    world.sites[0].host.ip(&["tuntap add dev tap0 mode tap"]).unwrap();
    assert!(!left_behind(&id, &scratch, &before).is_empty());
    close(world);
    child.wait().unwrap();
    assert!(!scratch.exists());
    assert_eq!(Snapshot::take().unwrap().since(&before, &id), Vec::<String>::new());
}

#[test]
fn a_panic_leaves_nothing() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let id = Mutex::new(None);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let world = world();
        *id.lock().unwrap() = Some(world.lab.id().clone());
        panic!("for the test");
    }));
    assert!(panicked.is_err());
    let id = id.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap();
    assert_eq!(cleanup::namespaces(&id), Vec::<String>::new());
}

#[test]
fn a_lab_killed_in_the_middle_is_removed_by_the_next_start() {
    if play_a_part("killed") || not_root() {
        return;
    }
    let _turn = turn();
    let before = Snapshot::take().unwrap();
    let (mut child, id, scratch) =
        other_lab("a_lab_killed_in_the_middle_is_removed_by_the_next_start", "killed");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(cleanup::namespaces(&id).len(), 7, "a killed lab cannot remove anything itself");
    assert!(!cleanup::processes(&id).is_empty());
    let next = Lab::start().unwrap();
    assert_eq!(left_behind(&id, &scratch, &before), Vec::<String>::new());
    assert_eq!(next.close(), Vec::<String>::new());
}

#[test]
fn an_interrupted_lab_removes_itself_and_says_so_in_its_exit_code() {
    if play_a_part("interrupted") || not_root() {
        return;
    }
    let _turn = turn();
    let before = Snapshot::take().unwrap();
    let test = "an_interrupted_lab_removes_itself_and_says_so_in_its_exit_code";
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let (mut child, id, scratch) = other_lab(test, "interrupted");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert_eq!(left_behind(&id, &scratch, &before), Vec::<String>::new());
    }
}

#[test]
fn a_live_lab_is_not_taken_for_a_crashed_one() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let first = Lab::start().unwrap();
    let namespace = first.namespace("one").unwrap();
    let second = Lab::start().unwrap();
    assert!(namespace.inode().is_ok());
    assert_ne!(first.id(), second.id());
    assert_eq!(second.close(), Vec::<String>::new());
    assert!(netns::names().contains(&namespace.name().to_owned()));
    assert_eq!(first.close(), Vec::<String>::new());
}

#[test]
fn tokio_sockets_and_processes_are_inside() {
    if not_root() {
        return;
    }
    let _turn = turn();
    let world = world();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let address = SocketAddr::new(world.sites[0].host_address().into(), 80);
        let listener = world.sites[0].host.tcp_listener_async(address).unwrap();
        let socket = world.client.tcp_socket_async(address).unwrap();
        let (accepted, connected) = tokio::join!(listener.accept(), socket.connect(address));
        assert_eq!(accepted.unwrap().1.ip(), IpAddr::from(CLIENT));
        drop(connected.unwrap());
        let mut command = tokio::process::Command::new("readlink");
        command.arg("/proc/self/ns/net").stdout(Stdio::piped());
        let output = world.client.spawn_async(&mut command).unwrap().wait_with_output().await.unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), inode_text(&world.client));
    });
    close(world);
}

fn inode_text(namespace: &Namespace) -> String {
    format!("net:[{}]\n", namespace.inode().unwrap())
}

/// Starts this test binary again as a lab of its own and waits until its world stands.
fn other_lab(test: &str, part: &str) -> (Child, LabId, PathBuf) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(PART, part)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut words = lines.map_while(Result::ok).filter_map(|line| {
        let (_, rest) = line.split_once("LAB ")?;
        Some(rest.to_owned())
    });
    let line = words.next().expect("the other lab says its id");
    let (id, scratch) = line.split_once(' ').unwrap();
    (child, LabId::parse(id).unwrap(), PathBuf::from(scratch))
}

/// In the copy made by [`other_lab`]: builds a world with a process and a file, says so, and waits for its end.
fn play_a_part(part: &str) -> bool {
    if std::env::var(PART).as_deref() != Ok(part) {
        return false;
    }
    cleanup::remove_on_signals().unwrap();
    let world = world();
    std::fs::write(world.lab.scratch().join("disk.raw"), "blocks").unwrap();
    let child = world.sites[1].host.spawn(Command::new("sleep").arg("1000")).unwrap();
    println!("LAB {} {}", world.lab.id(), world.lab.scratch().display());
    std::thread::sleep(Duration::from_secs(60));
    drop((child, world));
    true
}
