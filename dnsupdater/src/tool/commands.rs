//! What each command does: the library's operations in order, and what is remembered of them.

use std::net::IpAddr;
use std::time::Duration;

use dnsupdater::{
    DnsName, Epoch, Error, Outcome, PtrSwap, Records, Scope, Swap, TtlOutcome, Updater, ownership::NOBODY,
};
use serde_json::json;

use super::args::{Access, After, Cli, Command, ReverseAccess};
use super::memory::{Ended, Last, Memory, Remembered};
use super::report::{LOST, REVERSE, Report, list, records_text};
use super::reverse;

/// Does what the command line says.
pub async fn run(cli: &Cli) -> Result<Report, Error> {
    let name = cli.command.name();
    let updater = updater(&cli.access, name).await?;
    let memory = || Memory::of(cli.access.state_dir.as_deref(), name, updater.config().servers[0]);
    match &cli.command {
        Command::Read { .. } => updater.read(name).await.map(|records| Report {
            code: 0,
            text: records_text(&records),
            json: json!({ "outcome": "read", "records": records }),
        }),
        Command::Preflight { to, .. } => preflight(&updater, name, to).await,
        Command::Set { addresses, ttl, owner, after, .. } => {
            let found = updater.read(name).await?;
            let asked =
                Asked { old: None, new: addresses.clone(), ttl_s: *ttl, owner: owner.clone(), epoch: None };
            change(&updater, &memory()?, asked, found, after).await
        }
        Command::Swap { from, to, ttl, owner, epoch, after, .. } => {
            let found = updater.read(name).await?;
            let (owner, epoch) = (owner.clone(), epoch.map(Epoch));
            let asked = Asked { old: Some(from.clone()), new: to.clone(), ttl_s: *ttl, owner, epoch };
            change(&updater, &memory()?, asked, found, after).await
        }
        Command::Undo { verify, reverse, .. } => undo(&updater, &memory()?, name, *verify, reverse).await,
        Command::LowerTtl { ttl, .. } => lower_ttl(&updater, &memory()?, name, *ttl).await,
        Command::RestoreTtl { ttl, .. } => restore_ttl(&updater, &memory()?, name, *ttl).await,
        Command::Verify { expect, all, wait, .. } => {
            let scope = if *all { Scope::All } else { Scope::Listed };
            let patience = Duration::from_secs(*wait);
            Ok(Report::verified(&updater.verify_until(name, expect, scope, patience).await?))
        }
    }
}

/// What a change is to be.
struct Asked {
    /// None: whatever it has.
    old: Option<Vec<IpAddr>>,
    new: Vec<IpAddr>,
    ttl_s: u32,
    owner: Option<String>,
    epoch: Option<Epoch>,
}

impl Asked {
    /// The swap on top of what was found.
    fn swap(&self, found: &Records) -> Result<Swap, Error> {
        let present = found.ownership().map(|ownership| ownership.owner());
        let owner = self.owner.as_deref().or(present).unwrap_or(NOBODY);
        let from = self.epoch.unwrap_or(found.epoch());
        let to = from.0.checked_add(1).map(Epoch);
        let to = to.ok_or_else(|| Error::Config("The epoch has reached its end".to_owned()))?;
        let observed = found.ownership().filter(|ownership| ownership.epoch() == from).cloned();
        let old = self.old.as_ref().unwrap_or(&found.addresses).clone();
        let (name, new) = (found.name.clone(), self.new.clone());
        Ok(Swap::new(name, old, new, self.ttl_s, owner).epochs(from, to).observed(observed))
    }

    /// Whether `swap` was asked for in these words.
    fn is(&self, swap: &Swap) -> bool {
        let owner = self.owner.as_ref().is_none_or(|owner| *owner == swap.owner);
        let epoch = self.epoch.is_none_or(|epoch| epoch == swap.epoch_from);
        let old = self.old.as_ref().is_none_or(|old| *old == swap.old);
        (&self.new, self.ttl_s) == (&swap.new, swap.ttl_s) && old && owner && epoch
    }
}

async fn updater(access: &Access, name: &DnsName) -> Result<Updater, Error> {
    if let Some(zone) = &access.zone {
        return Updater::new(access.config(zone.clone())?);
    }
    let anywhere = Updater::new(access.config(name.clone())?)?;
    let zone = anywhere.zone_of(name).await?;
    Ok(anywhere.in_zone(zone))
}

async fn preflight(updater: &Updater, name: &DnsName, to: &[IpAddr]) -> Result<Report, Error> {
    let found = updater.preflight(name, to).await?;
    Ok(Report {
        code: 0,
        text: format!(
            "{}\nready: reachable in {} ms, key and clock accepted, nothing changed",
            records_text(&found.records),
            found.round_trip.as_millis()
        ),
        json: json!({
            "outcome": "ready", "records": found.records, "round_trip_ms": found.round_trip.as_secs_f64() * 1e3
        }),
    })
}

/// Swaps, remembering first what is asked, and lets the rest follow.
async fn change(
    updater: &Updater,
    memory: &Memory,
    asked: Asked,
    found: Records,
    after: &After,
) -> Result<Report, Error> {
    let reverse_updater = reverse::updater(updater, &after.reverse)?;
    let kept = memory.recall()?;
    let open = kept.last.clone().filter(|last| last.ended == Ended::Unknown && asked.is(&last.swap));
    let fresh = open.is_none();
    let mut last = match open {
        // The answer was lost the last time: the same transaction again, which is applied at most once.
        Some(last) => last,
        None => {
            let swap = asked.swap(&found)?;
            let reverse = match after.ptr {
                true => reverse::plan(&reverse_updater, &after.reverse, &swap).await?,
                false => Vec::new(),
            };
            Last { swap, reverse, ended: Ended::Unknown }
        }
    };
    let lowered = found.ttl_s().filter(|ttl_s| *ttl_s > asked.ttl_s);
    let kept = Remembered { ttl_before_s: kept.ttl_before_s.or(lowered), ..kept };
    memory.keep(&Remembered { last: Some(last.clone()), ..kept.clone() })?;
    match updater.swap(&last.swap).await {
        Ok(Outcome::Won) => {}
        Ok(Outcome::Lost { current, rcode }) => {
            let last_before = kept.last.clone().filter(|_| fresh);
            memory.keep(&Remembered { last: last_before, ..kept })?;
            return Ok(Report::lost(&last.swap.old, &current, rcode));
        }
        Err(error) => {
            // What was sent before may still have been applied, and this may be when its outcome is unknown.
            if fresh && !matches!(error, Error::OutcomeUnknown { .. }) {
                memory.keep(&kept)?;
            }
            return Err(error);
        }
    }
    last.ended = Ended::Won;
    memory.keep(&Remembered { last: Some(last.clone()), ..kept })?;
    let report = follow(Report::won(&last.swap), &reverse_updater, &last.reverse).await;
    Ok(verify(report, updater, &last.swap.name, &last.swap.new, after.verify).await)
}

async fn undo(
    updater: &Updater,
    memory: &Memory,
    name: &DnsName,
    patience_s: Option<u64>,
    reverse: &ReverseAccess,
) -> Result<Report, Error> {
    let reverse_updater = reverse::updater(updater, reverse)?;
    let kept = memory.recall()?;
    let Some(last) = kept.last.clone() else {
        let server = updater.config().servers[0];
        let reason =
            format!("No swap of {name} at {server} is remembered here: see --state-dir and --server");
        return Err(Error::Config(reason));
    };
    if let Outcome::Lost { current, rcode } = updater.undo(&last.swap).await? {
        return Ok(Report::lost(&last.swap.new, &current, rcode));
    }
    let undone = Last { ended: Ended::Undone, ..last.clone() };
    memory.keep(&Remembered { last: Some(undone), ..kept.clone() })?;
    let old = &last.swap.old;
    let text = format!("{name} has {} again", list(old));
    let json = json!({ "outcome": "undone", "name": name, "addresses": old });
    let back: Vec<_> = last.reverse.iter().rev().map(PtrSwap::inverse).collect();
    let mut report = follow(Report { code: 0, text, json }, &reverse_updater, &back).await;
    if let Some(ttl_s) = kept.ttl_before_s.filter(|_| !old.is_empty()) {
        let restored = restore_ttl(updater, memory, name, Some(ttl_s)).await.unwrap_or_else(|error| Report {
            text: format!("its ttl was NOT RESTORED to {ttl_s} s: {error}"),
            ..Report::failure(&error)
        });
        report = report.and("ttl", &[restored.text], restored.json).or_code(restored.code);
    }
    Ok(verify(report, updater, name, old, patience_s).await)
}

async fn lower_ttl(updater: &Updater, memory: &Memory, name: &DnsName, ttl_s: u32) -> Result<Report, Error> {
    let kept = memory.recall()?;
    let found = updater.read(name).await?;
    // Before it is sent, for the same reason as a swap; what was lowered before is what counts.
    let before = kept.ttl_before_s.or(found.ttl_s().filter(|now_s| *now_s > ttl_s));
    memory.keep(&Remembered { ttl_before_s: before, ..kept })?;
    let outcome = updater.lower_ttl(name, ttl_s).await?;
    Ok(ttl_report(name, &outcome))
}

async fn restore_ttl(
    updater: &Updater,
    memory: &Memory,
    name: &DnsName,
    ttl_s: Option<u32>,
) -> Result<Report, Error> {
    let kept = memory.recall()?;
    let Some(ttl_s) = ttl_s.or(kept.ttl_before_s) else {
        return Err(Error::Config(format!(
            "No time to live of {name} from before is remembered here: give --ttl"
        )));
    };
    let outcome = updater.restore_ttl(name, ttl_s).await?;
    if !matches!(outcome, TtlOutcome::Lost { .. }) {
        memory.keep(&Remembered { ttl_before_s: None, ..kept })?;
    }
    Ok(ttl_report(name, &outcome))
}

fn ttl_report(name: &DnsName, outcome: &TtlOutcome) -> Report {
    match outcome {
        TtlOutcome::Changed { from_s, to_s } => Report {
            code: 0,
            text: format!(
                "{name} has ttl {to_s} s now; answers with ttl {from_s} s live up to {from_s} s longer"
            ),
            json: json!({ "outcome": "changed", "name": name, "from_s": from_s, "ttl_s": to_s }),
        },
        TtlOutcome::Already { ttl_s } => Report {
            code: 0,
            text: format!("{name} has ttl {ttl_s} s already"),
            json: json!({ "outcome": "already", "name": name, "ttl_s": ttl_s }),
        },
        TtlOutcome::Lost { current } => Report::lost(&[], current, None),
    }
}

async fn follow(report: Report, updater: &Updater, changes: &[PtrSwap]) -> Report {
    if changes.is_empty() {
        return report;
    }
    let followed = reverse::follow(updater, changes).await;
    let code = if followed.complete { 0 } else { REVERSE };
    report.and("reverse", &followed.lines, json!(followed.lines)).or_code(code)
}

async fn verify(
    report: Report,
    updater: &Updater,
    name: &DnsName,
    expected: &[IpAddr],
    patience_s: Option<u64>,
) -> Report {
    let Some(patience_s) = patience_s else { return report };
    let patience = Duration::from_secs(patience_s);
    let seen = match updater.verify_until(name, expected, Scope::All, patience).await {
        Ok(verification) => Report::verified(&verification),
        Err(error) => {
            Report { text: format!("it was NOT VERIFIED: {error}"), code: LOST, ..Report::failure(&error) }
        }
    };
    report.and("verification", &[seen.text], seen.json["verification"].clone()).or_code(seen.code)
}
