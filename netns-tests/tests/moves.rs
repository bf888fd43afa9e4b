//! Moves of real machines between two whole sites, and the refusals that leave everything as it was.
//!
//! Each test has its own scene; they take turns. What happens when links or gateways fail is not looked at here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/failing.rs"]
mod failing;
#[path = "support/scenes.rs"]
mod scenes;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use gateway::api::types::{AnchorView, MigrateRequest, MigrationView, Progressing};
use gateway::identity::Identity;
use netns_tests::agent::IDLE_PORT;
use netns_tests::agent::client::ask;
use netns_tests::agent::control::AgentStatus;
use netns_tests::agent::log::LogVerdict;
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::names::{Names, Secondary};
use netns_tests::scenario::options::{DnsServer, SceneOptions};
use netns_tests::scenario::outside::attracts;
use netns_tests::scenario::scene::{Scene, VM, VM_NUMBER};
use serde_json::{Value, json};

use failing::FailingDisk;
use scenes::{build, close, state, turn, wait};

const SECOND: Duration = Duration::from_secs(1);
/// Generous: guests run without hardware help, and the machine may be busy.
const MOVE_LIMIT: Duration = Duration::from_secs(90);

fn options(name: &str) -> SceneOptions {
    SceneOptions { rate_mbit: 200.0, ttl_s: 5, ..SceneOptions::small(format!("moves-{name}")) }
}

async fn moved(scene: &Scene) -> MigrationView {
    let id = scene.begin_move().await.unwrap();
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(
        view.progressing,
        Progressing::Moved,
        "{:?}\n{}\n{}",
        view.reason,
        scene.a.log_tail(),
        scene.b.log_tail()
    );
    view
}

/// What a site's host holds for machines: devices, rules, routes, firewall, disks, QEMUs.
#[derive(Debug, PartialEq)]
struct Holdings {
    network: Vec<Value>,
    disks: Vec<String>,
    machines: usize,
    hypervisors: usize,
}

impl Holdings {
    async fn of_b(scene: &Scene) -> Self {
        Self::of(scene, "b", &scene.b).await
    }

    async fn of(scene: &Scene, site: &str, gateway: &Gateway) -> Self {
        let host = &scene.world.site(site).unwrap().host;
        let asked: [(&str, &[&str]); 4] = [
            ("ip", &["-j", "addr"]),
            ("ip", &["-j", "rule"]),
            ("ip", &["-j", "route"]),
            ("nft", &["-j", "list", "ruleset"]),
        ];
        let network = asked.map(|(program, arguments)| {
            let text = host.output(program, arguments).unwrap();
            let mut value = serde_json::from_str(&text).unwrap_or(Value::Null);
            forget_counts(&mut value);
            value
        });
        let mut disks: Vec<String> = std::fs::read_dir(gateway.folder.join("disks"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            // What is kept for the next attempt is no machine's.
            .filter(|name| !name.ends_with(".partial"))
            .collect();
        disks.sort();
        let pids = host.output("ip", &["netns", "pids", host.name()]).unwrap();
        let is_qemu = |pid: &&str| {
            std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains(VM))
        };
        let machines = gateway.client().status().await.unwrap().machines.len();
        let hypervisors = pids.split_whitespace().filter(is_qemu).count();
        Self { network: network.to_vec(), disks, machines, hypervisors }
    }
}

/// Fields that change although nobody changed anything: counters, and states that follow the traffic.
const IT_CHANGES_BY_ITSELF: [&str; 5] = ["packets", "bytes", "handle", "tentative", "operstate"];

fn forget_counts(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|key, _| !IT_CHANGES_BY_ITSELF.contains(&key.as_str()));
            fields.values_mut().for_each(forget_counts);
        }
        Value::Array(values) => values.iter_mut().for_each(forget_counts),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The guest runs at a, and b holds what it held `before`.
async fn assert_untouched(scene: &Scene, before: &Holdings, case: &str) {
    assert_eq!(state(&scene.a).as_deref(), Some("running"), "{case}");
    let deadline = Instant::now() + 15 * SECOND;
    loop {
        let now = Holdings::of_b(scene).await;
        if now == *before {
            break;
        }
        assert!(Instant::now() < deadline, "{case}: site b holds\n{now:#?}\nbefore\n{before:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn request(vm: &str, to: &str) -> MigrateRequest {
    MigrateRequest {
        vm: vm.parse().unwrap(),
        to: to.parse().unwrap(),
        without_dns: false,
        max_downtime_ms: None,
        no_throttle: false,
    }
}

/// The reason why a move to b ended where it began.
async fn reason_to_stay(scene: &Scene, request: &MigrateRequest) -> String {
    let id = scene.a.client().migrate(request).await.unwrap().id;
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    view.reason.unwrap()
}

/// Site b with another configuration.
async fn reconfigure_b(scene: &mut Scene, change: impl FnOnce(String) -> String) -> Holdings {
    let file = scene.b.folder.join("site.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let changed = change(text.clone());
    assert_ne!(changed, text, "the change changes something");
    scene.b.stop().unwrap();
    std::fs::write(file, changed).unwrap();
    scene.b.launch().await.unwrap();
    let deadline = Instant::now() + 30 * SECOND;
    loop {
        let (a, b) = (scene.a.client().status().await.unwrap(), scene.b.client().status().await.unwrap());
        if a.peers.iter().chain(&b.peers).all(|peer| peer.up) {
            return Holdings::of_b(scene).await;
        }
        assert!(Instant::now() < deadline, "the link does not come back: {}", scene.a.log_tail());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn longhaul(scene: &Scene, arguments: &[&str]) -> Output {
    Command::new(&scene.programs.longhaul)
        .arg("--socket")
        .arg(scene.a.socket())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_two_disks_and_two_nics_moves_whole() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions { two_of_each: true, ..options("two") }).await;
    scene.start_guest().await.unwrap();
    let client = &scene.world.client;
    let home = scene.home().unwrap();
    let second: IpAddr = scene.world.site("a").unwrap().spec.address(VM_NUMBER + 1).into();
    let boot =
        |address: IpAddr| client.run(move || ask::<AgentStatus>(address, "/status", 10 * SECOND)).unwrap();
    let before = boot(home).unwrap();
    assert_eq!(boot(second).unwrap().boot_id, before.boot_id);
    // Connections of before the move, so that both addresses stay attracted.
    let held =
        [home, second].map(|to| client.tcp_connect(SocketAddr::new(to, IDLE_PORT), 5 * SECOND).unwrap());
    moved(&scene).await;
    assert_eq!(state(&scene.b).as_deref(), Some("running"));
    assert_eq!(boot(home).unwrap().boot_id, before.boot_id);
    // The guest answers for its second address through its first NIC.
    assert_eq!(boot(second).unwrap().boot_id, before.boot_id);
    for path in ["/log/verify", "/second-log/verify"] {
        let log = client.run(move || ask::<LogVerdict>(home, path, 30 * SECOND)).unwrap().unwrap();
        assert!(log.records > 0 && log.missing + log.doubled + log.corrupt == 0, "{path}: {log:?}");
        assert_eq!(log.boots, 1, "{path}");
    }
    drop(held);
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_read_to_its_end_keeps_its_machine_at_home_and_says_which() {
    const TAIL_BYTES: u64 = 16 << 20;
    let Some(_turn) = turn().await else { return };
    let migration = vec!["retries = 0".into()];
    let mut scene = build(SceneOptions { two_of_each: true, migration, ..options("unreadable") }).await;
    let mount = scene.a.folder.join("disks/failing");
    std::fs::create_dir(&mount).unwrap();
    let mut failing = FailingDisk::mount(&mount, 320 << 20);
    let data = failing.copy(&scene.disks[1], "data.img", TAIL_BYTES);
    scene.disks[1].clone_from(&data);
    scene.start_guest().await.unwrap();
    let home = scene.home().unwrap();
    let boot = || scene.world.client.run(move || ask::<AgentStatus>(home, "/status", 10 * SECOND)).unwrap();
    let boot_id = boot().unwrap().boot_id;
    let untouched = Holdings::of_b(&scene).await;
    failing.fail(&data, TAIL_BYTES);
    let reason = reason_to_stay(&scene, &request(VM, "b")).await;
    println!("stayed: {reason}");
    assert!(reason.contains("Disk data cannot be read"), "{reason}");
    assert_eq!(state(&scene.a).as_deref(), Some("running"));
    // But for what was copied, which is kept for the next attempt.
    let tidy_until = Instant::now() + 15 * SECOND;
    loop {
        let left = Holdings { disks: untouched.disks.clone(), ..Holdings::of_b(&scene).await };
        if left == untouched {
            break;
        }
        assert!(Instant::now() < tidy_until, "site b holds\n{left:#?}\nbefore\n{untouched:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(boot().unwrap().boot_id, boot_id, "the guest runs on");
    failing.heal();
    moved(&scene).await;
    assert_eq!(boot().unwrap().boot_id, boot_id);
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_debians_bind_follows_the_machine_and_gets_its_ttl_back() {
    let Some(_turn) = turn().await else { return };
    if let Err(error) = netns_tests::install::ensure(netns_tests::install::LAB_NEEDS) {
        println!("skipped: {error:#}");
        return;
    }
    let scene = build(SceneOptions { dns: DnsServer::Bind9, ..options("bind") }).await;
    scene.start_guest().await.unwrap();
    moved(&scene).await;
    let site = scene.world.site("b").unwrap().spec.clone();
    let care_of: IpAddr = site.address(200).into();
    wait("the name at site b with its TTL of before", 60 * SECOND, || {
        let records = scene.names.read(&Scene::name()).ok()?;
        (records.addresses == [care_of] && records.ttl_s() == Some(5)).then_some(())
    })
    .await;
    let status = scene.world.client.run(move || ask::<AgentStatus>(care_of, "/status", 10 * SECOND));
    status.unwrap().unwrap();
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secondary_that_has_not_heard_keeps_the_tunnel_and_what_a_reboot_would_break_is_said() {
    let Some(_turn) = turn().await else { return };
    let tunnel = vec![format!("idle_s = {IDLE_S}")];
    let mut scene = build(SceneOptions { tunnel, ..options("stale") }).await;
    let (name, home) = (Scene::name(), scene.home().unwrap());
    let mut secondary = scene.names.lagging_secondary(&name, home, scene.options.ttl_s).unwrap();
    let file = scene.a.folder.join("site.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let (one, both) = (Names::address(), format!("{}\", \"{}", Names::address(), Secondary::address()));
    let changed = text.replace(&format!("servers = [\"{one}\"]"), &format!("servers = [\"{both}\"]"));
    assert_ne!(changed, text);
    let inhibitor = scene.a.folder.join("inhibitor");
    std::fs::write(
        &inhibitor,
        "#!/bin/sh\necho began >> \"$0.log\"\nshift 4\n\"$@\"\necho ended >> \"$0.log\"\n",
    )
    .unwrap();
    std::fs::set_permissions(&inhibitor, std::fs::Permissions::from_mode(0o755)).unwrap();
    let key = format!("[site]\nshutdown_inhibitor = \"{}\"", inhibitor.canonicalize().unwrap().display());
    scene.a.stop().unwrap();
    std::fs::write(file, changed.replace("[site]", &key)).unwrap();
    scene.a.launch().await.unwrap();
    scene.start_guest().await.unwrap();
    let to = SocketAddr::new(home, IDLE_PORT);
    let connection = scene.world.client.tcp_connect(to, 5 * SECOND).unwrap();
    let said = spoken(&connection).unwrap();
    moved(&scene).await;
    assert_eq!(spoken(&connection).unwrap(), said);
    wait_for_anchor(&scene, |anchor| anchor.flows >= 1).await;
    wait_for_anchor(&scene, |anchor| anchor.names_behind == [Secondary::address().to_string()]).await;
    // Longer than every TTL there is.
    tokio::time::sleep(8 * SECOND).await;
    wait_for_anchor(&scene, |anchor| anchor.names == "moved" && anchor.closed_ms.is_none()).await;

    // A connection that was silent for longer than `idle_s` counts as ended. But the tunnel stays for the secondary's sake,
    // so that it lives and counts again once it speaks.
    wait_for_anchor(&scene, |anchor| anchor.flows == 0 && anchor.closed_ms.is_none()).await;
    assert_eq!(spoken(&connection).unwrap(), said);

    // The connection is this host's to break, and it says so.
    wait_for_anchor(&scene, |anchor| anchor.flows >= 1).await;
    let findings = scene.a.client().doctor(None).await.unwrap();
    let reboot = findings.iter().find(|finding| finding.check == "reboot").unwrap();
    assert!(reboot.ok && reboot.detail.contains("web1 ("), "{reboot:?}");
    let held_off = || std::fs::read_to_string(inhibitor.with_extension("log")).unwrap_or_default();
    wait("what holds a reboot off", 10 * SECOND, || held_off().ends_with("began\n").then_some(())).await;
    scene.a.stop().unwrap();
    scene.a.told(0, "connections stall until the gateway is back").await.unwrap();
    wait("the end of what held a reboot off", 10 * SECOND, || held_off().ends_with("ended\n").then_some(()))
        .await;
    scene.a.launch().await.unwrap();
    wait_for_anchor(&scene, |anchor| anchor.names == "moved" && !anchor.names_behind.is_empty()).await;

    secondary.catch_up(&name, &scene.names.read(&name).unwrap()).unwrap();
    wait_for_anchor(&scene, |anchor| anchor.names == "settled" && anchor.names_behind.is_empty()).await;
    // Silent again, it does not keep the tunnel, and is cut when it speaks too late.
    wait_until_closed(&scene).await;
    assert!(!attracts(&scene.world.site("a").unwrap().host, home).unwrap());
    let late = spoken(&connection);
    println!("after the tunnel has ended: {late:?}");
    assert!(late.is_err(), "{late:?}");
    close(scene);
}

/// `tunnel.idle_s` where a connection is silent for longer.
const IDLE_S: u64 = 6;

/// What the guest answers to a line on an idle connection: its boot, and the line.
fn spoken(mut connection: &TcpStream) -> std::io::Result<String> {
    connection.set_read_timeout(Some(5 * SECOND))?;
    connection.write_all(b"still there?\n")?;
    let mut answer = String::new();
    BufReader::new(connection).read_line(&mut answer)?;
    Ok(answer)
}

/// Waits until what is left at a of the machine is so.
async fn wait_for_anchor(scene: &Scene, is_so: impl Fn(&AnchorView) -> bool) {
    let deadline = Instant::now() + 40 * SECOND;
    loop {
        let anchors = scene.a.client().status().await.unwrap().anchors;
        if anchors.iter().any(&is_so) {
            return;
        }
        assert!(Instant::now() < deadline, "{anchors:?}\n{}", scene.a.log_tail());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_forgotten_and_defined_again_moves_again_and_nothing_is_left() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options("again")).await;
    let untouched = (Holdings::of(&scene, "a", &scene.a).await.network, Holdings::of_b(&scene).await.network);
    let mut boots = Vec::new();
    for turn in 1..=2 {
        scene.start_guest().await.unwrap();
        boots.push(move_with_a_connection(&scene, &boots).await);
        forget_everywhere(&mut scene, turn).await;
        let deadline = Instant::now() + 30 * SECOND;
        loop {
            let left =
                (Holdings::of(&scene, "a", &scene.a).await.network, Holdings::of_b(&scene).await.network);
            if left == untouched {
                break;
            }
            assert!(Instant::now() < deadline, "turn {turn}: {left:#?}\nbefore\n{untouched:#?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    close(scene);
}

/// Moves the machine while a client is connected: the connection, the home address and the name follow.
/// Gives the id of the guest's boot, which is none of `earlier`.
async fn move_with_a_connection(scene: &Scene, earlier: &[String]) -> String {
    let client = &scene.world.client;
    let home = scene.home().unwrap();
    let boot = move |address: IpAddr| {
        let answer = client.run(move || ask::<AgentStatus>(address, "/status", 5 * SECOND));
        answer.unwrap().map(|status| status.boot_id)
    };
    let is_new = |id: &String| !earlier.contains(id);
    let booted = wait("the guest", 60 * SECOND, || boot(home).ok().filter(is_new)).await;
    let held = client.tcp_connect(SocketAddr::new(home, IDLE_PORT), 5 * SECOND).unwrap();
    moved(scene).await;
    assert_eq!(boot(home).unwrap(), booted, "the home address");
    // The first of the pool, each time: the one before was given back.
    let care_of: IpAddr = scene.world.site("b").unwrap().spec.address(200).into();
    wait("the name at site b", 60 * SECOND, || {
        (scene.names.read(&Scene::name()).ok()?.addresses == [care_of]).then_some(())
    })
    .await;
    assert_eq!(boot(care_of).unwrap(), booted, "the care-of address");
    drop(held);
    booted
}

/// The machine is stopped and forgotten at b, then forgotten at a and made ready to be defined there again.
/// The tunnel has not ended by itself the first time.
async fn forget_everywhere(scene: &mut Scene, turn: u64) {
    let vm = VM.parse().unwrap();
    if turn > 1 {
        wait_until_closed(scene).await;
    }
    scene.b.client().stop(&vm).await.unwrap();
    scene.b.client().undefine(&vm, false).await.unwrap();
    scene.a.client().undefine(&vm, true).await.unwrap();
    // The first definition begins in epoch 0, each other one in an epoch of its own after the last move.
    let epoch = 2 * turn - 1;
    for disk in &scene.disks {
        let kept = format!("{}.moved-e{epoch}", disk.display());
        wait("the kept disk", 20 * SECOND, || std::fs::rename(&kept, disk).ok()).await;
        // The operator says that this copy counts: the note beside it says that site b has a newer one.
        drop(std::fs::remove_file(format!("{}.generation", disk.display())));
    }
    // The name as its operator writes it: at home, and owned by nobody.
    let folder = scene.world.lab.scratch().join("dns");
    scene.names.stop().unwrap();
    let (kind, ttl_s, home) = (scene.options.dns, scene.options.ttl_s, scene.home().unwrap());
    scene.names = Names::start(kind, &scene.world.dns, &folder, &Scene::name(), home, ttl_s).unwrap();
}

async fn wait_until_closed(scene: &Scene) {
    let deadline = Instant::now() + 60 * SECOND;
    loop {
        let anchors = scene.a.client().status().await.unwrap().anchors;
        if anchors.iter().all(|anchor| anchor.closed_ms.is_some()) {
            return;
        }
        assert!(Instant::now() < deadline, "the tunnel stays up: {anchors:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_that_is_started_after_its_host_was_rebooted_is_reached_and_heard() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options("reboot")).await;
    scene.start_guest().await.unwrap();
    moved(&scene).await;
    let vm = VM.parse().unwrap();
    scene.b.client().stop(&vm).await.unwrap();
    scene.b.kill().unwrap();
    let host = scene.world.site("b").unwrap().host.clone();
    // What a reboot takes with it; the routes go with their devices.
    for device in ["lh-web1-lan", "lh0"] {
        host.output("ip", &["link", "del", device]).unwrap();
    }
    host.output("nft", &["flush", "ruleset"]).unwrap();
    scene.b.launch().await.unwrap();
    scene.wait_for_link().await.unwrap();
    scene.b.client().start(&vm).await.unwrap();
    let client = &scene.world.client;
    let care_of: IpAddr = scene.world.site("b").unwrap().spec.address(200).into();
    wait("the guest at its care-of address", 90 * SECOND, || {
        client.run(move || ask::<AgentStatus>(care_of, "/status", 5 * SECOND)).unwrap().ok()
    })
    .await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_its_operator_paused_stays_paused_through_an_abort_and_a_move() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("paused")).await;
    scene.start_guest().await.unwrap();
    let mut monitor = Monitor::connect(&scene.a.observer(VM), 5 * SECOND).unwrap();
    monitor.ask("stop", json!({})).unwrap();
    drop(monitor);
    let id = scene.begin_move().await.unwrap();
    scene.a.client().abort(&id).await.unwrap();
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed);
    assert_eq!(state(&scene.a).as_deref(), Some("paused"));
    let deadline = Instant::now() + 20 * SECOND;
    let id = loop {
        match scene.begin_move().await {
            Ok(id) => break id,
            // The aborted attempt is still being taken down.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}\n{}", view.reason, scene.a.log_tail());
    assert_eq!(state(&scene.b).as_deref(), Some("paused"));
    scene.b.client().start(&VM.parse().unwrap()).await.unwrap();
    assert_eq!(state(&scene.b).as_deref(), Some("running"));
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_move_names_the_reason_and_leaves_both_sites_untouched() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options("refused")).await;
    scene.start_guest().await.unwrap();
    let original = std::fs::read_to_string(scene.b.folder.join("site.toml")).unwrap();
    let before = Holdings::of_b(&scene).await;
    let client = scene.a.client();
    let error = client.migrate(&request("nobody", "b")).await.unwrap_err().to_string();
    assert!(error.contains("nobody"), "{error}");
    let error = client.migrate(&request(VM, "mars")).await.unwrap_err().to_string();
    assert!(error.contains("mars") && error.contains("configured are: b"), "{error}");
    assert_untouched(&scene, &before, "unknown names").await;

    let home = scene.home().unwrap().to_string();
    let pool = care_of_line(&original);
    let home_in_pool = pool.replace("= [", &format!("= [\"{home}\", "));
    let cases: [(&str, &str, &str, &[&str]); 5] = [
        ("full disk", "keep_free_gib = 0", "keep_free_gib = 900000", &["disk space"]),
        ("descriptors", "[site]\n", "[site]\ndescriptors_free = 1048576\n", &["site.descriptors_free"]),
        ("policy", "may_send = [\"*\"]", "may_send = [\"db*\"]", &["peer.a.may_send", VM]),
        ("no address", &pool, "care_of = []", &["care-of addresses"]),
        ("home address in use", &pool, &home_in_pool, &[&home, "pool of care-of addresses"]),
    ];
    for (case, from, to, words) in cases {
        let before = reconfigure_b(&mut scene, |_| original.replace(from, to)).await;
        let why = reason_to_stay(&scene, &request(VM, "b")).await;
        println!("{case}: {why}");
        assert!(words.iter().all(|word| why.contains(word)), "{case}: {why}");
        assert_untouched(&scene, &before, case).await;
    }
    let before = reconfigure_b(&mut scene, |_| without_section(&original, "[kernel.lab]")).await;
    let why = reason_to_stay(&scene, &request(VM, "b")).await;
    println!("no kernel: {why}");
    assert!(why.contains("lab"), "{why}");
    assert_untouched(&scene, &before, "no kernel").await;
    close(scene);
}

fn care_of_line(configuration: &str) -> String {
    configuration.lines().find(|line| line.starts_with("care_of")).unwrap().to_owned()
}

fn without_section(configuration: &str, header: &str) -> String {
    let (before, rest) = configuration.split_once(header).unwrap();
    let next = rest.find("\n[").unwrap();
    format!("{before}{}", &rest[next + 1..])
}

/// What is kept for the next attempt is no machine's disk.
fn has_a_disk(pool: &Path) -> bool {
    let entries = std::fs::read_dir(pool).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|path| path.extension().is_none_or(|it| it != "partial"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_move_is_refused_and_an_aborted_first_one_leaves_nothing_at_the_other_site() {
    let Some(_turn) = turn().await else { return };
    let scene = build(SceneOptions { rate_mbit: 20.0, ..options("abort") }).await;
    scene.start_guest().await.unwrap();
    let before = Holdings::of_b(&scene).await;
    let id = scene.begin_move().await.unwrap();
    let error = scene.begin_move().await.unwrap_err().to_string();
    assert!(error.contains("already moving"), "{error}");
    let disks = scene.b.folder.join("disks");
    wait("a disk at site b", 20 * SECOND, || has_a_disk(&disks).then_some(())).await;
    scene.a.client().abort(&id).await.unwrap();
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    assert_untouched(&scene, &before, "aborted").await;

    // The other site's operator can, too: what a source has forgotten would else be held there for ever.
    let id = scene.begin_move().await.unwrap();
    wait("a disk at site b", 20 * SECOND, || has_a_disk(&disks).then_some(())).await;
    scene.a.client().limit_migration(&id, Some(1)).await.unwrap();
    assert_eq!(scene.a.client().migration(&id).await.unwrap().limit_mbit, Some(1));
    let error = scene.b.client().limit_migration(&id, None).await.unwrap_err().to_string();
    assert!(error.contains("limit it there"), "{error}");
    scene.b.client().abort(&id).await.unwrap();
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    assert!(view.reason.as_deref().is_some_and(|why| why.contains("Aborted by the operator")), "{view:?}");
    assert_untouched(&scene, &before, "aborted at b").await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_is_down_refuses_a_move_unless_names_may_stay_behind() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options("nameless")).await;
    scene.start_guest().await.unwrap();
    let before = Holdings::of_b(&scene).await;
    scene.names.stop().unwrap();
    let why = reason_to_stay(&scene, &request(VM, "b")).await;
    println!("no name server: {why}");
    assert_untouched(&scene, &before, "no name server").await;
    let without = MigrateRequest { without_dns: true, ..request(VM, "b") };
    let id = scene.a.client().migrate(&without).await.unwrap().id;
    let view = scene.wait_move(&id, MOVE_LIMIT).await.unwrap();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}", view.reason);
    assert_eq!(state(&scene.b).as_deref(), Some("running"));
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_doctor_tell_what_is_there_and_what_is_wrong() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("pages")).await;
    scene.start_guest().await.unwrap();
    let doctor = longhaul(&scene, &["doctor"]);
    let page = text(&doctor.stdout);
    println!("{page}");
    assert!(doctor.status.success(), "{page}");
    for word in ["hypervisor: QEMU", "pool:", "lan.lan:", "peer b: up", "can follow; TTL 5 s", VM] {
        assert!(page.contains(word), "{word:?} is missing in\n{page}");
    }
    assert!(!page.contains("FAIL"), "{page}");
    let absent = longhaul(&scene, &["doctor", "absent"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(text(&absent.stdout).contains("FAIL machine absent"), "{}", text(&absent.stdout));
    let page = text(&longhaul(&scene, &["status"]).stdout);
    println!("{page}");
    for word in ["site a", "peer b", "up", VM, "here", "running", "128.0 MiB", "512.0 MiB", "tunnel:"] {
        assert!(page.contains(word), "{word:?} is missing in\n{page}");
    }
    assert!(longhaul(&scene, &["limit", "--peer", "b", "--mbit", "7"]).status.success());
    let page = text(&longhaul(&scene, &["status"]).stdout);
    assert!(page.contains("limited to 7 Mbit/s"), "{page}");
    assert!(longhaul(&scene, &["limit", "--peer", "b", "--none"]).status.success());
    let page = text(&longhaul(&scene, &["status"]).stdout);
    assert!(!page.contains("limited"), "{page}");
    for (wrong, code) in [
        (&["limit", "--peer", "mars", "--mbit", "7"][..], 1),
        (&["limit", "--peer", "b", "--mbit", "0"], 2),
        (&["limit", "--peer", "b"], 2),
        (&["limit", "12ab", "--none"], 1),
    ] {
        let refused = longhaul(&scene, wrong);
        println!("{wrong:?}: {}", text(&refused.stderr));
        assert_eq!(refused.status.code(), Some(code), "{wrong:?}");
    }
    let alone = Command::new(&scene.programs.longhaul)
        .args(["--socket", "/nonexistent/api.sock", "status"])
        .output()
        .unwrap();
    assert_eq!(alone.status.code(), Some(3), "{}", text(&alone.stderr));
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_in_the_configuration_starts_nothing_and_a_stranger_is_logged_once() {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options("stranger")).await;
    let file = scene.a.folder.join("wrong.toml");
    let good = std::fs::read_to_string(scene.a.folder.join("site.toml")).unwrap();
    std::fs::write(&file, good.replace("[site]\n", "[site]\nnaem = \"a\"\n")).unwrap();
    scene.a.stop().unwrap();
    let run =
        Command::new(&scene.programs.longhaul).arg("serve").arg("--config").arg(&file).output().unwrap();
    let said = text(&run.stderr);
    println!("{said}");
    assert_eq!(run.status.code(), Some(2), "{said}");
    assert!(said.contains("wrong.toml:2: naem"), "{said}");
    assert!(!scene.a.socket().exists(), "nothing was started");

    let stranger = Identity::generate().unwrap();
    stranger.save(&key_beside(&scene.a.folder)).unwrap();
    let key_file = format!("{}/key", scene.a.folder.display());
    let strange = good.replace(&key_file, &key_beside(&scene.a.folder).display().to_string());
    std::fs::write(scene.a.folder.join("site.toml"), strange).unwrap();
    scene.a.launch().await.unwrap();
    let refusals = |log: &Path| {
        std::fs::read_to_string(log).unwrap_or_default().matches("Refused a peer with an unknown key").count()
    };
    let log = scene.b.log();
    wait("a refusal", 20 * SECOND, || (refusals(&log) > 0).then_some(())).await;
    // Time for the stranger to come again.
    tokio::time::sleep(4 * SECOND).await;
    assert_eq!(refusals(&log), 1);
    assert!(!scene.a.client().status().await.unwrap().peers.iter().any(|peer| peer.up));
    close(scene);
}

fn key_beside(folder: &Path) -> std::path::PathBuf {
    folder.join("strange-key")
}
