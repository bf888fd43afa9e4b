//! Faults on real machines: a bounded part of the fault matrix, and single faults with an outcome of their own. Each test
//! ends with exactly one copy that runs, its connections and its disk right, and nothing left behind.
//! Without root every test is skipped. The tests take turns.

#![allow(
    clippy::unwrap_used,
    reason = "a test's own preparation may end it; clippy exempts only the test functions"
)]

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use gateway::api::types::{MigrationView, Progressing};
use longhaul_core::migration::Stage;
use netns_tests::agent::RECORD_PORT;
use netns_tests::exec::run;
use netns_tests::faults::setting::{Leg, Setting};
use netns_tests::faults::{self, FaultOptions};
use netns_tests::scenario::demo::unix_ms;
use netns_tests::scenario::disk_check;
use netns_tests::scenario::gateway::Gateway;
use netns_tests::scenario::monitor::{GuestEvent, Monitor};
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::scene::VM;
use netns_tests::scenario::traces::{Traces, as_before, kill_qemu, qemus, run_state};
use netns_tests::scenario::traffic::Client;
use netns_tests::scenario::{Scene, SceneOptions};
use netns_tests::traffic::{RecordPlan, TrafficPlan};
use netns_tests::wan::Direction;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::sync::Mutex;

/// A whole move of a small guest, with room for a busy machine.
const MOVE: Duration = Duration::from_secs(180);
/// What a site gives back takes no longer.
const TIDY: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(20);
/// No case of the matrix begins after this.
const MATRIX: Duration = Duration::from_secs(900);
/// In the pause the machine is still the source's, for as long as loading takes; `pipelined` has the scenes in which it is not.
const CONFIRMED: &str = "commit = \"confirmed\"";
/// Cases of seed 1, those first that found something once.
const BOUNDED: [u64; 6] = [4, 14, 8, 10, 12, 6];

/// The same on the way home: a visited site's host that dies when it has given its machine away.
const BOUNDED_HOME: [u64; 1] = [185];

static TURN: Mutex<()> = Mutex::const_new(());

/// Builds a scene with its guest at site a, plays, and takes it down.
async fn play(options: SceneOptions, act: impl AsyncFnOnce(&mut Scene, &Before) -> Result<()>) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    let _turn = TURN.lock().await;
    let started = Instant::now();
    let programs = Programs::build().unwrap();
    let mut scene = Scene::build(options, &programs).await.unwrap();
    let played = async {
        let before_start = Traces::of(&scene.world.site("b")?.host)?;
        scene.start_guest().await?;
        let before = Before { a: Traces::of(&scene.world.site("a")?.host)?, b: before_start };
        act(&mut scene, &before).await
    };
    let played = played.await;
    let logs = (scene.a.log_tail(), scene.b.log_tail());
    let left = scene.close();
    if let Err(error) = played {
        panic!("{error:?}\nsite a's last words:\n{}\nsite b's last words:\n{}", logs.0, logs.1);
    }
    assert!(left.is_empty(), "left behind: {left:?}");
    println!("played in {:.1?}", started.elapsed());
}

/// What the sites' hosts looked like before anything moved.
struct Before {
    a: Traces,
    b: Traces,
}

/// The guest runs at a, and b has nothing of it but what it keeps for the next attempt: no QEMU, no image, no
/// tap, no route. Site a's network and the name's TTL are as before.
async fn stayed(scene: &Scene, before: &Before) -> Result<()> {
    let deadline = Instant::now() + TIDY;
    let disks = || {
        let found = std::fs::read_dir(scene.b.folder.join("disks"))?.flatten();
        let image = |entry: &std::fs::DirEntry| entry.path().extension().is_none_or(|it| it != "partial");
        Ok::<_, std::io::Error>(found.filter(image).count())
    };
    while !qemus(&scene.b).is_empty() || disks()? > 0 {
        if Instant::now() > deadline {
            bail!("Site b still has {:?} and {} disks", qemus(&scene.b), disks()?);
        }
        tokio::time::sleep(LOOK).await;
    }
    as_before(&scene.world.site("b")?.host, &before.b, TIDY).await.context("site b")?;
    as_before(&scene.world.site("a")?.host, &before.a, TIDY).await.context("site a")?;
    let (at_a, at_b) = (run_state(&scene.a), run_state(&scene.b));
    ensure!(at_a.as_deref() == Some("running") && at_b.is_none(), "a: {at_a:?}, b: {at_b:?}");
    let ttl = Some(scene.options.ttl_s);
    while scene.names.read(&Scene::name())?.ttl_s() != ttl {
        if Instant::now() > deadline {
            bail!("The TTL is {:?}, it was {ttl:?}", scene.names.read(&Scene::name())?.ttl_s());
        }
        tokio::time::sleep(LOOK * 5).await;
    }
    let machines = scene.b.client().status().await?.machines;
    ensure!(machines.is_empty(), "site b still lists {machines:?}");
    Ok(())
}

/// Waits until something is true of a migration.
async fn until(scene: &Scene, id: &str, wanted: impl Fn(&MigrationView) -> bool) -> Result<MigrationView> {
    let deadline = Instant::now() + MOVE;
    loop {
        let view = scene.a.client().migration(id).await?;
        if wanted(&view) {
            return Ok(view);
        }
        if view.progressing != Progressing::Running || Instant::now() > deadline {
            bail!("The migration did not get there: {view:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Disks are in step and memory is on its way.
async fn memory_flows(scene: &Scene, id: &str) -> Result<()> {
    until(scene, id, |view| view.stage == Stage::PreCopy && view.round >= 1).await.map(drop)
}

/// The disk is on its way.
async fn disk_flows(scene: &Scene, id: &str) -> Result<()> {
    until(scene, id, |view| view.stage == Stage::PreCopy && view.disk.0 > 1 << 20).await.map(drop)
}

/// A second and more passes between the guest's stop and the last byte: what happens then happens in the pause.
fn long_pause(name: &str, migration: &[&str]) -> SceneOptions {
    let migration = [&[CONFIRMED, "pause_target_ms = 3000"], migration].concat();
    let migration = migration.into_iter().map(Into::into).collect();
    SceneOptions { rate_mbit: 40.0, dirty_memory_kib_per_s: 4096, migration, ..SceneOptions::small(name) }
}

/// The pause has begun.
async fn stopped(monitor: &Monitor) -> Result<()> {
    let deadline = Instant::now() + MOVE;
    while !monitor.events().iter().any(|event| event.name == "STOP") {
        ensure!(Instant::now() < deadline, "The guest was never stopped");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn expect_stayed(scene: &Scene, id: &str) -> Result<String> {
    let view = scene.wait_move(id, MOVE).await?;
    ensure!(view.progressing == Progressing::Stayed, "{view:?}");
    let reason = view.reason.context("It stayed without a reason")?;
    println!("stayed: {reason}");
    Ok(reason)
}

/// Moves the machine, and is satisfied with nothing less.
async fn moves(scene: &Scene) -> Result<MigrationView> {
    let id = scene.begin_move().await?;
    let view = scene.wait_move(&id, MOVE).await?;
    ensure!(view.progressing == Progressing::Moved, "{view:?}");
    Ok(view)
}

/// Moves the machine; its connection lives until it ends, nothing is left of the tunnel then, and its disk is right.
async fn moves_with(scene: &Scene, client: Client) -> Result<()> {
    let view = moves(scene).await?;
    println!("{} bytes of its disk were there already", view.disk_kept);
    connection_was_right(client).await?;
    tunnel_comes_down(scene).await?;
    runs_at_b(scene, &view).await
}

/// The machine runs at b only, and its disk there is right. The machine is stopped by that.
async fn runs_at_b(scene: &Scene, view: &MigrationView) -> Result<()> {
    let deadline = Instant::now() + TIDY;
    while !qemus(&scene.a).is_empty() {
        ensure!(Instant::now() < deadline, "Site a still has a QEMU");
        tokio::time::sleep(LOOK).await;
    }
    let at_a = run_state(&scene.a);
    let mut monitor = Monitor::connect(&scene.b.observer(VM), Duration::from_secs(5))?;
    let at_b = monitor.state()?;
    ensure!(at_a.is_none() && at_b == "running", "a: {at_a:?}, b: {at_b:?}");
    let found = disk_check::compare(scene, &mut monitor, &view.id, 1).await?;
    println!("disk: {found:?}");
    ensure!(found.mismatched == 0 && found.compared > 0 && found.sound, "{found:?}");
    Ok(())
}

/// A client with a record connection to the guest.
async fn record_client(scene: &Scene) -> Result<Client> {
    let mut plan = TrafficPlan::new(unix_ms());
    plan.record = Some(RecordPlan {
        address: (scene.home()?, RECORD_PORT).into(),
        through: None,
        interval_ms: 10,
        gap_ms: 50,
    });
    Client::start(&scene.world.client, plan).await
}

/// Lets the old connection end; every record must have come once.
async fn connection_was_right(mut client: Client) -> Result<()> {
    client.close_old().await.context("the record connection")?;
    let record = client.finish().await?.record.context("There is no record connection")?;
    println!(
        "records: {} sent, {} received, longest silence {} ms",
        record.sent, record.received, record.longest_gap_ms
    );
    ensure!(record.content_ok && record.error.is_none(), "{record:?}");
    Ok(())
}

/// The tunnel comes down by itself when old connections have ended.
async fn tunnel_comes_down(scene: &Scene) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let anchors = scene.a.client().status().await?.anchors;
        if anchors.iter().all(|anchor| anchor.closed_ms.is_some()) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "The tunnel stays up: {anchors:?}");
        tokio::time::sleep(LOOK * 5).await;
    }
}

/// Asks a QEMU all the time how it is, and reboots it on demand.
struct Questioner {
    reset: Arc<AtomicBool>,
    end: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<Answer>, Duration)>,
}

/// When QEMU was asked, and how long it took.
struct Answer {
    asked: Instant,
    took: Duration,
}

impl Questioner {
    fn start(mut monitor: Monitor) -> Self {
        let (reset, end) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (reset_wanted, ended) = (reset.clone(), end.clone());
        let late = std::thread::spawn({
            let ended = end.clone();
            move || lateness(&ended)
        });
        let thread = std::thread::spawn(move || {
            let mut answers = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let asked = Instant::now();
                // Ended with the machine that left.
                if monitor.ask("query-status", json!({})).is_err() {
                    break;
                }
                answers.push(Answer { asked, took: asked.elapsed() });
                if reset_wanted.swap(false, Ordering::Relaxed) {
                    drop(monitor.ask("system_reset", json!({})));
                }
                std::thread::sleep(LOOK);
            }
            ended.store(true, Ordering::Relaxed);
            (answers, late.join().unwrap_or_default())
        });
        Self { reset, end, thread }
    }

    /// All answers, and how late this machine wakes a thread at worst.
    fn finish(self) -> (Vec<Answer>, Duration) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn slowest<'a>(answers: impl Iterator<Item = &'a Answer>) -> Duration {
    answers.map(|answer| answer.took).max().unwrap_or_default()
}

fn lateness(ended: &AtomicBool) -> Duration {
    const NAP: Duration = Duration::from_millis(5);
    let mut worst = Duration::ZERO;
    while !ended.load(Ordering::Relaxed) {
        let asleep = Instant::now();
        std::thread::sleep(NAP);
        worst = worst.max(asleep.elapsed().saturating_sub(NAP));
    }
    worst
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_abort_in_pre_copy_leaves_the_guest_at_home_and_nothing_elsewhere() {
    play(SceneOptions::small("fault-abort"), async |scene, before| {
        let client = record_client(scene).await?;
        let id = scene.begin_move().await?;
        memory_flows(scene, &id).await?;
        scene.a.client().abort(&id).await?;
        expect_stayed(scene, &id).await?;
        stayed(scene, before).await?;
        moves_with(scene, client).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cut_in_the_pause_resumes_the_guest_at_home() {
    let options = long_pause("fault-pause", &["pause_budget_s = 1", "retries = 0"]);
    play(options, async |scene, before| {
        let client = record_client(scene).await?;
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        let id = scene.begin_move().await?;
        stopped(&monitor).await?;
        scene.world.wan.cut()?;
        let stopped_at = Instant::now();
        expect_stayed(scene, &id).await?;
        println!("stood still for {:.1?}", stopped_at.elapsed());
        drop(monitor);
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("running"), "{state:?} before the WAN is back");
        scene.world.wan.heal()?;
        scene.wait_for_link().await?;
        stayed(scene, before).await?;
        moves_with(scene, client).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_journal_that_cannot_be_written_in_the_pause_leaves_the_guest_running() {
    play(long_pause("fault-journal", &[]), async |scene, before| {
        let client = record_client(scene).await?;
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        scene.begin_move().await?;
        stopped(&monitor).await?;
        scene.a.limit_files()?;
        let limited = Instant::now();
        let mut events = Vec::new();
        while !events.iter().any(|event: &GuestEvent| event.name == "RESUME") {
            ensure!(limited.elapsed() < MOVE, "The guest was not resumed: {events:?}");
            tokio::time::sleep(LOOK).await;
            events.extend(monitor.events());
        }
        println!("resumed {:.1?} after the journal had failed", limited.elapsed());
        drop(monitor);
        let code = loop {
            if let Some(code) = scene.a.ended()? {
                break code;
            }
            ensure!(limited.elapsed() < MOVE + TIDY, "The gateway goes on without its journal");
            tokio::time::sleep(LOOK).await;
        };
        ensure!(code == 1, "it ended with {code}");
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("running"), "{state:?} without a gateway");
        scene.a.launch().await?;
        scene.wait_for_link().await?;
        stayed(scene, before).await?;
        moves_with(scene, client).await
    })
    .await;
}

/// A QEMU that hangs: it is there, and does nothing.
struct Hung(Pid);

impl Hung {
    fn hang(gateway: &Gateway) -> Result<Self> {
        let pids = qemus(gateway);
        let [pid] = pids[..] else { bail!("Not one QEMU but {pids:?}") };
        kill(Pid::from_raw(pid), Signal::SIGSTOP)?;
        Ok(Self(Pid::from_raw(pid)))
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // One that is gone needs nothing.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_qemu_that_hangs_in_the_pause_resumes_its_guest_when_it_goes_on() {
    play(long_pause("fault-hang", &["pause_budget_s = 1", "retries = 0"]), async |scene, before| {
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        let id = scene.begin_move().await?;
        stopped(&monitor).await?;
        scene.world.wan.cut()?;
        let hung = Hung::hang(&scene.a)?;
        drop(monitor);
        // Longer than the gateway waits for one answer.
        tokio::time::sleep(Duration::from_secs(15)).await;
        let view = scene.a.client().migration(&id).await?;
        ensure!(view.progressing == Progressing::Running, "it is over, and the guest stands still: {view:?}");
        drop(hung);
        scene.world.wan.heal()?;
        expect_stayed(scene, &id).await?;
        scene.wait_for_link().await?;
        stayed(scene, before).await
    })
    .await;
}

/// A small file system of its own over a folder.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: PathBuf, mib: u64) -> Result<Self> {
        let folder_text = folder.to_string_lossy().into_owned();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m"), "longhaul-lab", &folder_text])?;
        Ok(Self(folder))
    }

    /// Nothing fits on it any more.
    fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.0.join("ballast"))?;
        let block = vec![1u8; 1 << 20];
        while file.write_all(&block).is_ok() {}
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(run("umount", &["--lazy", &self.0.to_string_lossy()]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_destination_whose_disk_fills_up_says_so_and_the_guest_stays() {
    let migration = vec!["retries = 0".into()];
    let options = SceneOptions { rate_mbit: 20.0, migration, ..SceneOptions::small("fault-full") };
    play(options, async |scene, before| {
        let disk = SmallDisk::mount(scene.b.folder.join("disks"), 700)?;
        let client = record_client(scene).await?;
        let id = scene.begin_move().await?;
        disk_flows(scene, &id).await?;
        disk.fill()?;
        let reason = expect_stayed(scene, &id).await?;
        ensure!(reason.contains("Not enough space in the pool of site b for disk root"), "{reason}");
        std::fs::remove_file(disk.0.join("ballast"))?;
        stayed(scene, before).await?;
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("running"), "{state:?}");
        connection_was_right(client).await?;
        drop(disk);
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pause_that_was_cut_off_is_tried_again_and_sends_only_what_differs() {
    let options =
        SceneOptions { dirty_disk_kib_per_s: 16, ..long_pause("fault-again", &["pause_budget_s = 1"]) };
    play(options, async |scene, _| {
        let client = record_client(scene).await?;
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        let id = scene.begin_move().await?;
        let first = disk_over_the_wan(scene, &id).await?;
        stopped(&monitor).await?;
        scene.world.wan.cut()?;
        let stopped_at = Instant::now();
        let view = scene.wait_move(&id, MOVE).await?;
        println!("stood still for {:.1?}: {:?}, {:?}", stopped_at.elapsed(), view.reason, view.retry);
        ensure!(view.retry.is_some_and(|retry| (retry.number, retry.of) == (1, 3)), "nothing follows");
        drop(monitor);
        let state = run_state(&scene.a);
        ensure!(state.as_deref() == Some("running"), "{state:?} before the WAN is back");
        scene.world.wan.heal()?;
        let second_id = next_attempt(scene, &id).await?;
        let second = disk_over_the_wan(scene, &second_id).await?;
        println!("disk over the WAN: {first} bytes, then {second} bytes");
        ensure!(first > 10 << 20 && second * 20 < first, "{second} of {first} bytes were sent again");
        let view = scene.wait_move(&second_id, MOVE).await?;
        ensure!(view.progressing == Progressing::Moved && view.follows == Some(id), "{view:?}");
        ensure!(view.disk_kept > 10 << 20, "{} bytes were kept", view.disk_kept);
        let kept = scene.b.client().status().await?.partials;
        ensure!(kept.is_empty(), "still kept: {kept:?}");
        connection_was_right(client).await?;
        tunnel_comes_down(scene).await?;
        runs_at_b(scene, &view).await
    })
    .await;
}

/// Bytes that site a puts on the WAN until its disks are in step.
async fn disk_over_the_wan(scene: &Scene, id: &str) -> Result<u64> {
    let offered = || Ok::<_, anyhow::Error>(scene.world.wan.counters(Direction::ToFar)?.offered.bytes);
    let before = offered()?;
    let in_step = |view: &MigrationView| view.disk.1 > 0 && view.disk.0 == view.disk.1;
    until(scene, id, |view| view.stage == Stage::PreCopy && (view.round >= 1 || in_step(view))).await?;
    Ok(offered()? - before)
}

/// The attempt that follows this one by itself, once it has begun.
async fn next_attempt(scene: &Scene, id: &str) -> Result<String> {
    let deadline = Instant::now() + MOVE;
    loop {
        let view = scene.a.client().migration(id).await?;
        if let Some(next) = view.retry.as_ref().and_then(|retry| retry.id.clone()) {
            return Ok(next);
        }
        ensure!(view.retry.is_some() && Instant::now() < deadline, "Nothing follows: {view:?}");
        tokio::time::sleep(LOOK).await;
    }
}

/// An operator ends it for good while the next attempt still waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_abort_between_two_attempts_is_the_end() {
    let options = long_pause("fault-no-more", &["pause_budget_s = 1", "retry_delay_s = 600"]);
    play(options, async |scene, before| {
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        let id = scene.begin_move().await?;
        stopped(&monitor).await?;
        scene.world.wan.cut()?;
        drop(monitor);
        scene.wait_move(&id, MOVE).await?;
        scene.world.wan.heal()?;
        scene.wait_for_link().await?;
        stayed(scene, before).await?;
        let kept = scene.b.client().status().await?.partials;
        ensure!(kept.len() == 1 && kept[0].bytes > 10 << 20, "kept: {kept:?}");
        scene.a.client().abort(&id).await?;
        let deadline = Instant::now() + TIDY;
        while let Some(retry) = scene.a.client().migration(&id).await?.retry {
            ensure!(Instant::now() < deadline, "{retry:?} still follows");
            tokio::time::sleep(LOOK).await;
        }
        scene.b.client().discard(&VM.parse()?).await?;
        ensure!(scene.b.client().status().await?.partials.is_empty(), "they were to be thrown away");
        Ok(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_source_gateway_killed_in_the_pause_leaves_its_host_as_it_was() {
    play(long_pause("fault-pause-kill-a", &["pause_budget_s = 20"]), async |scene, before| {
        let client = record_client(scene).await?;
        let monitor = Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?;
        let id = scene.begin_move().await?;
        stopped(&monitor).await?;
        // With the WAN cut the pause lasts until the gateway is gone.
        scene.world.wan.cut()?;
        scene.a.kill()?;
        drop(monitor);
        let state = run_state(&scene.a);
        ensure!(state.as_deref() != Some("running"), "{state:?}: it was not killed in the pause");
        scene.world.wan.heal()?;
        scene.a.launch().await?;
        scene.wait_for_link().await?;
        expect_stayed(scene, &id).await?;
        stayed(scene, before).await?;
        let partials = scene.b.client().status().await?.partials;
        ensure!(!partials.is_empty(), "nothing is kept for the next attempt");
        moves_with(scene, client).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_minute_without_wan_and_a_reboot_in_pre_copy_delay_the_move_only() {
    let options = SceneOptions { dirty_disk_kib_per_s: 1024, ..SceneOptions::small("fault-minute") };
    play(options, async |scene, _| {
        let questions = Questioner::start(Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?);
        let id = scene.begin_move().await?;
        disk_flows(scene, &id).await?;
        scene.world.wan.cut()?;
        let cut = Instant::now();
        tokio::time::sleep(Duration::from_secs(20)).await;
        questions.reset.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(40)).await;
        let healed = Instant::now();
        scene.world.wan.heal()?;
        let view = scene.wait_move(&id, MOVE).await?;
        ensure!(view.progressing == Progressing::Moved, "{view:?}");
        let (answers, late) = questions.finish();
        let in_cut: Vec<&Answer> =
            answers.iter().filter(|answer| (cut..healed).contains(&answer.asked)).collect();
        let (in_cut, asked_in_cut) = (slowest(in_cut.iter().copied()), in_cut.len());
        let ever = slowest(answers.iter());
        println!(
            "slowest answer {in_cut:.1?} of {asked_in_cut} in the cut, {ever:.1?} ever, late by {late:.1?}"
        );
        ensure!(asked_in_cut > 1000, "QEMU answered only {asked_in_cut} times during the cut");
        ensure!(in_cut < Duration::from_millis(100) + late, "QEMU took {in_cut:?}, late by {late:?}");
        // When memory begins to move, QEMU itself keeps its lock for about 0.1 s (7.2, TCG, 128 MiB).
        ensure!(ever < Duration::from_secs(1) + late, "QEMU took {ever:?}, late by {late:?}");
        runs_at_b(scene, &view).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cut_beyond_its_limit_ends_the_attempt_at_both_sites_while_neither_hears_the_other() {
    let migration = vec!["retries = 0".into(), "cut_limit_s = 3".into()];
    let options = SceneOptions { migration, ..SceneOptions::small("fault-limit") };
    play(options, async |scene, before| {
        let client = record_client(scene).await?;
        let id = scene.begin_move().await?;
        memory_flows(scene, &id).await?;
        scene.world.wan.cut()?;
        let cut = Instant::now();
        let reason = expect_stayed(scene, &id).await?;
        ensure!(reason.contains("down too long"), "{reason}");
        println!("the source gave up {:.1?} after the cut", cut.elapsed());
        // What the destination waits longer, so that it is never the first; and room for a busy machine.
        let deadline = cut + Duration::from_secs(3 + 60) + MOVE;
        while !qemus(&scene.b).is_empty() {
            ensure!(Instant::now() < deadline, "Site b waits for ever");
            tokio::time::sleep(LOOK).await;
        }
        println!("the destination gave up {:.1?} after the cut", cut.elapsed());
        ensure!(cut.elapsed() > Duration::from_secs(60), "it did not wait for the source to be the first");
        scene.world.wan.heal()?;
        scene.wait_for_link().await?;
        stayed(scene, before).await?;
        moves_with(scene, client).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_waiting_qemu_killed_in_pre_copy_is_refused_by_name() {
    play(SceneOptions::small("fault-kill-qemu"), async |scene, before| {
        let client = record_client(scene).await?;
        let id = scene.begin_move().await?;
        memory_flows(scene, &id).await?;
        kill_qemu(&scene.b)?;
        let reason = expect_stayed(scene, &id).await?;
        ensure!(reason.contains("QEMU"), "{reason}");
        stayed(scene, before).await?;
        moves_with(scene, client).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_promise_holds_in_a_bounded_part_of_the_fault_matrix() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    let _turn = TURN.lock().await;
    let programs = Programs::build().unwrap();
    let options = FaultOptions {
        cases: 0,
        seed: 1,
        only: BOUNDED.to_vec(),
        setting: Setting::default(),
        limit: Some(MATRIX),
    };
    let report = faults::run(&options, &programs).await.unwrap();
    assert!(report.failed.is_empty() && report.leftovers == 0, "{:#?}", report.failed);
    assert_eq!(report.held, BOUNDED.len() as u64, "not all of them were played in time");
    let setting = Setting { leg: Leg::Home, ..Setting::default() };
    let options = FaultOptions { only: BOUNDED_HOME.to_vec(), setting, ..options };
    let report = faults::run(&options, &programs).await.unwrap();
    assert!(report.failed.is_empty() && report.leftovers == 0, "{:#?}", report.failed);
    assert_eq!(report.held, BOUNDED_HOME.len() as u64, "not all of them were played in time");
}
