//! A machine that was given away behind its last byte, while that byte is on its way: the link is cut, a gateway dies, an operator wants it back. At most
//! one copy runs at any time, one runs in the end, and its connections go on.
//!
//! What must hold for any order of events is the model's and the simulation's affair; here it is real QEMUs and real bytes.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

#[path = "support/scenes.rs"]
mod scenes;

use std::time::{Duration, Instant};

use gateway::api::types::Progressing;
use longhaul_core::migration::Stage;
use netns_tests::agent::RECORD_PORT;
use netns_tests::scenario::demo::unix_ms;
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::options::SceneOptions;
use netns_tests::scenario::scene::Scene;
use netns_tests::scenario::traces::qemus;
use netns_tests::scenario::traffic::Client;
use netns_tests::traffic::{CLOSE_AFTER_CUT_MS, RecordPlan, TrafficPlan};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use scenes::{build, close, state, turn, wait};

const MOVE: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(30);
/// Longer than a guest may stand still without having been given away.
const STANDS: Duration = Duration::from_secs(6);

/// The last byte and the Commit leave at about the same time, and both are on their way for half a second.
fn options(name: &str) -> SceneOptions {
    SceneOptions {
        rtt: Duration::from_millis(1000),
        migration: ["retries = 0", "pause_budget_s = 20"].map(Into::into).to_vec(),
        ..much_left(name)
    }
}

/// More than a second passes between the guest's stop and the last byte.
fn much_left(name: &str) -> SceneOptions {
    SceneOptions {
        rate_mbit: 40.0,
        dirty_memory_kib_per_s: 4096,
        migration: ["retries = 0", "pause_budget_s = 2", "pause_target_ms = 3000"].map(Into::into).to_vec(),
        ..SceneOptions::small(format!("pipelined-{name}"))
    }
}

async fn connect(scene: &Scene) -> Client {
    let mut plan = TrafficPlan::new(unix_ms());
    plan.close_timeout_ms = CLOSE_AFTER_CUT_MS;
    let address = (scene.home().unwrap(), RECORD_PORT).into();
    plan.record = Some(RecordPlan { address, through: None, interval_ms: 10, gap_ms: 200 });
    Client::start(&scene.world.client, plan).await.unwrap()
}

async fn lived(client: Client) {
    let record = client.finish().await.unwrap().record.unwrap();
    println!("{} records, silences {:?}", record.received, record.gaps);
    assert!(record.content_ok, "{record:?}");
}

/// A move up to the moment at which the source has given the machine away, before it is all there.
async fn given_away(scene: &Scene) -> String {
    until(scene, Stage::Commitment).await
}

async fn until(scene: &Scene, stage: Stage) -> String {
    let id = scene.begin_move().await.unwrap();
    let deadline = Instant::now() + MOVE;
    loop {
        let view = scene.a.client().migration(&id).await.unwrap();
        assert_eq!(view.progressing, Progressing::Running, "{view:?}");
        if view.stage >= stage {
            return id;
        }
        assert!(Instant::now() < deadline, "{}", scene.a.log_tail());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What was done to a machine that is on its way was done before it was there.
async fn in_time(scene: &Scene, id: &str) {
    let stage = scene.b.client().migration(id).await.unwrap().stage;
    assert!(stage < Stage::Commitment, "the machine was loaded before this host came to it");
}

async fn cut_behind_the_commit(scene: &Scene) -> String {
    let id = given_away(scene).await;
    scene.world.wan.cut().unwrap();
    in_time(scene, &id).await;
    id
}

fn signal_qemu(gateway: &Gateway, signal: Signal) {
    let [qemu] = qemus(gateway)[..] else { panic!("not one QEMU") };
    kill(Pid::from_raw(qemu), signal).unwrap();
}

fn run_anywhere(scene: &Scene) -> Vec<&'static str> {
    let running = |(name, gateway)| (state(gateway).as_deref() == Some("running")).then_some(name);
    [("a", &scene.a), ("b", &scene.b)].into_iter().filter_map(running).collect()
}

async fn stands_still(scene: &Scene) {
    let began = Instant::now();
    while began.elapsed() < STANDS {
        scene.keep_logs();
        assert_eq!(run_anywhere(scene), [] as [&str; 0], "after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn says_so(gateway: &Gateway, id: &str) -> bool {
    let notices = gateway.client().migration(id).await.unwrap().notices;
    notices.iter().any(|notice| notice.contains("stands still"))
}

async fn soon_says_so(gateway: &Gateway, id: &str) {
    let began = Instant::now();
    while !says_so(gateway, id).await {
        assert!(began.elapsed() < SOON, "nobody says that it stands still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn heal(scene: &Scene) {
    scene.world.wan.heal().unwrap();
    scene.wait_for_link().await.unwrap();
}

/// The machine goes on at a, b has nothing of it, and the next move succeeds.
async fn goes_on_at_a(scene: &Scene, id: &str, why: &str) {
    wait("the guest to run at a", SOON, || (run_anywhere(scene) == ["a"]).then_some(())).await;
    wait("site b to be empty", SOON, || qemus(&scene.b).is_empty().then_some(())).await;
    // It has cleared up, too: a machine that is moving there is not taken again.
    scene.wait_move_from("b", id, SOON).await.unwrap();
    let view = scene.wait_move(id, SOON).await.unwrap();
    assert_eq!(view.progressing, Progressing::Stayed, "{view:?}");
    assert!(view.reason.as_deref().is_some_and(|reason| reason.contains(why)), "{view:?}");
    let id = scene.begin_move().await.unwrap();
    arrives(scene, &id).await;
}

async fn arrives(scene: &Scene, id: &str) {
    let view = scene.wait_move(id, MOVE).await.unwrap();
    scene.keep_logs();
    assert_eq!(view.progressing, Progressing::Moved, "{view:?}");
    assert_eq!(run_anywhere(scene), ["b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_behind_the_commit_leaves_the_machine_standing_until_the_link_is_back() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("cut")).await;
    scene.start_guest().await.unwrap();
    let client = connect(&scene).await;
    let id = cut_behind_the_commit(&scene).await;
    stands_still(&scene).await;
    soon_says_so(&scene.a, &id).await;
    heal(&scene).await;
    arrives(&scene, &id).await;
    lived(client).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_while_much_is_left_to_send_comes_before_the_commit_and_costs_a_pause() {
    let Some(_turn) = turn().await else { return };
    let scene = build(much_left("much")).await;
    scene.start_guest().await.unwrap();
    let client = connect(&scene).await;
    let id = until(&scene, Stage::StopAndCopy).await;
    scene.world.wan.cut().unwrap();
    wait("the guest to stand still", SOON, || run_anywhere(&scene).is_empty().then_some(())).await;
    wait("the guest to run at a", SOON, || (run_anywhere(&scene) == ["a"]).then_some(())).await;
    heal(&scene).await;
    goes_on_at_a(&scene, &id, "pause").await;
    lived(client).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_qemu_dies_behind_the_commit_gives_the_machine_back_over_the_link() {
    let Some(_turn) = turn().await else { return };
    let scene = build(options("qemu")).await;
    scene.start_guest().await.unwrap();
    let client = connect(&scene).await;
    let id = given_away(&scene).await;
    signal_qemu(&scene.b, Signal::SIGKILL);
    in_time(&scene, &id).await;
    goes_on_at_a(&scene, &id, "QEMU").await;
    lived(client).await;
    close(scene);
}

/// The gateway of one site dies behind the Commit, and is there again before the link is. It knows that the rest is lost, and
/// not what the other site has made of it.
async fn a_gateway_dies(name: &str, of: impl FnOnce(&mut Scene) -> &mut Gateway) {
    let Some(_turn) = turn().await else { return };
    let mut scene = build(options(name)).await;
    scene.start_guest().await.unwrap();
    let client = connect(&scene).await;
    let id = cut_behind_the_commit(&scene).await;
    let gateway = of(&mut scene);
    gateway.kill().unwrap();
    gateway.launch().await.unwrap();
    stands_still(&scene).await;
    heal(&scene).await;
    goes_on_at_a(&scene, &id, "restarted").await;
    lived(client).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_gateway_dies_behind_the_commit_asks_for_its_machine_and_gets_it() {
    a_gateway_dies("source", |scene| &mut scene.a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_whose_gateway_dies_behind_the_commit_gives_the_machine_back() {
    a_gateway_dies("destination", |scene| &mut scene.b).await;
}

/// A QEMU that does not load what it has been sent: both sites say so, and the operator of either may end it.
async fn an_operator_ends_it(name: &str, asked: impl FnOnce(&Scene) -> &Gateway) {
    let Some(_turn) = turn().await else { return };
    let scene = build(options(name)).await;
    scene.start_guest().await.unwrap();
    let client = connect(&scene).await;
    let id = given_away(&scene).await;
    signal_qemu(&scene.b, Signal::SIGSTOP);
    in_time(&scene, &id).await;
    // Before site b gives its QEMU up by itself.
    soon_says_so(&scene.a, &id).await;
    soon_says_so(&scene.b, &id).await;
    // The one at site b answers nobody.
    assert_ne!(state(&scene.a).as_deref(), Some("running"));
    asked(&scene).client().abort(&id).await.unwrap();
    goes_on_at_a(&scene, &id, "operator").await;
    lived(client).await;
    close(scene);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_the_source_gets_a_machine_back_that_does_not_load_and_its_connections_go_on() {
    an_operator_ends_it("abort-a", |scene| &scene.a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_of_the_destination_gives_a_machine_back_that_does_not_load() {
    an_operator_ends_it("abort-b", |scene| &scene.b).await;
}
