//! Judges a case from outside, after everything is whole again and at rest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use longhaul_core::ids::VmName;
use serde_json::json;

use super::arena::Arena;
use super::confirm::Confirmed;
use super::flaw::Flaw;
use super::plan::Place;
use super::setting::Leg;
use crate::agent::control::AgentStatus;
use crate::agent::dirt::DirtVerdict;
use crate::agent::log::LogVerdict;
use crate::agent::memory::MemoryVerdict;
use crate::guest::verify;
use crate::scenario::disk_check;
use crate::scenario::monitor::Monitor;
use crate::scenario::scene::VM;
use crate::scenario::traffic::Client;

/// A guest boots and answers within this, on a busy machine.
const BOOT: Duration = Duration::from_secs(180);
/// The tunnel ends within this once nobody needs it: a connection of which one end's last word was missed is given up
/// after four minutes, and until then the client's kernel repeats its own for up to two.
const TUNNEL: Duration = Duration::from_secs(400);

/// The sites that would run the machine if they were asked.
pub async fn owners(arena: &Arena) -> Result<Vec<Place>> {
    let vm: VmName = VM.parse()?;
    let mut owners = Vec::new();
    for place in Place::BOTH {
        if arena.gateway(place).client().may_run(&vm).await.is_ok() {
            owners.push(place);
        }
    }
    Ok(owners)
}

/// Lets the old connection end; every record must have come once.
pub async fn old_connection(mut client: Client) -> Result<(), Flaw> {
    let ended = async {
        client.close_old().await?;
        let record = client.finish().await?.record.context("There is no record connection")?;
        ensure!(record.content_ok && record.error.is_none(), "{record:?}");
        Ok(())
    };
    ended.await.map_err(|error: anyhow::Error| Flaw::Connection(format!("{error:#}")))
}

/// Starts a machine that stands still at its owner, as an operator would, and waits until it serves.
pub async fn start(arena: &Arena, place: Place) -> Result<(), Flaw> {
    let started = async {
        arena.gateway(place).client().start(&VM.parse()?).await?;
        answers(arena, place).await
    };
    started.await.map_err(|error: anyhow::Error| Flaw::LostMachine(format!("{error:#}")))
}

/// Waits until the machine answers where it is.
pub async fn answers(arena: &Arena, place: Place) -> Result<()> {
    let deadline = Instant::now() + BOOT;
    let address = arena.address(place).await?;
    while let Err(error) = arena.ask::<AgentStatus>(address, "/status").await {
        if Instant::now() > deadline {
            bail!("It runs at site {} and does not answer: {error:#}", arena.setting.site(place));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// A machine whose guest has powered itself off is no crashed one: its owner says that it is stopped.
pub async fn not_switched_off(arena: &Arena, owner: Place) -> Option<Flaw> {
    match arena.machine(owner).await {
        Ok(Some(machine)) if machine.state == "stopped" => None,
        Ok(found) => Some(Flaw::Unsettled(format!(
            "its guest is off, and site {} says {found:?}",
            arena.setting.site(owner)
        ))),
        Err(error) => Some(Flaw::NotJudged(format!("{error:#}"))),
    }
}

/// Asks the running guest for its log, its blocks and its pages. `booted` if it was started anew.
pub async fn content(arena: &Arena, place: Place, confirmed: &Confirmed, booted: bool) -> Vec<Flaw> {
    let mut flaws = Vec::new();
    match asked(arena, place).await {
        Ok((status, wrong)) => {
            if status.log_last < confirmed.log_last {
                let (last, told) = (status.log_last, confirmed.log_last);
                flaws.push(Flaw::LostWrites(format!("the log ends at {last}, a client was told {told}")));
            }
            if !booted && !confirmed.boot_id.is_empty() && status.boot_id != confirmed.boot_id {
                flaws.push(Flaw::Content("the guest has booted meanwhile".into()));
            }
            flaws.extend(wrong.map(Flaw::Content));
        }
        Err(error) => flaws.push(Flaw::Connection(format!("the guest does not answer: {error:#}"))),
    }
    flaws
}

async fn asked(arena: &Arena, place: Place) -> Result<(AgentStatus, Option<String>)> {
    let address = arena.address(place).await?;
    let status: AgentStatus = arena.ask(address, "/status").await?;
    let log: LogVerdict = arena.ask(address, "/log/verify").await?;
    let blocks: DirtVerdict = arena.ask(address, "/disk/verify").await?;
    let pages: MemoryVerdict = arena.ask(address, "/memory/verify").await?;
    let sound = log.sound() && blocks.sound() && pages.mismatched == 0 && status.errors.is_empty();
    let detail = format!("{log:?}, {blocks:?}, {pages:?}, errors {:?}", status.errors);
    Ok((status, (!sound).then_some(detail)))
}

/// Checks the disk of the machine that runs where it was; it stands still for as long as that takes.
pub async fn disk_at_a(arena: &Arena, confirmed: &Confirmed) -> Result<(), Flaw> {
    let checked = async {
        let mut monitor = Monitor::connect(&arena.gateway(Place::A).observer(VM), Duration::from_secs(5))?;
        monitor.ask("stop", json!({}))?;
        let image = arena.image(Place::A)?;
        let work = tempfile::tempdir_in(arena.scene.world.lab.scratch())?;
        let verdict = verify::root_disk(&image, work.path());
        monitor.ask("cont", json!({}))?;
        let (verdict, _) = verdict?;
        Ok::<_, anyhow::Error>(verdict)
    };
    let verdict = checked.await.map_err(|error| Flaw::NotJudged(format!("the disk at a: {error:#}")))?;
    if !verdict.sound() {
        return Err(Flaw::Content(format!("the disk at a: {verdict:?}")));
    }
    expect_confirmed(verdict.log.last, confirmed)
}

/// Stops the machine where it went and checks its disk, against the source's if it was not booted since and the machine
/// is away from home.
pub async fn disk_at_b(arena: &Arena, id: &str, confirmed: &Confirmed, booted: bool) -> Result<(), Flaw> {
    let alone = booted || arena.setting.leg == Leg::Home;
    let judged = if alone { stopped_disk(arena).await } else { moved_disk(arena, id).await };
    match judged.map_err(|error| Flaw::NotJudged(format!("the disk at b: {error:#}")))? {
        (last, None) => expect_confirmed(last, confirmed),
        (_, Some(wrong)) => Err(Flaw::Content(format!("the disk at b: {wrong}"))),
    }
}

/// Number of the last record, and what is wrong.
async fn moved_disk(arena: &Arena, id: &str) -> Result<(u64, Option<String>)> {
    let epoch = arena.machine(Place::B).await?.context("Site b does not list the machine")?.epoch;
    let mut monitor = Monitor::connect(&arena.scene.b.observer(VM), Duration::from_secs(5))?;
    let found = disk_check::compare(&arena.scene, &mut monitor, id, epoch).await?;
    let sound = found.mismatched == 0 && found.compared > 0 && found.sound;
    Ok((found.last_record, (!sound).then(|| format!("{found:?}"))))
}

async fn stopped_disk(arena: &Arena) -> Result<(u64, Option<String>)> {
    arena.gateway(Place::B).client().stop(&VM.parse()?).await?;
    let image = arena.image(Place::B)?;
    let work = tempfile::tempdir_in(arena.scene.world.lab.scratch())?;
    let (verdict, _) = verify::root_disk(&image, work.path())?;
    let wrong = (!verdict.sound()).then(|| format!("{verdict:?}"));
    Ok((verdict.log.last, wrong))
}

fn expect_confirmed(last: u64, confirmed: &Confirmed) -> Result<(), Flaw> {
    if last >= confirmed.log_last {
        return Ok(());
    }
    let told = confirmed.log_last;
    Err(Flaw::LostWrites(format!("the log on the disk ends at {last}, a client was told {told}")))
}

/// The tunnel comes down by itself when old connections have ended.
pub async fn tunnel_comes_down(arena: &Arena) -> Result<(), Flaw> {
    let deadline = Instant::now() + TUNNEL;
    loop {
        let status = arena.gateway(Place::A).client().status().await;
        let anchors = status.map_err(|error| Flaw::Unsettled(error.to_string()))?.anchors;
        if anchors.iter().all(|anchor| anchor.closed_ms.is_some()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let vm: VmName = VM.parse().map_err(|error| Flaw::NotJudged(format!("{error}")))?;
            let flows = arena.gateway(Place::A).client().flows(&vm).await;
            return Err(Flaw::LeftBehind(format!("the tunnel stays up: {anchors:?}, for {flows:?}")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
