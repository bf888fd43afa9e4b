//! An operator decides for a peer that is gone for good: `longhaul resolve`.
//!
//! The protocol never needs this while the peer can be reached, and never guesses without it. Whoever keeps the
//! machine here states that the other copy is destroyed; that statement is what stands in for the peer's word, and
//! it is recorded. Nothing here can check it: if it is untrue, two copies run. To let the machine be there wants no
//! statement, for it starts nothing here.

use serde::{Deserialize, Serialize};

use crate::ids::{SiteName, VmName};
use crate::migration::record::{DestinationRecord, Record, SourceRecord};

/// Where the machine is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// At this site.
    Here,
    /// At the other one.
    There,
}

/// What an operator may decide. Made by [`resolution`] only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution(Decided);

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decided {
    /// Ours; the copy at that site is destroyed.
    Ours { destroyed: SiteName },
    /// Never ours in this epoch.
    Theirs,
}

/// Why nothing is decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotResolve {
    /// The peer is not needed, or has been given up already.
    #[error("No move of {0} waits for the other site's word; `longhaul journal {0}` says how it stands")]
    NothingWaits(VmName),
    /// It would start a copy without the statement that there is no other.
    #[error(
        "To keep {vm} here, say `--i-have-destroyed-the-other-copy={peer}`, and only if it is true: if site {peer} runs \
         {vm}, or its host comes back and does, two copies run, and what either of them writes is lost when one is \
         ended. {risk}"
    )]
    Unconfirmed {
        /// The machine.
        vm: VmName,
        /// The site whose copy must be destroyed.
        peer: SiteName,
        /// What is lost even if it is true.
        risk: &'static str,
    },
    /// The statement names another site.
    #[error("The other copy of {vm} is at site {peer}, not at {named}; nothing was decided")]
    OtherSite {
        /// The machine.
        vm: VmName,
        /// Where it is.
        peer: SiteName,
        /// What was said.
        named: SiteName,
    },
    /// An arbiter decides, and has not been heard yet.
    #[error(
        "The arbiter's register says whose {vm} is, neither site {peer} nor an operator; this site asks it again by \
         itself. If it does not answer, repair the name server; `longhaul journal {vm}` says what is asked"
    )]
    RegisterDecides {
        /// The machine.
        vm: VmName,
        /// The other site.
        peer: SiteName,
    },
    /// The gateways see each other, and it is not about what only an operator can see.
    #[error(
        "Site {0} can be reached: the two gateways settle it themselves, and nobody need decide. If it has lost its journal \
         and does not run the machine, stop its gateway, end what is left of the machine's QEMU there, and say the same again"
    )]
    PeerAnswers(SiteName),
    /// It was given to the peer; giving it again decides nothing.
    #[error(
        "{vm} is site {peer}'s already: nothing starts it here; it is released when site {peer} says that it runs. If \
         site {peer} can be reached, runs it (its QEMU reads `running`; `paused` says so only of a machine that its user had paused before the \
         move, for one that never ran there may read so too) and has forgotten that it came (its journal was restored from a \
         backup), say the same again once the link is up"
    )]
    TheirsAlready {
        /// The machine.
        vm: VmName,
        /// Its owner.
        peer: SiteName,
    },
}

impl Resolution {
    pub(super) fn decided(self) -> Decided {
        self.0
    }
}

/// What an operator's word decides about a migration with `peer` whose last record is `last`. A peer that can be
/// `reached` settles it, but for what its journal may have forgotten: that the machine runs there, and that this site
/// holds one for it.
pub fn resolution(
    last: &Record,
    keep: Keep,
    destroyed: Option<&SiteName>,
    vm: &VmName,
    peer: &SiteName,
    reached: bool,
) -> Result<Resolution, CannotResolve> {
    let (vm, peer) = (vm.clone(), peer.clone());
    if reached && keep == Keep::Here {
        return Err(CannotResolve::PeerAnswers(peer));
    }
    let risk = match last {
        Record::Source(SourceRecord::Committed { .. }) if keep == Keep::There && reached => {
            return Ok(Resolution(Decided::Theirs));
        }
        Record::Source(SourceRecord::Committed { .. }) if keep == Keep::There => {
            return Err(CannotResolve::TheirsAlready { vm, peer });
        }
        Record::Source(SourceRecord::Committed { .. }) => {
            "What the machine did there, if it ran there, is lost: it goes on here from where it was stopped"
        }
        Record::Destination(DestinationRecord::Loaded) if keep == Keep::There => {
            return Ok(Resolution(Decided::Theirs));
        }
        Record::Destination(DestinationRecord::Loaded) => {
            "If the other site had resumed it in the meantime, or had moved it to a third one, what it did there is lost"
        }
        Record::Source(
            SourceRecord::Offered { .. } | SourceRecord::Reclaiming { .. } | SourceRecord::Promised { .. },
        )
        | Record::Destination(
            DestinationRecord::Claiming { .. }
            | DestinationRecord::Owned { .. }
            | DestinationRecord::HandedBack { .. },
        ) => return Err(CannotResolve::RegisterDecides { vm, peer }),
        Record::Source(_) | Record::Destination(_) => return Err(CannotResolve::NothingWaits(vm)),
    };
    match destroyed {
        None => Err(CannotResolve::Unconfirmed { vm, peer, risk }),
        Some(named) if *named != peer => Err(CannotResolve::OtherSite { vm, peer, named: named.clone() }),
        Some(_) => Ok(Resolution(Decided::Ours { destroyed: peer })),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ids::{Epoch, MigrationId};
    use crate::migration::destination::{self, Destination, DestinationLimits, Remains};
    use crate::migration::ledger::Ownership;
    use crate::migration::message::{Handover, MigrationMessage, Refusal, Reservation};
    use crate::migration::source::{self, Source, SourceLimits};
    use crate::migration::{Attempt, CommitMode, late};

    fn committed() -> Record {
        Record::Source(SourceRecord::Committed { handover: Box::new(Handover { nics: Vec::new() }) })
    }

    fn decide(last: &Record, keep: Keep, destroyed: Option<&str>) -> Result<Resolution, CannotResolve> {
        let destroyed = destroyed.map(|site| site.parse().unwrap());
        resolution(last, keep, destroyed.as_ref(), &"web1".parse().unwrap(), &"b".parse().unwrap(), false)
    }

    fn decide_with_a_link(last: &Record, keep: Keep) -> Result<Resolution, CannotResolve> {
        let (vm, peer) = ("web1".parse().unwrap(), "b".parse().unwrap());
        resolution(last, keep, Some(&peer), &vm, &peer, true)
    }

    #[test]
    fn with_a_link_an_operator_gives_the_machine_up_here_and_takes_nothing() {
        for last in [committed(), Record::Destination(DestinationRecord::Loaded)] {
            let refused = decide_with_a_link(&last, Keep::Here).unwrap_err();
            assert!(matches!(refused, CannotResolve::PeerAnswers(_)), "{refused}");
        }
        let theirs =
            decide_with_a_link(&Record::Destination(DestinationRecord::Loaded), Keep::There).unwrap();
        assert_eq!(theirs, Resolution(Decided::Theirs));
    }

    #[test]
    fn a_source_whose_destination_has_forgotten_that_it_runs_the_machine_is_released_by_an_operator() {
        let source = as_source(SourceRecord::Committed { handover: handover() });
        let (source, _) = source.handle(source::Event::LinkUp, Duration::ZERO);
        let theirs = || decide_with_a_link(&committed(), Keep::There).unwrap();
        // It may not have heard of the commitment yet, or be about to refuse.
        let (source, step) = source.handle(source::Event::Resolved(theirs()), Duration::ZERO);
        assert_eq!(step.pending_record(), None);
        let unknown = || source::Event::Peer(MigrationMessage::Unknown);
        let (source, _) = source.handle(unknown(), Duration::ZERO);
        let (source, _) = source.handle(source::Event::LinkDown, Duration::ZERO);
        let (source, _) = source.handle(source::Event::LinkUp, Duration::ZERO);
        let (source, step) = source.handle(source::Event::Resolved(theirs()), Duration::ZERO);
        assert_eq!(step.pending_record(), None, "that was another gateway, perhaps");
        let (source, _) = source.handle(unknown(), Duration::ZERO);
        let theirs = theirs();
        let (source, step) = source.handle(source::Event::Resolved(theirs), Duration::ZERO);
        assert_eq!(step.pending_record(), Some(&Record::Source(SourceRecord::Released)));
        assert!(matches!(step.after_record()[..], [source::Action::Release]));
        let (source, _) = source.handle(source::Event::TidiedUp, Duration::ZERO);
        assert_eq!(source.outcome(), Some(&source::Outcome::Moved));
        let refused = decide(&committed(), Keep::There, None).unwrap_err();
        assert!(
            matches!(refused, CannotResolve::TheirsAlready { .. }),
            "without a link nobody can have looked: {refused}"
        );
    }

    #[test]
    fn nothing_is_kept_here_without_the_statement_that_the_other_copy_is_destroyed() {
        for last in [committed(), Record::Destination(DestinationRecord::Loaded)] {
            let refused = decide(&last, Keep::Here, None).unwrap_err();
            assert!(matches!(refused, CannotResolve::Unconfirmed { .. }), "{refused}");
            assert!(refused.to_string().contains("--i-have-destroyed-the-other-copy=b"), "{refused}");
            let refused = decide(&last, Keep::Here, Some("c")).unwrap_err();
            assert!(matches!(refused, CannotResolve::OtherSite { .. }), "{refused}");
            assert!(decide(&last, Keep::Here, Some("b")).is_ok());
        }
    }

    #[test]
    fn only_what_waits_for_the_other_sites_word_is_decided_by_an_operator() {
        for last in [Record::Source(SourceRecord::Parked), Record::Source(SourceRecord::Released)] {
            let refused = decide(&last, Keep::Here, Some("b")).unwrap_err();
            assert!(matches!(refused, CannotResolve::NothingWaits(_)), "{refused}");
        }
    }

    #[test]
    fn what_an_arbiter_decides_no_operator_decides() {
        for last in [
            Record::Source(SourceRecord::Offered { handover: handover() }),
            Record::Source(SourceRecord::Reclaiming { handover: handover() }),
            Record::Source(SourceRecord::Promised { handover: handover() }),
            Record::Destination(DestinationRecord::Claiming { handover: handover() }),
            Record::Destination(DestinationRecord::Owned { handover: handover() }),
            Record::Destination(DestinationRecord::HandedBack { why: Refusal::Operator }),
        ] {
            for keep in [Keep::Here, Keep::There] {
                let refused = decide(&last, keep, Some("b")).unwrap_err();
                assert!(matches!(refused, CannotResolve::RegisterDecides { .. }), "{refused}");
            }
        }
    }

    #[test]
    fn a_destination_that_claimed_hears_that_it_was_taken_back_and_never_runs() {
        let won = || destination::Event::Arbiter(crate::migration::arbiter::Verdict::Destination);
        for (last, written) in [
            (DestinationRecord::Claiming { handover: handover() }, "refused"),
            (DestinationRecord::Owned { handover: handover() }, "handed back"),
        ] {
            let heard = destination::Event::Peer(MigrationMessage::TakenBack { epoch: Epoch(6) });
            let (mut here, step) = as_destination(last).handle(heard, Duration::ZERO);
            assert_eq!(step.pending_record().map(Record::name), Some(written));
            for event in [won(), destination::Event::Stands] {
                let step;
                (here, step) = here.handle(event, Duration::ZERO);
                assert!(step.pending_record().is_none() && step.after_record().is_empty());
            }
        }
    }

    #[test]
    fn a_loaded_machine_is_left_to_the_source_without_a_statement() {
        assert!(decide(&Record::Destination(DestinationRecord::Loaded), Keep::There, None).is_ok());
        let refused = decide(&committed(), Keep::There, None).unwrap_err();
        assert!(matches!(refused, CannotResolve::TheirsAlready { .. }), "{refused}");
    }

    fn attempt(peer: &str) -> Attempt {
        let (id, vm) = (MigrationId(7), "web1".parse().unwrap());
        Attempt { id, vm, peer: peer.parse().unwrap(), epoch: Epoch(5), commit: CommitMode::Confirmed }
    }

    fn as_source(record: SourceRecord) -> Source {
        let (limits, site) = (SourceLimits::default(), "a".parse().unwrap());
        Source::recover(attempt("b"), record, limits, &site, Duration::ZERO).0
    }

    fn as_destination(record: DestinationRecord) -> Destination {
        let (limits, site) = (DestinationLimits::default(), "b".parse().unwrap());
        let reservation =
            Reservation { care_of: Vec::new(), shadow_pages: 0, disk_window_log: 20, memory_base: None };
        let remains = Remains { nics: Vec::new(), reservation, last: record, qemu_found: true };
        Destination::recover(attempt("a"), remains, limits, &site, Duration::ZERO).0
    }

    fn handover() -> Box<Handover> {
        Box::new(Handover { nics: Vec::new() })
    }

    fn ours(peer: &str) -> Resolution {
        Resolution(Decided::Ours { destroyed: peer.parse().unwrap() })
    }

    #[test]
    fn a_machine_taken_back_runs_in_a_new_epoch_and_one_that_was_released_is_not_taken_back() {
        let source = as_source(SourceRecord::Committed { handover: handover() });
        let (_, step) = source.handle(source::Event::Resolved(ours("b")), Duration::ZERO);
        let record = step.pending_record().unwrap().clone();
        let away = Ownership::Away { site: "b".parse().unwrap(), epoch: Epoch(5) };
        let after = Ownership::after(Some(&away), &record, Epoch(5), &"b".parse().unwrap());
        assert_eq!(after, Some(Ownership::Here { epoch: Epoch(6) }));
        let permits = step.after_record();
        assert!(matches!(&permits[..], [source::Action::Rollback(permit)] if permit.epoch() == Epoch(6)));

        let (_, step) =
            as_source(SourceRecord::Released).handle(source::Event::Resolved(ours("b")), Duration::ZERO);
        assert!(step.pending_record().is_none() && step.after_record().is_empty());
    }

    #[test]
    fn a_destination_that_comes_back_loaded_hears_it_and_never_runs() {
        let taken = Record::Source(SourceRecord::TakenBack { destroyed: "b".parse().unwrap() });
        let asked = MigrationMessage::Loaded { epoch: Epoch(5) };
        let answer = late::answer(Some((Epoch(5), &taken)), &asked).unwrap();
        for heard in [answer, MigrationMessage::TakenBack { epoch: Epoch(6) }] {
            let loaded = as_destination(DestinationRecord::Loaded);
            let (loaded, step) = loaded.handle(destination::Event::Peer(heard), Duration::ZERO);
            let refused =
                matches!(step.pending_record(), Some(Record::Destination(DestinationRecord::Refused { .. })));
            assert!(refused, "{step:?}");
            let commit = MigrationMessage::Commit { epoch: Epoch(5), handover: handover() };
            let (_, step) = loaded.handle(destination::Event::Peer(commit), Duration::ZERO);
            let actions = step.after_record();
            assert!(!actions.iter().any(|each| matches!(each, destination::Action::Activate(..))));
        }
    }

    #[test]
    fn a_destination_that_took_over_says_so_to_a_source_that_comes_back_committed() {
        let loaded = as_destination(DestinationRecord::Loaded);
        let (_, step) = loaded.handle(destination::Event::Resolved(ours("a"), handover()), Duration::ZERO);
        let record = step.pending_record().unwrap().clone();
        assert!(matches!(&step.after_record()[..], [destination::Action::Activate(..)]));
        let commit = MigrationMessage::Commit { epoch: Epoch(5), handover: handover() };
        let answer = late::answer(Some((Epoch(5), &record)), &commit);
        assert_eq!(answer, Some(MigrationMessage::Activated { epoch: Epoch(5) }));
        let (_, step) = as_source(SourceRecord::Committed { handover: handover() })
            .handle(source::Event::Peer(answer.unwrap()), Duration::ZERO);
        assert_eq!(step.pending_record(), Some(&Record::Source(SourceRecord::Released)));
    }

    #[test]
    fn one_that_had_it_and_was_overruled_gives_no_permit() {
        let peer = "a".parse().unwrap();
        let here = Ownership::Here { epoch: Epoch(5) };
        let overruled = Record::Destination(DestinationRecord::Overruled);
        let after = Ownership::after(Some(&here), &overruled, Epoch(5), &peer).unwrap();
        assert_eq!(after, Ownership::Away { site: peer, epoch: Epoch(6) });
        assert!(after.permit(&attempt("a").vm, None, &[]).is_err());
    }
}
