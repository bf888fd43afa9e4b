//! A machine that waits is woken now and then, not without end: a deadline that was handled lies ahead again.

use std::time::Duration;

use longhaul_core::ids::Epoch;
use longhaul_core::migration::message::MigrationMessage;
use longhaul_core::migration::record::SourceRecord;
use longhaul_core::migration::source::{Event, Outcome, Source, SourceLimits};
use longhaul_core::migration::{CommitMode, Stage};

use crate::parts::{Move, handover, name, proposal, reservation};
use crate::scene::{A, B, TWO, TWO_ARBITRATED};

fn wakings_of_a_long_cut(commit: CommitMode, last: SourceRecord) -> u32 {
    let limits = SourceLimits::default();
    let attempt = Move { source: A, destination: B, epoch: Epoch(5), commit }.at(A, 1);
    let (mut source, _) = Source::recover(attempt, last, limits, name(A), Duration::ZERO);
    let (mut now, mut wakings) = (limits.cut_limit * 2, 0);
    while let Some(at) = source.deadline().filter(|at| *at < limits.cut_limit * 3) {
        now = now.max(at);
        let (after, _) = source.handle(Event::Tick, now);
        source = after;
        wakings += 1;
        assert!(wakings < 10_000, "woken without end at {now:?}");
    }
    wakings
}

#[test]
fn a_source_that_waits_for_the_other_side_through_a_long_cut_sleeps_between_its_questions() {
    let committed = SourceRecord::Committed { handover: handover() };
    let offered = SourceRecord::Offered { handover: handover() };
    for (scene, last) in [(&TWO, committed), (&TWO_ARBITRATED, offered)] {
        let commit = scene.routes[0].commit;
        // Once in each `repeat`, and no oftener.
        assert!(wakings_of_a_long_cut(commit, last) <= 601);
    }
}

/// A source that waits for an answer, to its proposal or to its reservation.
fn waiting_for(stage: Stage, now: Duration) -> Source {
    let attempt = Move { source: A, destination: B, epoch: Epoch(5), commit: CommitMode::Confirmed }.at(A, 1);
    let (source, _) = Source::begin(attempt, SourceLimits::default(), true, now);
    let mut events = vec![Event::LinkUp, Event::PreflightPassed(proposal(Epoch(5), CommitMode::Confirmed))];
    if stage == Stage::Reservation {
        events.push(Event::Peer(MigrationMessage::Accept));
    }
    let source = events.into_iter().fold(source, |source, event| source.handle(event, now).0);
    assert_eq!(source.stage(), stage);
    source
}

/// Lets time go by until `end`; gives how often the source was woken.
fn sleep_until(mut source: Source, from: Duration, end: Duration) -> (Source, u32) {
    let (mut now, mut wakings) = (from, 0);
    while let Some(at) = source.deadline().filter(|at| *at < end) {
        now = now.max(at);
        source = source.handle(Event::Tick, now).0;
        wakings += 1;
        assert!(wakings < 10_000, "woken without end at {now:?}");
    }
    (source, wakings)
}

#[test]
fn a_cut_before_anything_is_copied_costs_time_and_nothing_else_up_to_its_limit() {
    let limits = SourceLimits::default();
    for stage in [Stage::PreMigration, Stage::Reservation] {
        let cut_at = Duration::from_secs(1);
        let source = waiting_for(stage, Duration::ZERO).handle(Event::LinkDown, cut_at).0;
        let healed_at = cut_at + limits.cut_limit - Duration::from_secs(1);
        let (source, wakings) = sleep_until(source, cut_at, healed_at);
        assert!(wakings <= 1, "{stage:?}: woken {wakings} times while nobody can answer");
        let (source, step) = source.handle(Event::LinkUp, healed_at);
        assert!(!step.after_record().is_empty(), "{stage:?}: it does not ask again");
        // As late as one that was never cut would be heard.
        let answered_at = healed_at + limits.answer - Duration::from_millis(1);
        let (mut source, _) = sleep_until(source, healed_at, answered_at);
        if stage == Stage::PreMigration {
            source = source.handle(Event::Peer(MigrationMessage::Accept), answered_at).0;
        }
        let (source, _) = source.handle(Event::Peer(MigrationMessage::Reserved(reservation())), answered_at);
        assert_eq!((source.stage(), source.outcome()), (Stage::PreCopy, None), "cut in {stage:?}");
    }
}

#[test]
fn a_peer_that_hears_and_says_nothing_ends_the_attempt_and_so_does_a_cut_beyond_its_limit() {
    let limits = SourceLimits::default();
    for stage in [Stage::PreMigration, Stage::Reservation] {
        let over = |source: &Source| {
            matches!(source.outcome(), Some(Outcome::Stayed(_))) || source.aborting().is_some()
        };
        let (silent, _) = sleep_until(waiting_for(stage, Duration::ZERO), Duration::ZERO, limits.answer * 2);
        assert!(over(&silent), "{stage:?}: {:?}", silent.outcome());
        let cut = waiting_for(stage, Duration::ZERO).handle(Event::LinkDown, Duration::ZERO).0;
        let (cut, _) = sleep_until(cut, Duration::ZERO, limits.cut_limit + Duration::from_secs(1));
        assert!(over(&cut), "{stage:?}: {:?}", cut.outcome());
    }
}
