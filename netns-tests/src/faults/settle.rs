//! Waits, after everything is whole again, until it is clear where the machine is.

use std::time::{Duration, Instant};

use gateway::api::types::{Progressing, StatusView};

use super::arena::Arena;
use super::plan::{Fault, Place};
use super::watch::Watcher;
use crate::scenario::scene::VM;
use crate::scenario::traces::qemus;

/// Everything must have come to rest by then: the longest wait of a gateway is half of it.
const LIMIT: Duration = Duration::from_secs(150);
/// A machine that stands still this long, with nothing going on, stands still for good.
const STILL: Duration = Duration::from_secs(5);
/// What an old journal leaves behind may wait for ever; this long it is given.
const HELD: Duration = Duration::from_secs(20);
/// A guest that was told to power off has done so.
const GOES_OFF: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// Where the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// It runs here, and nowhere is another QEMU of it.
    Runs(Place),
    /// It runs here; something of it is at the other site, for good.
    RunsBeside(Place),
    /// It runs nowhere.
    Still,
}

/// Waits for rest; if there is none, says what it looks like.
pub async fn settle(arena: &Arena, watchers: &[Watcher; 2], fault: Fault) -> Result<Rest, String> {
    let (deadline, old_journal) = (Instant::now() + LIMIT, matches!(fault, Fault::OldJournal(_)));
    let mut since = (Instant::now(), None);
    loop {
        let now = look(arena, watchers).await;
        let rest = now.as_ref().ok().and_then(|seen| seen.rest);
        if since.1 != rest {
            since = (Instant::now(), rest);
        }
        let quiet = now.as_ref().is_ok_and(|seen| !seen.moving);
        let (enough, anyway) = match rest {
            // It says that it will go off, and takes its time.
            Some(Rest::Runs(_)) if fault == Fault::PowerOff => (GOES_OFF, false),
            Some(Rest::Runs(_)) => (Duration::ZERO, false),
            Some(Rest::RunsBeside(_)) => (HELD, old_journal),
            Some(Rest::Still) => (STILL, true),
            None => (Duration::MAX, false),
        };
        let held = old_journal && since.0.elapsed() > HELD;
        let right = matches!(rest, Some(Rest::Runs(_))) || anyway;
        if let Some(rest) = rest
            && right
            && (quiet && since.0.elapsed() >= enough || held)
        {
            return Ok(rest);
        }
        if Instant::now() > deadline {
            return Err(match now {
                Ok(seen) => seen.detail,
                Err(error) => error,
            });
        }
        tokio::time::sleep(LOOK).await;
    }
}

struct Seen {
    rest: Option<Rest>,
    moving: bool,
    detail: String,
}

async fn look(arena: &Arena, watchers: &[Watcher; 2]) -> Result<Seen, String> {
    let mut statuses = Vec::new();
    for place in Place::BOTH {
        let asked = arena.gateway(place).client().status().await;
        statuses.push(asked.map_err(|error| format!("gateway {}: {error}", arena.setting.site(place)))?);
    }
    let states = [watchers[0].state(), watchers[1].state()];
    let there = Place::BOTH.map(|place| !qemus(arena.gateway(place)).is_empty());
    // What a watcher saw last may be older than the death of a QEMU.
    let runs = [0, 1].map(|at| there[at] && states[at].as_deref() == Some("running"));
    let rest = match runs {
        [true, true] => None,
        [true, false] if there[1] => Some(Rest::RunsBeside(Place::A)),
        [false, true] if there[0] => Some(Rest::RunsBeside(Place::B)),
        [true, false] => Some(Rest::Runs(Place::A)),
        [false, true] => Some(Rest::Runs(Place::B)),
        [false, false] => Some(Rest::Still),
    };
    let up = |status: &StatusView| status.peers.iter().all(|peer| peer.up);
    let moving = statuses.iter().any(|status| {
        !up(status) || status.migrations.iter().any(|each| each.progressing == Progressing::Running)
    });
    let owners: Vec<String> = statuses.iter().map(owner).collect();
    let [from, to] = Place::BOTH.map(|place| arena.setting.site(place));
    let detail = format!(
        "QEMU at {from} {:?}, at {to} {:?}; gateway {from} says {}, {to} says {}{}",
        states[0],
        states[1],
        owners[0],
        owners[1],
        if moving { "; something is still moving or a link is down" } else { "" }
    );
    Ok(Seen { rest, moving, detail })
}

fn owner(status: &StatusView) -> String {
    let machine = status.machines.iter().find(|machine| machine.name.as_str() == VM);
    machine.map_or("nothing".into(), |machine| format!("{} ({})", machine.owner, machine.state))
}
