//! The ownership protocol, searched exhaustively: unlimited loss, doubling, reordering, crashes of
//! gateways and loss of hosts, in every commit mode and over three sites; and the mutants that show
//! that the search would find what is wrong.
//!
//! Searches a model, not the code; `conformance` drives the code's machines along every edge of it.

mod arbiter;
mod arbitrated;
mod conformance;
mod handover;
mod search;
mod state;
#[path = "../support/mod.rs"]
mod support;

use arbiter::{Arbiter, Needs};
use handover::{Handover, Label, Mode, Mutant, Then};
use search::{Found, Model, search};

fn holds<M: Model>(name: &str, model: &M) -> Found<M> {
    let found = search(model);
    println!("{name}: {} states, {} transitions", found.states.len(), found.transitions);
    assert!(found.counterexample.is_none(), "{name}: {:?}", found.counterexample);
    found
}

fn is_caught<M: Model>(name: &str, model: &M, invariant: &str) {
    let found = search(model);
    let example =
        found.counterexample.unwrap_or_else(|| panic!("{name} survived {} states", found.states.len()));
    println!("{name}: {} after {} steps", example.invariant, example.trace.len());
    assert_eq!(example.invariant, invariant, "{name}: {:?}", example.trace);
}

fn handover(mode: Mode, then: Then, mutant: Option<Mutant>) -> Handover {
    Handover { mode, then, mutant }
}

fn never_stuck(mode: Mode, then: Then) {
    let model = handover(mode, then, None);
    let name = format!("{mode:?}, then {then:?}");
    let found = holds(&name, &model);
    let stuck = found.stuck(&model, |_| true);
    let first = stuck.first().map(|at| (found.states[*at], found.trace(*at)));
    assert!(stuck.is_empty(), "{name}: {} states never settle, such as {first:#?}", stuck.len());
}

#[test]
fn confirmed_never_runs_two_and_always_settles() {
    never_stuck(Mode::Confirmed, Then::Nowhere);
}

#[test]
fn pipelined_never_runs_two_and_always_settles() {
    never_stuck(Mode::Pipelined, Then::Nowhere);
}

#[test]
fn a_second_attempt_to_a_third_site_does_neither() {
    never_stuck(Mode::Confirmed, Then::Retry);
}

#[test]
fn a_second_move_to_a_third_site_does_neither() {
    never_stuck(Mode::Confirmed, Then::Onward);
    never_stuck(Mode::Pipelined, Then::Onward);
}

#[test]
fn a_way_back_does_neither() {
    never_stuck(Mode::Confirmed, Then::Back);
    never_stuck(Mode::Pipelined, Then::Back);
}

#[test]
fn every_mutant_that_breaks_a_promise_is_caught() {
    let cases = [
        (Mutant::SourceTimesOut, Then::Nowhere, "no_resume_without_permit"),
        (Mutant::DestinationTimesOut, Then::Nowhere, "never_two_owners"),
        (Mutant::UnknownIsRefused, Then::Nowhere, "unknown_is_not_refused"),
        (Mutant::CommitsBeforeRecord, Then::Nowhere, "journal_precedes_message"),
        (Mutant::ResumesBeforeRecord, Then::Nowhere, "no_resume_without_permit"),
        (Mutant::RefusesAfterActivated, Then::Nowhere, "never_two_owners"),
        (Mutant::OldAbortResumes, Then::Retry, "no_resume_without_permit"),
        (Mutant::RollsBackWithoutResuming, Then::Nowhere, "rollback_leaves_source_running"),
        (Mutant::ForgetsRefusal, Then::Nowhere, "journal_precedes_message"),
        (Mutant::StartGateOpen, Then::Nowhere, "no_resume_without_permit"),
    ];
    for mode in [Mode::Confirmed, Mode::Pipelined] {
        for (mutant, then, invariant) in cases {
            is_caught(&format!("{mode:?} {mutant:?}"), &handover(mode, then, Some(mutant)), invariant);
        }
    }
}

/// The same, asked for the last invariant only: the others are violated on the way.
struct OnlyTwoRunning(Handover);

impl Model for OnlyTwoRunning {
    type State = state::State;
    type Label = Label;

    fn start(&self) -> state::State {
        self.0.start()
    }

    fn moves(&self, state: &state::State) -> Vec<search::Move<Label, state::State>> {
        self.0.moves(state)
    }

    fn violated(&self, state: &state::State) -> Option<&'static str> {
        let running = state.guests.iter().filter(|guest| **guest == state::Guest::Running);
        (running.count() > 1).then_some("never_two_running")
    }

    fn is_settled(&self, state: &state::State) -> bool {
        self.0.is_settled(state)
    }

    fn is_lost(&self, state: &state::State) -> bool {
        self.0.is_lost(state)
    }
}

#[test]
fn the_broken_ones_do_run_two() {
    for (mutant, then) in [
        (Mutant::SourceTimesOut, Then::Nowhere),
        (Mutant::DestinationTimesOut, Then::Nowhere),
        (Mutant::RefusesAfterActivated, Then::Nowhere),
        (Mutant::OldAbortResumes, Then::Retry),
        (Mutant::StartGateOpen, Then::Nowhere),
    ] {
        let model = OnlyTwoRunning(handover(Mode::Confirmed, then, Some(mutant)));
        is_caught(&format!("{mutant:?}"), &model, "never_two_running");
    }
}

#[test]
fn a_journal_that_says_nothing_once_done_is_caught() {
    let model = handover(Mode::Confirmed, Then::Nowhere, Some(Mutant::SilentOnceDone));
    let found = holds("SilentOnceDone", &model);
    let stuck = found.stuck(&model, |_| true);
    let first = *stuck.first().expect("a destination that nobody frees");
    println!(
        "nothing_reserved_once_settled: {} states after {} steps",
        stuck.len(),
        found.trace(first).len()
    );
}

#[test]
fn a_destination_restored_from_an_old_backup_waits_and_never_runs_two() {
    let model = handover(Mode::Confirmed, Then::Nowhere, Some(Mutant::OldBackup));
    let found = holds("old backup", &model);
    assert!(!found.stuck(&model, |_| true).is_empty(), "somebody guessed");
}

#[test]
fn an_operator_is_needed_by_nobody_but_a_dead_guest() {
    let model = handover(Mode::Confirmed, Then::Nowhere, None);
    let found = search(&model);
    let without_boot = found.stuck(&model, |label| !matches!(label, Label::Boot(_)));
    assert!(without_boot.is_empty(), "{} states", without_boot.len());
}

#[test]
fn with_an_arbiter_never_two_run_and_a_partition_blocks_nobody() {
    let model = Arbiter { mutant: None };
    let found = holds("arbiter", &model);
    let stuck = |needs: &[Needs]| found.stuck(&model, |label| !needs.contains(&label.1)).len();
    // The reference's has 300 and 860.
    assert_eq!((found.states.len(), found.transitions), (302, 860), "not the known model any more");
    assert_eq!(stuck(&[]), 0, "all links heal");
    assert_eq!(stuck(&[Needs::Wan]), 0, "the WAN is cut for ever");
    println!(
        "arbiter: away for ever {}, with the WAN {}",
        stuck(&[Needs::Arbiter]),
        stuck(&[Needs::Arbiter, Needs::Wan])
    );
    // A source that asked for itself and a destination that claimed: only the arbiter knows.
    assert_eq!(stuck(&[Needs::Arbiter]), 3);
}

#[test]
fn every_mutant_with_an_arbiter_is_caught() {
    for mutant in [
        arbiter::Mutant::SourceTimesOut,
        arbiter::Mutant::DestinationTimesOut,
        arbiter::Mutant::GrantAfterAbort,
    ] {
        is_caught(&format!("arbiter {mutant:?}"), &Arbiter { mutant: Some(mutant) }, "never_two_running");
    }
}

#[test]
fn a_refusal_while_a_claim_is_under_way_is_absorbed() {
    // Rule of the reference: gone, then refused, takes the machine back by the register.
    let model = Arbiter { mutant: Some(arbiter::Mutant::RefusesWhileClaiming) };
    let found = holds("arbiter RefusesWhileClaiming", &model);
    assert!(found.stuck(&model, |_| true).is_empty());
}
