//! Two and three gateways under everything that may happen to them, in virtual time: 100,000 schedules for each way to
//! hand over, or as many as `LONGHAUL_SIM_SCHEDULES` says, from `LONGHAUL_SIM_SEED` on.
//!
//! What sites keep of a machine for its way back, in bytes, is played besides and by itself (`stores`): a hundredth of as many.
//!
//! The decisions are the core's; the gateways around them are imitations of the daemon and its
//! drivers. A schedule that fails is shortened and written to `seeds/`, and played again for ever.
//!
//! A power loss here ends gateway and guest of a site at once; each record that was not synced is there afterwards or is
//! not, whole, and the disk is what was last flushed. Writes that are torn in the middle are not played: the journal's
//! own tests do that to its file, in `gateway/src/journal/torn.rs`.

mod anchors;
mod arbiters;
mod broken;
mod deadlines;
mod gateway;
mod invariants;
mod parts;
mod records;
mod recovery;
mod register;
mod resolve;
mod scene;
mod schedule;
mod stores;
#[path = "../support/stream.rs"]
mod stream;
#[path = "../support/mod.rs"]
mod support;
mod work;
mod world;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use invariants::Violation;
use scene::{
    SCENES, Scene, THREE, THREE_DNS, THREE_ETCD, THREE_PIPELINED, TWO, TWO_ARBITRATED, TWO_PIPELINED,
    TWO_RESOLVED,
};
use schedule::{Event, of_seed, shorten};
use world::World;

const SCHEDULES: u64 = 100_000;

fn number(variable: &str, otherwise: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.map_or(otherwise, |text| text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

fn play(scene: &'static Scene, events: &[Event]) -> Result<(), (usize, Violation)> {
    World::new(scene, None, None).play(events)
}

fn seeds() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/sim/seeds")
}

/// Writes down a schedule that fails, as short as it can be made.
fn keep(scene: &'static Scene, seed: u64, violation: &Violation) -> PathBuf {
    let fails = |events: &[Event]| {
        play(scene, events).is_err_and(|(_, found)| found.invariant == violation.invariant)
    };
    let events = shorten(of_seed(seed, scene), fails);
    let lines: Vec<String> = events.iter().map(ToString::to_string).collect();
    let path = seeds().join(format!("{}{}-{seed}.log", scene.prefix, violation.invariant));
    let text = format!("# {}, found with seed {seed}\n{}\n", violation.invariant, lines.join("\n"));
    fs::write(&path, text).expect("a writable directory of seeds");
    path
}

fn play_seeds(scene: &'static Scene, from: u64, to: u64) -> Option<(u64, Violation)> {
    (from..to).find_map(|seed| {
        let (_, violation) = play(scene, &of_seed(seed, scene)).err()?;
        Some((seed, violation))
    })
}

fn play_all(scene: &'static Scene) {
    let (schedules, first) = (number("LONGHAUL_SIM_SCHEDULES", SCHEDULES), number("LONGHAUL_SIM_SEED", 0));
    let began = Instant::now();
    let half = first + schedules / 2;
    let failed = std::thread::scope(|scope| {
        let other = scope.spawn(|| play_seeds(scene, half, first + schedules));
        let mine = play_seeds(scene, first, half);
        mine.or(other.join().expect("a simulation that does not panic"))
    });
    if let Some((seed, violation)) = failed {
        let path = keep(scene, seed, &violation);
        panic!(
            "seed {seed} violates {}: {}; kept in {}",
            violation.invariant,
            violation.detail,
            path.display()
        );
    }
    let (rate, commit) = (schedules as f64 / began.elapsed().as_secs_f64(), scene.routes[0].commit);
    println!(
        "{} sites, {commit:?}: {schedules} schedules from seed {first}, {rate:.0} schedules per second",
        scene.sites
    );
}

#[test]
fn every_schedule_keeps_every_promise() {
    play_all(&TWO);
}

#[test]
fn every_schedule_in_which_an_operator_decides_for_a_lost_site_keeps_every_promise() {
    play_all(&TWO_RESOLVED);
    let seen = records(&TWO_RESOLVED, 20_000);
    for record in ["taken back by an operator", "taken over by an operator"] {
        assert!(seen.contains_key(record), "nobody wrote {record}");
    }
}

#[test]
fn every_schedule_with_an_arbiter_keeps_every_promise_and_nobody_waits_in_a_partition() {
    play_all(&TWO_ARBITRATED);
}

#[test]
fn every_schedule_with_a_pipelined_commit_keeps_every_promise() {
    play_all(&TWO_PIPELINED);
    let seen = records(&TWO_PIPELINED, 20_000);
    for record in ["parked", "committed", "activated", "returned"] {
        assert!(seen.contains_key(record), "nobody wrote {record}");
    }
}

#[test]
fn every_schedule_of_three_sites_with_a_pipelined_commit_keeps_every_promise() {
    play_all(&THREE_PIPELINED);
}

#[test]
fn every_schedule_of_three_sites_keeps_every_promise() {
    play_all(&THREE);
}

#[test]
fn every_schedule_of_three_sites_with_etcd_keeps_every_promise() {
    play_all(&THREE_ETCD);
}

#[test]
fn every_schedule_of_three_sites_with_an_arbiter_at_home_keeps_every_promise() {
    play_all(&THREE_DNS);
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
        let scene = Scene::of_file(&path.file_name().expect("the name of an entry").to_string_lossy());
        assert_eq!(play(scene, &events), Ok(()), "{}", path.display());
    }
}

#[test]
fn an_undisturbed_machine_moves_and_its_name_follows() {
    for scene in SCENES {
        assert_eq!(play(scene, &[]), Ok(()));
    }
}

/// How often each record is the last or an earlier one of a move, by its name.
fn records(scene: &'static Scene, schedules: u64) -> BTreeMap<&'static str, u64> {
    let mut seen = BTreeMap::new();
    for seed in 0..schedules {
        let mut world = World::new(scene, None, None);
        world.play(&of_seed(seed, scene)).expect("a schedule that keeps every promise");
        for record in world.sites.iter().flat_map(|site| site.journal.records.values().flatten()) {
            *seen.entry(record.name()).or_insert(0u64) += 1;
        }
    }
    println!("{seen:?}");
    seen
}

#[test]
fn every_record_of_an_arbitrated_hand_over_is_written_in_some_schedule() {
    for (scene, schedules) in [(&TWO_ARBITRATED, 20_000), (&THREE_ETCD, 5_000)] {
        let seen = records(scene, schedules);
        for record in ["offered", "reclaiming", "promised", "committed", "returned", "settled", "released"] {
            assert!(seen.contains_key(record), "the source never wrote {record}");
        }
        for record in ["claiming", "owned", "activated", "refused", "handed back"] {
            assert!(seen.contains_key(record), "the destination never wrote {record}");
        }
    }
}

#[test]
fn a_schedule_reads_as_it_was_written() {
    let events = of_seed(7, &THREE_DNS);
    let read: Vec<Event> = events.iter().map(|event| event.to_string().parse().expect("an event")).collect();
    assert_eq!(read, events);
}
