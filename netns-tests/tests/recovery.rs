//! What gateways do from their journals: with QEMU killed between Loaded and the first instruction, and with
//! journals written by hand, which put both sites into any state without a move. Without root every test is
//! skipped. The tests take turns.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

mod support;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gateway::api::types::{MachineView, MigrationView, NicFlows, Progressing, ResolveRequest};
use gateway::generation::write_notes;
use gateway::journal::Journal;
use gateway::migration::anchor::Anchor;
use longhaul_core::migration::Stage;
use longhaul_core::migration::generation::Generation;
use longhaul_core::migration::ledger::Ownership;
use longhaul_core::migration::message::Refusal;
use longhaul_core::migration::record::{DestinationRecord, SourceRecord};
use longhaul_core::migration::resolve::Keep;
use netns_tests::agent::RECORD_PORT;
use netns_tests::agent::client::ask;
use netns_tests::guest::boot::READY;
use netns_tests::scenario::demo::unix_ms;
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::scene::VM;
use netns_tests::scenario::traffic::Client;
use netns_tests::scenario::{Scene, SceneOptions};
use netns_tests::traffic::{RecordPlan, TrafficPlan};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::journal::{Written, anchor, attempt};
use tokio::sync::Mutex;

const LIMIT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);
/// Long enough that a gateway that was wrong would have acted.
const QUIET: Duration = Duration::from_secs(3);

static TURN: Mutex<()> = Mutex::const_new(());

fn small(name: &str) -> SceneOptions {
    SceneOptions {
        // An attempt that failed is the end of it here.
        migration: vec!["retries = 0".into()],
        ..SceneOptions::small(format!("recovery-{name}"))
    }
}

/// The hand-over takes long enough to do something in the middle of it.
fn slow(name: &str) -> SceneOptions {
    SceneOptions {
        rtt: Duration::from_millis(1000),
        // Loaded waits for the source's word.
        migration: ["retries = 0", "pause_budget_s = 60", "commit = \"confirmed\""].map(Into::into).to_vec(),
        ..small(name)
    }
}

async fn play(options: SceneOptions, act: impl AsyncFnOnce(&mut Scene) -> Result<()>) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    let _turn = TURN.lock().await;
    let programs = Programs::build().unwrap();
    let mut scene = Scene::build(options, &programs).await.unwrap();
    let played = act(&mut scene).await;
    let logs = (scene.a.log_tail(), scene.b.log_tail());
    let left = scene.close();
    if let Err(error) = played {
        panic!("{error:?}\nsite a's last words:\n{}\nsite b's last words:\n{}", logs.0, logs.1);
    }
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Waits until `seen` is true.
async fn wait(what: &str, mut seen: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !seen().await? {
        if Instant::now() > deadline {
            bail!("{what}: not within {LIMIT:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn qemu(gateway: &Gateway) -> Option<Pid> {
    let text = std::fs::read_to_string(gateway.folder.join("run/vm").join(VM).join("pid")).ok()?;
    let pid = text.trim().parse().ok()?;
    // A zombie has no command line.
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains(VM).then(|| Pid::from_raw(pid))
}

fn signal_qemu(gateway: &Gateway, signal: Signal) -> Result<()> {
    let pid = qemu(gateway).context("There is no QEMU")?;
    kill(pid, signal)?;
    Ok(())
}

fn run_state(gateway: &Gateway) -> Option<String> {
    Monitor::connect(&gateway.observer(VM), Duration::ZERO).ok()?.state().ok()
}

fn disks(gateway: &Gateway) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(gateway.folder.join("disks")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    // What is kept for the next attempt is no machine's.
    paths.filter(|path| path.extension().is_none_or(|extension| extension != "partial")).collect()
}

async fn machine(gateway: &Gateway) -> Result<Option<MachineView>> {
    let machines = gateway.client().status().await?.machines;
    Ok(machines.into_iter().find(|machine| machine.name.as_str() == VM))
}

async fn migration(gateway: &Gateway, id: &str) -> Result<Option<MigrationView>> {
    Ok(gateway.client().status().await?.migrations.into_iter().find(|view| view.id == id))
}

async fn reaches(gateway: &Gateway, id: &str, stage: Stage) -> Result<()> {
    wait("the stage", async || {
        let view = migration(gateway, id).await?;
        Ok(view.is_some_and(|view| view.stage >= stage && view.progressing == Progressing::Running))
    })
    .await
}

async fn stays(scene: &Scene, id: &str) -> Result<String> {
    let view = scene.wait_move(id, LIMIT).await?;
    ensure!(view.progressing == Progressing::Stayed, "{view:?}");
    view.reason.context("It stayed without a reason")
}

/// Site b has nothing of the machine, and it runs at a.
async fn only_at_a(scene: &Scene) -> Result<()> {
    wait("site b to be empty", async || Ok(disks(&scene.b).is_empty() && qemu(&scene.b).is_none())).await?;
    let state = run_state(&scene.a);
    ensure!(state.as_deref() == Some("running"), "site a: {state:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_qemu_killed_before_its_first_instruction_is_a_crash_there_and_its_disk_boots() {
    play(slow("crash"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        reaches(&scene.b, &id, Stage::Commitment).await?;
        // It does not answer any more, so that what follows Activated waits for it.
        signal_qemu(&scene.b, Signal::SIGSTOP)?;
        reaches(&scene.b, &id, Stage::Activation).await?;
        signal_qemu(&scene.b, Signal::SIGKILL)?;
        let view = scene.wait_move(&id, LIMIT).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        wait("site a to end its QEMU", async || Ok(qemu(&scene.a).is_none())).await?;
        let refused = scene.a.client().start(&VM.parse()?).await.unwrap_err().to_string();
        ensure!(refused.contains("site b"), "{refused}");
        wait("the crash to be seen", async || {
            Ok(machine(&scene.b).await?.is_some_and(|machine| machine.state == "crashed"))
        })
        .await?;
        let notices = migration(&scene.b, &id).await?.context("site b forgot it")?.notices;
        ensure!(notices.iter().any(|notice| notice.contains("vm start")), "{notices:?}");
        let console = scene.b.console(VM);
        scene.b.client().start(&VM.parse()?).await?;
        wait("the guest to boot at b", async || {
            Ok(std::fs::read_to_string(&console).unwrap_or_default().contains(READY))
        })
        .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_qemu_killed_when_it_has_loaded_is_refused_and_the_source_goes_on() {
    play(slow("loaded"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        reaches(&scene.b, &id, Stage::Commitment).await?;
        signal_qemu(&scene.b, Signal::SIGKILL)?;
        let reason = stays(scene, &id).await?;
        ensure!(reason.contains("QEMU"), "{reason}");
        only_at_a(scene).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_loaded_qemu_is_watched_by_a_gateway_that_was_restarted_too() {
    play(slow("watched"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        reaches(&scene.b, &id, Stage::Commitment).await?;
        scene.world.wan.cut()?;
        scene.b.kill()?;
        scene.b.launch().await?;
        reaches(&scene.b, &id, Stage::Commitment).await?;
        signal_qemu(&scene.b, Signal::SIGKILL)?;
        wait("site b to give everything back", async || Ok(disks(&scene.b).is_empty())).await?;
        scene.world.wan.heal()?;
        stays(scene, &id).await?;
        only_at_a(scene).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_waiting_qemu_that_cannot_be_asked_keeps_its_disks_until_it_is_gone() {
    play(small("silent"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        wait("memory to flow", async || {
            Ok(migration(&scene.a, &id).await?.is_some_and(|view| view.round >= 1))
        })
        .await?;
        signal_qemu(&scene.b, Signal::SIGSTOP)?;
        scene.b.kill()?;
        scene.b.launch().await?;
        stays(scene, &id).await?;
        tokio::time::sleep(QUIET).await;
        ensure!(qemu(&scene.b).is_some() && !disks(&scene.b).is_empty(), "its disks were taken away");
        signal_qemu(&scene.b, Signal::SIGCONT)?;
        only_at_a(scene).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_source_that_asks_again_hears_that_the_machine_is_the_others_although_its_guest_crashed() {
    play(small("asks"), async |scene| {
        let journals = Written::begin(scene)?;
        let image = journals.pool_image(&scene.b);
        std::fs::write(&image, "the disk at b")?;
        let disk = scene.disks[0].clone();
        let mut a = journals.open(&scene.a, std::slice::from_ref(&disk))?;
        a.define(&Ownership::Here { epoch: attempt(1).epoch })?;
        a.source(1, &journals.until_committed()).await?;
        let mut b = journals.open(&scene.b, std::slice::from_ref(&image))?;
        b.destination(1, &[journals.held(), DestinationRecord::Loaded, journals.activated()]).await?;
        drop((a, b));
        launch(scene).await?;
        wait("the source to let go", async || Ok(!disk.exists())).await?;
        let seen = machine(&scene.b).await?.context("site b forgot it")?;
        ensure!(seen.owner == "here" && seen.state == "crashed" && image.exists(), "{seen:?}");
        Ok(())
    })
    .await;
}

/// Starts both gateways on what was written.
async fn launch(scene: &mut Scene) -> Result<()> {
    scene.a.launch().await?;
    scene.b.launch().await?;
    scene.wait_for_link().await
}

/// The machine stands still at a site, and its gateway is gone.
async fn stands_still(gateway: &mut Gateway, definition: String, disks: Vec<PathBuf>) -> Result<()> {
    let client = gateway.client();
    client.define(&gateway::api::types::DefineRequest { definition, disks }).await?;
    client.start(&VM.parse()?).await?;
    Monitor::connect(&gateway.observer(VM), Duration::from_secs(5))?.ask("stop", json!({}))?;
    gateway.kill()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_attempt_given_up_before_a_second_one_was_committed_resumes_nothing_after_a_restart() {
    play(small("twice"), async |scene| {
        let definition = scene.definition()?;
        let images = scene.disks.clone();
        stands_still(&mut scene.a, definition, images.clone()).await?;
        let journals = Written::begin(scene)?;
        let mut a = journals.open(&scene.a, &images)?;
        let aborted = SourceRecord::Aborted { why: Refusal::Operator };
        a.source(1, &[journals.reserved(), aborted]).await?;
        a.source(2, &journals.until_committed()).await?;
        drop(a);
        launch(scene).await?;
        tokio::time::sleep(QUIET).await;
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("paused"), "site a: {state:?}; the machine is b's");
        ensure!(scene.a.client().may_run(&VM.parse()?).await.is_err(), "the start gate is open");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_loaded_machine_whose_attempt_was_given_up_is_told_so_by_the_sources_journal() {
    play(small("told"), async |scene| {
        let definition = scene.definition()?;
        let folder = scene.b.folder.join("own");
        std::fs::create_dir_all(&folder)?;
        let copy = scene.image.copy_disks(&folder)?.root;
        stands_still(&mut scene.b, definition, vec![copy.clone()]).await?;
        let journals = Written::begin(scene)?;
        std::fs::write(journals.pool_image(&scene.b), "a partial disk")?;
        let mut b = journals.open(&scene.b, &[copy])?;
        b.define(&Ownership::Arriving { epoch: attempt(1).epoch })?;
        b.destination(1, &[journals.held(), DestinationRecord::Loaded]).await?;
        let mut a = journals.open(&scene.a, &scene.disks)?;
        a.source(1, &[journals.reserved(), SourceRecord::Aborted { why: Refusal::Operator }]).await?;
        drop((a, b));
        launch(scene).await?;
        wait("site b to give everything back", async || {
            Ok(qemu(&scene.b).is_none() && disks(&scene.b).is_empty() && machine(&scene.b).await?.is_none())
        })
        .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_loaded_machine_whose_qemu_is_gone_is_refused_and_a_committed_source_resumes() {
    play(small("gone"), async |scene| {
        let definition = scene.definition()?;
        let images = scene.disks.clone();
        stands_still(&mut scene.a, definition, images.clone()).await?;
        let journals = Written::begin(scene)?;
        let mut a = journals.open(&scene.a, &images)?;
        a.source(1, &journals.until_committed()).await?;
        let mut b = journals.open(&scene.b, &[journals.pool_image(&scene.b)])?;
        b.destination(1, &[journals.held(), DestinationRecord::Loaded]).await?;
        drop((a, b));
        launch(scene).await?;
        wait("the guest to be resumed at a", async || Ok(run_state(&scene.a).as_deref() == Some("running")))
            .await?;
        wait("site a to own it", async || {
            Ok(machine(&scene.a).await?.is_some_and(|seen| seen.owner == "here" && seen.epoch == 1))
        })
        .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_operator_takes_a_machine_back_from_a_site_that_is_gone_and_that_site_learns_it_when_it_is_back() {
    play(small("resolve"), async |scene| {
        let definition = scene.definition()?;
        let images = scene.disks.clone();
        stands_still(&mut scene.a, definition, images.clone()).await?;
        let journals = Written::begin(scene)?;
        let mut a = journals.open(&scene.a, &images)?;
        a.source(1, &journals.until_committed()).await?;
        let image = journals.pool_image(&scene.b);
        std::fs::write(&image, "the disk at b")?;
        let mut b = journals.open(&scene.b, &[image])?;
        b.destination(1, &[journals.held(), DestinationRecord::Loaded, journals.activated()]).await?;
        drop((a, b));
        scene.a.launch().await?;
        let (client, vm) = (scene.a.client(), VM.parse()?);
        let mut request = ResolveRequest { keep: Keep::Here, destroyed: None };
        let why = client.resolve(&vm, &request).await.err().context("It was decided unasked")?.to_string();
        ensure!(why.contains("--i-have-destroyed-the-other-copy=b") && why.contains("two copies"), "{why}");
        ensure!(run_state(&scene.a).as_deref() == Some("paused"));
        says_that_it_stands_still(scene).await?;
        request.destroyed = Some("b".parse()?);
        client.resolve(&vm, &request).await?;
        wait("the guest to run at a", async || Ok(run_state(&scene.a).as_deref() == Some("running"))).await?;
        wait("a new epoch", async || {
            Ok(machine(&scene.a).await?.is_some_and(|seen| seen.owner == "here" && seen.epoch == 2))
        })
        .await?;
        let told = client.journal(Some(&vm)).await?;
        let last = told[0].records.last().context("There is no record")?;
        ensure!(last.why.as_ref().is_some_and(|why| why.contains("site b is destroyed")), "{told:?}");

        scene.b.launch().await?;
        scene.wait_for_link().await?;
        wait("site b to learn it", async || {
            Ok(machine(&scene.b).await?.is_some_and(|seen| seen.owner == "away" && seen.epoch == 2))
        })
        .await?;
        ensure!(scene.b.client().start(&vm).await.is_err(), "site b starts it");
        let why = client.resolve(&vm, &request).await.err().context("It was decided twice")?.to_string();
        ensure!(why.contains("waits"), "{why}");
        Ok(())
    })
    .await;
}

/// Status and the doctor tell of a guest that waits for the other site's word.
async fn says_that_it_stands_still(scene: &Scene) -> Result<()> {
    let client = scene.a.client();
    let noticed = async || {
        let migrations = client.status().await?.migrations;
        Ok(migrations.iter().flat_map(|move_| &move_.notices).any(|notice| notice.contains("stands still")))
    };
    wait("a notice", noticed).await?;
    let findings = client.doctor(None).await?;
    ensure!(
        findings.iter().any(|finding| !finding.ok && finding.detail.contains("stands still")),
        "{findings:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_machine_whose_new_site_has_forgotten_how_it_came_is_released_by_its_operator() {
    play(small("forgotten"), async |scene| {
        let (definition, images) = (scene.definition()?, scene.disks.clone());
        stands_still(&mut scene.a, definition, images.clone()).await?;
        let journals = Written::begin(scene)?;
        let mut a = journals.open(&scene.a, &images)?;
        a.source(1, &journals.until_committed()).await?;
        drop(a);
        // Site b has the journal of before all this.
        launch(scene).await?;
        scene.wait_for_link().await?;
        says_that_it_stands_still(scene).await?;
        let (client, vm) = (scene.a.client(), VM.parse()?);
        let here = ResolveRequest { keep: Keep::Here, destroyed: Some("b".parse()?) };
        let why = client.resolve(&vm, &here).await.err().context("It was taken beside a link")?.to_string();
        ensure!(why.contains("can be reached"), "{why}");
        client.resolve(&vm, &ResolveRequest { keep: Keep::There, destroyed: None }).await?;
        wait("site a to release it", async || {
            let left = machine(&scene.a).await?.is_some_and(|seen| seen.owner == "away");
            Ok(left && run_state(&scene.a).is_none() && !images[0].exists())
        })
        .await?;
        ensure!(client.start(&vm).await.is_err(), "site a starts it");
        Ok(())
    })
    .await;
}

/// Connections that the next gateway at a would hold the tunnel for, by a copy of the journal.
fn noted_flows(scene: &Scene) -> Result<usize> {
    let copy = tempfile::NamedTempFile::new_in(scene.world.lab.scratch())?;
    std::fs::copy(scene.a.journal(), copy.path())?;
    let anchor: Option<Anchor> = Journal::open_copy(copy.path())?.anchor(&VM.parse()?)?;
    Ok(anchor.context("There is no anchor")?.nics.iter().map(|nic| nic.flows.len()).sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_connection_that_ended_before_its_gateway_was_killed_holds_no_tunnel_after_that() {
    play(slow("ended"), async |scene| {
        scene.start_guest().await?;
        let mut plan = TrafficPlan::new(unix_ms());
        let to = (scene.home()?, RECORD_PORT).into();
        plan.record = Some(RecordPlan { address: to, through: None, interval_ms: 10, gap_ms: 50 });
        let mut client = Client::start(&scene.world.client, plan).await?;
        let id = scene.begin_move().await?;
        let view = scene.wait_move(&id, Duration::from_secs(180)).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        client.close_old().await?;
        let record = client.finish().await?.record.context("There is no record connection")?;
        ensure!(record.content_ok, "{record:?}");
        let vm = VM.parse()?;
        let open = |nic: &NicFlows| nic.held_by.flows.tcp_open + nic.held_by.flows.tcp_closing;
        wait("that to be written down", async || Ok(noted_flows(scene)? == 0)).await?;
        scene.a.kill()?;
        scene.a.launch().await?;
        let after = scene.a.client().flows(&vm).await?;
        ensure!(after.nics.iter().map(open).sum::<u64>() == 0, "{after:?}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_name_that_was_owed_moves_after_a_restart_although_no_qemu_is_left() {
    play(small("name"), async |scene| {
        let journals = Written::begin(scene)?;
        let care_of: IpAddr = scene.world.site("b")?.spec.address(200).into();
        let mut a = journals.open(&scene.a, &scene.disks)?;
        let mut records = journals.until_committed();
        records.push(SourceRecord::Released);
        a.source(1, &records).await?;
        a.anchor(&anchor(&journals, scene.home()?, care_of))?;
        drop(a);
        launch(scene).await?;
        wait("the name to move", async || {
            Ok(scene.names.read(&Scene::name()).is_ok_and(|records| records.addresses == [care_of]))
        })
        .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_machine_that_becomes_ours_after_a_restart_keeps_its_connections() {
    play(slow("connections"), async |scene| {
        scene.start_guest().await?;
        let mut plan = TrafficPlan::new(unix_ms());
        let to = (scene.home()?, RECORD_PORT).into();
        plan.record = Some(RecordPlan { address: to, through: None, interval_ms: 10, gap_ms: 50 });
        let mut client = Client::start(&scene.world.client, plan).await?;
        let id = scene.begin_move().await?;
        reaches(&scene.b, &id, Stage::Commitment).await?;
        scene.world.wan.cut()?;
        scene.b.kill()?;
        scene.b.launch().await?;
        scene.world.wan.heal()?;
        let view = scene.wait_move(&id, LIMIT).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        // Restored before the API answers, which is what a launch waits for.
        scene.a.kill()?;
        let mark = scene.a.log_bytes();
        scene.a.launch().await?;
        let told = scene.a.told(mark, "gateway is ready").await?;
        ensure!(told.contains("address attracted"), "the gateway listens before it attracts: {told}");
        scene.wait_for_link().await?;
        tokio::time::sleep(QUIET).await;
        client.close_old().await?;
        let record = client.finish().await?.record.context("There is no record connection")?;
        ensure!(record.content_ok && record.error.is_none(), "{record:?}");
        Ok(())
    })
    .await;
}

/// Waits until the machine's state at a is this one, as its gateway says it.
async fn is_at_a(scene: &Scene, wanted: &str) -> Result<()> {
    wait(wanted, async || Ok(machine(&scene.a).await?.is_some_and(|machine| machine.state == wanted))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_that_powers_itself_off_stays_down_and_one_that_crashes_boots_again() {
    let options = SceneOptions { restart_on_crash: true, ..small("policy") };
    play(options, async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        reaches(&scene.a, &id, Stage::PreCopy).await?;
        let home = scene.home()?;
        scene.world.client.run(move || ask::<String>(home, "/poweroff", LIMIT))??;
        println!("stayed: {}", stays(scene, &id).await?);
        wait("site b to be empty", async || Ok(disks(&scene.b).is_empty() && qemu(&scene.b).is_none()))
            .await?;
        is_at_a(scene, "stopped").await?;
        tokio::time::sleep(QUIET).await;
        ensure!(qemu(&scene.a).is_none(), "a guest that had powered itself off was started");

        let vm = VM.parse()?;
        scene.a.client().start(&vm).await?;
        let first = qemu(&scene.a).context("It was not started")?;
        kill(first, Signal::SIGKILL)?;
        wait("a second boot", async || Ok(qemu(&scene.a).is_some_and(|pid| pid != first))).await?;
        is_at_a(scene, "running").await?;
        signal_qemu(&scene.a, Signal::SIGKILL)?;
        is_at_a(scene, "restarting").await?;
        scene.a.client().stop(&vm).await?;
        tokio::time::sleep(QUIET).await;
        ensure!(qemu(&scene.a).is_none(), "a machine that its operator had stopped was started");
        is_at_a(scene, "stopped").await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_whose_qemu_hangs_when_its_gateway_comes_back_is_resumed_once_it_answers() {
    play(slow("hangs"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        reaches(&scene.a, &id, Stage::StopAndCopy).await?;
        signal_qemu(&scene.a, Signal::SIGSTOP)?;
        scene.a.kill()?;
        let launched = scene.a.launch().await;
        signal_qemu(&scene.a, Signal::SIGCONT)?;
        launched?;
        wait("the guest to run on", async || Ok(run_state(&scene.a).as_deref() == Some("running"))).await?;
        scene.wait_for_link().await?;
        only_at_a(scene).await?;
        is_at_a(scene, "running").await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_journal_from_between_two_moves_ends_nothing_of_the_machine_that_has_come_home() {
    play(small("between"), async |scene| {
        scene.start_guest().await?;
        let id = scene.begin_move().await?;
        let view = scene.wait_move(&id, LIMIT).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        // A visitor that its operator stops for a moment is not resumed behind their back.
        scene.b.client().status().await?;
        Monitor::connect(&scene.b.observer(VM), LIMIT)?.ask("stop", json!({}))?;
        scene.b.kill()?;
        scene.b.launch().await?;
        tokio::time::sleep(QUIET).await;
        let mut monitor = Monitor::connect(&scene.b.observer(VM), LIMIT)?;
        ensure!(monitor.state()? == "paused", "the gateway resumed what its operator had stopped");
        monitor.ask("cont", json!({}))?;
        drop(monitor);

        let (journal, copy) = (scene.a.journal(), scene.folder.join("between.redb"));
        scene.a.stop()?;
        std::fs::copy(&journal, &copy)?;
        scene.a.launch().await?;
        scene.wait_for_link().await?;
        let id = scene.begin_move_between("b", "a").await?;
        let view = scene.wait_move_from("b", &id, LIMIT).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        let newest = scene.folder.join("newest.redb");
        let running = qemu(&scene.a).context("It does not run at home")?;
        scene.a.stop()?;
        std::fs::copy(&journal, &newest)?;
        std::fs::copy(&copy, &journal)?;
        scene.a.launch().await?;
        tokio::time::sleep(QUIET).await;
        ensure!(qemu(&scene.a) == Some(running), "the only copy was ended");
        ensure!(run_state(&scene.a).as_deref() == Some("running"), "the only copy was stopped");
        let findings = scene.a.client().doctor(Some(&VM.parse()?)).await?;
        let held = findings.iter().any(|finding| !finding.ok && finding.detail.contains("older"));
        ensure!(held, "{findings:?}");
        scene.a.stop()?;
        std::fs::copy(&newest, &journal)?;
        scene.a.launch().await?;
        is_at_a(scene, "running").await
    })
    .await;
}

/// Nothing starts the machine at a, and whoever asks is told why.
async fn held_at_a(scene: &Scene) -> Result<()> {
    let client = scene.a.client();
    for refused in [client.start(&VM.parse()?).await, client.may_run(&VM.parse()?).await] {
        let why = refused.err().context("It may run at a")?.to_string();
        ensure!(why.contains("site b") && why.contains("journal"), "{why}");
    }
    let hold = machine(&scene.a).await?.context("site a forgot it")?.hold;
    ensure!(hold.is_some_and(|hold| hold.contains("site b")), "the status does not say it");
    let findings = client.doctor(Some(&VM.parse()?)).await?;
    ensure!(findings.iter().any(|finding| !finding.ok && finding.detail.contains("held")), "{findings:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_journal_from_before_the_move_holds_the_machine_and_no_journal_refuses_its_disk() {
    play(small("restored"), async |scene| {
        scene.start_guest().await?;
        let (journal, copy) = (scene.a.folder.join("state/journal.redb"), scene.folder.join("old.redb"));
        scene.a.stop()?;
        std::fs::copy(&journal, &copy)?;
        scene.a.launch().await?;
        scene.wait_for_link().await?;
        let id = scene.begin_move().await?;
        let view = scene.wait_move(&id, LIMIT).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        wait("the kept disk to be listed", async || {
            let kept = scene.a.client().status().await?.kept;
            Ok(kept.iter().any(|disk| disk.vm.as_str() == VM && disk.until_ms > Some(disk.since_ms)))
        })
        .await?;
        scene.a.kill()?;
        std::fs::copy(&copy, &journal)?;
        let disk = scene.disks[0].clone();
        // Whoever restores a journal may restore the disk's name as well.
        std::fs::rename(format!("{}.moved-e1", disk.display()), &disk)?;
        scene.a.launch().await?;
        held_at_a(scene).await?;
        ensure!(qemu(&scene.a).is_none() && run_state(&scene.b).as_deref() == Some("running"));

        scene.a.kill()?;
        std::fs::remove_file(&journal)?;
        scene.a.launch().await?;
        let request =
            gateway::api::types::DefineRequest { definition: scene.definition()?, disks: vec![disk] };
        let why = scene.a.client().define(&request).await.err().context("It was defined")?.to_string();
        ensure!(why.contains("site b") && why.contains(".generation"), "{why}");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_journal_from_before_the_commitment_does_not_resume_the_guest_that_was_stopped_for_it() {
    play(small("older"), async |scene| {
        let definition = scene.definition()?;
        let images = scene.disks.clone();
        stands_still(&mut scene.a, definition, images.clone()).await?;
        let journals = Written::begin(scene)?;
        let mut a = journals.open(&scene.a, &images)?;
        a.source(1, &journals.until_committed()[..2]).await?;
        drop(a);
        let attempt = attempt(1);
        let note = Generation { vm: attempt.vm, epoch: attempt.epoch, owner: attempt.peer };
        write_notes(&images, &note)?;
        launch(scene).await?;
        tokio::time::sleep(QUIET).await;
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("paused"), "site a: {state:?}; the machine may be b's");
        held_at_a(scene).await
    })
    .await;
}
