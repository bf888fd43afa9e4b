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
use crate::scenario::gateway::PORT;
use crate::scenario::traces::{kill_qemu, qemus};
use crate::wan::WanProfile;

/// A whole move, on a busy machine.
const MOVE: Duration = Duration::from_secs(180);
/// The shortest stage lasts tens of milliseconds.
const LOOK: Duration = Duration::from_millis(3);
const BOOTING: Duration = Duration::from_millis(300);
/// A share of packets.
const LOSS: f64 = 0.05;
/// So many packets in a thousand are damaged on the way.
const DAMAGED: u32 = 20;

/// Where the move was when the fault struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Spot {
    /// In this stage.
    Stage(Stage),
    /// The machine had moved.
    After,
}

/// What a narrow WAN carries, in Mbit/s.
const NARROW_MBIT: f64 = 5.0;

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
        Moment::Stage(Stage::Activation, delay) => return activation(arena, id, delay).await,
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

/// The last stage begins where the machine goes, and the site that it left knows only when it is over.
async fn activation(arena: &Arena, id: &str, delay: Duration) -> Result<Spot> {
    let deadline = Instant::now() + MOVE;
    let here = arena.gateway(Place::A).client();
    loop {
        // It does not know the move before it has agreed to it.
        let there = arena.gateway(Place::B).client().migration(id).await.ok();
        if there.is_some_and(|view| view.stage == Stage::Activation) {
            break;
        }
        let view = here.migration(id).await?;
        if Spot::of(&view)? == Spot::After {
            return Ok(Spot::After);
        }
        if Instant::now() > deadline {
            bail!("The move does not get on: {view:?}");
        }
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(delay).await;
    let spot = Spot::of(&here.migration(id).await?)?;
    Ok(if spot == Spot::After { Spot::After } else { Spot::Stage(Stage::Activation) })
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
        Fault::Host(place) => {
            arena.gateway_mut(place).kill()?;
            if !qemus(arena.gateway(place)).is_empty() {
                kill_qemu(arena.gateway(place))?;
            }
            tokio::time::sleep(case.lasts).await;
            arena.gateway_mut(place).launch().await?;
        }
        Fault::Cut(way, _) => {
            arena.cut(way)?;
            tokio::time::sleep(case.lasts).await;
            arena.heal()?;
        }
        Fault::Loss | Fault::Narrow | Fault::Mangle => {
            let spoilt = spoilt(arena, case);
            arena.scene.world.wan.set_profile(&spoilt)?;
            if case.fault == Fault::Mangle {
                arena.scene.world.damage(PORT, DAMAGED)?;
            }
            tokio::time::sleep(case.lasts).await;
            arena.scene.world.damage(PORT, 0)?;
            arena.wan(rtt(arena, case), 0.0)?;
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

/// The WAN that a case's fault makes.
fn spoilt(arena: &Arena, case: &Case) -> WanProfile {
    let rtt = rtt(arena, case);
    let profile = |rate_mbit, loss| WanProfile::symmetric(rate_mbit, rtt, loss);
    let whole = arena.scene.options.rate_mbit;
    match case.fault {
        Fault::Loss => profile(whole, LOSS),
        Fault::Narrow => profile(NARROW_MBIT, 0.0),
        Fault::Mangle => {
            let mut mangled = profile(whole, 0.0);
            for path in [&mut mangled.to_far, &mut mangled.to_near] {
                (path.reorder, path.duplicate) = (0.05, 0.02);
            }
            mangled
        }
        Fault::Gateway(_)
        | Fault::Qemu(_)
        | Fault::Cut(..)
        | Fault::Names
        | Fault::OldJournal(_)
        | Fault::Hang(_)
        | Fault::Stall(_)
        | Fault::Reboot
        | Fault::PowerOff
        | Fault::Host(_) => profile(whole, 0.0),
    }
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
