//! A peer of a migration that lies: messages of other epochs, out of order, before their time.
//!
//! Whatever it says, a destination takes no machine that was not loaded and committed in this epoch, and a
//! source that has committed takes nothing back but by a refusal of this epoch. That another site does not
//! speak at all is the gateway's business, and not asked here.

mod support;

use std::time::Duration;

use longhaul_core::ids::{Epoch, MigrationId, SiteName};
use longhaul_core::migration::arbiter::Arbiter;
use longhaul_core::migration::message::{Handover, MigrationMessage, Proposal, Refusal, Reservation};
use longhaul_core::migration::record::{DestinationRecord, Record, SourceRecord};
use longhaul_core::migration::step::Step;
use longhaul_core::migration::{Attempt, CommitMode, destination, source};
use proptest::prelude::*;

const NOW: Duration = Duration::ZERO;
const EPOCH: Epoch = Epoch(5);

fn name(name: &str) -> SiteName {
    name.parse().expect("a literal name")
}

const ARBITRATED: CommitMode = CommitMode::Arbitrated(Arbiter::Dns);

fn attempt(peer: &str, commit: CommitMode) -> Attempt {
    let vm = "web1".parse().expect("a literal name");
    Attempt { id: MigrationId(7), vm, peer: name(peer), epoch: EPOCH, commit }
}

fn proposal() -> Box<Proposal> {
    Box::new(Proposal {
        definition: support::definition(),
        home_site: name("a"),
        hypervisor: "7.2".into(),
        epoch: Epoch(4),
        running: true,
        commit: CommitMode::Confirmed,
        nics: Vec::new(),
        carried: Vec::new(),
    })
}

fn commit(epoch: Epoch) -> MigrationMessage {
    MigrationMessage::Commit { epoch, handover: Box::new(Handover { nics: Vec::new() }) }
}

fn offer(epoch: Epoch) -> MigrationMessage {
    MigrationMessage::Offer { epoch, handover: Box::new(Handover { nics: Vec::new() }) }
}

/// Every message, of an old, this and a later epoch.
fn any_message() -> impl Strategy<Value = MigrationMessage> {
    let epoch = || (4u64..=6).prop_map(Epoch);
    let why = Refusal::Other("a lie".into());
    let (refused, aborted) = (why.clone(), why.clone());
    prop_oneof![
        Just(MigrationMessage::Propose(proposal())),
        Just(MigrationMessage::Accept),
        epoch().prop_map(|epoch| MigrationMessage::Reserve { epoch }),
        Just(MigrationMessage::Reserved(Reservation {
            care_of: Vec::new(),
            shadow_pages: 0,
            disk_window_log: 20,
            memory_base: None,
        })),
        Just(MigrationMessage::Decline(why)),
        epoch().prop_map(|epoch| MigrationMessage::Loaded { epoch }),
        epoch().prop_map(commit),
        epoch().prop_map(offer),
        epoch().prop_map(|epoch| MigrationMessage::TakenBack { epoch }),
        epoch().prop_map(|epoch| MigrationMessage::Activated { epoch }),
        epoch().prop_map(move |epoch| MigrationMessage::Refused { epoch, why: refused.clone() }),
        epoch().prop_map(move |epoch| MigrationMessage::Abort { epoch, why: aborted.clone() }),
        Just(MigrationMessage::Unknown),
    ]
}

fn reserved() -> destination::Destination {
    reserved_by(CommitMode::Confirmed)
}

fn reserved_by(commit: CommitMode) -> destination::Destination {
    let (limits, reservation) = (
        destination::DestinationLimits::default(),
        Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None },
    );
    destination::Destination::begin(attempt("a", commit), proposal(), reservation, limits, NOW).0
}

fn loaded() -> destination::Destination {
    let (machine, _) = reserved().handle(destination::Event::Prepared, NOW);
    machine.handle(destination::Event::Loaded, NOW).0
}

/// With an arbiter it has offered.
fn committed_by(commit: CommitMode) -> source::Source {
    let begun = source::Source::begin(attempt("b", commit), source::SourceLimits::default(), false, NOW).0;
    let handover = Box::new(Handover { nics: Vec::new() });
    let events = [
        source::Event::PreflightPassed(proposal()),
        source::Event::Peer(MigrationMessage::Accept),
        source::Event::Peer(MigrationMessage::Reserved(Reservation {
            care_of: Vec::new(),
            shadow_pages: 0,
            disk_window_log: 20,
            memory_base: None,
        })),
        source::Event::Progress(support::converged()),
        source::Event::GuestStopped,
        source::Event::Parked(handover),
        source::Event::Peer(MigrationMessage::Loaded { epoch: EPOCH }),
    ];
    events.into_iter().fold(begun, |machine, event| machine.handle(event, NOW).0)
}

fn committed() -> source::Source {
    committed_by(CommitMode::Confirmed)
}

fn activates(step: Step<destination::Action>) -> bool {
    step.after_record().iter().any(|action| matches!(action, destination::Action::Activate(..)))
}

fn rolls_back(step: Step<source::Action>) -> bool {
    step.after_record().iter().any(|action| matches!(action, source::Action::Rollback(_)))
}

fn is_empty<A>(step: Step<A>) -> bool {
    step.pending_record().is_none() && step.after_record().is_empty()
}

#[test]
fn an_operator_of_the_destination_ends_an_arrival_until_it_is_loaded_and_not_after_that() {
    let receiving = reserved().handle(destination::Event::Prepared, NOW).0;
    for machine in [reserved(), receiving] {
        let (machine, step) = machine.handle(destination::Event::AbortRequested, NOW);
        let refused = DestinationRecord::Refused { why: Refusal::Operator };
        assert_eq!(step.pending_record(), Some(&Record::Destination(refused)));
        assert!(step.after_record().contains(&destination::Action::Discard));
        assert!(!activates(machine.handle(destination::Event::Peer(commit(EPOCH)), NOW).1));
    }
    // The source may have given it away by now.
    let (machine, step) = loaded().handle(destination::Event::AbortRequested, NOW);
    assert!(is_empty(step));
    let (machine, step) = machine.handle(destination::Event::Peer(commit(EPOCH)), NOW);
    assert!(activates(step));
    assert!(is_empty(machine.handle(destination::Event::AbortRequested, NOW).1));
}

#[test]
fn a_commit_before_the_machine_is_loaded_is_refused_durably() {
    for prepared in [false, true] {
        let machine = reserved();
        let machine = if prepared { machine.handle(destination::Event::Prepared, NOW).0 } else { machine };
        let (machine, step) = machine.handle(destination::Event::Peer(commit(EPOCH)), NOW);
        let refused = step.pending_record();
        assert!(
            matches!(refused, Some(Record::Destination(DestinationRecord::Refused { .. }))),
            "{refused:?}"
        );
        assert!(!activates(step));
        let (_, step) = machine.handle(destination::Event::Loaded, NOW);
        assert!(is_empty(step), "what was refused does not come after all");
    }
}

#[test]
fn replayed_commits_and_aborts_of_other_epochs_change_nothing() {
    for epoch in [Epoch(0), Epoch(4), Epoch(6), Epoch(u64::MAX)] {
        let abort = MigrationMessage::Abort { epoch, why: Refusal::Operator };
        let mut machine = loaded();
        for lie in [commit(epoch), abort, MigrationMessage::Reserve { epoch }] {
            let (next, step) = machine.handle(destination::Event::Peer(lie), NOW);
            assert!(is_empty(step));
            machine = next;
        }
        let (_, step) = machine.handle(destination::Event::Peer(commit(EPOCH)), NOW);
        assert!(activates(step), "the true commit still counts");
    }
}

#[test]
fn a_second_commit_activates_nothing_twice() {
    let (machine, step) = loaded().handle(destination::Event::Peer(commit(EPOCH)), NOW);
    assert!(activates(step));
    let (machine, step) = machine.handle(destination::Event::Peer(commit(EPOCH)), NOW);
    assert!(!activates(step));
    let (machine, _) = machine.handle(destination::Event::Activated, NOW);
    let (_, step) = machine.handle(destination::Event::Peer(commit(EPOCH)), NOW);
    assert!(!activates(step));
}

#[test]
fn a_committed_source_releases_only_what_was_activated_in_this_epoch() {
    for epoch in [Epoch(4), Epoch(6)] {
        let activated = MigrationMessage::Activated { epoch };
        assert!(is_empty(committed().handle(source::Event::Peer(activated), NOW).1));
    }
    let activated = MigrationMessage::Activated { epoch: EPOCH };
    let (_, step) = committed().handle(source::Event::Peer(activated), NOW);
    assert!(matches!(step.pending_record(), Some(Record::Source(SourceRecord::Released))));
}

/// Until it is refused in this epoch, whatever is said leaves the machine given away.
fn only_a_refusal_takes_back(
    mut machine: source::Source,
    said: Vec<MigrationMessage>,
) -> Result<(), TestCaseError> {
    for message in said {
        let refused = matches!(&message, MigrationMessage::Refused { epoch, .. } if *epoch == EPOCH);
        let (next, step) = machine.handle(source::Event::Peer(message), NOW);
        prop_assert!(refused || !rolls_back(step));
        if refused {
            return Ok(());
        }
        machine = next;
    }
    Ok(())
}

proptest! {
    #[test]
    fn nothing_that_is_said_activates_a_machine_that_was_not_loaded(
        said in prop::collection::vec(any_message(), 0..30),
        prepared_after in 0usize..30,
    ) {
        let mut machine = reserved();
        for (at, message) in said.into_iter().enumerate() {
            if at == prepared_after {
                machine = machine.handle(destination::Event::Prepared, NOW).0;
            }
            let (next, step) = machine.handle(destination::Event::Peer(message), NOW);
            prop_assert!(!activates(step));
            machine = next;
        }
    }

    #[test]
    fn nothing_but_a_refusal_of_this_epoch_takes_a_committed_machine_back(
        said in prop::collection::vec(any_message(), 0..30),
    ) {
        only_a_refusal_takes_back(committed(), said)?;
    }

    #[test]
    fn with_an_arbiter_nothing_that_is_said_activates_a_machine_before_it_was_looked_at(
        said in prop::collection::vec(any_message(), 0..30),
    ) {
        let (mut machine, _) = reserved_by(ARBITRATED).handle(destination::Event::Prepared, NOW);
        machine = machine.handle(destination::Event::Loaded, NOW).0;
        for message in said {
            let (next, step) = machine.handle(destination::Event::Peer(message), NOW);
            prop_assert!(!activates(step));
            machine = next;
        }
    }

    #[test]
    fn nothing_but_a_refusal_of_this_epoch_takes_an_offered_machine_back_unasked(
        said in prop::collection::vec(any_message(), 0..30),
    ) {
        only_a_refusal_takes_back(committed_by(ARBITRATED), said)?;
    }

    #[test]
    fn nothing_that_is_said_before_the_guest_stands_still_commits_it(
        said in prop::collection::vec(any_message(), 0..30),
    ) {
        let limits = source::SourceLimits::default();
        let mut machine = source::Source::begin(attempt("b", CommitMode::Confirmed), limits, false, NOW).0;
        machine = machine.handle(source::Event::PreflightPassed(proposal()), NOW).0;
        for message in said {
            let (next, step) = machine.handle(source::Event::Peer(message), NOW);
            let committed = matches!(step.pending_record(), Some(Record::Source(SourceRecord::Committed { .. })));
            prop_assert!(!committed);
            machine = next;
        }
    }
}
