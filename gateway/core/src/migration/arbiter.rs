//! What is asked of an arbiter, and what its register says: the third party of a hand-over.
//!
//! ```text
//!               source: for itself        +--> Source -------+
//!   Open -------------------------------->|      ^           | the machine moves again
//!   (an older    destination: claims      |      | durably   |----------------------> Later
//!    epoch)      source: as it promised   |      | refused   |
//!                                         +--> Destination --+
//! ```
//!
//! The register holds one epoch and one owner and changes by compare-and-swap only. A request may be applied
//! late or several times; that is harmless, because nothing ever leads back to Open. Who may ask for what
//! stands in the tables of the source and the destination. Nothing is asked here: see the gateway's edge.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, SiteName};

/// Which register arbitrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arbiter {
    /// The ownership record beside the machine's name, at its zone's primary server (RFC 2136).
    Dns,
    /// A key of the machine's own in an etcd cluster.
    Etcd,
}

/// What is asked of the register. The answer is what it says afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Only what it says.
    Read,
    /// If it is open, it is to name the destination.
    ForDestination,
    /// If it is open, it is to name the source.
    ForSource,
    /// It is to name the source, even where it names the destination: the destination will never run it.
    BackToSource,
}

/// What the register says of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody has won the attempt's epoch yet.
    Open,
    /// The epoch is the source's: the destination will never run it.
    Source,
    /// The epoch is the destination's.
    Destination,
    /// A later epoch stands there: this one was won, and by whoever moved the machine on. A side that has not done that
    /// knows that it was the other.
    Later,
    /// No answer that can be trusted; a request may or may not have been applied.
    Unknown,
    /// It says something it cannot say unless it was put back to an older state, or somebody else wrote it.
    /// Nothing follows from it: hold.
    Behind,
}

/// A hand-over that a register decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contest {
    /// The epoch to be won.
    pub epoch: Epoch,
    /// Who has the machine.
    pub source: SiteName,
    /// Who is to have it.
    pub destination: SiteName,
}

/// What a register said, and what that means for a contest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// The epoch it holds; 0 for none.
    pub epoch: Epoch,
    /// What follows.
    pub verdict: Verdict,
}

impl Contest {
    /// What follows from a register that holds `held`, the highest epoch ever seen in it being `seen`.
    pub fn said(&self, held: Option<(Epoch, &str)>, seen: Epoch) -> Said {
        let verdict = judge(held, seen, self.epoch, &self.source, &self.destination);
        Said { epoch: held.map_or(Epoch(0), |(epoch, _)| epoch), verdict }
    }

    /// Whom a register that says `verdict` is to name after `request`; nobody if it stays as it is.
    pub fn winner(&self, request: Request, verdict: Verdict) -> Option<&SiteName> {
        match (request, verdict) {
            (Request::ForDestination, Verdict::Open) => Some(&self.destination),
            (Request::ForSource, Verdict::Open)
            | (Request::BackToSource, Verdict::Open | Verdict::Destination) => Some(&self.source),
            (Request::Read | Request::ForDestination | Request::ForSource | Request::BackToSource, _) => None,
        }
    }
}

/// What a register that holds `held` says of the attempt that would begin `epoch`. `seen` is the highest epoch
/// this site has ever seen in it.
pub fn judge(
    held: Option<(Epoch, &str)>,
    seen: Epoch,
    epoch: Epoch,
    source: &SiteName,
    destination: &SiteName,
) -> Verdict {
    let (at, owner) = held.unwrap_or((Epoch(0), ""));
    if at < seen {
        return Verdict::Behind;
    }
    if at != epoch {
        return if at < epoch { Verdict::Open } else { Verdict::Later };
    }
    if owner == source.as_str() {
        Verdict::Source
    } else if owner == destination.as_str() {
        Verdict::Destination
    } else {
        Verdict::Behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(held: Option<(u64, &str)>, seen: u64) -> Verdict {
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        judge(held.map(|(epoch, owner)| (Epoch(epoch), owner)), Epoch(seen), Epoch(5), &a, &b)
    }

    #[test]
    fn an_older_epoch_is_open_and_the_attempts_own_names_its_winner() {
        assert_eq!(said(None, 0), Verdict::Open);
        assert_eq!(said(Some((4, "b")), 4), Verdict::Open);
        assert_eq!(said(Some((5, "a")), 4), Verdict::Source);
        assert_eq!(said(Some((5, "b")), 5), Verdict::Destination);
    }

    #[test]
    fn an_open_register_is_won_once_and_only_a_way_back_changes_it_again() {
        let (source, destination) = ("a".parse().unwrap(), "b".parse().unwrap());
        let contest = Contest { epoch: Epoch(5), source, destination };
        let winner = |request, verdict| contest.winner(request, verdict).map(SiteName::as_str);
        assert_eq!(winner(Request::ForDestination, Verdict::Open), Some("b"));
        assert_eq!(winner(Request::ForSource, Verdict::Open), Some("a"));
        assert_eq!(winner(Request::BackToSource, Verdict::Open), Some("a"));
        assert_eq!(winner(Request::BackToSource, Verdict::Destination), Some("a"));
        assert_eq!(winner(Request::ForDestination, Verdict::Source), None);
        assert_eq!(winner(Request::ForSource, Verdict::Destination), None);
        for verdict in [Verdict::Open, Verdict::Source, Verdict::Destination] {
            assert_eq!(winner(Request::Read, verdict), None);
        }
        for request in [Request::ForDestination, Request::ForSource, Request::BackToSource] {
            assert_eq!(winner(request, Verdict::Behind), None, "{request:?}");
            assert_eq!(winner(request, Verdict::Unknown), None, "{request:?}");
        }
    }

    #[test]
    fn a_register_behind_what_was_seen_or_of_a_third_site_decides_nothing() {
        assert_eq!(said(Some((4, "a")), 5), Verdict::Behind, "put back from a backup");
        assert_eq!(said(None, 1), Verdict::Behind, "emptied");
        assert_eq!(said(Some((6, "b")), 7), Verdict::Behind, "later, and put back all the same");
        assert_eq!(said(Some((5, "c")), 5), Verdict::Behind, "a third site's");
    }

    #[test]
    fn a_later_epoch_says_that_this_one_was_decided_and_is_never_changed() {
        for owner in ["a", "b", "c"] {
            assert_eq!(said(Some((6, owner)), 5), Verdict::Later);
        }
        let (source, destination) = ("a".parse().unwrap(), "b".parse().unwrap());
        let contest = Contest { epoch: Epoch(5), source, destination };
        for request in [Request::Read, Request::ForDestination, Request::ForSource, Request::BackToSource] {
            assert_eq!(contest.winner(request, Verdict::Later), None, "{request:?}");
        }
    }
}
