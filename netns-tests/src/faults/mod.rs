//! The fault matrix: real machines, real kills, real cuts, in every stage of a move and at random times. After each case
//! everything is made whole again, and what must hold is judged from outside.
//!
//! [`plan`] says which case a number is, [`arena`] is where it is played, [`mod@play`] plays it, [`strike`] lets its fault
//! happen, [`setting`] says who decides and which way it goes, [`settle`] waits until it is clear where the machine is, [`judge`] looks, [`watch`] looks all the time, and
//! [`report`] counts. What is right in which stage is not written down here: it follows from the promises alone.

pub mod arena;
pub mod confirm;
pub mod flaw;
pub mod judge;
pub mod plan;
pub mod play;
pub mod report;
pub mod setting;
pub mod settle;
pub mod strike;
pub mod watch;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use arena::Arena;
use flaw::Flaw;
use plan::{Case, Place};
use play::{Played, play};
use report::{FaultReport, logs, replay, stage_name};
use setting::Setting;

use crate::guest::image::lab_folder;
use crate::scenario::programs::Programs;
use crate::scenario::scene::VM;

/// No case takes longer.
const CASE: Duration = Duration::from_secs(900);

/// What to play.
#[derive(Debug, Clone)]
pub struct FaultOptions {
    /// How many cases.
    pub cases: u64,
    /// The seed of their order and moments.
    pub seed: u64,
    /// Only the cases of these numbers, if there are any.
    pub only: Vec<u64>,
    /// What they are played in.
    pub setting: Setting,
    /// No case is begun after this.
    pub limit: Option<Duration>,
}

/// Plays cases and writes the report into `target/lab/faults`.
pub async fn run(options: &FaultOptions, programs: &Programs) -> Result<FaultReport> {
    let started = Instant::now();
    let folder = lab_folder().join("faults");
    let mut report = FaultReport::new(options.seed, options.setting);
    let mut arena: Option<Arena> = None;
    let numbers = if options.only.is_empty() { (0..options.cases).collect() } else { options.only.clone() };
    for number in numbers {
        if options.limit.is_some_and(|limit| started.elapsed() > limit) {
            break;
        }
        let case = plan::case(options.seed, number);
        let ready = readied(arena.take(), options.setting, programs, &mut report).await?;
        arena = one(ready, &case, &mut report, &folder).await?;
        report.took_s = started.elapsed().as_secs_f64();
        report.write(&folder)?;
    }
    if let Some(arena) = arena {
        let left = arena.close();
        if !left.is_empty() {
            println!("left behind at the end: {left:?}");
            report.leftovers += 1;
        }
    }
    report.took_s = started.elapsed().as_secs_f64();
    report.write(&folder)?;
    print(&report, &folder);
    Ok(report)
}

/// An arena with a machine: the one there is, or a new one if it is none or does not get ready.
async fn readied(
    arena: Option<Arena>,
    setting: Setting,
    programs: &Programs,
    report: &mut FaultReport,
) -> Result<Arena> {
    if let Some(mut arena) = arena {
        match arena.ready().await {
            Ok(()) => return Ok(arena),
            // What the case before left is in the way of this one.
            Err(error) => {
                println!("      left behind by the case before, the scene is built anew: {error:#}");
                report.leftovers += 1;
            }
        }
        arena.close();
    }
    let mut arena = Arena::build(setting, programs).await?;
    arena.ready().await?;
    Ok(arena)
}

/// Plays one case and counts it. Gives the arena back if the next case may use it.
async fn one(
    mut arena: Arena,
    case: &Case,
    report: &mut FaultReport,
    folder: &Path,
) -> Result<Option<Arena>> {
    let marks = Place::BOTH.map(|place| log_len(&arena.gateway(place).log()));
    let outcome = tokio::time::timeout(CASE, play(&mut arena, case)).await;
    let (played, flaws) = match outcome {
        Ok(Ok(played)) => {
            let flaws = played.flaws.clone();
            (Some(played), flaws)
        }
        Ok(Err(error)) => (None, vec![Flaw::NotJudged(format!("{error:#}"))]),
        Err(_) => (None, vec![Flaw::NotJudged(format!("the case takes longer than {CASE:?}"))]),
    };
    report.count(case, played.as_ref(), &flaws);
    say(case, played.as_ref(), &flaws);
    let again = played.as_ref().is_some_and(|played| arena.may_be_used_again(played.ending));
    if flaws.is_empty() && again && !matches!(case.fault, plan::Fault::OldJournal(_)) {
        return Ok(Some(arena));
    }
    if !flaws.is_empty() {
        let kept = folder.join(logs(&report.setting, report.seed, case.number));
        keep(&arena, &marks, &kept, &reasons(&report.setting, report.seed, case, played.as_ref(), &flaws))?;
    }
    let left = arena.close();
    if !left.is_empty() {
        println!("  left behind: {left:?}");
        report.leftovers += 1;
    }
    Ok(None)
}

fn say(case: &Case, played: Option<&Played>, flaws: &[Flaw]) {
    let (stage, ending, took) = match played {
        Some(played) => {
            let ending =
                if played.struck { format!("{:?}", played.ending) } else { "nothing to strike".into() };
            (played.spot.name(), ending, played.took.as_secs_f64())
        }
        None => ("?".into(), "not judged".into(), 0.0),
    };
    let verdict = if flaws.is_empty() { "held" } else { "BROKEN" };
    let (number, fault) = (case.number, case.fault.name());
    println!("{number:>4}  {fault:<16} in {stage:<5}  {verdict:<6}  {ending:<18}  {took:>5.1} s");
    for flaw in flaws {
        println!("      {flaw}");
    }
}

fn reasons(setting: &str, seed: u64, case: &Case, played: Option<&Played>, flaws: &[Flaw]) -> String {
    let flaws: Vec<String> = flaws.iter().map(ToString::to_string).collect();
    format!(
        "{case:?}\nstruck in stage {}\nending {:?}\n\n{}\n\n{}\n",
        stage_name(played),
        played.map(|played| played.ending),
        flaws.join("\n"),
        replay(setting, seed, case.number)
    )
}

fn log_len(log: &Path) -> usize {
    std::fs::metadata(log).map_or(0, |about| about.len() as usize)
}

/// Keeps what helps to find out what went wrong: both gateways' logs since the case began, consoles, the reason.
fn keep(arena: &Arena, marks: &[usize; 2], folder: &Path, reasons: &str) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("reason.txt"), reasons)?;
    for (place, mark) in Place::BOTH.into_iter().zip(marks) {
        let gateway = arena.gateway(place);
        let file = |what: &str| -> PathBuf { folder.join(format!("{}-{what}", arena.setting.site(place))) };
        let log = std::fs::read(gateway.log()).context("A gateway's log")?;
        std::fs::write(file("gateway.log"), &log[(*mark).min(log.len())..])?;
        let qemu = gateway.folder.join("run/vm").join(VM).join("qemu.log");
        for (from, to) in [(gateway.console(VM), file("console.log")), (qemu, file("qemu.log"))] {
            if from.exists() {
                std::fs::copy(from, to)?;
            }
        }
    }
    Ok(())
}

fn print(report: &FaultReport, folder: &Path) {
    println!("\n{}\n{}", report.table(), report.endings_table());
    println!(
        "{} cases, {} held, {} missed; {} moved, {} stayed, {} guests crashed, {} on hold; {} double runs, \
         {} machines lost, {} lost confirmed writes, {} left something behind; seed {}, {:.0} s",
        report.cases,
        report.held,
        report.missed,
        report.moved,
        report.stayed,
        report.guest_crashed,
        report.on_hold,
        report.double_runs,
        report.lost_machines,
        report.lost_confirmed_writes,
        report.leftovers,
        report.seed,
        report.took_s
    );
    for failed in &report.failed {
        println!("{}  ({} in {}): {}", failed.replay, failed.fault, failed.stage, failed.flaws.join("; "));
    }
    println!("{}", folder.join("report.json").display());
}
