//! Gateways that break one promise each, and the invariant by which each is found out.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::scene::{Scene, THREE, THREE_DNS, THREE_ETCD, TWO, TWO_ARBITRATED, TWO_PIPELINED, TWO_RESOLVED};
use crate::schedule::of_seed;
use crate::world::World;

/// A gateway that breaks one promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    SourceTimesOut,
    ActsBeforeSync,
    UnknownIsRefused,
    RefusesAfterActivated,
    RollsBackWithoutResuming,
    OldAbortResumes,
    SilentOnceDone,
    ForgetsCommitted,
    ForgetsNames,
    AsksOnce,
    WritesTwice,
    DeafToTheLink,
    TakesWhatIsGone,
    ClaimsWithoutAnAnswer,
    TakesBackWithoutAnAnswer,
    NeverPays,
    TwoPrimaries,
    AsksNobodyInACut,
    LoadsBeforeItFlushes,
    /// Lets a machine run that came once and has moved on since.
    OldArrivalResumes,
    /// Says of a machine that has moved on that it was refused: it is not here.
    AnswersByTheLedger,
    /// The site that a machine left tells nobody where it is.
    TellsNobody,
    /// Anybody's word of where the machine is counts, however old.
    BelievesAnybody,
    /// Says that it follows a machine of which it does not know yet that it left.
    NotesInDoubt,
    /// The QEMU of a machine that left is not ended by a gateway that was restarted.
    LeavesItsQemu,
    /// What stayed behind when the machine left stays when it is back.
    KeepsItsAnchor,
    /// A gateway that was restarted does not look whether it attracts the addresses of a machine that stayed.
    OverlooksItsAnchor,
    /// What was seen in the arbiter's register is not kept.
    ForgetsHighWater,
    /// A source whose QEMU is gone asks for itself, although the destination may have all of it.
    AsksForTheDead,
    /// A source that was started anew does not say that what was behind its Commit is lost.
    WaitsForWhatIsLost,
    /// Not a gateway but an operator: the copy that he says is destroyed is not.
    DestroysNothing,
    /// Not a gateway but a register: it loses a decision that one side alone has seen.
    ForgetsTheDecision,
}

/// Seeds within which a broken gateway must be found out.
const TRIES: u64 = 100_000;

type Mutants = &'static [(Broken, &'static str)];

const OF_TWO: Mutants = &[
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
    (Broken::LeavesItsQemu, "no_copy_is_left_once_settled"),
];

const OF_TWO_ARBITRATED: Mutants = &[
    (Broken::SourceTimesOut, "never_two_running"),
    (Broken::TwoPrimaries, "never_two_running"),
    (Broken::ClaimsWithoutAnAnswer, "nobody_runs_before_it_won"),
    (Broken::TakesBackWithoutAnAnswer, "nobody_runs_before_it_won"),
    (Broken::NeverPays, "dns_points_at_the_owner_once_settled"),
    (Broken::AsksNobodyInACut, "somebody_runs_in_a_partition"),
    (Broken::ForgetsHighWater, "a_register_put_back_decides_nothing"),
    (Broken::AsksForTheDead, "no_lost_memory_is_taken"),
    (Broken::ForgetsTheDecision, "never_two_running"),
];

const OF_TWO_PIPELINED: Mutants = &[
    (Broken::SourceTimesOut, "never_two_running"),
    (Broken::ActsBeforeSync, "journal_precedes_message"),
    (Broken::UnknownIsRefused, "unknown_is_not_refused"),
    (Broken::RefusesAfterActivated, "never_two_owners"),
    (Broken::ForgetsCommitted, "exactly_one_runs_once_healed"),
    (Broken::WaitsForWhatIsLost, "exactly_one_runs_once_healed"),
    (Broken::LoadsBeforeItFlushes, "flushed_writes_survive_power_loss"),
];

const OF_THREE: Mutants = &[
    (Broken::SourceTimesOut, "never_two_running"),
    (Broken::RefusesAfterActivated, "never_two_owners"),
    (Broken::ForgetsCommitted, "exactly_one_runs_once_healed"),
    (Broken::WritesTwice, "journal_in_order"),
];

const OF_THREE_ETCD: Mutants = &[
    (Broken::TwoPrimaries, "never_two_running"),
    (Broken::ClaimsWithoutAnAnswer, "nobody_runs_before_it_won"),
    (Broken::ForgetsHighWater, "never_two_running"),
    (Broken::OverlooksItsAnchor, "its_addresses_are_its_own_once_settled"),
];

/// What three sites find out and two never do: the machine moves on, or comes home.
const OF_THREE_ALONE: [(&Scene, &Scene, Broken, &str); 6] = [
    (&THREE, &TWO, Broken::OldArrivalResumes, "no_resume_without_permit"),
    (&THREE, &TWO, Broken::AnswersByTheLedger, "never_two_owners"),
    (&THREE, &TWO, Broken::TellsNobody, "dns_points_at_the_owner_once_settled"),
    (&THREE, &TWO, Broken::BelievesAnybody, "dns_points_at_the_owner_once_settled"),
    (&THREE, &TWO, Broken::KeepsItsAnchor, "its_addresses_are_its_own_once_settled"),
    (&THREE_DNS, &TWO_ARBITRATED, Broken::NotesInDoubt, "dns_points_at_the_owner_once_settled"),
];

const OF_TWO_RESOLVED: Mutants = &[(Broken::DestroysNothing, "never_two_running")];

#[test]
fn every_invariant_catches_the_gateway_that_breaks_it() {
    is_found_out(&TWO, OF_TWO);
    is_found_out(&TWO_RESOLVED, OF_TWO_RESOLVED);
    is_found_out(&TWO_ARBITRATED, OF_TWO_ARBITRATED);
    is_found_out(&TWO_PIPELINED, OF_TWO_PIPELINED);
}

#[test]
fn three_sites_catch_what_two_do_and_what_two_cannot() {
    is_found_out(&THREE, OF_THREE);
    is_found_out(&THREE_ETCD, OF_THREE_ETCD);
    for (three, two, broken, invariant) in OF_THREE_ALONE {
        is_found_out(three, &[(broken, invariant)]);
        let found = (0..10_000).find(|seed| play(two, broken, invariant, *seed).is_some());
        assert_eq!(found, None, "{broken:?} was found out by two sites");
    }
}

/// The invariants that the sources in a folder look at.
pub fn invariants(folder: &str) -> BTreeSet<String> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = fs::read_dir(folder)
        .expect("a folder of sources")
        .map(|entry| entry.expect("a readable entry").path());
    let sources = paths.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let mut found = BTreeSet::new();
    for source in sources.map(|path| fs::read_to_string(path).expect("a source")) {
        for call in ["must(", "Violation::new("] {
            let arguments = source.split(call).skip(1).map(str::trim_start);
            let names = arguments.filter_map(|text| text.strip_prefix('"')?.split('"').next());
            found.extend(names.filter(|name| is_name(name)).map(str::to_owned));
        }
    }
    found
}

/// Not what happens to stand behind the calls' own names in this file.
fn is_name(text: &str) -> bool {
    text.chars().all(|each| each == '_' || each.is_ascii_lowercase())
}

#[test]
fn no_invariant_is_without_a_gateway_that_breaks_it() {
    let tables = [OF_TWO, OF_TWO_RESOLVED, OF_TWO_ARBITRATED, OF_THREE, OF_THREE_ETCD];
    let broken = tables.into_iter().flatten().map(|(_, invariant)| *invariant);
    let broken = broken.chain(OF_THREE_ALONE.map(|(_, _, _, invariant)| invariant));
    assert_eq!(invariants("tests/sim"), broken.map(str::to_owned).collect());
}

fn is_found_out(scene: &'static Scene, mutants: &[(Broken, &'static str)]) {
    for (broken, invariant) in mutants.iter().copied() {
        let found = (0..TRIES).find_map(|seed| Some((seed, play(scene, broken, invariant, seed)?)));
        let (seed, at) = found.unwrap_or_else(|| panic!("{broken:?} survived {TRIES} schedules"));
        println!("{}{broken:?}: {invariant} by seed {seed}, event {at}", scene.prefix);
    }
}

/// The event at which it is found out.
fn play(scene: &'static Scene, broken: Broken, invariant: &'static str, seed: u64) -> Option<usize> {
    let mut world = World::new(scene, Some(broken), Some(invariant));
    let (at, violation) = world.play(&of_seed(seed, scene)).err()?;
    assert_eq!(violation.invariant, invariant);
    Some(at)
}
