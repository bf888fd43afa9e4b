//! Gateways that break one promise each, and the invariant by which each is found out.

use crate::scene::{Scene, THREE, THREE_DNS, THREE_ETCD, TWO, TWO_ARBITRATED};
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
}

/// Seeds within which a broken gateway must be found out.
const TRIES: u64 = 100_000;

#[test]
fn every_invariant_catches_the_gateway_that_breaks_it() {
    is_found_out(
        &TWO,
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
            (Broken::LeavesItsQemu, "no_copy_is_left_once_settled"),
        ],
    );
    is_found_out(
        &TWO_ARBITRATED,
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

#[test]
fn three_sites_catch_what_two_do_and_what_two_cannot() {
    is_found_out(
        &THREE,
        &[
            (Broken::SourceTimesOut, "never_two_running"),
            (Broken::RefusesAfterActivated, "never_two_owners"),
            (Broken::ForgetsCommitted, "exactly_one_runs_once_healed"),
            (Broken::WritesTwice, "journal_in_order"),
        ],
    );
    is_found_out(
        &THREE_ETCD,
        &[
            (Broken::TwoPrimaries, "never_two_running"),
            (Broken::ClaimsWithoutAnAnswer, "nobody_runs_before_it_won"),
        ],
    );
    let names = "dns_points_at_the_owner_once_settled";
    for (three, two, broken, invariant) in [
        (&THREE, &TWO, Broken::OldArrivalResumes, "no_resume_without_permit"),
        (&THREE, &TWO, Broken::AnswersByTheLedger, "never_two_owners"),
        (&THREE, &TWO, Broken::TellsNobody, names),
        (&THREE, &TWO, Broken::BelievesAnybody, names),
        (&THREE_DNS, &TWO_ARBITRATED, Broken::NotesInDoubt, names),
    ] {
        is_found_out(three, &[(broken, invariant)]);
        let found = (0..10_000).find(|seed| play(two, broken, invariant, *seed).is_some());
        assert_eq!(found, None, "{broken:?} was found out by two sites");
    }
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
    let (at, violation) = world.play(&of_seed(seed, scene.sites)).err()?;
    assert_eq!(violation.invariant, invariant);
    Some(at)
}
