//! Two gateways under everything that may happen to them, in virtual time: 100,000 schedules, or as many
//! as `LONGHAUL_SIM_SCHEDULES` says, from `LONGHAUL_SIM_SEED` on.
//!
//! The decisions are the core's; the gateways around them are imitations of the daemon and its
//! drivers. A schedule that fails is shortened and written to `seeds/`, and played again for ever.

mod deadlines;
mod gateway;
mod invariants;
mod parts;
mod records;
mod schedule;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use invariants::Violation;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::arbiter::Arbiter;
use schedule::{Event, of_seed, shorten};
use world::{Broken, World};

const SCHEDULES: u64 = 100_000;

fn number(variable: &str, otherwise: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.map_or(otherwise, |text| text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

const ARBITRATED: CommitMode = CommitMode::Arbitrated(Arbiter::Dns);

fn play(commit: CommitMode, events: &[Event]) -> Result<(), (usize, Violation)> {
    World::new(commit, None, None).play(events)
}

/// Files of schedules that are played with an arbiter begin so.
fn prefix(commit: CommitMode) -> &'static str {
    match commit {
        CommitMode::Confirmed => "",
        CommitMode::Arbitrated(_) => "arbitrated-",
    }
}

fn seeds() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sim/seeds")
}

/// Writes down a schedule that fails, as short as it can be made.
fn keep(commit: CommitMode, seed: u64, violation: &Violation) -> PathBuf {
    let fails = |events: &[Event]| {
        play(commit, events).is_err_and(|(_, found)| found.invariant == violation.invariant)
    };
    let events = shorten(of_seed(seed), fails);
    let lines: Vec<String> = events.iter().map(ToString::to_string).collect();
    let path = seeds().join(format!("{}{}-{seed}.log", prefix(commit), violation.invariant));
    let text = format!("# {}, found with seed {seed}\n{}\n", violation.invariant, lines.join("\n"));
    fs::write(&path, text).expect("a writable directory of seeds");
    path
}

fn play_seeds(commit: CommitMode, from: u64, to: u64) -> Option<(u64, Violation)> {
    (from..to).find_map(|seed| play(commit, &of_seed(seed)).err().map(|(_, violation)| (seed, violation)))
}

fn play_all(commit: CommitMode) {
    let (schedules, first) = (number("LONGHAUL_SIM_SCHEDULES", SCHEDULES), number("LONGHAUL_SIM_SEED", 0));
    let began = Instant::now();
    let half = first + schedules / 2;
    let failed = std::thread::scope(|scope| {
        let other = scope.spawn(|| play_seeds(commit, half, first + schedules));
        let mine = play_seeds(commit, first, half);
        mine.or(other.join().expect("a simulation that does not panic"))
    });
    if let Some((seed, violation)) = failed {
        let path = keep(commit, seed, &violation);
        panic!(
            "seed {seed} violates {}: {}; kept in {}",
            violation.invariant,
            violation.detail,
            path.display()
        );
    }
    let rate = schedules as f64 / began.elapsed().as_secs_f64();
    println!("{commit:?}: {schedules} schedules from seed {first}, {rate:.0} schedules per second");
}

#[test]
fn every_schedule_keeps_every_promise() {
    play_all(CommitMode::Confirmed);
}

#[test]
fn every_schedule_with_an_arbiter_keeps_every_promise_and_nobody_waits_in_a_partition() {
    play_all(ARBITRATED);
}

#[test]
fn every_kept_schedule_is_played_again() {
    for entry in fs::read_dir(seeds()).expect("the directory of seeds") {
        let path = entry.expect("a readable entry").path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a readable schedule");
        let events: Vec<Event> = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display())))
            .collect();
        let arbitrated =
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix(ARBITRATED)));
        let commit = if arbitrated { ARBITRATED } else { CommitMode::Confirmed };
        assert_eq!(play(commit, &events), Ok(()), "{}", path.display());
    }
}

#[test]
fn an_undisturbed_machine_moves_and_its_name_follows() {
    for commit in [CommitMode::Confirmed, ARBITRATED] {
        assert_eq!(play(commit, &[]), Ok(()));
    }
}

#[test]
fn every_record_of_an_arbitrated_hand_over_is_written_in_some_schedule() {
    let mut seen = BTreeMap::new();
    for seed in 0..20_000 {
        let mut world = World::new(ARBITRATED, None, None);
        world.play(&of_seed(seed)).expect("a schedule that keeps every promise");
        for record in world.sites.iter().flat_map(|site| site.journal.records.values().flatten()) {
            *seen.entry(record.name()).or_insert(0u64) += 1;
        }
    }
    println!("{seen:?}");
    for record in ["offered", "reclaiming", "promised", "committed", "returned", "settled", "released"] {
        assert!(seen.contains_key(record), "the source never wrote {record}");
    }
    for record in ["claiming", "owned", "activated", "refused", "handed back"] {
        assert!(seen.contains_key(record), "the destination never wrote {record}");
    }
}

#[test]
fn a_schedule_reads_as_it_was_written() {
    let events = of_seed(7);
    let read: Vec<Event> = events.iter().map(|event| event.to_string().parse().expect("an event")).collect();
    assert_eq!(read, events);
}

/// Seeds within which a broken gateway must be found out.
const TRIES: u64 = 100_000;

#[test]
fn every_invariant_catches_the_gateway_that_breaks_it() {
    is_found_out(
        CommitMode::Confirmed,
        &[
            (Broken::SourceTimesOut, "never_two_running"),
            (Broken::OldAbortResumes, "no_resume_without_permit"),
            (Broken::ActsBeforeSync, "journal_precedes_message"),
            (Broken::UnknownIsRefused, "unknown_is_not_refused"),
            (Broken::RefusesAfterActivated, "never_two_owners"),
            (Broken::RollsBackWithoutResuming, "rollback_leaves_source_running"),
            (Broken::ForgetsCommitted, "exactly_one_runs_once_healed"),
            (Broken::SilentOnceDone, "nothing_reserved_once_settled"),
            (Broken::AsksOnce, "dns_points_at_the_owner_once_settled"),
            (Broken::WritesTwice, "journal_in_order"),
            (Broken::DeafToTheLink, "everybody_knows_once_settled"),
            (Broken::TakesWhatIsGone, "no_lost_memory_is_taken"),
            (Broken::LoadsBeforeItFlushes, "flushed_writes_survive_power_loss"),
            (Broken::ForgetsNames, "dns_points_at_the_owner_once_settled"),
        ],
    );
    is_found_out(
        ARBITRATED,
        &[
            (Broken::SourceTimesOut, "never_two_running"),
            (Broken::TwoPrimaries, "never_two_running"),
            (Broken::ClaimsWithoutAnAnswer, "nobody_runs_before_it_won"),
            (Broken::TakesBackWithoutAnAnswer, "nobody_runs_before_it_won"),
            (Broken::NeverPays, "dns_points_at_the_owner_once_settled"),
            (Broken::AsksNobodyInACut, "somebody_runs_in_a_partition"),
        ],
    );
}

fn is_found_out(commit: CommitMode, mutants: &[(Broken, &'static str)]) {
    for (broken, invariant) in mutants.iter().copied() {
        let found = (0..TRIES).find_map(|seed| {
            let mut world = World::new(commit, Some(broken), Some(invariant));
            let (at, violation) = world.play(&of_seed(seed)).err()?;
            Some((seed, at, violation))
        });
        let (seed, at, violation) = found.unwrap_or_else(|| panic!("{broken:?} survived {TRIES} schedules"));
        assert_eq!(violation.invariant, invariant);
        println!("{broken:?}: {invariant} by seed {seed}, event {at}");
    }
}
