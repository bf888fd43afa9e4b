//! A machine that waits is woken now and then, not without end: a deadline that was handled lies ahead again.

use std::time::Duration;

use longhaul_core::ids::Epoch;
use longhaul_core::migration::CommitMode;
use longhaul_core::migration::record::SourceRecord;
use longhaul_core::migration::source::{Event, Source, SourceLimits};

use crate::parts::{Move, handover, name};
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
