//! The ownership protocol, searched exhaustively: unlimited loss, doubling, reordering, crashes of
//! gateways and loss of hosts, in every commit mode and over three sites; and the mutants that show
//! that the search would find what is wrong.
//!
//! Searches a model, not the code; `conformance` drives the code's machines along every edge of `confirmed` and of `pipelined`,
//! `arbitrated` along every edge of the mode with an arbiter.
//!
//! An arbiter decides between two sites here, about one move; a third site, a second move and a register that is put back
//! are the simulation's alone.

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
fn a_source_that_does_not_say_what_it_has_lost_behind_its_commit_leaves_both_waiting() {
    let model = handover(Mode::Pipelined, Then::Nowhere, Some(Mutant::WaitsForWhatIsLost));
    let found = holds("WaitsForWhatIsLost", &model);
    let stuck = found.stuck(&model, |_| true);
    println!("WaitsForWhatIsLost: {} states never settle", stuck.len());
    assert!(!stuck.is_empty());
}

#[test]
fn a_second_attempt_to_a_third_site_does_neither() {
    never_stuck(Mode::Confirmed, Then::Retry);
    never_stuck(Mode::Pipelined, Then::Retry);
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

/// The states that never settle if these are out of reach for ever.
fn waiting<M>(model: &M, away: &[Needs]) -> Vec<M::State>
where
    M: Model<Label = arbiter::Label>,
{
    let found = search(model);
    let stuck = found.stuck(model, |label| label.is_possible_without(away));
    stuck.into_iter().map(|at| found.states[at].clone()).collect()
}

fn stuck<M: Model<Label = arbiter::Label>>(model: &M, away: &[Needs]) -> usize {
    waiting(model, away).len()
}

/// The same, asked only whether one of two copies runs: with the register away for ever nothing is paid to it, and who
/// has lost the other copy does not learn it.
struct OneRuns(Arbiter);

impl Model for OneRuns {
    type State = arbiter::State;
    type Label = arbiter::Label;

    fn start(&self) -> arbiter::State {
        self.0.start()
    }

    fn moves(&self, state: &arbiter::State) -> Vec<search::Move<arbiter::Label, arbiter::State>> {
        self.0.moves(state)
    }

    fn violated(&self, state: &arbiter::State) -> Option<&'static str> {
        self.0.violated(state)
    }

    fn is_settled(&self, state: &arbiter::State) -> bool {
        (state.source_guest == arbiter::Guest::Running)
            != (state.destination_guest == arbiter::Guest::Running)
    }

    fn is_lost(&self, state: &arbiter::State) -> bool {
        state.source_guest == arbiter::Guest::Gone || state.destination_guest == arbiter::Guest::Gone
    }
}

#[test]
fn with_an_arbiter_never_two_run_and_a_partition_blocks_nobody() {
    let model = Arbiter { mutant: None };
    let found = holds("arbiter", &model);
    // The reference's has 300 and 860.
    assert_eq!((found.states.len(), found.transitions), (302, 860), "not the known model any more");
    assert_eq!(stuck(&model, &[]), 0, "all links heal");
    // Refused in a cut after it was promised: the one who knows cannot say so, and the register names him.
    let cut = waiting(&model, &[Needs::Wan]);
    println!("arbiter: the WAN is cut for ever {}", cut.len());
    assert!(cut.iter().all(|state| state.sent.grant), "{cut:?}");
    let runs = OneRuns(model);
    let away = stuck(&runs, &[Needs::Arbiter]);
    println!("arbiter: away for ever {away}, with the WAN {}", stuck(&runs, &[Needs::Arbiter, Needs::Wan]));
    // A source that asked for itself and a destination that claimed: only the arbiter knows.
    assert_eq!(away, 3);
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
fn a_refusal_while_a_claim_is_under_way_leaves_nobody_the_machine_in_a_partition() {
    // As long as the refusal arrives it is absorbed: gone, then refused, takes the machine back by the register.
    let model = Arbiter { mutant: Some(arbiter::Mutant::RefusesWhileClaiming) };
    holds("arbiter RefusesWhileClaiming", &model);
    assert_eq!(stuck(&model, &[]), 0);
    let cut = waiting(&model, &[Needs::Wan]);
    let alone = cut.iter().filter(|state| !state.sent.grant).count();
    println!("arbiter RefusesWhileClaiming: {alone} states wait in a partition without a promise");
    assert!(alone > 0);
}

#[test]
fn a_source_that_came_back_and_does_not_say_so_at_the_register_leaves_it_wrong() {
    let model = Arbiter { mutant: Some(arbiter::Mutant::NeverPays) };
    holds("arbiter NeverPays", &model);
    let wrong = stuck(&model, &[]);
    println!("arbiter NeverPays: {wrong} states with a register that names somebody else");
    assert!(wrong > 0);
    assert_eq!(stuck(&OneRuns(model), &[]), 0, "it runs all the same");
}
