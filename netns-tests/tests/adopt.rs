//! A machine that its operator started by hand is adopted, and moves with its connections.
//!
//! Its tap has a name of the operator's. What a move keeps of a machine of the gateway's own is looked at
//! elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gateway::api::types::Progressing;
use gateway::hypervisor::parse_definition;
use longhaul_core::machine::Firmware;
use netns_tests::agent::client::ask;
use netns_tests::agent::log::LogVerdict;
use netns_tests::agent::memory::MemoryVerdict;
use netns_tests::guest::boot::{FAILED, READY};
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::scene::{Scene, VM};
use netns_tests::scenario::traffic::Client;
use netns_tests::topology::BRIDGE;
use netns_tests::traffic::TrafficPlan;

const SECOND: Duration = Duration::from_secs(1);
/// The operator's name for the tap, like no name of the gateway's.
const TAP: &str = "vnet7-operator";

/// A QEMU that ends with the test, however that ends.
struct ByHand(Child);

impl Drop for ByHand {
    fn drop(&mut self) {
        // It has ended already when the machine has moved.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The guest of the scene's definition, as an operator would start it.
fn start_by_hand(scene: &Scene, socket: &Path, console: &Path) -> ByHand {
    let definition = parse_definition(&scene.definition().unwrap(), Path::new("web1.toml")).unwrap();
    let host = &scene.world.site("a").unwrap().host;
    host.output("ip", &["tuntap", "add", "dev", TAP, "mode", "tap"]).unwrap();
    host.output("ip", &["link", "set", "dev", TAP, "master", BRIDGE, "up"]).unwrap();
    let Firmware::Kernel(boot) = &definition.firmware else { panic!("the lab's guest has a kernel") };
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "pc-q35-7.2,accel=tcg", "-cpu", "qemu64", "-smp", "1", "-nodefaults"]);
    command.args(["-display", "none", "-m", &format!("{}K", definition.memory().0 >> 10)]);
    command.args(["-uuid", &definition.uuid().to_string(), "-append", boot.cmdline.as_str()]);
    command.arg("-kernel").arg(&scene.image.kernel).arg("-initrd").arg(&scene.image.initrd);
    let drive = format!("file={},format=raw,if=none,id=hd0", scene.disks[0].display());
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=hd0,addr=3"]);
    command.args(["-netdev", &format!("tap,id=wire,ifname={TAP},script=no,downscript=no")]);
    command.args(["-device", "virtio-net-pci,netdev=wire,mac=52:54:00:aa:00:10,romfile=,addr=5"]);
    command.args(["-serial", &format!("file:{}", console.display())]);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
    let child = ByHand(host.spawn(command.stdin(Stdio::null())).unwrap());
    let deadline = Instant::now() + 120 * SECOND;
    loop {
        let text = std::fs::read_to_string(console).unwrap_or_default();
        if text.contains(READY) {
            return child;
        }
        assert!(!text.contains(FAILED) && Instant::now() < deadline, "the guest does not come up:\n{text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn adopt(scene: &Scene, socket: &Path, definition: &Path) -> Output {
    let mut command = Command::new(&scene.programs.longhaul);
    command.arg("--socket").arg(scene.a.socket()).args(["vm", "adopt", "--qmp"]).arg(socket);
    command.arg("--definition").arg(definition).stdin(Stdio::null()).output().unwrap()
}

/// The netdev tables at site a: samplers and attractions of the gateway.
fn tables(scene: &Scene) -> String {
    scene.world.site("a").unwrap().host.output("nft", &["list", "tables", "netdev"]).unwrap()
}

/// A definition that says something else is refused, and nothing is known afterwards.
async fn assert_refused_if_it_differs(scene: &Scene, socket: &Path) {
    let definition = scene.definition().unwrap();
    let other = definition.replace("52:54:00:aa:00:10", "52:54:00:aa:00:99");
    assert_ne!(other, definition);
    let file = scene.folder.join("other.toml");
    std::fs::write(&file, other).unwrap();
    let refused = adopt(scene, socket, &file);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{said}");
    assert!(!refused.status.success());
    let words = "nics[0].mac: the definition has 52:54:00:aa:00:99, QEMU has 52:54:00:aa:00:10";
    assert!(said.contains(words), "{said}");
    assert!(scene.a.client().status().await.unwrap().machines.is_empty());
    assert_eq!(tables(scene), "");
}

async fn start_client(scene: &Scene) -> Client {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let plan = TrafficPlan::new(now.as_millis() as u64).with_old_connections(scene.home().unwrap(), 1, 1);
    let records_only = TrafficPlan { download: None, idle: None, ..plan };
    Client::start(&scene.world.client, records_only).await.unwrap()
}

/// Nothing of the gateway's is left at site a, and the operator's tap is where it was.
async fn assert_left_to_its_operator(scene: &Scene) {
    let deadline = Instant::now() + 60 * SECOND;
    while !tables(scene).is_empty() {
        assert!(Instant::now() < deadline, "left at site a:\n{}\n{}", tables(scene), scene.a.log_tail());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let host = &scene.world.site("a").unwrap().host;
    let tap = host.output("ip", &["link", "show", "dev", TAP]).unwrap();
    assert!(tap.contains(&format!("master {BRIDGE}")), "{tap}");
    let kept = PathBuf::from(format!("{}.moved-e1", scene.disks[0].display()));
    assert!(kept.exists() && !scene.disks[0].exists(), "{}", kept.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_a_foreign_tap_is_adopted_and_moves_with_its_connection() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    let options = SceneOptions { rate_mbit: 200.0, ttl_s: 5, ..SceneOptions::small("adopt") };
    let scene = Scene::build(options, &Programs::build().unwrap()).await.unwrap();
    let (socket, console) = (scene.a.folder.join("hand.sock"), scene.a.folder.join("hand.log"));
    let mut qemu = start_by_hand(&scene, &socket, &console);
    assert_refused_if_it_differs(&scene, &socket).await;
    let file = scene.folder.join("web1.toml");
    std::fs::write(&file, scene.definition().unwrap()).unwrap();
    let adopted = adopt(&scene, &socket, &file);
    assert!(adopted.status.success(), "{}", String::from_utf8_lossy(&adopted.stderr));
    let mut client = start_client(&scene).await;
    let id = scene.begin_move().await.unwrap();
    let view = scene.wait_move(&id, 90 * SECOND).await.unwrap();
    assert_eq!(view.progressing, Progressing::Moved, "{:?}\n{}", view.reason, scene.a.log_tail());
    assert!(qemu.0.wait().unwrap().success(), "the QEMU at site a has ended");
    let mut monitor = Monitor::connect(&scene.b.observer(VM), 5 * SECOND).unwrap();
    assert_eq!(monitor.state().unwrap(), "running");
    let home = scene.home().unwrap();
    let log = scene.world.client.run(move || ask::<LogVerdict>(home, "/log/verify", 30 * SECOND));
    let log = log.unwrap().unwrap();
    assert!(log.records > 0 && log.missing + log.doubled + log.corrupt == 0, "{log:?}");
    assert_eq!(log.boots, 1);
    // Before the connection is judged: one that breaks may be the guest's own state that is not what it was.
    let pages = scene.world.client.run(move || ask::<MemoryVerdict>(home, "/memory/verify", 30 * SECOND));
    let pages = pages.unwrap().unwrap();
    scene.keep_logs();
    assert_eq!(pages.mismatched, 0, "{pages:?}");
    client.close_old().await.unwrap();
    let record = client.finish().await.unwrap().record.unwrap();
    println!("{} records sent, {} received", record.sent, record.received);
    assert!(record.error.is_none() && record.content_ok && record.received > 0, "{record:?}");
    assert_left_to_its_operator(&scene).await;
    drop(monitor);
    let left = scene.close();
    assert!(left.is_empty(), "left behind: {left:?}");
}
