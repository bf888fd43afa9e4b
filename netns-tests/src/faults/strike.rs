//! Waits for a case's moment, lets its fault happen, and makes everything whole again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gateway::api::types::{MigrationView, Progressing};
use longhaul_core::migration::Stage;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::arena::Arena;
use super::plan::{Case, Fault, Moment, Place};
use crate::agent::control::AgentStatus;
use crate::scenario::Scene;
use crate::scenario::traces::{kill_qemu, qemus};

/// A whole move, on a busy machine.
const MOVE: Duration = Duration::from_secs(180);
/// The shortest stage lasts tens of milliseconds.
const LOOK: Duration = Duration::from_millis(3);
const BOOTING: Duration = Duration::from_millis(300);
/// A share of packets.
const LOSS: f64 = 0.05;

/// Where the move was when the fault struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Spot {
    /// In this stage.
    Stage(Stage),
    /// The machine had moved.
    After,
}

impl Spot {
    /// The name in reports.
    pub fn name(self) -> String {
        match self {
            Self::Stage(stage) => stage.number().to_string(),
            Self::After => "after".to_owned(),
        }
    }

    fn of(view: &MigrationView) -> Result<Self> {
        match view.progressing {
            Progressing::Running => Ok(Self::Stage(view.stage)),
            Progressing::Moved => Ok(Self::After),
            Progressing::Stayed => bail!("The machine stayed before anything went wrong: {:?}", view.reason),
        }
    }
}

/// Waits until the case's moment has come.
pub async fn moment(arena: &Arena, case: &Case, id: &str) -> Result<Spot> {
    let delay = match case.moment {
        Moment::Stage(stage, delay) => {
            reach(arena, id, |spot| spot >= Spot::Stage(stage)).await?;
            delay
        }
        Moment::After(delay) => {
            reach(arena, id, |spot| spot == Spot::After).await?;
            delay
        }
        Moment::Random(delay) => delay,
    };
    tokio::time::sleep(delay).await;
    if matches!(case.fault, Fault::Qemu(Place::B) | Fault::Hang(Place::B)) {
        reach(arena, id, |spot| !qemus(arena.gateway(Place::B)).is_empty() || spot == Spot::After).await?;
    }
    Spot::of(&arena.gateway(Place::A).client().migration(id).await?)
}

async fn reach(arena: &Arena, id: &str, there: impl Fn(Spot) -> bool) -> Result<()> {
    let deadline = Instant::now() + MOVE;
    loop {
        let view = arena.gateway(Place::A).client().migration(id).await?;
        if there(Spot::of(&view)?) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("The move does not get on: {view:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Lets the fault happen and heals it. False if there was nothing that it could strike.
pub async fn strike(arena: &mut Arena, case: &Case) -> Result<bool> {
    match case.fault {
        Fault::Gateway(place) => {
            arena.gateway_mut(place).kill()?;
            tokio::time::sleep(case.lasts).await;
            arena.gateway_mut(place).launch().await?;
        }
        Fault::Qemu(place) => {
            if qemus(arena.gateway(place)).is_empty() {
                return Ok(false);
            }
            kill_qemu(arena.gateway(place))?;
        }
        Fault::Cut(way, _) => {
            arena.cut(way)?;
            tokio::time::sleep(case.lasts).await;
            arena.heal()?;
        }
        Fault::Loss => {
            let rtt = rtt(arena, case);
            arena.wan(rtt, LOSS)?;
            tokio::time::sleep(case.lasts).await;
            arena.wan(rtt, 0.0)?;
        }
        Fault::Names => {
            let said = arena.scene.names.read(&Scene::name())?;
            arena.scene.names.stop()?;
            tokio::time::sleep(case.lasts).await;
            arena.scene.names.start_again(&Scene::name(), &said)?;
        }
        Fault::OldJournal(place) => {
            let old = arena.old_journal(place);
            let gateway = arena.gateway_mut(place);
            gateway.kill()?;
            tokio::time::sleep(case.lasts).await;
            std::fs::copy(old, gateway.journal()).context("The old journal")?;
            gateway.launch().await?;
        }
        Fault::Hang(place) => return hang(arena, place, case.lasts).await,
        Fault::Stall(place) => {
            arena.gateway(place).signal(Signal::SIGSTOP)?;
            tokio::time::sleep(case.lasts).await;
            arena.gateway(place).signal(Signal::SIGCONT)?;
        }
        Fault::Reboot => return reboot(arena).await,
        // Who is asked in the pause answers after it.
        Fault::PowerOff => {
            return Ok(arena.ask::<String>(arena.address(Place::A).await?, "/poweroff").await.is_ok());
        }
    }
    Ok(true)
}

async fn hang(arena: &Arena, place: Place, lasts: Duration) -> Result<bool> {
    let [pid] = qemus(arena.gateway(place))[..] else { return Ok(false) };
    // One that ends at this moment cannot be struck.
    if kill(Pid::from_raw(pid), Signal::SIGSTOP).is_err() {
        return Ok(false);
    }
    tokio::time::sleep(lasts).await;
    // One that was killed meanwhile needs nothing.
    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    Ok(true)
}

/// Lets the guest boot again where it is, and waits until it has. The watchers have the monitors; the guest's own
/// kernel is asked.
async fn reboot(arena: &Arena) -> Result<bool> {
    let asked = Instant::now();
    let address = arena.address(Place::A).await?;
    if arena.ask::<String>(address, "/reboot").await.is_err() {
        return Ok(false);
    }
    while asked.elapsed() < MOVE {
        for place in Place::BOTH {
            let Ok(address) = arena.address(place).await else { continue };
            let status = arena.ask::<AgentStatus>(address, "/status").await;
            if status.is_ok_and(|status| Duration::from_millis(status.uptime_ms) < asked.elapsed()) {
                return Ok(true);
            }
        }
        tokio::time::sleep(BOOTING).await;
    }
    bail!("The guest does not boot again")
}

/// The round trip of a case: long where it is what a stage lasts.
pub fn rtt(arena: &Arena, case: &Case) -> Duration {
    match case.moment {
        Moment::Stage(
            Stage::PreMigration | Stage::Reservation | Stage::Commitment | Stage::Activation,
            _,
        ) => Duration::from_millis(150),
        Moment::Stage(Stage::PreCopy | Stage::StopAndCopy, _) | Moment::After(_) | Moment::Random(_) => {
            arena.scene.options.rtt
        }
    }
}
