//! Plays one case: a move with clients, the fault at its moment, everything whole again, then the judgement.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use longhaul_core::migration::Stage;

use super::arena::Arena;
use super::confirm::{Confirmed, Confirmer};
use super::flaw::Flaw;
use super::judge;
use super::plan::{Case, Fault, Place};
use super::settle::{Rest, settle};
use super::strike::{Spot, moment, rtt, strike};
use super::watch::{Watcher, overlaps};
use crate::agent::RECORD_PORT;
use crate::scenario::demo::unix_ms;
use crate::scenario::scene::VM;
use crate::scenario::traffic::Client;
use crate::traffic::{CLOSE_AFTER_CUT_MS, RecordPlan, TrafficPlan};

/// An attempt that was undone may still be taken down when the next one begins.
const BEGIN: Duration = Duration::from_secs(30);

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The machine runs where it was.
    Stayed,
    /// It runs where it was to go.
    Moved,
    /// The QEMU that owned it was killed; it was booted again at this site.
    Crashed(Place),
    /// Its guest had powered itself off; it was started again at this site.
    WasOff(Place),
    /// Nobody runs it and nobody may: an operator decides.
    Held,
    /// Unknown.
    Unclear,
}

/// What was seen of a case.
#[derive(Debug, Clone)]
pub struct Played {
    /// Where the move was when the fault struck.
    pub spot: Spot,
    /// The fault found something to strike.
    pub struck: bool,
    /// How it ended.
    pub ending: Ending,
    /// What did not hold.
    pub flaws: Vec<Flaw>,
    /// From the request to the end of the judgement.
    pub took: Duration,
}

/// Plays a case. An error is the laboratory's, or a gateway that does not do what it is asked at all.
pub async fn play(arena: &mut Arena, case: &Case) -> Result<Played> {
    let started = Instant::now();
    arena.wan(rtt(arena, case), 0.0)?;
    let watchers = [watcher(arena, Place::A)?, watcher(arena, Place::B)?];
    let client = record_client(arena).await?;
    let confirmer = Confirmer::start(&arena.scene.world.client, arena.address(Place::A).await?)?;
    let id = begin_move(arena).await?;
    let spot = moment(arena, case, &id).await?;
    let struck = strike(arena, case).await?;
    arena.wan(arena.scene.options.rtt, 0.0)?;
    let rest = settle(arena, &watchers, case.fault).await;
    let confirmed = confirmer.finish().await?;
    let mut played =
        Played { spot, struck, ending: Ending::Unclear, flaws: Vec::new(), took: Duration::ZERO };
    let started_again = rested(arena, case, rest, &mut played).await?;
    let booted = started_again || case.fault == Fault::Reboot && struck;
    let [a, b] = watchers;
    let doubled = overlaps(&a.finish().await?, &b.finish().await?);
    if doubled > 0 {
        played.flaws.push(Flaw::DoubleRun(doubled));
    }
    // Where old connections go is in the journal of the site that the machine left, and nowhere else.
    let forgotten = case.fault == Fault::OldJournal(Place::A) && played.ending == Ending::Moved;
    if serves(played.ending) && !forgotten {
        let connection = judge::old_connection(client).await;
        // A connection ends with its guest.
        played.flaws.extend(connection.err().filter(|_| !booted));
    }
    served(arena, case, &id, &confirmed, booted, &mut played).await;
    played.took = started.elapsed();
    Ok(played)
}

fn serves(ending: Ending) -> bool {
    match ending {
        Ending::Stayed | Ending::Moved | Ending::Crashed(_) | Ending::WasOff(_) => true,
        Ending::Held | Ending::Unclear => false,
    }
}

/// Says how it ended, and starts a machine that stands still; true if that booted it.
async fn rested(arena: &Arena, case: &Case, rest: Result<Rest, String>, played: &mut Played) -> Result<bool> {
    let owners = judge::owners(arena).await?;
    if owners.len() > 1 {
        played.flaws.push(Flaw::TwoOwners);
    }
    match rest {
        Ok(Rest::Runs(place) | Rest::RunsBeside(place)) => {
            played.ending = if place == Place::A { Ending::Stayed } else { Ending::Moved };
            if owners.is_empty() && matches!(case.fault, Fault::OldJournal(_)) {
                // Its journal does not know it any more, and its gateway leaves it alone.
                played.ending = Ending::Held;
                return Ok(false);
            }
            if case.fault == Fault::PowerOff && played.struck {
                let text = format!(
                    "its guest was told to power off, and it runs at site {}",
                    arena.setting.site(place)
                );
                played.flaws.push(Flaw::Unsettled(text));
            }
            if !owners.contains(&place) {
                let text = format!("it runs at site {}, where it may not run", arena.setting.site(place));
                played.flaws.push(Flaw::Unsettled(text));
            }
            let early =
                matches!(played.spot, Spot::Stage(Stage::PreMigration | Stage::Reservation | Stage::PreCopy));
            if place == Place::A && case.fault.only_delays() && early {
                played.flaws.push(Flaw::Prevented(reason(arena).await));
            }
            Ok(false)
        }
        Ok(Rest::Still) => stands_still(arena, case, &owners, played).await,
        Err(detail) => {
            played.flaws.push(Flaw::Unsettled(detail));
            Ok(false)
        }
    }
}

async fn stands_still(arena: &Arena, case: &Case, owners: &[Place], played: &mut Played) -> Result<bool> {
    let old_journal = matches!(case.fault, Fault::OldJournal(_));
    let owner = match owners {
        [owner] => *owner,
        [] if old_journal => {
            played.ending = Ending::Held;
            return Ok(false);
        }
        [] => {
            played.flaws.push(Flaw::LostMachine("it stands still and no site may run it".into()));
            return Ok(false);
        }
        [..] => return Ok(false),
    };
    let switched_off = case.fault == Fault::PowerOff;
    if switched_off && let Some(flaw) = judge::not_switched_off(arena, owner).await {
        played.flaws.push(flaw);
        return Ok(false);
    }
    if !old_journal && !switched_off && !case.fault.kills_qemu(owner) {
        let text = format!("it stands still at its owner, site {}", arena.setting.site(owner));
        played.flaws.push(Flaw::Unsettled(text));
        return Ok(false);
    }
    let booted = !old_journal;
    if let Err(flaw) = judge::start(arena, owner).await {
        played.flaws.push(flaw);
        return Ok(booted);
    }
    played.ending = match (booted, owner) {
        (true, owner) if switched_off => Ending::WasOff(owner),
        (true, owner) => Ending::Crashed(owner),
        (false, Place::A) => Ending::Stayed,
        (false, Place::B) => Ending::Moved,
    };
    Ok(booted)
}

/// What can be judged of a machine that serves: content, disk, and what is left of the move.
async fn served(
    arena: &mut Arena,
    case: &Case,
    id: &str,
    confirmed: &Confirmed,
    booted: bool,
    played: &mut Played,
) {
    let place = match played.ending {
        Ending::Stayed | Ending::Crashed(Place::A) | Ending::WasOff(Place::A) => Place::A,
        Ending::Moved | Ending::Crashed(Place::B) | Ending::WasOff(Place::B) => Place::B,
        Ending::Held | Ending::Unclear => return,
    };
    if let Err(error) = judge::answers(arena, place).await {
        played.flaws.push(Flaw::LostMachine(format!("{error:#}")));
        return;
    }
    played.flaws.extend(judge::content(arena, place, confirmed, booted).await);
    if !played.flaws.is_empty() {
        return;
    }
    // An old journal ends in the right copy or none; what else it leaves of the move is the operator's to decide.
    let old_journal = matches!(case.fault, Fault::OldJournal(_));
    let judged = match place {
        Place::A if old_journal => judge::disk_at_a(arena, confirmed).await,
        Place::B if old_journal => judge::disk_at_b(arena, id, confirmed, true).await,
        Place::A => at_a(arena, confirmed).await,
        Place::B => at_b(arena, id, confirmed, booted).await,
    };
    played.flaws.extend(judged.err());
}

async fn at_a(arena: &Arena, confirmed: &Confirmed) -> Result<(), Flaw> {
    judge::disk_at_a(arena, confirmed).await?;
    let tidy = async {
        arena.nothing_new().await?;
        arena.ttl_is_restored().await
    };
    tidy.await.map_err(|error| Flaw::LeftBehind(format!("{error:#}")))
}

async fn at_b(arena: &mut Arena, id: &str, confirmed: &Confirmed, booted: bool) -> Result<(), Flaw> {
    judge::tunnel_comes_down(arena).await?;
    arena.ttl_is_restored().await.map_err(|error| Flaw::LeftBehind(format!("{error:#}")))?;
    judge::disk_at_b(arena, id, confirmed, booted).await?;
    arena.renew().await.map_err(|error| Flaw::LeftBehind(format!("{error:#}")))
}

fn watcher(arena: &Arena, place: Place) -> Result<Watcher> {
    Watcher::start(arena.gateway(place).observer(VM))
}

async fn record_client(arena: &Arena) -> Result<Client> {
    let mut plan = TrafficPlan::new(unix_ms());
    let address = (arena.address(Place::A).await?, RECORD_PORT).into();
    plan.record = Some(RecordPlan { address, through: None, interval_ms: 20, gap_ms: 500 });
    plan.close_timeout_ms = CLOSE_AFTER_CUT_MS;
    Client::start(&arena.scene.world.client, plan).await
}

async fn begin_move(arena: &Arena) -> Result<String> {
    let deadline = Instant::now() + BEGIN;
    loop {
        match arena.begin_move().await {
            Ok(id) => return Ok(id),
            Err(error) if Instant::now() > deadline => return Err(error).context("The move does not begin"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn reason(arena: &Arena) -> String {
    let status = arena.gateway(Place::A).client().status().await;
    let reason =
        status.ok().and_then(|status| status.migrations.into_iter().rev().find_map(|each| each.reason));
    reason.unwrap_or_else(|| "for no reason that the gateway knows".into())
}
