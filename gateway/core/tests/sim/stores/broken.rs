//! Gateways that break one rule of what sites keep, and the invariant by which each is found out.

use std::collections::BTreeSet;

use super::world::World;

/// A gateway that breaks one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The source begins with what it keeps, whatever the destination has named.
    BeginsUnnamed,
    /// The destination names its file and reads what lies there later.
    ReadsAnother,
    /// What was remembered is kept although the machine did not move.
    KeepsWhatWasAborted,
    /// What cannot be used is not forgotten.
    KeepsWhatIsDamaged,
    /// What was remembered is in the gateway's memory only.
    LosesItWithItsGateway,
    /// The destination says of its copy what it was when it was told of, and puts what it is now.
    AnswersByItsMap,
    /// The disk overwrites what pages are named by without asking.
    DoesNotAsk,
}

/// Schedules within which a broken gateway must be found out.
const TRIES: u64 = 1_000;
/// One that was found out so often need not be played any more.
const ENOUGH: usize = 5;

const MUTANTS: [(Broken, &str); 7] = [
    (Broken::BeginsUnnamed, "no_page_from_an_unacknowledged_base"),
    (Broken::ReadsAnother, "no_page_from_an_unacknowledged_base"),
    (Broken::KeepsWhatWasAborted, "stores_identical"),
    (Broken::KeepsWhatIsDamaged, "memory_arrives"),
    (Broken::LosesItWithItsGateway, "a_way_back_costs_what_changed"),
    (Broken::AnswersByItsMap, "disk_arrives"),
    (Broken::DoesNotAsk, "memory_arrives"),
];

#[test]
fn every_rule_of_what_sites_keep_is_needed() {
    for (broken, invariant) in MUTANTS {
        let is_found_out = |seed: &u64| {
            let played = World::new(*seed, Some(broken), Some(invariant)).play();
            assert!(played.as_ref().err().is_none_or(|found| found.invariant == invariant));
            played.is_err()
        };
        let found: Vec<u64> = (0..TRIES).filter(is_found_out).take(ENOUGH).collect();
        let last = found.last().unwrap_or_else(|| panic!("{broken:?} survived {TRIES} schedules"));
        println!("stores-{broken:?}: {invariant} in {} of {} schedules", found.len(), last + 1);
    }
}

#[test]
fn no_invariant_of_what_sites_keep_is_without_a_gateway_that_breaks_it() {
    let broken = BTreeSet::from(MUTANTS.map(|(_, invariant)| invariant.to_owned()));
    assert_eq!(crate::broken::invariants("tests/sim/stores"), broken);
}
