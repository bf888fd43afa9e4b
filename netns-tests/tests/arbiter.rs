//! A partition on real machines, decided by Debian's BIND or by etcd: the link between the gateways is cut in the
//! middle of a hand-over while both sites still reach the register. Exactly one copy runs, before the link is back.
//! Without root, or without BIND and etcd, the tests are skipped.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gateway::api::types::Progressing;
use gateway::config::ArbiterChoice;
use longhaul_core::migration::Stage;
use netns_tests::install::{LAB_NEEDS, ensure as install};
use netns_tests::netns::Namespace;
use netns_tests::scenario::disk_check;
use netns_tests::scenario::gateway::{Gateway, PORT};
use netns_tests::scenario::monitor::Monitor;
use netns_tests::scenario::options::DnsServer;
use netns_tests::scenario::programs::Programs;
use netns_tests::scenario::scene::VM;
use netns_tests::scenario::{Scene, SceneOptions};

/// A whole move of a small guest, with room for a busy machine.
const MOVE: Duration = Duration::from_secs(240);
/// Somebody runs this long after a cut: the pause budget, a question, and room for a busy machine.
const DECIDED: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);

fn options(arbiter: ArbiterChoice) -> SceneOptions {
    SceneOptions {
        // Long enough that what was just said is still under way when the link is cut.
        rtt: Duration::from_millis(400),
        dns: DnsServer::Bind9,
        ttl_s: 5,
        arbiter,
        ..SceneOptions::small(format!("arbiter-{arbiter:?}").to_lowercase())
    }
}

/// The gateways do not hear each other any more; everybody else is heard.
struct Partition<'a>([&'a Namespace; 2]);

impl<'a> Partition<'a> {
    /// Cuts `first` off before the other one: what is under way to it is lost.
    fn begin(scene: &'a Scene, first: &str) -> Result<Self> {
        let (a, b) = (&scene.world.site("a")?.host, &scene.world.site("b")?.host);
        let hosts = if first == "a" { [a, b] } else { [b, a] };
        for host in hosts {
            host.nft(&format!(
                "table inet partition {{\n chain in {{ type filter hook input priority -300; udp dport {PORT} drop; }}\n}}\n"
            ))?;
        }
        Ok(Self(hosts))
    }

    fn end(self) -> Result<()> {
        for host in self.0 {
            host.nft("delete table inet partition\n")?;
        }
        Ok(())
    }
}

fn run_state(gateway: &Gateway) -> Option<String> {
    Monitor::connect(&gateway.observer(VM), Duration::ZERO).ok()?.state().ok()
}

fn runs(gateway: &Gateway) -> bool {
    run_state(gateway).as_deref() == Some("running")
}

async fn wait(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    while !holds().await? {
        ensure!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
    Ok(begun.elapsed())
}

/// What the register says: epoch and owner.
fn register(scene: &Scene) -> Result<(u64, String)> {
    let held = match &scene.etcd {
        Some(etcd) => etcd.read(VM)?,
        None => scene.names.read(&Scene::name())?.ownership().cloned(),
    };
    let held = held.context("the register is empty")?;
    Ok((held.epoch().0, held.owner().to_owned()))
}

fn addresses(scene: &Scene) -> Result<Vec<IpAddr>> {
    Ok(scene.names.read(&Scene::name())?.addresses)
}

/// The offer is lost: the source takes the machine back at the register and resumes it.
async fn the_source_wins(scene: &Scene) -> Result<()> {
    let id = scene.begin_move().await?;
    wait("the offer", MOVE, async || Ok(scene.a.client().migration(&id).await?.stage == Stage::Commitment))
        .await?;
    let partition = Partition::begin(scene, "b")?;
    let took = wait("the guest running at a", DECIDED, async || Ok(runs(&scene.a))).await?;
    println!("a runs again {took:.1?} after the cut");
    ensure!(!runs(&scene.b), "two copies run");
    let view = scene.wait_move(&id, DECIDED).await?;
    ensure!(view.progressing == Progressing::Stayed, "{view:?}");
    let home: IpAddr = scene.home()?;
    ensure!(register(scene)? == (1, "a".to_owned()), "{:?}", register(scene)?);
    ensure!(addresses(scene)? == [home], "{:?}", addresses(scene)?);
    // b learns it from the register, too: it frees what it held.
    let took = wait("b to let go", DECIDED, async || Ok(run_state(&scene.b).is_none())).await?;
    println!("b let go {took:.1?} later");
    partition.end()?;
    scene.wait_for_link().await
}

/// The destination has won and runs; the source never hears of it, and reads it in the register.
async fn the_destination_wins(scene: &Scene) -> Result<()> {
    let id = scene.begin_move().await?;
    wait("the guest running at b", MOVE, async || Ok(runs(&scene.b))).await?;
    let partition = Partition::begin(scene, "a")?;
    ensure!(!runs(&scene.a), "two copies run");
    let stage = scene.a.client().migration(&id).await?.stage;
    let care_of: IpAddr = scene.world.site("b")?.spec.address(200).into();
    ensure!(register(scene)? == (2, "b".to_owned()), "{:?}", register(scene)?);
    // The name is in the update that decides; with etcd it follows when the sites hear each other again.
    let at_once = match scene.options.arbiter {
        ArbiterChoice::None | ArbiterChoice::Etcd => scene.home()?,
        ArbiterChoice::Dns => care_of,
    };
    ensure!(addresses(scene)? == [at_once], "{:?}", addresses(scene)?);
    println!("a was in {stage:?} when b ran");
    let away = async || {
        let machines = scene.a.client().status().await?.machines;
        Ok(machines.iter().all(|machine| machine.owner == "away"))
    };
    let took = wait("a to know that the machine is away", DECIDED, away).await?;
    println!("a knew {took:.1?} after the cut");
    ensure!(!runs(&scene.a) && runs(&scene.b), "a: {:?}, b: {:?}", run_state(&scene.a), run_state(&scene.b));
    partition.end()?;
    let view = scene.wait_move(&id, MOVE).await?;
    ensure!(view.progressing == Progressing::Moved, "{view:?}");
    wait("the name at b", DECIDED, async || Ok(addresses(scene)? == [care_of])).await?;
    wait("a to end its copy", DECIDED, async || Ok(run_state(&scene.a).is_none())).await?;
    // Until b has heard that a released the machine, nothing else may be done with it.
    let settled = async || Ok(scene.b.client().migration(&id).await?.progressing == Progressing::Moved);
    wait("b to be done with the move", DECIDED, settled).await?;
    let mut monitor = Monitor::connect(&scene.b.observer(VM), Duration::from_secs(5))?;
    let found = disk_check::compare(scene, &mut monitor, &id, 2).await?;
    println!("disk: {found:?}");
    ensure!(found.mismatched == 0 && found.compared > 0 && found.sound, "{found:?}");
    Ok(())
}

/// The register answers nobody when the machine is handed over, and the sites hear each other: the source promises it,
/// and what came is a machine like any other while the register still names the source.
async fn the_register_is_away(scene: &mut Scene) -> Result<()> {
    let (vm, monitor) = (VM.parse()?, Monitor::connect(&scene.a.observer(VM), Duration::from_secs(5))?);
    let id = scene.begin_move().await?;
    let stopped = || monitor.events().iter().any(|event| event.name == "STOP");
    wait("the pause", MOVE, async || Ok(stopped())).await?;
    let said = scene.names.read(&Scene::name())?;
    scene.names.stop()?;
    let took = wait("the guest running at b", MOVE, async || Ok(runs(&scene.b))).await?;
    println!("b ran {took:.1?} after the guest was stopped, without the register");
    drop(monitor);
    wait("a to end its copy", DECIDED, async || Ok(run_state(&scene.a).is_none())).await?;
    let at_b = scene.b.client();
    let listed = async || {
        let machines = at_b.status().await?.machines;
        Ok(machines.iter().any(|machine| machine.owner == "here" && machine.state == "running"))
    };
    wait("b to list what runs there", DECIDED, listed).await?;
    let refused =
        scene.begin_move_between("b", "a").await.err().context("It moves on by a silent register")?;
    ensure!(format!("{refused:#}").contains("register"), "{refused:#}");
    at_b.stop(&vm).await.context("b does not stop it")?;
    at_b.start(&vm).await.context("b does not start it again")?;
    scene.names.start_again(&Scene::name(), &said)?;
    let care_of: IpAddr = scene.world.site("b")?.spec.address(200).into();
    let paid = async || Ok(register(scene)?.1 == "b" && addresses(scene)? == [care_of]);
    wait("the register and the name at b", DECIDED, paid).await?;
    let view = scene.wait_move(&id, DECIDED).await?;
    ensure!(view.progressing == Progressing::Moved, "{view:?}");
    Ok(())
}

/// The zone is put back to what it was before the machine was ever given away: nothing is decided by that, and the guest
/// runs on.
async fn the_zone_is_put_back(scene: &mut Scene) -> Result<()> {
    let said = scene.names.read(&Scene::name())?;
    let home = scene.home()?;
    scene.names.start_anew(&Scene::name(), home, 5)?;
    let id = scene.begin_move().await?;
    let view = scene.wait_move(&id, DECIDED).await?;
    println!("the zone was put back: {:?}", view.reason);
    ensure!(view.progressing == Progressing::Stayed && view.stage == Stage::PreMigration, "{view:?}");
    ensure!(view.reason.as_deref().is_some_and(|why| why.contains("an older state")), "{view:?}");
    ensure!(runs(&scene.a), "a register that was put back stops a guest");
    scene.names.stop()?;
    scene.names.start_again(&Scene::name(), &said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_partition_in_the_hand_over_is_decided_at_the_name_server_at_either_side() {
    let both = async |scene: &mut Scene| {
        the_source_wins(scene).await.context("the source wins")?;
        the_zone_is_put_back(scene).await.context("the zone is put back")?;
        the_destination_wins(scene).await.context("the destination wins")
    };
    play(ArbiterChoice::Dns, both).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_partition_in_the_hand_over_is_decided_in_etcd_at_either_side() {
    let both = async |scene: &mut Scene| {
        the_source_wins(scene).await.context("the source wins")?;
        the_destination_wins(scene).await.context("the destination wins")
    };
    play(ArbiterChoice::Etcd, both).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_name_server_that_is_away_at_the_hand_over_neither_stops_it_nor_hides_the_machine() {
    play(ArbiterChoice::Dns, the_register_is_away).await.unwrap();
}

async fn play(arbiter: ArbiterChoice, act: impl AsyncFnOnce(&mut Scene) -> Result<()>) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return Ok(());
    }
    if let Err(error) = install(LAB_NEEDS) {
        println!("skipped: {error:#}");
        return Ok(());
    }
    let programs = Programs::build()?;
    let mut scene = Scene::build(options(arbiter), &programs).await?;
    let played = async {
        scene.start_guest().await?;
        act(&mut scene).await
    };
    let played = played.await;
    let logs = (scene.a.log_tail(), scene.b.log_tail());
    let left = scene.close();
    played.with_context(|| format!("site a's last words:\n{}\nsite b's last words:\n{}", logs.0, logs.1))?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}
