//! What is asked of an arbiter, and what its register says: the third party of a hand-over.
//!
//! ```text
//!               source: for itself        +--> Source
//!   Open -------------------------------->|      ^
//!   (an older    destination: claims      |      | durably refused, or handed back
//!    epoch)      source: as it promised   +--> Destination
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
    /// No answer that can be trusted; a request may or may not have been applied.
    Unknown,
    /// It says something it cannot say unless it was put back to an older state, or somebody else wrote it.
    /// Nothing follows from it: hold.
    Behind,
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
    if at < seen || at > epoch {
        return Verdict::Behind;
    }
    if at < epoch {
        return Verdict::Open;
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
    fn a_register_behind_what_was_seen_or_ahead_of_the_attempt_decides_nothing() {
        assert_eq!(said(Some((4, "a")), 5), Verdict::Behind, "put back from a backup");
        assert_eq!(said(None, 1), Verdict::Behind, "emptied");
        assert_eq!(said(Some((6, "b")), 5), Verdict::Behind, "another attempt's");
        assert_eq!(said(Some((5, "c")), 5), Verdict::Behind, "a third site's");
    }
}
