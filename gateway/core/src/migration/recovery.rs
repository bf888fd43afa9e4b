//! What a gateway that starts does about a migration in its journal, and what that waits for.
//!
//! One function over what the journal says and what is known of QEMU here; the daemon's recovery follows
//! it, and the journal listing prints it. In doubt the answer is to ask or to hold, never to guess. It
//! performs nothing: the machines of the two sides do, from the same last record.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, SiteName, VmName};
use crate::migration::ledger::Ownership;
use crate::migration::record::{DestinationRecord, Record, SourceRecord};

/// What is known of the machine's QEMU at this site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// The guest's processors run.
    Runs,
    /// There is one, and the guest stands still.
    StandsStill,
    /// There is none.
    Gone,
    /// It was not asked, or does not answer.
    Unknown,
}

/// What one migration is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Its last record.
    pub last: &'a Record,
    /// The epoch that it would begin or has begun.
    pub epoch: Epoch,
    /// Who owns the machine now, by this site's ledger.
    pub owner: Option<&'a Ownership>,
    /// An arbiter's register decides about it.
    pub arbitrated: bool,
    /// The guest ran when it was proposed: its user had not paused it.
    pub wanted: bool,
    /// Its arrival was written down as over: who stops it after that is its operator.
    pub settled: bool,
    /// Its QEMU here.
    pub qemu: Qemu,
    /// QEMU holds what an attempt made in it: a bound on what the guest writes, a mirror, an export.
    pub encumbered: bool,
    /// Disks of it lie here under the names that they had while it was here, or coming: what was to follow the end of
    /// its QEMU was not done.
    pub untidied: bool,
    /// Something besides the guest is to be put back, such as its name's TTL.
    pub owes_names: bool,
    /// Another attempt of the same machine came later and was not refused.
    pub overtaken: bool,
    /// An attempt to bring the machine here began later, refused or not: a QEMU may be that one's.
    pub came_again: bool,
    /// The ledger is older than a disk of the machine.
    pub stale: bool,
    /// The epoch of the anchor that stands here for the machine, if there is one.
    pub anchor: Option<Epoch>,
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NextStep {
    /// Nothing at all until an operator has looked: the journal is older than a disk of the machine.
    Hold,
    /// Source: give the attempt up durably, the guest stays.
    Abort,
    /// Either side: ask the arbiter's register, which says whose it is.
    AskArbiter,
    /// Source: say Commit until the destination runs the machine or has refused it.
    AskDestination,
    /// Source: end the QEMU of the machine that left and keep its disks aside.
    Release,
    /// Source: undo an attempt that was given up once more.
    RollBack,
    /// Destination: refuse durably and give back what is held.
    Refuse,
    /// Destination: keep what is loaded until the source says whose it is.
    AwaitSource,
    /// Destination: the machine was won; it runs here if what was loaded still stands.
    Take,
    /// Destination: give back what was won and is lost, until the register names the source.
    HandBack,
    /// Destination: let the machine run here.
    Activate,
    /// Destination: give back what a refused attempt held.
    Discard,
    /// It is over.
    Nothing,
}

/// What is done about a migration.
pub fn next_step(facts: &Facts<'_>) -> NextStep {
    if facts.stale {
        return NextStep::Hold;
    }
    match facts.last {
        Record::Source(last) => of_source(last, facts),
        Record::Destination(last) => of_destination(last, facts),
    }
}

impl Facts<'_> {
    /// Something of the machine is still here.
    fn is_left(&self) -> bool {
        self.qemu != Qemu::Gone || self.untidied
    }
}

impl NextStep {
    /// A driver goes on with it when the gateway starts.
    pub fn is_owed(self) -> bool {
        !matches!(self, Self::Nothing | Self::Hold)
    }

    /// For people: what is done, and what it waits for. `vm` is the machine, `peer` the other site.
    pub fn text(self, vm: &VmName, peer: &SiteName) -> String {
        match self {
            Self::Hold => format!(
                "hold: the journal is older than a disk of {vm}, which may run elsewhere; nothing starts it here"
            ),
            Self::Abort => format!("give the attempt up durably; {vm} stays here and site {peer} is told"),
            Self::AskDestination => {
                format!(
                    "ask site {peer} until it runs {vm} or has refused it; until then nobody starts it here"
                )
            }
            Self::AskArbiter => {
                format!(
                    "ask the arbiter whose {vm} is, this site's or site {peer}'s; until then nobody starts it here"
                )
            }
            Self::Take => format!("let {vm} run here if what was loaded still stands, else hand it back"),
            Self::HandBack => {
                format!("give back what is held and ask the arbiter until it names site {peer}")
            }
            Self::Release => format!("end the QEMU that {vm} left behind and keep its disks aside"),
            Self::RollBack => format!("undo the attempt once more; {vm} runs on here"),
            Self::Refuse => format!("refuse {vm} durably and give back what is held; site {peer} keeps it"),
            Self::AwaitSource => {
                format!("keep what is loaded and ask site {peer}, which may have given {vm} to us")
            }
            Self::Activate => format!("let {vm} run here: it is ours"),
            Self::Discard => "give back what the refused attempt still holds".to_owned(),
            Self::Nothing => "nothing".to_owned(),
        }
    }
}

fn of_source(last: &SourceRecord, facts: &Facts<'_>) -> NextStep {
    let is_latest = facts.owner.is_none_or(|owner| owner.epoch() <= facts.epoch);
    let here = matches!(facts.owner, Some(Ownership::Here { .. }));
    match last {
        SourceRecord::Reserved { .. } | SourceRecord::PreCopy { .. } | SourceRecord::Parked => {
            NextStep::Abort
        }
        SourceRecord::Offered { .. } | SourceRecord::Reclaiming { .. } | SourceRecord::Promised { .. } => {
            NextStep::AskArbiter
        }
        SourceRecord::Committed { .. } => NextStep::AskDestination,
        // One that is here was defined again under the same name, whatever its epoch.
        SourceRecord::Released if is_latest && !here && !facts.came_again && facts.is_left() => {
            NextStep::Release
        }
        SourceRecord::Released => NextStep::Nothing,
        // Undone before the crash or not: a guest that should run and stands still tells, or what QEMU holds, or a TTL.
        SourceRecord::Aborted { .. }
        | SourceRecord::Returned { .. }
        | SourceRecord::Settled
        | SourceRecord::TakenBack { .. } => {
            let begun =
                if matches!(last, SourceRecord::TakenBack { .. }) { facts.epoch.next() } else { facts.epoch };
            // One that does not answer may stand still for us.
            let stands = facts.wanted && matches!(facts.qemu, Qemu::StandsStill | Qemu::Unknown);
            let may = facts.owner.is_some_and(|owner| owner.may_undo(begun));
            // The register may still name the other site.
            let owes_register = facts.arbitrated && matches!(last, SourceRecord::Returned { .. });
            // Its addresses would be attracted for the other site while it is started here.
            let attracts = facts.anchor == Some(facts.epoch);
            if may && (stands || facts.encumbered || facts.owes_names || owes_register || attracts) {
                NextStep::RollBack
            } else {
                NextStep::Nothing
            }
        }
    }
}

fn of_destination(last: &DestinationRecord, facts: &Facts<'_>) -> NextStep {
    let is_latest = facts.owner.is_none_or(|owner| owner.epoch() <= facts.epoch);
    let ours = matches!(facts.owner, Some(Ownership::Here { .. }));
    match last {
        DestinationRecord::Reserved { .. } => NextStep::Refuse,
        DestinationRecord::Loaded if facts.qemu == Qemu::Gone => NextStep::Refuse,
        DestinationRecord::Loaded => NextStep::AwaitSource,
        // With its QEMU gone it asks for the source.
        DestinationRecord::Claiming { .. } => NextStep::AskArbiter,
        DestinationRecord::Owned { .. } if facts.qemu == Qemu::Gone => NextStep::HandBack,
        DestinationRecord::Owned { .. } => NextStep::Take,
        DestinationRecord::HandedBack { .. } if is_latest => NextStep::HandBack,
        DestinationRecord::HandedBack { .. } | DestinationRecord::Overruled => NextStep::Nothing,
        DestinationRecord::Activated { .. } | DestinationRecord::TakenOver { .. } => {
            // One that is gone crashed here: its disk is started when its operator says so.
            // Who stops it once its arrival is over is its operator.
            let stopped = matches!(facts.qemu, Qemu::StandsStill | Qemu::Unknown);
            let waits = facts.wanted && stopped && !facts.settled;
            // It came back, and what stayed here when it had left was not ended: its addresses and its name.
            let anchored = ours && facts.anchor.is_some_and(|epoch| epoch < facts.epoch);
            if is_latest && (waits || anchored) { NextStep::Activate } else { NextStep::Nothing }
        }
        // A QEMU of this name belongs to whatever came later.
        DestinationRecord::Refused { .. } => {
            if is_latest && !ours && !facts.overtaken && facts.is_left() {
                NextStep::Discard
            } else {
                NextStep::Nothing
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::message::{Handover, Refusal, Reservation};

    fn source(last: SourceRecord) -> Record {
        Record::Source(last)
    }

    fn destination(last: DestinationRecord) -> Record {
        Record::Destination(last)
    }

    fn handover() -> Box<Handover> {
        Box::new(Handover { nics: Vec::new() })
    }

    fn reservation() -> Reservation {
        Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None }
    }

    fn facts<'a>(last: &'a Record, owner: &'a Ownership, qemu: Qemu) -> Facts<'a> {
        let epoch = Epoch(5);
        let (arbitrated, wanted, owes_names) = (false, true, false);
        let (overtaken, came_again, stale, settled) = (false, false, false, false);
        let (untidied, encumbered) = (false, false);
        let (owner, anchor) = (Some(owner), None);
        Facts {
            last,
            epoch,
            owner,
            arbitrated,
            wanted,
            settled,
            qemu,
            encumbered,
            untidied,
            owes_names,
            overtaken,
            came_again,
            stale,
            anchor,
        }
    }

    #[test]
    fn what_a_killed_gateway_did_not_tidy_up_is_tidied_up_although_its_qemu_is_gone() {
        let released = source(SourceRecord::Released);
        let refused = destination(DestinationRecord::Refused { why: Refusal::Operator });
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        let arriving = Ownership::Arriving { epoch: Epoch(5) };
        for (last, owner, next) in
            [(&released, &away, NextStep::Release), (&refused, &arriving, NextStep::Discard)]
        {
            let gone = facts(last, owner, Qemu::Gone);
            assert_eq!(next_step(&gone), NextStep::Nothing);
            assert_eq!(next_step(&Facts { untidied: true, ..gone }), next);
            let here = Ownership::Here { epoch: Epoch(6) };
            let again = Facts { untidied: true, ..facts(last, &here, Qemu::Gone) };
            assert_eq!(next_step(&again), NextStep::Nothing, "the disks are of what is here now");
        }
    }

    #[test]
    fn an_attempt_given_up_resumes_only_a_machine_that_has_not_left_since() {
        let aborted = source(SourceRecord::Aborted { why: Refusal::Operator });
        let here = Ownership::Here { epoch: Epoch(4) };
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        assert_eq!(next_step(&facts(&aborted, &here, Qemu::StandsStill)), NextStep::RollBack);
        assert_eq!(next_step(&facts(&aborted, &away, Qemu::StandsStill)), NextStep::Nothing);
        assert_eq!(next_step(&facts(&aborted, &here, Qemu::Runs)), NextStep::Nothing);
        assert_eq!(next_step(&facts(&aborted, &here, Qemu::Unknown)), NextStep::RollBack, "it hangs");
    }

    #[test]
    fn what_an_attempt_given_up_left_in_a_qemu_whose_guest_runs_is_undone() {
        let here = Ownership::Here { epoch: Epoch(4) };
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        let judged = |last: SourceRecord, owner: &Ownership, encumbered, wanted| {
            let last = source(last);
            next_step(&Facts { encumbered, wanted, ..facts(&last, owner, Qemu::Runs) })
        };
        let aborted = || SourceRecord::Aborted { why: Refusal::Operator };
        for wanted in [true, false] {
            assert_eq!(judged(aborted(), &here, true, wanted), NextStep::RollBack);
            assert_eq!(judged(aborted(), &here, false, wanted), NextStep::Nothing);
            assert_eq!(judged(aborted(), &away, true, wanted), NextStep::Nothing, "it has left since");
        }
        let copying = || SourceRecord::PreCopy { reservation: reservation() };
        assert_eq!(judged(copying(), &here, true, true), NextStep::Abort, "and that undoes it");
        assert_eq!(judged(copying(), &here, false, true), NextStep::Abort);
    }

    #[test]
    fn a_visitor_that_its_operator_has_stopped_is_not_resumed() {
        let activated = destination(DestinationRecord::Activated { handover: handover() });
        let here = Ownership::Here { epoch: Epoch(5) };
        let settled = Facts { settled: true, ..facts(&activated, &here, Qemu::StandsStill) };
        assert_eq!(next_step(&settled), NextStep::Nothing);
    }

    #[test]
    fn a_machine_defined_again_is_not_released_for_the_one_that_left() {
        let released = source(SourceRecord::Released);
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        assert_eq!(next_step(&facts(&released, &away, Qemu::StandsStill)), NextStep::Release);
        let comes = Facts { came_again: true, ..facts(&released, &away, Qemu::StandsStill) };
        assert_eq!(next_step(&comes), NextStep::Nothing, "the QEMU may be the one it comes back to");
        for epoch in [Epoch(5), Epoch(6)] {
            let again = Ownership::Here { epoch };
            assert_eq!(next_step(&facts(&released, &again, Qemu::Runs)), NextStep::Nothing);
        }
    }

    #[test]
    fn a_loaded_machine_waits_for_the_source_unless_its_qemu_is_gone() {
        let loaded = destination(DestinationRecord::Loaded);
        let arriving = Ownership::Arriving { epoch: Epoch(5) };
        assert_eq!(next_step(&facts(&loaded, &arriving, Qemu::StandsStill)), NextStep::AwaitSource);
        assert_eq!(next_step(&facts(&loaded, &arriving, Qemu::Gone)), NextStep::Refuse);
    }

    #[test]
    fn in_doubt_the_arbiter_is_asked_at_both_sites() {
        let offered = Ownership::Offered { site: "b".parse().unwrap(), epoch: Epoch(5) };
        for last in [
            SourceRecord::Offered { handover: handover() },
            SourceRecord::Reclaiming { handover: handover() },
            SourceRecord::Promised { handover: handover() },
        ] {
            let last = source(last);
            for qemu in [Qemu::StandsStill, Qemu::Gone] {
                assert_eq!(next_step(&facts(&last, &offered, qemu)), NextStep::AskArbiter);
            }
        }
        let arriving = Ownership::Arriving { epoch: Epoch(5) };
        let claiming = destination(DestinationRecord::Claiming { handover: handover() });
        assert_eq!(next_step(&facts(&claiming, &arriving, Qemu::Gone)), NextStep::AskArbiter);
        let owned = destination(DestinationRecord::Owned { handover: handover() });
        assert_eq!(next_step(&facts(&owned, &arriving, Qemu::Unknown)), NextStep::Take);
        assert_eq!(next_step(&facts(&owned, &arriving, Qemu::Gone)), NextStep::HandBack);
    }

    #[test]
    fn a_machine_that_came_back_owes_the_register_the_news_until_it_is_settled() {
        let here = Ownership::Here { epoch: Epoch(5) };
        let judged = |last: SourceRecord, arbitrated| {
            next_step(&Facts { arbitrated, ..facts(&source(last), &here, Qemu::Runs) })
        };
        let returned = || SourceRecord::Returned { why: Refusal::Operator };
        assert_eq!(judged(returned(), true), NextStep::RollBack);
        assert_eq!(judged(returned(), false), NextStep::Nothing);
        assert_eq!(judged(SourceRecord::Settled, true), NextStep::Nothing);
    }

    #[test]
    fn a_machine_that_crashed_after_it_became_ours_is_not_activated_again() {
        let activated = destination(DestinationRecord::Activated { handover: handover() });
        let here = Ownership::Here { epoch: Epoch(5) };
        assert_eq!(next_step(&facts(&activated, &here, Qemu::StandsStill)), NextStep::Activate);
        assert_eq!(next_step(&facts(&activated, &here, Qemu::Unknown)), NextStep::Activate);
        assert_eq!(next_step(&facts(&activated, &here, Qemu::Gone)), NextStep::Nothing);
    }

    #[test]
    fn an_anchor_that_stands_where_the_machine_is_again_is_ended_whether_or_not_it_crashed_there() {
        let here = Ownership::Here { epoch: Epoch(5) };
        let moved_on = Ownership::Away { site: "c".parse().unwrap(), epoch: Epoch(6) };
        let judged = |last: &Record, owner: &Ownership, anchor: u64| {
            next_step(&Facts { anchor: Some(Epoch(anchor)), ..facts(last, owner, Qemu::Gone) })
        };
        let activated = destination(DestinationRecord::Activated { handover: handover() });
        assert_eq!(judged(&activated, &here, 3), NextStep::Activate, "left in epoch 3, came back in 5");
        assert_eq!(judged(&activated, &here, 5), NextStep::Nothing, "its name on the way home");
        assert_eq!(judged(&activated, &moved_on, 3), NextStep::Nothing);
        let returned = source(SourceRecord::Returned { why: Refusal::Operator });
        assert_eq!(judged(&returned, &here, 5), NextStep::RollBack, "refused after it was attracted");
        assert_eq!(judged(&returned, &here, 3), NextStep::Nothing);
        assert_eq!(judged(&returned, &moved_on, 5), NextStep::Nothing);
    }

    #[test]
    fn a_refused_attempt_does_not_end_the_qemu_of_a_later_one_of_the_same_epoch() {
        let refused = destination(DestinationRecord::Refused { why: Refusal::Operator });
        let here = Ownership::Here { epoch: Epoch(5) };
        let arriving = Ownership::Arriving { epoch: Epoch(5) };
        assert_eq!(next_step(&facts(&refused, &here, Qemu::Runs)), NextStep::Nothing);
        let overtaken = Facts { overtaken: true, ..facts(&refused, &arriving, Qemu::StandsStill) };
        assert_eq!(next_step(&overtaken), NextStep::Nothing);
        assert_eq!(next_step(&facts(&refused, &arriving, Qemu::StandsStill)), NextStep::Discard);
    }

    #[test]
    fn nothing_is_done_from_a_journal_that_is_older_than_a_disk() {
        let here = Ownership::Here { epoch: Epoch(4) };
        for last in [
            source(SourceRecord::Parked),
            source(SourceRecord::Committed { handover: handover() }),
            destination(DestinationRecord::Loaded),
        ] {
            let stale = Facts { stale: true, ..facts(&last, &here, Qemu::StandsStill) };
            assert_eq!(next_step(&stale), NextStep::Hold);
            assert!(!NextStep::Hold.is_owed());
        }
    }
}
