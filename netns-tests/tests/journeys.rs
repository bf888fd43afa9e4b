//! Machines that move more than once: home again, on to a third site, back and forth. Connections that were opened at
//! any of its places live on.
//!
//! Each test has its own scene; they take turns. What a single move does is looked at elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/beside.rs"]
mod beside;
#[path = "support/disk_bytes.rs"]
mod disk_bytes;
#[path = "support/elsewhere.rs"]
mod elsewhere;
#[path = "support/lease.rs"]
mod lease;
#[path = "support/quic.rs"]
mod quic;
#[path = "support/scenes.rs"]
mod scenes;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use gateway::api::types::{FlowsView, MigrationView, Progressing};
use longhaul_core::tunnel::flows::{FlowOrigin, FlowState};
use netns_tests::agent::client::ask;
use netns_tests::agent::control::AgentStatus;
use netns_tests::agent::{DOWNLOAD_PORT, IDLE_PORT, RECORD_PORT};
use netns_tests::exec::run_with_input;
use netns_tests::scenario::disk_check::{arrived_disk, blocks_that_differ, compare_at, kept_disk};
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::names::Names;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::outside::attracts;
use netns_tests::scenario::scene::{Scene, VM};
use netns_tests::scenario::traffic::Client;
use netns_tests::topology::{CLIENT, Watch};
use netns_tests::traffic::{
    CLOSE_AFTER_CUT_MS, DownloadPlan, IdlePlan, Outcome, RecordPlan, TrafficPlan, TrafficReport,
};
use netns_tests::wan::PacketMatch;

use beside::{Beside, through};
use disk_bytes::begun_with_disk_bytes;
use elsewhere::Elsewhere;
use scenes::{build, close, state, turn, wait};

const SECOND: Duration = Duration::from_secs(1);
/// Generous: guests run without hardware help, and the machine may be busy.
const MOVE_LIMIT: Duration = Duration::from_secs(120);

/// A connection may be silent for so long in a move; one that was lost for a stay comes back after more, when its machine moves
/// on and a packet is repeated.
const SILENT_MS: u64 = 2500;

/// What the path between two sites takes where it is narrow.
const NARROW_MTU: u32 = 1280;

fn options(name: &str) -> SceneOptions {
    SceneOptions {
        ttl_s: 5,
        // Old connections decide; nobody is to be cut because the test was slow.
        quiet_s: 20,
        ..SceneOptions::small(format!("journeys-{name}"))
    }
}

/// Moves the machine; afterwards it runs there alone.
async fn moved(scene: &Scene, from: &str, to: &str) -> MigrationView {
    let id = scene.begin_move_between(from, to).await.unwrap();
    arrived(scene, from, to, &id).await
}

/// Waits until a move has ended well.
async fn arrived(scene: &Scene, from: &str, to: &str, id: &str) -> MigrationView {
    let view = scene.wait_move_from(from, id, MOVE_LIMIT).await.unwrap();
    let (source, destination) = (scene.gateway(from).unwrap(), scene.gateway(to).unwrap());
    assert_eq!(
        view.progressing,
        Progressing::Moved,
        "{:?}\n{}\n{}",
        view.reason,
        source.log_tail(),
        destination.log_tail()
    );
    assert_eq!(state(destination).as_deref(), Some("running"));
    assert_eq!(state(source), None);
    view
}

/// Moves the machine; gives also what passed the WAN in both directions until its disks were in step.
async fn moved_with_disk_bytes(scene: &Scene, from: &str, to: &str) -> (MigrationView, u64) {
    let (id, disk) = begun_with_disk_bytes(scene, VM, from, to, MOVE_LIMIT).await;
    (arrived(scene, from, to, &id).await, disk)
}

/// Changes one byte of a disk, in a block that is not empty.
fn flip_a_byte(disk: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(disk).unwrap();
    let mut block = vec![0; 64 << 10];
    for at in (0..file.metadata().unwrap().len()).step_by(block.len()) {
        file.read_exact_at(&mut block, at).unwrap();
        if let Some(byte) = block.iter().position(|byte| *byte != 0) {
            return file.write_all_at(&[block[byte] ^ 1], at + byte as u64).unwrap();
        }
    }
    panic!("{} is empty", disk.display());
}

/// Compares the disk of the machine, which is at `at`, with what the site it came from `kept`. Stops it.
async fn disk_is_right(scene: &Scene, at: &str, kept: &Path, id: &str, epoch: u64) {
    let gateway = scene.gateway(at).unwrap();
    let mut monitor = Monitor::connect(&gateway.observer(VM), 5 * SECOND).unwrap();
    let found = compare_at(scene, at, kept, &mut monitor, id, epoch).await.unwrap();
    println!("{found:?}");
    assert!(found.sound && found.mismatched == 0 && found.compared > 1000, "{found:?}");
}

async fn named(scene: &Scene, address: IpAddr) {
    let seen = || scene.names.read(&Scene::name()).ok()?.addresses.contains(&address).then_some(());
    wait(&format!("the name at {address}"), 60 * SECOND, seen).await;
}

fn epoch_unix_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Records both ways and a silent connection, to one of the machine's addresses.
async fn connect(scene: &Scene, to: IpAddr) -> Client {
    let mut plan = TrafficPlan::new(epoch_unix_ms());
    let address = SocketAddr::new(to, RECORD_PORT);
    plan.record = Some(RecordPlan { address, through: None, interval_ms: 10, gap_ms: 50 });
    plan.idle = Some(IdlePlan { address: SocketAddr::new(to, IDLE_PORT) });
    Client::start(&scene.world.client, plan).await.unwrap()
}

/// Full segments from the guest, for about as long as two moves take.
async fn download(scene: &Scene, from: IpAddr) -> Client {
    let mut plan = TrafficPlan::new(epoch_unix_ms());
    let address = SocketAddr::new(from, DOWNLOAD_PORT);
    plan.download = Some(DownloadPlan { address, bytes: 6 << 20, rate_bytes_per_s: 96 << 10, seed: 3 });
    plan.close_timeout_ms = CLOSE_AFTER_CUT_MS;
    Client::start(&scene.world.client, plan).await.unwrap()
}

/// From now on the core takes less between the gateways of these sites than guests send.
fn narrow_between(scene: &Scene, sites: [&str; 2]) {
    for name in sites {
        let site = &scene.world.site(name).unwrap().spec;
        let (host, router) = (site.host_address(), site.uplink_address());
        scene.world.net.ip(&[format!("route add {host}/32 via {router} mtu lock {NARROW_MTU}")]).unwrap();
    }
}

/// Ends a client's connections and looks whether they had lived; gives the longest silence.
async fn lived(what: &str, client: Client, boot: &str) -> u64 {
    let report: TrafficReport = client.finish().await.unwrap();
    let (record, idle) = (report.record.unwrap(), report.idle.unwrap());
    assert!(record.content_ok, "{what}: {:?} of {record:?}", record.error);
    assert!(idle.content_ok, "{what}: {idle:?}");
    assert_eq!(idle.boot_id.as_deref(), Some(boot), "{what}");
    let long: Vec<_> = record.gaps.iter().filter(|gap| gap.end_ms - gap.start_ms > 200).collect();
    println!("{what}: {} records, longest silence {} ms, {long:?}", record.received, record.longest_gap_ms);
    record.longest_gap_ms
}

/// Ends clients, keeps the gateways' logs, and then says whether any was silent for too long.
async fn all_lived(scene: &Scene, clients: Vec<(&str, Client)>, boot: &str, limit_ms: u64) {
    let mut silences = Vec::new();
    for (what, client) in clients {
        silences.push((what, lived(what, client, boot).await));
    }
    scene.keep_logs();
    for (what, silence_ms) in silences {
        assert!(silence_ms < limit_ms, "{what}: {silence_ms} ms of silence");
    }
}

/// The guest's boot, asked anew at one of its addresses.
fn boot(scene: &Scene, address: IpAddr) -> String {
    let asked = scene.world.client.run(move || ask::<AgentStatus>(address, "/status", 10 * SECOND));
    asked.unwrap().unwrap_or_else(|error| panic!("{address}: {error:#}")).boot_id
}

/// A port of the client's that nobody else uses.
const CLIENTS_PORT: u16 = 23_456;
/// Longer than the last words of a connection of a visit are turned to the site of the visit (`tunnel/nft/carry.rs`).
const LAST_WORDS: Duration = Duration::from_secs(7);

/// Whether the web server at one of the machine's addresses answers a request from this port of the client's.
async fn asked_from(scene: &Scene, port: u16, to: IpAddr) -> bool {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let address = SocketAddr::new(to, 80);
    let socket = scene.world.client.tcp_socket_async(address).unwrap();
    // The connection before it may be in TIME-WAIT.
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::new(CLIENT.into(), port)).unwrap();
    let ask = async {
        let mut stream = socket.connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web1\r\nConnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200"))
    };
    tokio::time::timeout(10 * SECOND, ask).await.is_ok_and(|answered| answered.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_goes_home_again_keeps_the_connections_of_both_places() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions { strict_guest: true, ..options("home") }).await;
    scene.start_guest().await.unwrap();
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let boot_id = boot(&scene, home);
    let by_name = TrafficPlan::new(epoch_unix_ms()).with_requests(&Scene::name(), Names::address());
    let by_name = Client::start(&scene.world.client, by_name).await.unwrap();
    let first = connect(&scene, home).await;
    moved(&scene, "a", "b").await;
    named(&scene, care_of).await;
    let second = connect(&scene, care_of).await;
    moved(&scene, "b", "a").await;
    named(&scene, home).await;
    assert_eq!(boot(&scene, home), boot_id);
    assert_eq!(boot(&scene, care_of), boot_id, "a client with the old answer");
    // A client's port that was used for the care-of address is soon free for a connection to the home address.
    assert!(asked_from(&scene, CLIENTS_PORT, care_of).await, "by the address of the visit");
    tokio::time::sleep(LAST_WORDS).await;
    assert!(asked_from(&scene, CLIENTS_PORT, home).await, "from the same port, directly");
    let third = connect(&scene, care_of).await;
    let clients =
        vec![("opened at home", first), ("opened at b", second), ("opened at b after the return", third)];
    all_lived(&scene, clients, &boot_id, SILENT_MS).await;
    let report = by_name.finish().await.unwrap();
    let failed: u64 =
        report.outcomes.iter().filter(|(outcome, _)| **outcome != Outcome::Ok).map(|(_, n)| n).sum();
    assert_eq!(failed, 0, "{:?}", report.outcomes);
    // With the last connection that was opened at b its care-of address is free; one that was just being closed when the
    // machine left counts for `closing_s`.
    let deadline = Instant::now() + 120 * SECOND;
    while !scene.b.client().status().await.unwrap().anchors.iter().all(|anchor| anchor.closed_ms.is_some()) {
        let held = scene.b.client().flows(&VM.parse().unwrap()).await;
        assert!(Instant::now() < deadline, "b still holds {held:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(!attracts(&scene.world.site("b").unwrap().host, care_of).unwrap());
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_goes_on_to_a_third_site_needs_the_second_for_its_own_connections_only() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(SceneOptions { third_site: true, ..options("third") }).await;
    scene.start_guest().await.unwrap();
    let home = scene.home().unwrap();
    let (at_b, at_c) = (scene.care_of("b").unwrap(), scene.care_of("c").unwrap());
    let boot_id = boot(&scene, home);
    let first = connect(&scene, home).await;
    moved(&scene, "a", "b").await;
    named(&scene, at_b).await;
    let second = connect(&scene, at_b).await;
    moved(&scene, "b", "c").await;
    named(&scene, at_c).await;
    assert_eq!(boot(&scene, at_c), boot_id);
    assert_eq!(boot(&scene, at_b), boot_id, "a client with the old answer");
    assert_eq!(boot(&scene, home), boot_id, "a client with the number written down");
    let third = connect(&scene, at_c).await;
    // What was opened at home has no detour: nothing of it passes site b, and b is not needed.
    let core = scene.world.net.clone();
    let watch = |name: &str, from: &str, to: &str| Watch {
        name: name.into(),
        place: core.clone(),
        from_device: Some(format!("up-{from}")),
        to_device: Some(format!("up-{to}")),
        packets: PacketMatch::udp_port(netns_tests::scenario::gateway::PORT),
    };
    let direct = scene.world.watch(&watch("a_c", "a", "c")).unwrap();
    let before = direct.tally().unwrap().packets;
    let flowing = || (direct.tally().ok()?.packets > before + 50).then_some(());
    wait("records that go from a to c", 5 * SECOND, flowing).await;
    all_lived(&scene, vec![("opened at b", second)], &boot_id, SILENT_MS).await;
    scene.b.stop().unwrap();
    assert_eq!(boot(&scene, home), boot_id, "b is gone");
    moved(&scene, "c", "a").await;
    named(&scene, home).await;
    assert_eq!(boot(&scene, home), boot_id, "home again, not by the way it came");
    all_lived(&scene, vec![("opened at home", first), ("opened at c", third)], &boot_id, SILENT_MS).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_goes_home_sends_only_the_blocks_that_changed_elsewhere() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions { dirty_disk_kib_per_s: 64, ..options("changed") }).await;
    scene.start_guest().await.unwrap();
    let (there, first) = moved_with_disk_bytes(&scene, "a", "b").await;
    let left = kept_disk(&scene.disks[0], 1);
    // Nobody may rely on what is kept: one of its blocks is not what the machine left.
    flip_a_byte(&left);
    let (back, second) = moved_with_disk_bytes(&scene, "b", "a").await;
    let gone = kept_disk(&arrived_disk(&scene.b, &there.id).unwrap(), 2);
    let changed = blocks_that_differ(&left, &gone).unwrap();
    println!(
        "disk over the WAN: {first} bytes there, {second} bytes back ({:.1} %); {changed} blocks changed, {} bytes kept",
        100.0 * second as f64 / first as f64,
        back.disk_kept
    );
    assert!(changed > 1, "the guest wrote nothing at b");
    assert!(there.disk_kept == 0 && back.disk_kept > 10 << 20, "{} and {}", there.disk_kept, back.disk_kept);
    assert!(first > 10 << 20 && second * 5 < first, "{second} of {first} bytes were sent again");
    let kept = scene.a.client().status().await.unwrap().kept;
    assert!(kept.iter().any(|disk| disk.path == left), "a disk outside the pool is listed: {kept:?}");
    disk_is_right(&scene, "a", &gone, &back.id, 2).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_moves_in_a_row_lose_no_connection_and_keep_one_disk_at_each_site() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("ten")).await;
    scene.start_guest().await.unwrap();
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let boot_id = boot(&scene, home);
    let mut clients = vec![("opened first", connect(&scene, home).await)];
    let (mut sent, mut last) = (Vec::new(), Vec::new());
    for turn in 0..5 {
        let (there, disk) = moved_with_disk_bytes(&scene, "a", "b").await;
        sent.push(disk);
        clients.push(("opened at b", connect(&scene, care_of).await));
        let (back, disk) = moved_with_disk_bytes(&scene, "b", "a").await;
        sent.push(disk);
        assert!(back.disk_kept > 10 << 20 && (turn == 0 || there.disk_kept > 10 << 20), "turn {turn}");
        last = vec![there.id, back.id];
        clients.push(("opened at home", connect(&scene, home).await));
        assert_eq!(boot(&scene, care_of), boot_id, "turn {turn}");
    }
    named(&scene, home).await;
    all_lived(&scene, clients, &boot_id, SILENT_MS).await;
    println!("disk over the WAN in each move: {sent:?}");
    assert!(sent[1..].iter().all(|later| later * 5 < sent[0]), "{sent:?}");
    let kept = kept_disk(&arrived_disk(&scene.b, &last[0]).unwrap(), 10);
    for (gateway, epoch) in [(&scene.a, 9), (&scene.b, 10)] {
        let disks = gateway.client().status().await.unwrap().kept;
        let names: Vec<_> = disks.iter().map(|disk| disk.path.display().to_string()).collect();
        assert!(names.len() == 1 && names[0].ends_with(&format!(".moved-e{epoch}")), "{names:?}");
    }
    assert!(!kept_disk(&scene.disks[0], 1).exists(), "the oldest is superseded");
    disk_is_right(&scene, "a", &kept, &last[1], 10).await;
    close(scene);
}

/// What an operator of site a types.
fn longhaul(scene: &Scene, arguments: &[&str]) -> Output {
    let mut command = Command::new(&scene.programs.longhaul);
    command.arg("--socket").arg(scene.a.socket()).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// What site a tells Prometheus.
fn metrics(scene: &Scene) -> String {
    let mut socket = UnixStream::connect(scene.a.socket()).unwrap();
    socket.set_read_timeout(Some(10 * SECOND)).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: longhaul\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    socket.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    page
}

/// The programs show this connection: with whom, how much, how long silent. It speaks once before.
async fn operators_see(scene: &Scene, nic: &str, mut connection: TcpStream) {
    connection.set_read_timeout(Some(10 * SECOND)).unwrap();
    connection.write_all(b"a word\n").unwrap();
    let mut answer = [0; 256];
    assert!(connection.read(&mut answer).unwrap() > 0, "no answer after the move");
    let client = connection.local_addr().unwrap();
    let shown = longhaul(scene, &["flows", VM]);
    let text = String::from_utf8(shown.stdout).unwrap();
    println!("{text}");
    assert!(shown.status.success() && text.starts_with(&format!("{VM} is at b\n")), "{text}");
    let line = text.lines().find(|line| line.contains(&format!(" <- {client} "))).expect("the connection");
    for part in ["tcp ", ":7002 <- ", "open, from before the move", ", silent "] {
        assert!(line.contains(part), "{part:?}: {line}");
    }
    assert!(!line.contains(", 0 B in") && !line.contains(", 0 B out"), "{line}");

    let json = longhaul(scene, &["flows", VM, "--json"]).stdout;
    let view: FlowsView = serde_json::from_slice(&json).unwrap();
    let flow = view.nics[0].flows.iter().find(|flow| flow.tuple.remote_port == client.port()).unwrap();
    assert_eq!(SocketAddr::new(flow.tuple.remote, flow.tuple.remote_port), client);
    assert!(flow.to_guest.bytes > 7 && flow.from_guest.bytes > 7 && flow.idle < 60 * SECOND, "{flow:?}");

    let sample = format!("longhaul_held_flows{{machine=\"{VM}\",nic=\"{nic}\",kind=\"tcp_open\"}} ");
    let held = || {
        let page = metrics(scene);
        let count = page.lines().find_map(|line| line.strip_prefix(&sample)?.parse::<u64>().ok());
        count.filter(|count| *count >= 1)
    };
    wait("the connection among longhaul_held_flows", 10 * SECOND, held).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_for_a_machine_that_left_is_listed_and_its_operator_can_end_it() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("held")).await;
    scene.start_guest().await.unwrap();
    let (vm, at_a) = (VM.parse().unwrap(), scene.a.client());
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let boot_id = boot(&scene, home);
    let silent = scene.world.client.tcp_connect(SocketAddr::new(home, IDLE_PORT), 5 * SECOND).unwrap();
    assert!(at_a.flows(&vm).await.is_err() && at_a.release(&vm).await.is_err(), "it has not left");
    moved(&scene, "a", "b").await;
    let view = at_a.flows(&vm).await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let flow = view.nics[0].flows.iter().find(|flow| flow.tuple.remote_port == port);
    let flow = flow.unwrap_or_else(|| panic!("{view:?}"));
    assert_eq!((flow.state, flow.origin), (FlowState::Open, FlowOrigin::Seeded));
    assert!(view.at.as_str() == "b" && !view.nics[0].held_by.may_end(), "{view:?}");
    operators_see(&scene, view.nics[0].nic.as_str(), silent).await;
    let released = longhaul(&scene, &["release", VM]);
    assert!(released.status.success(), "{released:?}");
    assert!(!longhaul(&scene, &["flows", VM]).status.success(), "nothing is held any more");
    assert!(!metrics(&scene).contains("longhaul_held_flows{"), "{}", metrics(&scene));
    let host = &scene.world.site("a").unwrap().host;
    assert!(!attracts(host, home).unwrap(), "the home address is free");
    assert!(at_a.flows(&vm).await.is_err());
    // The name follows all the same, and the machine comes home to an address that nobody attracts.
    named(&scene, care_of).await;
    moved(&scene, "b", "a").await;
    named(&scene, home).await;
    assert_eq!(boot(&scene, home), boot_id);
    assert_eq!(boot(&scene, care_of), boot_id, "a client with the old answer");
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ip_versions_and_what_the_guest_opens_come_home_over_a_narrow_path_without_icmp() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions {
        dual_stack: true,
        strict_guest: true,
        dhcp_client: true,
        mute_icmp: true,
        link: vec![format!("mtu_bytes = {}", NARROW_MTU - 28)],
        ..options("dual")
    })
    .await;
    narrow_between(&scene, ["a", "b"]);
    scene.start_guest().await.unwrap();
    let (home, home6) = (scene.home().unwrap(), scene.home6().unwrap());
    let (care_of, care_of6) = (scene.care_of("b").unwrap(), scene.care_of6("b").unwrap());
    let boot_id = boot(&scene, home);
    let mut beside = Beside::start(&scene).await;
    let download = download(&scene, home).await;
    let mut clients = vec![("IPv4 home", connect(&scene, home).await)];
    clients.push(("IPv6 home", connect(&scene, home6).await));
    moved(&scene, "a", "b").await;
    assert_eq!(boot(&scene, home6), boot_id);
    assert_eq!(boot(&scene, care_of6), boot_id);
    clients.push(("IPv4 at b", connect(&scene, care_of).await));
    clients.push(("IPv6 at b", connect(&scene, care_of6).await));
    beside.goes_on(&scene, "b", home, care_of).await;
    beside.goes_on(&scene, "b", care_of, care_of).await;
    moved(&scene, "b", "a").await;
    for address in [home, home6, care_of, care_of6] {
        assert_eq!(boot(&scene, address), boot_id, "{address}");
    }
    beside.goes_on(&scene, "a", home, home).await;
    beside.goes_on(&scene, "a", care_of, home).await;
    beside.end(&scene).await;
    let download = download.finish().await.unwrap().download.unwrap();
    assert!(download.content_ok, "{download:?}");
    all_lived(&scene, clients, &boot_id, SILENT_MS).await;
    close(scene);
}

/// A name server in another, private subnet of site a, behind its router.
fn private_resolver(scene: &Scene) -> Elsewhere {
    let (router, host) =
        (&scene.world.site("a").unwrap().router, scene.world.lab.namespace("resolver").unwrap());
    let link =
        format!("link add far0 netns {} type veth peer name eth0 netns {}", router.name(), host.name());
    run_with_input("ip", &["-batch", "-"], &link).unwrap();
    router.ip(&["addr add 10.53.0.1/24 dev far0", "link set far0 up"]).unwrap();
    host.ip(&["addr add 10.53.0.53/24 dev eth0", "link set eth0 up", "route add default via 10.53.0.1"])
        .unwrap();
    Elsewhere::serve(&host, SocketAddr::from(([10, 53, 0, 53], 53)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_on_asking_a_private_resolver_in_another_subnet_of_its_home() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("resolver")).await;
    let resolver = private_resolver(&scene);
    scene.start_guest().await.unwrap();
    let (home, care_of) = (scene.home().unwrap(), scene.care_of("b").unwrap());
    let before = through(&scene, home, resolver.address).await;
    moved(&scene, "a", "b").await;
    let after = through(&scene, care_of, resolver.address).await;
    assert_eq!(resolver.seen(), [home, home], "its own connections come from its home address");
    let asked = [("asked at home", before), ("asked at b", after)];
    beside::lived(asked.map(|(what, client)| (what.to_owned(), client)).into()).await;
    close(scene);
}
